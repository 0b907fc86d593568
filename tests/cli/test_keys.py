"""`surety keys create`: an option that doesn't fit the kind of key is refused, so no key is wider than it was asked."""

from __future__ import annotations

import pytest

from tests.cli.conftest import Run, refused
from tests.support.payments import Connection, add_merchant

COUNT_KEYS = "select (select count(*) from surety.api_keys) + (select count(*) from surety.operator_keys)"


@pytest.mark.parametrize(
    ("holder", "options", "report"),
    [
        ("merchant", ("--role", "viewer"), "--role: only an operator's key has a role; limit a merchant's key by"),
        ("operator", ("--scope", "read"), "--scope: only a merchant's key has scopes; limit an operator's key by"),
        ("operator", ("--name", "laptop"), "--name: only a merchant's key has a name"),
        ("operator", ("--name", "default"), "--name: only a merchant's key has a name"),
        ("merchant", ("--name", ""), "a key's name has 1 to 100 letters"),
        ("merchant", ("--operator", "tester"), "give a MERCHANT_ID or --operator NAME, not both"),
        ("neither", (), "give a MERCHANT_ID, or --operator NAME"),
    ],
)
def test_option_of_the_other_kind_of_key_is_refused(
    run: Run, conn: Connection, holder: str, options: tuple[str, ...], report: str
) -> None:
    merchant, _ = add_merchant(conn)
    before = conn.execute(COUNT_KEYS).fetchall()
    whose = {"merchant": (merchant,), "operator": ("--operator", "tester"), "neither": ()}[holder]
    assert refused(run("keys", "create", *whose, *options)).startswith(report)
    assert conn.execute(COUNT_KEYS).fetchall() == before
