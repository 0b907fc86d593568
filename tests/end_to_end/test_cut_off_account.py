"""An account that is cut off at Stripe, end to end: real processes, real HTTP, a clock that moves on."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta

import pytest

from app.status_findings import find_problems
from tests.end_to_end.test_payment_lives import PaymentScenario, running_scenario
from tests.support.http_client import Merchant, payment, problem
from tests.support.payments import Connection
from tests.support.sandbox_process import eventually

ACCOUNT = "acct_cutoff"


@pytest.fixture(scope="module")
def scenario(server: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[PaymentScenario]:
    with running_scenario(server, tmp_path_factory.mktemp("cut_off")) as running:
        running.conn.execute("update surety.environment set kind = 'test'")
        yield running


def refusals(conn: Connection) -> list[str]:
    """The findings about refused access."""
    [(state,)] = conn.execute("select surety.read_status()").fetchall()
    return [finding.what for finding in find_problems(state) if finding.id == "access-refused"]


def pass_time(conn: Connection, **interval: float) -> None:
    conn.execute(
        "insert into surety.clock (ahead) values (%s) on conflict (kind) do update"
        " set ahead = clock.ahead + excluded.ahead",
        (timedelta(**interval),),
    )


def test_merchant_that_is_cut_off_can_cancel_and_pay_again_later_and_others_notice_nothing(
    scenario: PaymentScenario,
) -> None:
    conn, other = scenario.conn, scenario.merchant
    merchant = Merchant(conn, str(other.client.base_url), account=ACCOUNT)
    try:
        scenario.sandbox.control("accounts", {"id": ACCOUNT, "connected": False})
        accepted = payment(reference="order-1")
        first = merchant.post(accepted, key="order-1")
        stuck = merchant.pay(reference="order-2")["id"]
        [what] = eventually(lambda: refusals(conn), 30)
        assert f"account {ACCOUNT} (Acme Books)" in what and "account_invalid" in what and "sk_test_…" in what

        pass_time(conn, minutes=5)
        detail = problem(merchant.post(payment()), 403, "provider-account-refused")["detail"]
        assert "Stripe" not in detail and ACCOUNT not in detail, "merchants read nothing internal"
        again = merchant.post(accepted, key="order-1")
        assert (again.status_code, again.content) == (201, first.content), "an accepted request gets its answer again"
        first_id = first.json()["id"]
        # The probe may be refused before the refusal of its own call is recorded.
        eventually(
            lambda: conn.execute("select surety.is_surely_unexecuted(%s)", (first_id,)).fetchone() == (True,), 30
        )
        path = f"/v1/payments/{first_id}/cancel"
        canceled = merchant.client.post(path, json={}, headers={"Idempotency-Key": "cancel"})
        assert (canceled.status_code, canceled.json()["state"]) == (200, "canceled")
        paid = other.pay()["id"]
        eventually(lambda: other.get(f"/v1/payments/{paid}")["status"] == "succeeded", 30)

        pass_time(conn, hours=24)
        ended = eventually(
            lambda: found if (found := merchant.get(f"/v1/payments/{stuck}"))["status"] == "failed" else None, 30
        )
        assert ended["failure"]["code"] == "provider_account_refused"

        scenario.sandbox.control("accounts", {"id": ACCOUNT, "connected": True})
        pass_time(conn, minutes=5)
        eventually(lambda: refusals(conn) == [], 30)
        made = [merchant.pay(reference=reference)["id"] for reference in ("order-1", "order-2")]
        eventually(lambda: {merchant.get(f"/v1/payments/{one}")["status"] for one in made} == {"succeeded"}, 30)
        assert scenario.sandbox.control("charges/summary?metadata_key=surety_payment")["double"] == []
    finally:
        merchant.client.close()
