"""Calls to Stripe, paced and bounded. No other module calls it. jobs/stripe/errors.py lists how a call can fail."""

from __future__ import annotations

import asyncio
import ssl
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Collection, Mapping
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Literal

import msgspec
import stripe
from msgspec import Struct

from db.settings import Settings
from jobs.database import WorkerDatabase
from jobs.stripe.connections import (
    CONNECT_SECONDS_MAX,
    ConnectionPool,
    NoAnswer,
    OutgoingRequest,
    RawResponse,
    RequestSender,
)
from jobs.stripe.egress_proxy import proxy_for
from jobs.stripe.errors import (
    Json,
    ObjectUnreadable,
    OutcomeUnknown,
    ProviderError,
    ProviderOutage,
    provider_error,
    senseless_answer,
)
from jobs.stripe.request_slots import RequestSlots

API_VERSION = "2026-10-28.endive"
STRIPE_URL = "https://api.stripe.com"
PROVIDER_CONNECTIONS_MAX = 32
PAGE_SIZE = 100
LIVE_REQUESTS_PER_SECOND = 80.0
TEST_REQUESTS_PER_SECOND = 20.0
PROBE_SECONDS = 5.0
# Time ranges of lists begin and end at multiples of so many seconds, so that many calls share a reading.
LIST_WINDOW_SECONDS = 300
LISTING_SHARED_SECONDS = 60.0
# The provider's clock and ours may differ by this much when an object is looked for by its creation time.
CLOCK_SKEW_SECONDS = 300
# A larger difference is a test database's clock.
CLOCK_AHEAD_SECONDS_MAX = 86_400.0

FoundKind = Literal["payment", "customer"]
"""Objects that are looked for by our id in their metadata, as that names them."""
LISTED_AT: dict[FoundKind, str] = {"payment": "/v1/payment_intents", "customer": "/v1/customers"}

OnCall = Callable[[str, ProviderError | None, bool], None]
"""Called after every call: its account, its error, whether it was a command."""


class ProviderResponse(Struct, frozen=True):
    """A response of Stripe's."""

    body: Json
    status: int
    request_id: str | None
    answered_at: datetime | None = None
    """The time by the provider's clock, if the response has a Date header."""


class ListPage(Struct, frozen=True):
    """A page of a list; answered_at is by the provider's clock."""

    rows: list[Json]
    answered_at: datetime | None


class ListedObjects(Struct, frozen=True):
    """The ids of objects by our ids in their metadata, and how far the provider's clock was ahead of the database's."""

    ids: dict[str, str]
    clock_ahead_seconds: float | None


class Listing(Struct, frozen=True):
    """A reading of a list, under way or done; `begun` is on the monotonic clock."""

    begun: float
    reading: asyncio.Task[ListedObjects]


class ResponseHeaders(dict[str, str]):
    """The headers of a response by lower-case names, beside its content as it arrived."""

    def __init__(self, response: RawResponse) -> None:
        super().__init__(response.headers)
        self.content = response.content


class StripeHttpClient(stripe.HTTPClient):
    """The SDK's HTTP client. `sender` has its connections to the server at `url`.

    The SDK would decode an object with the json module, in three to seven times msgspec's time. So it gets an empty
    one, and the object's text arrives beside the headers. Errors are few: the SDK decodes them itself.
    """

    name = "httptools"

    def __init__(self, url: str, sender: RequestSender) -> None:
        super().__init__()
        self.url = url
        self.sender = sender

    async def request_async(
        self, method: str, url: str, headers: Mapping[str, str], post_data: str | None = None
    ) -> tuple[bytes, int, ResponseHeaders]:
        """Send a request once. Raises APIConnectionError if there is no complete answer."""
        request = OutgoingRequest(method.upper(), url.removeprefix(self.url), headers, (post_data or "").encode())
        try:
            response = await self.sender.send(request)
        except NoAnswer as error:
            raise stripe.APIConnectionError(str(error)) from error  # type: ignore[no-untyped-call]
        content = b"{}" if 200 <= response.status < 300 else response.content
        return content, response.status, ResponseHeaders(response)


