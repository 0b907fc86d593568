"""Merchants, keys and traces on the command line."""

from __future__ import annotations

import hashlib
import json
import pwd
from pathlib import Path

import pytest
from click.testing import CliRunner

from app.cli import cli, identity
from app.finding import Finding
from app.status_findings import find_problems
from app.web.keys import KEY_PATTERN, checksum, key_hash_of, new_key
from tests.cli.conftest import Run, refused, said
from tests.conftest import Connection
from tests.support.payments import add_merchant, fact, pay, record


def test_new_api_key_is_stored_as_its_hash(run: Run, conn: Connection) -> None:
    merchant = said(run("merchants", "add", "Acme Books"))
    key = said(run("keys", "create", merchant))
    assert KEY_PATTERN.fullmatch(key)
    row = conn.execute("select merchant_id, hash, hint from surety.api_keys").fetchone()
    assert row == (merchant, hashlib.sha256(key.encode()).digest(), key[-4:])
    assert key_hash_of(f"Bearer {key}".encode()) == row[1]
    actors = conn.execute("select distinct actor from audit.entries where kind = 'operator'").fetchall()
    assert actors == [("operator:tester",)]


def test_merchants_and_keys_are_listed_without_truncation(run: Run) -> None:
    merchant = said(run("merchants", "add", "Acme Books", "--account", "acct_1", "--unchecked"))
    key = said(run("keys", "create", merchant))
    assert all(part in said(run("merchants", "list")) for part in (merchant, "Acme Books", "acct_1"))
    listed = said(run("keys", "list", "--merchant", merchant))
    assert key not in listed
    assert all(part in listed for part in (merchant, key[-4:]))
    other = said(run("merchants", "add", "Acme Toys", "--account", "acct_2", "--unchecked"))
    assert key[-4:] not in said(run("keys", "list", "--merchant", other))


def test_network_of_ipv4_written_as_ipv6_is_that_of_ipv4(run: Run) -> None:
    merchant = said(run("merchants", "add", "Acme Books"))
    said(run("keys", "create", merchant, "--network", "::ffff:203.0.113.7", "--network", "2001:db8::/64"))
    [key] = json.loads(said(run("keys", "list", "--merchant", merchant, "--json")))
    assert key["networks"] == ["203.0.113.7/32", "2001:db8::/64"]


def test_rotated_key_expires_after_its_successor_was_made(run: Run, conn: Connection) -> None:
    merchant = said(run("merchants", "add", "Acme Books"))
    options = ("--name", "shop", "--scope", "read", "--network", "203.0.113.0/24", "--days", "30")
    said(run("keys", "create", merchant, *options))
    [old] = json.loads(said(run("keys", "list", "--merchant", merchant, "--json")))
    conn.execute(
        "update surety.api_keys set created_at = created_at - interval '20 days', expires_at ="
        " expires_at - interval '20 days'"
    )
    [finding] = [finding for finding in status_findings(conn) if finding.id == "expiring-keys"]
    assert f"{old['id']} (shop, …{old['ends_in']}) of {merchant} expires in " in finding.what
    assert finding.next.startswith(f"surety keys rotate {old['id']}")
    new = said(run("keys", "rotate", old["id"], "--overlap-hours", "1"))
    listed = json.loads(said(run("keys", "list", "--merchant", merchant, "--json")))
    assert [{name: key[name] for name in ("name", "scopes", "networks", "of")} for key in listed] == [
        {"name": "shop", "scopes": ["read"], "networks": ["203.0.113.0/24"], "of": merchant}
    ] * 2
    lives = conn.execute("select hint, round(extract(epoch from expires_at - now()) / 3600) from surety.api_keys")
    assert dict(lives.fetchall()) == {old["ends_in"]: 1, new[-4:]: 30 * 24}
    assert [finding for finding in status_findings(conn) if finding.id == "expiring-keys"] == []
    assert "two active keys named shop" in refused(run("keys", "rotate", old["id"]))
    said(run("keys", "revoke", old["id"]))
    assert refused(run("keys", "rotate", old["id"])) == f"there is no active key {old['id']}"


def status_findings(conn: Connection) -> list[Finding]:
    [(state,)] = conn.execute("select surety.read_status()").fetchall()
    return find_problems(state)


def test_an_account_belongs_to_one_merchant(run: Run, conn: Connection) -> None:
    said(run("merchants", "add", "Acme Books", "--account", "acct_1", "--unchecked"))
    again = run("merchants", "add", "Acme Books again", "--account", "acct_1", "--unchecked")
    assert refused(again) == "--account: another merchant has the account acct_1"
    other = run("merchants", "add", "Acme Toys", "--account", "ACCT_1 ", "--unchecked")
    assert refused(other).startswith("--account: an id of the provider's")
    assert conn.execute("select count(*) from surety.merchants").fetchone() == (1,)


def test_a_merchant_is_suspended_and_resumed_and_a_key_revoked(run: Run, conn: Connection) -> None:
    merchant, key_hash = add_merchant(conn)
    assert said(run("merchants", "suspend", merchant)) == f"{merchant} is suspended"
    assert said(run("merchants", "suspend", merchant)) == f"{merchant} is suspended already"
    assert conn.execute("select is_suspended from api.identify_merchant(%s)", (key_hash,)).fetchone() == (True,)
    assert said(run("merchants", "resume", merchant)) == f"{merchant} is active"
    row = conn.execute("select id from surety.api_keys").fetchone()
    assert row is not None
    assert said(run("keys", "revoke", row[0])) == f"{row[0]} is revoked"
    assert conn.execute("select from api.identify_merchant(%s)", (key_hash,)).fetchone() is None


