"""Lists, traces, events, problem pages and the documentation over real sockets."""

from __future__ import annotations

import re
from base64 import b64encode
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import permutations
from typing import Any, LiteralString

import httpx
import psycopg
import pytest

from app.api.schemas.events import EventList
from app.api.schemas.payments import PaymentList, Trace
from app.web.problems import PROBLEM_TYPES, problem_from_database_error
from db.connect import harden
from tests.support.http_client import (
    Connection,
    Merchant,
    ServerProcess,
    assert_matches,
    broken_rules,
    problem,
    unique_name,
)
from tests.support.sandbox_process import eventually

# ----------------------------------------------------------------------------------------------------------- reading


def test_payments_are_listed_newest_first_in_pages(merchant: Merchant) -> None:
    made = [merchant.pay(reference=f"order-{n}") for n in range(5)]
    expected = sorted((document["id"] for document in made), reverse=True)
    seen: list[str] = []
    query: dict[str, Any] = {"limit": 2}
    while True:
        page = merchant.get("/v1/payments", **query)
        assert_matches(page, PaymentList)
        seen += [document["id"] for document in page["data"]]
        if not page["has_more"]:
            break
        assert len(page["data"]) == 2
        query["starting_after"] = seen[-1]
    assert seen == expected


def test_payments_are_filtered_by_state_status_reference_and_time(merchant: Merchant) -> None:
    first, second = merchant.pay(reference="order-1"), merchant.pay(reference="order-2")
    merchant.conn.execute(
        "insert into surety.steps (payment_id, version, from_state, to_state, cause, at, actor)"
        " values (%s, 2, 'initiated', 'canceled', 'test', now(), 'test')",
        (first["id"],),
    )

    def found(**query: str) -> set[str]:
        return {document["id"] for document in merchant.get("/v1/payments", **query)["data"]}

    both = {first["id"], second["id"]}
    assert found(state="initiated") == found(status="pending") == found(reference="order-2") == {second["id"]}
    assert found(state="canceled") == found(status="canceled") == {first["id"]}
    assert found(status="succeeded") == set()
    assert found(created_from="2020-01-01T00:00:00Z") == found(created_before="2100-01-01T00:00:00+01:00") == both
    assert found(created_from="1960-01-01T00:00:00Z") == both
    assert found(created_before="2020-01-01T00:00:00Z") == set()
    assert found(created_before=first["created_at"], created_from=first["created_at"]) == set()


@pytest.mark.parametrize(
    ("query", "field", "rule"),
    [
        ("limit=0", "limit", "minimum"),
        ("limit=101", "limit", "maximum"),
        ("limit=ten", "limit", "type"),
        ("limit=1&limit=2", "limit", "once"),
        ("state=lost", "state", "one_of"),
        ("status=open", "status", "one_of"),
        ("starting_after=pay_1", "starting_after", "pattern"),
        ("created_from=yesterday", "created_from", "format"),
        ("created_before=2026-01-01T00:00:00", "created_before", "format"),
        ("reference=", "reference", "min_length"),
        ("reference=%00", "reference", "no_nul"),
        ("colour=red", "colour", "known"),
    ],
)
def test_invalid_query_is_refused(merchant: Merchant, query: str, field: str, rule: str) -> None:
    answer = merchant.client.get(f"/v1/payments?{query}")
    assert broken_rules(answer) == {(field, rule)}
    assert {error["in"] for error in answer.json()["errors"]} == {"query"}


def test_trace_contains_the_whole_history_of_a_payment(merchant: Merchant) -> None:
    made = merchant.pay()
    story = merchant.get(f"/v1/payments/{made['id']}/trace")
    assert_matches(story, Trace)
    assert story["payment"] == made
    assert [(entry["kind"], entry["to"]) for entry in story["entries"]] == [("request", "initiated")]
    assert story["entries"][0]["actor"] == {"type": "key", "id": merchant.key_id}
    assert story["entries"][0]["data"]["address"] == "127.0.0.1"
    assert re.fullmatch("req_[0-9a-f]{24}", story["entries"][0]["data"]["request_id"])