class StripeGateway:
    """Calls to Stripe, paced and bounded. It belongs to the event loop that opened it."""

    def __init__(self, http: StripeHttpClient, settings: Settings, database: WorkerDatabase) -> None:
        stripe.enable_telemetry = False
        self.http = http
        self._client = stripe.StripeClient(
            settings.provider.key.reveal(),
            base_addresses={"api": http.url},
            http_client=http,
            max_network_retries=0,
            stripe_version=API_VERSION,
        )
        self._database = database
        self._timeout_seconds = settings.surety_provider_timeout
        self._request_slots = RequestSlots(database, requests_per_second(settings))
        self._call_slots = asyncio.Semaphore(PROVIDER_CONNECTIONS_MAX)
        self.livemode = settings.provider.livemode
        self.has_restricted_key = settings.provider.key.reveal().startswith("rk_")
        self._listings: dict[tuple[FoundKind, str, int, int], Listing] = {}
        self.clock_ahead_seconds = 0.0
        """How far the provider's clock is ahead of the database's, as last measured by a poll; at most a day."""
        self.on_call: OnCall = lambda *_: None
        self.commands_in_flight: Counter[str] = Counter()
        """By account: the commands that have neither an answer nor failed."""

    async def create_intent(self, account: str, key: str, request: Json) -> ProviderResponse:
        """A new payment intent, unconfirmed."""
        return await self._send("post", "/v1/payment_intents", account, request, key=key)

    async def change_intent(
        self,
        account: str,
        key: str,
        intent_id: str,
        action: Literal["confirm", "capture", "cancel"],
        request: Json,
    ) -> ProviderResponse:
        """An intent after an attempt to charge it, after its capture (once, all or a part), or after its end."""
        return await self._send("post", f"/v1/payment_intents/{intent_id}/{action}", account, request, key=key)

    async def create_refund(self, account: str, key: str, request: Json) -> ProviderResponse:
        """A new refund."""
        return await self._send("post", "/v1/refunds", account, request, key=key)

    async def find_refund(self, account: str, intent_id: str, refund_id: str) -> ProviderResponse | None:
        """The refund of an intent whose metadata name one of ours."""
        async for page in self._pages("/v1/refunds", account, {"payment_intent": intent_id}, urgent=True):
            for refund in page.rows:
                if metadata_of(refund).get("surety_refund") == refund_id:
                    return ProviderResponse(refund, 200, None)
        return None

    async def create_customer(self, account: str, key: str, request: Json) -> ProviderResponse:
        """A new customer."""
        return await self._send("post", "/v1/customers", account, request, key=key)

    async def update_customer(self, account: str, key: str, customer_id: str, request: Json) -> ProviderResponse:
        """A customer after a change."""
        return await self._send("post", f"/v1/customers/{customer_id}", account, request, key=key)

    async def find_customer(
        self, account: str, customer_id: str, first_sent_at: datetime, last_sent_at: datetime, asked_at: float
    ) -> ProviderResponse | None:
        """The customer whose metadata name one of ours, among all created while it was sent."""
        found = await self._find("customer", account, customer_id, first_sent_at, last_sent_at, asked_at)
        if found is None:
            return None
        return await self._send("get", f"/v1/customers/{found}", account, {})

    async def detach_method(self, account: str, key: str, method_id: str) -> ProviderResponse:
        """A payment method that no customer can pay by any more."""
        return await self._send("post", f"/v1/payment_methods/{method_id}/detach", account, {}, key=key)

    async def fetch_intent_with_method(self, account: str, intent_id: str) -> ProviderResponse:
        """An intent as it is now, with its payment method."""
        expand = {"expand": ["payment_method"]}
        return await self._send("get", f"/v1/payment_intents/{intent_id}", account, expand, urgent=False)

    async def update_dispute(self, account: str, key: str, dispute_id: str, request: Json) -> ProviderResponse:
        """Evidence for a dispute."""
        return await self._send("post", f"/v1/disputes/{dispute_id}", account, request, key=key)

    async def fetch_intent(self, account: str, intent_id: str, *, urgent: bool = False) -> ProviderResponse:
        """An intent as it is now, with its charge and that charge's balance transaction."""
        expand = {"expand": ["latest_charge.balance_transaction"]}
        return await self._send("get", f"/v1/payment_intents/{intent_id}", account, expand, urgent=urgent)

    async def fetch(self, account: str, kind: str, object_id: str) -> ProviderResponse:
        """A refund, dispute, payout or fraud warning as it is now; `kind` as in Stripe's paths, `disputes`."""
        return await self._send("get", f"/v1/{kind}/{object_id}", account, {}, urgent=False)

    async def find_intent(
        self, account: str, payment_id: str, first_sent_at: datetime, last_sent_at: datetime, asked_at: float
    ) -> ProviderResponse | None:
        """The intent whose metadata name a payment, among all created while it was sent."""
        found = await self._find("payment", account, payment_id, first_sent_at, last_sent_at, asked_at)
        return None if found is None else await self.fetch_intent(account, found, urgent=True)

    async def _find(
        self,
        kind: FoundKind,
        account: str,
        our_id: str,
        first_sent_at: datetime,
        last_sent_at: datetime,
        asked_at: float,
    ) -> str | None:
        """The id of the object made for one of ours, among all created while it was sent. Stripe's search would lag.

        Calls of one time range share one reading of the list, if it began after `asked_at` (monotonic). If the answer
        shows that the clocks differ otherwise than assumed, the list is read again: the range was another one.
        """
        for _ in range(2):
            assumed = self.clock_ahead_seconds
            listing = self._listing(kind, account, first_sent_at, last_sent_at, asked_at)
            listed = await asyncio.shield(listing.reading)
            ahead = listed.clock_ahead_seconds
            if ahead is None or abs(ahead - assumed) < CLOCK_SKEW_SECONDS / 2 or abs(ahead) > CLOCK_AHEAD_SECONDS_MAX:
                break
            self.clock_ahead_seconds = ahead
        return listed.ids.get(our_id)

    def _listing(
        self, kind: FoundKind, account: str, first_sent_at: datetime, last_sent_at: datetime, asked_at: float
    ) -> Listing:
        early = min(0.0, self.clock_ahead_seconds) - CLOCK_SKEW_SECONDS
        late = max(0.0, self.clock_ahead_seconds) + CLOCK_SKEW_SECONDS
        first = int(first_sent_at.timestamp() + early) // LIST_WINDOW_SECONDS
        last = int(last_sent_at.timestamp() + late) // LIST_WINDOW_SECONDS + 1
        key = (kind, account, first, last)
        listing = self._listings.get(key)
        if listing is None or listing.begun < asked_at:
            begun = time.monotonic()
            listing = Listing(
                begun,
                asyncio.create_task(
                    self._list_created(kind, account, first * LIST_WINDOW_SECONDS, last * LIST_WINDOW_SECONDS)
                ),
            )
            kept = {one: known for one, known in self._listings.items() if known.begun > begun - LISTING_SHARED_SECONDS}
            self._listings = kept | {key: listing}
        return listing

    async def _list_created(self, kind: FoundKind, account: str, first: int, last: int) -> ListedObjects:
        """Our objects of a kind created in that time."""
        found: dict[str, str] = {}
        ahead: float | None = None
        clock: datetime = await self._database.value("select surety.read_clock()")
        asked = {"created": {"gte": first, "lte": last}}
        async for page in self._pages(LISTED_AT[kind], account, asked, urgent=True):
            if ahead is None and page.answered_at is not None:
                ahead = (page.answered_at - clock).total_seconds()
            for one in page.rows:
                our_id = metadata_of(one).get(f"surety_{kind}")
                if our_id is not None:
                    found.setdefault(our_id, one["id"])
        return ListedObjects(found, ahead)

    def balance_transactions(
        self, account: str, since: datetime, until: datetime | None = None
    ) -> AsyncGenerator[ListPage]:
        """The lines of an account's balance created in that time, in pages, each line with its source."""
        created = {"gte": int(since.timestamp())}
        if until is not None:
            created["lte"] = int(until.timestamp()) + 1
        asked = {"created": created, "expand": ["data.source"]}
        return self._pages("/v1/balance_transactions", account, asked, urgent=False)

    def payout_transactions(self, account: str, payout_id: str) -> AsyncGenerator[ListPage]:
        """The balance transactions that an automatic payout pays out, in pages, each with its source."""
        asked = {"payout": payout_id, "expand": ["data.source"]}
        return self._pages("/v1/balance_transactions", account, asked, urgent=False)

    def payouts(self, account: str, since: datetime) -> AsyncGenerator[ListPage]:
        """An account's payouts created since then, in pages."""
        return self._pages("/v1/payouts", account, {"created": {"gte": int(since.timestamp())}}, urgent=False)

    def events(self, account: str, since: datetime, types: Collection[str]) -> AsyncGenerator[ListPage]:
        """An account's events of these types, at most twenty, created since then and not more than 30 days ago."""
        asked = {"created": {"gte": int(since.timestamp())}, "types": list(types)}
        return self._pages("/v1/events", account, asked, urgent=False)

    async def probe(self, account: str) -> None:
        """Send a harmless request. Raises ProviderOutage if the provider is out."""
        options = {"stripe_version": API_VERSION, "max_network_retries": 0}
        if account:
            options["stripe_account"] = account
        # Needs no call slot: calls that hang may hold all of them. Needs no request slot: no calls are sent at present.
        await self._exchange("get", "/v1/balance", {}, options, min(PROBE_SECONDS, self._timeout_seconds))

    async def ask(self, account: str, method: Literal["get", "post"], path: str, request: Json) -> ProviderResponse:
        """Send a request without an effect, for a check (jobs/stripe/key_check.py)."""
        return await self._send(method, path, account, request, urgent=False)

    async def _pages(self, path: str, account: str, asked: Json, *, urgent: bool) -> AsyncGenerator[ListPage]:
        after: Json = {}
        while True:
            answer = await self._send("get", path, account, {**asked, "limit": PAGE_SIZE, **after}, urgent=urgent)
            page = answer.body.get("data")
            if not isinstance(page, list) or not all(
                isinstance(one, dict) and isinstance(one.get("id"), str) for one in page
            ):
                raise OutcomeUnknown(f"no list of objects from {path}", status=answer.status)
            yield ListPage(page, answer.answered_at)
            has_more = answer.body.get("has_more")
            if not isinstance(has_more, bool):
                raise ObjectUnreadable(f"a list from {path} has no has_more", status=answer.status)
            if not page or not has_more:
                return
            after = {"starting_after": page[-1]["id"]}

    async def _send(
        self, method: str, path: str, account: str, request: Json, *, key: str | None = None, urgent: bool = True
    ) -> ProviderResponse:
        """Send one request; return its answer or raise the error that describes its failure."""
        await self._request_slots.wait(account, urgent=urgent)
        options: Json = {"stripe_version": API_VERSION, "max_network_retries": 0}
        if key is not None:
            options["idempotency_key"] = key
        if account:
            options["stripe_account"] = account
        is_command = key is not None
        async with self._call_slots:
            self.commands_in_flight[account] += is_command
            try:
                answer = await self._exchange(method, path, request, options, self._timeout_seconds)
            except ProviderError as error:
                self.on_call(account, error, is_command)
                raise
            finally:
                self.commands_in_flight[account] -= is_command
        self.on_call(account, None, is_command)
        return answer

    async def _exchange(self, method: str, path: str, request: Json, options: Json, seconds: float) -> ProviderResponse:
        try:
            async with asyncio.timeout(seconds):
                reply = await self._client.raw_request_async(method, path, **request, **options)
        except TimeoutError:
            raise ProviderOutage(f"no answer within {seconds:g} s") from None
        except stripe.StripeError as error:
            # The SDK's own text may hold the whole answer, with its client secret.
            raise provider_error(error, writes=method == "post") from None
        headers = reply.headers
        assert isinstance(headers, ResponseHeaders)
        try:
            body = msgspec.json.decode(headers.content)
        except msgspec.DecodeError:
            raise senseless_answer(reply.code) from None
        if not isinstance(body, dict):
            raise ProviderOutage("an answer that is no object", status=reply.code)
        return ProviderResponse(body, reply.code, reply.request_id, date_of(headers))

    async def close(self) -> None:
        """End the reservations under way."""
        await self._request_slots.close()


