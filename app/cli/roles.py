"""`surety roles`: logins of analysts and auditors in the database. Each change is audited."""

from __future__ import annotations

import json
import re
import secrets
from pathlib import Path
from typing import Any, NamedTuple

import click
import psycopg
from psycopg import sql
from psycopg.rows import dict_row
from rich.table import Table

from app.cli.identity import authorize
from app.cli.options import json_option
from app.cli.reading import connect_to_read, reads
from app.cli.tables import print_table
from app.wording import count_noun
from db.connect import TIMEOUTS, ProcessKind, connect
from db.errors import SuretyError
from db.settings import load_settings

Connection = psycopg.Connection[tuple[Any, ...]]

KINDS: tuple[ProcessKind, ...] = ("analyst", "auditor")
LOGIN_NAME = re.compile(r"[a-z_][a-z0-9_]{0,62}")
NAMES_OF_OURS = re.compile(r"(surety|procrastinate|postgres|pg)(_.*)?")
MARK = "login of surety roles"
"""The comment on a role that this command created. It touches no other role."""
PASSWORD = re.compile(r"[!-~]{12,128}")
PASSWORD_BYTES = 24

LIST_LOGINS = """
select
    r.rolname as name, held.kind as role, r.rolcanlogin as is_active, r.rolconnlimit as connections,
    settings.of ->> 'statement_timeout' as statement_timeout, settings.of ->> 'lock_timeout' as lock_timeout,
    settings.of ->> 'idle_in_transaction_session_timeout' as idle_in_transaction_session_timeout
from pg_roles as r
left join lateral (
    select substr(g.rolname, 8) as kind from pg_auth_members as m join pg_roles as g on g.oid = m.roleid
    where m.member = r.oid and g.rolname in ('surety_analyst', 'surety_auditor')
    order by 1 limit 1
) as held on true
cross join lateral (
    select coalesce(jsonb_object_agg(split_part(c, '=', 1), split_part(c, '=', 2)), '{}') as of
    from unnest(r.rolconfig) as c
) as settings
where shobj_description(r.oid, 'pg_authid') = %(mark)s and (%(name)s::text is null or r.rolname = %(name)s)
order by r.rolname
"""


class LoginBounds(NamedTuple):
    """The bounds of a login."""

    connections: int
    statement_timeout: str
    lock_timeout: str
    idle_in_transaction_session_timeout: str


@click.group("roles")
def database_roles() -> None:
    """Logins of analysts and auditors in the database: grant one, list them, revoke one."""


@database_roles.command("grant-login")
@click.argument("kind", metavar="analyst|auditor", type=click.Choice(KINDS))
@click.argument("name")
@click.option("--connections", type=click.IntRange(1, 100), default=5, show_default=True, help="How many at once.")
@click.option(
    "--statement-seconds", type=click.IntRange(1, 86_400),
    help="How long a statement may take; default: 900 for an analyst, 60 for an auditor.",
)  # fmt: skip
@click.option(
    "--password-file", type=click.Path(path_type=Path, allow_dash=True),
    help="A file with the password in its first line; `-` is standard input.",
)  # fmt: skip
@click.option("--ask-password", is_flag=True, help="Ask for the password.")
@click.option("--new-password", is_flag=True, help="Make a new password for a login that exists.")
@json_option
def grant_login(
    kind: ProcessKind,
    name: str,
    connections: int,
    statement_seconds: int | None,
    password_file: Path | None,
    ask_password: bool,
    new_password: bool,
    as_json: bool,
) -> None:
    """Create a login that reads, or change one: its role, bounds and password.

    An analyst reads the views of `report`, an auditor also `audit.trail` and `invariant`. Without an option for it, a
    new login gets a new password, which is printed once, and an existing one keeps its own. PostgreSQL gets only the
    SCRAM verifier of a password.
    """
    require_free_name(name)
    if [password_file is not None, ask_password, new_password].count(True) > 1:
        raise SuretyError("give one of --password-file, --ask-password and --new-password")
    password = given_password(password_file, ask=ask_password)
    statement, lock, idle = TIMEOUTS[kind]
    bounds = LoginBounds(connections, f"{statement_seconds}s" if statement_seconds else statement, lock, idle)
    with connect("deploy", load_settings()) as conn:
        by = authorize(conn, "operators:write")
        known = find_login(conn, name)
        if known is None and conn.execute("select oid from pg_roles where rolname = %s", (name,)).fetchone():
            raise SuretyError(f"NAME: there is a role {name} already, which `surety roles grant-login` did not create")
        if password is None and (known is None or new_password):
            password = made = secrets.token_urlsafe(PASSWORD_BYTES)
        else:
            made = None
        verifier = None if password is None else verifier_of(conn, name, password)
        statements = login_statements(kind, name, bounds, verifier, is_new=known is None)
        execute_or_show(conn, statements, name, "granted" if known is None else "changed", kind, bounds, by)
    if as_json:
        click.echo(json.dumps({"name": name, "role": kind, "password": made}))
    else:
        click.echo(f"{name} is {'a new' if known is None else 'the'} login of an {kind}", err=made is not None)
        if made is not None:
            click.echo(made)


