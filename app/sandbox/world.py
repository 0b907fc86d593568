"""What all operations share: settings, memory, chance, and telling the world what happened."""

import heapq
from asyncio import Event, get_running_loop
from dataclasses import dataclass
from typing import Any

from app.sandbox.cards import CARD_BY_FINGERPRINT, Card
from app.sandbox.faults import FaultInjector
from app.sandbox.memory import Memory, ScheduledAction, StoredObject, encode
from app.sandbox.settings import API_VERSION, PLATFORM_ACCOUNT, SandboxSettings

COMMIT_SOON_SECONDS = 0.01


@dataclass(slots=True, frozen=True)
class RequestContext:
    """Whose request is being executed."""

    account: str
    request_id: str
    key: str | None


class World:
    """One sandbox."""

    def __init__(self, settings: SandboxSettings, memory: Memory, faults: FaultInjector) -> None:
        self.settings = settings
        self.memory = memory
        self.faults = faults
        self.call: RequestContext | None = None
        """The request under execution; None while the sandbox acts by itself."""
        self.keys_in_use: set[tuple[str, str]] = set()
        """Account and key of the requests that are still being executed."""
        self.delivering: list[str] | None = None
        """Where to note the events that are about to be delivered, if somebody waits for them."""
        self.agenda: list[ScheduledAction] = memory.plans()
        """What will happen, as a heap by time."""
        heapq.heapify(self.agenda)
        self._fresh: list[ScheduledAction] = []
        self.agenda_changed = Event()
        self._commit_is_near = False

    def unix_seconds(self) -> int:
        """The sandbox's time as Stripe tells it, whole Unix seconds."""
        return int(self.memory.now())

    def card_of(self, method_id: str) -> Card:
        """The test card behind a stored payment method."""
        return CARD_BY_FINGERPRINT[self.memory.get(method_id).body["card"]["fingerprint"]]

    def plan(self, delay_seconds: float, what: str, subject: str, attempt: int = 1) -> None:
        """Let something happen later, even if the sandbox is killed before."""
        due = self.memory.now() + delay_seconds
        self._fresh.append(self.memory.plan(due, what, subject, attempt))

    def emit(self, type: str, record: StoredObject, previous: dict[str, Any] | None = None) -> None:
        """Tell of a change: an event with a snapshot of the object as it is now, and its webhook."""
        settings, memory, call = self.settings, self.memory, self.call
        data: dict[str, Any] = {"object": record.body}
        if previous is not None:
            data["previous_attributes"] = previous
        id, created = memory.unused_id("evt", type, record.id), self.unix_seconds()
        event: dict[str, Any] = {
            "id": id,
            "object": "event",
            "api_version": API_VERSION,
            "created": created,
            "data": data,
            "livemode": False,
            "pending_webhooks": 1 if settings.webhook_url else 0,
            "request": {"id": call.request_id if call else None, "idempotency_key": call.key if call else None},
            "type": type,
        }
        payment = record.body.get("payment_intent") or record.id
        if record.account != PLATFORM_ACCOUNT:
            event["account"] = record.account
        memory.save_event(
            StoredObject(id, "event", record.account, created, {}, parent=payment, label=type), encode(event).decode()
        )
        if settings.webhook_url and (not settings.webhook_events or type in settings.webhook_events):
            about = (payment, *(record.body.get("metadata") or {}).values())
            self._plan_delivery(id, type, about)

    def _plan_delivery(self, event_id: str, type: str, about: tuple[str, ...]) -> None:
        settings, tally = self.settings, self.memory.tally
        tally("webhooks:sent")
        fault = self.faults.of_webhook(type, event_id, about)
        if fault is not None:
            tally(f"webhooks:{fault}")
        if fault != "lost" and self.delivering is not None:
            self.delivering.append(event_id)
        match fault:
            case "lost":
                return
            case "repeated":
                times = self.faults.repetitions(event_id)
                tally("webhooks:extra_deliveries", times - 1)
                for turn in range(times):
                    self.plan(turn * 0.15, "deliver", event_id)
            case "reordered":
                self.plan(settings.reorder_seconds, "deliver", event_id)
            case "delayed":
                self.plan(settings.delay_seconds, "deliver", event_id)
            case "forged":
                self.plan(0, "deliver_forged", event_id)
            case _:
                self.plan(0, "deliver", event_id)

    def take_pending_deliveries(self, about: str) -> list[ScheduledAction]:
        """The deliveries that are still to come about a payment, or about all of them if it is "", off the agenda."""
        held = [
            plan
            for plan in self.agenda
            if plan.what.startswith("deliver") and about in (self.memory.event(plan.subject)[1], "")
        ]
        self.agenda = [plan for plan in self.agenda if plan not in held]
        heapq.heapify(self.agenda)
        return held

    def commit(self) -> None:
        """Make everything since the last commit durable, then let what was planned begin."""
        self.memory.commit()
        if self._fresh:
            for plan in self._fresh:
                heapq.heappush(self.agenda, plan)
            self._fresh = []
            self.agenda_changed.set()

    def commit_soon(self) -> None:
        """Commit within a few milliseconds, together with what else happens until then.

        For what may be done once more after a kill, as deliveries may.
        """
        if not self._commit_is_near:
            self._commit_is_near = True
            get_running_loop().call_later(COMMIT_SOON_SECONDS, self._commit_now)

    def _commit_now(self) -> None:
        self._commit_is_near = False
        self.commit()

    def rollback(self) -> None:
        """Forget everything since the last commit."""
        self.memory.rollback()
        self._fresh = []
