"""Rate limits on the command line."""

from __future__ import annotations

import json

import pytest

from tests.cli.conftest import Run, refused, said
from tests.conftest import Connection
from tests.support.payments import add_merchant


def test_a_merchants_limit_is_set_shown_listed_and_removed(run: Run, conn: Connection) -> None:
    merchant, _ = add_merchant(conn)
    assert said(run("merchants", "limits", merchant)) == f"{merchant}: 1000 a second, 2000 at once (default)"
    set_limit = ("merchants", "limits", merchant, "--requests-per-second", "5", "--burst", "7")
    assert said(run(*set_limit)) == f"{merchant}: 5 a second, 7 at once"
    assert "5 a second, 7 at once" in said(run("merchants", "list"))
    assert said(run("merchants", "limits", merchant, "--unlimited")) == f"{merchant}: unlimited"
    assert json.loads(said(run("merchants", "limits", merchant, "--json"))) == {
        "subject": merchant, "requests_per_second": None, "burst": None, "is_default": False
    }  # fmt: skip
    assert said(run("merchants", "limits", merchant, "--default")).endswith("2000 at once (default)")


def test_a_keys_limit_is_set_shown_and_listed(run: Run, conn: Connection) -> None:
    merchant, _ = add_merchant(conn)
    [(key,)] = conn.execute("select id from surety.api_keys").fetchall()
    assert said(run("keys", "limits", key, "--requests-per-second", "5")) == f"{key}: 5 a second, 10 at once"
    [listed] = json.loads(said(run("keys", "list", "--merchant", merchant, "--json")))
    assert (listed["requests_per_second"], listed["burst"], listed["has_default_limit"]) == (5, 10, False)
    assert "5 a second, 10 at once" in said(run("keys", "list"))


def test_defaults_are_limits_too(run: Run, conn: Connection) -> None:
    merchant, _ = add_merchant(conn)
    assert said(run("merchants", "limits", "--requests-per-second", "3")) == "all merchants: 3 a second, 6 at once"
    assert said(run("merchants", "limits", merchant)) == f"{merchant}: 3 a second, 6 at once (default)"
    assert said(run("keys", "limits", "--unlimited")) == "all merchants' keys: unlimited"
    operators = run("keys", "limits", "--operators", "--requests-per-second", "3", "--burst", "4")
    assert said(operators) == "all operators' keys: 3 a second, 4 at once"
    audited = conn.execute("select snapshot ->> 'subject' from audit.entries where outcome = 'rate limit changed'")
    assert audited.fetchall() == [("merchants",), ("keys",), ("operator-keys",)]


def test_what_makes_no_sense_is_refused_with_the_reason(run: Run, conn: Connection) -> None:
    merchant, _ = add_merchant(conn)
    assert "--burst needs" in refused(run("merchants", "limits", merchant, "--burst", "7"))
    assert "give one of" in refused(run("merchants", "limits", merchant, "--unlimited", "--default"))
    assert "the default itself" in refused(run("merchants", "limits", "--default"))
    assert refused(run("merchants", "limits", "mer_none")) == "there is no merchant mer_none"
    assert refused(run("keys", "limits", merchant)) == f"there is no key {merchant}"
    assert "leave KEY_ID out" in refused(run("keys", "limits", "key_1", "--operators"))


def test_status_shows_the_merchants_that_were_limited_lately(run: Run, conn: Connection) -> None:
    merchant, _ = add_merchant(conn, name="Noisy")
    counts = json.dumps({f"merchant {merchant}": 3, "address": 2})
    conn.execute("select surety.count_refusals('limited', %s)", (counts,))
    shown = run("status").output
    assert f"limited  Noisy ({merchant}): 3 requests refused this hour, 3 in 24 h" in shown
    assert "refused  by rate limit: 2 address this hour, 2 in 24 h" in shown


@pytest.mark.parametrize("command", ["merchants", "keys"])
@pytest.mark.parametrize("subject", ["", "merchants", "keys", "operator-keys"])
def test_argument_that_names_none_sets_no_default(run: Run, conn: Connection, command: str, subject: str) -> None:
    noun = "merchant" if command == "merchants" else "key"
    report = refused(run(command, "limits", subject, "--requests-per-second", "50"))
    assert report == f"there is no {noun} {subject}"
    assert conn.execute("select count(*) from audit.entries where outcome like '%limit%'").fetchone() == (0,)
