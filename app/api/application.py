"""The HTTP API as an ASGI application: the routes of app/api/routes.py and the services that their endpoints use.

The SQL functions take the SHA-256 of the API key and find the merchant themselves, so no route can name one.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial

from app.api.commands import SCHEDULE_COMMAND_WORKERS
from app.api.create_payment import CREATE_PAYMENTS
from app.api.openapi import documentation_assets, documentation_routes
from app.api.requests import ApiRequest, ApiServices
from app.api.routes import ROUTES
from app.api.waiting import WaitingRequests
from app.web.auth import Authenticator
from app.web.batching import PARALLEL_BATCH_MIN, BatchingConnections
from app.web.database import DatabasePool
from app.web.key_uses import KeyUses
from app.web.load_shedding import OVERLOAD_CHECKS
from app.web.rate_limits.addresses import FailedAuthentications
from app.web.rate_limits.leases import PermitLeases
from app.web.refusals import RefusalCounter
from app.web.replica import replica_of
from app.web.routing import HttpApplication
from app.web.worker_scheduler import WorkerScheduler
from db.connect import connect_async
from db.settings import Settings, load_settings


def create_app(
    settings: Settings | None = None, *, connections: int = 2, batch_max: int = 200, waiting_max: int | None = None
) -> HttpApplication:
    """The application.

    `connections` and `batch_max` bound the batching connections of POST /v1/payments, `waiting_max` the requests that
    wait for an event.
    """
    settings = settings or load_settings()
    return HttpApplication(
        [*ROUTES, *documentation_routes(ROUTES)],
        ApiRequest,
        partial(open_api_services, settings, connections, batch_max, waiting_max),
        assets=[documentation_assets()],
    )


@asynccontextmanager
async def open_api_services(
    settings: Settings, connections: int, batch_max: int, waiting_max: int | None
) -> AsyncGenerator[ApiServices]:
    """The services, open. Each is closed even if another one's closing fails."""
    # Slow reads take no connection from commands, and neither takes one from the health check.
    database = DatabasePool("api", settings)
    reading = DatabasePool("api", settings)
    health = DatabasePool("api", settings, connections_max=1)
    batching = BatchingConnections(
        lambda: connect_async("api", settings),
        CREATE_PAYMENTS,
        connections=connections,
        batch_max=batch_max,
        batch_max_of_sender=PARALLEL_BATCH_MIN,
    )
    async with AsyncExitStack() as closing:
        for pool in (database, reading, health):
            closing.push_async_callback(pool.close)
            await pool.open()
        payment_scheduler = WorkerScheduler(partial(database.fetch_row, "select outbox.schedule_handlers('{submit}')"))
        command_scheduler = WorkerScheduler(partial(database.fetch_row, SCHEDULE_COMMAND_WORKERS))
        refusals = RefusalCounter("denied", database)
        closing.push_async_callback(refusals.close)
        key_uses = KeyUses(database)
        closing.push_async_callback(key_uses.close)
        closing.push_async_callback(payment_scheduler.close)
        closing.push_async_callback(command_scheduler.close)
        closing.push_async_callback(batching.close)
        await batching.open()
        OVERLOAD_CHECKS[b"POST", b"/v1/payments"] = batching.is_full
        closing.callback(OVERLOAD_CHECKS.pop, (b"POST", b"/v1/payments"))
        limited = RefusalCounter("limited", database)
        closing.push_async_callback(limited.close)
        permits = PermitLeases(lambda: connect_async("api", settings), limited)
        closing.push_async_callback(permits.close)
        await permits.open()
        waiting = WaitingRequests(reading, requests_max=waiting_max)
        closing.push_async_callback(waiting.close)
        replica = replica_of(settings)
        if replica is not None:
            closing.push_async_callback(replica.close)
            await replica.open()
        authenticator = Authenticator(database, reading, refusals, key_uses, replica)
        yield ApiServices(
            database, health, authenticator, batching, payment_scheduler, command_scheduler, settings.trusted_proxies,
            waiting, permits, FailedAuthentications(settings.surety_address_rate, limited),
            replica,
        )  # fmt: skip
