"""The receiver of webhooks over real sockets: stored and rejected webhooks, and the limits under a flood."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from typing import Any

import httpx
import msgspec
import pytest
import stripe

from app.receiver import BODY_BYTES_MAX, REJECTIONS_PER_SECOND_MAX, InvalidWebhook, verify_signature
from app.sandbox.stripe.webhooks import signature
from tests.support.http_client import (
    CONTEXT,
    SECRETS,
    Connection,
    ServerProcess,
    connect_as_owner,
    problem,
    running_server,
    unique_name,
)


@pytest.fixture(scope="module")
def receiver(module_database: str) -> Iterator[ServerProcess]:
    with running_server("webhooks", module_database) as running:
        yield running


@pytest.fixture(scope="module")
def client(receiver: ServerProcess) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=receiver.url, verify=CONTEXT, timeout=30) as made:
        yield made


def event(**fields: Any) -> bytes:
    """An event as Stripe sends it, with an id of its own."""
    known = {"id": unique_name("evt_"), "object": "event", "type": "payment_intent.succeeded", "livemode": False}
    return msgspec.json.encode(
        {**known, "api_version": "2026-10-28.endive", "data": {"object": {"id": "pi_1"}}, **fields}
    )


def deliver(
    client: httpx.Client, body: bytes, *, secret: str = SECRETS[0], ahead: float = 0, more: dict[str, str] | None = None
) -> httpx.Response:
    signed = {"Stripe-Signature": signature(body, secret, int(time.time() + ahead)), "Content-Type": "application/json"}
    return client.post("/stripe", content=body, headers=signed | (more or {}))


def one(conn: Connection, query: str, *values: Any) -> Any:
    row = conn.execute(query.encode(), values).fetchone()
    assert row is not None
    return row[0]


def stored(conn: Connection, body: bytes) -> int:
    """How often the very bytes of a webhook are stored."""
    return int(one(conn, "select count(*) from surety.provider_events where body = %s", body.decode()))


def rejected(conn: Connection, body: bytes) -> list[str]:
    """Why a webhook was kept as rejected, if it was."""
    rows = conn.execute("select reason from surety.rejected_webhooks where body = %s", (body[:4096],)).fetchall()
    return [reason for (reason,) in rows]


def test_signed_webhook_without_secrets_is_stored_byte_for_byte_and_queued(
    client: httpx.Client, rights: Connection
) -> None:
    body = event(data={"object": {"id": "pi_ä", "nul": "\0"}}).replace(b",", b" ,\n")
    known = msgspec.json.decode(body)
    answer = deliver(client, body, more={"Authorization": "Bearer secret", "User-Agent": "Stripe/1.0"})
    assert (answer.status_code, answer.json()) == (200, {"received": True})
    row = rights.execute(
        "select id, provider, account, livemode, event_id, type, headers from surety.provider_events where body = %s",
        (body.decode(),),
    ).fetchone()
    assert row is not None
    provider_event_id, *columns, headers = row
    assert columns == ["stripe", "", False, known["id"], known["type"]]
    assert headers.keys() == {"stripe-signature", "content-type", "user-agent"}
    assert (
        one(
            rights,
            "select count(*) from outbox.events where type = 'webhook.received' and aggregate_id = %s",
            provider_event_id,
        )
        == 1
    )
    assert (
        one(
            rights,
            "select count(*) from audit.entries where kind = 'webhook' and snapshot ->> 'event' = %s",
            known["id"],
        )
        == 1
    )


def test_a_client_secret_is_not_stored(client: httpx.Client, rights: Connection) -> None:
    body = event(data={"object": {"id": "pi_1", "client_secret": 'pi_1_secret_of"the\\payer', "amount": 5}})
    assert deliver(client, body).status_code == 200
    kept = one(rights, "select body from surety.provider_events where event_id = %s", msgspec.json.decode(body)["id"])
    assert "payer" not in kept
    assert msgspec.json.decode(kept)["data"]["object"] == {"id": "pi_1", "client_secret": None, "amount": 5}


def test_webhook_schedules_the_apply_handler(client: httpx.Client, rights: Connection) -> None:
    deliver(client, event())
    while not one(
        rights, "select count(*) from procrastinate.procrastinate_jobs where queueing_lock = 'drain:apply_webhooks'"
    ):
        pass


def test_repeated_webhook_is_acknowledged_and_stored_once(client: httpx.Client, rights: Connection) -> None:
    body = event()
    assert [deliver(client, body).status_code for _ in range(3)] == [200] * 3
    assert stored(rights, body) == 1
    known = msgspec.json.decode(body)["id"]
    outcomes = rights.execute(
        "select outcome from audit.entries where kind = 'webhook' and snapshot ->> 'event' = %s order by id", (known,)
    ).fetchall()
    assert sorted(outcomes) == [("received",), ("repeated",), ("repeated",)]


async def test_concurrent_copies_of_a_webhook_are_stored_once(receiver: ServerProcess, rights: Connection) -> None:
    body = event()
    headers = {"Stripe-Signature": signature(body, SECRETS[0], int(time.time()))}
    async with httpx.AsyncClient(base_url=receiver.url, verify=CONTEXT, timeout=30) as client:
        answers = await asyncio.gather(*(client.post("/stripe", content=body, headers=headers) for _ in range(40)))
    assert {answer.status_code for answer in answers} == {200}
    assert stored(rights, body) == 1


def test_one_event_id_at_two_accounts_is_two_events(client: httpx.Client, rights: Connection) -> None:
    known = unique_name("evt_")
    bodies = [event(id=known), event(id=known, account="acct_1"), event(id=known, account="acct_2")]
    assert {deliver(client, body).status_code for body in bodies} == {200}
    assert [stored(rights, body) for body in bodies] == [1, 1, 1]


def test_webhook_of_another_mode_or_api_version_is_stored(client: httpx.Client, rights: Connection) -> None:
    for body in (event(livemode=True), event(api_version="2020-08-27"), event(api_version=None)):
        assert deliver(client, body).status_code == 200
        assert stored(rights, body) == 1


@pytest.mark.parametrize(
    ("context", "account"), [("acct_1", "acct_1"), ("org_1/acct_2", "acct_2"), ("org_1", ""), (None, "")]
)
def test_thin_event_is_stored_for_the_account_of_its_context(
    client: httpx.Client, rights: Connection, context: str | None, account: str
) -> None:
    known = unique_name("evt_")
    thin = {"id": known, "object": "v2.core.event", "type": "v2.core.event_destination.ping", "livemode": False}
    assert deliver(client, msgspec.json.encode(thin | {"context": context})).status_code == 200
    query = "select account from surety.provider_events where event_id = %s"
    assert one(rights, query, known) == account


@pytest.mark.parametrize("secret", SECRETS)
def test_both_secrets_are_valid_during_rotation(client: httpx.Client, secret: str) -> None:
    assert deliver(client, event(), secret=secret).status_code == 200


def test_one_valid_signature_of_several_is_enough(client: httpx.Client) -> None:
    body = event()
    now = int(time.time())
    both = f"t={now},v1={'0' * 64},v0=x,{signature(body, SECRETS[1], now).partition(',')[2]}"
    assert client.post("/stripe", content=body, headers={"Stripe-Signature": both}).status_code == 200


@pytest.mark.parametrize("ahead", [-280, 280])
def test_small_clock_difference_is_tolerated(client: httpx.Client, ahead: float) -> None:
    assert deliver(client, event(), ahead=ahead).status_code == 200


@pytest.mark.parametrize("ahead", [-330, 330, -(10**6)])
def test_old_or_future_signature_is_rejected(client: httpx.Client, rights: Connection, ahead: float) -> None:
    body = event()
    problem(deliver(client, body, ahead=ahead), 400, "invalid-request")
    assert stored(rights, body) == 0


@pytest.mark.parametrize(
    "header",
    [
        "",
        "t=1",
        "v1=00",
        "t=x,v1=00",
        "t=-1,v1=00",
        "t=99999999999999999999,v1=00",
        "t={now},v1=",
        "t={now},v1={zeros}",
        "t={now},v0={good}",
        "t={now},t={now},v1={good}",
        "v1=é",
    ],
)
def test_webhook_with_an_invalid_signature_is_not_stored(client: httpx.Client, rights: Connection, header: str) -> None:
    body = event()
    now = int(time.time())
    good = signature(body, SECRETS[0], now).rpartition("=")[2]
    sent = header.format(now=now, zeros="0" * 64, good=good).encode()
    answer = client.post("/stripe", content=body, headers={b"Stripe-Signature": sent})
    problem(answer, 400, "invalid-request")
    assert stored(rights, body) == 0


def test_the_signature_covers_every_byte(client: httpx.Client, rights: Connection) -> None:
    body = event()
    headers = {"Stripe-Signature": signature(body, SECRETS[0], int(time.time()))}
    problem(client.post("/stripe", content=body + b" ", headers=headers), 400, "invalid-request")
    problem(client.post("/stripe", content=body.replace(b"pi_1", b"pi_2"), headers=headers), 400, "invalid-request")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"no json",
        b"[]",
        b"[" * 5000,
        b'{"id": "evt_1", "type": "x"}',
        b'{"id": "", "type": "x", "livemode": false}',
        b'{"id": "evt\\u0000", "type": "x", "livemode": false}',
        b'{"id": "evt_1", "type": "x", "livemode": false, "more": "\xff"}',
    ],
)
def test_signed_body_that_is_not_an_event_is_rejected(client: httpx.Client, body: bytes) -> None:
    problem(deliver(client, body), 400, "invalid-request")


def test_rejected_webhooks_are_stored_truncated_and_audited_up_to_a_limit(database: str) -> None:
    with running_server("webhooks", database) as running, connect_as_owner(database) as conn:
        before = one(conn, "select count(*) from surety.rejected_webhooks")
        # Larger than the part that the database gets, within the bound of a body.
        body = event(filler="x" * 300_000)
        with httpx.Client(base_url=running.url, verify=CONTEXT, timeout=30) as client:
            began = time.monotonic()
            for _ in range(100):
                problem(
                    client.post("/stripe", content=body, headers={"Stripe-Signature": "t=1,v1=0"}),
                    400,
                    "invalid-request",
                )
            seconds = time.monotonic() - began
            assert deliver(client, event()).status_code == 200
        kept = one(conn, "select count(*) from surety.rejected_webhooks") - before
        assert 1 <= kept <= REJECTIONS_PER_SECOND_MAX * (seconds + 2)
        assert rejected(conn, body) == ["the signature does not hold"] * kept
        assert one(conn, "select max(length(body)) from surety.rejected_webhooks") == 4096
        assert one(conn, "select max(body_bytes) from surety.rejected_webhooks") == len(body)
        audited = one(conn, "select count(*) from audit.entries where kind = 'webhook' and outcome = 'rejected'")
        assert audited == one(conn, "select count(*) from surety.rejected_webhooks")
    # A server that ends has written its counts.
    with connect_as_owner(database) as conn:
        counted = "select sum(count) from audit.refusals where kind = 'webhook' and reason = 'wrong-signature'"
        assert one(conn, counted) == 100


def test_only_a_hundred_rejected_webhooks_an_hour_and_reason_leave_rows(conn: Connection) -> None:
    store = "select surety.store_rejected_webhook('stripe', 'no-event', 'text ' || n, '{}', '', '127.0.0.1')"
    conn.execute(f"{store} from generate_series(1, 250) as n".encode())
    assert one(conn, "select sum(count) from audit.refusals") == 250
    # Two hours, if the hour turned between.
    assert one(conn, "select count(*) from surety.rejected_webhooks") in {100, 200}
    assert one(conn, "select count(*) from audit.entries") == one(conn, "select count(*) from surety.rejected_webhooks")


def test_only_the_newest_thousand_rejected_webhooks_are_kept(conn: Connection) -> None:
    conn.execute(
        "insert into surety.rejected_webhooks (id, provider, reason, headers, body, body_bytes, received_at)"
        " select surety.new_id('rej', now() - n * interval '1 s'), 'stripe', 'old', '{}', '', 0, now()"
        " from generate_series(1, 1500) as n"
    )
    conn.execute("select surety.store_rejected_webhook('stripe', 'no-event', 'new', '{}', ''::bytea, '')")
    assert one(conn, "select count(*) from surety.rejected_webhooks") == 1000
    assert one(conn, "select count(*) from surety.rejected_webhooks where reason = 'new'") == 1


def test_a_body_too_large_is_refused(client: httpx.Client) -> None:
    problem(deliver(client, event(filler="x" * BODY_BYTES_MAX)), 413, "too-large")
    large = event(filler="x" * (BODY_BYTES_MAX - 500))
    assert deliver(client, large).status_code == 200


def test_a_signed_event_of_some_megabytes_is_stored_whole(client: httpx.Client, rights: Connection) -> None:
    large = event(filler="é" * (1024 * 1024))
    assert len(large) > 2 * 1024 * 1024
    assert deliver(client, large).status_code == 200
    assert stored(rights, large) == 1


def test_webhook_that_could_not_be_stored_gets_503(client: httpx.Client, rights: Connection) -> None:
    body = event()
    rights.execute("alter function surety.receive_webhooks(jsonb) rename to away")
    answer = deliver(client, body)
    problem(answer, 503, "unavailable")
    assert answer.headers["retry-after"] == "1"
    rights.execute("alter function surety.away(jsonb) rename to receive_webhooks")
    assert deliver(client, body).status_code == 200
    assert stored(rights, body) == 1


def test_other_paths_and_methods_are_refused(client: httpx.Client) -> None:
    problem(client.get("/stripe"), 405, "method-not-allowed")
    problem(client.post("/paypal"), 404, "not-found")
    assert client.get("/health").json() == {"status": "ok"}


def test_signatures_are_compatible_with_the_stripe_sdk() -> None:
    body, now = event(), int(time.time())
    theirs = stripe.WebhookSignature._compute_signature(f"{now}.{body.decode()}", SECRETS[0])
    verify_signature(body, f"t={now},v1={theirs}".encode(), [SECRETS[0].encode()], now)
    assert stripe.WebhookSignature.verify_header(body.decode(), signature(body, SECRETS[0], now), SECRETS[0], 300)
    with pytest.raises(InvalidWebhook):
        verify_signature(body, f"t={now},v1={theirs}".encode(), [SECRETS[1].encode()], now)
