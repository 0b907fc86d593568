"""A run: kill, mend, heal, ask; and at the end, has everything ended?"""

from __future__ import annotations

import contextlib
import random
import statistics
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import LiteralString

import msgspec

from app.demo.merchants import open_shops
from app.demo.report import ENDED, ask_sandbox, check_promises
from tests.crash.house import Connection, House
from tests.crash.kills import KINDS, draw, strike
from tests.crash.traffic import Traffic

MERCHANTS = 10
HEAL_SECONDS_MAX = 60.0
END_SECONDS_MAX = 120.0
UNDISTURBED_SECONDS_MAX = 0.6
THROUGH = ("confirmed", "settled")

Say = Callable[[str], None]


class Result(msgspec.Struct, kw_only=True):
    """`--json` prints it."""

    cycles: int
    kills: dict[str, int]
    acknowledged: int
    lost: int
    double_charges: int
    violations: int
    violated: dict[str, int]
    """The promises that were broken, with how often."""
    not_ended: int
    states: dict[str, int]
    repeated: int
    """Requests that had to be sent again."""
    asked_again: int
    """Answered requests that were sent again all the same: each brought the same bytes."""
    dead_letters: int
    heal_seconds: dict[str, float]
    seconds: float
    seed: int

    @property
    def is_sound(self) -> bool:
        return not (self.lost or self.double_charges or self.violations or self.not_ended)


def run(scene: Path, cycles: int, seed: int, kinds: list[str] | None, say: Say) -> Result:
    """Kill so many times; stops at the first promise that is broken."""
    began = time.monotonic()
    with contextlib.ExitStack() as stack:
        house = House(scene, seed)
        stack.callback(house.close)
        house.open()
        with house.connect() as conn:
            keys = open_shops(conn, MERCHANTS, seed)
        traffic = Traffic(house.http("api"), keys, seed, scene / "acknowledged.log")
        traffic.start()
        kills: dict[str, int] = dict.fromkeys(KINDS, 0)
        heal_seconds: list[float] = []
        violated: dict[str, int] = {}
        for number, kind in enumerate(islice(kinds or draw(seed), cycles), 1):
            lot = random.Random(f"{seed} cycle {number}")
            time.sleep(lot.uniform(0.05, UNDISTURBED_SECONDS_MAX))
            struck = strike(kind, house, lot)
            kills[kind] += 1
            took = heal(house, traffic)
            if took is None:
                violated[f"cycle {number}: heals within {HEAL_SECONDS_MAX:.0f} s"] = 1
                break
            heal_seconds.append(took)
            violated = inspect(house, traffic)
            say(f"{number:>4} {kind}: {struck}; healed in {took:.1f} s; {len(traffic.acknowledged)} acknowledged")
            if violated:
                break
        traffic.stop()
        if not violated:
            finish(house)
            violated = inspect(house, traffic) | compare(house)
        dead_letters, states = look(house)
        return Result(
            cycles=sum(kills.values()),
            kills=kills,
            acknowledged=len(traffic.acknowledged),
            lost=violated.pop("every acknowledged payment is present", 0),
            double_charges=violated.pop("no payment is charged twice", 0),
            violations=sum(violated.values()),
            violated=violated,
            not_ended=sum(count for state, count in states.items() if state not in ENDED),
            states=states,
            repeated=traffic.repeated,
            asked_again=traffic.asked_again,
            dead_letters=dead_letters,
            heal_seconds={
                "median": round(statistics.median(heal_seconds or [0]), 2), "max": round(max(heal_seconds or [0]), 2)
            },
            seconds=round(time.monotonic() - began, 1),
            seed=seed,
        )  # fmt: skip


def finish(house: House) -> None:
    """Wait until all payments have ended, replaying dead letters as an operator would; not for ever."""
    deadline = time.monotonic() + END_SECONDS_MAX
    with house.connect() as conn:
        while time.monotonic() < deadline:
            house.revive()
            conn.execute(
                "select outbox.replay_dead_letter(id, 'operator:crash', 'its workers were killed')"
                " from outbox.dead_letters where closed_at is null"
            )
            if not count(conn, "select count(*) from surety.payments where state <> all(%s)", list(ENDED)):
                return
            time.sleep(0.2)


def compare(house: House) -> dict[str, int]:
    """How far the provider's memory and ours differ, once everything has ended."""
    charges, _, _ = ask_sandbox(house.http("sandbox"))
    with house.connect() as conn:
        captured = count(conn, "select count(*) from surety.payments where captured_minor > 0")
    difference = abs(captured - charges["payments"])
    return {"charged at the provider = confirmed here": difference} if difference else {}


def look(house: House) -> tuple[int, dict[str, int]]:
    """How many dead letters there were, and how many payments are in each state."""
    with house.connect() as conn:
        states = conn.execute("select state, count(*) from surety.payments group by state order by state").fetchall()
        return count(conn, "select count(*) from outbox.dead_letters"), {str(s): int(str(n)) for s, n in states}


def count(conn: Connection, query: LiteralString, *values: object) -> int:
    """The one number that a query gives."""
    row = conn.execute(query, values).fetchone()
    assert row is not None
    return int(str(row[0]))


def heal(house: House, traffic: Traffic) -> float | None:
    """Seconds until a payment made after the kill has got through; None if it hasn't in time."""
    began = time.monotonic()
    deadline = began + HEAL_SECONDS_MAX
    payment_id = traffic.probe(deadline)
    while payment_id and time.monotonic() < deadline:
        died = house.revive()
        with contextlib.suppress(OSError), house.connect() as conn:
            row = conn.execute("select state from surety.payments where id = %s", (payment_id,)).fetchone()
            if row and row[0] in THROUGH and not died:
                return time.monotonic() - began
        time.sleep(0.02)
    return None


def inspect(house: House, traffic: Traffic) -> dict[str, int]:
    """The promises that are broken."""
    charges, _, _ = ask_sandbox(house.http("sandbox"))
    with house.connect() as conn:
        promises, _ = check_promises(conn, list(traffic.acknowledged), charges)
    promises["what was answered is answered again, and nothing else"] = len(traffic.wrong)
    return {name: count for name, count in promises.items() if count}
