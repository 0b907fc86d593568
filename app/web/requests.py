"""A request as endpoints see it: headers, bodies within bounds, JSON, the Idempotency-Key."""

from __future__ import annotations

import hashlib
import re
from typing import Any, TypeVar

import msgspec

from app.web.asgi import ClientDisconnected, HttpResponse, Message, Receive, Scope, new_request_id
from app.web.client_address import client_address
from app.web.problems import Problem, RuleViolation, invalid_request
from app.web.routing import Route
from app.web.validation import parse
from db.settings import parse_address

T = TypeVar("T")

IDEMPOTENCY_KEY = re.compile(rb"[ -~]{1,255}")
# Version 00 ends with the flags; later versions may go on behind them. Ids of zeros and version ff are invalid.
TRACEPARENT = re.compile(
    rb"(?!ff)[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(?P<more>-.*)?", re.DOTALL
)
TRACEPARENT_LENGTH = 55

encode_canonically = msgspec.json.Encoder(order="deterministic").encode


class HttpRequest:
    """One request to a route, and the services that its endpoint uses, among them the trusted `proxies`.

    Its body is read once, by `read_body`.
    """

    __slots__ = ("headers", "receive", "request_id", "route", "scope", "services")

    def __init__(self, route: Route, services: Any, scope: Scope, receive: Receive) -> None:
        self.route = route
        self.services = services
        self.scope = scope
        self.receive = receive
        self.headers: dict[bytes, bytes] = dict(scope["headers"])
        self.request_id = new_request_id()

    async def admit(self) -> None:
        """Called before the endpoint of a route that is not public. Raises Problem to refuse the request."""

    def complete(self, response: HttpResponse) -> HttpResponse:
        """Called with each response of a route, a refusal as well; returns the one to send."""
        return response

    @property
    def address(self) -> str:
        """The client's address, past trusted proxies; empty if the server knows none."""
        peer = self.scope.get("client")
        return client_address(peer[0], self.scope["headers"], self.services.proxies) if peer else ""

    def is_forwarded(self) -> bool:
        """Whether the connection is a trusted proxy's, which other clients use as well."""
        peer = self.scope.get("client")
        proxies = self.services.proxies
        return peer is not None and bool(proxies.networks) and proxies.trusts(parse_address(peer[0]))

    def path_parameter(self, name: str | None = None) -> str:
        """The parameter of the path with this name, or the only one."""
        if name is not None:
            return str(self.scope["path_params"][name])
        (value,) = self.scope["path_params"].values()
        return str(value)

    def traceparent(self) -> str | None:
        """The trace context that the client sends, as its first version writes it; None if it is absent or invalid."""
        given = self.headers.get(b"traceparent")
        if given is None or not (valid := TRACEPARENT.fullmatch(given)) or (valid["more"] and given[:2] == b"00"):
            return None
        return "00" + given[2:TRACEPARENT_LENGTH].decode()

    def is_json(self) -> bool:
        """Whether the Content-Type is JSON, whatever its parameters."""
        given = self.headers.get(b"content-type", b"")
        return given == b"application/json" or given.partition(b";")[0].strip().lower() == b"application/json"

    def is_encoded(self) -> bool:
        """Whether the body is compressed or otherwise encoded, which no endpoint undoes."""
        content, transfer = self.headers.get(b"content-encoding"), self.headers.get(b"transfer-encoding")
        return (content is not None and content.strip().lower() != b"identity") or (
            transfer is not None and transfer.strip().lower() != b"chunked"
        )

    def require_json(self) -> None:
        """Raises Problem unless the headers say that the body is JSON as it is."""
        if not self.is_json():
            raise Problem("not-json", "the header Content-Type must be application/json")
        if self.is_encoded():
            raise Problem(
                "unsupported-encoding", "the body must be sent as it is, without Content-Encoding",
                headers=[(b"accept-encoding", b"identity")],
            )  # fmt: skip

    async def read_body(self, bytes_max: int) -> bytes:
        """The body. Raises Problem if it is too large, ClientDisconnected if it does not arrive.

        The server bounds the time (app/bounded_http.py), and closes the connection after a body that is too large.
        """
        if int(self.headers.get(b"content-length", b"0")) > bytes_max:
            raise self._body_too_large(bytes_max)
        message = await self.receive()
        body: bytes = message.get("body", b"")
        if message.get("more_body") or message["type"] != "http.request":
            body = await self._read_parts(message, bytes_max)
        if len(body) > bytes_max:
            raise self._body_too_large(bytes_max)
        return body

    async def _read_parts(self, message: Message, bytes_max: int) -> bytes:
        """A body that arrives in parts, or its first bytes, more than `bytes_max`."""
        parts = bytearray()
        while True:
            if message["type"] == "http.disconnect":
                raise ClientDisconnected
            parts += message.get("body", b"")
            if not message.get("more_body") or len(parts) > bytes_max:
                return bytes(parts)
            message = await self.receive()

    @staticmethod
    def _body_too_large(bytes_max: int) -> Problem:
        detail = f"the body has more than {bytes_max} bytes"
        return Problem("too-large", detail, limit=bytes_max, headers=[(b"connection", b"close")])

    def parse_json(self, body: bytes) -> Any:
        """The body's JSON, strictly. Raises Problem."""
        self.require_json()
        return parse(body)

    def idempotency_key_violations(self) -> list[RuleViolation]:
        """The rules that the Idempotency-Key breaks. Raises Problem if the header is missing."""
        key = self.headers.get(b"idempotency-key")
        if not key:
            raise Problem("idempotency-key-missing", "the header Idempotency-Key is missing")
        if IDEMPOTENCY_KEY.fullmatch(key):
            return []
        message = "Idempotency-Key must have 1 to 255 printable ASCII characters"
        return [RuleViolation("Idempotency-Key", "pattern", message, place="header")]


def struct_of(given: Any, struct: type[T], violations: list[RuleViolation]) -> T:
    """Parsed JSON as a struct. Raises Problem if any rule is broken."""
    if violations:
        raise invalid_request(violations)
    return msgspec.convert(given, struct)


def hash_of_request(canonical_body: bytes, subject: str = "") -> str:
    """SHA-256 (hex) of the id in a request's path and of its body, encoded by `encode_canonically`."""
    return hashlib.sha256(subject.encode() + canonical_body).hexdigest()