# ------------------------------------------------------------------------------------------------------------ events


def events(merchant: Merchant, after: str | None = None, limit: int = 100) -> tuple[list[str], str]:
    """Read on until nothing is left: ids of the events' payments, and the cursor."""
    seen: list[str] = []
    while True:
        query: dict[str, Any] = {"limit": limit} | ({"starting_after": after} if after else {})
        page = merchant.get("/v1/events", **query)
        assert_matches(page, EventList)
        seen += [event["data"]["id"] for event in page["data"]]
        after = page["next"]
        if not page["has_more"]:
            return seen, after


def test_events_are_listed_oldest_first_with_the_payment_at_that_version(merchant: Merchant) -> None:
    made = merchant.pay()
    merchant.conn.execute(
        "insert into surety.steps (payment_id, version, from_state, to_state, cause, at, actor)"
        " values (%s, 2, 'initiated', 'canceled', 'test', now(), 'test')",
        (made["id"],),
    )
    first, second = merchant.get("/v1/events")["data"]
    assert (first["type"], first["data"]) == ("payment.initiated", made)
    assert (second["type"], second["data"]["state"], second["data"]["version"]) == ("payment.canceled", "canceled", 2)


def test_each_event_is_listed_once_across_pages(merchant: Merchant) -> None:
    made = [merchant.pay()["id"] for _ in range(7)]
    seen, cursor = events(merchant, limit=2)
    assert seen == made
    assert events(merchant, cursor)[0] == []
    later = merchant.pay()["id"]
    assert events(merchant, cursor)[0] == [later]


@pytest.mark.parametrize("order", list(permutations(range(3))), ids=str)
def test_event_feed_skips_nothing_in_any_commit_order(
    merchant: Merchant, module_database: str, order: tuple[int, ...]
) -> None:
    payments = [merchant.pay()["id"] for _ in range(3)]
    _, cursor = events(merchant)
    writers: list[psycopg.Connection[Any]] = [psycopg.connect(harden(module_database, "deploy")) for _ in payments]
    for writer, payment_id in zip(writers, payments, strict=True):
        writer.execute(
            "insert into surety.steps (payment_id, version, from_state, to_state, cause, at, actor)"
            " values (%s, 2, 'initiated', 'canceled', 'test', now(), 'test')",
            (payment_id,),
        )
    seen: list[str] = []
    for turn in order:
        writers[turn].commit()
        writers[turn].close()
        more, cursor = events(merchant, cursor, limit=1)
        assert more == [payments[turn]]
        seen += more
    assert sorted(seen) == sorted(payments)


def test_slow_reads_delay_neither_commands_nor_the_health_check(merchant: Merchant, module_database: str) -> None:
    made = merchant.pay()["id"]
    waiting = "select count(*) from pg_locks where relation = 'surety.refunds'::regclass and not granted"
    with ThreadPoolExecutor(16) as pool, psycopg.connect(harden(module_database, "deploy")) as locking:
        locking.execute("lock table surety.refunds")
        reads = [pool.submit(merchant.client.get, "/v1/refunds") for _ in range(16)]
        eventually(lambda: one_row(merchant.conn, waiting)[0] >= 4)
        assert merchant.client.get("/health").status_code == 200
        key = {"Idempotency-Key": unique_name("key")}
        assert merchant.client.post(f"/v1/payments/{made}/cancel", headers=key).status_code == 200
        locking.rollback()
    assert {read.result().status_code for read in reads} <= {200, 503}


@pytest.mark.parametrize(
    "sqlstate", ["57014", "55P03", "40001", "40P01", "53300", "57P01", "57P03", "25006", "08006", "58030"]
)
def test_database_that_is_slow_or_away_is_a_503(sqlstate: str) -> None:
    answer = problem_from_database_error(psycopg.errors.lookup(sqlstate)("as raised")).response("req_1")
    assert answer.status == 503
    assert (b"retry-after", b"1") in answer.headers


