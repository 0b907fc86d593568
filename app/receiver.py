"""The receiver of webhooks: the signature is verified on the raw bytes, the event stored once and queued, nothing else.

Answered within one batch's time by the lanes. What is answered with anything but 2xx comes again, so a batch that fails
is a 503. Whether API version, mode and account are ours is judged when the event is applied.
"""

from __future__ import annotations

import hmac
import logging
import re
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from typing import Annotated, Any

import msgspec
import psycopg
from litestar import Litestar, Request, get, post
from litestar.types import ASGIApp, Receive, Scope, Send
from msgspec import Meta, Struct
from psycopg.types.json import Jsonb

from app.api.schemas import Health
from app.web.asgi import BodyTooLarge, ClientDisconnected, HttpResponse, new_request_id, read_body
from app.web.batching import BatchingConnections, RefusedByDatabase, Unavailable, WorkerScheduler
from app.web.database import DatabasePool
from app.web.frame import AsgiApplication, problem_response, set_request_id, with_head
from app.web.problems import Problem, overloaded
from app.web.throttle import PerSecondThrottle
from db.connect import connect_async
from db.redaction import without_secrets
from db.settings import Settings, load_settings

log = logging.getLogger("surety.webhooks")

RECEIVE_WEBHOOKS = b"select n, is_new from surety.receive_webhooks(%s)"
BODY_BYTES_MAX = 256 * 1024
BATCH_MAX = 100
CLOCK_SECONDS_MAX = 300
REJECTIONS_PER_SECOND_MAX = 10
RELEVANT_HEADERS = frozenset({b"stripe-signature", b"content-type", b"user-agent"})
HEADER_CHARACTERS_MAX = 2000
JSON_CONTENT_TYPE = (b"content-type", b"application/json")

# What a secret looks like where it can't be told by its key, in what is no JSON.
SECRET_PATTERN = re.compile(rb"(_secret_)[0-9A-Za-z]+")

Visible = Annotated[str, Meta(pattern=r"^[!-~]{1,255}$(?!\n)")]


class StripeEvent(Struct):
    """What the receiver needs of an event; `apply` reads the rest."""

    id: Visible
    type: Visible
    livemode: bool
    account: Visible | None = None


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
    """The webhook is not what it claims to be, and the text says why."""


decode_event = msgspec.json.Decoder(StripeEvent).decode


def verify_signature(body: bytes, signature: bytes, secrets: Sequence[bytes], now: float) -> None:
    """Raises InvalidWebhook unless one of the active secrets has signed these very bytes not long ago.

    The header is `t=SECONDS,v1=HEX[,v1=HEX…]`, the signed text SECONDS.BODY (Stripe, "Verify webhook signatures").
    """
    fields = [field.partition(b"=") for field in signature.split(b",")[:32]]
    times = [value for name, _, value in fields if name.strip() == b"t"]
    if len(times) != 1 or not times[0].isdigit() or len(times[0]) > 12:
        raise InvalidWebhook("no signature")
    given = [value for name, _, value in fields if name.strip() == b"v1"]
    expected = [hmac.digest(secret, times[0] + b"." + body, "sha256").hex().encode() for secret in secrets]
    if not any(hmac.compare_digest(one, other) for one in expected for other in given):
        raise InvalidWebhook("the signature does not hold")
    if abs(now - int(times[0])) > CLOCK_SECONDS_MAX:
        raise InvalidWebhook(f"signed {int(now) - int(times[0])} s ago")