def require_free_name(name: str) -> None:
    """Raises SuretyError for a name that is no plain one, or one of ours or PostgreSQL's."""
    if not LOGIN_NAME.fullmatch(name):
        raise SuretyError("NAME: 1 to 63 lower-case letters, digits and _, beginning with no digit")
    if NAMES_OF_OURS.fullmatch(name):
        raise SuretyError(f"NAME: {name} is, or looks like, a role of Surety's or PostgreSQL's own")


def given_password(path: Path | None, *, ask: bool) -> str | None:
    """The password of a file or the terminal; None without either. Raises SuretyError for one that is too weak."""
    if ask:
        password: str = click.prompt("Password", hide_input=True, confirmation_prompt=True, err=True)
    elif path is None:
        return None
    else:
        try:
            with click.open_file(str(path), encoding="ascii") as file:
                password = file.readline(1000).rstrip("\r\n")
        except (OSError, UnicodeDecodeError) as error:
            raise SuretyError(f"--password-file: {path} can't be read ({error})") from None
    if not PASSWORD.fullmatch(password):
        raise SuretyError("a password has 12 to 128 printable ASCII characters without spaces")
    return password


def verifier_of(conn: Connection, name: str, password: str) -> str:
    """The SCRAM verifier, so that neither the server nor its log sees the password."""
    return conn.pgconn.encrypt_password(password.encode(), name.encode(), b"scram-sha-256").decode()


def login_statements(
    kind: ProcessKind, name: str, bounds: LoginBounds, verifier: str | None, *, is_new: bool
) -> list[sql.Composed]:
    """The statements that create a login, or change one."""
    login = sql.Identifier(name)
    words = sql.SQL("{} role {} login connection limit {}").format(
        sql.SQL("create" if is_new else "alter"), login, sql.Literal(bounds.connections)
    )
    if verifier is not None:
        words += sql.SQL(" password {}").format(sql.Literal(verifier))
    [other] = set(KINDS) - {kind}
    settings = {
        "statement_timeout": bounds.statement_timeout,
        "lock_timeout": bounds.lock_timeout,
        "idle_in_transaction_session_timeout": bounds.idle_in_transaction_session_timeout,
        "default_transaction_read_only": "on",
    }
    return [
        words,
        sql.SQL("comment on role {} is {}").format(login, sql.Literal(MARK)),
        *([] if is_new else [sql.SQL("revoke {} from {}").format(sql.Identifier(f"surety_{other}"), login)]),
        sql.SQL("grant {} to {}").format(sql.Identifier(f"surety_{kind}"), login),
        *(
            sql.SQL("alter role {} set {} = {}").format(login, sql.Identifier(setting), sql.Literal(value))
            for setting, value in settings.items()
        ),
    ]