@pytest.mark.parametrize("cursor", ["x", "MSAx", "1", "%00", "M" * 5000])
def test_unknown_cursor_is_refused(merchant: Merchant, cursor: str) -> None:
    [error] = problem(merchant.client.get(f"/v1/events?starting_after={cursor}"), 400, "invalid-request")["errors"]
    assert (error["field"], error["in"]) == ("starting_after", "query")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "1 1:0: - 0",
        "2 1:0: - 0 -",
        "0 1:0: - 0 -",
        "-1 1:0: - 0 -",
        "1 1:0 - 0 -",
        "1 0:0: - 0 -",
        "1 1:-1: - 0 -",
        "1 1:1:5 - 0 -",
        "1 5:9:-2 - 0 -",
        "1 9223372036854775807:9: - 0 -",
        "1 1:9:9223372036854775807,9223372036854775807 - 0 -",
        "1 99999999999999999999999:0: - 0 -",
        "1 1:0: 1:x: 0 -",
        "1 1:0: - -1 -",
        "1 1:0: - 18446744073709551616 -",
        "1 1:0: - 0 evt_x",
        "1 1:0: - x -",
        "NaN 1:0: - 0 -",
        "1 1:0:, - 0 -",
    ],
)
def test_forged_cursor_is_refused(merchant: Merchant, text: str) -> None:
    forged = b64encode(text.encode()).decode()
    [error] = problem(merchant.client.get("/v1/events", params={"starting_after": forged}), 400, "invalid-request")[
        "errors"
    ]
    assert (error["field"], error["rule"], error["in"]) == ("starting_after", "cursor", "query")


def test_damaged_cursor_is_read_or_refused_but_no_error_of_ours(merchant: Merchant) -> None:
    merchant.pay()
    _, cursor = events(merchant, limit=1)
    for place in range(len(cursor)):
        for damaged in (cursor[:place], cursor[:place] + "9" + cursor[place + 1 :]):
            answer = merchant.client.get("/v1/events", params={"starting_after": damaged})
            assert answer.status_code in {200, 400}, (damaged, answer.text)


@pytest.mark.parametrize("apart", [1, 1000, 10**15])
def test_cursor_stays_within_its_limit_however_many_transactions_are_open(rights: Connection, apart: int) -> None:
    opened = [10**6 + number * apart for number in range(2000)]
    given = f"{opened[0]}:{opened[-1] + 5}:{','.join(map(str, opened))}"
    bounded, encoded = one_row(rights, "select s, api.encode_snapshot(s) from api.bound_snapshot(%s, 1400) as s", given)
    assert one_row(rights, "select api.decode_snapshot(%s)", encoded) == (bounded,)
    # Both snapshots of a cursor, its other three fields, and base64.
    assert (2 * len(encoded) + 80) * 4 / 3 < 4000
    low, high, kept = bounded.split(":")
    taken = kept.count(",") + 1
    assert (int(low), int(high)) == (opened[0], opened[taken]), "it ends before the first that is left out"
    assert taken > 50


def test_reader_continues_beside_many_open_transactions(merchant: Merchant, module_database: str) -> None:
    with ExitStack() as stack:
        for _ in range(120):
            other = stack.enter_context(psycopg.connect(harden(module_database, "deploy")))
            other.execute("select pg_current_xact_id()")
        made = [merchant.pay()["id"] for _ in range(3)]
        seen, cursor = events(merchant, limit=1)
        assert seen == made
        assert events(merchant, cursor)[0] == []


def one_row(conn: Connection, query: LiteralString, *values: Any) -> tuple[Any, ...]:
    row = conn.execute(query, values).fetchone()
    assert row is not None
    return row


# ----------------------------------------------------------------------------------------------------- pages and paths


