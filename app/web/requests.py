"""What routes that read have in common: who asks, for what, and the document as the database has rendered it."""

from __future__ import annotations

import re
from typing import Annotated, Any, TypeVar

from litestar import Request, Response
from litestar.params import Parameter

from app.web.auth import Authenticator, Caller
from app.web.frame import request_id_of
from app.web.problems import Problem
from app.web.validation import read_query

T = TypeVar("T")

PAYMENT_ID = re.compile("pay_[0-9a-f]{32}")
DISPUTE_ID = re.compile("dp_[0-9a-f]{32}")
REFUND_ID = re.compile("ref_[0-9a-f]{32}")

IdempotencyKeyHeader = Annotated[
    str,
    Parameter(
        header="Idempotency-Key",
        min_length=1,
        max_length=255,
        description="1 to 255 printable characters: new for each request, the same for each repetition.",
    ),
]


def caller_of(request: Request[Any, Any, Any], route: str) -> Caller:
    """Who asks; raises Problem for what can't be a key."""
    authenticator: Authenticator = request.app.state.authenticator
    return authenticator.read_caller(request.scope, dict(request.scope["headers"]), request_id_of(request), route)


async def checked_query_of(request: Request[Any, Any, Any], caller: Caller, struct: type[T]) -> T:
    """The query as a struct. Raises Problem: for a stranger first, then for the rules that the query breaks."""
    try:
        return read_query(request.scope["query_string"], struct)
    except Problem:
        await caller.require_known_key()
        raise


def valid_id_or_empty(id: str, ids: re.Pattern[str] = PAYMENT_ID) -> str:
    """An id, or one that nothing has."""
    return id if ids.fullmatch(id) else ""


def json_response(request: Request[Any, Any, Any], document: str) -> Response[Any]:
    """A document that the database has rendered."""
    headers = {"request-id": request_id_of(request)}
    return Response(document.encode(), media_type="application/json", headers=headers)
