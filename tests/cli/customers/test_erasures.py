"""A payer is forgotten: a marker in every field that can hold a payer's data is in no table after an erasure."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from jobs.polling import poll_balance_transactions, poll_events
from jobs.worker import Worker
from tests.cli.conftest import Run, refused, said
from tests.support.payments import (
    Connection,
    add_merchant,
    command,
    create,
    fact,
    ledger_of,
    pay,
    record,
    request,
    state_of,
    violations,
)
from tests.support.sandbox_process import SandboxProcess, running_sandbox
from tests.support.workers import NO_AUTOMATIC_RETRY, in_process_worker, run_until_idle, shorten_delays

MARKER = "zq7marker"
EMAIL = f"Zoë.{MARKER}@payer.example"
METADATA = {"note": f"for {MARKER}", f"{MARKER}_key": "1"}
PAYER: dict[str, Any] = {
    "customer": {"email": EMAIL, "name": f"Ada {MARKER}"},
    "description": f"A gift for {MARKER}",
    "metadata": METADATA,
    "return_url": f"https://shop.example/paid?payer={MARKER}",
}

NEIGHBOUR: dict[str, Any] = {
    "customer": {"email": "neighbour@payer.example", "name": "A neighbour"},
    "description": "neighbour",
}


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SandboxProcess]:
    options = ("--payout-seconds=0", "--transaction-seconds=0", "--available-seconds=0")
    with running_sandbox(tmp_path_factory.mktemp("erasures"), *options) as running:
        yield running


def tables_with(conn: Connection, text: str) -> dict[str, int]:
    """How many rows of each table hold a text, in any column, in upper or lower case, also within bytes."""
    names = conn.execute(
        "select c.oid::regclass::text from pg_class as c join pg_namespace as n on n.oid = c.relnamespace"
        " where c.relkind = 'r' and c.relpersistence <> 't' and n.nspname not in ('pg_catalog', 'information_schema')"
    ).fetchall()
    found: dict[str, int] = {}
    for (name,) in names:
        query = f"select count(*) from {name} as t where t::text ilike any(%s)"
        [(rows,)] = conn.execute(query.encode(), ([f"%{text}%", f"%{text.encode().hex()}%"],)).fetchall()
        if rows:
            found[name.partition("_20")[0]] = found.get(name.partition("_20")[0], 0) + rows
    return found


def planted(value: Any, name: str = "") -> Any:
    """A provider's object with the marker in every text that is no id and no word of a fixed list."""
    kept = {"id", "object", "status", "currency", "type", "reason", "api_version", "reporting_category"}
    match value:
        case dict():
            return {key: planted(part, key) for key, part in value.items()}
        case list():
            return [planted(part, name) for part in value]
        case str() if name not in kept and not name.startswith("surety_") and "_" not in value[:6]:
            return f"{MARKER} {value}"
        case None if name not in {"latest_charge", "payment_intent", "account"}:
            return f"A {MARKER}"
    return value


def receive(conn: Connection, event: dict[str, Any], n: int = 0) -> None:
    """Store an event as the receiver does."""
    webhook = {
        "n": n, "provider": "stripe", "account": "", "livemode": False, "event_id": f"{event['id']}_{n}",
        "type": event["type"], "headers": {"stripe-signature": "t"}, "body": json.dumps(event), "address": "127.0.0.1",
    }  # fmt: skip
    conn.execute("select surety.receive_webhooks(%s)", (json.dumps([webhook]),))


