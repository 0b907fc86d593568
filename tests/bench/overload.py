"""`overload`: payments under ten times the load that the machine serves.

    normal      as many connections as keep the API busy, each sending the next payment when the last was answered:
                the most that it serves, and how long an accepted payment takes then
    overload    ten times as many, none of which waits after a refusal, so that it sends all that it can

Beside the load a few probes send the same payments, slowly enough to time them well, and wait after a refusal for as
long as it says: latencies are theirs, from the request's last byte to the answer's. Every payment that was
acknowledged, to the load or to a probe, must be in the database afterwards, found by its id, and every refusal must be
a 503 that says when to come again.

Run by itself, this file is the probes: `python -m tests.bench.overload URL PROBES SECONDS RUN KEY…`.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import msgspec
import uvloop

from app.local.demo.merchants import create_merchants
from tests.bench.accept import BATCH_MAX, BATCHING_CONNECTIONS, count_missing, running_apis
from tests.bench.databases import (
    ROOT,
    Connection,
    Results,
    connection,
    deployed_database,
    log_progress,
    median,
    median_ratio,
    percentile,
    round_all,
    server,
)
from tests.bench.load import LoadClient, LoadResults, generator, load
from tests.support.payments import violations

OVERLOAD_FACTOR = 10
PAUSE_SECONDS = 0.02


class ProbeResults(msgspec.Struct):
    """The probes' measurements, in milliseconds; `odd` counts answers that are neither 201 nor a documented 503."""

    accepted_ms: list[float] = []
    refused_ms: list[float] = []
    ids: list[str] = []
    odd: int = 0


@dataclass
class TimedClient(LoadClient):
    """A connection that times its requests and pauses after each, after a refusal as long as Retry-After says."""

    seen: ProbeResults = field(default_factory=ProbeResults)

    async def connect(self) -> None:
        """One connection, until the deadline."""
        where = urlsplit(self.url)
        reader, writer = await asyncio.open_connection(where.hostname, where.port)
        while time.monotonic() < self.deadline:
            writer.write(self.request(where.path, next(self.numbers)))
            began = time.perf_counter()
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            length = head.partition(b"content-length:")[2].partition(b"\r\n")[0]
            body = await reader.readexactly(int(length))
            took_ms = (time.perf_counter() - began) * 1000
            if head.startswith(b"http/1.1 201 ") and body.startswith(b'{"id":"pay_'):
                self.seen.accepted_ms.append(took_ms)
                self.seen.ids.append(body[7:35].decode())
            elif head.startswith(b"http/1.1 503 ") and b"\r\nretry-after: " in head and b"/problems/overloaded" in body:
                self.seen.refused_ms.append(took_ms)
                await asyncio.sleep(float(head.partition(b"\r\nretry-after: ")[2].partition(b"\r\n")[0]))
            else:
                self.seen.odd += 1
            await asyncio.sleep(PAUSE_SECONDS)
        writer.close()


async def probe(url: str, probes: int, seconds: float, run: str, keys: list[str]) -> None:
    """All probes; prints what they saw."""
    client = TimedClient(url, run, keys, time.monotonic() + seconds)
    await asyncio.gather(*(client.connect() for _ in range(probes)))
    print(msgspec.json.encode(client.seen).decode())


