"""GET /v1/events."""

from __future__ import annotations

from app.api.requests import ApiRequest
from app.api.schemas.events import EventsQuery
from app.web.asgi import HttpResponse


async def list_events(request: ApiRequest) -> HttpResponse:
    """List events, oldest first. A reader that always continues with `next` misses none."""
    caller = request.caller()
    asked = await request.merchant_query(caller, EventsQuery)
    query = "select body from api.list_events(%s, %s, %s, %s)"
    return request.respond(await caller.fetch(query, asked.after, asked.limit))
