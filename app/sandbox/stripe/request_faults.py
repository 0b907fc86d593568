"""The effect of each fault on a request. Faults are counted, and so are those whose request took effect."""

import asyncio
from contextlib import suppress

from app.sandbox.connections import ClientConnection, Headers, SandboxResponse
from app.sandbox.faults import RequestFault
from app.sandbox.state import Sandbox
from app.sandbox.stripe.errors import invalid_request
from app.sandbox.stripe.events import take_pending_deliveries
from app.sandbox.stripe.requests import (
    StripeRequest,
    error_response,
    execute_request,
    keep_response,
    key_in_use,
    key_reused,
    rate_limited,
    server_error,
)
from app.sandbox.stripe.variants import sparse_answer
from app.sandbox.stripe.webhooks import WebhookSender

WEBHOOK_FIRST_SECONDS_MAX = 2.0


async def inject_fault(
    fault: RequestFault,
    sandbox: Sandbox,
    sender: WebhookSender,
    request: StripeRequest,
    echoed: Headers,
    connection: ClientConnection,
) -> None:
    """Execute the request if the fault permits, and answer as the fault prescribes."""
    response = await _execute(fault, sandbox, sender, request)
    _count(sandbox, fault, request, response)
    match fault:
        case "timeout_before" | "timeout_after":
            await connection.hang(sandbox.settings.hang_seconds)
            return
        case "conflict_409":
            response = error_response(key_in_use(request.call.key or ""))
        case "refused_400":
            response = error_response(invalid_request("This request cannot be processed."))
        case "reused_key_400":
            response = error_response(key_reused(request.call.key or ""))
        case "rate_limit_429":
            response = error_response(rate_limited())
            response.headers.append((b"retry-after", b"1"))
        case "sparse_200" if response.status == 200:
            body = sparse_answer(response.body, sandbox.faults.stream(request.operation.name, request.identity))
            response = SandboxResponse(200, body, response.headers)
        case "garbage_200":
            response = SandboxResponse(200, b"<html>upstream connect error\x00", [])
    response.headers += echoed
    await (connection.reset_midway if fault == "reset" else connection.send)(response)


async def _execute(
    fault: RequestFault, sandbox: Sandbox, sender: WebhookSender, request: StripeRequest
) -> SandboxResponse:
    match fault:
        case "timeout_before" | "conflict_409" | "rate_limit_429" | "refused_400" | "reused_key_400":
            return SandboxResponse(0, b"", [])
        case "error_500_before":
            response = request.replay or error_response(server_error())
            keep_response(sandbox, request, response)
            return response
        case "error_500_after":
            return execute_request(sandbox, request, instead=server_error())
        case "slow":
            return await _execute_late(sandbox, request)
        case "webhook_first":
            return await _execute_and_deliver_first(sandbox, sender, request)
    return execute_request(sandbox, request)


async def _execute_late(sandbox: Sandbox, request: StripeRequest) -> SandboxResponse:
    in_use = (request.call.account, request.call.key or request.call.request_id)
    sandbox.keys_in_use.add(in_use)
    try:
        await asyncio.sleep(sandbox.settings.slow_seconds)
    finally:
        sandbox.keys_in_use.discard(in_use)
    return execute_request(sandbox, request)


async def _execute_and_deliver_first(
    sandbox: Sandbox, sender: WebhookSender, request: StripeRequest
) -> SandboxResponse:
    sandbox.delivering = event_ids = list[str]()
    response = execute_request(sandbox, request)
    sandbox.delivering = None
    if not request.writes:
        named = sandbox.memory.find(request.id)
        held = take_pending_deliveries(sandbox, named.body.get("payment_intent") or named.id if named else "")
        event_ids += [action.subject for action in held]
        for action in held:
            sender.post(action)
    with suppress(TimeoutError):
        async with asyncio.timeout(WEBHOOK_FIRST_SECONDS_MAX):
            await sender.delivery(event_ids)
    return response


def _count(sandbox: Sandbox, fault: RequestFault, request: StripeRequest, response: SandboxResponse) -> None:
    name = f"{request.operation.name}:{fault}"
    sandbox.memory.tally(f"faults:{name}")
    if response.took_effect:
        sandbox.memory.tally(f"effects:{name}")
    sandbox.commit()
