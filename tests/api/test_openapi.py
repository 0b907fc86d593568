"""The OpenAPI document: its types of events are those of the database, and its examples are real."""

from __future__ import annotations

from typing import Any, get_args

import msgspec
import pytest
from openapi_schema_validator import OAS31Validator

from app.api.openapi import CONNECTION_PROBLEMS, EXAMPLES, openapi_document
from app.api.routes import ROUTES
from app.api.schemas.events import EVENT_TYPES, KINDS_OF_EVENTS
from tests.support.api_examples import record_examples
from tests.support.http_client import Connection

Json = dict[str, Any]

DOCUMENT: Json = msgspec.json.decode(msgspec.json.encode(openapi_document(ROUTES)))
OPERATIONS = [of for methods in DOCUMENT["paths"].values() for of in methods.values()]
NOT_CAUSED_BY_ONE_REQUEST = {
    "overloaded", "unavailable", "request-timeout", "provider-account-refused", "balance-too-low",
    "provider-unavailable",
}  # fmt: skip


def media_types() -> list[tuple[str, Json]]:
    """The name and media type of each request and successful answer that has a body."""
    found = []
    for of in OPERATIONS:
        if "requestBody" in of:
            found.append((of["operationId"], of["requestBody"]["content"]["application/json"]))
        found += [
            (f"{of['operationId']} {status}", answer["content"]["application/json"])
            for status, answer in of["responses"].items()
            if status < "300"
        ]
    return found


def breaks(schema: Json, value: Any) -> list[str]:
    """The places where a value breaks a schema of the document."""
    validator = OAS31Validator(schema | {"components": DOCUMENT["components"]})
    return [f"{error.json_path}: {error.message}" for error in validator.iter_errors(value)]


def test_types_of_events_are_those_that_merchants_get(rights: Connection) -> None:
    of_database = {
        name for (name,) in rights.execute("select type from outbox.event_types where is_for_merchants").fetchall()
    }
    of_kinds = [name for types in KINDS_OF_EVENTS.values() for name in get_args(types)]
    assert sorted(of_kinds) == sorted(of_database) == sorted(EVENT_TYPES)
    assert DOCUMENT["components"]["schemas"]["Event"]["discriminator"]["mapping"].keys() == of_database


@pytest.mark.parametrize(("name", "media_type"), media_types(), ids=[name for name, _ in media_types()])
def test_each_body_has_an_example_that_keeps_its_schema(name: str, media_type: Json) -> None:
    assert "example" in media_type, name
    assert breaks(media_type["schema"], media_type["example"]) == []


def test_an_event_of_one_kind_is_no_event_of_another() -> None:
    event = EXAMPLES["answers"]["getEvent"]["200"]
    assert breaks({"$ref": "#/components/schemas/Event"}, event) == []
    assert breaks({"$ref": "#/components/schemas/Event"}, event | {"type": "refund.succeeded"})


def test_each_problem_that_one_request_can_cause_has_an_example() -> None:
    named = {name for row in ROUTES for name in row.problems} | set(CONNECTION_PROBLEMS)
    assert named - EXAMPLES["problems"].keys() == NOT_CAUSED_BY_ONE_REQUEST
    schema = {"$ref": "#/components/schemas/ProblemDocument"}
    for name, document in EXAMPLES["problems"].items():
        assert (name, breaks(schema, document)) == (name, [])
    for of in OPERATIONS:
        for status, answer in of["responses"].items():
            for name, example in answer["content"].get("application/problem+json", {}).get("examples", {}).items():
                assert example == {"$ref": f"#/components/examples/{name}"}
                assert EXAMPLES["problems"][name]["status"] == int(status)


def test_examples_are_recorded_from_this_version(server: str) -> None:
    """A new recording has the same members of the same types: `python -m tests.support.api_examples` makes one."""
    assert forms(record_examples(server)) == forms(EXAMPLES)


def forms(value: Any, place: str = "") -> set[tuple[str, str]]:
    """Place and type of each value at any depth; the elements of an array share a place."""
    if isinstance(value, dict):
        return {(place, "object")}.union(*(forms(part, f"{place}/{name}") for name, part in value.items()))
    if isinstance(value, list):
        return {(place, "array")}.union(*(forms(part, f"{place}/-") for part in value))
    return {(place, type(value).__name__)}
