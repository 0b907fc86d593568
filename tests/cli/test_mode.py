"""The mode on the command line: shown, decided once, and never changed under a merchant."""

from __future__ import annotations

import pytest

from tests.cli.conftest import Run, refused, said
from tests.conftest import Connection
from tests.support.payments import money, record


def test_mode_is_decided_audibly_and_audited(run: Run, conn: Connection) -> None:
    assert said(run("mode")) == "test: no real money moves"
    assert said(run("mode", "test")) == "test already"
    assert "every payment of this database moves real money" in said(run("mode", "live"))
    assert said(run("mode", "live")) == "live already"
    assert said(run("mode")) == "live: real money moves"
    assert "mode live: real money moves" in said(run("deploy"))
    assert "mode  live: real money moves" in run("status").stdout
    entries = conn.execute("select actor, outcome from audit.entries where outcome ~ 'mode set'").fetchall()
    assert entries == [("operator:tester", "live mode set")]


def test_keys_show_the_mode_of_the_database(run: Run) -> None:
    said(run("mode", "live"))
    assert said(run("keys", "create", said(run("merchants", "add", "Acme Books")))).startswith("sty_live_")


@pytest.mark.parametrize(("mode", "other"), [("live", "test"), ("test", "live")])
def test_mode_is_final_once_there_is_a_merchant(run: Run, mode: str, other: str) -> None:
    said(run("mode", mode))
    said(run("merchants", "add", "Acme Books"))
    assert refused(run("mode", other)) == (
        "there are merchants already: the mode is decided before the first one; use another database"
    )
    assert said(run("mode", mode)) == f"{mode} already"


@pytest.mark.parametrize(("mode", "key"), [("live", "sk_test_1secret1"), ("test", "rk_live_1secret1")])
def test_merchant_is_not_added_with_a_key_of_the_other_mode(
    run: Run, monkeypatch: pytest.MonkeyPatch, mode: str, key: str
) -> None:
    said(run("mode", mode))
    monkeypatch.setenv("STRIPE_API_KEY", key)
    reason = refused(run("merchants", "add", "Acme Books"))
    assert f"but the database is in {mode} mode" in reason and "secret1" not in reason
    monkeypatch.setenv("STRIPE_API_KEY", f"sk_{mode}_1")
    first, second = run("merchants", "add", "Acme Books"), run("merchants", "add", "Acme Toys")
    assert said(first).startswith("mer_") and f"makes the mode of this database final: {mode}: " in first.stderr
    assert said(second).startswith("mer_") and not second.stderr


def test_mode_is_final_once_workers_have_stored_money(run: Run, conn: Connection) -> None:
    record(conn, [money(None, "txn_fee", "fee", -100)])
    assert "workers have stored objects of the provider's" in refused(run("mode", "live"))


def test_test_database_cannot_go_live(run: Run, conn: Connection) -> None:
    conn.execute("update surety.environment set kind = 'test'")
    assert "environment.kind" in refused(run("mode", "live"))
    assert said(run("mode")) == "test: no real money moves"
