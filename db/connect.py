"""Connections to the database, for each kind of process.

`SURETY_<KIND>_DATABASE_URL` names a login of its own, a member of the kind's group role. Without it DATABASE_URL
is used with `role` set, which prevents mistakes only: an intruder could reset the role. Timeouts are
settings of the connection, because the settings of a group role don't apply to its members. A dead server is detected
within seconds; a server that acknowledges but never answers, shortly after the statement's timeout. Kinds that write
connect to the primary if an address names several hosts.
"""

from __future__ import annotations

import asyncio
import os
import socket
from typing import Any, Literal, Self, TypeVar

import psycopg
from psycopg import AsyncConnection, Connection
from psycopg.abc import PQGen
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg.errors import Diagnostic
from psycopg.pq import TransactionStatus

from db.errors import SettingsError
from db.poolers import open_session, require_login_settings, restore_session
from db.settings import Settings

Result = TypeVar("Result")

# The function of PostgreSQL that waits for synchronous standbys, which a warning names in any language.
SYNCHRONOUS_WAIT = "SyncRepWaitForLSN"
ProcessKind = Literal["deploy", "api", "webhook", "worker", "analyst", "auditor"]

NETWORK_DEFAULTS = {
    "connect_timeout": 5,
    "tcp_user_timeout": 10_000,
    "keepalives": 1,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
}

# The server ends the session of a vanished client within half a minute instead of two hours, which frees its locks.
# Unix sockets ignore these settings.
SERVER_KEEPALIVES = {
    "tcp_keepalives_idle": str(NETWORK_DEFAULTS["keepalives_idle"]),
    "tcp_keepalives_interval": str(NETWORK_DEFAULTS["keepalives_interval"]),
    "tcp_keepalives_count": str(NETWORK_DEFAULTS["keepalives_count"]),
    "tcp_user_timeout": str(NETWORK_DEFAULTS["tcp_user_timeout"]),
}

# statement_timeout, lock_timeout, idle_in_transaction_session_timeout
TIMEOUTS: dict[ProcessKind, tuple[str, str, str]] = {
    "deploy": ("0", "0", "60s"),
    "api": ("10s", "5s", "10s"),
    "webhook": ("10s", "5s", "10s"),
    "worker": ("30s", "10s", "30s"),
    "analyst": ("15min", "5s", "5min"),
    "auditor": ("60s", "5s", "60s"),
}
# How long asyncio's connections wait for an answer: longer than statement_timeout.
ANSWER_SECONDS_MAX: dict[ProcessKind, float] = {
    "deploy": 86_400.0,
    "api": 15.0,
    "webhook": 15.0,
    "worker": 35.0,
    "analyst": 905.0,
    "auditor": 65.0,
}
# How often a wait looks at its connection without an event. With psycopg's default, a tenth of a second, a listener
# alone would take most of the time of an idle process.
LOOK_SECONDS = 5.0
# Without prepared statements they need no session of their own: a pooler may give each transaction another one.
SHARING_KINDS: frozenset[ProcessKind] = frozenset({"api", "webhook"})
READ_ONLY_KINDS: frozenset[ProcessKind] = frozenset({"analyst", "auditor"})


def role_of(kind: ProcessKind) -> str | None:
    """The group role with the rights of a kind of process; deploys run as a login without one."""
    return None if kind == "deploy" else f"surety_{kind}"


def conninfo(kind: ProcessKind, settings: Settings, *, search_path: str | None = None) -> str:
    """The connection string of a kind of process. Raises SettingsError if no address is set.

    `search_path` is for Procrastinate alone, whose statements name no schema.
    """
    own = getattr(settings, f"surety_{kind}_database_url", None)
    if is_sharing_sessions(kind, settings):
        if own is None:
            variable = f"SURETY_{kind.upper()}_DATABASE_URL"
            raise SettingsError(f"SURETY_POOL_MODE=transaction needs a login of the process's own: set {variable}")
        return without_options(own.reveal(), kind)
    if own is not None:
        return harden(own.reveal(), kind, search_path=search_path)
    return harden(settings.require("database_url").reveal(), kind, role=role_of(kind), search_path=search_path)


def reader_conninfo(settings: Settings) -> str | None:
    """The connection string of the API's replica, a standby if one of its hosts is; None if no address is set."""
    if settings.surety_reader_database_url is None:
        return None
    url = make_conninfo(settings.surety_reader_database_url.reveal(), target_session_attrs="prefer-standby")
    return harden(url, "api")


def harden(url: str, kind: ProcessKind, *, role: str | None = None, search_path: str | None = None) -> str:
    """An address with the timeouts of a kind of process, its name and optionally a role; its own parameters win."""
    given = conninfo_to_dict(url)
    options = {
        **session_settings(kind),
        **SERVER_KEEPALIVES,
        **({"role": role} if role else {}),
        **({"search_path": search_path} if search_path else {}),
    }
    words = [f"-c {name}={value}" for name, value in options.items()]
    if given.get("options"):
        words.append(str(given["options"]))
    return make_conninfo("", **{**client_settings(kind), **given, "options": " ".join(words)})


def without_options(url: str, kind: ProcessKind) -> str:
    """An address for a pooler in transaction mode: the settings of the session are those of the login."""
    return make_conninfo("", **{**client_settings(kind), **conninfo_to_dict(url)})


