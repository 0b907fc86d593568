"""Encoded bodies: no route decodes them, so none takes them."""

from __future__ import annotations

import json
from http.client import HTTPConnection

import pytest

from app.api.routes import ROUTES
from app.web.keys import new_key_for
from app.web.routing import PATH_PARAMETER, Route
from tests.support.http_client import Connection, Merchant, problem, unique_name

WITH_BODY = [row for row in ROUTES if row.body is not None]


@pytest.fixture
def operator_key(rights: Connection) -> str:
    key = new_key_for("operator")
    add = "select surety.add_operator_key(%s, %s, %s, 'test')"
    rights.execute(add, (unique_name("operator"), key.hash, key.hint))
    return key.text


@pytest.mark.parametrize("row", WITH_BODY, ids=lambda row: row.path)
def test_encoded_body_is_refused_on_every_route(merchant: Merchant, operator_key: str, row: Route) -> None:
    path = PATH_PARAMETER.sub("unknown_1", row.path)
    sent = {"Content-Type": "application/json", "Idempotency-Key": unique_name("key")}
    if row.tag == "operators":
        sent["Authorization"] = f"Bearer {operator_key}"
    for encoding in ("gzip", "identity, gzip", ""):
        answer = merchant.client.post(path, content=b"{}", headers=sent | {"Content-Encoding": encoding})
        problem(answer, 415, "unsupported-encoding")
        assert answer.headers["accept-encoding"] == "identity"
    identity = merchant.client.post(path, content=b"{}", headers=sent | {"Content-Encoding": "Identity"})
    assert identity.status_code in {400, 404}
    assert "unsupported-encoding" in row.problems


def test_body_that_is_encoded_by_its_transfer_is_refused(merchant: Merchant) -> None:
    connection = HTTPConnection(merchant.client.base_url.netloc.decode(), timeout=10)
    headers = {"Authorization": f"Bearer {merchant.key}", "Idempotency-Key": unique_name("key")}
    headers |= {"Content-Type": "application/json", "Transfer-Encoding": "gzip, chunked"}
    connection.request("POST", "/v1/payments", b"2\r\n{}\r\n0\r\n\r\n", headers)
    answer = connection.getresponse()
    assert (answer.status, json.load(answer)["type"]) == (415, "/problems/unsupported-encoding")
    connection.close()
