"""A run: kill, restart, wait for recovery, check; and at the end, whether everything has ended."""

from __future__ import annotations

import contextlib
import random
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path

import msgspec
import psycopg

from app.local.demo.checks import ACKNOWLEDGED_PRESENT, CHARGED_TWICE, REFUNDED_TWICE
from app.local.demo.merchants import create_admin, create_merchants
from app.local.demo.report import count_payment_actions
from app.local.demo.sandbox_record import read_sandbox
from tests.crash.background_load import BackgroundLoad
from tests.crash.checks import count_by_state, count_unfinished, find_differences, find_violations
from tests.crash.kills import KINDS, draw, kill_and_restart
from tests.crash.limits import set_limits
from tests.crash.processes import SuretyProcesses, SystemUnderTest

MERCHANTS = 10
LIMITED_PAYMENTS_MIN = 1
HEAL_SECONDS_MAX = 60.0
END_SECONDS_MAX = 120.0
UNDISTURBED_SECONDS_MAX = 0.6
PROCESSED_STATES = ("confirmed", "settled")

Say = Callable[[str], None]


class Result(msgspec.Struct, kw_only=True):
    """The fields that `--json` prints."""

    cycles: int
    kills: dict[str, int]
    acknowledged: int
    lost: int
    double_charges: int
    double_refunds: int
    violations: int
    violated: dict[str, int]
    """The number of violations of each violated invariant."""
    not_ended: int
    """Payments, refunds and disputes."""
    states: dict[str, int]
    refunds: int
    """Acknowledged."""
    customers: int
    """Acknowledged."""
    off_session: int
    """Acknowledged payments by a saved payment method, without the payer."""
    decisions: dict[str, int]
    """Acknowledged decisions about payments on hold, by outcome."""
    disputes: dict[str, int]
    """At the provider, by status."""
    afterwards: dict[str, int]
    """The number of payments with each later action."""
    refused: dict[str, int]
    """Expected refusals, such as a refund of more than is left, by the problem's name."""
    repeated: int
    """Requests that were sent again because there was no answer."""
    asked_again: int
    """Answered requests that were sent again: each returned the same bytes."""
    dead_letters: int
    heal_seconds: dict[str, float]
    seconds: float
    seed: int

    @property
    def is_sound(self) -> bool:
        twice = self.double_charges or self.double_refunds
        return not (self.lost or twice or self.violations or self.not_ended)


class KillPhase(msgspec.Struct, kw_only=True):
    """The results of a run's kills."""

    kills: dict[str, int] = msgspec.field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    heal_seconds: list[float] = msgspec.field(default_factory=list)
    violated: dict[str, int] = msgspec.field(default_factory=dict)


