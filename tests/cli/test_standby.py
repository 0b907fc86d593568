"""Every command with the address of a standby: those that read work, those that write refuse it."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import psycopg
import pytest
from click.testing import CliRunner, Result

from app.cli import cli, user_message
from app.cli.reading import PAUSE_SECONDS, CanceledOnStandby, reads
from app.cli.roles import MARK
from db.deploy.deploy import deploy
from db.embedded.server import EmbeddedServer
from tests.cli.test_customers import new_customer
from tests.cli.test_lists_as_json import COMMANDS
from tests.support.dead_letters import exhaust_retries, open_dead_letter
from tests.support.http_client import connect_as_owner
from tests.support.operators import admin_key
from tests.support.payments import Connection, add_merchant, fact, pay, record
from tests.support.sandbox_process import eventually
from tests.support.standby import ReplicatedServers, replicated_servers

OWN_DATABASE = frozenset({"demo", "sandbox", "up"})
"""Commands that start a database of their own, or have none."""
EMPTY = (
    *("ach accounts list", "bank-statements accounts", "bank-statements list", "bank-statements mappings"),
    *("close", "merchant-payouts list", "merchant-payouts owed", "payouts list", "webhook-endpoints list"),
)
"""Reading commands that have nothing to show here."""
READING = {
    "ach codes": (),
    "balance": ("--merchant", "MERCHANT"),
    "customers list": (),
    "customers show": ("CUSTOMER",),
    "dead-letters list": (),
    "dead-letters show": ("LETTER",),
    "discrepancies list": (),
    "discrepancies show": ("DISCREPANCY",),
    "handlers list": (),
    "holds list": (),
    "holds show": ("HELD",),
    "keys limits": (),
    "keys list": (),
    "merchants fees": ("MERCHANT",),
    "merchants limits": ("MERCHANT",),
    "merchants list": (),
    "merchants money-limits": ("MERCHANT",),
    "mode": (),
    "operators list": (),
    "operators roles": (),
    "reconciliation": (),
    "roles list": (),
    "servers": (),
    "status": ("--check",),
    "trace": ("PAYMENT",),
    "velocity list": (),
    **dict.fromkeys(EMPTY, ()),
}
WHY = ("--reason", "why")
WRITING = {
    "api": (),
    "customers erase": ("--merchant", "MERCHANT", "--email", "ada@example.com"),
    "dead-letters discard": ("LETTER", *WHY),
    "dead-letters replay": ("LETTER", *WHY),
    "deploy": (),
    "discrepancies assign": ("DISCREPANCY", "--note", "why"),
    "discrepancies resolve": ("DISCREPANCY", *WHY),
    "discrepancies snooze": ("DISCREPANCY", "--for", "1d", "--note", "why"),
    "drill": WHY,
    "health": ("worker",),
    "handlers pause": ("submit", *WHY),
    "handlers resume": ("submit", *WHY),
    "holds refuse": ("HELD", *WHY),
    "holds release": ("HELD", *WHY),
    "keys create": ("MERCHANT",),
    "keys limits": ("--requests-per-second", "5"),
    "keys revoke": ("KEY",),
    "keys rotate": ("KEY",),
    "merchants add": ("Acme Toys",),
    "merchants fees": ("MERCHANT", "--basis-points", "1"),
    "merchants limits": ("MERCHANT", "--unlimited"),
    "merchants money-limits": ("MERCHANT", "--currency", "usd", "--count", "1"),
    "merchants resume": ("MERCHANT",),
    "merchants set": ("MERCHANT", "--name", "Acme Toys"),
    "merchants suspend": ("MERCHANT",),
    "mode": ("test",),
    "operators add": ("eve", "--email", "eve@example.com", "--role", "viewer"),
    "operators set": ("tester", "--role", "viewer"),
    "restored": WHY,
    "roles grant-login": ("analyst", "ana"),
    "roles revoke-login": ("ana",),
    "servers": ("local",),
    "velocity add": ("--subject", "email", "--per", "1h", "--count", "1", "--action", "hold"),
    "velocity remove": ("1",),
    "webhooks": (),
}


# They need objects that this file does not make.
UNTRIED = frozenset(
    {
        *("ach accounts add", "ach accounts new-key", "ach accounts remove", "ach accounts revoke"),
        *("ach accounts rotate", "ach accounts show", "ach accounts validate", "ach read"),
        *("reconcile", "statement"),
        *("bank-statements import", "bank-statements map", "bank-statements set-account", "bank-statements show"),
        *("merchant-payouts cancel", "merchant-payouts create", "merchant-payouts returned"),
        *("merchant-payouts sent", "merchant-payouts show", "merchant-payouts terms", "payouts show"),
        *("webhook-endpoints disable", "webhook-endpoints enable", "webhook-endpoints replay"),
        "webhook-endpoints show",
    }
)


@dataclass
class Standby:
    """The servers, the settings of a command, and what stands for each word in capitals."""

    servers: ReplicatedServers
    environment: dict[str, str]
    ids: dict[str, str]

    def run(self, words: str, arguments: tuple[str, ...]) -> Result:
        given = [self.ids.get(word, word) for word in arguments]
        return CliRunner(env=self.environment).invoke(cli, [*words.split(), *given])


@pytest.fixture(scope="module")
def standby() -> Iterator[Standby]:
    with EmbeddedServer(durable=True) as primary:
        deploy(primary.url)
        with replicated_servers(primary) as servers:
            ids = add_objects(servers.conn)
            key = admin_key(primary.url)
            servers.catch_up()
            environment = {
                "DATABASE_URL": servers.standby.url,
                "SURETY_OPERATOR_KEY": key,
                "STRIPE_WEBHOOK_SECRET": "whsec_1",
                "SURETY_SANDBOX_URL": "http://127.0.0.1:1",
            }
            yield Standby(servers, environment, ids)


def add_objects(conn: Connection) -> dict[str, str]:
    """The id of an object of each kind, by the word that stands for it."""
    merchant, key_hash = add_merchant(conn)
    [payment_id, dead] = pay(conn, key_hash, 2)
    exhaust_retries(conn, "submit")
    record(conn, [fact(payment_id, "submitted", "pi", 10000), fact(payment_id, "captured", "ch", 20000)])
    conn.execute("select surety.add_velocity_rule(null, 'email', '1 hour', 0, null, null, 'hold', 'operator:x')")
    conn.execute("select surety.set_money_limit(%s, 'usd', 9, null, 'operator:x')", (merchant,))
    [held] = pay(conn, key_hash, customer={"email": "ada@example.com"})
    [(discrepancy,)] = conn.execute("select id from surety.discrepancies limit 1").fetchall()
    [(key,)] = conn.execute("select id from surety.api_keys limit 1").fetchall()
    conn.execute("create role ana login in role surety_analyst")
    conn.execute(f"comment on role ana is '{MARK}'")
    return {
        "MERCHANT": merchant,
        "CUSTOMER": new_customer(conn, merchant, "ada@shop.example"),
        "PAYMENT": payment_id,
        "HELD": held,
        "LETTER": open_dead_letter(conn, dead),
        "DISCREPANCY": discrepancy,
        "KEY": key,
    }


def test_every_command_is_tried_on_a_standby() -> None:
    assert READING.keys() | WRITING.keys() | OWN_DATABASE | UNTRIED == COMMANDS.keys()
    assert READING.keys() | UNTRIED >= {
        words for words in COMMANDS if words.split()[-1] in {"list", "show", "status", "trace"}
    }


@pytest.mark.parametrize("words", sorted(READING))
def test_reading_command_works_on_a_standby(standby: Standby, words: str) -> None:
    result = standby.run(words, (*READING[words], "--json"))
    assert not isinstance(result.exception, Exception), result.output
    shown = json.loads(result.stdout)
    assert shown or words in EMPTY
    if words == "status":
        assert len(shown["invariants"]) > 10 and shown["replication"]["replayed_seconds"] is not None
    else:
        assert result.exit_code == 0


@pytest.mark.parametrize("words", sorted(WRITING))
def test_writing_command_says_that_it_needs_the_primary(standby: Standby, words: str) -> None:
    result = standby.run(words, WRITING[words])
    assert result.exit_code == 1 and isinstance(result.exception, Exception), result.output
    report = user_message(result.exception)
    assert report and "needs the primary, and PostgreSQL is read-only here: " in report
    assert "\n" not in report and result.stdout == ""


def test_reports_are_read_on_a_standby(standby: Standby) -> None:
    with connect_as_owner(f"{standby.servers.standby.url}&target_session_attrs=standby") as conn:
        conn.execute("set role surety_analyst")
        views = conn.execute("select relname from pg_class where relnamespace = 'report'::regnamespace").fetchall()
        assert len(views) > 3
        for (view,) in views:
            conn.execute(f"select * from report.{view}".encode()).fetchall()


def test_reading_command_that_replay_canceled_is_repeated(standby: Standby) -> None:
    servers = standby.servers
    results: list[Result] = []
    with (
        connect_as_owner(f"{servers.standby.url}&target_session_attrs=standby") as on_standby,
        connect_as_owner(servers.primary.url) as first,
        connect_as_owner(servers.primary.url) as second,
    ):
        on_standby.execute("alter system set max_standby_streaming_delay = 0")
        on_standby.execute("select pg_reload_conf()")
        session = (
            "select pid from pg_stat_activity where application_name = 'surety-deploy' and wait_event_type = 'Lock'"
        )

        def waiting() -> list[int]:
            return [pid for (pid,) in on_standby.execute(session)]

        locked = "select true from pg_locks where mode = 'AccessExclusiveLock' and relation = %s::regclass"
        command = threading.Thread(target=lambda: results.append(standby.run("operators list", ("--json",))))
        with first.transaction(force_rollback=True):
            # The command waits for this table, and holds a lock of another one, which replay needs next.
            first.execute("lock table surety.operator_keys in access exclusive mode")
            eventually(lambda: on_standby.execute(locked, ("surety.operator_keys",)).fetchone(), 30)
            command.start()
            [canceled] = eventually(waiting, 30)
            with second.transaction(force_rollback=True):
                second.execute("lock table surety.operators in access exclusive mode")
                eventually(lambda: canceled not in waiting(), 30)
    command.join(30)
    [result] = results
    assert result.exit_code == 0 and json.loads(result.stdout), result.output


def test_command_that_replay_cancels_again_and_again_says_so(conn: Connection) -> None:
    attempts = []

    @reads
    def read() -> None:
        attempts.append(True)
        conn.execute(
            "do $$ begin raise exception 'canceling statement due to conflict with recovery' using errcode = '40001';"
            " end $$"
        )

    with pytest.raises(CanceledOnStandby, match="max_standby_streaming_delay"):
        read()
    assert len(attempts) == len(PAUSE_SECONDS) + 1


def test_other_errors_are_not_repeated(conn: Connection) -> None:
    attempts = []

    @reads
    def read() -> None:
        attempts.append(True)
        conn.execute("select 1 / 0")

    with pytest.raises(psycopg.errors.DivisionByZero):
        read()
    assert len(attempts) == 1
