"""Logs of every process: one line per entry, with the time in UTC, the process and its id.

    2026-11-30T07:04:42.118Z WARNING api[4711] surety.http: req_… failed: …

A connection loss is one line. Any other unexpected error is followed by its traceback, in which the details of
database errors are left out: they may hold whole rows, with a customer's data.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

from db.errors import is_unreachable, message_of


class LineFormatter(logging.Formatter):
    """Formats an entry; `process` names the kind of process."""

    def __init__(self, process: str) -> None:
        super().__init__(f"%(asctime)s %(levelname)s {process}[%(process)d] %(name)s: %(message)s")

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:  # noqa: N802  logging's name
        """The time in UTC, with milliseconds."""
        return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")

    def format(self, record: logging.LogRecord) -> str:
        """The entry; its traceback is left out if the error is a lost connection."""
        error = record.exc_info[1] if record.exc_info else None
        text = " ".join(record.getMessage().split())
        # A traceback that another formatter made is not used.
        changed: dict[str, Any] = {"msg": text, "args": None, "exc_text": None}
        if (lost := connection_loss_behind(error)) is not None:
            changed |= {"msg": f"{text}: {lost}", "exc_info": None, "stack_info": None}
        return super().format(logging.makeLogRecord(record.__dict__ | changed))

    def formatException(self, ei: Any) -> str:  # noqa: N802  logging's name
        """The traceback without the details of database errors."""
        text = super().formatException(ei)
        for values in row_values_of(ei[1]):
            text = text.replace(values, "(left out)")
        return text


def row_values_of(error: BaseException | None) -> Iterator[str]:
    """The texts of database errors, in a chain of errors, that may hold the values of a row or a request."""
    import psycopg

    waiting, seen = [error], set()
    while waiting:
        if (one := waiting.pop()) is None or id(one) in seen:
            continue
        seen.add(id(one))
        if isinstance(one, psycopg.Error):
            if detail := one.diag.message_detail:
                yield detail
            if (context := one.diag.context) and "data, line" in context:
                yield context
        waiting += [one.__cause__, one.__context__, *(one.exceptions if isinstance(one, BaseExceptionGroup) else ())]


def connection_loss_behind(error: BaseException | None) -> str | None:
    """The lost connection that caused an error, in one line; None if something else did."""
    import psycopg

    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, psycopg.Error) and is_unreachable(error):
            return f"the database is away: {message_of(error)}"
        seen.add(id(error))
        # An error raised while another was handled is not explained by it, unless it says so.
        error = error.__cause__
    return None


def logging_config(process: str) -> dict[str, Any]:
    """The configuration of a serving process's logs, for logging.config.dictConfig."""
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"line": {"()": "db.logs.LineFormatter", "process": process}},
        "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "line"}},
        "loggers": {
            "surety": {"level": "INFO", "handlers": ["stderr"]},
            "uvicorn": {"level": "WARNING", "handlers": ["stderr"]},
            "psycopg.pool": {"level": "ERROR", "handlers": ["stderr"]},
        },
    }


def format_root_handlers(process: str) -> None:
    """Give the root logger's plain handlers our format, as those that Procrastinate's command line adds."""
    for handler in logging.getLogger().handlers:
        if type(handler) is logging.StreamHandler:
            handler.setFormatter(LineFormatter(process))
