"""`expand`: related objects within the answer to a GET of one object, each as its own route shows it."""

from __future__ import annotations

from typing import LiteralString

import msgspec

from app.api.requests import compact
from app.web.asgi import HttpResponse
from app.web.auth import Caller

EXPANDED_MAX = 100
QUERIES: dict[str, LiteralString] = {
    "refunds": "select body from api.list_refunds(%s, %s, %s, null, %s)",
    "disputes": "select body from api.list_disputes(%s, %s, %s, null, %s)",
}


class WithPayment(msgspec.Struct):
    """The payment of a refund or dispute."""

    payment: str


async def payment_with_lists(caller: Caller, answer: HttpResponse, payment_id: str, expand: str | None) -> HttpResponse:
    """The answer with a payment, and the newest of its refunds or disputes. Raises Problem."""
    if expand is not None:
        shown = msgspec.json.decode(answer.body, type=dict[str, msgspec.Raw])
        for name in expand.split(","):
            shown[name] = msgspec.Raw(compact(await caller.fetch(QUERIES[name], payment_id, EXPANDED_MAX)))
        answer.body = msgspec.json.encode(shown)
    return answer


async def part_with_payment(caller: Caller, answer: HttpResponse, expand: str | None) -> HttpResponse:
    """The answer with a refund or dispute, its payment in place of the payment's id. Raises Problem."""
    if expand is not None:
        payment_id = msgspec.json.decode(answer.body, type=WithPayment).payment
        shown = msgspec.json.decode(answer.body, type=dict[str, msgspec.Raw])
        shown["payment"] = msgspec.Raw(
            compact(await caller.fetch("select body from api.get_payment(%s, %s, %s)", payment_id))
        )
        answer.body = msgspec.json.encode(shown)
    return answer
