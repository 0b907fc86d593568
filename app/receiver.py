"""The receiver of webhooks: the signature is verified on the raw bytes, the event is stored once and queued.

Batching connections store webhooks, one commit for each batch. Stripe repeats a webhook unless the answer is 2xx, so a
batch that fails is a 503. Whether API version, mode and account are ours is checked when the event is applied.
"""

from __future__ import annotations

import hmac
import logging
import re
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from typing import Annotated, NamedTuple

import msgspec
import psycopg
from msgspec import Meta, Struct
from psycopg.types.json import Jsonb

from app.web.asgi import HttpResponse
from app.web.batching import BatchingConnections, RefusedByDatabase, Unavailable
from app.web.database import DatabasePool
from app.web.problems import RuleViolation, invalid_request, overloaded
from app.web.refusals import RefusalCounter
from app.web.requests import HttpRequest
from app.web.routing import HttpApplication, Route
from app.web.throttle import PerSecondThrottle
from app.web.worker_scheduler import WorkerScheduler
from db.connect import connect_async
from db.errors import error_text
from db.redaction import without_secrets
from db.settings import Settings, TrustedProxies, load_settings

log = logging.getLogger("surety.webhooks")

RECEIVE_WEBHOOKS = b"select n, is_new from surety.receive_webhooks(%s)"
# Real events are far smaller; 413 makes Stripe repeat an event and then disable the endpoint.
BODY_BYTES_MAX = 4 * 1024 * 1024
# Of a rejected webhook: the part that is searched for secrets and sent to the database, which keeps half of it.
REJECTED_BODY_BYTES_MAX = 8192
BATCH_MAX = 100
# The provider waits for seconds, so webhooks wait a little for others: a batch of sixteen costs half as much for each.
GATHER_SECONDS = 0.005
CLOCK_SECONDS_MAX = 300
REJECTIONS_PER_SECOND_MAX = 10
RELEVANT_HEADERS = frozenset({b"stripe-signature", b"content-type", b"user-agent"})
HEADER_CHARACTERS_MAX = 2000
JSON_CONTENT_TYPE = (b"content-type", b"application/json")

# A client secret in a body that isn't JSON, so that its key can't be found.
SECRET_PATTERN = re.compile(rb"(_secret_)[0-9A-Za-z]+")

Visible = Annotated[str, Meta(pattern=r"^[!-~]{1,255}$(?!\n)")]


class StripeEvent(Struct):
    """The fields of an event that the receiver needs; `apply_webhooks` reads the rest."""

    id: Visible
    type: Visible
    livemode: bool
    account: Visible | None = None
    context: Visible | None = None
    """The account of a thin event (`v2.core.event`), as the last part of a path: `acct_…`."""

    @property
    def stripe_account(self) -> str:
        """The connected account; empty for the platform's own."""
        last = (self.context or "").rpartition("/")[2]
        return self.account or (last if last.startswith("acct_") else "")


class WebhookRequest(Struct):
    """A webhook as surety.receive_webhooks takes it."""

    n: int
    request_id: str
    provider: str
    account: str
    livemode: bool
    event_id: str
    type: str
    headers: dict[str, str]
    body: str
    address: str


class InvalidWebhook(Exception):
    """The webhook is not authentic or not readable; the text says why, `reason` is what audit.refusals counts."""

    def __init__(self, reason: str, text: str) -> None:
        super().__init__(text)
        self.reason = reason


decode_event = msgspec.json.Decoder(StripeEvent).decode


def verify_signature(body: bytes, signature: bytes, secrets: Sequence[bytes], now: float) -> None:
    """Raises InvalidWebhook unless one of the active secrets signed exactly these bytes recently.

    The header is `t=SECONDS,v1=HEX[,v1=HEX…]`, the signed text SECONDS.BODY (Stripe, "Verify webhook signatures").
    """
    fields = [field.partition(b"=") for field in signature.split(b",")[:32]]
    times = [value for name, _, value in fields if name.strip() == b"t"]
    if len(times) != 1 or not times[0].isdigit() or len(times[0]) > 12:
        raise InvalidWebhook("no-signature", "no signature")
    given = [value for name, _, value in fields if name.strip() == b"v1"]
    expected = [hmac.digest(secret, times[0] + b"." + body, "sha256").hex().encode() for secret in secrets]
    if not any(hmac.compare_digest(one, other) for one in expected for other in given):
        raise InvalidWebhook("wrong-signature", "the signature does not hold")
    age = int(now) - int(times[0])
    if abs(now - int(times[0])) > CLOCK_SECONDS_MAX:
        raise InvalidWebhook("old-signature", f"signed {age} s ago" if age > 0 else f"signed in {-age} s by our clock")


class ReceiverServices(NamedTuple):
    """The services that the receiver's endpoints use, one of each per process."""

    secrets: Sequence[bytes]
    database: DatabasePool
    batching: BatchingConnections
    scheduler: WorkerScheduler
    rejection_throttle: PerSecondThrottle
    refusals: RefusalCounter
    proxies: TrustedProxies


