"""POST /v1/payments/{payment_id}."""

from __future__ import annotations

from app.api.commands import execute_command
from app.api.ids import PAYMENT_ID, id_or_empty
from app.api.requests import ApiRequest
from app.api.schemas.payments import PaymentUpdate
from app.web.asgi import HttpResponse


async def update_payment(request: ApiRequest) -> HttpResponse:
    """Merge metadata into a payment's. A null removes its key; the other keys stay. Nothing is sent to the provider."""
    return await execute_command(
        request,
        PaymentUpdate,
        "select status, problem, detail, body, is_replayed from api.update_payment(%s)",
        subject="payment_id",
        subject_id=id_or_empty(request, PAYMENT_ID),
        needs_worker=False,
    )
