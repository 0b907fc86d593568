"""A repetition gets the first answer, byte for byte, whatever has changed since the request was accepted."""

from __future__ import annotations

import pytest

from tests.api.test_customers import save_method
from tests.support.http_client import Connection, Merchant, payment, problem, unique_name
from tests.support.payments import fact, record

REMOVED = "update surety.payment_methods set detached_at = surety.time_now() where id = %(method)s"
EXPIRED = "update surety.payment_methods set exp_year = 2020 where id = %(method)s"
ERASED = (
    "update surety.customers set erased_at = surety.time_now(), email = null, folded_email = null, name = null,"
    " phone = null, description = null, shipping = null where id = %(customer)s"
)
SUSPENDED = "select surety.suspend_merchant(%(merchant)s, true, 'test')"


@pytest.mark.parametrize("change", [REMOVED, EXPIRED, ERASED, SUSPENDED])
@pytest.mark.parametrize("is_plain", [True, False], ids=["read fast", "read strictly"])
def test_repeated_payment_gets_its_first_answer_whatever_changed_since(
    rights: Connection, merchant: Merchant, change: str, is_plain: bool
) -> None:
    key = {"Idempotency-Key": unique_name("key")}
    customer = merchant.client.post("/v1/customers", json={"email": "ada@shop.example"}, headers=key).json()["id"]
    method = save_method(rights, merchant, customer)
    text = "books" if is_plain else "\\u0062ooks"
    body = b'{"amount":4999,"currency":"usd","payment_method":{"type":"card","saved":"%s"},' % method.encode()
    body += b'"off_session":true,"description":"%s"}' % text.encode()
    first = merchant.post(body, key="order-1")
    assert first.status_code == 201, first.text
    rights.execute(change.encode(), {"method": method, "customer": customer, "merchant": merchant.id})
    again = merchant.post(body, key="order-1")
    assert (again.status_code, again.content) == (201, first.content)
    assert again.headers["idempotency-replayed"] == "true"
    other = merchant.post(body, key="order-2")
    assert other.status_code == (403 if change == SUSPENDED else 400)
    assert merchant.count() == 1


def test_repeated_capture_of_a_suspended_merchant_gets_its_first_answer(rights: Connection, merchant: Merchant) -> None:
    made = [merchant.pay(capture_method="manual")["id"] for _ in range(2)]
    record(rights, [fact(payment_id, "authorized", "ch", 4999) for payment_id in made])
    key = {"Idempotency-Key": "capture-1"}
    first = merchant.client.post(f"/v1/payments/{made[0]}/capture", headers=key)
    assert first.status_code == 202
    rights.execute(SUSPENDED.encode(), {"merchant": merchant.id})
    again = merchant.client.post(f"/v1/payments/{made[0]}/capture", headers=key)
    assert (again.status_code, again.content) == (202, first.content)
    refused = merchant.client.post(f"/v1/payments/{made[1]}/capture", headers={"Idempotency-Key": "capture-2"})
    problem(refused, 403, "merchant-suspended")
    rights.execute("select surety.suspend_merchant(%s, false, 'test')", (merchant.id,))
    assert merchant.client.post(f"/v1/payments/{made[1]}/capture", headers={"Idempotency-Key": "capture-2"}).is_success


def test_repetition_in_one_batch_with_a_new_request_gets_the_first_answer(merchant: Merchant) -> None:
    first = merchant.post(payment(), key="batch-1")
    merchant.conn.execute(SUSPENDED.encode(), {"merchant": merchant.id})
    problem(merchant.post(payment(amount=5000), key="batch-1"), 403, "merchant-suspended")
    assert merchant.post(payment(), key="batch-1").content == first.content
