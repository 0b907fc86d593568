"""A batch of deliveries to one endpoint: each is sent once, and its result is what the answer means.

What the answers mean:

    2xx                      delivered
    3xx                      failed: a redirect is not followed
    410                      failed, and the endpoint is disabled
    429, 502, 503, 504       failed; Retry-After slows the endpoint down
    any other, or no answer  failed, to be repeated after the delivery's own delay
"""

from __future__ import annotations

import asyncio
import logging
import ssl
import time
from collections.abc import Mapping
from contextlib import aclosing
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from importlib.metadata import version
from typing import Any
from urllib.parse import urlsplit

import msgspec
from msgspec import Struct

from db.settings import WebhookNetworks
from db.webhook_secrets import SealedSecret, Signer, WebhookKeys
from jobs.stripe.connections import NoAnswer, OutgoingRequest, RawResponse
from jobs.webhooks.addresses import AddressRefused
from jobs.webhooks.connections import EndpointConnections, Resolver

log = logging.getLogger("surety.webhooks")

DELIVERY_SECONDS_MAX = 15.0
ANSWER_BYTES_MAX = 1000
NO_KEY_PAUSE_SECONDS = 60.0
SLOW_DOWN = frozenset({429, 502, 503, 504})
USER_AGENT = f"Surety-Webhooks/{version('surety')}"

DeliveryResult = dict[str, Any]
"""As outbox.record_deliveries takes it."""


class DeliveryBatch(Struct):
    """A row of outbox.claim_deliveries; `is_lost` is set once another worker may have it."""

    endpoint_id: str
    fence: int
    event_ids: list[str]
    url: str
    payload: str
    api_version: str
    concurrency: int
    rate_max: int | None
    secrets: list[dict[str, Any]] | None
    is_full: bool
    is_lost: bool = False


class DeliverySender:
    """Sends batches; what all of them share."""

    def __init__(self, keys: WebhookKeys, allowed: WebhookNetworks, slots: int) -> None:
        self.keys = keys
        self.stopping = asyncio.Event()
        self._allowed = allowed
        self._slots = asyncio.Semaphore(slots)
        self._resolver = Resolver()
        self._tls = ssl.create_default_context()

    def close(self) -> None:
        """End the threads that look up names."""
        self._resolver.close()

    async def send_batch(self, batch: DeliveryBatch, documents: Mapping[str, bytes]) -> list[DeliveryResult]:
        """Send each event of a batch once; the results are those of outbox.record_deliveries."""
        sealed = msgspec.convert(batch.secrets or [], list[SealedSecret])
        signer = Signer(self.keys, sealed)
        if not signer.is_usable:
            log.error("nothing is sent to %s: SURETY_WEBHOOK_KEY does not open its secrets", batch.endpoint_id)
            return [released(batch, event_id, NO_KEY_PAUSE_SECONDS) for event_id in batch.event_ids]
        try:
            target = request_target(batch.url)
            connections = EndpointConnections(batch.url, self._tls, self._resolver, self._allowed)
        except ValueError as error:
            return [failed(batch, event_id, f"the address can't be used: {error}") for event_id in batch.event_ids]
        at_once = asyncio.Semaphore(batch.concurrency)
        first_at = asyncio.get_running_loop().time()

        async def send(place: int, event_id: str) -> DeliveryResult:
            if (document := documents.get(event_id)) is None:
                return result(batch, event_id, "skipped", error="the event's object is not shown any more")
            async with at_once:
                if batch.rate_max:
                    await self._pause(first_at + place / batch.rate_max - asyncio.get_running_loop().time())
                async with self._slots:
                    if self.stopping.is_set() or batch.is_lost:
                        return released(batch, event_id)
                    return await self._send(batch, event_id, target, document, signer, connections)

        async with aclosing(ClosedLater(connections)):
            return await asyncio.gather(*(send(place, event_id) for place, event_id in enumerate(batch.event_ids)))

    async def _pause(self, seconds: float) -> None:
        if seconds > 0 and not self.stopping.is_set():
            try:
                async with asyncio.timeout(seconds):
                    await self.stopping.wait()
            except TimeoutError:
                pass

    async def _send(
        self,
        batch: DeliveryBatch,
        event_id: str,
        target: str,
        document: bytes,
        signer: Signer,
        connections: EndpointConnections,
    ) -> DeliveryResult:
        headers = {
            "Content-Type": "application/json",
            "User-Agent": USER_AGENT,
            "Surety-Version": batch.api_version,
        } | signer.headers(event_id, int(time.time()), document)
        began = time.monotonic()
        try:
            async with asyncio.timeout(DELIVERY_SECONDS_MAX):
                answer = await connections.send(OutgoingRequest("POST", target, headers, document))
        except TimeoutError:
            return failed(batch, event_id, f"no answer within {DELIVERY_SECONDS_MAX:g} s", began)
        except NoAnswer as error:
            return failed(batch, event_id, describe_no_answer(error), began)
        except (ValueError, UnicodeError):
            return failed(batch, event_id, "the address can't be used", began)
        return result_of_answer(batch, event_id, answer, began)


