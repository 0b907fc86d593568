"""An event loop without I/O: its time moves only when it is set, and the schedule decides what runs next."""

from __future__ import annotations

import asyncio
import contextvars
import itertools
import selectors
from collections.abc import Callable, Coroutine
from typing import Any


class Killed(BaseException):
    """The process that ran this code is dead: it does nothing more, not even cleanup."""


class Process:
    """Tasks that are killed together, with all that they hold."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.is_dead = False
        self.tasks: dict[asyncio.Task[Any], None] = {}

    def start(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Run a coroutine in this process. Tasks that it starts belong to the process as well."""
        context = contextvars.copy_context()
        context.run(PROCESS.set, self)
        return asyncio.get_running_loop().create_task(work, context=context)

    def kill(self) -> None:
        """As by SIGKILL."""
        self.is_dead = True
        for task in list(self.tasks):
            task.cancel()


PROCESS: contextvars.ContextVar[Process | None] = contextvars.ContextVar("process", default=None)


class Task(asyncio.Task[Any]):
    """A task whose hash doesn't depend on its address."""

    numbers = itertools.count()

    def __init__(self, work: Coroutine[Any, Any, Any], *, loop: Loop, **options: Any) -> None:
        self._number = next(Task.numbers)
        super().__init__(work, loop=loop, **options)

    def __hash__(self) -> int:
        return self._number


class DecidingSelector(selectors.SelectSelector):
    """A selector without I/O: when the loop would wait, the schedule decides instead."""

    def __init__(self, decide: Callable[[], None]) -> None:
        super().__init__()
        self._decide = decide

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None or timeout > 0:
            self._decide()
        return []


class Loop(asyncio.SelectorEventLoop):
    """The loop of one schedule. `seconds` is its time. `decide` is called whenever no task is ready."""

    def __init__(self, decide: Callable[[], None]) -> None:
        super().__init__(DecidingSelector(decide))
        self.seconds = 0.0
        # A timer is due at its own time. The usual nanosecond is below the precision of a float after some months.
        vars(self)["_clock_resolution"] = 1e-6
        self.broken: list[str] = []
        Task.numbers = itertools.count()
        self.set_task_factory(make_task)
        self.set_exception_handler(note)

    def time(self) -> float:
        return self.seconds

    def next_timer(self) -> float | None:
        """The time of the next timer."""
        timers: list[asyncio.TimerHandle] = vars(self)["_scheduled"]
        return min((timer.when() for timer in timers if not timer.cancelled()), default=None)


def make_task(loop: asyncio.AbstractEventLoop, work: Any, **options: Any) -> Task:
    """A task that belongs to the process of the task that starts it."""
    assert isinstance(loop, Loop)
    task = Task(work, loop=loop, **options)
    context: contextvars.Context = options.get("context") or contextvars.copy_context()
    process = context.get(PROCESS, None)
    if process is not None:
        process.tasks[task] = None
        task.add_done_callback(lambda done: process.tasks.pop(done, None))
    return task


def note(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Record an uncaught exception, unless its process was killed."""
    error = context.get("exception")
    if isinstance(loop, Loop) and not isinstance(error, Killed):
        loop.broken.append(f"{context.get('message')}: {error!r}")