class ReceiverRequest(HttpRequest):
    """A request to one of the receiver's routes."""

    __slots__ = ()

    services: ReceiverServices


async def receive_stripe(request: ReceiverRequest) -> HttpResponse:
    """Verify and store a webhook of Stripe's. Raises Problem; anything but 2xx makes Stripe send it again."""
    services = request.services
    kept_headers = {
        name.decode(): request.headers[name].decode("latin-1")[:HEADER_CHARACTERS_MAX]
        for name in RELEVANT_HEADERS & request.headers.keys()
    }
    body = await request.read_body(BODY_BYTES_MAX)
    try:
        verify_signature(body, request.headers.get(b"stripe-signature", b""), services.secrets, time.time())
        event, text = parse_event(body)
    except InvalidWebhook as invalid:
        await store_rejected(request, invalid, kept_headers, body)
        at, place = ("", "body") if invalid.reason == "no-event" else ("Stripe-Signature", "header")
        raise invalid_request([RuleViolation(at, invalid.reason, str(invalid), place=place)]) from None
    try:
        row = await services.batching.submit(
            WebhookRequest(
                n=0,
                request_id=request.request_id,
                provider="stripe",
                account=event.stripe_account,
                livemode=event.livemode,
                event_id=event.id,
                type=event.type,
                headers=kept_headers,
                body=text,
                address=request.address,
            )
        )
    except RefusedByDatabase:
        raise overloaded() from None
    if row[1]:
        services.scheduler.schedule()
    return HttpResponse(200, b'{"received":true}', request.request_id, [JSON_CONTENT_TYPE])


async def store_rejected(
    request: ReceiverRequest, invalid: InvalidWebhook, headers: dict[str, str], body: bytes
) -> None:
    """Count a rejected webhook; keep and log it as evidence, up to so many in a second and in an hour."""
    if not request.services.rejection_throttle.allows():
        request.services.refusals.add(invalid.reason)
        return
    try:
        row = await request.services.database.fetch_row(
            "select surety.store_rejected_webhook('stripe', %s, %s, %s, %s, %s, %s)",
            invalid.reason,
            str(invalid),
            Jsonb(headers),
            SECRET_PATTERN.sub(rb"\1", without_secrets(body[:REJECTED_BODY_BYTES_MAX])),
            request.address,
            len(body),
        )
    except (psycopg.Error, Unavailable) as error:
        request.services.refusals.add(invalid.reason)
        log.warning("%s rejected: %s; it could not be kept: %s", request.request_id, invalid, error_text(error))
    else:
        if row and row[0]:
            log.warning("%s rejected: %s", request.request_id, invalid)


def parse_event(body: bytes) -> tuple[StripeEvent, str]:
    """The event and its text, without client secrets. Raises InvalidWebhook."""
    try:
        return decode_event(body), without_secrets(body).decode()
    except (ValueError, RecursionError):
        raise InvalidWebhook("no-event", "signed, but no event") from None


async def get_receiver_health(request: ReceiverRequest) -> HttpResponse:
    """Report whether this process can receive webhooks, by a query to its database."""
    await request.services.database.fetch_row("select 1")
    return HttpResponse(200, b'{"status":"ok"}', request.request_id, [JSON_CONTENT_TYPE])


ROUTES = [
    Route("POST", "/stripe", receive_stripe, is_fast=True),
    Route("GET", "/health", get_receiver_health),
]


def create_app(settings: Settings | None = None, *, connections: int = 2) -> HttpApplication:
    """The receiver as an ASGI application. Raises SettingsError without STRIPE_WEBHOOK_SECRET."""
    settings = settings or load_settings()
    secrets = [secret.reveal().encode() for secret in settings.webhook_secrets]
    return HttpApplication(ROUTES, ReceiverRequest, partial(open_receiver_services, settings, secrets, connections))


@asynccontextmanager
async def open_receiver_services(
    settings: Settings, secrets: Sequence[bytes], connections: int
) -> AsyncGenerator[ReceiverServices]:
    """The services, open. Each is closed even if another one's closing fails."""
    database = DatabasePool("webhook", settings)
    batching = BatchingConnections(
        lambda: connect_async("webhook", settings),
        RECEIVE_WEBHOOKS,
        connections=connections,
        gather_seconds=GATHER_SECONDS,
        batch_max=BATCH_MAX,
    )
    async with AsyncExitStack() as closing:
        closing.push_async_callback(database.close)
        await database.open()
        refusals = RefusalCounter("webhook", database)
        closing.push_async_callback(refusals.close)
        scheduler = WorkerScheduler(partial(database.fetch_row, "select outbox.schedule_handlers('{apply_webhooks}')"))
        closing.push_async_callback(scheduler.close)
        closing.push_async_callback(batching.close)
        await batching.open()
        throttle = PerSecondThrottle(REJECTIONS_PER_SECOND_MAX)
        yield ReceiverServices(secrets, database, batching, scheduler, throttle, refusals, settings.trusted_proxies)
