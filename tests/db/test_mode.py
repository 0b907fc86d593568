"""The mode of a database: decided before the first merchant, kept by constraints."""

from __future__ import annotations

import psycopg
import pytest
from psycopg import errors

from tests.conftest import Connect
from tests.support.payments import Connection, add_merchant, create, money, pay, record, request


def livemodes(conn: Connection, table: str) -> list[bool]:
    return [row[0] for row in conn.execute(f"select livemode from surety.{table} order by id".encode())]


def test_mode_is_test_until_it_is_decided_and_each_decision_is_audited_once(conn: Connection) -> None:
    assert conn.execute("select surety.read_livemode()").fetchone() == (False,)
    for livemode, is_new in ((False, False), (True, True), (True, False), (False, True)):
        assert conn.execute("select surety.set_livemode(%s, 'ada')", (livemode,)).fetchone() == (is_new,)
        assert conn.execute("select surety.read_livemode()").fetchone() == (livemode,)
    entries = conn.execute("select actor, outcome from audit.entries where kind = 'operator' order by id, at")
    assert sorted(entries.fetchall()) == [("operator:ada", "live mode set"), ("operator:ada", "test mode set")]


@pytest.mark.parametrize("livemode", [False, True])
def test_merchants_and_payments_have_the_mode_of_their_database(conn: Connection, livemode: bool) -> None:
    conn.execute("select surety.set_livemode(%s)", (livemode,))
    _, key_hash = add_merchant(conn)
    pay(conn, key_hash)
    assert livemodes(conn, "merchants") == livemodes(conn, "payments") == [livemode]


@pytest.mark.parametrize("livemode", [False, True])
def test_mode_cannot_change_once_there_is_a_merchant(conn: Connection, livemode: bool) -> None:
    conn.execute("select surety.set_livemode(%s)", (livemode,))
    _, key_hash = add_merchant(conn)
    for statement in (
        "select surety.set_livemode(not surety.read_livemode())",
        "update surety.environment set livemode = not livemode",
        "update surety.merchants set livemode = not livemode",
        "delete from surety.environment",
    ):
        with pytest.raises(errors.ForeignKeyViolation) as refusal:
            conn.execute(statement.encode())
        assert refusal.value.diag.constraint_name == "merchant_has_the_mode_of_its_database"
    assert conn.execute("select surety.set_livemode(surety.read_livemode())").fetchone() == (False,)
    assert create(conn, [request(key_hash)])[0]["status"] == 201


def test_mode_cannot_change_once_money_of_the_provider_is_booked(conn: Connection) -> None:
    fee = money(None, "txn_fee", "fee", -100)
    with pytest.raises(errors.ForeignKeyViolation):
        record(conn, [fee | {"livemode": True}])
    record(conn, [fee])
    with pytest.raises(errors.ForeignKeyViolation) as refusal:
        conn.execute("select surety.set_livemode(true)")
    assert refusal.value.diag.constraint_name == "unmatched_fact_has_the_mode_of_its_database"
    assert conn.execute("select count(*) from ledger.postings").fetchone() == (1,)


def test_payment_of_the_other_mode_than_its_merchant_is_refused(conn: Connection) -> None:
    _, key_hash = add_merchant(conn)
    pay(conn, key_hash)
    with pytest.raises(errors.ForeignKeyViolation) as refusal:
        conn.execute("update surety.payments set livemode = true")
    assert refusal.value.diag.constraint_name == "payment_belongs_to_a_merchant"


def test_database_whose_clock_can_be_moved_moves_no_real_money(conn: Connection) -> None:
    conn.execute("update surety.environment set kind = 'test'")
    with pytest.raises(errors.CheckViolation) as refusal:
        conn.execute("select surety.set_livemode(true)")
    assert refusal.value.diag.constraint_name == "test_environment_moves_no_real_money"
    conn.execute("update surety.environment set kind = 'production'")
    conn.execute("select surety.set_livemode(true)")
    with pytest.raises(errors.ForeignKeyViolation):
        conn.execute("insert into surety.clock (ahead) values ('1 day')")


def test_no_running_role_decides_the_mode(conn: Connection, connect: Connect) -> None:
    for kind in ("api", "worker"):
        assert connect(kind).execute("select surety.read_livemode()").fetchone() == (False,)
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            connect(kind).execute("select surety.set_livemode(true)")
