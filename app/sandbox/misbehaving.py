"""What each fault does to a request. It is counted, together with whether the request had its effect all the same."""

import asyncio
from contextlib import suppress

from app.sandbox.answering import Request, answer, broken, key_in_use, rate_limited, refuse, store
from app.sandbox.faults import RequestFault
from app.sandbox.webhooks import Postman
from app.sandbox.wire import Answer, Connection, Headers
from app.sandbox.world import World

WEBHOOK_FIRST_SECONDS_MAX = 2.0


async def misbehave(
    fault: RequestFault, world: World, postman: Postman, request: Request, connection: Connection, echoed: Headers
) -> None:
    """Execute the request, or don't, and answer it in the fault's way."""
    answered = await _execute(fault, world, postman, request)
    _count(world, fault, request, answered)
    match fault:
        case "timeout_before" | "timeout_after":
            await connection.hang(world.settings.hang_seconds)
            return
        case "conflict_409":
            answered = refuse(key_in_use(request.call.key or ""))
        case "rate_limit_429":
            answered = refuse(rate_limited())
            answered.headers.append((b"retry-after", b"1"))
        case "garbage_200":
            answered = Answer(200, b"<html>upstream connect error\x00", [])
    answered.headers += echoed
    await (connection.break_off if fault == "reset" else connection.send)(answered)


async def _execute(fault: RequestFault, world: World, postman: Postman, request: Request) -> Answer:
    match fault:
        case "timeout_before" | "conflict_409" | "rate_limit_429":
            return Answer(0, b"", [])
        case "error_500_before":
            answered = request.replay or refuse(broken())
            store(world, request, answered)
            return answered
        case "error_500_after":
            return answer(world, request, instead=broken())
        case "slow":
            return await _execute_late(world, request)
        case "webhook_first":
            return await _execute_and_tell_first(world, postman, request)
    return answer(world, request)


async def _execute_late(world: World, request: Request) -> Answer:
    in_use = (request.call.account, request.call.key or request.call.request_id)
    world.keys_in_use.add(in_use)
    try:
        await asyncio.sleep(world.settings.slow_seconds)
    finally:
        world.keys_in_use.discard(in_use)
    return answer(world, request)


async def _execute_and_tell_first(world: World, postman: Postman, request: Request) -> Answer:
    world.delivering = told = list[str]()
    answered = answer(world, request)
    world.delivering = None
    if not request.writes:
        named = world.memory.find(request.id)
        held = world.take_held(named.body.get("payment_intent") or named.id if named else "")
        told += [plan.subject for plan in held]
        for plan in held:
            postman.post(plan)
    with suppress(TimeoutError):
        async with asyncio.timeout(WEBHOOK_FIRST_SECONDS_MAX):
            await postman.delivery(told)
    return answered


def _count(world: World, fault: RequestFault, request: Request, answered: Answer) -> None:
    name = f"{request.operation.name}:{fault}"
    world.memory.tally(f"faults:{name}")
    if answered.took_effect:
        world.memory.tally(f"effects:{name}")
    world.commit()
