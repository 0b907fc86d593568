"""GET /problems, GET /problems/{name}, GET /health: no key is needed."""

from __future__ import annotations

import msgspec

from app.api.requests import ApiRequest
from app.api.schemas.problems import Health, ProblemType
from app.web.asgi import HttpResponse
from app.web.problems import PROBLEM_TYPES, Problem


async def list_problems(request: ApiRequest) -> HttpResponse:
    """Explain all types of problems."""
    return request.respond(msgspec.json.encode([problem_type_document(name) for name in PROBLEM_TYPES]))


async def explain_problem(request: ApiRequest) -> HttpResponse:
    """Explain a type of problem."""
    name = request.path_parameter()
    if name not in PROBLEM_TYPES:
        raise Problem("not-found", f"there is no problem of the type {name[:100]}")
    return request.respond(msgspec.json.encode(problem_type_document(name)))


async def get_health(request: ApiRequest) -> HttpResponse:
    """Report whether this process can take payments, by a query to its database."""
    await request.services.health.fetch_row("select from api.identify_merchant('')")
    replica = request.services.replica
    state = None if replica is None else replica.state or "away"
    return request.respond(msgspec.json.encode(Health("ok", state)))


def problem_type_document(name: str) -> ProblemType:
    """A type of problem as its page shows it."""
    definition = PROBLEM_TYPES[name]
    return ProblemType(f"/problems/{name}", definition.title, definition.status, definition.explanation)