def metadata_of(row: Json) -> Json:
    """The metadata of a listed object. Raises ObjectUnreadable without them: it may be the one that is looked for."""
    metadata = row.get("metadata")
    if not isinstance(metadata, dict):
        raise ObjectUnreadable(f"{row['id']} has no metadata")
    return metadata


def date_of(headers: Mapping[str, str]) -> datetime | None:
    """The time in a Date header; None without a readable one."""
    try:
        at = parsedate_to_datetime(headers["date"])
    except (KeyError, ValueError):
        return None
    return at if at.tzinfo else at.replace(tzinfo=UTC)


def requests_per_second(settings: Settings) -> float:
    """Requests per second and account; 0 means no limit. Stripe allows 100 live and 25 in its sandbox."""
    if settings.surety_provider_rate is not None:
        return settings.surety_provider_rate
    provider = settings.provider
    if provider.url is not None:
        return 0.0
    return LIVE_REQUESTS_PER_SECOND if provider.livemode else TEST_REQUESTS_PER_SECOND


@asynccontextmanager
async def open_stripe(settings: Settings, database: WorkerDatabase) -> AsyncGenerator[StripeGateway]:
    """The gateway of this event loop. Raises SettingsError for a wrong proxy, or without a key and a sandbox."""
    url = (settings.provider.url or STRIPE_URL).rstrip("/")
    tls = ssl.create_default_context(cafile=stripe.ca_bundle_path)
    connect_seconds = min(CONNECT_SECONDS_MAX, 0.8 * settings.surety_provider_timeout)
    connections = ConnectionPool(url, tls, connect_seconds, proxy_for(url))
    gateway = StripeGateway(StripeHttpClient(url, connections), settings, database)
    try:
        yield gateway
    finally:
        await gateway.close()
        await connections.close()
