"""POST /v1/payments/{payment_id}/capture."""

from __future__ import annotations

from app.api.commands import execute_command
from app.api.ids import PAYMENT_ID, id_or_empty
from app.api.requests import ApiRequest
from app.api.schemas.payments import NewCapture
from app.web.asgi import HttpResponse


async def capture_payment(request: ApiRequest) -> HttpResponse:
    """Capture the authorized amount of a payment, or a part of it, once.

    202: the request is stored durably, and a worker sends it to the provider. The rest of the amount is released.
    """
    return await execute_command(
        request,
        NewCapture,
        "select status, problem, detail, body, is_replayed from api.capture_payment(%s)",
        subject="payment_id",
        awaits="payments",
        subject_id=id_or_empty(request, PAYMENT_ID),
    )
