"""Single events, filters of events, cursors, currencies, metadata: over real sockets."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from app.api.routes import ROUTES
from app.api.schemas.balance import CurrencyList
from app.api.schemas.events import Event
from app.api.schemas.expanded import ExpandedDispute, ExpandedPayment, ExpandedRefund
from app.api.schemas.payments import Payment
from tests.support.http_client import Connection, Merchant, ServerProcess, assert_matches, problem, unique_name
from tests.support.payments import fact, record

LISTS = sorted(
    route.path
    for route in ROUTES
    if route.method == "GET" and route.query and "starting_after" in route.query.__struct_fields__ and not route.tag
)
PREFIXES = {
    "payments": "pay",
    "refunds": "ref",
    "disputes": "dp",
    "transactions": "pst",
    "customers": "cus",
    "payment_methods": "spm",
}


@pytest.fixture
def other(rights: Connection, api: ServerProcess) -> Any:
    made = Merchant(rights, api.url)
    yield made
    made.client.close()


def update(merchant: Merchant, payment_id: str, metadata: Any, key: str | None = None) -> Any:
    headers = {"idempotency-key": key or unique_name("update")}
    return merchant.client.post(f"/v1/payments/{payment_id}", json={"metadata": metadata}, headers=headers)


def cancel(merchant: Merchant, payment_id: str) -> None:
    headers = {"idempotency-key": unique_name("cancel")}
    assert merchant.client.post(f"/v1/payments/{payment_id}/cancel", json={}, headers=headers).status_code == 200


def test_event_is_read_by_its_id_as_it_is_listed_by_its_merchant_only(merchant: Merchant, other: Merchant) -> None:
    made = merchant.pay()
    cancel(merchant, made["id"])
    first, second = merchant.get("/v1/events")["data"]
    assert merchant.get(f"/v1/events/{first['id']}") == first
    assert first["data"] == made
    assert (second["type"], merchant.get(f"/v1/events/{second['id']}")["data"]["state"]) == (
        "payment.canceled", "canceled",
    )  # fmt: skip
    assert_matches(first, Event)
    unknown = problem(other.client.get("/v1/events/evt_" + 24 * "0"), 404, "not-found")
    foreign = problem(other.client.get(f"/v1/events/{first['id']}"), 404, "not-found")
    assert {k: v for k, v in unknown.items() if k != "request_id"} == {
        k: v for k, v in foreign.items() if k != "request_id"
    }
    for path in ("/v1/events/evt_1", "/v1/events/x"):
        problem(merchant.client.get(path), 404, "not-found")


def test_events_are_filtered_by_type_family_and_object(merchant: Merchant) -> None:
    one, two = (merchant.pay()["id"] for _ in range(2))
    cancel(merchant, one)

    def found(**query: Any) -> list[tuple[str, str]]:
        page = merchant.get("/v1/events", **query)
        assert not page["has_more"]
        return [(event["type"], event["data"]["id"]) for event in page["data"]]

    created = [("payment.initiated", one), ("payment.initiated", two)]
    canceled = [("payment.canceled", one)]
    assert found(type="payment.initiated") == created
    assert found(type="payment.*") == [*created, *canceled]
    assert found(type="refund.*") == found(type="payment.settled") == []
    assert found(object=one) == [created[0], *canceled]
    assert found(object=one, type="payment.canceled") == canceled
    assert found(object=two, type="payment.canceled") == []


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ("type=payment", "type"),
        ("type=payment.succeeded", "type"),
        ("type=payout.*", "type"),
        ("type=payment.%25", "type"),
        ("type=.*", "type"),
        ("object=pay_1", "object"),
        ("object=evt_" + 24 * "0", "object"),
    ],
)
def test_filter_of_events_of_another_form_is_refused(merchant: Merchant, query: str, field: str) -> None:
    [error] = problem(merchant.client.get(f"/v1/events?{query}"), 400, "invalid-request")["errors"]
    assert (error["field"], error["in"], error["rule"]) == (field, "query", "pattern")


def test_reader_with_a_filter_reads_each_event_once(merchant: Merchant) -> None:
    made = [merchant.pay()["id"] for _ in range(5)]
    for id in made[::2]:
        cancel(merchant, id)
    for query, expected in (({"type": "payment.canceled"}, made[::2]), ({"type": "payment.initiated"}, made)):
        seen: list[str] = []
        after: dict[str, str] = {}
        while True:
            page = merchant.get("/v1/events", limit=2, **query, **after)
            seen += [event["data"]["id"] for event in page["data"]]
            after = {"starting_after": page["next"]}
            if not page["has_more"]:
                break
        assert seen == expected


@pytest.mark.parametrize("path", LISTS)
def test_cursor_that_is_unknown_or_another_merchants_is_an_error(
    merchant: Merchant, other: Merchant, path: str
) -> None:
    theirs = other.pay()["id"]
    key = {"Idempotency-Key": unique_name("key")}
    customer = merchant.client.post("/v1/customers", json={}, headers=key).json()["id"]
    merchant.conn.execute("select outbox.publish_sealing_key('slk_1', %s)", (bytes(range(32)),))
    hooks = {"url": "https://shop.example/", "event_types": ["*"]}
    key = {"Idempotency-Key": unique_name("key")}
    endpoint = merchant.client.post("/v1/webhook_endpoints", json=hooks, headers=key).json()["id"]
    path = path.format(customer_id=customer, webhook_endpoint_id=endpoint)
    prefix = PREFIXES.get(path.rpartition("/")[2])
    cursors = ["bm90aGluZw=="] if prefix is None else [f"{prefix}_{24 * '0'}"]
    customer = merchant.client.post("/v1/customers", headers={"Idempotency-Key": unique_name("key")}).json()["id"]
    for cursor in [*cursors, *([theirs] if prefix == "pay" else [])]:
        answer = merchant.client.get(path.replace("{customer_id}", customer), params={"starting_after": cursor})
        errors = problem(answer, 400, "invalid-request")["errors"]
        [error] = [error for error in errors if error["rule"] != "required"]
        assert (error["field"], error["in"]) == ("starting_after", "query")
        # Cursors that are no ids have a pattern.
        assert error["rule"] == "cursor" or (prefix is None and error["rule"] == "pattern")


def test_cursor_of_events_with_white_space_is_an_error(merchant: Merchant) -> None:
    merchant.pay()
    following = merchant.get("/v1/events")["next"]
    assert merchant.get("/v1/events", starting_after=following)["data"] == []
    answer = merchant.client.get("/v1/events", params={"starting_after": f"{following}\n \t"})
    [error] = problem(answer, 400, "invalid-request")["errors"]
    assert (error["field"], error["rule"]) == ("starting_after", "cursor")


def test_query_that_is_not_utf_8_is_refused(merchant: Merchant) -> None:
    merchant.pay(reference="x\ufffd")
    assert len(merchant.get("/v1/payments", reference="x\ufffd")["data"]) == 1
    for query, field in (("reference=x%ff", "reference"), ("metadata[%ff]=1", "metadata"), ("x%ff=1", "x")):
        [error] = problem(merchant.client.get(f"/v1/payments?{query}"), 400, "invalid-request")["errors"]
        assert error["field"].startswith(field), error


def test_currencies_have_their_bounds(merchant: Merchant) -> None:
    page = merchant.get("/v1/currencies")
    assert_matches(page, CurrencyList)
    by_id = {currency["id"]: currency for currency in page["data"]}
    assert list(by_id) == sorted(by_id)
    assert by_id["kwd"] == {
        "id": "kwd", "object": "currency", "exponent": 3, "minimum": 200, "maximum": 99999990, "step": 10,
    }  # fmt: skip
    for currency in by_id.values():
        for amount, status in ((currency["minimum"] - 1, 400), (currency["minimum"], 201)):
            body = {"amount": amount, "currency": currency["id"]}
            assert merchant.post(body | PAID).status_code == status, (currency, amount)


PAID = {"payment_method": {"type": "card", "token": "pm_card_visa"}, "return_url": "https://shop.example/return"}


def test_payments_are_found_by_metadata_and_email(merchant: Merchant, other: Merchant) -> None:
    ada = merchant.pay(metadata={"cart": "9", "größe": "[x]=1&y"}, customer={"email": "Ada@Shop.example"})["id"]
    bob = merchant.pay(metadata={"cart": "9"}, customer={"name": "Bob"})["id"]
    other.pay(metadata={"cart": "9"}, customer={"email": "ada@shop.example"})
    merchant.pay()

    def found(**query: Any) -> list[str]:
        return [payment["id"] for payment in merchant.get("/v1/payments", **query)["data"]]

    assert found(**{"metadata[cart]": "9"}) == [bob, ada]
    assert found(**{"metadata[cart]": "9", "metadata[größe]": "[x]=1&y"}) == [ada]
    assert found(**{"metadata[cart]": "9", "metadata[other]": "9"}) == found(**{"metadata[cart]": "10"}) == []
    assert (
        found(customer_email="aDA@shop.example") == found(customer_email="ada@shop.example", status="pending") == [ada]
    )
    assert found(customer_email="ada@shop.example", state="settled") == found(customer_email="ada@shop") == []
    assert found(metadata_is="cart=9") == found(metadata_is=["cart=9", "cart=9"]) == [bob, ada]
    assert found(metadata_is=["cart=9", "größe=[x]=1&y"]) == [ada]
    assert found(**{"metadata[cart]": "9"}, metadata_is="größe=[x]=1&y") == [ada]
    assert found(**{"metadata[cart]": "9"}, limit=1) == [bob]
    assert found(**{"metadata[cart]": "9"}, starting_after=bob) == [ada]
    assert found(**{"metadata[cart]": "9"}, reference="none") == []
    assert update(merchant, ada, {"cart": "10"}).status_code == 200
    assert (found(**{"metadata[cart]": "9"}), found(**{"metadata[cart]": "10"})) == ([bob], [ada])
    assert found(customer_email="ada@shop.example") == [ada]


@pytest.mark.parametrize(
    ("query", "field", "rule"),
    [
        ("metadata=9", "metadata", "type"),
        ("metadata[cart]=9&metadata[cart]=9", "metadata/cart", "once"),
        ("metadata[cart]=9&metadata=9", "metadata", "once"),
        ("metadata[%5B]=9", "metadata[[]", "known"),
        ("status[a]=9", "status", "one_of"),
        ("&".join(f"metadata[{n}]=9" for n in range(6)), "metadata", "max_entries"),
        ("metadata_is=cart", "metadata_is/0", "pattern"),
        ("metadata_is=cart=9&metadata_is=cart=10", "metadata_is", "once"),
        ("metadata[cart]=9&metadata_is=cart=10", "metadata_is", "once"),
        ("&".join(f"metadata_is={n}=9" for n in range(6)), "metadata_is", "max_items"),
        ("customer_email=a", "customer_email", "min_length"),
    ],
)
def test_filter_of_payments_of_another_form_is_refused(merchant: Merchant, query: str, field: str, rule: str) -> None:
    errors = problem(merchant.client.get(f"/v1/payments?{query}"), 400, "invalid-request")["errors"]
    assert (field, rule) in {(error["field"], error["rule"]) for error in errors}


def test_objects_are_expanded_within_one_answer(merchant: Merchant) -> None:
    conn = merchant.conn
    payment_id = merchant.pay(amount=10000)["id"]
    record(conn, [fact(payment_id, "submitted", "pi", 10000), fact(payment_id, "captured", "ch", 10000)])
    record(conn, [fact(payment_id, "refund_succeeded", "re", 1000)])
    record(conn, [fact(payment_id, "dispute_opened", "du", 3000, revision=1, data={"status": "needs_response"})])
    [refund] = merchant.get("/v1/refunds")["data"]
    [dispute] = merchant.get("/v1/disputes")["data"]
    plain = merchant.get(f"/v1/payments/{payment_id}")
    refunds, disputes = (merchant.get(f"/v1/{name}", payment=payment_id) for name in ("refunds", "disputes"))
    assert "refunds" not in plain
    for expand, more in (
        ("refunds", {"refunds": refunds}),
        ("disputes,refunds", {"refunds": refunds, "disputes": disputes}),
    ):
        shown = merchant.get(f"/v1/payments/{payment_id}", expand=expand)
        assert shown == plain | more
        assert msgspec.convert(shown, ExpandedPayment).id == payment_id
    for path, type in (
        (f"/v1/refunds/{refund['id']}", ExpandedRefund),
        (f"/v1/disputes/{dispute['id']}", ExpandedDispute),
    ):
        assert merchant.get(path)["payment"] == payment_id
        shown = merchant.get(path, expand="payment")
        assert shown == merchant.get(path) | {"payment": plain}
        assert_matches(shown, type)
    for path in (f"/v1/payments/{payment_id}", f"/v1/refunds/{refund['id']}", f"/v1/disputes/{dispute['id']}"):
        [error] = problem(merchant.client.get(path, params={"expand": "all"}), 400, "invalid-request")["errors"]
        assert (error["field"], error["in"], error["rule"]) == ("expand", "query", "pattern")


def test_metadata_is_merged_and_null_removes_a_key(merchant: Merchant) -> None:
    made = merchant.pay(metadata={"cart": "9", "gift": "yes"})
    answer = update(merchant, made["id"], {"gift": None, "note": "größer"})
    assert answer.status_code == 200
    assert_matches(answer.json(), Payment)
    assert answer.json()["metadata"] == {"cart": "9", "note": "größer"}
    assert {name for name, value in answer.json().items() if made[name] != value} <= {"metadata", "updated_at"}
    assert merchant.get(f"/v1/payments/{made['id']}") == answer.json()


def test_metadata_update_is_idempotent_and_audited(merchant: Merchant) -> None:
    made = merchant.pay(metadata={"cart": "9"})
    first = update(merchant, made["id"], {"cart": "10"}, key="update-1")
    update(merchant, made["id"], {"cart": "11"})
    again = update(merchant, made["id"], {"cart": "10"}, key="update-1")
    assert (again.content, again.headers["idempotency-replayed"]) == (first.content, "true")
    assert merchant.get(f"/v1/payments/{made['id']}")["metadata"] == {"cart": "11"}
    problem(update(merchant, made["id"], {"cart": "12"}, key="update-1"), 422, "idempotency-key-reused")
    entries = merchant.conn.execute(
        "select snapshot -> 'metadata_keys' from audit.entries where payment_id = %s and kind = 'request' order by id",
        (made["id"],),
    ).fetchall()
    assert entries == [(["cart"],), (["cart"],)]


def test_metadata_beyond_its_bounds_is_refused_and_changes_nothing(merchant: Merchant) -> None:
    made = merchant.pay(metadata={str(n): "x" for n in range(50)})
    [error] = problem(update(merchant, made["id"], {"one more": "x"}), 400, "invalid-request")["errors"]
    assert (error["field"], error["rule"], error["limit"], error["given"]) == ("/metadata", "max_entries", 50, 51)
    assert "metadata" in error["message"]
    assert update(merchant, made["id"], {"one more": "x", "0": None}).status_code == 200
    for metadata, field in (
        ({"a": 1}, "/metadata/a"),
        (None, "/metadata"),
        ({"[": "x"}, "/metadata/["),
    ):
        [error] = problem(update(merchant, made["id"], metadata), 400, "invalid-request")["errors"]
        assert error["field"] == field
    problem(update(merchant, "pay_" + 24 * "0", {"a": "b"}), 404, "not-found")
