"""Sends cases and counts them."""

from __future__ import annotations

import resource
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import requests
from hypothesis import HealthCheck, Phase, given, seed, settings
from msgspec import Struct, field

from tests.fuzz.cases import CaseSource, FuzzCase
from tests.fuzz.verdicts import KINDS, find_differences, find_faults
from tests.fuzz.world import World, build_world
from tests.support.http_client import connect_as_owner, running_server

EXAMPLES_MAX = 20
"""Of each kind of fault."""


class Result(Struct, kw_only=True):
    """The fields that `--json` prints."""

    cases: int = 0
    unsendable: int = 0
    """Drawn requests that the client can't send, such as a header with a line break. Not counted as cases."""
    faults: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    examples: list[str] = field(default_factory=list)
    statuses: dict[str, int] = field(default_factory=dict)
    callers: dict[str, int] = field(default_factory=dict)
    routes: int = 0
    """Routes with an answer below 300, of all that the description has."""
    operations: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    """Of this process, without server and database."""
    seed: int = 0

    @property
    def is_sound(self) -> bool:
        return not any(self.faults.values())


def run(database: str, cases: int, number: int, say: Callable[[str], None]) -> Result:
    """Fuzz an API process on a database where Surety is deployed and nothing else is stored."""
    with connect_as_owner(database) as conn, running_server("api", database, SURETY_ADDRESS_RATE="0") as api:
        world = build_world(conn, api.url)
        return send_cases(api.url, world, cases, number, say)


def send_cases(url: str, world: World, cases: int, number: int, say: Callable[[str], None]) -> Result:
    """Send that many cases, drawn by a seed."""
    source = CaseSource(url, world)
    result = Result(seed=number, operations=source.operations)
    statuses: Counter[str] = Counter()
    callers: Counter[str] = Counter()
    successes: set[str] = set()
    began, cpu_began = time.monotonic(), cpu_seconds()

    with requests.Session() as session:

        def judge(case: FuzzCase) -> None:
            try:
                response = case.request.call(base_url=url, session=session, timeout=60)
            except (requests.RequestException, UnicodeError, ValueError):
                result.unsendable += 1
                return
            result.cases += 1
            statuses[str(response.status_code)] += 1
            callers[case.caller.name] += 1
            if response.status_code < 300:
                successes.add(case.route)
            answered = f"{response.text} {dict(response.headers)}"
            faults = [
                *find_faults(world, case.caller, case.route, case.sent, response.status_code, answered),
                *find_differences(case.request, response),
            ]
            if case.caller.merchant is not None and not faults:
                world.learn(case.caller.merchant, answered)
            for kind, example in faults:
                result.faults[kind] += 1
                if result.faults[kind] <= EXAMPLES_MAX:
                    line = f"{kind}: {case.caller.name}: {case.sent[:800]}: {example}"
                    result.examples.append(line)
                    say(line)
            if result.cases % 1000 == 0:
                say(f"{result.cases} cases in {time.monotonic() - began:.0f} s")

        while result.cases < cases and result.unsendable < cases:
            draw_and_judge(source, judge, cases - result.cases, number + result.unsendable)
    result.seconds, result.cpu_seconds = round(time.monotonic() - began, 1), round(cpu_seconds() - cpu_began, 1)
    result.statuses, result.callers = dict(sorted(statuses.items())), dict(sorted(callers.items()))
    result.routes = len(successes)
    return result


def draw_and_judge(source: CaseSource, judge: Callable[[FuzzCase], None], cases: int, number: int) -> None:
    """Let Hypothesis draw cases. Faults are collected, so nothing is shrunk."""

    @seed(number)
    @settings(
        max_examples=cases,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=source.cases)
    def drawn(case: Any) -> None:
        judge(case)

    drawn()


def cpu_seconds() -> float:
    """CPU time of this process so far, user and system."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime
