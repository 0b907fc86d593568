"""The operators' part of the API over real sockets: their keys, dead letters, how things stand."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import msgspec
import pytest

from app.api.schemas.operators import DeadLetter, DeadLetterList, DecisionResultList, StatusReport
from app.web.keys import key_hash_of
from tests.cli.test_status import surety
from tests.support import dead_letters as letters
from tests.support.http_client import (
    CONTEXT,
    Connection,
    Merchant,
    ServerProcess,
    assert_matches,
    broken_rules,
    problem,
)
from tests.support.operators import add_operator
from tests.support.payments import state_of

Client = httpx.Client
LETTERS = "/v1/operator/dead-letters"


def client_of(api: ServerProcess, key: str) -> Client:
    return Client(base_url=api.url, headers={"Authorization": f"Bearer {key}"}, verify=CONTEXT, timeout=30)


@pytest.fixture(scope="module")
def key(rights: Connection) -> str:
    """An admin's key."""
    return add_operator(rights, "ada@acme", "admin")


@pytest.fixture(scope="module")
def ada(api: ServerProcess, key: str) -> Iterator[Client]:
    with client_of(api, key) as client:
        yield client


def decide(client: Client, path: str, **body: Any) -> httpx.Response:
    return client.post(f"{LETTERS}/{path}", json={"reason": "mended"} | body)


def entries(rights: Connection, request_id: str) -> list[tuple[str, str, str | None]]:
    """What the audit trail has about a request: kind, actor and reason."""
    return rights.execute(
        "select kind, actor, reason from audit.entries where request_id = %s and address = '127.0.0.1'", (request_id,)
    ).fetchall()


def test_dead_letter_is_listed_and_shown_as_documented(ada: Client, rights: Connection) -> None:
    made = [letters.never_sent_letter(rights)[0], letters.refused(rights)[0], letters.unanswered(rights)[0]]
    listed = ada.get(LETTERS).json()
    assert_matches(listed, DeadLetterList)
    assert [letter["id"] for letter in listed["data"]][-3:] == made
    verdicts = [letter["on_discard"]["verdict"] for letter in listed["data"]]
    assert verdicts[-3:] == ["fail", "fail", "refuse"]
    assert [letter["provider"]["holds"] for letter in listed["data"]][-3:] == ["nothing", "nothing", "unknown"]
    one = ada.get(f"{LETTERS}/{made[1]}").json()
    assert_matches(one, DeadLetter)
    assert one in listed["data"]
    assert len(one["attempts"]) == 3 and one["attempts"][0]["error"] == letters.REFUSAL


def test_pages_contain_every_dead_letter_once(ada: Client, rights: Connection) -> None:
    made = [letters.never_sent_letter(rights, "the same for all")[0] for _ in range(5)]
    seen: list[str] = []
    query: dict[str, Any] = {"error": "same for all", "handler": "submit", "limit": 2}
    while True:
        page = ada.get(LETTERS, params=query).json()
        seen += [letter["id"] for letter in page["data"]]
        if not page["has_more"]:
            break
        query["starting_after"] = seen[-1]
    assert seen == made
    assert ada.get(LETTERS, params={"handler": "apply_webhooks"}).json()["data"] == []


def test_replay_happens_once_and_is_audited_with_its_operator(ada: Client, rights: Connection) -> None:
    letter, _ = letters.never_sent_letter(rights)
    dry = decide(ada, f"{letter}/replay", dry_run=True)
    assert dry.json()["outcome"] == "would_replay" and entries(rights, dry.headers["request-id"]) == []
    first, second = decide(ada, f"{letter}/replay"), decide(ada, f"{letter}/replay")
    assert (first.status_code, first.json()["outcome"]) == (200, "replayed")
    assert (second.status_code, second.json()["outcome"]) == (200, "unchanged")
    assert entries(rights, first.headers["request-id"]) == [("operator", "operator:ada@acme", "mended")]
    read = ada.get(f"{LETTERS}/{letter}").json()
    assert (read["status"], read["closed"]["by"], read["on_replay"]) == ("replayed", "operator:ada@acme", None)
    problem(decide(ada, f"{letter}/discard"), 409, "wrong-state")


