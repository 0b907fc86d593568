"""Webhook endpoints: /v1/webhook_endpoints and the paths below it."""

from __future__ import annotations

from typing import Any, LiteralString

import msgspec

from app.api.commands import execute_command
from app.api.ids import ENDPOINT_ID, id_or_empty
from app.api.requests import IDEMPOTENCY_REPLAYED, ApiRequest
from app.api.schemas.webhook_endpoints import (
    DeliveriesQuery,
    Disablement,
    Enablement,
    EndpointRemoval,
    NewWebhookEndpoint,
    SecretRotation,
    WebhookEndpointUpdate,
    WebhookReplay,
)
from app.web.asgi import HttpResponse
from app.web.problems import Problem
from db.webhook_secrets import make_secrets

NO_STORE = (b"cache-control", b"no-store")


async def create_webhook_endpoint(request: ApiRequest) -> HttpResponse:
    """Create a webhook endpoint. It gets every event that is committed from now on, signed by Standard Webhooks.

    The answer shows `secret` once. A repeated request gets the same endpoint without it: rotate the secret then.
    """
    secrets = SecretsOnce(request)
    return show_secret(
        await execute_command(
            request,
            NewWebhookEndpoint,
            "select status, problem, detail, body, is_replayed from api.create_webhook_endpoint(%s)",
            subject="merchant",
            subject_id="webhook_endpoints",
            location="/v1/webhook_endpoints/",
            needs_worker=False,
            make_sealed=secrets.make,
        ),
        secrets,
    )


async def rotate_webhook_secret(request: ApiRequest) -> HttpResponse:
    """Make a new secret, shown once. Requests are signed with the ones before as well, for `overlap_hours`."""
    secrets = SecretsOnce(request)
    return show_secret(
        await execute_command(
            request,
            SecretRotation,
            "select status, problem, detail, body, is_replayed from api.rotate_webhook_secret(%s)",
            subject="webhook_endpoint_id",
            subject_id=id_or_empty(request, ENDPOINT_ID),
            needs_worker=False,
            make_sealed=secrets.make,
        ),
        secrets,
    )


class SecretsOnce:
    """Secrets that only workers can open, made once the request is known to be valid."""

    def __init__(self, request: ApiRequest) -> None:
        self.request = request
        self.shown = ""

    async def make(self) -> dict[str, Any]:
        """The secrets as they are stored. Raises Problem if no worker has published a key yet."""
        row = await self.request.services.database.fetch_row("select id, public_key from api.read_sealing_key()")
        if row is None:
            await self.request.caller().require_valid_key()
            raise Problem("unavailable", "webhooks are not set up here: no worker has had SURETY_WEBHOOK_KEY")
        made = make_secrets(row[0], bytes(row[1]))
        self.shown = made.shown
        return {"secrets": msgspec.to_builtins(made.sealed)}


def show_secret(response: HttpResponse, secrets: SecretsOnce) -> HttpResponse:
    """Add the secret to a first answer. The answer that is stored for repetitions has none."""
    if IDEMPOTENCY_REPLAYED not in response.headers:
        document: dict[str, Any] = msgspec.json.decode(response.body)
        response.body = msgspec.json.encode(document | {"secret": secrets.shown})
    response.headers = [*response.headers, NO_STORE]
    return response


async def execute_endpoint_command(
    request: ApiRequest, struct: type[msgspec.Struct], statement: LiteralString
) -> HttpResponse:
    """The answer to a command about an endpoint. Raises Problem."""
    return await execute_command(
        request,
        struct,
        statement,
        subject="webhook_endpoint_id",
        subject_id=id_or_empty(request, ENDPOINT_ID),
        needs_worker=False,
    )


async def update_webhook_endpoint(request: ApiRequest) -> HttpResponse:
    """Change a webhook endpoint: the given fields only."""
    statement: LiteralString = "select status, problem, detail, body, is_replayed from api.update_webhook_endpoint(%s)"
    return await execute_endpoint_command(request, WebhookEndpointUpdate, statement)


async def enable_webhook_endpoint(request: ApiRequest) -> HttpResponse:
    """Enable a webhook endpoint, or let an enabled one skip waiting events."""
    statement: LiteralString = "select status, problem, detail, body, is_replayed from api.switch_webhook_endpoint(%s)"
    return await execute_endpoint_command(request, Enablement, statement)


async def disable_webhook_endpoint(request: ApiRequest) -> HttpResponse:
    """Disable a webhook endpoint. Its events wait."""
    statement: LiteralString = "select status, problem, detail, body, is_replayed from api.switch_webhook_endpoint(%s)"
    return await execute_endpoint_command(request, Disablement, statement)


async def replay_webhook_events(request: ApiRequest) -> HttpResponse:
    """Send events to a webhook endpoint again, under the same `webhook-id`; first count them."""
    statement: LiteralString = "select status, problem, detail, body, is_replayed from api.replay_webhook_events(%s)"
    return await execute_endpoint_command(request, WebhookReplay, statement)


async def delete_webhook_endpoint(request: ApiRequest) -> HttpResponse:
    """Delete a webhook endpoint and its secrets."""
    statement: LiteralString = "select status, problem, detail, body, is_replayed from api.delete_webhook_endpoint(%s)"
    return await execute_endpoint_command(request, EndpointRemoval, statement)


async def get_webhook_endpoint(request: ApiRequest) -> HttpResponse:
    """Read a webhook endpoint."""
    caller = request.caller()
    query = "select body from api.get_webhook_endpoint(%s, %s, %s)"
    return request.respond(await caller.fetch(query, id_or_empty(request, ENDPOINT_ID)))


async def list_webhook_endpoints(request: ApiRequest) -> HttpResponse:
    """List all webhook endpoints, newest first."""
    caller = request.caller()
    return request.respond(await caller.fetch("select body from api.list_webhook_endpoints(%s, %s)"))


async def list_deliveries(request: ApiRequest) -> HttpResponse:
    """List the attempts to deliver events to a webhook endpoint, newest first."""
    caller = request.caller()
    asked = await request.merchant_query(caller, DeliveriesQuery)
    query = "select body from api.list_deliveries(%s, %s, %s, %s, %s, %s, %s)"
    endpoint_id = id_or_empty(request, ENDPOINT_ID)
    return request.respond(
        await caller.fetch(query, endpoint_id, asked.outcome, asked.event, asked.limit, asked.starting_after)
    )
