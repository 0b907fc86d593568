"""The API's own description, and the page that shows it without fetching anything from elsewhere."""

from __future__ import annotations

import importlib.resources
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec
from litestar import Litestar, Router
from litestar.openapi import OpenAPIConfig, ResponseSpec
from litestar.openapi.plugins import SwaggerRenderPlugin
from litestar.openapi.spec import (
    Components,
    OpenAPIHeader,
    OpenAPIMediaType,
    Operation,
    RequestBody,
    Schema,
    SecurityScheme,
)
from litestar.openapi.spec import Parameter as OpenAPIParameter
from litestar.static_files import create_static_files_router

from app.api.schemas import ProblemDocument
from app.web.problems import PROBLEM_TYPES

SWAGGER_UI_FILES = importlib.resources.files("openapi_ui_bundles") / "swagger_ui" / "vendor"

# A browser that obeys this fetches nothing from elsewhere, whatever the page's scripts try.
CONTENT_SECURITY_POLICY = (
    "default-src 'self'; img-src 'self' data:; style-src 'self' 'unsafe-inline'; script-src 'self' 'unsafe-inline'"
)


def documentation_assets() -> Router:
    """The files of the page."""
    return create_static_files_router("/assets", [Path(str(SWAGGER_UI_FILES))], include_in_schema=False)


def problem_responses(*names: str) -> dict[int, ResponseSpec]:
    """Types of problems, by status, as a route's documentation takes them."""
    descriptions: dict[int, list[str]] = {}
    for name in names:
        descriptions.setdefault(PROBLEM_TYPES[name].status, []).append(
            f"[{name}](/problems/{name}): {PROBLEM_TYPES[name].title}"
        )
    return {
        status: ResponseSpec(
            ProblemDocument,
            description="\n\n".join(lines),
            generate_examples=False,
            media_type="application/problem+json",
        )
        for status, lines in descriptions.items()
    }


@dataclass
class RawSchema(Schema):
    """A schema that is told as it is."""

    as_is: dict[str, Any] = field(default_factory=dict)

    def to_schema(self) -> dict[str, Any]:
        """The schema."""
        return self.as_is


def query_parameters_of(struct: type[msgspec.Struct]) -> type[Operation]:
    """A route's documentation with a query parameter for each field of a struct."""
    properties: dict[str, Any] = msgspec.json.schema_components([struct])[1][struct.__name__]["properties"]
    documented = [
        OpenAPIParameter(
            name=name, param_in="query", description=description_of(schema), schema=RawSchema(as_is=schema)
        )
        for name, schema in properties.items()
    ]

    @dataclass
    class WithQuery(Operation):
        def __post_init__(self) -> None:
            self.parameters = [*(self.parameters or []), *documented]

    return WithQuery


def request_body_of(struct: type[msgspec.Struct]) -> type[Operation]:
    """A route's documentation with a body as a struct tells it: what Litestar doesn't decode, it doesn't describe."""
    schema = msgspec.json.schema_components([struct])[1][struct.__name__]

    @dataclass
    class WithBody(Operation):
        def __post_init__(self) -> None:
            content = {"application/json": OpenAPIMediaType(schema=RawSchema(as_is=schema))}
            self.request_body = RequestBody(content=content, required=True)

    return WithBody


def description_of(schema: dict[str, Any]) -> str | None:
    """A schema's description, its own or that of what it may be beside null."""
    parts = [schema, *schema.get("anyOf", [])]
    return next((part["description"] for part in parts if "description" in part), None)


HEADERS = {
    "Request-Id": OpenAPIHeader(
        description="Names the request, in the audit trail and in our logs.",
        required=True,
        schema=RawSchema(as_is={"type": "string", "pattern": "^req_[0-9a-f]{32}$"}),
    ),
    "Location": OpenAPIHeader(
        description="Where what was made can be read.", required=True, schema=RawSchema(as_is={"type": "string"})
    ),
    "Idempotency-Replayed": OpenAPIHeader(
        description="Told where this is the first answer, repeated.", schema=RawSchema(as_is={"const": "true"})
    ),
    "Retry-After": OpenAPIHeader(
        description="Seconds to wait.", required=True, schema=RawSchema(as_is={"type": "string", "pattern": "^[0-9]+$"})
    ),
    "WWW-Authenticate": OpenAPIHeader(required=True, schema=RawSchema(as_is={"const": "Bearer"})),
}


def complete_documentation(app: Litestar) -> None:
    """Complete the description: the headers of every answer, and no answers that Litestar would give but we don't."""
    for path in (app.openapi_schema.paths or {}).values():
        for operation in (path.get, path.post):
            if operation is not None and operation.responses is not None:
                complete_responses(operation, operation.responses)


def complete_responses(operation: Operation, responses: dict[str, Any]) -> None:
    """Complete the description of one route's answers."""
    for status, answer in list(responses.items()):
        if status >= "400" and "application/problem+json" not in (answer.content or {}):
            del responses[status]
            continue
        names = {"401": ["WWW-Authenticate"], "429": ["Retry-After"], "503": ["Retry-After"], "201": ["Location"]}
        names_of_headers = ["Request-Id", *names.get(status, [])]
        if status < "300" and any(parameter_name(one) == "Idempotency-Key" for one in operation.parameters or []):
            names_of_headers.append("Idempotency-Replayed")
        answer.headers = {name: HEADERS[name] for name in names_of_headers}


def parameter_name(parameter: Any) -> str:
    """What a documented parameter is called."""
    return str(getattr(parameter, "name", ""))


OPENAPI = OpenAPIConfig(
    title="Surety",
    version=version("surety"),
    description="Take payments. Amounts are integers in minor units, times RFC 3339 in UTC, errors RFC 9457.",
    use_handler_docstrings=True,
    components=Components(security_schemes={"key": SecurityScheme(type="http", scheme="bearer")}),
    security=[{"key": []}],
    openapi_router=Router(
        "/docs",
        route_handlers=[],
        response_headers={"content-security-policy": CONTENT_SECURITY_POLICY},
        include_in_schema=False,
    ),
    render_plugins=[
        SwaggerRenderPlugin(
            path="/",
            js_url="/assets/swagger-ui-bundle.js",
            css_url="/assets/swagger-ui.css",
            standalone_preset_js_url="/assets/swagger-ui-standalone-preset.js",
            favicon="<link rel='icon' type='image/png' href='/assets/favicon-32x32.png'>",
        )
    ],
)
