"""HTTP of the services: refusals are problem documents, and sustained overload gets 503 before a request is decoded.

A refusal by the application costs 0.1 ms, so ten times the load that a process serves would fill its time with
refusals. Here the refusal is written as soon as the request has been read, without a task for it. The connection is
then not read for READ_PAUSE_SECONDS, so that a client that ignores Retry-After takes no time from others.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from app.bounded_http import BoundedProtocol, connection_of
from app.connection_limits import Refusal, RefusalResponse
from app.web.asgi import HttpResponse, new_request_id
from app.web.fair_queue import sender_of
from app.web.problems import Problem, RuleViolation, invalid_request, overloaded

IsOverloaded = Callable[[bytes], bool]
"""Whether a sender (app/web/fair_queue.py) must be refused."""

# Below one second, the value of Retry-After.
READ_PAUSE_SECONDS = 0.25
LIMITED_PAUSE_SECONDS = (0.5, 1.0)

OVERLOAD_CHECKS: dict[tuple[bytes, bytes], IsOverloaded] = {}
"""The check by method and path. An application adds its own when it opens and removes it when it closes."""


def overload_response(request_id: str) -> bytes:
    """503 with Retry-After, head and body."""
    answer = overloaded().response(request_id)
    headers = [*answer.headers, (b"content-length", b"%d" % len(answer.body)), (b"request-id", request_id.encode())]
    lines = b"".join(name + b": " + value + b"\r\n" for name, value in headers)
    return b"HTTP/1.1 503 Service Unavailable\r\n" + lines + b"\r\n" + answer.body


PLACEHOLDER_ID = new_request_id()
RESPONSE_START, RESPONSE_MIDDLE, RESPONSE_END = overload_response(PLACEHOLDER_ID).split(PLACEHOLDER_ID.encode())
HEAD_END, BODY_BEGIN = RESPONSE_MIDDLE.split(b"\r\n\r\n")


def response_to_refusal(refusal: Refusal) -> HttpResponse:
    """The problem document for a request that exceeds a bound of the connection."""
    if refusal.field:
        problem = invalid_request([RuleViolation(refusal.field, "once", refusal.detail, place="header")])
    elif refusal.limit is not None:
        problem = Problem(refusal.name, refusal.detail, limit=refusal.limit)
    else:
        problem = Problem(refusal.name, refusal.detail)
    return problem.response(new_request_id())


class LoadSheddingProtocol(BoundedProtocol):
    """The bounded protocol with a check before each request. Unusual requests (pipelined, HTTP/1.0) are not checked."""

    _is_pausing = False

    def refusal_response(self, refusal: Refusal) -> RefusalResponse:
        """A refusal as a problem document."""
        answer = response_to_refusal(refusal)
        return RefusalResponse([*answer.headers, (b"request-id", answer.request_id.encode())], answer.body)

    def is_shed(self) -> bool:
        """Whether the request must be refused because its queue is full."""
        parser = self.parser
        assert parser is not None
        is_overloaded = OVERLOAD_CHECKS.get((parser.get_method(), self.url))
        return (
            is_overloaded is not None
            and (self.cycle is None or self.cycle.response_complete)
            and not self.pipeline
            and not self.expect_100_continue
            and not parser.should_upgrade()
            and parser.get_http_version() == "1.1"
            and parser.should_keep_alive()
            and is_overloaded(sender_of(dict(self.headers).get(b"authorization", b"")))
        )

    def pause_after_response(self) -> None:
        """Read nothing for a while once the current request has its response."""
        self._is_pausing = True

    def on_response_complete(self) -> None:
        """Go on with the next request, now or after the pause."""
        super().on_response_complete()
        if self._is_pausing:
            self._is_pausing = False
            # Connections that were refused together do not come back together.
            self._pause_reading(random.uniform(*LIMITED_PAUSE_SECONDS))

    def _pause_reading(self, seconds: float) -> None:
        self.flow.pause_reading()
        self.loop.call_later(seconds, self._resume_reading)

    def write_shed_response(self) -> None:
        """Write 503, and read nothing for a while."""
        if self.flow.write_paused:
            self.transport.close()  # the client sends without reading the answers
            return
        request_id = new_request_id().encode()
        date = b"".join(name + b": " + value + b"\r\n" for name, value in self.server_state.default_headers)
        self.transport.write(
            b"".join(
                (RESPONSE_START, request_id, HEAD_END, b"\r\n", date, b"\r\n", BODY_BEGIN, request_id, RESPONSE_END)
            )
        )
        self.on_response_complete()
        self._pause_reading(READ_PAUSE_SECONDS)


def slow_down(receive: object) -> None:
    """Read nothing for a while from the connection of a request once it has its response.

    A client that ignores Retry-After takes less time from others so.
    """
    connection = connection_of(receive)
    if isinstance(connection, LoadSheddingProtocol):
        connection.pause_after_response()
