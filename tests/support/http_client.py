"""Start API processes, add a merchant with a key, and send HTTP requests as a merchant's system does."""

from __future__ import annotations

import itertools
import os
import ssl
import subprocess
import sys
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any

import httpx
import msgspec
import psycopg

from app.cli.keys import SCOPES
from app.web.keys import new_key
from db.connect import harden
from db.embedded.processes import die_with_parent

Json = dict[str, Any]
Connection = psycopg.Connection[tuple[Any, ...]]

SECRETS = ("whsec_new", "whsec_old")

# Reading the authorities' certificates takes longer than most tests here.
CONTEXT = ssl.create_default_context()

_numbers = itertools.count(1)


class ServerProcess:
    """`surety api` or `surety webhooks` as a process on a free port of loopback, with these settings."""

    def __init__(self, command: str, database: str, *options: str, **settings: str) -> None:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("SURETY_", "STRIPE_"))}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "app.cli", command, "--port", "0", *options],
            env=kept | {"DATABASE_URL": database, "STRIPE_WEBHOOK_SECRET": ",".join(SECRETS)} | settings,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=die_with_parent(),  # noqa: PLW1509  it calls nothing that another thread could have locked
        )
        assert self.process.stdout is not None
        announced = self.process.stdout.readline()
        assert announced.startswith("listening on "), announced + self.process.communicate()[1]
        self.url = "http://" + announced.removeprefix("listening on ").strip()

    def stop(self) -> tuple[int, str]:
        """End it as an operator would: the exit status and the log."""
        self.process.terminate()
        _, log = self.process.communicate(timeout=30)
        return self.process.returncode, log


@contextmanager
def running_server(command: str, database: str, *options: str, **settings: str) -> Generator[ServerProcess]:
    """A process that ends in good order."""
    running = ServerProcess(command, database, *options, **settings)
    try:
        yield running
    finally:
        if running.process.returncode is None:
            status, log = running.stop()
            assert status == 0, log


class Merchant:
    """A merchant with a key, talking to the API."""

    def __init__(self, conn: Connection, url: str, name: str = "Acme Books", account: str = "") -> None:
        self.conn = conn
        row = conn.execute("select surety.add_merchant(%s, %s)", (name, account)).fetchone()
        assert row is not None
        self.id: str = row[0]
        self.key = self.another_key()
        headers = {"Authorization": f"Bearer {self.key}"}
        self.client = httpx.Client(base_url=url, timeout=30, headers=headers, verify=CONTEXT)

    def another_key(
        self,
        name: str | None = None,
        scopes: Sequence[str] = SCOPES,
        networks: Sequence[str] = (),
        expires_in: str | None = None,
    ) -> str:
        """A further key, under a name of its own unless one is given."""
        [(livemode,)] = self.conn.execute("select surety.read_livemode()").fetchall()
        key = new_key(livemode=livemode)
        row = self.conn.execute(
            "select surety.add_api_key(%s, %s, %s, 'test', %s, %s::text[], %s::cidr[],"
            " surety.time_now() + %s::interval)",
            (self.id, key.hash, key.hint, name or unique_name("key"), list(scopes), list(networks), expires_in),
        ).fetchone()
        assert row is not None
        self.key_id: str = row[0]
        return key.text

    def post(self, body: Json | bytes | None = None, *, key: str | None = None, **headers: str) -> httpx.Response:
        """POST /v1/payments with a fresh Idempotency-Key unless one is given."""
        content = msgspec.json.encode(payment() if body is None else body) if not isinstance(body, bytes) else body
        sent = {
            "Content-Type": "application/json",
            "Idempotency-Key": unique_name("key") if key is None else key,
        } | {name.replace("_", "-"): value for name, value in headers.items()}
        return self.client.post("/v1/payments", content=content, headers=sent)

    def pay(self, **fields: Any) -> Json:
        """A new payment's document."""
        answer = self.post(payment(**fields))
        assert answer.status_code == 201, answer.text
        document: Json = answer.json()
        return document

    def get(self, path: str, **query: Any) -> Json:
        """The answer to a GET that succeeds."""
        answer = self.client.get(path, params=query)
        assert answer.status_code == 200, answer.text
        document: Json = answer.json()
        return document

    def count(self) -> int:
        """How many payments the merchant has."""
        row = self.conn.execute("select count(*) from surety.payments where merchant_id = %s", (self.id,)).fetchone()
        assert row is not None
        return int(row[0])

    def denials(self) -> list[tuple[str, str]]:
        """What the audit trail has about denied requests: the reason and the route."""
        return [
            (reason, route)
            for reason, route in self.conn.execute(
                "select reason, snapshot ->> 'route' from audit.entries"
                " where merchant_id = %s and kind = 'denied' order by id",
                (self.id,),
            )
        ]


def unique_name(what: str) -> str:
    """A name that is new in this run."""
    return f"{what}-{next(_numbers)}"


def payment(**fields: Any) -> Json:
    """A request's body; a field given as None is left out."""
    body = {
        "amount": 4999, "currency": "usd", "payment_method": {"type": "card", "token": "pm_card_visa"},
        "return_url": "https://shop.example/return", **fields,
    }  # fmt: skip
    return {name: value for name, value in body.items() if value is not None}


def problem(answer: httpx.Response, status: int, name: str) -> Json:
    """The problem document of an answer, held to its form."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    document: Json = answer.json()
    assert document["type"] == f"/problems/{name}"
    assert document["status"] == status
    assert document["request_id"] == answer.headers["request-id"]
    assert document["title"]
    assert document["detail"]
    if name == "invalid-request":
        assert document["errors"]
        assert all(error["rule"] and error["message"] for error in document["errors"])
    return document


def broken_rules(answer: httpx.Response) -> set[tuple[str, str]]:
    """Field and rule of every rule that a refused request broke."""
    return {(error["field"], error["rule"]) for error in problem(answer, 400, "invalid-request")["errors"]}


def connect_as_owner(database: str) -> Connection:
    """A connection with all rights, in autocommit mode."""
    return psycopg.connect(harden(database, "deploy"), autocommit=True)


def assert_matches(document: Any, struct: Any) -> None:
    """A document has the fields of its struct, of the right types, and no others."""
    decoded = msgspec.convert(document, struct)
    assert set(document) == {field.encode_name for field in msgspec.structs.fields(struct)}
    assert decoded