def test_each_problem_type_has_a_page(api: ServerProcess) -> None:
    shown = httpx.get(f"{api.url}/problems").json()
    assert [page["type"] for page in shown] == [f"/problems/{name}" for name in PROBLEM_TYPES]
    for page in shown:
        assert httpx.get(api.url + page["type"]).json() == page
    problem(httpx.get(f"{api.url}/problems/none"), 404, "not-found")


def test_documentation_loads_no_external_resources(api: ServerProcess) -> None:
    page = httpx.get(f"{api.url}/docs")
    assert page.status_code == 200
    head = page.text.partition("<body>")[0]
    fetched = re.findall(r"(?:src|href)=['\"]([^'\"]+)", page.text)
    assert len(fetched) == 4
    for address in fetched:
        assert address.startswith("/assets/"), address
        assert httpx.get(api.url + address).status_code == 200
    assert "//" not in head
    assert not [url for url in re.findall(r"https?://[^\s\"'<>\\]+", page.text) if "shop.example" not in url]
    assert "default-src 'self'" in page.headers["content-security-policy"]


def test_a_request_without_a_body_is_refused_where_the_documentation_requires_one(merchant: Merchant) -> None:
    merchant.conn.execute("select outbox.publish_sealing_key('slk_1', %s)", (bytes(range(32)),))
    shown = merchant.client.get("/docs/openapi.json").json()
    posts = {path: of["post"]["requestBody"]["required"] for path, of in shown["paths"].items() if "post" in of}
    required = {path: is_required for path, is_required in posts.items() if "/operator/" not in path}
    assert len(required) == 15 and set(required.values()) == {True, False}
    for path, is_required in required.items():
        url = re.sub(r"\{(\w{3})\w*\}", r"\1_01890000000000000000000000000000", path)
        headers = {"Idempotency-Key": unique_name("key"), "Content-Type": "application/json"}
        answer = merchant.client.post(url, headers=headers)
        assert answer.status_code == (400 if is_required else 404 if "{" in path else 201), (path, answer.text)


def test_the_documentation_describes_every_route(api: ServerProcess) -> None:
    shown = httpx.get(f"{api.url}/docs/openapi.json").json()
    assert set(shown["paths"]) == {
        "/v1/payments",
        "/v1/payments/{payment_id}",
        "/v1/payments/{payment_id}/cancel",
        "/v1/payments/{payment_id}/capture",
        "/v1/payments/{payment_id}/refunds",
        "/v1/payments/{payment_id}/client_secret",
        "/v1/payments/{payment_id}/trace",
        "/v1/customers",
        "/v1/customers/{customer_id}",
        "/v1/customers/{customer_id}/payment_methods",
        "/v1/customers/{customer_id}/payment_methods/{payment_method_id}",
        "/v1/webhook_endpoints",
        "/v1/webhook_endpoints/{webhook_endpoint_id}",
        "/v1/webhook_endpoints/{webhook_endpoint_id}/deliveries",
        "/v1/webhook_endpoints/{webhook_endpoint_id}/disable",
        "/v1/webhook_endpoints/{webhook_endpoint_id}/enable",
        "/v1/webhook_endpoints/{webhook_endpoint_id}/replay",
        "/v1/webhook_endpoints/{webhook_endpoint_id}/rotate_secret",
        "/v1/refunds",
        "/v1/refunds/{refund_id}",
        "/v1/disputes",
        "/v1/disputes/{dispute_id}",
        "/v1/disputes/{dispute_id}/evidence",
        "/v1/balance",
        "/v1/balance/transactions",
        "/v1/statements",
        "/v1/currencies",
        "/v1/events",
        "/v1/events/{event_id}",
        "/v1/operator/dead-letters",
        "/v1/operator/dead-letters/{letter_id}",
        "/v1/operator/dead-letters/{letter_id}/replay",
        "/v1/operator/dead-letters/{letter_id}/discard",
        "/v1/operator/dead-letters/replay",
        "/v1/operator/dead-letters/discard",
        "/v1/operator/discrepancies",
        "/v1/operator/discrepancies/resolve",
        *(
            f"/v1/operator/discrepancies/{{discrepancy_id}}{action}"
            for action in ("", "/assign", "/snooze", "/resolve")
        ),
        "/v1/operator/holds",
        *(f"/v1/operator/holds/{{payment_id}}{action}" for action in ("", "/release", "/refuse")),
        "/v1/operator/status",
        "/problems",
        "/problems/{name}",
        "/health",
    }
    post = shown["paths"]["/v1/payments"]["post"]
    assert set(post["responses"]) == {
        "201",
        "400",
        "401",
        "403",
        "408",
        "409",
        "413",
        "414",
        "415",
        "422",
        "429",
        "431",
        "503",
    }


