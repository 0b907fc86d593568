"""Customers at the provider: created once, before their first payment; saved methods, charged and detached."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import AsyncIterator, Iterator

import pytest

from jobs.drain import claim_batch, handle_batch
from jobs.handlers.calls import record_event_results
from jobs.handlers.customers import UPDATE_CUSTOMER, begin, make_customer_call
from jobs.handlers.table import HANDLERS
from jobs.polling import poll_events, poll_unfinished
from jobs.worker import Worker
from tests.jobs.test_periodic_jobs import move_clock
from tests.jobs.test_webhook_handling import received
from tests.support.payments import Connection, add_merchant, create, pay, request, state_of
from tests.support.sandbox_process import Json, SandboxProcess, running_sandbox
from tests.support.workers import attempts, in_process_worker, run_until_idle, shorten_delays, watch_requests

MANDATE: Json = {"accepted_at": "2026-11-22T14:03:07Z", "ip_address": "203.0.113.7", "user_agent": "Firefox/150"}
SAVING: Json = {"save_method": {"usage": "off_session", "mandate": MANDATE}}


_numbers = itertools.count(1)


@pytest.fixture
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SandboxProcess]:
    with running_sandbox(tmp_path_factory.mktemp("customers"), "--hang-seconds=30") as sandbox:
        yield sandbox


@pytest.fixture
async def worker(database: str, sandbox: SandboxProcess) -> AsyncIterator[Worker]:
    async with in_process_worker(database, sandbox.url, timeout_seconds=1) as worker:
        yield worker


@pytest.fixture
def key_hash(conn: Connection) -> bytes:
    shorten_delays(conn, "{0 s,0 s,0 s,0 s,0 s}")
    conn.execute("update outbox.release_causes set first_delay = '0', delay_max = '0'")
    return add_merchant(conn)[1]


def command(conn: Connection, function: str, key_hash: bytes, **fields: object) -> Json:
    """The document that a command of the API answers."""
    given = {"key_hash": key_hash.hex(), "idempotency_key": f"key-{next(_numbers)}", "request_hash": "00"} | fields
    row = conn.execute(f"select problem, body from api.{function}(%s)".encode(), (json.dumps(given),)).fetchone()
    assert row is not None
    assert row[0] is None, row
    document: Json = json.loads(row[1])
    return document


def at_provider(conn: Connection, customer_id: str) -> tuple[str | None, int, int, Json | None]:
    row = conn.execute(
        "select provider_id, provider_version, version, provider_failure from surety.customers where id = %s",
        (customer_id,),
    ).fetchone()
    assert row is not None
    return row


def methods_of(conn: Connection, customer_id: str) -> list[tuple[str, str, str]]:
    return conn.execute(
        "select id, last4, provider_id from surety.payment_methods where customer_id = %s order by id", (customer_id,)
    ).fetchall()


def shown(conn: Connection, payment_id: str) -> Json:
    """A payment as the API shows it."""
    query = "select shown.document from surety.payments as p, api.show_payment(p) as shown where p.id = %s"
    row = conn.execute(query, (payment_id,)).fetchone()
    assert row is not None
    document: Json = row[0]
    return document


async def run(worker: Worker, *handlers: str) -> None:
    for handler in handlers or ("submit", "update_customer", "confirm", "save_method", "detach_method"):
        await run_until_idle(worker, handler)


async def test_customer_is_created_before_its_first_payment_and_once(
    conn: Connection, sandbox: SandboxProcess, worker: Worker, key_hash: bytes
) -> None:
    ada = {"email": "ada@shop.example", "name": "Ada", "shipping": {"name": "Ada", "address": {"line1": "1 Main St"}}}
    customer = command(conn, "create_customer", key_hash, **ada)["id"]
    assert sandbox.get("/v1/customers")["data"] == []
    payments = pay(conn, key_hash, 3, customer_id=customer)
    await run(worker)
    [found] = sandbox.get("/v1/customers")["data"]
    assert (found["email"], found["name"], found["shipping"]["address"]["line1"]) == (
        "ada@shop.example",
        "Ada",
        "1 Main St",
    )
    assert found["metadata"]["surety_customer"] == customer
    assert [state_of(conn, id) for id in payments] == ["confirmed"] * 3
    assert {intent["customer"] for intent in sandbox.get("/v1/payment_intents")["data"]} == {found["id"]}
    assert at_provider(conn, customer) == (found["id"], 1, 1, None)


async def test_two_workers_create_one_customer(
    conn: Connection, sandbox: SandboxProcess, worker: Worker, key_hash: bytes
) -> None:
    customer = command(conn, "create_customer", key_hash)["id"]
    conn.execute("update outbox.handlers set batch_size = 1")
    payments = pay(conn, key_hash, 2, customer_id=customer)
    batches = [await claim_batch(worker, "submit") for _ in payments]
    await asyncio.gather(*(handle_batch(worker, batch, HANDLERS["submit"]) for batch in batches if batch))
    await run(worker)
    assert len(sandbox.get("/v1/customers")["data"]) == 1
    assert [state_of(conn, id) for id in payments] == ["confirmed"] * 2
    assert conn.execute("select * from surety.discrepancies").fetchall() == []


@pytest.mark.parametrize(("fault", "age"), [("reset", "0 h"), ("reset", "25 h"), ("error_500_after", "0 h")])
@pytest.mark.parametrize("ahead", ["0 s", "20 minutes", "-20 minutes"])
async def test_customer_whose_answer_was_lost_is_found_again_whatever_the_clocks_say(
    conn: Connection, sandbox: SandboxProcess, worker: Worker, key_hash: bytes, fault: str, age: str, ahead: str
) -> None:
    move_clock(conn, ahead)
    customer = command(conn, "create_customer", key_hash)["id"]
    [payment] = pay(conn, key_hash, customer_id=customer)
    sandbox.order("customers.create", fault)
    batch = await claim_batch(worker, "submit")
    assert batch is not None
    await handle_batch(worker, batch, HANDLERS["submit"])
    assert at_provider(conn, customer)[0] is None
    assert len(sandbox.get("/v1/customers")["data"]) == 1
    # As if the key had been forgotten: the send is a day old, by the clocks of both sides.
    query = "update surety.customer_calls set first_sent_at = first_sent_at - %s::interval"
    conn.execute(query.encode(), (age,))
    await run(worker)
    [found] = sandbox.get("/v1/customers")["data"]
    assert (at_provider(conn, customer)[0], state_of(conn, payment)) == (found["id"], "confirmed")


async def test_changes_are_passed_on_and_removed_fields_too(
    conn: Connection, sandbox: SandboxProcess, worker: Worker, key_hash: bytes
) -> None:
    customer = command(conn, "create_customer", key_hash, phone="+1 555 0100", name="Ada")["id"]
    pay(conn, key_hash, customer_id=customer)
    await run(worker)
    command(conn, "update_customer", key_hash, customer_id=customer, phone=None)
    command(conn, "update_customer", key_hash, customer_id=customer, name="Ada King")
    await run(worker, "update_customer")
    [found] = sandbox.get("/v1/customers")["data"]
    assert (found["phone"], found["name"]) == (None, "Ada King")
    assert at_provider(conn, customer) == (found["id"], 3, 3, None)


async def test_change_that_arrives_after_a_newer_one_is_followed_by_the_present_data(
    conn: Connection, sandbox: SandboxProcess, worker: Worker, key_hash: bytes
) -> None:
    customer = command(conn, "create_customer", key_hash, name="Ada")["id"]
    pay(conn, key_hash, customer_id=customer)
    await run(worker)
    command(conn, "update_customer", key_hash, customer_id=customer, name="Ada King")
    batch = await claim_batch(worker, "update_customer")
    assert batch is not None
    [call] = await begin(UPDATE_CUSTOMER, worker, batch, list(batch.event_ids))
    # The worker stands still here, for longer than any request is under way.
    conn.execute("update surety.customer_calls set last_sent_at = last_sent_at - interval '3 minutes'")
    command(conn, "update_customer", key_hash, customer_id=customer, name="Ada Lovelace")
    await run(worker, "update_customer")
    result = await make_customer_call(UPDATE_CUSTOMER, worker, batch, call)
    assert sandbox.get("/v1/customers")["data"][0]["name"] == "Ada King"
    await record_event_results(worker, batch, [{"event_id": call.event_id} | result])
    await run(worker, "update_customer")
    [found] = sandbox.get("/v1/customers")["data"]
    assert (found["name"], at_provider(conn, customer)[1:]) == ("Ada Lovelace", (3, 3, None))


async def test_change_that_the_provider_refuses_is_shown_without_the_address(
    conn: Connection, sandbox: SandboxProcess, worker: Worker, key_hash: bytes
) -> None:
    customer = command(conn, "create_customer", key_hash, email="ada@shop.invalid")["id"]
    [payment] = pay(conn, key_hash, customer_id=customer)
    await run(worker)
    provider_id, passed_on, version, failure = at_provider(conn, customer)
    assert (passed_on, version, failure and failure["code"]) == (1, 1, "email_invalid")
    assert provider_id is not None
    assert "shop.invalid" not in json.dumps(failure)
    assert state_of(conn, payment) == "confirmed"
    assert conn.execute("select 1 from audit.entries where snapshot::text like '%shop.invalid%'").fetchall() == []


async def test_saved_method_is_charged_without_the_payer(
    conn: Connection, sandbox: SandboxProcess, worker: Worker, key_hash: bytes
) -> None:
    customer = command(conn, "create_customer", key_hash)["id"]
    [first] = pay(conn, key_hash, customer_id=customer, **SAVING)
    assert (methods_of(conn, customer), shown(conn, first)["payment_method"]["saved"]) == ([], None)
    await run(worker)
    [(saved, last4, method)] = methods_of(conn, customer)
    assert last4 == "4242"
    row = conn.execute("select mandate, payment_id, exp_year from surety.payment_methods").fetchone()
    assert row == (MANDATE, first, 2030)
    assert shown(conn, first)["payment_method"]["saved"] == saved
    rows = conn.execute(
        "select shown.document from outbox.events as e, api.show_events(array[e.id]) as shown"
        " where e.aggregate_id = %s and e.type = 'customer.payment_method_saved'",
        (customer,),
    ).fetchall()
    [(event,)] = rows
    assert (event["data"]["object"], event["data"]["id"], event["data"]["payment"]) == ("payment_method", saved, first)
    assert event["data"]["detached_at"] is None
    [second] = pay(conn, key_hash, method_token=None, saved_method=saved, off_session=True, return_url=None)
    await run(worker)
    assert [state_of(conn, id) for id in (first, second)] == ["confirmed"] * 2
    newest = sandbox.get("/v1/payment_intents")["data"][0]
    assert (newest["payment_method"], newest["customer"]) == (method, at_provider(conn, customer)[0])
    assert methods_of(conn, customer) == [(saved, last4, method)]


async def test_failed_payment_saves_nothing(conn: Connection, worker: Worker, key_hash: bytes) -> None:
    customer = command(conn, "create_customer", key_hash)["id"]
    [payment] = pay(conn, key_hash, customer_id=customer, method_token="pm_card_chargeDeclined", **SAVING)
    await run(worker)
    await run(worker, "cancel")
    assert (state_of(conn, payment), methods_of(conn, customer)) == ("failed", [])


async def test_bank_that_asks_an_absent_payer_fails_the_payment(
    conn: Connection, sandbox: SandboxProcess, worker: Worker, key_hash: bytes
) -> None:
    customer = command(conn, "create_customer", key_hash)["id"]
    [first] = pay(conn, key_hash, customer_id=customer, method_token="pm_card_authenticationRequired", **SAVING)
    await run(worker)
    assert state_of(conn, first) == "requires_action"
    [intent] = sandbox.get("/v1/payment_intents")["data"]
    sandbox.answer_as_payer(intent["id"], "approve")
    conn.execute("update surety.payments set poll_at = surety.time_now()")
    await poll_unfinished(worker)
    await run(worker)
    [(saved, _, _)] = methods_of(conn, customer)
    [second] = pay(conn, key_hash, method_token=None, saved_method=saved, off_session=True, return_url=None)
    await run(worker)
    await run(worker, "cancel")
    row = conn.execute("select state, failure ->> 'code' from surety.payments where id = %s", (second,)).fetchone()
    assert row == ("failed", "authentication_required")


@pytest.mark.parametrize("fault", [None, "reset", "error_500_after"])
async def test_removed_method_is_detached_at_the_provider(
    conn: Connection, sandbox: SandboxProcess, worker: Worker, key_hash: bytes, fault: str | None
) -> None:
    customer = command(conn, "create_customer", key_hash)["id"]
    pay(conn, key_hash, customer_id=customer, **SAVING)
    await run(worker)
    [(saved, _, method)] = methods_of(conn, customer)
    if fault:
        sandbox.order("payment_methods.detach", fault)
    command(conn, "detach_payment_method", key_hash, payment_method_id=f"{customer}/{saved}")
    await run(worker)
    assert sandbox.get(f"/v1/payment_methods/{method}")["customer"] is None
    assert attempts(conn) == []
    problems = create(conn, [request(key_hash, method_token=None, saved_method=saved, off_session=True)])
    assert problems[0]["detail"]["rule"] == "detached"


async def test_removed_method_stays_at_the_provider_until_accepted_payments_have_used_it(
    conn: Connection, sandbox: SandboxProcess, worker: Worker, key_hash: bytes
) -> None:
    customer = command(conn, "create_customer", key_hash)["id"]
    pay(conn, key_hash, customer_id=customer, **SAVING)
    await run(worker)
    [(saved, _, method)] = methods_of(conn, customer)
    [payment] = pay(conn, key_hash, method_token=None, saved_method=saved, off_session=True, return_url=None)
    command(conn, "detach_payment_method", key_hash, payment_method_id=f"{customer}/{saved}")
    batch = await claim_batch(worker, "detach_method")
    assert batch is not None
    await handle_batch(worker, batch, HANDLERS["detach_method"])
    assert sandbox.get(f"/v1/payment_methods/{method}")["customer"] is not None
    [waiting] = conn.execute("select cause, releases, failures from outbox.retries").fetchall()
    assert waiting == ("method_needed", 1, 0)
    await run(worker, "submit", "confirm")
    assert state_of(conn, payment) == "confirmed"
    conn.execute("update outbox.retries set due_at = surety.time_now()")
    await run(worker)
    assert sandbox.get(f"/v1/payment_methods/{method}")["customer"] is None


async def saved_method(conn: Connection, worker: Worker, key_hash: bytes) -> tuple[str, str, str]:
    """A new customer with a saved payment method: their ids, and the method's at the provider."""
    customer = command(conn, "create_customer", key_hash)["id"]
    pay(conn, key_hash, customer_id=customer, **SAVING)
    await run(worker)
    [(saved, _, method)] = methods_of(conn, customer)
    return customer, saved, method


def events_of_method(conn: Connection, saved: str) -> list[tuple[str, Json]]:
    """The events about a saved payment method, with their data as the API shows them, oldest first."""
    return conn.execute(
        "select e.type, shown.document -> 'data' from outbox.events as e, api.show_events(array[e.id]) as shown"
        " where e.payload ->> 'payment_method' = %s order by e.xid, e.id",
        (saved,),
    ).fetchall()


@pytest.mark.parametrize("is_webhook_lost", [False, True])
async def test_card_that_the_network_replaced_is_shown(
    conn: Connection, sandbox: SandboxProcess, worker: Worker, key_hash: bytes, *, is_webhook_lost: bool
) -> None:
    _, saved, method = await saved_method(conn, worker, key_hash)
    _, _, of_another = await saved_method(conn, worker, key_hash)
    await poll_events(worker)
    sandbox.control(f"payment-methods/{method}", {"exp_month": 7, "exp_year": 2034, "last4": "1881"})
    for _ in range(2):
        if is_webhook_lost:
            await poll_events(worker)
        else:
            [event] = sandbox.get("/v1/events", {"type": "payment_method.automatically_updated"})["data"]
            received(conn, [event])
        await run(worker, "apply_webhooks")
    row = conn.execute("select last4, exp_month, exp_year, brand from surety.payment_methods where id = %s", (saved,))
    assert row.fetchone() == ("1881", 7, 2034, "visa")
    assert conn.execute(
        "select last4 from surety.payment_methods where provider_id = %s", (of_another,)
    ).fetchone() == ("4242",)
    (first, _), (second, data) = events_of_method(conn, saved)
    assert (first, second) == ("customer.payment_method_saved", "customer.payment_method_updated")
    assert (data["last4"], data["detached_at"]) == ("1881", None)
    assert attempts(conn) == []


async def test_method_that_is_removed_at_the_provider_is_removed_here(
    conn: Connection, sandbox: SandboxProcess, worker: Worker, key_hash: bytes
) -> None:
    customer, saved, method = await saved_method(conn, worker, key_hash)
    sandbox.post(f"/v1/payment_methods/{method}/detach", {})
    received(conn, sandbox.get("/v1/events", {"type": "payment_method.detached"})["data"])
    await run(worker, "apply_webhooks", "detach_method")
    assert [type for type, _ in events_of_method(conn, saved)][1:] == ["customer.payment_method_detached"]
    problems = create(conn, [request(key_hash, method_token=None, saved_method=saved, off_session=True)])
    assert problems[0]["detail"]["rule"] == "detached"
    assert command(conn, "detach_payment_method", key_hash, payment_method_id=f"{customer}/{saved}")["detached_at"]
    assert attempts(conn) == []


async def test_method_that_is_gone_at_the_provider_is_removed_here(
    conn: Connection, sandbox: SandboxProcess, worker: Worker, key_hash: bytes
) -> None:
    _, saved, method = await saved_method(conn, worker, key_hash)
    sandbox.control(f"payment-methods/{method}", {"exp_month": 7, "exp_year": 2034, "last4": "1881"})
    [event] = sandbox.get("/v1/events", {"type": "payment_method.automatically_updated"})["data"]
    # As if the provider knew the method no more.
    event["data"]["object"]["id"] = gone = "pm_0123456789abcdefGone0000"
    conn.execute("update surety.payment_methods set provider_id = %s where id = %s", (gone, saved))
    received(conn, [event])
    await run(worker, "apply_webhooks", "detach_method")
    assert [type for type, _ in events_of_method(conn, saved)][1:] == ["customer.payment_method_detached"]
    assert attempts(conn) == []


async def test_method_of_another_system_is_not_fetched(
    conn: Connection, sandbox: SandboxProcess, worker: Worker, key_hash: bytes
) -> None:
    _, _, method = await saved_method(conn, worker, key_hash)
    sandbox.control(f"payment-methods/{method}", {"exp_month": 7, "exp_year": 2034, "last4": "1881"})
    [event] = sandbox.get("/v1/events", {"type": "payment_method.automatically_updated"})["data"]
    event["data"]["object"]["id"] = "pm_of_another_system"
    calls = watch_requests(worker)
    received(conn, [event])
    await run(worker, "apply_webhooks")
    assert [path for path in calls if "payment_methods" in str(path)] == []
    assert attempts(conn) == []


@pytest.mark.parametrize("is_erased_before_its_method_is_saved", [False, True])
async def test_erased_customer_keeps_no_method_at_the_provider(
    conn: Connection,
    sandbox: SandboxProcess,
    worker: Worker,
    key_hash: bytes,
    *,
    is_erased_before_its_method_is_saved: bool,
) -> None:
    customer = command(conn, "create_customer", key_hash)["id"]
    [payment] = pay(conn, key_hash, customer_id=customer, **SAVING)
    await run(worker, "submit", "confirm", *(() if is_erased_before_its_method_is_saved else ("save_method",)))
    for _ in range(2):
        conn.execute("select surety.begin_erasure(%s)", ([payment, customer],))
        conn.execute("select surety.erase_payment(%s)", (payment,))
        conn.execute("select surety.erase_customer(%s, surety.time_now())", (customer,))
    await run(worker)
    [(_, _, method)] = methods_of(conn, customer)
    assert sandbox.get(f"/v1/payment_methods/{method}")["customer"] is None
    row = conn.execute("select mandate, fingerprint, detached_at is not null from surety.payment_methods").fetchone()
    assert row == ({}, None, True)
    types = conn.execute("select type from outbox.events where aggregate_id = %s order by xid, id", (customer,))
    made = [type for (type,) in types if type not in ("customer.created", "customer.payment_method_saved")]
    assert sorted(made) == ["customer.payment_method_detached", "customer.updated"]
    assert attempts(conn) == []