async def live(conn: Connection, worker: Worker, sandbox: SandboxProcess, key: bytes) -> tuple[str, str]:
    """A payment with a partial refund and one with a lost dispute, the marker wherever a payer's data can be."""
    paid, disputed = (row["payment_id"] for row in create(conn, [request(key, **PAYER) for _ in range(2)]))
    await run_until_idle(worker, "submit", "confirm", "expect_settlement")
    command(conn, "create_refund", key, payment_id=paid, amount=1000, metadata=METADATA)
    await run_until_idle(worker, "refund")
    [(intent,)] = conn.execute("select provider_id from surety.payments where id = %s", (disputed,)).fetchall()
    dispute = sandbox.control("disputes", {"payment_intent": intent})["id"]
    await poll_events(worker)
    await run_until_idle(worker, "apply_webhooks")
    [(dispute_id,)] = conn.execute("select id from surety.disputes").fetchall()
    command(conn, "submit_evidence", key, dispute_id=dispute_id, evidence={"uncategorized_text": f"{MARKER} has it"})
    sandbox.control(f"disputes/{dispute}", {"outcome": "lost"})
    await poll_events(worker)
    await run_until_idle(worker, "apply_webhooks")
    await poll_balance_transactions(worker)
    for number, event in enumerate(sandbox.get("/v1/events", {"limit": 100})["data"]):
        receive(conn, planted(event), number)
    await run_until_idle(worker, "apply_webhooks")
    body = json.dumps({"note": MARKER, "payment": paid}).encode()
    conn.execute("select surety.store_rejected_webhook('stripe', 'wrong-signature', 'no', '{}', %s, '')", (body,))
    return paid, disputed


def kept_of(conn: Connection) -> list[Any]:
    """What an erasure must not change."""
    tables = ("ledger.transfers", "ledger.balances", "surety.steps", "surety.facts", "outbox.events")
    digest = "select md5(string_agg(t::text, '' order by t::text)) from {} as t"
    return [conn.execute(digest.format(table).encode()).fetchone() for table in tables]


async def test_no_table_holds_a_payer_after_an_erasure(
    run: Run, conn: Connection, database: str, sandbox: SandboxProcess
) -> None:
    shorten_delays(conn, NO_AUTOMATIC_RETRY)
    merchant, key = add_merchant(conn)
    async with in_process_worker(database, sandbox.url) as worker:
        paid, disputed = await live(conn, worker, sandbox, key)
        pay(conn, key, **NEIGHBOUR)
        await run_until_idle(worker, "submit", "confirm", "expect_settlement", "apply_webhooks")
        await poll_events(worker)
        await poll_balance_transactions(worker)
        before, neighbours = tables_with(conn, MARKER), tables_with(conn, "neighbour")
        assert before.keys() >= {
            *("surety.payments", "surety.payment_labels", "surety.idempotency_keys", "surety.calls"),
            *("surety.refunds", "surety.disputes", "surety.provider_events", "surety.rejected_webhooks"),
        }
        kept, money = kept_of(conn), ledger_of(conn)
        words = ("customers", "erase", "--merchant", merchant, "--email", EMAIL.upper())
        counted = said(run(*words, "--dry-run"))
        assert tables_with(conn, MARKER) == before
        shown = said(run(*words))
        assert counted.replace("rows to change", "rows changed").split() == shown.split()
        assert tables_with(conn, MARKER) == {}
        assert tables_with(conn, "neighbour") == neighbours
        [(intent,)] = conn.execute("select provider_id from surety.payments where id = %s", (paid,)).fetchall()
        assert "the provider still holds: " in shown and intent in shown
        assert (kept_of(conn), ledger_of(conn)) == (kept, money)
        assert {state_of(conn, paid), state_of(conn, disputed)} == {"partially_refunded", "reversed"}
        assert not violations(conn)

        # What the provider reports later is stored without the data, and works.
        sandbox.control("refunds", {"payment_intent": intent, "amount": 500})
        await poll_events(worker)
        for number, event in enumerate(sandbox.get("/v1/events", {"limit": 100})["data"]):
            receive(conn, planted(event), 1000 + number)
        await run_until_idle(worker, "apply_webhooks")
        assert tables_with(conn, MARKER).keys() <= {"surety.provider_events"}
        others = conn.execute("select body from surety.provider_events where body ilike %s", (f"%{MARKER}%",))
        assert [body for (body,) in others if intent in body or paid in body] == []
        assert conn.execute("select refunded_minor from surety.payments where id = %s", (paid,)).fetchone() == (1500,)
        assert not violations(conn)
    snapshot = audited(conn)
    assert len(snapshot["email_digest"]) == 64 and snapshot["payments"] == 2
    assert refused(run(*words)) == f"nothing of {merchant} was found: no payment and no customer"


