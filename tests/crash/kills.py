"""What dies, and how: twenty cards with the kinds' shares, shuffled anew every twenty cycles."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable, Generator
from contextlib import suppress
from pathlib import Path

from tests.crash.house import WORKERS, House

CARDS = {
    "worker": 8,
    "api": 3,
    "postmaster": 2,
    "immediate_stop": 2,
    "backend": 2,
    "terminate_backend": 2,
    "half_open": 1,
}
"""Of twenty. `api` is what listens: one of the API's processes, their parent, or the receiver."""

DOWN_SECONDS_MAX = 0.5
AMBUSH_SECONDS = 0.5
OUR_BACKENDS = """
select pid from pg_stat_activity
where datname = current_database() and application_name like 'surety-%%' and pid <> pg_backend_pid()
    and application_name <> 'surety-deploy' and (not %s or state <> 'idle')
order by pid
"""


def draw(seed: int) -> Generator[str]:
    """Kinds, for ever."""
    lot = random.Random(f"{seed} kinds")
    while True:
        deck = [kind for kind, cards in CARDS.items() for _ in range(cards)]
        lot.shuffle(deck)
        yield from deck


def strike(kind: str, house: House, lot: random.Random) -> str:
    """Kill one thing of a kind and, if it is PostgreSQL, start it again; tells what it was."""
    told = KINDS[kind](house, lot)
    house.revive()
    return told


def kill_worker(house: House, lot: random.Random) -> str:
    """A worker; more often than not one that holds a batch at that moment."""
    name = lot.choice(WORKERS)
    if lot.random() < 0.7:
        name = await_batch(house) or name
    if name in house.troupe.processes:
        house.troupe.kill(name)
    return name


def await_batch(house: House) -> str | None:
    """The worker that holds a batch first, if one does soon."""
    deadline = time.monotonic() + AMBUSH_SECONDS
    with house.connect() as conn:
        while time.monotonic() < deadline:
            row = conn.execute(
                "select leased_by from outbox.batches where leased_by = any(%s) order by random() limit 1",
                (list(WORKERS),),
            ).fetchone()
            if row is not None:
                return str(row[0])
            time.sleep(0.005)
    return None


def kill_api(house: House, lot: random.Random) -> str:
    """The API's parent, one of its processes, or the receiver."""
    what = lot.choice(("webhooks", "api", "api's process", "api's process"))
    if what in house.troupe.processes:
        house.troupe.kill(what)
        return what
    parent = house.troupe.processes.get("api")
    children = children_of(parent.pid) if parent else []
    if children:
        with suppress(ProcessLookupError):
            os.kill(lot.choice(children), signal.SIGKILL)
    return what


def children_of(pid: int) -> list[int]:
    """A process's children that serve: uvicorn has a tracker of resources beside them."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return sorted(int(child) for child in children if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes())


def kill_postmaster(house: House, lot: random.Random) -> str:
    """PostgreSQL's first process."""
    house.kill_server()
    time.sleep(lot.uniform(0, DOWN_SECONDS_MAX))
    house.start_server()
    return "postmaster"


def stop_immediately(house: House, lot: random.Random) -> str:
    """PostgreSQL as a whole: no shutdown, so it starts by recovering."""
    house.server.restart("immediate")
    return "all of PostgreSQL"


def kill_backend(house: House, lot: random.Random) -> str:
    """One backend, after which PostgreSQL ends all others and recovers."""
    pid = choose_backend(house, lot)
    os.kill(pid, signal.SIGKILL)
    return f"backend {pid}"


def terminate_backend(house: House, lot: random.Random) -> str:
    """One session, as an administrator would."""
    pid = choose_backend(house, lot)
    with house.connect() as conn:
        conn.execute("select pg_terminate_backend(%s)", (pid,))
    return f"session {pid}"


def cut_connection(house: House, lot: random.Random) -> str:
    """One connection falls silent, and nobody is told."""
    assert house.proxy.cut(lot.random()), "there is no connection to cut"
    return "a connection"


def choose_backend(house: House, lot: random.Random) -> int:
    """A backend of our processes'; one that is at work, if one is soon."""
    deadline = time.monotonic() + AMBUSH_SECONDS
    with house.connect() as conn:
        while time.monotonic() < deadline:
            if busy := conn.execute(OUR_BACKENDS, (True,)).fetchall():
                return int(str(lot.choice(busy)[0]))
        while not (found := conn.execute(OUR_BACKENDS, (False,)).fetchall()):
            time.sleep(0.05)
        return int(str(lot.choice(found)[0]))


Kill = Callable[[House, random.Random], str]
KINDS: dict[str, Kill] = {
    "worker": kill_worker,
    "api": kill_api,
    "postmaster": kill_postmaster,
    "immediate_stop": stop_immediately,
    "backend": kill_backend,
    "terminate_backend": terminate_backend,
    "half_open": cut_connection,
}
