"""The operator's identity for the audit trail: the operating system's user, never a name from the environment."""

from __future__ import annotations

import os
import pwd
from contextlib import suppress
from pathlib import Path

LOGIN_UID = Path("/proc/self/loginuid")
NOT_LOGGED_IN = 2**32 - 1


def operator_identity() -> str:
    """The user of this process, and the one who logged in or called sudo if that is another."""
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
