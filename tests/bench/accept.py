"""`accept`: payments accepted per second over HTTP, at 32 connections.

    noop      POST /noop of the same process: an ordinary route of the framework that does nothing
    bare      POST /bare of the same process: HTTP read and written before the framework begins, where
              POST /v1/payments is served as well: the least that an answer can cost
    accepted  POST /v1/payments as the product serves it: waiting requests are committed together
    single    POST /v1/payments of a process that differs in one number: a batch is one request, so each has a
              transaction of its own; with the number of batching connections that is fastest here

All get the same requests in alternating rounds. The load comes from wrk where it is installed, from one thread. Server,
database and generator share the machine. Every payment that was acknowledged must be in the database afterwards: by
number after each round, and by id after a last round in which the generator keeps the ids.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager

import httpx

from app.local.demo.merchants import create_merchants
from app.local.demo.workspace import demo_folder
from app.local.output import LogFiles
from app.local.processes import ProcessGroup, free_port
from tests.bench.cpu_time import command_of, cpu_seconds, parent_of, process_tree, read_processes
from tests.bench.databases import (
    Connection,
    Results,
    connection,
    deployed_database,
    log_progress,
    median,
    median_ratio,
    round_all,
    server,
    set_rate_limits,
    touch_memory_and_log,
)
from tests.bench.load import LoadResults, generator, load
from tests.support.payments import violations

BATCHING_CONNECTIONS = 2
BATCH_MAX = 200
SINGLE_CONNECTIONS = (2, 8)
LIMIT_PER_SECOND = 2000
LIMITS_ACT_SECONDS = 1.1


def run(
    *,
    seconds: float,
    connections: int,
    merchants: int,
    single_connections: int,
    rounds: int,
    warm_mb: int,
    limits: bool = False,
) -> Results:
    """Measure each for `seconds` in each round. `single_connections` 0: the fastest number."""
    with ExitStack() as stack:
        url = stack.enter_context(deployed_database(stack.enter_context(server())))
        conn = stack.enter_context(connection(url))
        keys = create_merchants(conn, merchants, seed=1)
        touch_memory_and_log(conn, warm_mb)
        choices = (single_connections,) if single_connections else SINGLE_CONNECTIONS
        batched, *rest = stack.enter_context(
            running_apis(url, [(BATCHING_CONNECTIONS, BATCH_MAX), *((count, 1) for count in choices)])
        )
        singles = dict(zip(choices, rest, strict=True))

        def measure(name: str, address: str, path: str, *, ids: bool = False) -> LoadResults:
            before = count_payments(conn)
            loaded = load(address + path, connections=connections, seconds=seconds, run=name, keys=keys, ids=ids)
            assert loaded.answers, f"{name}: no request was answered"
            assert loaded.errors == 0, f"{name}: {loaded.errors} requests were not answered by a 201"
            if path == "/v1/payments":
                assert count_payments(conn) - before >= loaded.answers, f"{name}: fewer payments than were acknowledged"
            return loaded

        tuned = {n: measure(f"tune-{n}", singles[n], "/v1/payments").per_second for n in choices if len(choices) > 1}
        count = max(choices, key=lambda n: tuned.get(n, 0.0))
        log_progress(f"load by {generator()}; transactions of a request are fastest with {count} batching connections")
        rates: dict[str, list[float]] = {"noop": [], "bare": [], "accepted": [], "single": []}
        p50: list[float] = []
        p99: list[float] = []
        for turn in range(rounds):
            # Log segments are recycled, as by a server that has run for a while.
            conn.execute("checkpoint")
            for name in ("noop", "bare"):
                rates[name].append(measure(f"{name}-{turn}", batched, f"/{name}").per_second)
            accepted = measure(f"accept-{turn}", batched, "/v1/payments")
            rates["accepted"].append(accepted.per_second)
            p50.append(accepted.p50_ms)
            p99.append(accepted.p99_ms)
            rates["single"].append(measure(f"single-{turn}", singles[count], "/v1/payments").per_second)
            log_progress(
                f"round {turn + 1}: " + ", ".join(f"{name} {values[-1]:,.0f}/s" for name, values in rates.items())
            )
        compared = compare_limits(conn, lambda name: measure(name, batched, "/v1/payments"), rounds) if limits else {}
        last = measure("ids", batched, "/v1/payments", ids=True)
        lost = count_missing(conn, last.ids)
        assert lost == 0, f"{lost} acknowledged payments are not there"
        conn.execute("vacuum (analyze)")
        assert violations(conn) == {}
    return {
        "benchmark": "accept",
        **summarize(rates),
        **compared,
        "p50_ms": median(p50, 2),
        "p99_ms": median(p99, 2),
        "errors": 0,
        "acknowledged_and_checked_by_id": len(last.ids),
        "lost": lost,
        "connections": connections,
        "single_lanes": count,
        "generator": generator(),
        "rounds": round_all(rates),
    }


def summarize(rates: dict[str, list[float]]) -> Results:
    """Medians of the rates, and their ratios."""
    return {
        "accepted_per_second": median(rates["accepted"], 0),
        "noop_per_second": median(rates["noop"], 0),
        "bare_per_second": median(rates["bare"], 0),
        "single_per_second": median(rates["single"], 0),
        "ratio_to_noop": median_ratio(rates["accepted"], rates["noop"]),
        "ratio_to_single": median_ratio(rates["accepted"], rates["single"]),
        "ratio_to_bare": median_ratio(rates["accepted"], rates["bare"]),
    }


def compare_limits(conn: Connection, measure: Callable[[str], LoadResults], rounds: int) -> Results:
    """Rates and CPU time with a rate limit for each key and merchant, which no request reaches, and without one."""
    per_second: dict[bool, list[float]] = {True: [], False: []}
    cpu_ms: dict[bool, list[float]] = {True: [], False: []}
    for turn in range(2 * rounds):
        # With, without, without, with: a drift of the machine's speed meets both alike.
        is_limited = turn % 4 in {0, 3}
        rate = LIMIT_PER_SECOND if is_limited else 0
        set_rate_limits(conn, rate, 2 * rate)
        time.sleep(LIMITS_ACT_SECONDS)
        before = service_cpu_seconds(conn)
        loaded = measure(f"limits-{turn}")
        cpu_ms[is_limited].append(1000 * (service_cpu_seconds(conn) - before) / loaded.answers)
        per_second[is_limited].append(loaded.per_second)
        log_progress(f"{'with' if is_limited else 'without'} limits {loaded.per_second:,.0f}/s")
    set_rate_limits(conn, 0, 0)
    time.sleep(LIMITS_ACT_SECONDS)
    return {
        "ratio_with_limits": median_ratio(per_second[True], per_second[False]),
        "cpu_ratio_with_limits": median_ratio(cpu_ms[True], cpu_ms[False]),
        "cpu_ms_with_limits": median(cpu_ms[True], 3),
    }


def service_cpu_seconds(conn: Connection) -> float:
    """CPU time of PostgreSQL and of the API processes that this process started."""
    row = conn.execute("select pg_backend_pid()").fetchone()
    assert row is not None
    postmaster = parent_of(row[0])
    assert postmaster is not None
    ours = process_tree(read_processes(), os.getpid())
    apis = [pid for pid in ours if "tests.bench.api_server" in command_of(pid)]
    return sum(cpu_seconds({"postgres": [postmaster], "api": apis}).values())


@contextmanager
def running_apis(url: str, shapes: list[tuple[int, int]]) -> Generator[list[str]]:
    """The addresses of API processes, each with (batching connections, largest batch), after a warm-up."""
    with demo_folder() as folder:
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("SURETY_", "PG"))}
        process_group = ProcessGroup(environment | {"DATABASE_URL": url}, LogFiles(folder))
        ports = {f"api-{count}-{batch_max}": free_port(0) for count, batch_max in shapes}
        try:
            for (name, port), (count, batch_max) in zip(ports.items(), shapes, strict=True):
                process_group.start(name, "-m", "tests.bench.api_server", str(port), str(count), str(batch_max))
            for name, port in ports.items():
                process_group.wait_for_port(name, port)
                for path in ("noop", "bare", "v1/payments"):
                    httpx.post(f"http://127.0.0.1:{port}/{path}", content=b"{}", timeout=30)
            yield [f"http://127.0.0.1:{port}" for port in ports.values()]
        finally:
            process_group.stop()


def count_payments(conn: Connection) -> int:
    """The number of payments."""
    row = conn.execute("select count(*) from surety.payments").fetchone()
    assert row is not None
    return int(row[0])


def count_missing(conn: Connection, ids: list[str]) -> int:
    """The number of these payments that are missing."""
    row = conn.execute(
        "select count(*) from unnest(%s::text[]) as acknowledged (id)"
        " where not exists (select from surety.payments as p where p.id = acknowledged.id)",
        (ids,),
    ).fetchone()
    assert row is not None
    return int(row[0])
