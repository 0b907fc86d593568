"""`hostile`: a well-behaved client of the webhook receiver beside clients without a key that exceed every limit.

    normal      the client alone: it sends signed webhooks one after the other
    hostile     beside four connections that send heads without an end, each opened again as soon as it is closed, and
                oversized requests, whose Authorization header has 4 MB

The phases take turns in one run against one process, whose memory is compared before and after. The hostile clients
are a process of their own: `python -m tests.bench.hostile PORT SECONDS OVERSIZED`.
"""

from __future__ import annotations

import hmac
import itertools
import resource
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from http.client import HTTPConnection
from pathlib import Path
from urllib.parse import urlsplit

import msgspec

from tests.bench.databases import (
    ROOT,
    Results,
    deployed_database,
    log_progress,
    median,
    median_ratio,
    percentile,
    round_all,
    server,
)
from tests.support.http_client import SECRETS, running_server

ENDLESS_CONNECTIONS = 4
OVERSIZED_BYTES = 4_000_000
PART = b"a" * 65536
PAUSE_SECONDS = 0.002


class HostileResults(msgspec.Struct):
    """Connections that the server ended, by the status that was read; 0 if the client could read none."""

    ended: dict[int, int]


def send_until_ended(port: int, start: bytes, bytes_max: int) -> int:
    """Send a head until the server ends the connection or the head is sent: the status, 0 without an answer."""
    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        with suppress(ConnectionError):
            connection.sendall(start)
            for _ in range(bytes_max // len(PART)):
                connection.sendall(PART)
        with suppress(ConnectionError):
            answer = connection.recv(65536)
            return int(answer[9:12]) if answer else 0
    return 0


def be_hostile(port: int, seconds: float, oversized: int) -> HostileResults:
    """Endless heads for so many seconds, and so many oversized requests."""
    ended: Counter[int] = Counter()
    deadline = time.monotonic() + seconds

    def send_endless() -> None:
        while time.monotonic() < deadline:
            ended[send_until_ended(port, b"POST /stripe HTTP/1.1\r\nHost: x\r\nA: ", 1 << 40)] += 1

    def send_oversized() -> None:
        start = b"POST /stripe HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer "
        for _ in range(oversized):
            ended[send_until_ended(port, start, OVERSIZED_BYTES)] += 1

    threads = [threading.Thread(target=send_endless) for _ in range(ENDLESS_CONNECTIONS)]
    threads.append(threading.Thread(target=send_oversized))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return HostileResults(dict(ended))


def send_webhooks(url: str, goes_on: Callable[[], bool], numbers: Iterator[int]) -> list[float]:
    """The milliseconds that each signed webhook took."""
    where = urlsplit(url)
    assert where.hostname
    connection = HTTPConnection(where.hostname, where.port, timeout=60)
    took_ms: list[float] = []
    while goes_on() or not took_ms:
        body = msgspec.json.encode({"id": f"evt_{next(numbers)}", "type": "charge.updated", "livemode": False})
        stamp = str(int(time.time()))
        signature = hmac.digest(SECRETS[0].encode(), f"{stamp}.".encode() + body, "sha256").hex()
        headers = {"Content-Type": "application/json", "Stripe-Signature": f"t={stamp},v1={signature}"}
        began = time.perf_counter()
        connection.request("POST", "/stripe", body, headers)
        answer = connection.getresponse()
        assert answer.status == 200, answer.read()
        answer.read()
        took_ms.append((time.perf_counter() - began) * 1000)
        time.sleep(PAUSE_SECONDS)
    connection.close()
    return took_ms


def lasting(seconds: float) -> Callable[[], bool]:
    """Whether the time from now is not over."""
    deadline = time.monotonic() + seconds
    return lambda: time.monotonic() < deadline


def resident_mb(pid: int) -> float:
    """The resident memory of a process."""
    pages = int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1])
    return pages * resource.getpagesize() / 1e6


def run(*, seconds: float, oversized: int, rounds: int) -> Results:
    """The client alone and beside hostile clients, by turns."""
    with ExitStack() as stack:
        url = stack.enter_context(deployed_database(stack.enter_context(server())))
        receiver = stack.enter_context(running_server("webhooks", url))
        port = urlsplit(receiver.url).port
        numbers = itertools.count(1)
        send_webhooks(receiver.url, lasting(min(1.0, seconds)), numbers)
        before = resident_mb(receiver.process.pid)
        normal_ms: list[float] = []
        hostile_ms: list[float] = []
        ended: Counter[int] = Counter()
        for turn in range(rounds):
            normal_ms.append(percentile(send_webhooks(receiver.url, lasting(seconds), numbers), 0.99))
            module = [sys.executable, "-m", "tests.bench.hostile", str(port), str(seconds), str(oversized)]
            with subprocess.Popen(module, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as hostile:
                took_ms = send_webhooks(receiver.url, lambda: hostile.poll() is None, numbers)
                hostile_ms.append(percentile(took_ms, 0.99))
                said, _ = hostile.communicate()
            ended.update(msgspec.json.decode(said, type=HostileResults).ended)
            log_progress(f"{turn + 1}: p99 {normal_ms[-1]:.1f} ms, beside hostile clients {hostile_ms[-1]:.1f} ms")
        after = resident_mb(receiver.process.pid)
    return {
        "benchmark": "hostile",
        "p99_ratio": median_ratio(hostile_ms, normal_ms),
        "memory_growth_mb": round(after - before, 1),
        "refused": sum(ended.values()) - ended[200],
        "refused_with_431": ended[431],
        "normal_p99_ms": median(normal_ms, 2),
        "hostile_p99_ms": median(hostile_ms, 2),
        "memory_mb": [round(before, 1), round(after, 1)],
        "rounds": round_all({"normal_p99_ms": normal_ms, "hostile_p99_ms": hostile_ms}),
    }


if __name__ == "__main__":
    results = be_hostile(int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]))
    print(msgspec.json.encode(results).decode())