class Receiver:
    """Receives Stripe's webhooks. An ASGI application."""

    def __init__(
        self,
        secrets: Sequence[bytes],
        database: DatabasePool,
        batching: BatchingConnections,
        worker_scheduler: WorkerScheduler,
    ) -> None:
        self._secrets = secrets
        self._database = database
        self._batching = batching
        self._worker_scheduler = worker_scheduler
        self.rejection_throttle = PerSecondThrottle(REJECTIONS_PER_SECOND_MAX)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request_id = new_request_id()
        try:
            answer = await self._receive(scope, receive, request_id)
        except ClientDisconnected:
            return
        except Problem as problem:
            answer = problem.response(request_id)
        except (Unavailable, RefusedByDatabase):
            answer = overloaded().response(request_id)
        await answer(scope, receive, send)

    async def _receive(self, scope: Scope, receive: Receive, request_id: str) -> HttpResponse:
        headers: dict[bytes, bytes] = dict(scope["headers"])
        client = scope.get("client")
        address = client[0] if client else ""
        kept = {
            name.decode(): headers[name].decode("latin-1")[:HEADER_CHARACTERS_MAX]
            for name in RELEVANT_HEADERS & headers.keys()
        }
        try:
            body = await read_body(receive, BODY_BYTES_MAX)
        except BodyTooLarge:
            raise Problem("too-large", f"the body has more than {BODY_BYTES_MAX} bytes", limit=BODY_BYTES_MAX) from None
        try:
            verify_signature(body, headers.get(b"stripe-signature", b""), self._secrets, time.time())
            event, text = parse_event(body)
        except InvalidWebhook as rejected:
            await self._store_rejected(str(rejected), kept, body, address, request_id)
            raise Problem("invalid-request", str(rejected)) from None
        row = await self._batching.submit(
            WebhookRequest(
                n=0,
                request_id=request_id,
                provider="stripe",
                account=event.account or "",
                livemode=event.livemode,
                event_id=event.id,
                type=event.type,
                headers=kept,
                body=text,
                address=address,
            )
        )
        if row[1]:
            self._worker_scheduler.schedule()
        return HttpResponse(200, b'{"received":true}', request_id, [JSON_CONTENT_TYPE])

    async def _store_rejected(
        self, reason: str, headers: dict[str, str], body: bytes, address: str, request_id: str
    ) -> None:
        if not self.rejection_throttle.allows():
            log.warning(
                "%s rejected: %s; %s were not kept so far", request_id, reason, self.rejection_throttle.suppressed
            )
            return
        log.warning("%s rejected: %s", request_id, reason)
        try:
            await self._database.fetch_row(
                "select surety.reject_webhook('stripe', %s, %s, %s, %s)",
                reason,
                Jsonb(headers),
                SECRET_PATTERN.sub(rb"\1", without_secrets(body)),
                address,
            )
        except (psycopg.Error, Unavailable):
            log.exception("%s: the evidence could not be kept", request_id)


def parse_event(body: bytes) -> tuple[StripeEvent, str]:
    """The event and its text, without client secrets. Raises InvalidWebhook."""
    try:
        return decode_event(body), without_secrets(body).decode()
    except (ValueError, RecursionError):
        raise InvalidWebhook("signed, but no event") from None


def hand_over_to_receiver(app: ASGIApp) -> ASGIApp:
    """Answers before Litestar's machinery begins."""

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        await scope["litestar_app"].state.receiver(scope, receive, send)

    return answer


@post("/stripe", middleware=[hand_over_to_receiver])
async def receive_stripe() -> None:
    """Receive a webhook of Stripe's."""
    raise AssertionError("hand_over_to_receiver has answered")


@get("/health")
async def get_receiver_health(request: Request[Any, Any, Any]) -> Health:
    """Tell whether this process can receive webhooks."""
    await request.app.state.database.fetch_row("select 1")
    return Health("ok")


def create_app(settings: Settings | None = None, *, connections: int = 2) -> AsgiApplication:
    """The receiver as an ASGI application. Raises SettingsError without STRIPE_WEBHOOK_SECRET."""
    settings = settings or load_settings()
    secrets = [secret.reveal().encode() for secret in settings.webhook_secrets]

    @asynccontextmanager
    async def lifespan(app: Litestar) -> AsyncGenerator[None]:
        database = DatabasePool("webhook", settings)
        batching = BatchingConnections(
            lambda: connect_async("webhook", settings), RECEIVE_WEBHOOKS, connections=connections, batch_max=BATCH_MAX
        )
        # What can't be closed keeps nothing else open.
        async with AsyncExitStack() as closing:
            closing.push_async_callback(database.close)
            await database.open()
            worker_scheduler = WorkerScheduler(
                partial(database.fetch_row, "select outbox.schedule_handlers('{apply}')")
            )
            closing.push_async_callback(worker_scheduler.close)
            closing.push_async_callback(batching.close)
            await batching.open()
            app.state.database = database
            app.state.receiver = Receiver(secrets, database, batching, worker_scheduler)
            yield

    return with_head(
        Litestar(
            [receive_stripe, get_receiver_health],
            lifespan=[lifespan],
            openapi_config=None,
            exception_handlers={Exception: problem_response},
            after_request=set_request_id,
            logging_config=None,
        ),
        {("POST", "/stripe"): "receiver"},
    )