def test_discard_ends_the_payment_unless_the_provider_may_hold_a_charge(ada: Client, rights: Connection) -> None:
    letter, payment_id = letters.refused(rights)
    assert decide(ada, f"{letter}/discard").json()["outcome"] == "discarded"
    assert state_of(rights, payment_id) == "failed"
    step = rights.execute("select actor from surety.steps where payment_id = %s and to_state = 'failed'", (payment_id,))
    assert step.fetchone() == ("operator:ada@acme",)
    problem(decide(ada, f"{letter}/replay"), 409, "wrong-state")
    unknown, payment_id = letters.unanswered(rights)
    assert "may hold a charge" in problem(decide(ada, f"{unknown}/discard"), 409, "wrong-state")["detail"]
    assert state_of(rights, payment_id) == "submitting"


def test_bulk_action_decides_each_matching_dead_letter_separately(ada: Client, rights: Connection) -> None:
    refused, unknown = letters.refused(rights)[0], letters.unanswered(rights)[0]
    path = f"{LETTERS}/discard"
    answer = ada.post(path, json={"reason": "a bad day", "handler": "submit", "error": "usx", "dry_run": True}).json()
    assert_matches(answer, DecisionResultList)
    assert (refused, "would_discard") in [(done["id"], done["outcome"]) for done in answer["data"]]
    assert letters.closed_as(rights, refused) is None
    answer = ada.post(path, json={"reason": "a bad day", "handler": "submit"}).json()
    outcomes = {done["id"]: done["outcome"] for done in answer["data"]}
    assert (outcomes[refused], outcomes[unknown]) == ("discarded", "refused")
    answer = ada.post(f"{LETTERS}/replay", json={"reason": "ask", "error": "no answer"}).json()
    assert {done["id"]: done["outcome"] for done in answer["data"]}[unknown] == "replayed"
    assert broken_rules(ada.post(path, json={"reason": "all"})) == {("/handler", "required")}


def test_unknown_dead_letter_is_not_found(ada: Client) -> None:
    for name in ("dl_17", f"dl_{'0' * 24}"):
        problem(ada.get(f"{LETTERS}/{name}"), 404, "not-found")
        problem(decide(ada, f"{name}/replay"), 404, "not-found")
        problem(decide(ada, f"{name}/discard"), 404, "not-found")


def test_each_validation_error_is_reported(ada: Client) -> None:
    path = f"{LETTERS}/dl_{'0' * 24}/replay"
    assert broken_rules(ada.post(path, json={})) == {("/reason", "required")}
    for reason in ("two\nlines", "\x1b[2Jgone", "a\x9b", "  \n"):
        assert broken_rules(ada.post(path, json={"reason": reason})) == {("/reason", "pattern")}
    assert broken_rules(ada.post(path, json={"reason": "  ", "dry_run": 1, "x": 2})) == {
        ("/reason", "pattern"),
        ("/dry_run", "type"),
        ("/x", "known"),
    }
    assert broken_rules(ada.get(LETTERS, params={"status": "dead", "limit": 0})) == {
        ("status", "one_of"),
        ("limit", "minimum"),
    }
    problem(ada.post(path, content=b"reason=x"), 415, "not-json")
    problem(ada.post(path, json={"reason": "x" * 20_000}), 413, "too-large")


def test_merchant_key_is_denied_at_operator_routes_and_audited(
    api: ServerProcess, rights: Connection, ada: Client
) -> None:
    merchant = Merchant(rights, api.url)
    letter, _ = letters.never_sent_letter(rights)
    tries = [
        ("GET", LETTERS),
        ("GET", f"{LETTERS}/{letter}"),
        ("POST", f"{LETTERS}/{letter}/replay"),
        ("POST", f"{LETTERS}/{letter}/discard"),
        ("POST", f"{LETTERS}/replay"),
        ("POST", f"{LETTERS}/discard"),
        ("GET", "/v1/operator/status"),
    ]
    for method, path in tries:
        problem(merchant.client.request(method, path, json={"reason": "mine"}), 403, "forbidden")
    assert [reason for reason, _ in merchant.denials()] == ["forbidden"] * len(tries)
    assert merchant.denials()[2][1] == "POST /v1/operator/dead-letters/{id}/replay"
    assert letters.closed_as(rights, letter) is None
    merchant.client.close()


