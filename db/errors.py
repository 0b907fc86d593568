"""The errors of Surety, and the only table that classifies errors of the database.

The command line shows the text of a SuretyError without a traceback.

SuretyError
├── SettingsError        an environment variable is wrong
├── DatabaseNotReady     the database can't be reached or not used, or Surety was not deployed there
├── DatabaseClosed       the database was restored, or is a copy: it does no business
├── EmbeddedServerError  the embedded PostgreSQL did not start
└── DeployError          a deploy failed
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import psycopg

ErrorKind = Literal["conflict", "transient", "unreachable", "not_deployed", "ours", "request"]
"""The kinds of database errors, each with the response to it.

conflict      another transaction was in the way: repeat the transaction
transient     the session ended, resources ran out, or a deploy changed a prepared statement's result: repeat it on a
              new connection
unreachable   no server answers, or it is no longer the primary: wait for it
not_deployed  a schema, table or function is missing: Surety was not deployed here, or in another version
ours          no single request caused it (missing rights, a statement canceled by its timeout, a restored database):
              neither a repetition nor a smaller batch helps
request       the values of one request caused it: dividing the batch finds that request
"""

# By SQLSTATE or its beginning; the longest match decides.
KIND_BY_SQLSTATE: dict[str, ErrorKind] = {
    "08": "unreachable",  # connection exception
    "0A000": "transient",  # feature not supported: a cached plan must not change its result type
    "25006": "unreachable",  # read-only transaction: the server was demoted by a failover
    "25P03": "transient",  # idle-in-transaction timeout: the server ended the session of a stalled process
    "28": "ours",  # invalid authorization
    "3D": "ours",  # no such database
    "3F000": "not_deployed",  # no such schema
    "40": "conflict",  # serialization failure, deadlock
    "42": "ours",  # syntax error, insufficient privilege
    "42883": "not_deployed",  # no such function
    "42P01": "not_deployed",  # no such table
    "53": "transient",  # insufficient resources: disk, memory, connections
    "55P03": "conflict",  # lock not available
    "57014": "ours",  # query canceled, as by statement_timeout
    "57P": "unreachable",  # the server starts, stops or ended the session
    "58": "transient",  # system error, as of input and output
    "SU005": "ours",  # the database was restored elsewhere
}


class SuretyError(Exception):
    """An error that the user can correct; the text says how."""


class SettingsError(SuretyError):
    """The environment is wrong; the text names the variable."""


class DatabaseNotReady(SuretyError):
    """The database can't be reached, a pooler before it can't be used, or Surety was not deployed there."""


class DatabaseClosed(SuretyError):
    """The database was restored and no one has said what it is, or it is a copy: no provider may be called from it."""


class EmbeddedServerError(SuretyError):
    """The embedded PostgreSQL could not be started."""


class DeployError(SuretyError):
    """The database could not be brought to a version. Earlier steps stay applied; the rest is unchanged."""


def kind_of(error: psycopg.Error) -> ErrorKind:
    """Classify an error of the database."""
    import psycopg

    if error.sqlstate is None:
        # libpq gives no SQLSTATE for connections that fail or are lost, psycopg_pool none for its timeout.
        return "unreachable" if isinstance(error, psycopg.OperationalError) else "request"
    if is_catalog_race(error):
        return "conflict"
    for length in (5, 3, 2):
        if kind := KIND_BY_SQLSTATE.get(error.sqlstate[:length]):
            return kind
    return "request"


def is_catalog_race(error: psycopg.Error) -> bool:
    """Whether two sessions changed the same entry of the catalog, such as a role, at the same time."""
    if error.sqlstate == "XX000":
        return "concurrently" in str(error)
    return error.sqlstate == "23505" and error.diag.schema_name == "pg_catalog"


def is_retryable(error: BaseException | None) -> bool:
    """Whether a repetition, on a new connection or after a wait for the server, may succeed."""
    import psycopg

    return isinstance(error, psycopg.Error) and kind_of(error) in {"conflict", "transient", "unreachable"}


def is_unreachable(error: BaseException | None) -> bool:
    """Whether no primary answers, so that only waiting helps."""
    import psycopg

    return isinstance(error, psycopg.Error) and kind_of(error) == "unreachable"


def is_canceled_by_server(error: psycopg.Error) -> bool:
    """Whether the server canceled a statement for reasons of its own: the replay of a standby, or its end."""
    return error.sqlstate is not None and error.sqlstate.startswith(("40", "57P"))


def is_read_only(error: psycopg.Error) -> bool:
    """Whether a server answered that writes nothing: a standby, or one whose transactions are read-only."""
    return error.sqlstate == "25006" or "session is read-only" in str(error)


def message_of(error: psycopg.Error) -> str:
    """An error in one line, without the values that a server's detail may carry."""
    if error.diag.message_primary:
        return error.diag.message_primary
    lines = str(error).strip().splitlines() or [type(error).__name__]
    # psycopg lists the failure of each host after that of the last one.
    attempts = [line for line in lines if line.startswith("- host:")]
    return "; ".join(without_host(line).strip() for line in attempts or lines[:1])


def without_host(line: str) -> str:
    """A line of psycopg's list of failures without the host, which libpq's text names again."""
    return line.rpartition("connection failed: ")[2]


def error_text(error: BaseException) -> str:
    """An error's type and message in one line, without the row that the database names in its detail."""
    import psycopg

    text = message_of(error) if isinstance(error, psycopg.Error) else str(error)
    return " ".join(f"{type(error).__name__}: {text}".split())


def outdates_connection(error: psycopg.Error) -> bool:
    """Whether the connection still works but must not be used again: its plans, or its server, were replaced."""
    return error.sqlstate in {"0A000", "25006"}
