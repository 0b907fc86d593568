"""The sandbox's settings. Times are seconds; by default most are far shorter than Stripe's."""

from msgspec import Struct

API_VERSION = "2026-10-28.endive"
PLATFORM_ACCOUNT = "acct_1SuretyPlatform"
"""The account that a request without `Stripe-Account` belongs to."""

WEBHOOK_SECRET = "whsec_sandbox"  # not a secret: it signs only the sandbox's webhooks
"""The default secret for webhooks."""


class SandboxSettings(Struct, kw_only=True, forbid_unknown_fields=True):
    """The settings of one sandbox."""

    seed: int = 1
    """Ids and drawn faults follow from it and from the identity of a request."""
    livemode: bool = False
    """The `livemode` of every object and event; keys of the other mode are refused."""
    webhook_url: str | None = None
    """Where events are delivered, `http://host:port/path`; None: they can only be listed."""
    webhook_secret: str = WEBHOOK_SECRET
    webhook_events: tuple[str, ...] = ()
    """Event types to deliver; empty: all."""
    webhook_connections: int = 16
    webhook_timeout_seconds: float = 10.0
    webhook_retry_seconds: float = 0.5
    """Delay before the second delivery; doubles with each further one, up to 16 s."""
    webhook_attempts_max: int = 14
    reorder_seconds: float = 0.6
    """How long a reordered webhook is held, so that later ones of its payment overtake it."""
    delay_seconds: float = 1.5
    """How long a delayed webhook is held."""
    hang_seconds: float = 25.0
    """How long a request without an answer hangs before its connection is reset."""
    slow_seconds: float = 0.5
    transaction_seconds: float = 0.2
    """From a charge under `automatic_async` to its balance transaction."""
    available_seconds: float = 1.0
    """From a balance transaction to the time when its amount is available."""
    processing_seconds: float = 0.0
    """How long a confirmed intent stays `processing`; 0: it succeeds in the answer, as cards do at Stripe."""
    payout_seconds: float = 5.0
    """Between two automatic payouts of an account; 0: none."""
    payout_arrival_seconds: float = 1.0
    auto_payer: bool = False
    """Whether 3-D Secure is completed automatically."""
    payer_seconds: float = 0.3
    settlement_currency: str | None = None
    """The currency that every charge is converted to; None: each settles in its own."""
    key_seconds: float = 24 * 3600.0
    """How long an idempotency key is remembered."""
    hold_seconds: float = 7 * 86400.0
    """How long an uncaptured authorization lives."""
    event_seconds: float = 30 * 86400.0
    """How long events can be read."""
    refund_seconds: float = 1.0
    """From a refund's creation to its reference, its success or its late failure."""
    dispute_seconds: float = 0.5
    """From a charge with a disputing card to its dispute."""
    decision_seconds: float = 0.5
    """From submitted evidence to the bank's decision."""
    response_seconds: float = 8 * 86400.0
    """How long a dispute waits for evidence before it is lost."""
    inquiry_seconds: float = 120 * 86400.0
    """How long an inquiry stays open."""
    public_url: str = ""
    """The address of the 3-D Secure pages; by default that of the listening socket."""
