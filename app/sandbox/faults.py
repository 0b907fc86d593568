"""Faults of requests and webhooks, drawn from a seed or ordered by name.

A request's fault follows from a hash of the seed, the operation, the idempotency key (else the path) and the number of
the attempt. So a run repeats exactly, whatever the interleaving. A webhook's fault follows from its event's id. An
order gives the next calls of an operation a fault by name.
"""

import random
from hashlib import blake2b
from typing import Literal, TypeVar, cast, get_args

import msgspec
from msgspec import Struct

RequestFault = Literal[
    "timeout_before",
    "timeout_after",
    "reset",
    "error_500_before",
    "error_500_after",
    "conflict_409",
    "rate_limit_429",
    "garbage_200",
    "slow",
    "webhook_first",
    "sparse_200",
    "refused_400",
    "reused_key_400",
]
WebhookFault = Literal["lost", "repeated", "reordered", "delayed", "forged", "sparse", "thin", "other_mode"]

F = TypeVar("F", bound=str)

REQUEST_FAULTS: tuple[RequestFault, ...] = get_args(RequestFault)
PASSING_FAULTS = REQUEST_FAULTS[:-2]
"""Faults after which the same request may succeed. The others end what the request was about."""
WEBHOOK_FAULTS: tuple[WebhookFault, ...] = get_args(WebhookFault)


class FaultProfile(Struct, kw_only=True, forbid_unknown_fields=True, frozen=True):
    """Probabilities. Request faults are per POST, webhook faults per event other than `….created`."""

    timeout_before: float = 0.0
    """No answer, and the request has no effect."""
    timeout_after: float = 0.0
    """No answer, but the request takes effect."""
    reset: float = 0.0
    """The request takes effect; the connection breaks in the middle of the answer."""
    error_500_before: float = 0.0
    """500, stored under the key, without an effect."""
    error_500_after: float = 0.0
    """500, stored under the key, although the request takes effect."""
    conflict_409: float = 0.0
    """409 as if the same key were in use. The request has no effect; no answer is stored."""
    rate_limit_429: float = 0.0
    """429 with Retry-After. The request has no effect; no answer is stored."""
    garbage_200: float = 0.0
    """The request takes effect; the answer is 200 with a body that isn't JSON."""
    slow: float = 0.0
    """The request takes effect late; its key is in use until then."""
    webhook_first: float = 0.0
    """The request takes effect; its webhooks are delivered before the answer. A GET delivers held ones."""
    sparse_200: float = 0.0
    """The request takes effect; the answer lacks fields that Stripe may leave out or send as null."""
    refused_400: float = 0.0
    """400 with a message only: no code, no parameter. The request has no effect; no answer is stored."""
    reused_key_400: float = 0.0
    """400 as if the key had been used with other parameters. The request has no effect; no answer is stored."""
    reads: float = 0.0
    """Factor on these probabilities for GETs."""
    lost: float = 0.0
    """Never delivered, never retried."""
    repeated: float = 0.0
    """Delivered 2 to 10 times."""
    reordered: float = 0.0
    """Held until later webhooks of its payment have overtaken it."""
    delayed: float = 0.0
    forged: float = 0.0
    """Delivered with a wrong signature first, then with the right one."""
    sparse: float = 0.0
    """Delivered without fields that Stripe may leave out or send as null."""
    thin: float = 0.0
    """Delivered as a thin event, which names the object instead of showing it."""
    other_mode: float = 0.0
    """Delivered together with an event of the other mode."""
    payer_declines: float = 0.0
    """The payer fails 3-D Secure."""


NO_FAULTS = FaultProfile()

DEMO_FAULTS = FaultProfile(
    timeout_before=0.015,
    timeout_after=0.015,
    reset=0.002,
    error_500_before=0.002,
    error_500_after=0.002,
    conflict_409=0.002,
    rate_limit_429=0.004,
    garbage_200=0.002,
    slow=0.01,
    webhook_first=0.02,
    sparse_200=0.01,
    lost=0.008,
    repeated=0.027,
    reordered=0.017,
    delayed=0.01,
    forged=0.002,
    sparse=0.01,
    thin=0.005,
    other_mode=0.003,
    payer_declines=0.15,
)
"""On 500 payments about 30 timeouts (half of them after the effect), 40 repeated, 25 reordered, 12 lost webhooks."""

