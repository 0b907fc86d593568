"""GET /v1/statements: a merchant reads its month in pages, which lead from one balance to the other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest

from app.web.keys import key_hash_of
from tests.cli.test_closing import capture, end_of, month_of, move_to, settle
from tests.db.test_balances_at import now
from tests.support.http_client import Merchant, problem, running_server
from tests.support.payments import Connection


@pytest.fixture
def merchants(conn: Connection, database: str) -> Iterator[list[Merchant]]:
    """Two merchants, talking to an API process of the test's own database, whose clock moves."""
    with running_server("api", database) as api:
        made = [Merchant(conn, api.url) for _ in range(2)]
        yield made
        for one in made:
            one.client.close()


def hash_of(merchant: Merchant) -> bytes:
    found = key_hash_of(f"Bearer {merchant.key}".encode())
    assert found is not None
    return found


def pages(merchant: Merchant, month: str, limit: int) -> list[dict[str, Any]]:
    """All pages of a statement."""
    read = [merchant.get("/v1/statements", month=month, limit=limit)]
    while read[-1]["has_more"]:
        after = read[-1]["data"][-1]["id"]
        read.append(merchant.get("/v1/statements", month=month, limit=limit, starting_after=after))
    return read


def test_pages_lead_from_the_opening_to_the_closing_balances(merchants: list[Merchant], conn: Connection) -> None:
    merchant, start = merchants[0], now(conn)
    first, second = (capture(conn, hash_of(merchant)) for _ in range(2))
    move_to(conn, end_of(start) + timedelta(hours=1))
    settle(conn, first)
    settle(conn, second)
    move_to(conn, end_of(start, 1) + timedelta(hours=1))
    for month, types in ((month_of(start), "captured"), (month_of(start, 1), "settled")):
        read = pages(merchant, month, 1)
        lines = [line for page in read for line in page["data"]]
        assert [line["type"] for line in lines] == [types, types]
        moved = Counter({(each["currency"], each["account"]): each["opening"] for each in read[0]["balances"]})
        for line in lines:
            assert line["gross"] + line["fee"] == line["net"]
            for change in line["changes"]:
                moved[change["currency"], change["account"]] += change["amount"]
        closing = {(each["currency"], each["account"]): each["closing"] for each in read[0]["balances"]}
        assert moved == Counter(closing)
        assert (read[0]["status"], len(read)) == ("over", 2)


def test_merchant_sees_no_other_merchants_lines(merchants: list[Merchant], conn: Connection) -> None:
    merchant, other_merchant = merchants
    capture(conn, hash_of(other_merchant))
    month = month_of(now(conn))
    [page] = pages(merchant, month, 10)
    assert (page["data"], page["balances"], page["status"]) == ([], [], "under_way")
    move_to(conn, now(conn) + timedelta(seconds=2))
    [theirs] = pages(other_merchant, month, 10)
    foreign = merchant.client.get("/v1/statements", params={"month": month, "starting_after": theirs["data"][0]["id"]})
    problem(foreign, 400, "invalid-request")


@pytest.mark.parametrize("month", ["2027", "2027-13", "2027-1", "1999-01", "now", ""])
def test_month_that_is_none_is_refused(merchant: Merchant, month: str) -> None:
    refused = merchant.client.get("/v1/statements", params={"month": month})
    [broken] = problem(refused, 400, "invalid-request")["errors"]
    assert broken["field"] == "month"


def test_month_that_has_not_begun_has_no_statement(merchant: Merchant) -> None:
    problem(merchant.client.get("/v1/statements", params={"month": "2999-01"}), 404, "not-found")
