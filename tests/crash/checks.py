"""What is asked of database and provider: after each kill, and when all is at its end."""

from __future__ import annotations

from collections import Counter
from typing import Any, LiteralString

import httpx

from app.local.demo.report import ENDED, count_violations, fetch_sandbox_summaries
from tests.crash.processes import Connection, SystemUnderTest
from tests.crash.retrying_client import Json, RetryingClient

ACKNOWLEDGED_PRESENT = "every acknowledged payment is present"
CHARGED_TWICE = "no payment is charged twice"
REFUNDED_TWICE = "no refund is made twice"
ACTIVE_REFUND_STATUSES = ("pending", "requires_action", "succeeded")


def find_violations(system: SystemUnderTest, client: RetryingClient) -> tuple[dict[str, int], list[str]]:
    """The broken invariants, and lines that explain those of the database, read at the same instant."""
    sandbox = system.http("sandbox")
    charges, _, _ = fetch_sandbox_summaries(sandbox)
    refunds = read_sandbox(sandbox, "refunds/summary?metadata_key=surety_refund")
    # What is acknowledged after this instant may be missing in it.
    acknowledged, refunded = list(client.payments), list(client.refunds.items())
    with system.connect() as conn, conn.transaction():
        conn.execute("set transaction isolation level repeatable read, read only")
        invariants, _ = count_violations(conn, acknowledged, charges)
        invariants["every acknowledged refund is present"] = query_count(
            conn,
            "select count(*) from unnest(%s::text[], %s::bigint[]) as acknowledged (id, amount_minor) where not exists"
            " (select from surety.refunds as r where r.id = acknowledged.id"
            " and r.amount_minor = acknowledged.amount_minor)",
            [id for id, _ in refunded],
            [amount for _, amount in refunded],
        )
        explained = explain_violations(conn) if any(invariants.values()) else []
    invariants[REFUNDED_TWICE] = len(refunds["double"])
    invariants["what was answered is answered again, and nothing else"] = len(client.wrong_answers)
    return {name: times for name, times in invariants.items() if times}, explained


def explain_violations(conn: Connection) -> list[str]:
    """Of each invariant that the database sees broken an example, with all that is known of its payment."""
    query = "select name, violations, example from surety.check_invariants() where violations > 0"
    lines = []
    for name, violations, example in conn.execute(query).fetchall():
        lines.append(f"{name}: {violations}, such as {example}")
        known = conn.execute(
            "select to_jsonb(p)::text from surety.payments as p where p.id = %(id)s"
            " union all (select to_jsonb(s)::text from surety.steps as s where s.payment_id = %(id)s order by version)"
            " union all (select to_jsonb(f)::text from surety.facts as f where f.payment_id = %(id)s order by f.id)"
            " union all (select to_jsonb(r)::text from surety.refunds as r where r.payment_id = %(id)s order by r.id)"
            " union all (select to_jsonb(d)::text from surety.derive_payments(array[%(id)s]) as d)"
            " union all (select to_jsonb(e)::text from audit.entries as e where e.payment_id = %(id)s order by e.id)"
            " union all (select to_jsonb(e)::text from outbox.events as e where e.aggregate_id = %(id)s order by e.id)"
            " union all (select to_jsonb(x)::text from surety.expectations as x where x.payment_id = %(id)s)"
            " union all (select to_jsonb(d)::text from surety.disputes as d where d.payment_id = %(id)s)"
            " union all (select to_jsonb(b)::text from outbox.batches as b)"
            " union all (select to_jsonb(r)::text from outbox.retries as r)"
            " union all (select to_jsonb(h)::text from outbox.handlers as h)",
            {"id": example},
        )
        lines += [f"    {line}" for (line,) in known]
    return lines


def count_unfinished(conn: Connection) -> int:
    """Payments, refunds and disputes that are not at their end."""
    return query_count(
        conn,
        """
        select
            (select count(*) from surety.payments where state <> all(%s))
            + (select count(*) from surety.refunds where state in ('pending', 'requires_action'))
            + (
                select count(*) from surety.disputes
                where status not in ('won', 'lost', 'prevented', 'warning_closed')
            )
        """,
        list(ENDED),
    )


def compare_with_provider(conn: Connection, sandbox: str) -> dict[str, int]:
    """How many payments, refunds and disputes stand otherwise here than in the provider's memory."""
    charges, refunds, disputes = (read_sandbox(sandbox, what) for what in ("charges", "refunds", "disputes"))
    standing = [refund for refund in refunds if refund["status"] in ACTIVE_REFUND_STATUSES]
    paid = {(charge["metadata"]["surety_payment"], charge["amount"]) for charge in charges}
    given_back = Counter[str]()
    for refund in standing:
        given_back[refund["payment_metadata"]["surety_payment"]] += refund["amount"]
    found = {
        "charged at the provider = confirmed here": paid
        ^ query_rows(conn, "select id, captured_minor from surety.payments where captured_minor > 0"),
        "refunded at the provider = refunded here": given_back.items()
        ^ query_rows(
            conn,
            "select id, refunded_minor + refund_pending_minor from surety.payments"
            " where refunded_minor + refund_pending_minor > 0",
        ),
        # One that the provider refused was never made there.
        "a refund stands as the provider has it": {(r["id"], r["status"], r["amount"]) for r in refunds}
        ^ query_rows(
            conn,
            "select provider_id, state, amount_minor from surety.refunds"
            " where provider_id is not null or state <> 'failed'",
        ),
        "a dispute stands as the provider has it": {
            (d["id"], d["status"], d["amount"], withdrawn_amount(d)) for d in disputes
        }
        ^ query_rows(conn, "select provider_id, status, amount_minor, withdrawn_minor from surety.disputes"),
    }
    return {name: len({id for id, *_ in differing}) for name, differing in found.items() if differing}


def withdrawn_amount(dispute: Json) -> int:
    """What the network took and has not given back, in minor units."""
    moved = sum(int(line["amount"]) for line in dispute["balance_transactions"])
    return max(0, -moved)


def count_by_state(conn: Connection) -> tuple[int, dict[str, int]]:
    """How many dead letters there were, and how many payments are in each state."""
    states = conn.execute("select state, count(*) from surety.payments group by state order by state").fetchall()
    return query_count(conn, "select count(*) from outbox.dead_letters"), {str(s): int(str(n)) for s, n in states}


def read_sandbox(sandbox: str, what: str) -> Any:
    """What the sandbox remembers."""
    return httpx.get(f"{sandbox}/sandbox/{what}", timeout=30).json()


def query_count(conn: Connection, query: LiteralString, *values: object) -> int:
    """The one number that a query gives."""
    row = conn.execute(query, values).fetchone()
    assert row is not None
    return int(str(row[0]))


def query_rows(conn: Connection, query: LiteralString) -> set[tuple[object, ...]]:
    """All that a query gives."""
    return set(conn.execute(query))