PROFILES = {"none": NO_FAULTS, "demo": DEMO_FAULTS}


class OrderedFault(Struct, forbid_unknown_fields=True):
    """The next `times` calls of an operation get this fault; a webhook's operation is `webhook:<event type>`."""

    operation: str
    fault: str
    times: int = 1
    match: str = ""
    """Only requests whose idempotency key or path contains it; for webhooks, the event's id, the payment's, or a value
    of the object's metadata."""

    def __post_init__(self) -> None:
        known: tuple[str, ...] = WEBHOOK_FAULTS if self.operation.startswith("webhook") else REQUEST_FAULTS
        if self.fault not in known:
            raise ValueError(f"{self.fault!r} is no fault of {self.operation!r}; these are: {', '.join(known)}")


class FaultInjector:
    def __init__(self, seed: int, profile: FaultProfile = NO_FAULTS) -> None:
        self.seed = seed
        self.profile = profile
        self.orders: list[OrderedFault] = []
        self._attempts: dict[tuple[str, str], int] = {}
        self._streams: dict[tuple[object, ...], int] = {}

    def of_request(self, operation: str, identity: str, *, writes: bool) -> RequestFault | None:
        """The fault of this call, if any; each call counts as an attempt."""
        ordered = self._ordered(operation, identity)
        if ordered is not None:
            return cast(RequestFault, ordered)
        share = 1.0 if writes else self.profile.reads
        if self.profile is NO_FAULTS or not share:
            return None
        attempt = self._attempts.get((operation, identity), 0) + 1
        self._attempts[operation, identity] = attempt
        return self._draw(REQUEST_FAULTS, share, operation, identity, attempt)

    def of_webhook(self, type: str, event_id: str, about: tuple[str, ...] = ()) -> WebhookFault | None:
        """The fault of this event's delivery, if any. An ordered fault matches the event's id or `about`."""
        ordered = self._ordered(f"webhook:{type}", " ".join((event_id, *about)))
        if ordered is not None:
            return cast(WebhookFault, ordered)
        if self.profile is NO_FAULTS or type.endswith(".created"):
            return None
        return self._draw(WEBHOOK_FAULTS, 1.0, "webhook", event_id)

    def repetitions(self, event_id: str) -> int:
        """Deliveries of a repeated webhook: 2 to 10 when drawn, 10 when only ordered."""
        return 10 if self.profile is NO_FAULTS else 2 + int(self.chance("repetitions", event_id) * 9)

    def payer_declines(self, intent_id: str) -> bool:
        return self.chance("payer", intent_id) < self.profile.payer_declines

    def chance(self, *identity: object) -> float:
        """A number in [0, 1) derived from the seed and the identity."""
        text = ":".join(map(str, (self.seed, *identity)))
        return int.from_bytes(blake2b(text.encode(), digest_size=8).digest()) / 2**64

    def stream(self, *identity: object) -> random.Random:
        """Random numbers derived from the seed, the identity, and how often it was asked for."""
        self._streams[identity] = number = self._streams.get(identity, 0) + 1
        return random.Random(":".join(map(str, (self.seed, *identity, number))))

    def _draw(self, faults: tuple[F, ...], share: float, *identity: object) -> F | None:
        left = self.chance(*identity)
        for fault in faults:
            left -= getattr(self.profile, fault) * share
            if left < 0:
                return fault
        return None

    def _ordered(self, operation: str, identity: str) -> str | None:
        for order in self.orders:
            if order.operation in (operation, operation.partition(":")[0]) and order.match in identity:
                order.times -= 1
                if order.times <= 0:
                    self.orders.remove(order)
                return order.fault
        return None


class FaultSettings(Struct, forbid_unknown_fields=True):
    """The body of `POST /sandbox/faults`; an absent field changes nothing."""

    profile: Literal["none", "demo"] | FaultProfile | msgspec.UnsetType = msgspec.UNSET
    next: list[OrderedFault] | msgspec.UnsetType = msgspec.UNSET
    hang_seconds: float | msgspec.UnsetType = msgspec.UNSET
    slow_seconds: float | msgspec.UnsetType = msgspec.UNSET
