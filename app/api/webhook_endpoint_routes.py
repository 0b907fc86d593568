"""The routes of webhook endpoints, rows of the table in routes.py."""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

from app.api.commands import COMMAND_PROBLEMS
from app.api.schemas.webhook_endpoints import (
    DeliveriesQuery,
    DeliveryList,
    Disablement,
    Enablement,
    EndpointRemoval,
    NewWebhookEndpoint,
    SecretRotation,
    WebhookEndpoint,
    WebhookEndpointList,
    WebhookEndpointUpdate,
    WebhookEndpointWithSecret,
    WebhookReplay,
    WebhookReplayResult,
)
from app.api.webhook_endpoints import (
    create_webhook_endpoint,
    delete_webhook_endpoint,
    disable_webhook_endpoint,
    enable_webhook_endpoint,
    get_webhook_endpoint,
    list_deliveries,
    list_webhook_endpoints,
    replay_webhook_events,
    rotate_webhook_secret,
    update_webhook_endpoint,
)
from app.web.auth import KEY_PROBLEMS
from app.web.routing import Endpoint, Route

READING_PROBLEMS = ("invalid-request", "unauthenticated", *KEY_PROBLEMS, "overloaded", "unavailable")
WEBHOOK_ENDPOINT_COMMANDS: tuple[tuple[Literal["POST", "DELETE"], str, Endpoint, type[Struct], type[Struct]], ...] = (
    ("POST", "", update_webhook_endpoint, WebhookEndpointUpdate, WebhookEndpoint),
    ("POST", "/enable", enable_webhook_endpoint, Enablement, WebhookEndpoint),
    ("POST", "/disable", disable_webhook_endpoint, Disablement, WebhookEndpoint),
    ("POST", "/replay", replay_webhook_events, WebhookReplay, WebhookReplayResult),
    ("DELETE", "", delete_webhook_endpoint, EndpointRemoval, WebhookEndpoint),
)
WEBHOOK_ENDPOINT_PROBLEMS = tuple(name for name in COMMAND_PROBLEMS if name != "wrong-state")

WEBHOOK_ENDPOINT_ROUTES = [
    Route(
        "POST",
        "/v1/webhook_endpoints",
        create_webhook_endpoint,
        {201: WebhookEndpointWithSecret},
        tuple(name for name in WEBHOOK_ENDPOINT_PROBLEMS if name != "not-found"),
        body=NewWebhookEndpoint,
        scope="webhooks:write",
        is_secret=True,
    ),
    Route(
        "GET",
        "/v1/webhook_endpoints",
        list_webhook_endpoints,
        {200: WebhookEndpointList},
        READING_PROBLEMS,
        scope="read",
    ),
    Route(
        "GET",
        "/v1/webhook_endpoints/{webhook_endpoint_id}",
        get_webhook_endpoint,
        {200: WebhookEndpoint},
        (*READING_PROBLEMS, "not-found"),
        scope="read",
    ),
    Route(
        "GET",
        "/v1/webhook_endpoints/{webhook_endpoint_id}/deliveries",
        list_deliveries,
        {200: DeliveryList},
        (*READING_PROBLEMS, "not-found"),
        query=DeliveriesQuery,
        scope="read",
    ),
    Route(
        "POST",
        "/v1/webhook_endpoints/{webhook_endpoint_id}/rotate_secret",
        rotate_webhook_secret,
        {200: WebhookEndpointWithSecret},
        WEBHOOK_ENDPOINT_PROBLEMS,
        body=SecretRotation,
        scope="webhooks:write",
        is_secret=True,
    ),
    *(
        Route(
            method,
            f"/v1/webhook_endpoints/{{webhook_endpoint_id}}{below}",
            endpoint,
            {200: answer},
            WEBHOOK_ENDPOINT_PROBLEMS,
            body=body,
            scope="webhooks:write",
        )
        for method, below, endpoint, body, answer in WEBHOOK_ENDPOINT_COMMANDS
    ),
]