def test_operator_key_is_denied_at_merchant_routes_and_audited(ada: Client, rights: Connection) -> None:
    for answer in (
        ada.get("/v1/payments"),
        ada.post("/v1/payments", content=b"{}", headers={"Idempotency-Key": "k", "Content-Type": "application/json"}),
    ):
        problem(answer, 401, "unauthenticated")
        assert entries(rights, answer.headers["request-id"]) == [("denied", "operator:ada@acme", "unauthenticated")]


def test_a_revoked_key_opens_nothing(api: ServerProcess, module_database: str, rights: Connection) -> None:
    add = ("operators", "add", "bob", "--email", "bob@example.com", "--role", "support")
    key = surety(module_database, *add).stdout.strip()
    assert key.startswith("sty_operator_") and key_hash_of(b"Bearer " + key.encode()) is not None
    with client_of(api, key) as bob:
        assert bob.get("/v1/operator/status").status_code == 200
        listed = surety(module_database, "keys", "list").stdout
        [line] = [line for line in listed.splitlines() if "bob" in line]
        assert surety(module_database, "keys", "revoke", line.split()[0]).stdout == f"{line.split()[0]} is revoked\n"
        refused = bob.get("/v1/operator/status")
    problem(refused, 401, "key-revoked")
    assert entries(rights, refused.headers["request-id"]) == [("denied", "operator:bob", "key-revoked")]
    problem(httpx.get(f"{api.url}{LETTERS}"), 401, "unauthenticated")
    answer = rights.execute(
        "select outcome from audit.entries where snapshot ->> 'operator' = 'bob' order by at, outcome"
    ).fetchall()
    assert answer == [("operator added",), ("operator key created",), ("operator key revoked",)]


def test_status_equals_the_output_of_the_status_command(ada: Client, module_database: str) -> None:
    answer = ada.get("/v1/operator/status").json()
    assert_matches(answer, StatusReport)
    by_command = msgspec.json.decode(surety(module_database, "status", "--json").stdout)
    assert answer["verdict"] == by_command["verdict"]
    assert [finding["next"] for finding in answer["findings"]] == [
        finding["next"] for finding in by_command["findings"]
    ]
    assert answer["state"].keys() <= by_command.keys()


ANY_BODY = ("400", "401", "403", "408", "413", "414", "415", "429", "431", "503")


def test_openapi_document_describes_every_body_and_response(api: ServerProcess) -> None:
    document = httpx.get(f"{api.url}/docs/openapi.json").json()
    for path, struct in (("replay", "BulkDecision"), ("discard", "BulkDecision")):
        post = document["paths"][f"{LETTERS}/{path}"]["post"]
        assert set(post["responses"]) == {"200", *ANY_BODY}, struct
        reference = post["requestBody"]["content"]["application/json"]["schema"]["$ref"]
        assert reference == f"#/components/schemas/{struct}"
        assert "dry_run" in document["components"]["schemas"][struct]["properties"]
    one = document["paths"][f"{LETTERS}/{{letter_id}}/discard"]["post"]
    assert set(one["responses"]) == {"200", "404", "409", *ANY_BODY}
    assert one["requestBody"]["content"]["application/json"]["schema"]["$ref"] == "#/components/schemas/Decision"
    assert document["components"]["schemas"]["Decision"]["required"] == ["reason"]
    query = {parameter["name"] for parameter in document["paths"][LETTERS]["get"]["parameters"]}
    assert query == {"status", "handler", "error", "limit", "starting_after", "Surety-Version"}