def session_settings(kind: ProcessKind) -> dict[str, str]:
    """The settings of a session, by their names in PostgreSQL."""
    statement, lock, idle = TIMEOUTS[kind]
    return {
        "statement_timeout": statement,
        "lock_timeout": lock,
        "idle_in_transaction_session_timeout": idle,
        "TimeZone": "UTC",
    }


def client_settings(kind: ProcessKind) -> dict[str, Any]:
    """The settings of the client's end."""
    return {
        **NETWORK_DEFAULTS,
        "application_name": f"surety-{kind}",
        "target_session_attrs": "any" if kind in READ_ONLY_KINDS else "read-write",
    }


def is_sharing_sessions(kind: ProcessKind, settings: Settings) -> bool:
    """Whether a kind of process uses a pooler in transaction mode: it needs no session of its own."""
    return settings.surety_pool_mode == "transaction" and kind in SHARING_KINDS


def connection_options(kind: ProcessKind, settings: Settings) -> dict[str, Any]:
    """The options of psycopg's connections: autocommit, and no prepared statements where sessions are shared."""
    return {"autocommit": True} | ({"prepare_threshold": None} if is_sharing_sessions(kind, settings) else {})


def connect(kind: ProcessKind, settings: Settings) -> Connection[tuple[Any, ...]]:
    """A connection in autocommit mode: each transaction is a block in the code."""
    return open_session(conninfo(kind, settings))


def find_undeployed(kind: ProcessKind, settings: Settings, function: str) -> str | None:
    """What `surety deploy` has to make first: the role of a kind of process, or a function that it calls.

    Raises psycopg.Error if the database can't be used for another reason, DatabaseNotReady for a pooler that can't be.
    """
    address, role = conninfo(kind, settings), role_of(kind)
    is_sharing = is_sharing_sessions(kind, settings)
    try:
        with psycopg.connect(address, autocommit=True) if is_sharing else open_session(address) as connection:
            if is_sharing:
                require_login_settings(connection, session_settings(kind))
            row = connection.execute("select to_regprocedure(%s) is not null", (function,)).fetchone()
    except psycopg.Error as error:
        # A failed login has no SQLSTATE. It names the role in any language, as does setting the role behind a pooler;
        # a login's own name is another matter.
        given = conninfo_to_dict(address)
        if f"role={role}" in str(given.get("options")) and given.get("user") != role and f'"{role}"' in str(error):
            return f"role {role}"
        raise
    return None if row == (True,) else function


class CommitNotReplicated(psycopg.OperationalError):
    """A commit that a failover may lose. A repetition waits for the standby."""


class BoundedWaitConnection(AsyncConnection[tuple[Any, ...]]):
    """Closes the socket if a statement gets no answer in time; the statement fails as on a lost connection.

    Raises CommitNotReplicated for a commit whose wait for a synchronous standby was canceled: PostgreSQL reports such a
    commit as successful, with a warning.

    Neither tcp_user_timeout nor keepalives notice a peer that acknowledges but never answers. Waiting for notifications
    is not bounded.
    """

    answer_seconds_max = 35.0

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._is_commit_uncertain = False
        self.add_notice_handler(self._note_canceled_wait)

    @classmethod
    async def connect(cls, conninfo: str = "", **options: Any) -> Self:
        """Connect, with the settings of `conninfo` also through a pooler. Raises psycopg.Error, DatabaseNotReady."""
        connection = await super().connect(conninfo, **options)
        try:
            await restore_session(connection, conninfo)
        except BaseException:
            await connection.close()
            raise
        return connection

    async def wait(
        self,
        gen: PQGen[Result],
        interval: float = LOOK_SECONDS,
        timeout: float | None = None,  # noqa: ASYNC109  psycopg's signature
    ) -> Result:
        """Wait as psycopg does, up to a limit."""
        timer = asyncio.get_running_loop().call_later(self.answer_seconds_max, self._shut_down_socket)
        try:
            answer = await super().wait(gen, interval, timeout)
        finally:
            timer.cancel()
        if self._is_commit_uncertain:
            self._is_commit_uncertain = False
            raise CommitNotReplicated("the wait for a synchronous standby was canceled")
        return answer

    def _note_canceled_wait(self, notice: Diagnostic) -> None:
        if notice.source_function == SYNCHRONOUS_WAIT:
            self._is_commit_uncertain = True

    def _shut_down_socket(self) -> None:
        if self.pgconn.transaction_status == TransactionStatus.ACTIVE:
            with socket.socket(fileno=os.dup(self.pgconn.socket)) as line:
                line.shutdown(socket.SHUT_RDWR)


def bounded_connection(kind: ProcessKind) -> type[BoundedWaitConnection]:
    """The connection class of a kind of process."""
    return type(
        f"BoundedWaitConnection{kind.title()}",
        (BoundedWaitConnection,),
        {"answer_seconds_max": ANSWER_SECONDS_MAX[kind]},
    )


async def connect_async(kind: ProcessKind, settings: Settings) -> AsyncConnection[tuple[Any, ...]]:
    """A connection for asyncio in autocommit mode, whose waiting is bounded."""
    return await bounded_connection(kind).connect(conninfo(kind, settings), **connection_options(kind, settings))
