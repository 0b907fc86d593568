"""A merchant's program on a client that openapi-python-client generates: make, capture, refund, list. Prints JSON.

`python generated_python.py URL KEY`, with the generated package `surety_client` on the path.
"""

from __future__ import annotations

import json
import sys
import uuid

from surety_client import AuthenticatedClient
from surety_client.api.payments import capture_payment, create_payment, create_refund, get_payment, list_payments
from surety_client.api.refunds import get_refund
from surety_client.models import (
    CaptureMethod,
    ExpandedPayment,
    ExpandedRefund,
    NewCapture,
    NewCard,
    NewPayment,
    NewPaymentMetadata,
    NewRefund,
    Payment,
    PaymentList,
    PaymentStatus,
    ProblemDocument,
    Refund,
    RefundList,
)

WAIT = "wait=30"


def main(url: str, key: str) -> None:
    """Make a payment, capture a part, refund a part of that, and list."""
    client = AuthenticatedClient(base_url=url, token=key)
    body = NewPayment(
        amount=5000,
        currency="usd",
        payment_method=NewCard(type_="card", token="pm_card_visa"),
        capture_method=CaptureMethod.MANUAL,
        return_url="https://shop.example/return",
        metadata=NewPaymentMetadata.from_dict({"cart": "9=3*3"}),
    )
    made = create_payment.sync(client=client, body=body, idempotency_key=str(uuid.uuid4()))
    assert isinstance(made, Payment), made
    held = get_payment.sync(made.id, client=client, prefer=WAIT)
    assert isinstance(held, ExpandedPayment), held
    assert held.status == PaymentStatus.REQUIRES_CAPTURE
    captured = capture_payment.sync(
        made.id, client=client, body=NewCapture(amount=4000), idempotency_key=str(uuid.uuid4()), prefer=WAIT
    )
    assert isinstance(captured, Payment), captured
    refund = create_refund.sync(
        made.id, client=client, body=NewRefund(amount=1000), idempotency_key=str(uuid.uuid4()), prefer=WAIT
    )
    assert isinstance(refund, Refund), refund
    shown = get_refund.sync(refund.id, client=client, expand="payment")
    assert isinstance(shown, ExpandedRefund), shown
    assert isinstance(shown.payment, Payment)
    after = get_payment.sync(made.id, client=client, expand="refunds")
    assert isinstance(after, ExpandedPayment), after
    assert isinstance(after.refunds, RefundList)
    page = list_payments.sync(client=client, status=PaymentStatus.PARTIALLY_REFUNDED, metadata_is=["cart=9=3*3"])
    assert isinstance(page, PaymentList), page
    refused = create_payment.sync(client=client, body=body, idempotency_key="x" * 256)
    result = {
        "payment": made.id,
        "captured": captured.amount_captured,
        "refund": [refund.status.value, [one.amount for one in after.refunds.data]],
        "listed": [one.id for one in page.data],
        "refused": refused.title if isinstance(refused, ProblemDocument) else None,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