def audited(conn: Connection) -> dict[str, Any]:
    [(snapshot,)] = conn.execute("select snapshot from audit.entries where outcome = 'payer erased'").fetchall()
    return dict(snapshot)


def test_repeated_request_gets_its_answer_without_the_data(run: Run, conn: Connection) -> None:
    merchant, key = add_merchant(conn)
    asked = request(key, **PAYER, reference="order-1")
    [made] = create(conn, [asked])
    record(conn, [fact(made["payment_id"], "submitted", "pi", 10000), fact(made["payment_id"], "failed", "pi")])
    said(run("customers", "erase", "--merchant", merchant, "--payment", made["payment_id"]))
    [again] = create(conn, [asked])
    assert (again["status"], again["is_replayed"], again["payment_id"]) == (201, True, made["payment_id"])
    first, repeated = json.loads(made["body"]), json.loads(again["body"])
    erased: dict[str, Any] = {
        "customer": None,
        "description": None,
        "metadata": {},
        "return_url": "https://shop.example/paid",
    }
    assert repeated == first | erased and list(repeated) == list(first)
    assert repeated["reference"] == "order-1"


def test_payment_in_progress_is_left_and_erased_when_it_has_ended(run: Run, conn: Connection) -> None:
    merchant, key = add_merchant(conn)
    ended, waiting = (row["payment_id"] for row in create(conn, [request(key, **PAYER) for _ in range(2)]))
    record(conn, [fact(ended, "submitted", "pi", 10000), fact(ended, "failed", "pi")])
    words = ("customers", "erase", "--merchant", merchant, "--email", EMAIL)
    refusal = refused(run(*words))
    assert refusal == f"1 payment in progress, not erased: {waiting}: initiated"
    names = conn.execute("select id, customer ->> 'name' from surety.payments").fetchall()
    assert sorted(names) == sorted([(ended, None), (waiting, f"Ada {MARKER}")])
    record(conn, [fact(waiting, "submitted", "pi", 10000), fact(waiting, "failed", "pi")])
    said(run(*words))
    assert tables_with(conn, MARKER) == {}
    assert not violations(conn)


def test_erased_payment_in_progress_again_keeps_its_mark(conn: Connection) -> None:
    _, key = add_merchant(conn)
    [payment_id] = pay(conn, key, **PAYER)
    record(conn, [fact(payment_id, "submitted", "pi"), fact(payment_id, "captured", "ch", 10000)])
    for revision, (kind, status) in enumerate((("dispute_opened", "needs_response"), ("dispute_lost", "lost"))):
        record(conn, [fact(payment_id, kind, "dp", 10000, revision=revision, data={"status": status})])

    def erase() -> Any:
        conn.execute("select surety.begin_erasure(%s)", ([payment_id],))
        [(counts,)] = conn.execute("select surety.erase_payment(%s)", (payment_id,)).fetchall()
        marks = conn.execute("select subject_id from surety.erasures").fetchall()
        return counts.get("refused"), marks == [(payment_id,)]

    assert erase() == (None, True)
    appeal = {"status": "appeal_needs_response"}
    record(conn, [fact(payment_id, "dispute_opened", "dp", 10000, revision=2, data=appeal)])
    assert state_of(conn, payment_id) == "disputed"
    assert erase() == ("disputed", True), "what the provider reports is stored without the payer's data"


