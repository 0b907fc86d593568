"""Customers on the command line."""

from __future__ import annotations

import json

from tests.cli.conftest import Run, refused, said
from tests.support.payments import Connection, add_merchant


def new_customer(conn: Connection, merchant: str, email: str) -> str:
    row = conn.execute(
        "insert into surety.customers (id, merchant_id, livemode, email, folded_email, provider, provider_account,"
        " created_at, updated_at) select surety.new_id('cus', surety.time_now()), %s, false, %s,"
        " surety.fold_email(%s), 'stripe', '', now(), now() returning id",
        (merchant, email, email),
    ).fetchone()
    assert row is not None
    conn.execute(
        "insert into surety.payment_methods (id, customer_id, merchant_id, type, brand, last4, exp_month, exp_year,"
        " provider_id, usage, mandate, payment_id, created_at) select surety.new_id('spm', surety.time_now()), %s, %s,"
        " 'card', 'visa', '4242', 11, 2030, 'pm_1', 'off_session', '{}', 'pay_0', now()",
        (row[0], merchant),
    )
    return str(row[0])


def test_customers_are_listed_by_merchant_and_address(run: Run, conn: Connection) -> None:
    assert said(run("customers", "list")) == "no customers"
    first, second = add_merchant(conn)[0], add_merchant(conn, account="acct_2")[0]
    ada, bob = new_customer(conn, first, "zoé@shop.example"), new_customer(conn, second, "bob@shop.example")
    listed = json.loads(said(run("customers", "list", "--json")))
    assert [(each["id"], each["merchant"], each["payment_methods"]) for each in listed] == [
        (bob, second, 1),
        (ada, first, 1),
    ]
    assert ada in said(run("customers", "list"))
    for words in (("--merchant", first), ("--email", "ZOÉ@shop.example")):
        assert [each["id"] for each in json.loads(said(run("customers", "list", "--json", *words)))] == [ada]


def test_erased_customers_are_marked_in_the_list(run: Run, conn: Connection) -> None:
    merchant = add_merchant(conn)[0]
    ada = new_customer(conn, merchant, "ada@shop.example")
    said(run("customers", "erase", "--merchant", merchant, "--customer", ada))
    [listed] = json.loads(said(run("customers", "list", "--json")))
    head, line = said(run("customers", "list")).splitlines()
    assert "erased" in head
    assert line.endswith(listed["erased_at"])


def test_customer_is_shown_with_its_saved_methods(run: Run, conn: Connection) -> None:
    merchant = add_merchant(conn)[0]
    ada = new_customer(conn, merchant, "ada@shop.example")
    shown = json.loads(said(run("customers", "show", ada, "--json")))
    assert (shown["email"], shown["merchant"], shown["payment_methods"][0]["last4"]) == (
        "ada@shop.example",
        merchant,
        "4242",
    )
    text = said(run("customers", "show", ada))
    assert "ada@shop.example" in text
    assert "visa …4242 11/2030" in text
    assert "there is no customer cus_17" in refused(run("customers", "show", "cus_17"))