@pytest.mark.parametrize(
    ("words", "report"),
    [
        (("merchants", "suspend", "mer_none"), "there is no merchant mer_none"),
        *(
            (
                ("merchants", "add", name),
                "a merchant's name has 1 to 200 printable characters, and no space at its ends",
            )
            for name in ("", "   ", "Acme ", "Acme\nBooks", "Acme\tBooks", "Acme \u202eskooB", "a" * 201)
        ),
        (("keys", "create", "mer_none"), "there is no merchant mer_none"),
        (
            ("keys", "create", "mer_none", "--network", "203.0.113.7/24"),
            (
                "--network: Expected addresses and networks, such as 10.0.0.7, 10.1.0.0/16, 2001:db8::/64, got"
                " '203.0.113.7/24'; did you mean 203.0.113.0/24?"
            ),
        ),
        (("keys", "create", "mer_none", "--name", "a b"), "a key's name has 1 to 100 letters, digits and . _ @ -"),
        (("keys", "rotate", "key_none"), "there is no active key key_none"),
        (("keys", "revoke", "key_none"), "there is no key key_none"),
        (("trace", "pay_none"), "there is no payment pay_none"),
    ],
)
def test_unknown_object_is_reported_in_one_sentence(run: Run, words: tuple[str, ...], report: str) -> None:
    assert refused(run(*words)) == report


def test_every_command_reports_a_missing_database(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DATABASE_URL", raising=False)
    for words in (("api",), ("webhooks",), ("merchants", "list"), ("keys", "list"), ("trace", "pay_1")):
        result = CliRunner().invoke(cli, words, env={"STRIPE_WEBHOOK_SECRET": "whsec_1"})
        assert refused(result) == "DATABASE_URL is not set"


def test_database_without_surety_is_reported(blank: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_URL", blank)
    for command in ("api", "webhooks"):
        result = CliRunner().invoke(cli, [command], env={"STRIPE_WEBHOOK_SECRET": "whsec_1"})
        assert "surety deploy" in refused(result)


def test_key_checksum_detects_a_typo() -> None:
    for livemode in (True, False):
        text = new_key(livemode=livemode).text
        assert text.startswith("sty_live_" if livemode else "sty_test_")
        assert checksum(text[:-6]) == text[-6:]
        for place in range(4, len(text)):
            for letter in "a0Z":
                other = text[:place] + letter + text[place + 1 :]
                assert (key_hash_of(f"Bearer {other}".encode()) is None) == (other != text)


def test_trace_prints_the_whole_history(run: Run, conn: Connection) -> None:
    _, key_hash = add_merchant(conn)
    [payment] = pay(conn, key_hash, amount=4999, reference="order-1042")
    conn.execute(
        "insert into surety.steps (payment_id, version, from_state, to_state, cause, at, actor)"
        " values (%s, 2, 'initiated', 'submitting', 'test', now(), 'worker:w')",
        (payment,),
    )
    record(conn, [fact(payment, "submitted", "pi_1"), fact(payment, "captured", "ch_1", 4999)])
    story = said(run("trace", payment)).splitlines()
    assert story[0].split("   ")[:3] == [payment, "49.99 USD", "confirmed"]
    assert "Acme Books · order-1042 · pi_1" in story[0]
    assert "accepted" in story[1]
    assert "key sty_…test, Idempotency-Key key-" in story[1]
    report = "\n".join(story)
    assert report.index("submitting") < report.index("provider_submitted") < report.index("confirmed", len(story[0]))
    assert "49.99 USD debit provider_receivable, credit pending (captured)" in report
    assert story[-1].startswith("1 charge · 4 steps · ")
    document = json.loads(said(run("trace", payment, "--json")))
    assert (document["payment_id"], document["state"], document["charges"]) == (payment, "confirmed", 1)
    assert [entry["to_state"] for entry in document["entries"] if entry["to_state"]] == [
        "initiated",
        "submitting",
        "provider_submitted",
        "confirmed",
    ]


def test_operator_is_the_systems_user_not_a_name_of_the_environment(
    run: Run, conn: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.setenv(name, "alice")
    said(run("merchants", "add", "Acme Books"))
    entries = conn.execute(
        "select actor, snapshot ->> 'database_user' = session_user from audit.entries where outcome = 'merchant added'"
    ).fetchall()
    assert entries == [("operator:tester", True)]
    assert "alice" not in entries[0][0]


def test_sudos_caller_is_shown_beside_root_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    daemon = pwd.getpwnam("daemon")
    login = tmp_path / "loginuid"
    monkeypatch.setattr(identity, "LOGIN_UID", login)
    monkeypatch.setenv("SUDO_UID", str(daemon.pw_uid))
    monkeypatch.setattr("os.getuid", lambda: 0)
    assert identity.local_user() == "root (sudo by daemon)"
    login.write_text(str(daemon.pw_uid))
    assert identity.local_user() == "root (logged in as daemon)"
    login.write_text(str(identity.NOT_LOGGED_IN))
    monkeypatch.setattr("os.getuid", lambda: daemon.pw_uid)
    monkeypatch.setenv("SUDO_UID", "0")
    assert identity.local_user() == "daemon"