def test_answer_without_a_payer_keeps_its_bytes(run: Run, conn: Connection) -> None:
    merchant, key = add_merchant(conn)
    [payment_id] = pay(conn, key, **PAYER)
    record(conn, [fact(payment_id, "submitted", "pi"), fact(payment_id, "captured", "ch", 10000)])
    refund = command(conn, "create_refund", key, payment_id=payment_id, amount=10000)["body"]["id"]
    answer = "select response from surety.idempotency_keys where response like '%%' || %s || '%%'"
    before = conn.execute(answer, (refund,)).fetchall()
    record(conn, [fact(payment_id, "refund_succeeded", "re", 10000, data={"refund": refund})])
    said(run("customers", "erase", "--merchant", merchant, "--payment", payment_id))
    assert tables_with(conn, MARKER) == {}
    assert len(before) == 1
    assert conn.execute(answer, (refund,)).fetchall() == before


def test_customer_is_erased_with_its_payments_and_saved_methods(run: Run, conn: Connection) -> None:
    merchant, key = add_merchant(conn)
    fields = {"email": EMAIL, "name": f"Ada {MARKER}", "phone": "+1", "description": MARKER, "metadata": METADATA}
    customer = command(conn, "create_customer", key, **fields)["body"]["id"]
    [payment_id] = pay(conn, key, customer_id=customer, description=MARKER, metadata=METADATA)
    record(conn, [fact(payment_id, "submitted", "pi", 10000), fact(payment_id, "failed", "pi")])
    assert tables_with(conn, MARKER).keys() >= {"surety.customers", "surety.payments", "surety.idempotency_keys"}
    said(run("customers", "erase", "--merchant", merchant, "--email", EMAIL))
    assert tables_with(conn, MARKER) == {}
    [(erased, email)] = conn.execute("select erased_at is not null, email from surety.customers").fetchall()
    assert (erased, email) == (True, None)
    assert not violations(conn)


def test_killed_erasure_is_finished_by_a_repetition(run: Run, conn: Connection) -> None:
    merchant, key = add_merchant(conn)
    payments = sorted(row["payment_id"] for row in create(conn, [request(key, **PAYER) for _ in range(3)]))
    for payment_id in payments:
        record(conn, [fact(payment_id, "submitted", "pi", 10000), fact(payment_id, "failed", "pi")])
    # Its second payment ends it, as the death of its process would.
    body = "create function surety.die() returns trigger language plpgsql as 'begin raise exception ''killed''; end'"
    conn.execute(body.encode())
    trigger = (
        "create trigger die before delete on surety.payment_labels for each row"
        f" when (old.payment_id = '{payments[1]}') execute function surety.die()"
    )
    conn.execute(trigger.encode())
    words = ("customers", "erase", "--merchant", merchant, "--email", EMAIL)
    assert run(*words).exit_code != 0
    assert tables_with(conn, MARKER)["surety.payments"] == 2
    conn.execute("drop trigger die on surety.payment_labels")
    said(run(*words))
    assert tables_with(conn, MARKER) == {}


@pytest.mark.parametrize(
    ("words", "report"),
    [
        ((), "give one of --email, --payment and --customer"),
        (("--email", EMAIL, "--payment", "pay_1"), "give one of --email, --payment and --customer"),
    ],
)
def test_erasure_that_names_no_payer_is_refused(
    run: Run, conn: Connection, words: tuple[str, ...], report: str
) -> None:
    merchant, _ = add_merchant(conn)
    assert refused(run("customers", "erase", "--merchant", merchant, *words)) == report
    for subject in ("--payment", "--customer", "--email"):
        unknown = refused(run("customers", "erase", "--merchant", merchant, subject, "none"))
        assert unknown == f"nothing of {merchant} was found: no payment and no customer"
    unknown = refused(run("customers", "erase", "--merchant", "mer_none", "--email", EMAIL))
    assert unknown == "--merchant: there is no merchant mer_none"


def test_payment_of_another_merchant_is_not_erased(run: Run, conn: Connection) -> None:
    merchant, _ = add_merchant(conn)
    _, neighbours_key = add_merchant(conn)
    [row] = create(conn, [request(neighbours_key, **PAYER)])
    for words in (("--email", EMAIL), ("--payment", row["payment_id"])):
        assert "nothing of" in refused(run("customers", "erase", "--merchant", merchant, *words))
    assert tables_with(conn, MARKER)["surety.payments"] == 1
