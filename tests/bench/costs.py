"""The cost of payments: CPU time by group of processes, write-ahead log, commits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tests.bench.cpu_time import cpu_seconds, parent_of
from tests.bench.databases import Connection, median


@dataclass(frozen=True, slots=True)
class Costs:
    """What one payment costs: milliseconds of CPU time, kilobytes of log, transactions."""

    cpu_ms: dict[str, float]
    wal_kb: float
    commits: float

    def __str__(self) -> str:
        cpu = ", ".join(f"{group} {value:.1f}" for group, value in self.cpu_ms.items())
        return f"CPU ms per payment: {cpu}; log {self.wal_kb:.1f} kB, {self.commits:.1f} commits"


@dataclass(frozen=True, slots=True)
class Counters:
    """Totals so far: CPU seconds by group, bytes of log of the whole server, commits of the database."""

    cpu: dict[str, float]
    log: int
    commits: int

    def costs_until(self, later: Counters, payments: int, own_commits: int = 0) -> Costs:
        """The costs of each of these payments, without the commits of the benchmark."""
        return Costs(
            {group: (later.cpu[group] - before) * 1000 / payments for group, before in self.cpu.items()},
            (later.log - self.log) / 1024 / payments,
            (later.commits - self.commits - own_commits) / payments,
        )


def read_counters(conn: Connection, pids: Mapping[str, Sequence[int]]) -> Counters:
    """The present totals of groups of processes, and of the connection's server and database."""
    row = conn.execute(
        "select pg_current_wal_lsn() - '0/0'::pg_lsn, xact_commit from pg_stat_database"
        " where datname = current_database()"
    ).fetchone()
    assert row is not None
    return Counters(cpu_seconds(pids), int(row[0]), int(row[1]))


def median_costs(costs: Sequence[Costs]) -> dict[str, Any]:
    """The medians of several rounds."""
    return {
        "cpu_ms_per_payment": {group: median([each.cpu_ms[group] for each in costs], 2) for group in costs[0].cpu_ms},
        "wal_kb_per_payment": median([each.wal_kb for each in costs], 1),
        "commits_per_payment": median([each.commits for each in costs], 2),
    }


def server_pids(conn: Connection) -> list[int]:
    """The database server's first process, if it runs on this machine: the parent of this connection's backend."""
    address, backend = conn.execute("select inet_server_addr(), pg_backend_pid()").fetchone() or (None, 0)
    parent = parent_of(backend) if address is None else None
    return [] if parent is None else [parent]
