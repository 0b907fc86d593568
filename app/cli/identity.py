"""The operator of a command: the holder of a personal key. No name of the environment or the system is an identity."""

from __future__ import annotations

import os
import pwd
import stat
from contextlib import suppress
from pathlib import Path
from typing import Any

import click
import psycopg

from app.web.keys import key_hash_of
from db.errors import SuretyError
from db.settings import Settings, load_settings

LOGIN_UID = Path("/proc/self/loginuid")
NOT_LOGGED_IN = 2**32 - 1
DEFAULT_KEY_FILE = Path("~/.config/surety/operator-key")
NO_KEY = (
    "this needs your personal key: set SURETY_OPERATOR_KEY, or SURETY_OPERATOR_KEY_FILE to a file that only you may"
    f" read (default: {DEFAULT_KEY_FILE}); `surety operators add` makes the first admin"
)
LOCKED_OUT = (
    "if no admin has a valid key, unset SURETY_OPERATOR_KEY and SURETY_OPERATOR_KEY_FILE, move"
    f" {DEFAULT_KEY_FILE} away, and run `surety operators add NAME --email ADDRESS --role admin`"
)
REFUSALS = {
    "unauthenticated": "your personal key is no operator's key of this database; " + LOCKED_OUT,
    "key-revoked": "{actor}: this personal key was revoked, or its operator is deactivated; " + LOCKED_OUT,
    "key-expired": "{actor}: this personal key has expired; " + LOCKED_OUT,
    "scope-missing": "{actor} may not do this: it needs the scope {scope} (surety operators roles)",
    "forbidden": "--as: {as_operator} is no active operator who may do this (scope {scope})",
}


class NotAuthorized(SuretyError):
    """The personal key is missing, unreadable by rule, refused, or lacks the scope."""


def authorize(conn: psycopg.Connection[tuple[Any, ...]], scope: str) -> str:
    """The operator as the audit trail names it, whose personal key has the scope. Raises NotAuthorized."""
    key = personal_key(load_settings())
    if key is None:
        raise NotAuthorized(NO_KEY)
    key_hash = key_hash_of(b"Bearer " + key.encode())
    if key_hash is None:
        raise NotAuthorized("your personal key is misspelt: it begins with sty_operator_")
    context = click.get_current_context(silent=True)
    as_operator = context.find_root().obj if context else None
    row = conn.execute(
        "select actor, problem, scope from surety.authorize_operator(%s, %s, %s)", (key_hash, scope, as_operator)
    ).fetchone()
    assert row is not None
    actor, problem, missing = row
    if problem is not None:
        raise NotAuthorized(REFUSALS[problem].format(actor=actor, scope=missing, as_operator=as_operator))
    return str(actor)


def personal_key(settings: Settings) -> str | None:
    """The key of SURETY_OPERATOR_KEY, else of the file; None if there is neither. Raises NotAuthorized."""
    if settings.surety_operator_key is not None:
        return settings.surety_operator_key.reveal().strip()
    named = settings.surety_operator_key_file
    path = named or DEFAULT_KEY_FILE
    try:
        path = path.expanduser()
        with path.open(encoding="ascii") as file:
            status = os.fstat(file.fileno())
            if stat.S_IMODE(status.st_mode) & 0o077 or status.st_uid != os.geteuid():
                raise NotAuthorized(f"{path} must be your own and have mode 0600: chmod 600 {path}")
            return file.read(200).strip()
    except (OSError, RuntimeError, UnicodeDecodeError) as error:
        if named is None:
            return None
        raise NotAuthorized(f"SURETY_OPERATOR_KEY_FILE: {path} can't be read ({error})") from None


def local_user() -> str:
    """The user of this process, and the one who logged in or called sudo if that is another: for the first admin."""
    user = os.getuid()
    person = login_user()
    if person is not None:
        return user_name(user) if person == user else f"{user_name(user)} (logged in as {user_name(person)})"
    # Only sudo's own user can be trusted to leave sudo's variable alone.
    caller = os.environ.get("SUDO_UID", "") if user == 0 else ""
    if caller.isdecimal() and len(caller) <= 10 and int(caller) != user:
        return f"{user_name(user)} (sudo by {user_name(int(caller))})"
    return user_name(user)


def login_user() -> int | None:
    """The user that logged in, which the kernel keeps across su and sudo; None if it knows none."""
    with suppress(OSError, ValueError):
        login = int(LOGIN_UID.read_text(encoding="ascii"))
        return None if login == NOT_LOGGED_IN else login
    return None


def user_name(user: int) -> str:
    """The name of a user id; the number if it has none."""
    try:
        return pwd.getpwuid(user).pw_name
    except (KeyError, OverflowError):
        return f"uid {user}"
