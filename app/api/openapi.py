"""The OpenAPI document, built from the table of routes, and the page that shows it without external resources."""

from __future__ import annotations

import importlib.resources
import re
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from importlib.metadata import version
from inspect import cleandoc
from pathlib import Path
from types import FunctionType
from typing import Any, cast, get_args

import msgspec
from litestar import Router
from litestar.static_files import create_static_files_router

from app.api.field_descriptions import DESCRIPTIONS, is_instant
from app.api.openapi_headers import (
    HEADERS,
    HEADERS_BY_STATUS,
    IDEMPOTENCY_KEY_PARAMETER,
    PREFER_PARAMETER,
    RATE_LIMIT_HEADERS,
    TRACE_PARAMETER,
    VERSION_PARAMETER,
)
from app.api.positions import POSITION_PARAMETER
from app.api.schemas.events import KINDS_OF_EVENTS, Event
from app.api.schemas.payments import Authentication, CaptureMethod, NewCard, NewPayment, State, Status
from app.api.schemas.problems import ProblemDocument
from app.api.schemas.refunds import RefundReason, RefundStatus
from app.api.versions import VERSION_HEADER
from app.web.asgi import Headers, HttpResponse
from app.web.problems import PROBLEM_TYPES
from app.web.requests import HttpRequest
from app.web.routing import PATH_PARAMETER, Route, complete_asset_response

JsonDocument = dict[str, Any]

SWAGGER_UI_FILES = importlib.resources.files("openapi_ui_bundles") / "swagger_ui" / "vendor"
INTRODUCTION = re.sub("<!--.*?-->\n", "", Path(__file__).with_name("introduction.md").read_text(encoding="utf-8"))
REFERENCE = "#/components/schemas/{name}"

EXAMPLES: dict[str, JsonDocument] = msgspec.json.decode(Path(__file__).with_name("examples.json").read_bytes())
"""Requests and answers of a running API: `python -m tests.support.api_examples` records them."""

# The page's scripts can't load anything from other hosts.
CONTENT_SECURITY_POLICY = (
    b"default-src 'self'; img-src 'self' data:; style-src 'self' 'unsafe-inline'; script-src 'self' 'unsafe-inline'"
)

PAGE = b"""<!DOCTYPE html>
<html>
<head>
<title>Surety</title>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" type="image/png" href="/assets/favicon-32x32.png">
<link rel="stylesheet" href="/assets/swagger-ui.css">
<script src="/assets/swagger-ui-bundle.js"></script>
<script src="/assets/swagger-ui-standalone-preset.js"></script>
<style>body { margin: 0; padding: 0 }</style>
</head>
<body>
<div id="swagger-container"></div>
<script>
SwaggerUIBundle({
  url: "/docs/openapi.json",
  dom_id: "#swagger-container",
  deepLinking: true,
  showExtensions: true,
  showCommonExtensions: true,
  presets: [SwaggerUIBundle.presets.apis, SwaggerUIBundle.SwaggerUIStandalonePreset]
})
</script>
</body>
</html>
"""

# Any request may be refused for its form, before its route is known.
CONNECTION_PROBLEMS = ("request-timeout", "target-too-long", "head-too-large")

PAYER_CAN_ACT_OR_IS_ABSENT: JsonDocument = {
    "if": {"required": ["authentication"], "properties": {"authentication": {"const": "script"}}},
    "then": {"properties": {"return_url": {"type": "null"}, "off_session": {"const": False}}},
    "else": {
        "if": {"required": ["off_session"], "properties": {"off_session": {"const": True}}},
        "else": {"required": ["return_url"], "properties": {"return_url": {"type": "string"}}},
    },
}
"""The rule of app/api/create_payment.py that no type of a field can state. Generators of clients make no type of the
whole body of alternatives (anyOf).
"""

CARD_IS_NEW_OR_SAVED: JsonDocument = {
    "if": {"required": ["saved"], "properties": {"saved": {"type": "string"}}},
    "else": {"required": ["token"], "properties": {"token": {"type": "string"}}},
}

CHOICES: dict[str, Any] = {
    "PaymentStatus": Status,
    "PaymentState": State,
    "CaptureMethod": CaptureMethod,
    "Authentication": Authentication,
    "RefundStatus": RefundStatus,
    "RefundReason": RefundReason,
}
"""Texts of which several fields hold one: a type of their own in generated clients."""


def documentation_routes(routes: Sequence[Route]) -> list[Route]:
    """GET /docs and GET /docs/openapi.json, which describe the other routes."""
    document = msgspec.json.encode(openapi_document(routes))
    policy = (b"content-security-policy", CONTENT_SECURITY_POLICY)

    def static(body: bytes, content_type: bytes) -> Any:
        headers: Headers = [(b"content-type", content_type), policy]

        async def endpoint(request: HttpRequest) -> HttpResponse:
            return HttpResponse(200, body, request.request_id, headers)

        return endpoint

    return [
        Route("GET", "/docs", static(PAGE, b"text/html; charset=utf-8"), is_public=True),
        Route("GET", "/docs/openapi.json", static(document, b"application/vnd.oai.openapi+json"), is_public=True),
    ]


