"""An erasure beside traffic: nothing of the payer is accepted unseen, and what can't be erased is named."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psycopg
import pytest

from tests.cli.conftest import Run, refused
from tests.conftest import Connect
from tests.support.payments import (
    Connection,
    add_merchant,
    command,
    create,
    fact,
    pay,
    record,
    request,
    violations,
)

ERASE = "select surety.erase_customer(%s, surety.time_now())"


def new_customer(conn: Connection, key: bytes) -> str:
    return str(command(conn, "create_customer", key, email="ada@payer.example", name="Ada")["body"]["id"])


def erase(conn: Connection, customer: str) -> dict[str, Any]:
    """What surety.erase_customer returns."""
    [(changed,)] = conn.execute(ERASE, (customer,)).fetchall()
    return dict(changed)


def erased_at(conn: Connection, customer: str) -> object:
    [(at,)] = conn.execute("select erased_at from surety.customers where id = %s", (customer,)).fetchall()
    return at


def marked(conn: Connection) -> list[str]:
    """The payments and customers whose events are stored without the payer's data."""
    return [subject for (subject,) in conn.execute("select subject_id from surety.erasures order by subject_id")]


def until_waiting(conn: Connection, waiting: Connection) -> None:
    """Returns once a connection is held up by a lock."""
    deadline = time.monotonic() + 30
    query = "select cardinality(pg_blocking_pids(%s)) > 0"
    while conn.execute(query, (waiting.info.backend_pid,)).fetchall() != [(True,)]:
        assert time.monotonic() < deadline, "it does not wait"


def test_customer_waits_for_a_payment_that_is_being_stored_and_is_left(conn: Connection, connect: Connect) -> None:
    _, key = add_merchant(conn)
    customer = new_customer(conn, key)
    merchant, operator = connect("api"), connect("deploy")
    with ThreadPoolExecutor(1) as pool:
        with merchant.transaction():
            [payment] = pay(merchant, key, customer_id=customer)
            waiting = pool.submit(erase, operator, customer)
            until_waiting(conn, operator)
        assert waiting.result() == {"refused": f"{payment}: initiated"}
    assert erased_at(conn, customer) is None


def test_dry_run_waits_for_no_lock_and_changes_nothing(run: Run, conn: Connection, connect: Connect) -> None:
    merchant, key = add_merchant(conn)
    customer = new_customer(conn, key)
    [payment] = pay(conn, key, customer_id=customer, description="A gift for Ada")
    record(conn, [fact(payment, "submitted", "pi", 10000), fact(payment, "failed", "pi")])
    words = ("customers", "erase", "--merchant", merchant, "--customer", customer, "--json")
    traffic = connect("deploy")
    with ThreadPoolExecutor(1) as pool, traffic.transaction():
        for table in ("payments", "customers", "payment_labels", "idempotency_keys", "provider_events"):
            traffic.execute(f"lock table surety.{table} in exclusive mode".encode())
        traffic.execute("lock table surety.erasures in access exclusive mode")
        counted = pool.submit(run, *words, "--dry-run").result(30)
    assert erased_at(conn, customer) is None and marked(conn) == []
    assert json.loads(counted.stdout)["rows"] == json.loads(run(*words).stdout)["rows"]


def test_payment_that_met_an_erasure_is_judged_again_and_refused(conn: Connection, connect: Connect) -> None:
    _, key = add_merchant(conn)
    customer = new_customer(conn, key)
    merchant, operator = connect("api"), connect("deploy")
    asked = [request(key, customer_id=customer)]
    with ThreadPoolExecutor(1) as pool:
        with operator.transaction():
            assert erase(operator, customer)["customers"] == 1
            waiting = pool.submit(create, merchant, asked)
            until_waiting(conn, merchant)
        with pytest.raises(psycopg.errors.SerializationFailure):
            waiting.result()
    [again] = create(merchant, asked)
    assert (again["problem"], again["detail"]["rule"]) == ("invalid-request", "erased")
    assert conn.execute("select count(*) from surety.payments").fetchone() == (0,)


