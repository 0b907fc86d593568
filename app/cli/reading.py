"""Commands that only read: they use the primary, or a standby if no server of the address is a primary.

On a standby, the replay of the primary's changes may cancel a statement that is in its way. Each statement of a reading
command is a transaction of its own, so a repetition has new and short snapshots.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import psycopg
from psycopg.conninfo import make_conninfo

from db.connect import conninfo, harden
from db.errors import SuretyError, is_canceled_by_server, kind_of, message_of
from db.poolers import open_session
from db.settings import load_settings

P = ParamSpec("P")
Result = TypeVar("Result")

PAUSE_SECONDS = (0.1, 0.5, 2.0)
"""Before each repetition."""


class CanceledOnStandby(SuretyError):
    """The replay of a standby canceled a command again and again."""


def reads(command: Callable[P, Result]) -> Callable[P, Result]:
    """A function that reads and prints nothing before its last statement: it is repeated when the server canceled it.

    Raises CanceledOnStandby, or psycopg.Error if the server ended the session each time.
    """

    @wraps(command)
    def repeated(*args: P.args, **kwargs: P.kwargs) -> Result:
        for pause in PAUSE_SECONDS:
            try:
                return command(*args, **kwargs)
            except psycopg.Error as error:
                if not is_canceled_by_server(error):
                    raise
            time.sleep(pause * random.uniform(0.5, 1.0))
        try:
            return command(*args, **kwargs)
        except psycopg.Error as error:
            if not is_canceled_by_server(error) or kind_of(error) != "conflict":
                raise
            raise CanceledOnStandby(
                f"the replay of the standby canceled this {len(PAUSE_SECONDS) + 1} times ({message_of(error)}): run it"
                " again, or raise max_standby_streaming_delay there"
            ) from None

    return repeated


def connect_to_read() -> psycopg.Connection[tuple[Any, ...]]:
    """A connection in autocommit mode to the primary of DATABASE_URL, or to a standby if none of its servers is one."""
    settings = load_settings()
    try:
        return open_session(conninfo("deploy", settings))
    except psycopg.OperationalError as unreachable:
        url = settings.require("database_url").reveal()
        address = harden(make_conninfo(url, target_session_attrs="standby"), "deploy")
        try:
            return open_session(address)
        except psycopg.OperationalError:
            raise unreachable from None
