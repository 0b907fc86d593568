"""What each fault does to a request. It is counted, together with whether the request had its effect all the same."""

import asyncio
from contextlib import suppress

from app.sandbox.answering import (
    StripeRequest,
    error_response,
    execute_request,
    keep_response,
    key_in_use,
    rate_limited,
    server_error,
)
from app.sandbox.faults import RequestFault
from app.sandbox.webhooks import WebhookSender
from app.sandbox.wire import ClientConnection, Headers, SandboxResponse
from app.sandbox.world import World

WEBHOOK_FIRST_SECONDS_MAX = 2.0


async def inject_fault(
    fault: RequestFault,
    world: World,
    sender: WebhookSender,
    request: StripeRequest,
    connection: ClientConnection,
    echoed: Headers,
) -> None:
    """Execute the request, or don't, and answer it in the fault's way."""
    response = await _execute(fault, world, sender, request)
    _count(world, fault, request, response)
    match fault:
        case "timeout_before" | "timeout_after":
            await connection.hang(world.settings.hang_seconds)
            return
        case "conflict_409":
            response = error_response(key_in_use(request.call.key or ""))
        case "rate_limit_429":
            response = error_response(rate_limited())
            response.headers.append((b"retry-after", b"1"))
        case "garbage_200":
            response = SandboxResponse(200, b"<html>upstream connect error\x00", [])
    response.headers += echoed
    await (connection.reset_midway if fault == "reset" else connection.send)(response)


async def _execute(fault: RequestFault, world: World, sender: WebhookSender, request: StripeRequest) -> SandboxResponse:
    match fault:
        case "timeout_before" | "conflict_409" | "rate_limit_429":
            return SandboxResponse(0, b"", [])
        case "error_500_before":
            response = request.replay or error_response(server_error())
            keep_response(world, request, response)
            return response
        case "error_500_after":
            return execute_request(world, request, instead=server_error())
        case "slow":
            return await _execute_late(world, request)
        case "webhook_first":
            return await _execute_and_deliver_first(world, sender, request)
    return execute_request(world, request)


async def _execute_late(world: World, request: StripeRequest) -> SandboxResponse:
    in_use = (request.call.account, request.call.key or request.call.request_id)
    world.keys_in_use.add(in_use)
    try:
        await asyncio.sleep(world.settings.slow_seconds)
    finally:
        world.keys_in_use.discard(in_use)
    return execute_request(world, request)


async def _execute_and_deliver_first(world: World, sender: WebhookSender, request: StripeRequest) -> SandboxResponse:
    world.delivering = event_ids = list[str]()
    response = execute_request(world, request)
    world.delivering = None
    if not request.writes:
        named = world.memory.find(request.id)
        held = world.take_pending_deliveries(named.body.get("payment_intent") or named.id if named else "")
        event_ids += [plan.subject for plan in held]
        for plan in held:
            sender.post(plan)
    with suppress(TimeoutError):
        async with asyncio.timeout(WEBHOOK_FIRST_SECONDS_MAX):
            await sender.delivery(event_ids)
    return response


def _count(world: World, fault: RequestFault, request: StripeRequest, response: SandboxResponse) -> None:
    name = f"{request.operation.name}:{fault}"
    world.memory.tally(f"faults:{name}")
    if response.took_effect:
        world.memory.tally(f"effects:{name}")
    world.commit()