def documentation_assets() -> Router:
    """The static files of the page."""
    return create_static_files_router(
        "/assets", [Path(str(SWAGGER_UI_FILES))], include_in_schema=False, after_request=complete_asset_response
    )


def openapi_document(routes: Sequence[Route]) -> JsonDocument:
    """The description of the routes as OpenAPI 3.1."""
    bodies = [row.body for row in routes if row.body and row.method != "DELETE"]
    types = [ProblemDocument, *bodies, *(row.query for row in routes if row.query)]
    types += [answer for row in routes for answer in row.answers.values()]
    types += KINDS_OF_EVENTS
    _, components = msgspec.json.schema_components(types, ref_template=REFERENCE)
    paths: JsonDocument = {}
    for row in routes:
        paths.setdefault(row.path, {})[row.method.lower()] = describe_route(row, components)
    for query in {row.query.__name__ for row in routes if row.query}:
        del components[query]
    name_choices(paths)
    name_choices(components)
    components |= {name: {"title": name, "type": "string", "enum": list(get_args(of))} for name, of in CHOICES.items()}
    components[Event.__name__] = choice_by_type(Event, KINDS_OF_EVENTS)
    components[NewCard.__name__] |= CARD_IS_NEW_OR_SAVED
    components[NewPayment.__name__] |= PAYER_CAN_ACT_OR_IS_ABSENT
    requests = {body.__name__ for body in bodies}
    for struct, component in components.items():
        if "description" in component:
            component["description"] = cleandoc(component["description"])
        for field, schema in component.get("properties", {}).items():
            describe_field(struct, field, schema)
            describe_default(schema)
            if struct not in requests and is_instant(field):
                mark_as_instant(schema)
        # Problems have more fields by their type.
        if component.get("type") == "object" and struct != ProblemDocument.__name__:
            component.setdefault("additionalProperties", False)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Surety",
            "version": version("surety"),
            "description": INTRODUCTION,
        },
        "servers": [{"url": "/"}],
        "security": [{"key": []}],
        "paths": paths,
        "components": {
            "schemas": components,
            "examples": {name: {"value": document} for name, document in EXAMPLES["problems"].items()},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def describe_route(row: Route, components: JsonDocument) -> JsonDocument:
    """A row of the table as an operation."""
    name = operation_id(row)
    is_idempotent = "idempotency-key-missing" in row.problems
    parameters = [
        {"name": parameter, "in": "path", "required": True, "schema": {"type": "string"}}
        for parameter in PATH_PARAMETER.findall(row.path)
    ]
    if is_idempotent:
        parameters += [IDEMPOTENCY_KEY_PARAMETER, TRACE_PARAMETER]
    if row.takes_wait:
        parameters.append(PREFER_PARAMETER)
    if row.scope == "read":
        parameters.append(POSITION_PARAMETER)
    if not row.is_public:
        parameters.append(VERSION_PARAMETER)
    if row.query is not None:
        parameters += query_parameters(components[row.query.__name__]["properties"])
    operation: JsonDocument = {
        "summary": sentence_of(row),
        "description": cleandoc(row.endpoint.__doc__ or ""),
        "operationId": name,
        "tags": [tag_of(row)],
        "responses": describe_answers(row, is_idempotent=is_idempotent) | describe_problems(row),
    }
    if parameters:
        operation["parameters"] = parameters
    # A body without fields, which a DELETE may leave out, is not shown: some clients can't send one.
    if row.body is not None and row.method != "DELETE":
        reference = {"$ref": REFERENCE.format(name=row.body.__name__)}
        # No body is read as an empty object.
        is_required = any(field.required for field in msgspec.structs.fields(row.body))
        shown = example_of(EXAMPLES["requests"], name)
        operation["requestBody"] = {
            "required": is_required,
            "content": {"application/json": {"schema": reference, **shown}},
        }
    if row.is_public:
        operation["security"] = [{}]
    return operation


def sentence_of(row: Route) -> str:
    """The first sentence about a route, without its period."""
    return cleandoc(row.endpoint.__doc__ or "").partition("\n")[0].partition(". ")[0].rstrip(".")


def choice_by_type(struct: type[msgspec.Struct], kinds: Mapping[type[msgspec.Struct], Any]) -> JsonDocument:
    """A schema that is one of several, and `type` says which: each kind has its types."""
    references = {kind: REFERENCE.format(name=kind.__name__) for kind in kinds}
    return {
        "title": struct.__name__,
        "description": struct.__doc__,
        "oneOf": [{"$ref": reference} for reference in references.values()],
        "discriminator": {
            "propertyName": "type",
            "mapping": {name: references[kind] for kind, types in kinds.items() for name in get_args(types)},
        },
    }


def name_choices(document: Any) -> None:
    """Replace the choices that have a name by references to it, and a single choice by a constant, at any depth."""
    if isinstance(document, list):
        for part in document:
            name_choices(part)
    elif isinstance(document, dict):
        choices = document.get("enum")
        if isinstance(choices, list):
            name = next(
                (name for name, of in CHOICES.items() if sorted(get_args(of)) == sorted(map(str, choices))), None
            )
            if name is not None:
                del document["enum"]
                document["$ref"] = REFERENCE.format(name=name)
            elif len(choices) == 1:
                document["const"] = document.pop("enum")[0]
        for part in document.values():
            name_choices(part)


def describe_field(struct: str, field: str, schema: JsonDocument) -> None:
    """Give a field its description, unless its type has one."""
    own = described(schema).get("description")
    text = DESCRIPTIONS.get(f"{struct}.{field}") or DESCRIPTIONS.get(field)
    if own is None and text is not None:
        schema["description"] = text


def describe_default(schema: JsonDocument) -> None:
    """Put a field's default into words: to some generators a field with a default is one that is never left out."""
    value = schema.pop("default", None)
    if value not in (None, {}, []):
        given = msgspec.json.encode(value).decode().strip('"')
        schema["description"] = f"{described(schema).get('description', '')} If left out: `{given}`.".lstrip()


def mark_as_instant(schema: JsonDocument) -> None:
    """Say that a text, or the text beside null, is a time."""
    for part in (schema, *schema.get("anyOf", [])):
        if part.get("type") == "string":
            part["format"] = "date-time"


def tag_of(row: Route) -> str:
    """The group of a route: that of operators, or the first noun of its path."""
    return row.tag or row.path.removeprefix("/v1/").strip("/").partition("/")[0]


def query_parameters(properties: JsonDocument) -> list[JsonDocument]:
    """The fields of a query's struct as parameters."""
    return [
        {
            "name": name,
            "in": "query",
            "required": False,
            "schema": without_null(schema),
            **described(schema),
            **({"style": "deepObject", "explode": True} if schema.get("type") == "object" else {}),
        }
        for name, schema in properties.items()
    ]


def without_null(schema: JsonDocument) -> JsonDocument:
    """A schema of a parameter: one that is left out is no null."""
    parts = [part for part in schema.get("anyOf", []) if part != {"type": "null"}]
    return parts[0] if len(parts) == 1 else schema


def described(schema: JsonDocument) -> JsonDocument:
    """A schema's description, its own or that of its alternative to null; empty if it has none."""
    parts = [schema, *schema.get("anyOf", [])]
    return next(({"description": part["description"]} for part in parts if "description" in part), {})


def describe_answers(row: Route, *, is_idempotent: bool) -> JsonDocument:
    """The successful answers of a route, by status."""
    schemas, _ = msgspec.json.schema_components(row.answers.values(), ref_template=REFERENCE)
    more = [] if row.is_public else [VERSION_HEADER, *RATE_LIMIT_HEADERS]
    more += ["Idempotency-Replayed", "Surety-Position"] if is_idempotent else []
    more += ["Cache-Control"] if row.is_secret else []
    if row.takes_wait:
        more += ["Preference-Applied"] if is_idempotent else ["Preference-Applied", "Vary"]
    return {
        str(status): {
            "description": HTTPStatus(status).description,
            "headers": headers_of(status, *more),
            "content": {
                "application/json": {
                    "schema": schema,
                    **example_of(EXAMPLES["answers"].get(operation_id(row), {}), str(status)),
                }
            },
        }
        for status, schema in zip(row.answers, schemas, strict=True)
    }


def example_of(examples: JsonDocument, name: str) -> JsonDocument:
    """The member of a media type that shows an example, if there is one."""
    return {"example": examples[name]} if name in examples else {}


def describe_problems(row: Route) -> JsonDocument:
    """The problem documents of a route, by status."""
    limits = [] if row.is_public else ["rate-limited"]
    lines: dict[int, list[str]] = {}
    examples: dict[int, JsonDocument] = {}
    for name in (*row.problems, *limits, *CONNECTION_PROBLEMS):
        definition = PROBLEM_TYPES[name]
        lines.setdefault(definition.status, []).append(f"[{name}](/problems/{name}): {definition.title}")
        if name in EXAMPLES["problems"]:
            examples.setdefault(definition.status, {})[name] = {"$ref": f"#/components/examples/{name}"}
    reference = {"$ref": REFERENCE.format(name=ProblemDocument.__name__)}
    return {
        str(status): {
            "description": "\n\n".join(texts),
            "headers": headers_of(status, *(() if row.is_public else RATE_LIMIT_HEADERS)),
            "content": {
                "application/problem+json": {
                    "schema": reference,
                    **({"examples": examples[status]} if status in examples else {}),
                }
            },
        }
        for status, texts in lines.items()
    }


def headers_of(status: int, *more: str) -> JsonDocument:
    """The headers of an answer."""
    names = ["Request-Id", *HEADERS_BY_STATUS.get(status, []), *more]
    return {name: HEADERS[name] for name in names}


def operation_id(row: Route) -> str:
    """The name of a route's operation in generated clients: `listPayments` for `list_payments`."""
    name = camel_case(cast(FunctionType, row.endpoint).__name__)
    return name[0].lower() + name[1:]


def camel_case(text: str) -> str:
    """`ListPayments` for `list_payments`."""
    return "".join(word.capitalize() for word in re.split("[^A-Za-z0-9]+", text))
