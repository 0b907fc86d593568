"""POST /v1/payments/{payment_id}/cancel."""

from __future__ import annotations

from app.api.commands import execute_command
from app.api.ids import PAYMENT_ID, id_or_empty
from app.api.requests import ApiRequest
from app.api.schemas.payments import NewCancellation
from app.web.asgi import HttpResponse


async def cancel_payment(request: ApiRequest) -> HttpResponse:
    """Cancel a payment that has not succeeded yet.

    200: the payment is canceled; it had not been sent to the provider. 202: the provider is asked to cancel it, and the
    payment's state shows whether the request came in time.
    """
    return await execute_command(
        request,
        NewCancellation,
        "select status, problem, detail, body, is_replayed from api.cancel_payment(%s)",
        subject="payment_id",
        awaits="cancellations",
        subject_id=id_or_empty(request, PAYMENT_ID),
    )