def execute_or_show(
    conn: Connection,
    statements: list[sql.Composed],
    name: str,
    change: str,
    kind: ProcessKind | None,
    bounds: LoginBounds | None,
    by: str,
) -> None:
    """Execute statements about a login, and audit them, in one transaction.

    Raises SuretyError with the statements for a role that may execute them, if this one may not.
    """
    try:
        with conn.transaction():
            for statement in statements:
                conn.execute(statement)
            conn.execute(
                "select surety.audit_database_login(%s, %s, %s, %s, %s)",
                (f"database login {change}", name, kind, json.dumps(bounds._asdict() if bounds else {}), by),
            )
    except psycopg.errors.InsufficientPrivilege as error:
        shown = "".join(f"\n    {without_verifier(statement.as_string(conn))};" for statement in statements)
        raise SuretyError(
            f"the login of DATABASE_URL may not do this ({error.diag.message_primary}); nothing was changed. A role"
            f" that may create roles can, and sets the password by \\password {name}:{shown}"
        ) from None
    except psycopg.errors.DuplicateObject:
        raise SuretyError(f"NAME: a role {name} was created meanwhile") from None


def without_verifier(statement: str) -> str:
    """A statement without its password."""
    return re.sub(r" password '[^']*'", "", statement)


def find_login(conn: Connection, name: str) -> dict[str, Any] | None:
    """A login of this command, as `list` shows it."""
    with conn.cursor(row_factory=dict_row) as cursor:
        return cursor.execute(LIST_LOGINS, {"mark": MARK, "name": name}).fetchone()


@database_roles.command("list")
@json_option
@reads
def list_logins(as_json: bool) -> None:
    """List the logins that this command created, with their bounds."""
    with connect_to_read() as conn, conn.cursor(row_factory=dict_row) as cursor:
        found = cursor.execute(LIST_LOGINS, {"mark": MARK, "name": None}).fetchall()
    if as_json:
        click.echo(json.dumps(found))
    elif not found:
        click.echo("no logins")
    else:
        table = Table("name", "role", "active", "connections", "statement", "lock", "idle in transaction", box=None)
        print_table(
            table,
            (
                (each["name"], each["role"], "yes" if each["is_active"] else "no", *list(each.values())[3:])
                for each in found
            ),
        )


@database_roles.command("revoke-login")
@click.argument("name")
def revoke_login(name: str) -> None:
    """Revoke a login at once: its rights, its sessions, and the role itself."""
    with connect("deploy", load_settings()) as conn:
        by = authorize(conn, "operators:write")
        known = find_login(conn, name)
        if known is None:
            raise SuretyError(f"NAME: `surety roles list` shows no login {name}")
        login = sql.Identifier(name)
        statements = [sql.SQL("alter role {} nologin").format(login)]
        if known["role"] is not None:
            group = sql.Identifier(f"surety_{known['role']}")
            statements.append(sql.SQL("revoke {} from {}").format(group, login))
        execute_or_show(conn, statements, name, "revoked", known["role"], None, by)
        remaining = end_sessions(conn, name)
        try:
            conn.execute(sql.SQL("drop role {}").format(login))
        except psycopg.Error as error:
            reason = error.diag.message_primary
            click.echo(f"{name} has no rights and can't log in, but the role is kept: {reason}", err=True)
    left = f"; {count_noun(remaining, 'session')} without rights may still be open" if remaining else ""
    click.echo(f"{name} is revoked{left}")


def end_sessions(conn: Connection, name: str) -> int:
    """End the sessions of a login; returns how many may still be open, because this login may not end them."""
    sessions = conn.execute("select pid from pg_stat_activity where usename = %s", (name,)).fetchall()
    try:
        for session in sessions:
            conn.execute("select pg_terminate_backend(%s, 5000)", session)
    except psycopg.errors.InsufficientPrivilege:
        return len(sessions)
    return 0
