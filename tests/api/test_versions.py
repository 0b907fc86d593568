"""The version of the API: asked for by a header, answered, audited."""

from __future__ import annotations

from typing import Any

import pytest

from app.api.versions import VERSIONS
from tests.support.http_client import Merchant, problem

OLDEST = VERSIONS[0]


@pytest.mark.parametrize("asked", [{}, {"Surety-Version": OLDEST}])
def test_answer_has_its_version_and_each_command_is_audited_with_it(merchant: Merchant, asked: dict[str, str]) -> None:
    made = merchant.post(None, **asked)
    path = f"/v1/payments/{made.json()['id']}"
    headers = {"Idempotency-Key": f"cancel-{len(asked)}"} | asked
    canceled = merchant.client.post(f"{path}/cancel", headers=headers)
    read = merchant.client.get(path, headers=asked)
    assert [answer.status_code for answer in (made, canceled, read)] == [201, 200, 200]
    assert {answer.headers["surety-version"] for answer in (made, canceled, read)} == {OLDEST}
    entries = merchant.conn.execute(
        "select snapshot ->> 'api_version' from audit.entries where payment_id = %s and snapshot ? 'route'",
        (made.json()["id"],),
    ).fetchall()
    assert entries == [(OLDEST,), (OLDEST,)]


@pytest.mark.parametrize("asked", ["2026-11-31", "", "latest", "ÿ", "2026-11-30, 2026-11-30"])
def test_unknown_version_is_refused_and_changes_nothing(merchant: Merchant, asked: str) -> None:
    before = merchant.count()
    sent: dict[str, Any] = {"Surety-Version": asked.encode("latin-1")}
    for answer in (merchant.post(None, **sent), merchant.client.get("/v1/payments", headers=sent)):
        document = problem(answer, 400, "invalid-request")
        assert document["errors"] == [
            {
                "field": "Surety-Version",
                "rule": "one_of",
                "message": f"Surety-Version must be {OLDEST}",
                "limit": [OLDEST],
                "given": asked,
                "in": "header",
            }
        ]
    assert merchant.count() == before


def test_repetition_without_the_version_gets_the_first_answer(merchant: Merchant) -> None:
    first = merchant.post(None, key="version-1", **{"Surety-Version": OLDEST})
    again = merchant.post(None, key="version-1")
    assert (again.content, again.headers["idempotency-replayed"]) == (first.content, "true")
