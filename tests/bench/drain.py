"""`drain`: events per second through a handler that makes a step, an audit entry and ledger transfers for each.

The handler records the fact that a submitted payment was captured, by surety.record_facts, as an answer of the provider
or a webhook would: for each event a fact, a step to `confirmed` with its audit entry and event, a posting and two
transfers, merchants' balances, all in one transaction with the completion of the events. It is drained by the
product's own loop (jobs.drain), two processes at once. Every other round is in reverse order.

    fresh        a database with only the events to drain
    aged         1,000,000 past events, with all rows of their payments, and 100,000 wait
    blocked      as fresh, while another database of the cluster holds a writing transaction open
    procrastinate  as fresh, but a job of Procrastinate's for each event makes the same effects, two processes at once
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from contextlib import ExitStack, nullcontext

from db.embedded.databases import temporary_database
from tests.bench import history
from tests.bench.databases import (
    PREFIX,
    Connection,
    Results,
    connection,
    copied_database,
    deployed_database,
    log_progress,
    median,
    median_ratio,
    round_all,
    server,
)
from tests.bench.drain_processes import drain_outbox, measure_rate, run_jobs
from tests.support.payments import violations

KINDS = ("fresh", "blocked", "aged", "procrastinate")
EVENTS_PER_LIFE = 5


def run(*, events: int, past: int, backlog: int, jobs: int, concurrency: int, merchants: int, rounds: int) -> Results:
    """All measurements, in turn, `rounds` times. `events` are drained in each, `jobs` where there is one for each.

    `concurrency` is Procrastinate's in each of two processes; 0: that with which it is fastest here.
    """
    with ExitStack() as stack:
        url = stack.enter_context(server())
        fresh = stack.enter_context(fresh_database(url, events, merchants))
        log_progress(f"a database in which {events:,} events wait")
        aged, aged_payment = stack.enter_context(aged_database(url, past, backlog, merchants))
        log_progress(f"one with a past of {past:,} events in which {backlog:,} wait")
        if not concurrency:
            concurrency = fastest_concurrency(url, fresh, min(jobs, 400))
            log_progress(f"Procrastinate works best with {concurrency} jobs at once in each process")

        def measure(name: str, *, thoroughly: bool = False) -> float:
            if name == "aged":
                return measure_rate(drain_outbox, vacuumed(aged), events)
            with copied_database(url, fresh) as copy, open_write_elsewhere(url) if name == "blocked" else nullcontext():
                if name == "procrastinate":
                    rate, done = rate_jobs(copy, jobs, concurrency), jobs
                else:
                    rate, done = measure_rate(drain_outbox, vacuumed(copy), events), events
                check_effects(copy, done, thoroughly=thoroughly)
                return rate

        # A server's first measurement pays for the first use of memory and log.
        measure("fresh", thoroughly=True)
        rates: dict[str, list[float]] = {name: [] for name in KINDS}
        for turn in range(rounds):
            for name in KINDS[:: -1 if turn % 2 else 1]:
                rates[name].append(measure(name))
            log_progress(
                f"round {turn + 1}: " + ", ".join(f"{name} {values[-1]:,.0f}/s" for name, values in rates.items())
            )
            if turn + 1 < rounds:
                history.copy_payments(aged, aged_payment, events, days_ago=1, first=backlog + turn * events)
    return {
        "benchmark": "drain",
        "events_per_second": median(rates["fresh"], 0),
        "procrastinate_jobs_per_second": median(rates["procrastinate"], 0),
        "procrastinate_concurrency": concurrency,
        "ratio_to_procrastinate": median_ratio(rates["fresh"], rates["procrastinate"]),
        "flatness": median_ratio(rates["aged"], rates["fresh"]),
        "blocked_ratio": median_ratio(rates["blocked"], rates["fresh"]),
        "past_events": past,
        "backlog": backlog,
        "rounds": round_all(rates),
    }


@contextlib.contextmanager
def fresh_database(server_url: str, events: int, merchants: int) -> Generator[str]:
    """A database in which as many events wait, and nothing else."""
    with deployed_database(server_url) as url:
        with connection(url) as conn:
            payment_id = history.create_submitted_payment(conn, history.prepare(conn, merchants))
            history.skip_existing_events(conn)
        history.copy_payments(url, payment_id, events, days_ago=1)
        history.finish_copies(url)
        yield url


@contextlib.contextmanager
def aged_database(server_url: str, past: int, backlog: int, merchants: int) -> Generator[tuple[str, str]]:
    """A database in which events have passed and others wait, and the payment to copy for more of them."""
    with deployed_database(server_url) as url:
        with connection(url) as conn:
            key_hash = history.prepare(conn, merchants)
            done = history.create_settled_payment(conn, key_hash)
        history.copy_payments(url, done, past // EVENTS_PER_LIFE, days_ago=9)
        with connection(url) as conn:
            payment_id = history.create_submitted_payment(conn, key_hash)
            history.skip_existing_events(conn)
        history.copy_payments(url, payment_id, backlog, days_ago=1)
        history.finish_copies(url)
        yield url, payment_id


def vacuumed(url: str) -> str:
    """The same database, put in order and written out."""
    with connection(url) as conn:
        conn.execute("vacuum (analyze)")
        conn.execute("checkpoint")
    return url


@contextlib.contextmanager
def open_write_elsewhere(server_url: str) -> Generator[None]:
    """Another database of the cluster, in which a transaction has written and stays open."""
    with temporary_database(server_url, PREFIX) as url, connection(url) as conn:
        conn.execute("create table written (n integer)")
        with conn.transaction(force_rollback=True):
            conn.execute("insert into written values (1)")
            yield


def rate_jobs(url: str, jobs: int, concurrency: int) -> float:
    """Jobs per second."""
    with connection(url) as conn:
        conn.execute("select bench.defer_jobs(%s)", (jobs,))
    return measure_rate(run_jobs, vacuumed(url), jobs, concurrency)


def fastest_concurrency(server_url: str, fresh: str, jobs: int) -> int:
    """With how many jobs at once in each process Procrastinate is fastest."""
    rates = {}
    for concurrency in (1, 4, 10, 20):
        with copied_database(server_url, fresh) as copy:
            rates[concurrency] = rate_jobs(copy, jobs, concurrency)
    return max(rates, key=lambda concurrency: rates[concurrency])


def check_effects(url: str, events: int, *, thoroughly: bool = False) -> None:
    """Every event must have had its effects exactly once, and no invariant be broken, which takes long to find out."""
    with connection(url) as conn:
        assert count_effects(conn) == (events, events, events, 2 * events)
        assert not thoroughly or violations(conn) == {}


def count_effects(conn: Connection) -> tuple[int, ...]:
    """Steps to confirmed, their audit entries, postings, transfers."""
    row = conn.execute(
        """
        select
            (select count(*) from surety.steps as s where s.to_state = 'confirmed'),
            (select count(*) from audit.entries as e where e.kind = 'step' and e.to_state = 'confirmed'),
            (select count(*) from ledger.postings as p where p.rule = 'captured'),
            (select count(*) from ledger.transfers)
        """
    ).fetchone()
    assert row is not None
    return row