class ClosedLater:
    """Closes connections when a block ends."""

    def __init__(self, connections: EndpointConnections) -> None:
        self._connections = connections

    async def aclose(self) -> None:
        """Close them."""
        await self._connections.close()


def request_target(url: str) -> str:
    """The path and query of an address. Raises ValueError."""
    parts = urlsplit(url)
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        raise ValueError("it has no host")
    return (parts.path or "/") + (f"?{parts.query}" if parts.query else "")


def result_of_answer(batch: DeliveryBatch, event_id: str, answer: RawResponse, began: float) -> DeliveryResult:
    """What an answer means."""
    if 200 <= answer.status < 300:
        return result(batch, event_id, "delivered", began, status=answer.status)
    error = "a redirect is not followed" if 300 <= answer.status < 400 else f"the answer was {answer.status}"
    text = answer.content[:ANSWER_BYTES_MAX].decode("utf-8", "replace").replace("\0", "\N{REPLACEMENT CHARACTER}")
    found = result(batch, event_id, "failed", began, status=answer.status, error=error)
    # A replacement character is longer than the byte that it replaces.
    found["answer"] = text.encode()[:ANSWER_BYTES_MAX].decode("utf-8", "ignore") or None
    if answer.status in SLOW_DOWN and (seconds := read_retry_after(answer.headers.get("retry-after"))) is not None:
        found["retry_after"] = seconds
    return found


def read_retry_after(text: str | None) -> float | None:
    """The seconds of a Retry-After: a number, or a date; None for any other text."""
    if text is None:
        return None
    if text.strip().isdecimal() and text.strip().isascii():
        return float(text.strip()[:9])
    try:
        at = parsedate_to_datetime(text)
    except ValueError:
        return None
    return max(0.0, ((at if at.tzinfo else at.replace(tzinfo=UTC)) - datetime.now(UTC)).total_seconds())


def describe_no_answer(error: NoAnswer) -> str:
    """Why there was no answer, in words for the merchant."""
    match error.__cause__:
        case AddressRefused() as refusal:
            return str(refusal)
        case ssl.SSLCertVerificationError() as refusal:
            return f"the certificate is not valid: {refusal.verify_message}"[:200]
        case OSError() as failure if type(failure).__name__ == "gaierror":
            return "the host's name can't be resolved"
        case _:
            return str(error)[:200]


def result(
    batch: DeliveryBatch,
    event_id: str,
    outcome: str,
    began: float | None = None,
    *,
    status: int | None = None,
    error: str | None = None,
) -> DeliveryResult:
    """The result of a delivery."""
    duration_ms = None if began is None else round((time.monotonic() - began) * 1000)
    return {
        "endpoint_id": batch.endpoint_id,
        "fence": batch.fence,
        "event_id": event_id,
        "outcome": outcome,
        "status": status,
        "error": error,
        "duration_ms": duration_ms,
    }


def failed(batch: DeliveryBatch, event_id: str, error: str, began: float | None = None) -> DeliveryResult:
    """The result of a delivery without an answer."""
    return result(batch, event_id, "failed", began, error=error)


def released(batch: DeliveryBatch, event_id: str, pause_seconds: float = 0.0) -> DeliveryResult:
    """The result of a delivery that was not begun."""
    return result(batch, event_id, "released") | {"pause_seconds": pause_seconds}
