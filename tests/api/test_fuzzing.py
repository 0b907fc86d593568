"""Unlikely requests: from a fuzzer that reads the OpenAPI document, and from Hypothesis, text by text.

No answer is a 5xx or differs from its description, no secret is stored, no webhook is lost.
"""

from __future__ import annotations

import hmac
import itertools
import json
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.http_client import (
    CONTEXT,
    SECRETS,
    Connection,
    Merchant,
    ServerProcess,
    payment,
    running_server,
    unique_name,
)
from tests.support.operators import admin_key

SCHEMATHESIS = Path(sys.executable).with_name("schemathesis")
SEED = "2026"
# A request that is valid by its description may still be refused: a currency has its own smallest amount, an
# Idempotency-Key belongs to one request, a cursor must come from an answer.
LEFT_OUT = "positive_data_acceptance"

_numbers = itertools.count(1)


@pytest.fixture(scope="module")
def merchant(rights: Connection, api: ServerProcess) -> Iterator[Merchant]:
    made = Merchant(rights, api.url)
    yield made
    made.client.close()


@pytest.fixture(scope="module")
def receiver(module_database: str) -> Iterator[httpx.Client]:
    with (
        running_server("webhooks", module_database) as running,
        httpx.Client(base_url=running.url, timeout=30, verify=CONTEXT) as client,
    ):
        yield client


# --------------------------------------------------------------------------------------- by our own description


def test_every_response_matches_the_openapi_document(
    api: ServerProcess, merchant: Merchant, module_database: str, tmp_path: Path
) -> None:
    operator = admin_key(module_database)
    merchant.pay()
    merchant.conn.execute("select outbox.publish_sealing_key('slk_1', %s)", (bytes(range(32)),))
    (tmp_path / "schemathesis.toml").write_text(
        f"""
        headers = {{ Authorization = "Bearer {merchant.key}" }}
        # A target that is too long breaks its parameter's description as well.
        checks.negative_data_rejection.expected-statuses = [400, 401, 403, 404, 406, 409, 413, 414, 415, 422, 431]

        [[operations]]
        include-path-regex = "/v1/operator"
        headers = {{ Authorization = "Bearer {operator}" }}
        """
    )
    done = subprocess.run(
        [
            *(str(SCHEMATHESIS), "--no-color", "--config-file", str(tmp_path / "schemathesis.toml"), "run"),
            *(f"{api.url}/docs/openapi.json", "--seed", SEED, "--exclude-checks", LEFT_OUT, "--continue-on-failure"),
            *("--phases", "examples,fuzzing,stateful", "--max-examples", "6", "--workers", "2"),
        ],
        cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


# ------------------------------------------------------------------------------------------------ text by text

ODD = st.sampled_from(
    [
        "\0",
        "\ud800",
        "\udfff",
        "\u202e",
        "\ufeff",
        "﷽",
        "\U0010ffff",
        "\r\n",
        "'; drop table payments; --",
        "%s",
        "{0}",
        "\\",
    ]
)
TEXTS = st.one_of(st.text(max_size=300), ODD, st.lists(ODD, max_size=5).map("".join), st.just("x" * 70_000))
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXTS,
    lambda inside: st.lists(inside, max_size=3) | st.dictionaries(TEXTS, inside, max_size=3),
    max_leaves=8,
)
FIELDS = st.sampled_from(
    [
        *("amount", "currency", "payment_method", "capture_method", "reference", "description", "return_url"),
        *("statement_descriptor_suffix", "off_session", "authentication", "customer", "metadata", "unknown"),
    ]
)
DEEP = [b"[" * 40_000, b'{"a":' * 9_000 + b"1" + b"}" * 9_000, b'{"metadata":' + b"[" * 10_000]
QUICKLY = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)


@st.composite
def bodies(draw: st.DrawFn) -> bytes:
    """A payment's body with a field or more made wrong, or bytes that are none."""
    kind = draw(st.sampled_from(["field", "field", "inner", "twice", "bytes", "broken", "deep"]))
    body: dict[str, Any] = payment()
    match kind:
        case "field":
            body |= draw(st.dictionaries(FIELDS, VALUES, min_size=1, max_size=3))
        case "inner":
            inner = draw(st.sampled_from(["payment_method", "customer", "metadata"]))
            body[inner] = draw(st.dictionaries(TEXTS | st.sampled_from(["type", "token", "email"]), VALUES, max_size=3))
        case "twice":
            text = json.dumps(body)[:-1] + f', "{draw(FIELDS)}": {json.dumps(draw(VALUES))}}}'
            return text.encode(errors="surrogatepass")
        case "bytes":
            return draw(st.binary(max_size=400))
        case "broken":
            whole = json.dumps(body).encode()
            place = draw(st.integers(0, len(whole)))
            return whole[:place] + draw(st.binary(max_size=4)) + whole[place + 1 :]
        case "deep":
            return draw(st.sampled_from(DEEP))
    escaped = draw(st.booleans())
    return json.dumps(body, ensure_ascii=escaped).encode(errors="surrogatepass")


@QUICKLY
@given(body=bodies())
def test_every_posted_body_is_accepted_or_refused_by_a_rule(merchant: Merchant, body: bytes) -> None:
    answer = merchant.post(body)
    assert answer.status_code in {201, 400, 409, 413}, answer.text
    if answer.status_code == 201:
        assert merchant.get(f"/v1/payments/{answer.json()['id']}")["id"] == answer.json()["id"]
    else:
        document = answer.json()
        assert answer.headers["content-type"] == "application/problem+json"
        assert document["status"] == answer.status_code
        assert document["detail"]