def run(*, seconds: float, connections: int, probes: int, merchants: int, rounds: int) -> Results:
    """Normal load and ten times as much, by turns, for so many seconds each."""
    with ExitStack() as stack:
        url = stack.enter_context(deployed_database(stack.enter_context(server())))
        conn = stack.enter_context(connection(url))
        keys = create_merchants(conn, merchants, seed=1)
        [address] = stack.enter_context(running_apis(url, [(BATCHING_CONNECTIONS, BATCH_MAX)]))
        measure(conn, address, "warm", keys, seconds=min(2.0, seconds), connections=connections, probes=probes)
        normals: list[LoadMeasurement] = []
        overloads: list[LoadMeasurement] = []
        for turn in range(rounds):
            for name, times, kept in (("normal", 1, normals), ("overload", OVERLOAD_FACTOR, overloads)):
                kept.append(measure(
                    conn, address, f"{name}-{turn}", keys,
                    seconds=seconds, connections=times * connections, probes=probes,
                ))  # fmt: skip
                log_progress(f"{name} {turn + 1}: {kept[-1].summary()}")
        conn.execute("vacuum (analyze)")
        assert violations(conn) == {}
    normal_ms = [measured.p99_ms for measured in normals]
    overload_ms = [measured.p99_ms for measured in overloads]
    peak, goodput = [measured.accepted for measured in normals], [measured.accepted for measured in overloads]
    offered = [measured.offered for measured in overloads]
    return {
        "benchmark": "overload",
        "p99_ratio": median_ratio(overload_ms, normal_ms),
        "goodput_ratio": median_ratio(goodput, peak),
        "lost": sum(measured.lost for measured in [*normals, *overloads]),
        "refused_share": median([1 - these / those for these, those in zip(goodput, offered, strict=True)]),
        "refused_p99_ms": median([measured.refused_p99_ms for measured in overloads], 2),
        "normal_p99_ms": median(normal_ms, 2),
        "overload_p99_ms": median(overload_ms, 2),
        "normal_per_second": median(peak, 0),
        "overload_per_second": median(goodput, 0),
        "offered_per_second": median(offered, 0),
        "acknowledged_and_checked_by_id": sum(measured.acknowledged for measured in [*normals, *overloads]),
        "connections": [connections, OVERLOAD_FACTOR * connections],
        "generator": generator(),
        "rounds": round_all({"normal_p99_ms": normal_ms, "overload_p99_ms": overload_ms, "accepted": goodput}),
    }


@dataclass(frozen=True)
class LoadMeasurement:
    """One load. `accepted` and `offered` are per second."""

    accepted: float
    offered: float
    p99_ms: float
    refused_p99_ms: float
    acknowledged: int
    lost: int

    def summary(self) -> str:
        """One line of progress."""
        return (
            f"{self.accepted:,.0f} of {self.offered:,.0f}/s accepted, p99 {self.p99_ms:.1f} ms, "
            f"refused within {self.refused_p99_ms:.1f} ms"
        )


def measure(
    conn: Connection, address: str, name: str, keys: list[str], *, seconds: float, connections: int, probes: int
) -> LoadMeasurement:
    """A load and its probes at once; everything acknowledged is looked up."""
    target = f"{address}/v1/payments"
    module = [sys.executable, "-m", "tests.bench.overload", target, str(probes), str(seconds), f"probe-{name}", *keys]
    with ThreadPoolExecutor(1) as pool:
        loading = pool.submit(load, target, connections=connections, seconds=seconds, run=name, keys=keys, ids=True)
        done = subprocess.run(module, cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True)
        loaded: LoadResults = loading.result()
    seen = msgspec.json.decode(done.stdout, type=ProbeResults)
    assert seen.odd == 0, f"{seen.odd} answers were neither a 201 nor a 503 with Retry-After"
    assert len(loaded.ids) + loaded.errors == loaded.answers, "some answers were neither accepted nor refused"
    ids = [*loaded.ids, *seen.ids]
    probed = len(seen.accepted_ms) + len(seen.refused_ms)
    return LoadMeasurement(
        accepted=len(ids) / loaded.seconds,
        offered=(loaded.answers + probed) / loaded.seconds,
        p99_ms=percentile(seen.accepted_ms or [0.0], 0.99),
        refused_p99_ms=percentile(seen.refused_ms or [0.0], 0.99),
        acknowledged=len(ids),
        lost=count_missing(conn, ids),
    )


if __name__ == "__main__":
    uvloop.run(probe(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), sys.argv[4], sys.argv[5:]))
