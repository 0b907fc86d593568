"""The headers of requests and answers, as the OpenAPI document describes them."""

from __future__ import annotations

from typing import Any

from app.api.positions import POSITION_PATTERN
from app.api.versions import VERSION_HEADER, VERSIONS

JsonDocument = dict[str, Any]

HEADERS: dict[str, JsonDocument] = {
    "Request-Id": {
        "description": "The request's id in the audit trail and in our logs.",
        "required": True,
        "schema": {"type": "string", "pattern": "^req_[0-9a-f]{24}$"},
    },
    VERSION_HEADER: {"description": "The version of this answer.", "required": True, "schema": {"enum": VERSIONS}},
    "Location": {
        "description": "The address of the new object.",
        "required": True,
        "schema": {"type": "string"},
    },
    "Preference-Applied": {
        "description": "`wait=N`: the request was allowed to wait for N seconds, and is answered as it asked.",
        "schema": {"type": "string", "pattern": "^wait=[0-9]+$"},
    },
    "Cache-Control": {"description": "The answer is a secret.", "required": True, "schema": {"const": "no-store"}},
    "Vary": {"description": "The answer depends on the header Prefer.", "schema": {"const": "Prefer"}},
    "Idempotency-Replayed": {
        "description": "Present if this is a repetition of the first answer.",
        "schema": {"const": "true"},
    },
    "Surety-Position": {
        "description": "For reads that must show this change. Missing where reads use no replica.",
        "schema": {"type": "string", "pattern": POSITION_PATTERN},
    },
    "Retry-After": {
        "description": "Seconds to wait.",
        "required": True,
        "schema": {"type": "string", "pattern": "^[0-9]+$"},
    },
    "RateLimit-Policy": {
        "description": "The rate limits of the key and its merchant, a structured list. Missing without one.",
        "schema": {"type": "string"},
    },
    "RateLimit": {
        "description": "The number of requests that is left of each rate limit, and for how many seconds.",
        "schema": {"type": "string"},
    },
    "WWW-Authenticate": {"required": True, "schema": {"const": "Bearer"}},
}
HEADERS_BY_STATUS = {201: ["Location"], 401: ["WWW-Authenticate"], 429: ["Retry-After"], 503: ["Retry-After"]}
RATE_LIMIT_HEADERS = ("RateLimit-Policy", "RateLimit")

IDEMPOTENCY_KEY_PARAMETER: JsonDocument = {
    "name": "Idempotency-Key",
    "in": "header",
    "required": True,
    "description": "1 to 255 printable characters: new for each request, the same for each repetition.",
    "schema": {"type": "string", "minLength": 1, "maxLength": 255},
}
VERSION_PARAMETER: JsonDocument = {
    "name": VERSION_HEADER,
    "in": "header",
    "required": False,
    "description": f"The version of the API, by its date; without it `{VERSIONS[0]}`, and so for ever.",
    "schema": {"type": "string", "enum": VERSIONS},
}
TRACE_PARAMETER: JsonDocument = {
    "name": "traceparent",
    "in": "header",
    "required": False,
    "description": "The trace context (W3C) of the caller, for the events of this request. An invalid one is ignored.",
    "schema": {"type": "string"},
}
PREFER_PARAMETER: JsonDocument = {
    "name": "Prefer",
    "in": "header",
    "required": False,
    "description": "`wait=N` (RFC 7240): wait up to N seconds, at most 30, for a result. Anything else is ignored.",
    "schema": {"type": "string"},
}
