"""Checks of database and provider, after each kill and at the end."""

from __future__ import annotations

from app.local.demo.checks import ENDED, REFUNDED_TWICE, count_differences, count_violations, query_count
from app.local.demo.sandbox_record import CHARGES_SUMMARY, REFUNDS_SUMMARY, read_record, read_sandbox
from tests.crash.limits import count_broken_limits
from tests.crash.processes import Connection, SuretyProcesses
from tests.crash.retrying_client import RetryingClient


def find_violations(system: SuretyProcesses, client: RetryingClient) -> tuple[dict[str, int], list[str]]:
    """The violated invariants, and lines that explain those of the database, from one snapshot."""
    sandbox = system.http("sandbox")
    charges = read_sandbox(sandbox, CHARGES_SUMMARY)
    refunds = read_sandbox(sandbox, REFUNDS_SUMMARY)
    # Payments acknowledged after this moment may be missing in the snapshot.
    acknowledged, refunded = list(client.payments), list(client.refunds.items())
    decided, customers, removed = dict(client.decisions), list(client.customers), list(client.removed)
    with system.connect() as conn, conn.transaction():
        conn.execute("set transaction isolation level repeatable read, read only")
        invariants = count_violations(conn, acknowledged, charges["double"])
        invariants["every acknowledged refund is present"] = query_count(
            conn,
            "select count(*) from unnest(%s::text[], %s::bigint[]) as acknowledged (id, amount_minor) where not exists"
            " (select from surety.refunds as r where r.id = acknowledged.id"
            " and r.amount_minor = acknowledged.amount_minor)",
            [id for id, _ in refunded],
            [amount for _, amount in refunded],
        )
        invariants |= count_broken_limits(conn, decided) | count_broken_customers(conn, customers, removed)
        explained = explain_violations(conn) if any(invariants.values()) else []
    invariants[REFUNDED_TWICE] = len(refunds["double"])
    invariants["a repeated request gets the same answer"] = len(client.wrong_answers)
    return {name: times for name, times in invariants.items() if times}, explained


def count_broken_customers(conn: Connection, customers: list[str], removed: list[str]) -> dict[str, int]:
    """Acknowledged customers that are missing, and acknowledged removals of payment methods that do not stand."""
    return {
        "every acknowledged customer is present": query_count(
            conn,
            "select count(*) from unnest(%s::text[]) as acknowledged (id) where not exists"
            " (select from surety.customers as c where c.id = acknowledged.id)",
            customers,
        ),
        "a removed payment method stays removed": query_count(
            conn, "select count(*) from surety.payment_methods where id = any(%s) and detached_at is null", removed
        ),
    }


def explain_violations(conn: Connection) -> list[str]:
    """An example of each violated invariant of the database, with all rows of its payment."""
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
    """The number of payments, refunds and disputes that have not ended, open holds, and methods yet to be saved."""
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
            + (select count(*) from surety.payment_holds where closed_at is null)
            + (
                select count(*) from surety.payments as p
                where p.save_method is not null and p.captured_minor > 0
                    and not exists (select from surety.payment_methods as m where m.payment_id = p.id)
            )
        """,
        list(ENDED),
    )


def find_differences(conn: Connection, sandbox: str) -> dict[str, int]:
    """The comparisons in which payments, refunds or disputes differ from the sandbox's record, with their number."""
    return {name: count for name, count in count_differences(conn, read_record(sandbox)).items() if count}


def count_by_state(conn: Connection) -> tuple[int, dict[str, int]]:
    """How many dead letters there were, and how many payments are in each state."""
    states = conn.execute("select state, count(*) from surety.payments group by state order by state").fetchall()
    return query_count(conn, "select count(*) from outbox.dead_letters"), {str(s): int(str(n)) for s, n in states}
