"""Payments and facts for tests, made the way the product makes them: by its own SQL functions."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Sequence
from typing import Any

import psycopg
from psycopg.rows import dict_row

Connection = psycopg.Connection[tuple[Any, ...]]
Fact = dict[str, Any]

_numbers = itertools.count(1)


def add_merchant(conn: Connection, *, account: str = "", name: str = "Acme Books") -> tuple[str, bytes]:
    """A merchant and the hash of a key of theirs."""
    row = conn.execute("select surety.add_merchant(%s, %s)", (name, account)).fetchone()
    assert row is not None
    key_hash = hashlib.sha256(f"key {next(_numbers)} of {row[0]}".encode()).digest()
    conn.execute("select surety.add_api_key(%s, %s, 'test')", (row[0], key_hash))
    return row[0], key_hash


def request(key_hash: bytes, **fields: Any) -> dict[str, Any]:
    """One request for api.create_payments, with a fresh idempotency key unless one is given."""
    number = next(_numbers)
    return {
        "n": number,
        "key_hash": key_hash.hex(),
        "request_id": f"req_{number}",
        "idempotency_key": f"key-{number}",
        "request_hash": "00",
        "amount": 10000,
        "currency": "usd",
        "rail": "card",
        "method_token": "pm_card_visa",
        "capture_method": "automatic",
        "return_url": "https://shop.example/return",
        **fields,
    }


def create(conn: Connection, requests: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The outcomes of a batch of requests, in their order."""
    with conn.cursor(row_factory=dict_row) as cursor:
        return cursor.execute("select * from api.create_payments(%s)", (json.dumps(requests),)).fetchall()


def record_results(
    conn: Connection, batch: int, fence: int, results: Sequence[dict[str, Any]], actor: str = "worker:w"
) -> tuple[bool, list[str]]:
    """Record the results of one batch's events; returns whether its lease is held, and the types of events made."""
    given = json.dumps([result | {"batch_id": batch, "fence": fence} for result in results])
    row = conn.execute("select lost_batches, event_types from surety.record_results(%s, %s)", (actor, given)).fetchone()
    assert row is not None
    return row[0] == [], row[1]


def pay(conn: Connection, key_hash: bytes, count: int = 1, **fields: Any) -> list[str]:
    """New payments' ids."""
    outcomes = create(conn, [request(key_hash, **fields) for _ in range(count)])
    assert all(outcome["status"] == 201 for outcome in outcomes), outcomes
    return [outcome["payment_id"] for outcome in outcomes]


def fact(payment_id: str | None, kind: str, object_id: str, amount: int | None = None, **fields: Any) -> Fact:
    """A fact as record_facts takes it. Amounts in minor units; the same objects of two payments differ."""
    return {
        "payment_id": payment_id,
        "provider": "stripe",
        "account": "",
        "livemode": False,
        "object_id": f"{object_id}_{(payment_id or 'none')[-12:]}",
        "kind": kind,
        "amount_minor": amount,
        "currency": "usd",
        "source": "poll",
        **fields,
    }


def money(payment_id: str | None, object_id: str, category: str, amount: int, fee: int = 0, **fields: Any) -> Fact:
    """A balance transaction's fact; amount and fee as the provider signs them."""
    data = {"category": category, "fee": fee, "net": amount - fee, "available_at": "2026-11-22T00:00:00Z"}
    data |= fields.pop("data", {})
    return fact(payment_id, "money", object_id, amount, data=data, occurred_at="2026-11-20T00:00:00Z", **fields)


def as_bank_fact(output: Fact) -> Fact:
    """The same fact from a bank, whose money is available at once."""
    data = {name: value for name, value in output.get("data", {}).items() if name != "available_at"}
    return output | {"provider": "bank", "data": data}


def record(conn: Connection, facts: Iterable[Fact]) -> list[str]:
    """Records facts in one transaction; the types of the events made."""
    row = conn.execute("select surety.record_facts(%s, 'worker:test')", (json.dumps(list(facts)),)).fetchone()
    assert row is not None
    return list(row[0])


def state_of(conn: Connection, payment_id: str) -> str:
    row = conn.execute("select state from surety.payments where id = %s", (payment_id,)).fetchone()
    assert row is not None
    return str(row[0])


def path_of(conn: Connection, payment_id: str) -> list[str]:
    """The states that a payment visited, in order."""
    rows = conn.execute("select to_state from surety.steps where payment_id = %s order by version", (payment_id,))
    return [row[0] for row in rows]


def ledger_of(conn: Connection, payment_id: str | None = None) -> dict[str, int]:
    """Sums per kind of account and currency, on the kind's normal side, those that are not zero.

    Keys are the kind for usd, `kind eur` for others. One payment's transfers, or all there are.
    """
    rows = conn.execute(
        """
        select k.kind, a.currency, sum(case k.normal_side when l.side then l.amount_minor else - l.amount_minor end)
        from (
            select posting_id, debit_account as account_id, 'debit' as side, amount_minor from ledger.transfers
            union all
            select posting_id, credit_account, 'credit', amount_minor from ledger.transfers
        ) as l
        join ledger.postings as p on p.id = l.posting_id
        join ledger.accounts as a on a.id = l.account_id
        join ledger.account_kinds as k on k.kind = a.kind
        where %(id)s::text is null or p.payment_id = %(id)s
        group by k.kind, a.currency
        """,
        {"id": payment_id},
    )
    return {kind if currency == "usd" else f"{kind} {currency}": int(total) for kind, currency, total in rows if total}


def violations(conn: Connection) -> dict[str, int]:
    """The invariants that do not hold."""
    rows = conn.execute("select name, violations from surety.check_invariants()")
    return {name: count for name, count in rows if count}


def command(conn: Connection, function: str, key_hash: bytes, **fields: Any) -> dict[str, Any]:
    """The outcome of one command, `capture_payment`, under a fresh idempotency key unless one is given."""
    number = next(_numbers)
    asked = {
        "key_hash": key_hash.hex(),
        "request_id": f"req_{number}",
        "address": "127.0.0.1",
        "idempotency_key": f"key-{number}",
        "request_hash": "00",
        **fields,
    }
    query = f"select status, problem, detail, body::jsonb, is_replayed from api.{function}(%s)"
    with conn.cursor(row_factory=dict_row) as cursor:
        outcome = cursor.execute(query.encode(), (json.dumps(asked),)).fetchone()
    assert outcome is not None
    return outcome
