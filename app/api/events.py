"""GET /v1/events, GET /v1/events/{event_id}."""

from __future__ import annotations

from app.api.held_answers import respond_when_events
from app.api.ids import EVENT_ID, id_or_empty
from app.api.requests import ApiRequest
from app.api.schemas.events import EventsQuery
from app.web.asgi import HttpResponse


async def list_events(request: ApiRequest) -> HttpResponse:
    """List events, oldest first. A reader that always continues with `next` misses none.

    `Prefer: wait=N` waits while there is no event.
    """
    caller = request.caller()
    asked = await request.merchant_query(caller, EventsQuery)
    await caller.given_position()

    async def fetch(after: str | None) -> str:
        query = "select body from api.list_events(%s, %s, %s, %s, %s, %s)"
        # A snapshot of a standby lacks the transactions under way, so a cursor from there would skip their events.
        return await caller.fetch_from_primary(query, after, asked.limit, asked.type, asked.object)

    return await respond_when_events(request, caller, asked.starting_after, fetch)


async def get_event(request: ApiRequest) -> HttpResponse:
    """Read an event, with its object at that version."""
    caller = request.caller()
    query = "select body from api.get_event(%s, %s, %s)"
    return request.respond(await caller.fetch(query, id_or_empty(request, EVENT_ID)))