@QUICKLY
@given(path=st.sampled_from(["payments", "events"]), name=st.sampled_from(
    ["reference", "state", "limit", "after", "starting_after", "created_from", "created_before", "unknown"]
), value=TEXTS.filter(lambda text: len(text) < 5000 and text.isprintable()))  # fmt: skip
def test_every_query_is_answered_or_refused_by_a_rule(merchant: Merchant, path: str, name: str, value: str) -> None:
    answer = merchant.client.get(f"/v1/{path}", params={name: value})
    assert answer.status_code in {200, 400}, answer.text


@QUICKLY
@given(name=st.sampled_from(["Authorization", "Idempotency-Key", "Content-Type"]), value=st.binary(max_size=400))
def test_no_header_causes_a_server_error(merchant: Merchant, name: str, value: bytes) -> None:
    clean = sendable(value)
    headers = {
        b"Idempotency-Key": unique_name("fuzz").encode(),
        b"Content-Type": b"application/json",
        name.encode(): clean,
    }
    answer = merchant.client.post("/v1/payments", content=json.dumps(payment()), headers=list(headers.items()))
    assert answer.status_code in {201, 400, 401, 415, 422}, answer.text


# ---------------------------------------------------------------------------------------------------- webhooks


@st.composite
def events(draw: st.DrawFn, secret: str) -> bytes:
    """What could pass for an event of Stripe's, with a client secret in it wherever that may be."""
    about: dict[str, Any] = {"object": "payment_intent", "id": "pi_1"}
    document: dict[str, Any] = {
        "id": f"evt_{next(_numbers)}", "type": "payment_intent.succeeded", "livemode": False,
        "api_version": "2026-10-28.endive", "data": {"object": about},
    }  # fmt: skip
    place = draw(st.sampled_from(["object", "deep", "list", "top", "none"]))
    match place:
        case "object":
            about["client_secret"] = secret
        case "deep":
            about["latest"] = {"payment_intent": {"client_secret": secret}}
        case "list":
            about["all"] = [{"client_secret": secret}, {"client_secret": None}]
        case "top":
            document["client_secret"] = secret
    document |= draw(
        st.dictionaries(st.sampled_from(["id", "type", "livemode", "account", "more"]), VALUES, max_size=2)
    )
    about["text"] = draw(TEXTS)
    kind = draw(st.sampled_from(["plain", "plain", "plain", "spaced", "escaped key", "broken", "bytes", "deep"]))
    match kind:
        case "spaced":
            return json.dumps(document, indent=3, ensure_ascii=False).encode(errors="surrogatepass")
        case "escaped key":
            return json.dumps(document).replace('"client_secret"', '"client\\u005fsecret"').encode()
        case "broken":
            text = json.dumps(document).encode()
            at = draw(st.integers(0, len(text)))
            return text[:at] + draw(st.binary(max_size=4)) + text[at + 1 :]
        case "bytes":
            return draw(st.binary(max_size=400))
        case "deep":
            return draw(st.sampled_from(DEEP))
    return json.dumps(document, ensure_ascii=draw(st.booleans())).encode(errors="surrogatepass")


@settings(QUICKLY, max_examples=80)
@given(data=st.data())
def test_a_signed_webhook_is_stored_or_refused_and_its_secret_is_not(
    receiver: httpx.Client, rights: Connection, data: st.DataObject
) -> None:
    secret = f"pi_3QxOfThisTest_secret_{secrets.token_hex(12)}"
    body = data.draw(events(secret))
    count = "select count(*) from surety.provider_events"
    before = rights.execute(count).fetchone()
    answer = receiver.post("/stripe", content=body, headers={"Stripe-Signature": signed(body)})
    assert answer.status_code in {200, 400, 413}, answer.text
    if answer.status_code != 200:
        assert rights.execute(count).fetchone() == before, "refused, and stored all the same"
    stored = "select body from surety.provider_events where body like %(secret)s or headers::text like %(secret)s"
    kept = "select body from surety.rejected_webhooks where position(%(bytes)s in body) > 0"
    document = {"secret": f"%{secret}%", "bytes": secret.encode()}
    assert rights.execute(stored, document).fetchall() + rights.execute(kept, document).fetchall() == []


@QUICKLY
@given(text=TEXTS.filter(lambda text: text.encode(errors="replace").decode() == text), escaped=st.booleans())
def test_no_webhook_is_lost_because_of_its_content(
    receiver: httpx.Client, rights: Connection, text: str, escaped: bool
) -> None:
    event_id = f"evt_of_a_text_{next(_numbers)}"
    document = {"id": event_id, "type": "charge.updated", "livemode": False, "data": {"object": {text: text}}}
    body = json.dumps(document, ensure_ascii=escaped).encode()
    answer = receiver.post("/stripe", content=body, headers={"Stripe-Signature": signed(body)})
    assert answer.status_code == 200, answer.text
    [(stored,)] = rights.execute("select body from surety.provider_events where event_id = %s", (event_id,)).fetchall()
    assert json.loads(stored) == document


@settings(QUICKLY, max_examples=40)
@given(header=st.one_of(st.binary(max_size=200), st.text("t=v1,0123456789abcdef", max_size=100).map(str.encode)))
def test_no_signature_causes_a_server_error(receiver: httpx.Client, header: bytes) -> None:
    answer = receiver.post("/stripe", content=b"{}", headers=[(b"Stripe-Signature", sendable(header))])
    assert answer.status_code == 400, answer.text


def sendable(value: bytes) -> bytes:
    """What of it a header can hold."""
    return bytes(byte for byte in value if byte >= 0x20 and byte != 0x7F).strip()


def signed(body: bytes) -> str:
    """The header by which a webhook proves where it comes from."""
    now = int(time.time())
    digest = hmac.digest(SECRETS[0].encode(), b"%d.%s" % (now, body), "sha256").hex()
    return f"t={now},v1={digest}"