def test_answer_of_a_change_that_is_being_stored_is_erased_too(conn: Connection, connect: Connect) -> None:
    _, key = add_merchant(conn)
    customer = new_customer(conn, key)
    merchant, operator = connect("api"), connect("deploy")
    with ThreadPoolExecutor(1) as pool:
        with merchant.transaction():
            changed = command(merchant, "update_customer", key, customer_id=customer, name="Countess")
            assert changed["status"] == 200
            waiting = pool.submit(erase, operator, customer)
            until_waiting(conn, operator)
        assert waiting.result()["idempotency_keys"] == 2
    [(answers,)] = conn.execute("select string_agg(response, '') from surety.idempotency_keys").fetchall()
    assert "Countess" not in answers and "Ada" not in answers


def test_payment_accepted_while_its_customer_is_erased_is_named_and_both_are_left(run: Run, conn: Connection) -> None:
    merchant, key = add_merchant(conn)
    customer = new_customer(conn, key)
    [ended] = pay(conn, key, customer_id=customer, description="ended")
    record(conn, [fact(ended, "submitted", "pi", 10000), fact(ended, "failed", "pi")])
    # Accepted once the command has searched.
    asked = json.dumps([request(key, customer_id=customer, description="meanwhile")])
    body = f"begin perform api.create_payments('{asked}'); return null; end"
    conn.execute(f"create function surety.meanwhile() returns trigger language plpgsql as $${body}$$".encode())
    conn.execute(
        "create trigger meanwhile after insert on surety.erasures for each statement"
        " execute function surety.meanwhile()"
    )
    report = refused(run("customers", "erase", "--merchant", merchant, "--customer", customer))
    conn.execute("drop trigger meanwhile on surety.erasures")
    [(payment,)] = conn.execute("select id from surety.payments where description = 'meanwhile'").fetchall()
    assert report == f"1 payment in progress, not erased: {payment}: initiated"
    # What Stripe reports about the payment and its customer is needed, so only the other one is marked.
    assert marked(conn) == [ended]
    assert erased_at(conn, customer) is None
    record(conn, [fact(payment, "submitted", "pi_2", 10000), fact(payment, "failed", "pi_2")])
    assert run("customers", "erase", "--merchant", merchant, "--customer", customer).exit_code == 0
    assert erased_at(conn, customer) is not None
    assert conn.execute("select description from surety.payments").fetchall() == [(None,), (None,)]
    assert not violations(conn)


def test_payment_that_is_refused_loses_its_mark(conn: Connection) -> None:
    _, key = add_merchant(conn)
    [payment] = pay(conn, key)
    conn.execute("select surety.begin_erasure(%s)", ([payment],))
    [(changed,)] = conn.execute("select surety.erase_payment(%s)", (payment,)).fetchall()
    assert (changed, marked(conn)) == ({"refused": "initiated"}, [])


def test_events_that_arrive_meanwhile_do_not_keep_the_command_from_its_end(run: Run, conn: Connection) -> None:
    merchant, key = add_merchant(conn)
    [payment] = pay(conn, key)
    record(conn, [fact(payment, "submitted", "pi", 10000), fact(payment, "failed", "pi")])
    event = (
        "{'n': 0, 'provider': 'stripe', 'account': '', 'livemode': false, 'type': 'charge.updated', 'headers': {},"
        " 'body': '{}', 'address': '', 'event_id': 'evt_'}"
    ).replace("'", '"')
    receive = "perform surety.receive_webhooks(jsonb_build_array('{}'::jsonb || jsonb_build_object('event_id', n)))"
    body = (
        "declare n text := (select count(*) from surety.provider_events);"
        f" begin {receive.replace('{}', event)};"
        " if n::int > 20 then raise exception 'it follows new events'; end if; return null; end"
    )
    conn.execute(f"create function surety.meanwhile() returns trigger language plpgsql as $${body}$$".encode())
    conn.execute(
        "create trigger meanwhile after update on surety.provider_events for each statement"
        " execute function surety.meanwhile()"
    )
    conn.execute("select surety.redact_events('', '', 1)")
    result = run("customers", "erase", "--merchant", merchant, "--payment", payment)
    assert result.exit_code == 0, result.output
    [(received,)] = conn.execute("select count(*) from surety.provider_events").fetchall()
    # One before the command, and one for each of its two pages, of which the second is empty.
    assert received == 3
