"""`fairness`: a quiet merchant's latency beside a noisy merchant.

    alone       the quiet merchant's probes, which send payments slowly enough to time them well
    at_limit    the same beside a noisy merchant that sends as many payments as its rate limit allows
    flood       the same beside one that sends as fast as it can on many connections, and ignores Retry-After

All three alternate in each round. No request of the quiet merchant may be refused, and the noisy one may get no more
than its limit.

Run by itself, this file is the noisy merchant: `python -m tests.bench.fairness URL RUN KEY SECONDS CONNECTIONS RATE`,
as fast as it can at a rate of 0.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections import Counter
from contextlib import ExitStack, nullcontext
from itertools import count
from urllib.parse import urlsplit

import msgspec
import uvloop

from app.local.demo.merchants import create_merchants
from tests.bench.accept import BATCH_MAX, BATCHING_CONNECTIONS, LIMITS_ACT_SECONDS, running_apis
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
from tests.bench.load import LoadClient, exchange
from tests.bench.overload import ProbeResults
from tests.support.payments import violations

LOADS = ("alone", "at_limit", "flood")
# Before the probes begin, the noisy merchant has used its burst.
LEAD_SECONDS = 1.0


class NoisyResults(msgspec.Struct):
    """The noisy merchant's answers by status, and the seconds that they took."""

    statuses: dict[int, int]
    seconds: float


async def make_noise(url: str, run: str, key: str, seconds: float, connections: int, rate: float) -> NoisyResults:
    """Send payments on all connections until the time is over, `rate` per second together; 0: as fast as they can."""
    began = time.monotonic()
    client = LoadClient(url, run, [key], began + seconds)
    statuses: Counter[int] = Counter()
    turns = count()

    async def connect() -> None:
        where = urlsplit(url)
        reader, writer = await asyncio.open_connection(where.hostname, where.port)
        while time.monotonic() < client.deadline:
            turn = next(turns)
            if rate:
                await asyncio.sleep(max(0.0, began + turn / rate - time.monotonic()))
            status, _ = await exchange(reader, writer, client.request(where.path, turn))
            statuses[status] += 1
        writer.close()

    await asyncio.gather(*(connect() for _ in range(connections)))
    return NoisyResults(dict(statuses), time.monotonic() - began)


def run(*, seconds: float, probes: int, connections: int, rate: int, rounds: int) -> Results:
    """The quiet merchant alone and beside the noisy one, by turns, for so many seconds each."""
    p99: dict[str, list[float]] = {name: [] for name in LOADS}
    statuses: Counter[int] = Counter()
    with ExitStack() as stack:
        url = stack.enter_context(deployed_database(stack.enter_context(server())))
        conn = stack.enter_context(connection(url))
        quiet, noisy = create_merchants(conn, 2, seed=1)
        set_limit_of_second_merchant(conn, rate)
        [address] = stack.enter_context(running_apis(url, [(BATCHING_CONNECTIONS, BATCH_MAX)]))
        target = f"{address}/v1/payments"
        time_probes(target, "warm", quiet, min(2.0, seconds), probes)
        for turn in range(rounds):
            for name in LOADS:
                pace = {"alone": None, "at_limit": rate, "flood": 0}[name]
                words = [target, f"noisy-{name}-{turn}", noisy, seconds + LEAD_SECONDS, connections, pace]
                command = [sys.executable, "-m", "tests.bench.fairness", *map(str, words)]
                noise = (
                    nullcontext()
                    if pace is None
                    else subprocess.Popen(command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
                )
                with noise as process:
                    time.sleep(LEAD_SECONDS)
                    took_ms = time_probes(target, f"quiet-{name}-{turn}", quiet, seconds, probes)
                    p99[name].append(percentile(took_ms, 0.99))
                    if process is not None:
                        statuses += check_noise(process, rate)
            log_progress(f"round {turn + 1}: p99 " + ", ".join(f"{name} {p99[name][-1]:.1f} ms" for name in LOADS))
        conn.execute("vacuum (analyze)")
        assert violations(conn) == {}
    at_limit, flood = (median_ratio(p99[name], p99["alone"]) for name in ("at_limit", "flood"))
    return {
        "benchmark": "fairness",
        "p99_ratio": max(at_limit, flood),
        "at_limit_ratio": at_limit,
        "flood_ratio": flood,
        "quiet_p99_ms": median(p99["alone"], 2),
        "at_limit_p99_ms": median(p99["at_limit"], 2),
        "flood_p99_ms": median(p99["flood"], 2),
        "accepted_of_noisy": statuses[201],
        "refused": statuses[429],
        "rounds": round_all(p99),
    }


def set_limit_of_second_merchant(conn: Connection, rate: int) -> None:
    """A limit for the merchant that was added last; wait until it acts."""
    conn.execute(
        "select surety.set_rate_limit(max(id), %s, %s) from surety.merchants having count(*) = 2", (rate, rate)
    )
    time.sleep(LIMITS_ACT_SECONDS)


def time_probes(target: str, run: str, key: str, seconds: float, probes: int) -> list[float]:
    """The milliseconds that the quiet merchant's payments took; none may be refused."""
    module = [sys.executable, "-m", "tests.bench.overload", target, str(probes), str(seconds), run, key]
    done = subprocess.run(module, cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True)
    seen = msgspec.json.decode(done.stdout, type=ProbeResults)
    assert seen.odd == 0, f"{seen.odd} requests of the quiet merchant were neither accepted nor refused as overload"
    assert seen.refused_ms == [], f"{len(seen.refused_ms)} requests of the quiet merchant were refused"
    return seen.accepted_ms


def check_noise(process: subprocess.Popen[bytes], rate: int) -> Counter[int]:
    """The noisy merchant's answers by status, within its limit."""
    said, _ = process.communicate()
    assert process.returncode == 0
    noise = msgspec.json.decode(said, type=NoisyResults)
    assert noise.statuses.keys() <= {201, 429, 503}, f"the noisy merchant got {noise.statuses}"
    accepted = noise.statuses.get(201, 0)
    assert accepted <= rate * (noise.seconds + 1) + 1, f"{accepted} accepted in {noise.seconds} s"
    return Counter(noise.statuses)


if __name__ == "__main__":
    where, name, key, *numbers = sys.argv[1:]
    done = uvloop.run(make_noise(where, name, key, float(numbers[0]), int(numbers[1]), float(numbers[2])))
    print(msgspec.json.encode(done).decode())
