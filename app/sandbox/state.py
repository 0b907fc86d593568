"""The state that every operation shares: settings, memory, faults, the request under execution, scheduled actions."""

import heapq
from asyncio import Event, get_running_loop
from dataclasses import dataclass
from typing import Literal

from app.sandbox.faults import FaultInjector
from app.sandbox.memory import Memory, ScheduledAction
from app.sandbox.settings import SandboxSettings

COMMIT_SOON_SECONDS = 0.01

KeyState = Literal["valid", "expired", "revoked"]


@dataclass(slots=True, frozen=True)
class RequestContext:
    """The account, id and idempotency key of a request."""

    account: str
    request_id: str
    key: str | None


class Sandbox:
    """One running sandbox."""

    def __init__(self, settings: SandboxSettings, memory: Memory, faults: FaultInjector) -> None:
        self.settings = settings
        self.memory = memory
        self.faults = faults
        self.call: RequestContext | None = None
        """The request under execution; None during a scheduled action."""
        self.keys_in_use: set[tuple[str, str]] = set()
        """Account and key of the requests under execution."""
        self.restricted_keys: dict[str, tuple[frozenset[str], frozenset[str]]] = {}
        """By restricted key, its permissions at the platform's own account and at connected ones."""
        self.unconnected_accounts: set[str] = set()
        """Their webhooks are not delivered."""
        self.key_state: KeyState = "valid"
        """Of all keys."""
        self.delivering: list[str] | None = None
        """Collects the ids of events about to be delivered, while a request waits for their delivery."""
        self.scheduled: list[ScheduledAction] = memory.scheduled_actions()
        """A heap by due time."""
        heapq.heapify(self.scheduled)
        self._uncommitted: list[ScheduledAction] = []
        self.schedule_changed = Event()
        self._commit_is_pending = False

    def unix_seconds(self) -> int:
        """The sandbox's time in whole Unix seconds, as Stripe shows it."""
        return int(self.memory.now())

    def schedule(self, delay_seconds: float, what: str, subject: str, attempt: int = 1) -> None:
        """Schedule an action; it survives a kill of the process."""
        due = self.memory.now() + delay_seconds
        self._uncommitted.append(self.memory.schedule(due, what, subject, attempt))

    def commit(self) -> None:
        """Make all changes since the last commit durable, then let the newly scheduled actions begin."""
        self.memory.commit()
        if self._uncommitted:
            for action in self._uncommitted:
                heapq.heappush(self.scheduled, action)
            self._uncommitted = []
            self.schedule_changed.set()

    def commit_soon(self) -> None:
        """Commit within a few milliseconds, together with the changes until then.

        Only for actions that may be repeated after a kill, such as deliveries.
        """
        if not self._commit_is_pending:
            self._commit_is_pending = True
            get_running_loop().call_later(COMMIT_SOON_SECONDS, self._commit_now)

    def _commit_now(self) -> None:
        self._commit_is_pending = False
        self.commit()

    def rollback(self) -> None:
        """Discard all changes since the last commit."""
        self.memory.rollback()
        self._uncommitted = []
