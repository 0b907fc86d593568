"""A run: disturb, wait until payments are confirmed again, check, mend; at the end, whether everything has ended."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

import msgspec

from app.local.demo.checks import ACKNOWLEDGED_PRESENT, CHARGED_TWICE, REFUNDED_TWICE
from app.local.demo.merchants import create_admin, create_merchants
from tests.crash.background_load import BackgroundLoad
from tests.crash.checks import count_unfinished, find_violations
from tests.crash.processes import SuretyProcesses, prepare_database
from tests.crash.run import finish, heal
from tests.failover.cluster import PatroniCluster
from tests.failover.disturbances import DISTURBANCES, mend
from tests.failover.observer import Observer
from tests.support.silent_host import SilentHost

MERCHANTS = 10
UNDISTURBED_SECONDS = 3.0
HEAL_SECONDS_MAX = 120.0

Say = Callable[[str], None]


class Phase(msgspec.Struct, kw_only=True):
    """A disturbance and what was seen meanwhile."""

    disturbance: str
    unavailable_s: float
    """The longest time without an acknowledged payment."""
    confirmed_s: float
    """From the end of the disturbance until a payment made later was confirmed by the provider."""
    findings: dict[str, str]
    """The findings of `surety status` meanwhile, by id."""


class Result(msgspec.Struct, kw_only=True):
    """The fields that `--json` prints."""

    acknowledged: int
    lost: int
    unavailable_s: float
    """The longest of the phases."""
    violations: int
    violated: dict[str, int]
    """The number of violations of each violated invariant."""
    double_charges: int
    double_refunds: int
    not_ended: int
    """Payments, refunds and disputes."""
    ended_processes: dict[str, int]
    """Processes of Surety's that ended, by name; none may."""
    repeated: int
    """Requests that were sent again because there was no answer."""
    asked_again: int
    """Answered requests that were sent again: each returned the same bytes."""
    phases: list[Phase]
    strict: bool
    seconds: float
    seed: int

    @property
    def is_sound(self) -> bool:
        twice = self.double_charges or self.double_refunds
        return not (self.lost or twice or self.violations or self.not_ended or self.ended_processes)


class UnattendedProcesses(SuretyProcesses):
    """Surety's processes, which no one should have to restart. Those that end are counted, and started again."""

    def __init__(self, scene: Path, seed: int, database_url: str) -> None:
        super().__init__(scene, seed, database_url, database_url)
        self.ended: Counter[str] = Counter()

    def revive(self) -> list[str]:
        """Restart the processes that ended; returns their names."""
        self.ended.update(self.process_group.ended_processes().keys())
        return super().revive()


def run(scene: Path, disturbances: Iterable[str], seed: int, say: Say, *, strict: bool) -> Result:
    """Disturb the cluster under load. Stops at the first invariant that is violated."""
    began = time.monotonic()
    with contextlib.ExitStack() as stack:
        cluster, silent_host = PatroniCluster(scene, strict=strict), SilentHost()
        stack.callback(silent_host.close)
        stack.callback(cluster.close)
        cluster.start()
        say(f"the cluster is ready after {time.monotonic() - began:.1f} s")
        system = UnattendedProcesses(scene, seed, prepare_database(cluster.url(silent_host.port)))
        stack.callback(system.close)
        system.open()
        with system.connect() as conn:
            keys, operator_key = create_merchants(conn, MERCHANTS, seed), create_admin(conn)
        load = BackgroundLoad(system.http("api"), keys, operator_key, seed, scene / "acknowledged.log")
        load.start()
        phases: list[Phase] = []
        violated: dict[str, int] = {}
        for name in disturbances:
            phase, violated = disturb(name, cluster, silent_host, system, load, say)
            phases.append(phase)
            if violated:
                break
        load.close()
        violated = violated or finish(system, load, say)
        for line in load.client.wrong_answers:
            say(f"wrong: {line}")
        with system.connect() as conn:
            not_ended = count_unfinished(conn)
        return Result(
            acknowledged=len(load.client.payments),
            lost=violated.pop(ACKNOWLEDGED_PRESENT, 0),
            unavailable_s=max(phase.unavailable_s for phase in phases),
            double_charges=violated.pop(CHARGED_TWICE, 0),
            double_refunds=violated.pop(REFUNDED_TWICE, 0),
            violations=sum(violated.values()),
            violated=violated,
            not_ended=not_ended,
            ended_processes=dict(system.ended),
            repeated=load.client.repeated,
            asked_again=load.client.asked_again,
            phases=phases,
            strict=strict,
            seconds=round(time.monotonic() - began, 1),
            seed=seed,
        )


def disturb(
    name: str,
    cluster: PatroniCluster,
    silent_host: SilentHost,
    system: UnattendedProcesses,
    load: BackgroundLoad,
    say: Say,
) -> tuple[Phase, dict[str, int]]:
    """One disturbance, from undisturbed load until the standby is synchronous again; and the violated invariants."""
    time.sleep(UNDISTURBED_SECONDS)
    observer = Observer(load.client.payments, system.process_group.environment)
    try:
        done = DISTURBANCES[name](cluster, silent_host)
        seconds = heal(system, load, HEAL_SECONDS_MAX)
    finally:
        observer.close()
    phase = Phase(
        disturbance=name,
        unavailable_s=round(observer.unavailable_seconds, 1),
        confirmed_s=round(seconds or HEAL_SECONDS_MAX, 1),
        findings=observer.findings,
    )
    if seconds is None:
        return phase, {f"{name}: a payment is confirmed within {HEAL_SECONDS_MAX:.0f} s": 1}
    violated, details = find_violations(system, load.client)
    acknowledged = f"{len(load.client.payments)} payments and {len(load.client.refunds)} refunds acknowledged"
    seen = f"unavailable for {phase.unavailable_s} s, confirmed after {phase.confirmed_s} s"
    say(f"{name}: {done}; {seen}; {acknowledged}")
    for finding, text in phase.findings.items():
        say(f"    {finding}: {text}")
    for line in details:
        say(line)
    mend(cluster, silent_host)
    return phase, violated