def run(scene: Path, cycles: int, seed: int, kinds: list[str] | None, say: Say) -> Result:
    """Kill processes `cycles` times under load. Stops at the first invariant that is violated."""
    began = time.monotonic()
    with contextlib.ExitStack() as stack:
        system = SystemUnderTest(scene, seed)
        stack.callback(system.close)
        system.open()
        with system.connect() as conn:
            keys, operator_key = create_merchants(conn, MERCHANTS, seed), create_admin(conn)
            set_limits(conn, keys, LIMITED_PAYMENTS_MIN + cycles // 2)
        background_load = BackgroundLoad(system.http("api"), keys, operator_key, seed, scene / "acknowledged.log")
        client = background_load.client
        background_load.start()
        phase = kill_under_load(system, background_load, islice(kinds or draw(seed), cycles), seed, say)
        background_load.close()
        violated = phase.violated or finish(system, background_load, say)
        for line in client.wrong_answers:
            say(f"wrong: {line}")
        with system.connect() as conn:
            dead_letters, states = count_by_state(conn)
            not_ended, afterwards = count_unfinished(conn), count_payment_actions(conn)
        heal_seconds = phase.heal_seconds or [0.0]
        return Result(
            cycles=sum(phase.kills.values()),
            kills=phase.kills,
            acknowledged=len(client.payments),
            lost=violated.pop(ACKNOWLEDGED_PRESENT, 0),
            double_charges=violated.pop(CHARGED_TWICE, 0),
            double_refunds=violated.pop(REFUNDED_TWICE, 0),
            violations=sum(violated.values()),
            violated=violated,
            not_ended=not_ended,
            states=states,
            refunds=len(client.refunds),
            customers=len(client.customers),
            off_session=client.off_session,
            decisions=dict(Counter(client.decisions.values())),
            disputes=dict(Counter(dispute["status"] for dispute in read_sandbox(system.http("sandbox"), "disputes"))),
            afterwards=afterwards,
            refused=dict(client.refused),
            repeated=client.repeated,
            asked_again=client.asked_again,
            dead_letters=dead_letters,
            heal_seconds={"median": round(statistics.median(heal_seconds), 2), "max": round(max(heal_seconds), 2)},
            seconds=round(time.monotonic() - began, 1),
            seed=seed,
        )


def kill_under_load(
    system: SystemUnderTest, background_load: BackgroundLoad, kinds: Iterable[str], seed: int, say: Say
) -> KillPhase:
    """Kill, wait until the system works again, and check the invariants, for each kind."""
    phase, client = KillPhase(), background_load.client
    for number, kind in enumerate(kinds, 1):
        chance = random.Random(f"{seed} cycle {number}")
        time.sleep(chance.uniform(0.05, UNDISTURBED_SECONDS_MAX))
        struck = kill_and_restart(kind, system, chance)
        phase.kills[kind] += 1
        seconds = heal(system, background_load)
        if seconds is None:
            phase.violated[f"cycle {number}: heals within {HEAL_SECONDS_MAX:.0f} s"] = 1
            break
        phase.heal_seconds.append(seconds)
        phase.violated, details = find_violations(system, client)
        acknowledged = f"{len(client.payments)} payments and {len(client.refunds)} refunds acknowledged"
        say(f"{number:>4} {kind}: {struck}; healed in {seconds:.1f} s; {acknowledged}")
        if phase.violated:
            for line in details:
                say(line)
            break
    return phase


def finish(system: SuretyProcesses, background_load: BackgroundLoad, say: Say) -> dict[str, int]:
    """The invariants violated once everything that was begun has ended, the comparison with the provider included."""
    closed_at = time.monotonic()
    differing = wait_for_end(system, background_load)
    background_load.stop()
    violated, details = find_violations(system, background_load.client)
    for line in details:
        say(line)
    say(f"everything ended {time.monotonic() - closed_at:.1f} s after the last request")
    return violated | differing


def wait_for_end(system: SuretyProcesses, background_load: BackgroundLoad) -> dict[str, int]:
    """The differences from the provider once everything has ended, or after END_SECONDS_MAX.

    Dead letters are replayed, as an operator would.
    """
    deadline = time.monotonic() + END_SECONDS_MAX
    with system.connect() as conn:
        while True:
            system.revive()
            conn.execute(
                "select outbox.replay_dead_letter(id, 'operator:crash', 'its workers were killed')"
                " from outbox.dead_letters where closed_at is null"
            )
            is_late = time.monotonic() > deadline
            if is_late or not (background_load.is_busy or count_unfinished(conn)):
                differing = find_differences(conn, system.http("sandbox"))
                if is_late or not differing:
                    return differing
            time.sleep(0.2)


def heal(
    system: SuretyProcesses, background_load: BackgroundLoad, seconds_max: float = HEAL_SECONDS_MAX
) -> float | None:
    """Seconds until a payment made after the kill was confirmed. None if that takes longer than `seconds_max`."""
    began = time.monotonic()
    request, payment_id = background_load.create_probe(), None
    while time.monotonic() < began + seconds_max:
        died = system.revive()
        payment_id = payment_id or background_load.probe(request)
        if payment_id is not None:
            with contextlib.suppress(OSError, psycopg.OperationalError), system.connect() as conn:
                row = conn.execute("select state from surety.payments where id = %s", (payment_id,)).fetchone()
                if row and row[0] in PROCESSED_STATES and not died:
                    return time.monotonic() - began
        time.sleep(0.02)
    return None
