"""Every command either prints what it shows as JSON, in one shape, or is named here as one that acts."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from typing import Any

import click
import pytest

from app.cli import cli
from tests.cli.conftest import Run, refused, said
from tests.support.dead_letters import exhaust_retries
from tests.support.payments import Connection, add_merchant, fact, pay, record

ACTING = frozenset(
    {
        *("api", "deploy", "drill", "health", "restored", "sandbox", "up", "webhooks"),
        *(
            "dead-letters discard",
            "dead-letters replay",
            "discrepancies assign",
            "discrepancies snooze",
            "handlers pause",
            "handlers resume",
        ),
        *("ach accounts add", "ach accounts new-key", "ach accounts remove", "ach accounts revoke"),
        *("ach accounts rotate", "ach accounts validate"),
        *("bank-statements map", "bank-statements set-account"),
        *("merchant-payouts cancel", "merchant-payouts returned", "merchant-payouts sent", "merchant-payouts terms"),
        "statement",  # it writes a file whose format is asked for
        *("webhook-endpoints disable", "webhook-endpoints enable", "webhook-endpoints replay"),
        *("keys revoke", "operators set", "roles revoke-login"),
        *("merchants resume", "merchants set", "merchants suspend"),
        *("holds refuse", "holds release", "velocity add", "velocity remove"),
    }
)
INSTANT = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")


def leaves(command: click.Command, names: tuple[str, ...] = ()) -> Iterator[tuple[str, click.Command]]:
    """The commands of the tree that are no groups, by their words."""
    if not isinstance(command, click.Group):
        yield " ".join(names), command
        return
    context = click.Context(command)
    for name in command.list_commands(context):
        part = command.get_command(context, name)
        assert part is not None
        yield from leaves(part, (*names, name))


COMMANDS = dict(leaves(cli))


def has_json(command: click.Command) -> bool:
    return any("--json" in parameter.opts for parameter in command.params)


@pytest.mark.parametrize("words", sorted(COMMANDS))
def test_command_that_shows_something_has_json(words: str) -> None:
    assert has_json(COMMANDS[words]) != (words in ACTING), f"{words}: neither --json nor in ACTING, or both"


def test_acting_commands_exist() -> None:
    assert COMMANDS.keys() >= ACTING


@pytest.mark.parametrize("words", sorted(COMMANDS.keys() - {"sandbox"}))
def test_command_has_help_for_itself_and_its_options(words: str) -> None:
    command = COMMANDS[words]
    assert command.help
    options = [one for one in command.params if isinstance(one, click.Option)]
    assert [one.name for one in options if not one.help] == []


def check_shape(value: Any, name: str = "") -> None:
    """Names in lower case with underscores; times in UTC to the millisecond."""
    if isinstance(value, dict):
        for key, part in value.items():
            assert re.fullmatch(r"[a-z][a-z0-9_]*", key), key
            check_shape(part, key)
    elif isinstance(value, list):
        for part in value:
            check_shape(part, name)
    elif isinstance(value, str) and (name.endswith("_at") or name == "at"):
        assert INSTANT.fullmatch(value), f"{name}: {value}"


def test_lists_are_arrays_of_objects_with_times_in_utc(run: Run, conn: Connection) -> None:
    merchant, key_hash = add_merchant(conn)
    conn.execute("select surety.suspend_merchant(%s, true)", (merchant,))
    conn.execute("select surety.suspend_merchant(%s, false)", (merchant,))
    [payment_id, _] = pay(conn, key_hash, 2)
    record(conn, [fact(payment_id, "submitted", "pi", 10000), fact(payment_id, "captured", "ch", 20000)])
    exhaust_retries(conn, "submit")
    lists = [words for words in COMMANDS if words.endswith(" list")]
    assert len(lists) >= 6
    shown = {words: json.loads(said(run(*words.split(), "--json"))) for words in lists}
    shown["merchants fees"] = json.loads(said(run("merchants", "fees", merchant, "--json")))
    for words, found in shown.items():
        assert isinstance(found, list) and all(isinstance(one, dict) for one in found), words
        check_shape(found)
    expected = {"dead-letters list", "discrepancies list", "handlers list", "keys list", "merchants list"}
    assert {words for words, found in shown.items() if found} >= expected
    letter, [broken] = shown["dead-letters list"][0], shown["discrepancies list"]
    for subject, found in (("dead-letters", letter), ("discrepancies", broken)):
        one = json.loads(said(run(subject, "show", found["id"], "--json")))
        assert one["id"] == found["id"]
        check_shape(one)
    for command in (("trace", payment_id), ("mode",), ("operators", "roles")):
        check_shape(json.loads(said(run(*command, "--json"))))


def test_new_merchants_keys_and_operators_are_printed_as_json(run: Run, conn: Connection) -> None:
    merchant = json.loads(said(run("merchants", "add", "Acme Books", "--json")))
    assert conn.execute("select id from surety.merchants").fetchall() == [(merchant["id"],)]
    shop = json.loads(said(run("keys", "create", merchant["id"], "--json")))
    desk = json.loads(said(run("keys", "create", "--operator", "tester", "--json")))
    for made, table in ((shop, "api_keys"), (desk, "operator_keys")):
        next_one = json.loads(said(run("keys", "rotate", made["id"], "--json")))
        for key in (made, next_one):
            found = conn.execute(f"select hash from surety.{table} where id = %s".encode(), (key["id"],)).fetchall()
            assert found == [(hashlib.sha256(key["key"].encode()).digest(),)]
    added = json.loads(said(run("operators", "add", "eve", "--email", "eve@example.com", "--role", "viewer", "--json")))
    assert added["operator"] == "eve"
    assert added["key"].startswith("sty_operator_")


def test_erasure_is_printed_as_json(run: Run, conn: Connection) -> None:
    merchant, key_hash = add_merchant(conn)
    [payment_id] = pay(conn, key_hash, customer={"email": "ada@example.com"})
    erase = ("customers", "erase", "--merchant", merchant, "--email", "ada@example.com")
    result = run(*erase, "--json")
    found = json.loads(result.stdout)
    assert (found["is_dry_run"], list(found["in_progress"]), found["kept_by_provider"]) == (False, [payment_id], [])
    assert f"1 payment in progress, not erased: {payment_id}" in refused(result)
    assert json.loads(run(*erase, "--dry-run", "--json").stdout)["is_dry_run"] is True


def test_trace_as_json_has_amounts_as_numbers(run: Run, conn: Connection) -> None:
    _, key_hash = add_merchant(conn)
    [payment_id] = pay(conn, key_hash)
    record(conn, [fact(payment_id, "submitted", "pi", 10000), fact(payment_id, "captured", "ch", 10000)])
    shown = json.loads(said(run("trace", payment_id, "--json")))
    assert (shown["amount"], shown["amount_minor"], shown["currency"]) == ("100.00 USD", 10000, "usd")


FURTHER_WORDS = {
    "customers erase": ("--email", "ada@example.com"),
    "discrepancies resolve": ("--expect", "1", "--reason", "why"),
    "merchant-payouts create": ("--currency", "usd"),
    "merchant-payouts terms": ("--currency", "usd", "--minimum", "1"),
    "merchants set": ("--name", "Acme Toys"),
    "statement": ("--month", "2026-11", "--format", "json"),
    "velocity add": ("--subject", "email", "--per", "1h", "--count", "1", "--action", "hold"),
}


def merchant_words(command: click.Command) -> list[str] | None:
    """The words by which a command names an unknown merchant; None for a command that names none."""
    for parameter in command.params:
        is_argument = isinstance(parameter, click.Argument)
        if parameter.name in {"merchant", "merchant_id"} or str(parameter.metavar).strip("[]") == "MERCHANT":
            return ["mer_none"] if is_argument else [parameter.opts[0], "mer_none"]
    return None


OF_A_MERCHANT = {words: named for words, command in COMMANDS.items() if (named := merchant_words(command))}


@pytest.mark.parametrize("words", sorted(OF_A_MERCHANT))
def test_command_refuses_an_unknown_merchant(run: Run, words: str) -> None:
    report = refused(run(*words.split(), *OF_A_MERCHANT[words], *FURTHER_WORDS.get(words, ())))
    assert report in {"there is no merchant mer_none", "--merchant: there is no merchant mer_none"}


def test_commands_of_merchants_are_found() -> None:
    assert len(OF_A_MERCHANT) >= 12
    assert OF_A_MERCHANT.keys() >= FURTHER_WORDS.keys()
