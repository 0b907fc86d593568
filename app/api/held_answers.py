"""Answers that wait for an event, as `Prefer: wait=N` (RFC 7240) asks. app/api/waiting.py holds them.

An answer has `Preference-Applied` if the request was held as it asked, or had no reason to wait. Without it, the answer
is that of a request without Prefer: there are too many waiting requests, the server stops or the database is away.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import LiteralString

import msgspec
import psycopg

from app.api.requests import JSON_HEADERS, ApiRequest, compact
from app.api.waiting import AnyKind, AwaitedKind, AwaitedObject, ReaderPosition, Waiter
from app.web.asgi import ClientDisconnected, HttpResponse
from app.web.auth import Caller
from app.web.batching import DatabaseAway, Unavailable
from app.web.preferences import read_wait_seconds
from app.web.problems import Problem

Header = tuple[bytes, bytes]

VARY: Header = (b"vary", b"Prefer")
UNDECIDED: dict[AnyKind, frozenset[str]] = {
    "payments": frozenset({"pending"}),
    "cancellations": frozenset({"pending", "requires_action", "requires_capture"}),
    "refunds": frozenset({"pending"}),
}
"""The statuses in which a request waits."""
QUERIES_AFTER_COMMAND: dict[AwaitedKind, LiteralString] = {
    "payments": "select body from api.get_payment(%s, %s, %s, 'payments:write')",
    "cancellations": "select body from api.get_payment(%s, %s, %s, 'payments:write')",
    "refunds": "select body from api.get_refund(%s, %s, %s, 'refunds:write')",
}


class ShownObject(msgspec.Struct):
    """What decides whether a payment or a refund is waited for."""

    id: str
    status: str


class EventsPage(msgspec.Struct):
    """What decides whether a page of events is waited for."""

    data: list[msgspec.Raw]
    has_more: bool
    next: str


async def respond_when_decided(request: ApiRequest, awaited: AwaitedObject, query: LiteralString) -> HttpResponse:
    """The answer to a GET of a payment or refund, held while it is pending if the request asks for that."""
    caller = request.caller()
    document = await caller.fetch(query, awaited.id)
    headers = [*JSON_HEADERS, VARY]
    if b"prefer" in request.headers and (seconds := read_wait_seconds(request.scope["headers"])) is not None:
        shown = msgspec.json.decode(document, type=ShownObject)
        is_decided = shown.status not in UNDECIDED[awaited.kind]
        later = None if is_decided else await held_document(request, caller, awaited, seconds, query)
        if later is not None or is_decided:
            headers.append(preference_applied(seconds))
        document = later or document
    return HttpResponse(200, compact(document), request.request_id, headers)


async def document_after_command(
    request: ApiRequest, caller: Caller, kind: AwaitedKind, accepted: str, *, is_replayed: bool
) -> tuple[str, list[Header]]:
    """The document of a command, held while it is undecided if the request asks for that, and further headers.

    `accepted` is the answer that was stored with the command, an earlier one if `is_replayed`. A wait that fails can't
    turn it into a failure.
    """
    seconds = read_wait_seconds(request.scope["headers"])
    if seconds is None:
        return accepted, []
    shown = msgspec.json.decode(accepted, type=ShownObject)
    if not is_replayed and shown.status not in UNDECIDED[kind]:
        return accepted, [preference_applied(seconds)]
    awaited = AwaitedObject(kind, shown.id)
    try:
        later = await held_document(request, caller, awaited, seconds, QUERIES_AFTER_COMMAND[kind])
    except (Problem, Unavailable, psycopg.Error):
        return accepted, []
    return (accepted, []) if later is None else (later, [preference_applied(seconds)])


async def held_document(
    request: ApiRequest, caller: Caller, awaited: AwaitedObject, seconds: int, query: LiteralString
) -> str | None:
    """The document once it is decided, at the latest after these seconds; None if the request can't be held.

    The key is checked again. Raises Problem, Unavailable or ClientDisconnected.
    """
    waiting = request.services.waiting
    until = asyncio.get_running_loop().time() + seconds
    with waiting.admit(request.receive, caller.key_hash) as waiter:
        if waiter is None or not await waits(waiter, awaited, until):
            return None
        # What ended the wait was seen on the primary.
        return await waiting.fetch(lambda: caller.fetch_from_primary(query, awaited.id))


async def waits(waiter: Waiter, awaited: AwaitedObject | ReaderPosition, until: float) -> bool:
    """Whether the wait took its course; False if the server stops. Raises DatabaseAway or ClientDisconnected."""
    match await waiter.wait(awaited, until):
        case "changed" | "over":
            return True
        case "stopped":
            return False
        case "failed":
            raise DatabaseAway("the database is away")
        case "left":
            raise ClientDisconnected


async def respond_when_events(
    request: ApiRequest, caller: Caller, after: str | None, fetch: Callable[[str | None], Awaitable[str]]
) -> HttpResponse:
    """The answer to a GET of events, an empty last page held until there is an event if the request asks for that.

    `fetch` gives the page after a cursor.
    """
    document = await fetch(after)
    headers = [*JSON_HEADERS, VARY]
    if b"prefer" in request.headers and (seconds := read_wait_seconds(request.scope["headers"])) is not None:
        document, is_applied = await held_page(request, caller, document, seconds, fetch)
        if is_applied:
            headers.append(preference_applied(seconds))
    return HttpResponse(200, compact(document), request.request_id, headers)


async def held_page(
    request: ApiRequest,
    caller: Caller,
    document: str,
    seconds: int,
    fetch: Callable[[str | None], Awaitable[str]],
) -> tuple[str, bool]:
    """A page that is not an empty last one, at the latest after these seconds; whether it was held as it should.

    An event that the request's filters leave out ends one wait, and another begins after it.
    """
    loop = asyncio.get_running_loop()
    until = loop.time() + seconds
    page = msgspec.json.decode(document, type=EventsPage)
    if page.data or page.has_more:
        return document, True
    waiting = request.services.waiting
    with waiting.admit(request.receive, caller.key_hash) as waiter:
        if waiter is None:
            return document, False
        while not (page.data or page.has_more) and loop.time() < until:
            position = await caller.read_position(page.next)
            if not await waits(waiter, ReaderPosition(*position), until):
                return document, False
            after = page.next
            document = await waiting.fetch(lambda after=after: fetch(after))  # type: ignore[misc]
            page = msgspec.json.decode(document, type=EventsPage)
    return document, True


def preference_applied(seconds: int) -> Header:
    """The header that says how long the request was allowed to wait."""
    return b"preference-applied", b"wait=%d" % seconds
