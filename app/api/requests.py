"""A request to the API: its route, its caller and the services that endpoints use."""

from __future__ import annotations

from typing import NamedTuple, TypeVar

import msgspec

from app.api.versions import ANSWERED_VERSION, version_of
from app.api.waiting import WaitingRequests
from app.web.asgi import HttpResponse, Receive, Scope
from app.web.auth import Authenticator, Caller
from app.web.batching import BatchingConnections
from app.web.database import DatabasePool
from app.web.load_shedding import slow_down
from app.web.problems import Problem
from app.web.rate_limits.addresses import FailedAuthentications
from app.web.rate_limits.leases import KeyLease, PermitLeases
from app.web.replica import POSITION_HEADER, Replica
from app.web.requests import HttpRequest, struct_of
from app.web.routing import Route
from app.web.validation import read_query, violation_checker
from app.web.worker_scheduler import WorkerScheduler
from db.settings import TrustedProxies

T = TypeVar("T", bound=msgspec.Struct)

JSON_HEADERS = ((b"content-type", b"application/json"), ANSWERED_VERSION)
IDEMPOTENCY_REPLAYED = (b"idempotency-replayed", b"true")


def compact(document: str | bytes) -> bytes:
    """A JSON document without spaces between its tokens. PostgreSQL writes some."""
    return msgspec.json.format(document.encode() if isinstance(document, str) else document, indent=-1)


class NoQuery(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A query without parameters."""


class ApiServices(NamedTuple):
    """The services that endpoints use, one of each per process."""

    database: DatabasePool
    """For commands, denials and scheduling."""
    health: DatabasePool
    authenticator: Authenticator
    payment_batching: BatchingConnections
    payment_scheduler: WorkerScheduler
    command_scheduler: WorkerScheduler
    proxies: TrustedProxies
    waiting: WaitingRequests
    permits: PermitLeases
    failed_authentications: FailedAuthentications
    replica: Replica | None = None


class ApiRequest(HttpRequest):
    """A request to one of the API's routes."""

    __slots__ = ("_caller", "_lease", "version")

    services: ApiServices

    def __init__(self, route: Route, services: ApiServices, scope: Scope, receive: Receive) -> None:
        super().__init__(route, services, scope, receive)
        self._caller: Caller | None = None
        self._lease: KeyLease | None = None

    async def admit(self) -> None:
        """Find the caller, and take a permit of the key and its merchant. Raises Problem for a malformed key.

        An unknown key needs no permit: the route refuses it, unless its address has failed too often.
        """
        services = self.services
        address = self.address
        self._caller = caller = services.authenticator.read_caller(self.headers, address, self.request_id, self.route)
        if caller is None:
            services.failed_authentications.require_room(address)
            raise services.authenticator.refuse_malformed_key(self.headers)
        key_hash, request_id = caller.key_hash, self.request_id
        self._lease = services.permits.take(key_hash, request_id) or await services.permits.wait(key_hash, request_id)
        if self._lease is None:
            services.failed_authentications.require_room(address)

    def complete(self, response: HttpResponse) -> HttpResponse:
        """Add RateLimit-Policy and RateLimit. Note a failed authentication; slow a limited client down."""
        if self._lease is not None:
            response.headers = [*response.headers, *self._lease.fields()]
        if response.status == 401:
            self.services.failed_authentications.note(self.address)
        elif response.status == 429 and not self.is_forwarded():
            slow_down(self.receive)
        return response

    def caller(self) -> Caller:
        """The holder of the API key, which the database has not checked yet.

        Raises Problem for an unknown version of the API, and for a query on a route without parameters.
        """
        assert self._caller is not None
        if self.route.query is None and self.scope["query_string"]:
            read_query(self.scope["query_string"], NoQuery)
        self.version = version_of(self.headers)
        return self._caller

    async def merchant_query(self, caller: Caller, struct: type[T]) -> T:
        """The query as a struct. Raises Problem: unauthenticated first, then the rules that the query breaks."""
        assert struct is self.route.query
        try:
            return read_query(self.scope["query_string"], struct)
        except Problem:
            await caller.require_valid_key()
            raise

    async def operator_query(self, caller: Caller, struct: type[T]) -> T:
        """The query as a struct. Raises Problem: unauthenticated or forbidden first."""
        assert struct is self.route.query
        await caller.require_operator()
        return read_query(self.scope["query_string"], struct)

    async def operator_body(self, caller: Caller, struct: type[T], bytes_max: int) -> T:
        """The body as a struct. Raises Problem: unauthenticated or forbidden first, then the rules that it breaks."""
        assert struct is self.route.body
        await caller.require_operator()
        given = self.parse_json(await self.read_body(bytes_max))
        return struct_of(given, struct, violation_checker(struct)(given))

    async def position_headers(self) -> list[tuple[bytes, bytes]]:
        """The header Surety-Position of an answer to a write, if reads may use a replica."""
        replica = self.services.replica
        position = await replica.position_after_write() if replica is not None else None
        return [] if position is None else [(POSITION_HEADER, position.token)]

    def respond(self, body: str | bytes, status: int = 200) -> HttpResponse:
        """A JSON document, rendered already."""
        return HttpResponse(status, compact(body), self.request_id, JSON_HEADERS)
