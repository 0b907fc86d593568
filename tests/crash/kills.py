"""Kinds of kills. Twenty are drawn in proportion to their weights and shuffled, then twenty more."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable, Generator
from contextlib import suppress
from pathlib import Path

from tests.crash.processes import WORKERS, SystemUnderTest

KIND_WEIGHTS = {
    "worker": 8,
    "listener": 3,
    "postmaster": 2,
    "immediate_stop": 2,
    "backend": 2,
    "terminate_backend": 2,
    "half_open": 1,
}
"""The share of each kind in twenty. `listener`: one of the API's processes, their parent, or the receiver."""

DOWN_SECONDS_MAX = 0.5
TARGET_SECONDS_MAX = 0.5
OUR_BACKENDS = """
select pid from pg_stat_activity
where datname = current_database() and application_name like 'surety-%%' and pid <> pg_backend_pid()
    and application_name <> 'surety-deploy' and (not %s or state <> 'idle')
order by pid
"""


def draw(seed: int) -> Generator[str]:
    """Endless kinds of kills, shuffled, each as often as its weight."""
    chance = random.Random(f"{seed} kinds")
    while True:
        kinds = [kind for kind, weight in KIND_WEIGHTS.items() for _ in range(weight)]
        chance.shuffle(kinds)
        yield from kinds


def kill_and_restart(kind: str, system: SystemUnderTest, chance: random.Random) -> str:
    """Kill one target of a kind, and restart it if it is PostgreSQL. Returns its name."""
    target = KINDS[kind](system, chance)
    system.process_group.revive()
    return target


def kill_worker(system: SystemUnderTest, chance: random.Random) -> str:
    """Kill a worker, usually one that holds a batch."""
    name = chance.choice(WORKERS)
    if chance.random() < 0.7:
        name = wait_for_leased_batch(system) or name
    if name in system.process_group.processes:
        system.process_group.kill(name)
    return name


def wait_for_leased_batch(system: SystemUnderTest) -> str | None:
    """The first worker that holds a batch within TARGET_SECONDS_MAX, or None."""
    deadline = time.monotonic() + TARGET_SECONDS_MAX
    with system.connect() as conn:
        while time.monotonic() < deadline:
            row = conn.execute(
                "select leased_by from outbox.batches where leased_by = any(%s) order by random() limit 1",
                (list(WORKERS),),
            ).fetchone()
            if row is not None:
                return str(row[0])
            time.sleep(0.005)
    return None


def kill_listener(system: SystemUnderTest, chance: random.Random) -> str:
    """Kill the API's parent, one of its processes, or the receiver."""
    what = chance.choice(("webhooks", "api", "api's process", "api's process"))
    if what in system.process_group.processes:
        system.process_group.kill(what)
        return what
    parent = system.process_group.processes.get("api")
    children = children_of(parent.pid) if parent else []
    if children:
        with suppress(ProcessLookupError):
            os.kill(chance.choice(children), signal.SIGKILL)
    return what


def children_of(pid: int) -> list[int]:
    """A process's children that serve: uvicorn has a tracker of resources beside them."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return sorted(int(child) for child in children if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes())


def kill_postmaster(system: SystemUnderTest, chance: random.Random) -> str:
    """Kill PostgreSQL's first process."""
    system.kill_server()
    time.sleep(chance.uniform(0, DOWN_SECONDS_MAX))
    system.start_server()
    return "postmaster"


def stop_immediately(system: SystemUnderTest, chance: random.Random) -> str:
    """Stop PostgreSQL without a shutdown, so that it starts with recovery."""
    system.server.restart("immediate")
    return "all of PostgreSQL"


def kill_backend(system: SystemUnderTest, chance: random.Random) -> str:
    """Kill one backend. PostgreSQL then ends all others and recovers."""
    pid = choose_backend(system, chance)
    os.kill(pid, signal.SIGKILL)
    return f"backend {pid}"


def terminate_backend(system: SystemUnderTest, chance: random.Random) -> str:
    """Terminate one session, as an administrator would."""
    pid = choose_backend(system, chance)
    with system.connect() as conn:
        conn.execute("select pg_terminate_backend(%s)", (pid,))
    return f"session {pid}"


def make_half_open(system: SystemUnderTest, chance: random.Random) -> str:
    """Silence one connection without notice to its ends."""
    assert system.proxy.silence(chance.random()), "there is no connection to cut"
    return "a connection"


def choose_backend(system: SystemUnderTest, chance: random.Random) -> int:
    """A backend of Surety's processes: an active one, if there is one within TARGET_SECONDS_MAX."""
    deadline = time.monotonic() + TARGET_SECONDS_MAX
    with system.connect() as conn:
        while time.monotonic() < deadline:
            if busy := conn.execute(OUR_BACKENDS, (True,)).fetchall():
                return int(str(chance.choice(busy)[0]))
        while not (found := conn.execute(OUR_BACKENDS, (False,)).fetchall()):
            time.sleep(0.05)
        return int(str(chance.choice(found)[0]))


Kill = Callable[[SystemUnderTest, random.Random], str]
KINDS: dict[str, Kill] = {
    "worker": kill_worker,
    "listener": kill_listener,
    "postmaster": kill_postmaster,
    "immediate_stop": stop_immediately,
    "backend": kill_backend,
    "terminate_backend": terminate_backend,
    "half_open": make_half_open,
}
