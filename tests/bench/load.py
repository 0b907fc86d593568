"""Load over HTTP: wrk where it is installed, else Python connections in a process of their own.

Both send the same requests: payments with unused idempotency keys and references. Run by itself, this
file is that process: `python -m tests.bench.load URL CONNECTIONS SECONDS RUN ids|none KEY…`; it prints what the script
for wrk prints.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from urllib.parse import urlsplit

import msgspec

from tests.bench.databases import ROOT, percentile

SCRIPT = Path(__file__).with_suffix("").with_name("accept.lua")


class LoadResults(msgspec.Struct):
    """What came of a load. `answers` counts all that came, `errors` those that were none or no 2xx."""

    answers: int
    seconds: float
    errors: int
    p50_ms: float
    p99_ms: float
    ids: list[str] = []

    @property
    def per_second(self) -> float:
        """Answers per second."""
        return self.answers / self.seconds


def generator() -> str:
    """What makes the load here."""
    return "wrk" if shutil.which("wrk") else "asyncio"


def load(url: str, *, connections: int, seconds: float, run: str, keys: list[str], ids: bool = False) -> LoadResults:
    """As many requests as are answered in that time; `ids` keeps the ids of the payments that were accepted."""
    kept = "ids" if ids else "none"
    if generator() == "wrk":
        options = ["-t1", f"-c{connections}", f"-d{max(1, round(seconds))}s", "--timeout", "10s", "-s", str(SCRIPT)]
        command = ["wrk", *options, url, "--", run, kept, *keys]
    else:
        module = [sys.executable, "-m", "tests.bench.load"]
        command = [*module, url, str(connections), str(seconds), run, kept, *keys]
    done = subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    loaded = msgspec.json.decode(lines[-1], type=LoadResults)
    loaded.ids = [line for line in lines if line.startswith("pay_")]
    return loaded


async def exchange(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes) -> tuple[int, bytes]:
    """Send a request on a connection that is kept; returns the answer's status and body."""
    writer.write(request)
    head = await reader.readuntil(b"\r\n\r\n")
    length = head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0]
    return int(head[9:12]), await reader.readexactly(int(length))


@dataclass
class LoadClient:
    """Connections that each send the next request as soon as the last was answered."""

    url: str
    run: str
    keys: list[str]
    deadline: float
    numbers: count[int] = field(default_factory=count)
    times: list[float] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)
    errors: int = 0

    async def connect(self) -> None:
        """One connection, until the deadline."""
        where = urlsplit(self.url)
        reader, writer = await asyncio.open_connection(where.hostname, where.port)
        while time.monotonic() < self.deadline:
            began = time.perf_counter()
            status, body = await exchange(reader, writer, self.request(where.path, next(self.numbers)))
            self.times.append((time.perf_counter() - began) * 1000)
            if status != 201:
                self.errors += 1
            elif body.startswith(b'{"id":"pay_'):
                self.ids.append(body[7:35].decode())
        writer.close()

    def request(self, path: str, number: int) -> bytes:
        """A payment of its own."""
        key = f"{self.run}-{number}"
        body = json.dumps({
            "amount": 4999, "currency": "usd", "payment_method": {"type": "card", "token": "pm_card_visa"},
            "return_url": "https://shop.example/return",
            "reference": key, "description": "Two books and a lamp", "metadata": {"cart": "9"},
        })  # fmt: skip
        head = (
            f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nIdempotency-Key: {key}\r\n"
            f"Authorization: Bearer {self.keys[number % len(self.keys)]}\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        return head.encode() + body.encode()


async def main(url: str, connections: int, seconds: float, run: str, kept: str, keys: list[str]) -> None:
    """The load without wrk."""
    began = time.monotonic()
    client = LoadClient(url, run, keys, began + seconds)
    await asyncio.gather(*(client.connect() for _ in range(connections)))
    took = time.monotonic() - began
    if kept == "ids":
        print(*client.ids, sep="\n")
    output = LoadResults(
        len(client.times), took, client.errors, percentile(client.times, 0.5), percentile(client.times, 0.99)
    )
    print(msgspec.json.encode(output).decode())


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), sys.argv[4], sys.argv[5], sys.argv[6:]))
