"""The checks of a run: invariants of the database, and differences between the database and the sandbox's record."""

from __future__ import annotations

from collections import Counter
from typing import Any, LiteralString

import psycopg

from app.local.demo.sandbox_record import Json, SandboxRecord, read_sandbox

Connection = psycopg.Connection[tuple[Any, ...]]

ACKNOWLEDGED_PRESENT = "every acknowledged payment is present"
CHARGED_TWICE = "no payment is charged twice"
REFUNDED_TWICE = "no refund is made twice"
ENDED = ("settled", "partially_refunded", "refunded", "reversed", "failed", "canceled")
ACTIVE_REFUND_STATUSES = ("pending", "requires_action", "succeeded")


def query_count(conn: Connection, query: LiteralString, *values: object) -> int:
    """The number that a query of one row and one column returns."""
    row = conn.execute(query, values).fetchone()
    assert row is not None
    return int(row[0])


def query_rows(conn: Connection, query: LiteralString) -> set[tuple[object, ...]]:
    """The distinct rows of a query."""
    return set(conn.execute(query))


def count_ended(conn: Connection) -> int:
    """Payments in a final state without a refund or dispute under way."""
    return query_count(
        conn,
        "select count(*) from surety.payments where state = any(%s) and refund_pending_minor = 0 and at_risk_minor = 0",
        list(ENDED),
    )


def count_unreceived_results(conn: Connection, url: str) -> int:
    """Refunds and disputes whose present status at the sandbox is not among our facts yet."""
    present = {
        (record["id"], f"{record['object']}_{record['status']}")
        for kind in ("refunds", "disputes")
        for record in read_sandbox(url, kind)
    }
    return len(present - query_rows(conn, "select object_id, kind from surety.facts where kind ~ '^(refund|dispute)_'"))


def count_violations(conn: Connection, acknowledged: list[str], double_charges: list[str]) -> dict[str, int]:
    """Violations by invariant: those of the database, acknowledged payments, second charges."""
    lost = query_count(
        conn,
        "select count(*) from unnest(%s::text[]) as acknowledged (id) where not exists"
        " (select from surety.payments as p where p.id = acknowledged.id)",
        acknowledged,
    )
    checked = conn.execute("select name, violations from surety.check_invariants()")
    return {ACKNOWLEDGED_PRESENT: lost, CHARGED_TWICE: len(double_charges)} | {
        str(name): int(violations) for name, violations in checked
    }


def count_differences(conn: Connection, record: SandboxRecord) -> dict[str, int]:
    """By kind of comparison, the payments, refunds or disputes that differ between the sandbox and the database."""
    charged = {(charge["metadata"].get("surety_payment"), charge["amount"]) for charge in record.charges}
    refunded = Counter[str]()
    for refund in record.refunds:
        if refund["status"] in ACTIVE_REFUND_STATUSES:
            refunded[refund["payment_metadata"]["surety_payment"]] += refund["amount"]
    compared = {
        "charged at the provider = confirmed here": charged
        ^ query_rows(conn, "select id, captured_minor from surety.payments where captured_minor > 0"),
        "refunded at the provider = refunded here": set(refunded.items())
        ^ query_rows(
            conn,
            "select id, refunded_minor + refund_pending_minor from surety.payments"
            " where refunded_minor + refund_pending_minor > 0",
        ),
        # A refund that the provider refused never existed there.
        "a refund's status is the provider's": {(r["id"], r["status"], r["amount"]) for r in record.refunds}
        ^ query_rows(
            conn,
            "select provider_id, state, amount_minor from surety.refunds"
            " where provider_id is not null or state <> 'failed'",
        ),
        "a dispute's status is the provider's": {
            (d["id"], d["status"], d["amount"], withdrawn_minor(d)) for d in record.disputes
        }
        ^ query_rows(conn, "select provider_id, status, amount_minor, withdrawn_minor from surety.disputes"),
    }
    return {name: len({id for id, *_ in differing}) for name, differing in compared.items()}


def withdrawn_minor(dispute: Json) -> int:
    """The amount that the network withdrew and has not given back, in minor units."""
    moved = sum(int(line["amount"]) for line in dispute["balance_transactions"])
    return max(0, -moved)