def test_the_documentation_describes_every_field_and_operation(api: ServerProcess) -> None:
    shown = httpx.get(f"{api.url}/docs/openapi.json").json()
    undescribed = {
        f"{struct}.{field}"
        for struct, schema in shown["components"]["schemas"].items()
        for field, of in schema.get("properties", {}).items()
        if not any("description" in part for part in (of, *of.get("anyOf", [])))
    }
    assert undescribed == set()
    operations = [of for methods in shown["paths"].values() for of in methods.values()]
    assert len({of["operationId"] for of in operations}) == len(operations)
    assert all(of["tags"] and of["summary"] and not of["summary"].endswith(".") for of in operations)
    body = shown["components"]["schemas"]["NewPayment"]
    assert body["if"]["properties"] == {"authentication": {"const": "script"}}
    assert (body["else"]["if"]["required"], body["else"]["else"]["required"]) == (["off_session"], ["return_url"])
    card = shown["components"]["schemas"]["NewCard"]
    assert (card["if"]["required"], card["else"]["required"]) == (["saved"], ["token"])
    assert body["required"] == ["amount", "currency", "payment_method"]
    assert body["properties"]["amount"]["minimum"] == 1
    query = {parameter["name"] for parameter in shown["paths"]["/v1/payments"]["get"]["parameters"]}
    found_by = {"state", "status", "reference", "customer_email", "customer_id", "metadata", "metadata_is"}
    assert query == found_by | {
        *("created_from", "created_before", "limit", "starting_after", "Surety-Version", "Surety-Position")
    }


def test_unknown_paths_and_methods_get_problem_documents(merchant: Merchant) -> None:
    problem(merchant.client.get("/v2/payments"), 404, "not-found")
    problem(merchant.client.get("/"), 404, "not-found")
    for method, path, allowed in (
        ("DELETE", "/v1/payments", {"GET", "HEAD", "OPTIONS", "POST"}),
        ("POST", "/v1/events", {"GET", "HEAD", "OPTIONS"}),
    ):
        answer = merchant.client.request(method, path)
        problem(answer, 405, "method-not-allowed")
        assert set(answer.headers["allow"].split(", ")) == allowed


def test_head_answers_as_get_without_a_body_and_options_lists_the_methods(merchant: Merchant) -> None:
    made = merchant.pay()
    for path in (f"/v1/payments/{made['id']}", "/health", "/docs"):
        got, head = merchant.client.get(path), merchant.client.head(path)
        assert (head.status_code, head.content) == (200, b"")
        assert head.headers["content-length"] == str(len(got.content))
    options = merchant.client.options("/v1/payments")
    assert (options.status_code, options.headers["allow"]) == (204, "GET, HEAD, OPTIONS, POST")


def test_every_response_has_a_request_id(merchant: Merchant) -> None:
    for path in (
        "/health",
        "/docs",
        "/docs/openapi.json",
        "/problems",
        "/none",
        "/v1/payments",
        "/assets/swagger-ui.css",
    ):
        assert re.fullmatch("req_[0-9a-f]{24}", merchant.client.get(path).headers["request-id"]), path


def test_health_checks_the_database(api: ServerProcess) -> None:
    assert httpx.get(f"{api.url}/health").json() == {"status": "ok"}
