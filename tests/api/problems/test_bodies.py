"""Bodies and queries that no route takes: encoded, malformed, with unknown fields."""

from __future__ import annotations

import json
from http.client import HTTPConnection

import msgspec
import pytest

from app.api.routes import ROUTES
from app.api.schemas.problems import ProblemDocument
from app.web.routing import PATH_PARAMETER, Route
from tests.support.http_client import Connection, Merchant, problem, unique_name
from tests.support.operators import add_operator

WITH_BODY = [row for row in ROUTES if row.body is not None]
BROKEN_BODIES = (
    b"",
    b"{",
    b"[]",
    b"null",
    b'{"unknown_field": 1}',
    b'{"amount": 1e400, "reason": 5}',
    b"\xff",
    b"[" * 9999,
)
BROKEN_QUERIES = ("unknown_parameter=1", "limit=0", "limit=1&limit=2", "limit=%00", "limit=%ff", "=", "&&a")


@pytest.fixture(scope="module")
def operator_key(rights: Connection) -> str:
    return add_operator(rights, "ada@acme", "admin")


@pytest.mark.parametrize("row", WITH_BODY, ids=lambda row: row.path)
def test_encoded_body_is_refused_on_every_route(merchant: Merchant, operator_key: str, row: Route) -> None:
    path = PATH_PARAMETER.sub("unknown_1", row.path)
    sent = {"Content-Type": "application/json", "Idempotency-Key": unique_name("key")}
    if row.tag == "operators":
        sent["Authorization"] = f"Bearer {operator_key}"
    for encoding in ("gzip", "identity, gzip", ""):
        answer = merchant.client.request(row.method, path, content=b"{}", headers=sent | {"Content-Encoding": encoding})
        problem(answer, 415, "unsupported-encoding")
        assert answer.headers["accept-encoding"] == "identity"
    identity = merchant.client.request(row.method, path, content=b"{}", headers=sent | {"Content-Encoding": "Identity"})
    assert identity.status_code in {201, 400, 404}
    assert "unsupported-encoding" in row.problems


def test_body_that_is_encoded_by_its_transfer_is_refused(merchant: Merchant) -> None:
    connection = HTTPConnection(merchant.client.base_url.netloc.decode(), timeout=10)
    headers = {"Authorization": f"Bearer {merchant.key}", "Idempotency-Key": unique_name("key")}
    headers |= {"Content-Type": "application/json", "Transfer-Encoding": "gzip, chunked"}
    connection.request("POST", "/v1/payments", b"2\r\n{}\r\n0\r\n\r\n", headers)
    answer = connection.getresponse()
    assert (answer.status, json.load(answer)["type"]) == (415, "/problems/unsupported-encoding")
    connection.close()


@pytest.mark.parametrize("row", [row for row in ROUTES if not row.is_public], ids=lambda row: row.name)
def test_unknown_parameter_of_a_query_is_refused_on_every_route(
    merchant: Merchant, operator_key: str, row: Route
) -> None:
    headers = {"Authorization": f"Bearer {operator_key}"} if row.tag == "operators" else {}
    path = PATH_PARAMETER.sub("unknown_1", row.path)
    answer = merchant.client.request(
        row.method, f"{path}?surprise=1", headers=headers | {"Idempotency-Key": unique_name("key")}
    )
    errors = problem(answer, 400, "invalid-request")["errors"]
    [error] = [error for error in errors if error["rule"] != "required"]
    assert (error["field"], error["in"], error["rule"]) == ("surprise", "query", "known")


@pytest.mark.parametrize("row", ROUTES, ids=lambda row: row.name)
def test_every_invalid_request_names_field_and_rule(merchant: Merchant, operator_key: str, row: Route) -> None:
    headers = {"Authorization": f"Bearer {operator_key}"} if row.tag == "operators" else {}
    path = PATH_PARAMETER.sub("unknown_1", row.path)
    answers = []
    if row.query is not None:
        answers += [merchant.client.get(f"{path}?{query}", headers=headers) for query in BROKEN_QUERIES]
    if row.body is not None:
        headers["Content-Type"] = "application/json"
        for body in BROKEN_BODIES:
            sent = headers | {"Idempotency-Key": unique_name("key")}
            answers.append(merchant.client.request(row.method, path, content=body, headers=sent))
        asked = headers | {"Idempotency-Key": "k" * 256}
        answers.append(merchant.client.request(row.method, path, content=b"{}", headers=asked))
    if not row.is_public:
        asked = headers | {"Surety-Version": "2026-02-30", "Idempotency-Key": unique_name("key")}
        answers.append(merchant.client.request(row.method, path, headers=asked))
    assert bool(answers) == ("invalid-request" in row.problems)
    refused = [answer for answer in answers if answer.status_code == 400]
    assert len(refused) >= len(answers) - 2, "no body is an empty object for some, and some ignore the key"
    for answer in refused:
        document = msgspec.convert(problem(answer, 400, "invalid-request"), ProblemDocument)
        assert document.errors
        for error in document.errors:
            assert error.rule and error.message
            # An empty pointer is the whole body; a parameter may have an empty name.
            assert error.message.startswith(("the body", "a number in the body")) == (
                error.field == "" and error.place == "body"
            )
        assert document.detail.startswith(document.errors[0].message)
