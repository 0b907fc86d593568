"""The sandbox's process: routing, and the steps from the open socket to the closed memory.

Nothing is awaited between the start of a request's execution and its commit, so requests change the memory one after
another.
"""

import asyncio
import gc
import logging
import os
import socket
from functools import partial
from pathlib import Path
from typing import Any, cast

import uvicorn
import uvloop

from app.graceful_stop import stoppable_server
from app.sandbox import control, scheduled_actions
from app.sandbox.connections import AnswerByTask, Message, SandboxProtocol, SandboxResponse
from app.sandbox.faults import DEMO_FAULTS, NO_FAULTS, FaultInjector, FaultProfile
from app.sandbox.memory import Memory
from app.sandbox.settings import WEBHOOK_SECRET, SandboxSettings
from app.sandbox.state import Sandbox
from app.sandbox.stripe import payer_page
from app.sandbox.stripe.errors import StripeError
from app.sandbox.stripe.parameters import decode_pairs
from app.sandbox.stripe.request_faults import inject_fault
from app.sandbox.stripe.requests import (
    READ_HEADERS,
    echoed_headers,
    error_response,
    execute_request,
    parse_request,
    server_error,
)
from app.sandbox.stripe.webhooks import WebhookSender

log = logging.getLogger("sandbox")

BACKLOG = 2048
# Cached records are most of all objects and have no cycles: with Python's own thresholds, a tenth of the process's time
# is a search for cycles.
GARBAGE_THRESHOLDS = (50_000, 20, 100)


class SandboxApplication:
    """Routes requests."""

    def __init__(self, sandbox: Sandbox, sender: WebhookSender) -> None:
        self.sandbox = sandbox
        self.sender = sender
        self._requests = 0
        self._boot = os.urandom(4).hex()

    def begin(self, scope: Message, body: str) -> SandboxResponse | AnswerByTask:
        """The answer of a whole request, or the function that sends it."""
        method, path, query = scope["method"], scope["path"], scope["query_string"].decode()
        try:
            if path.startswith("/v1/"):
                return self._answer_stripe(scope, method, path, query if method == "GET" else body)
            if path.startswith("/3ds/"):
                return self._answer_payer(method, path.removeprefix("/3ds/"), query, body)
            return control.handle_request(self.sandbox, method, path, query, body)
        except StripeError as refusal:
            self.sandbox.rollback()
            return error_response(refusal)
        except Exception:
            log.exception("%s %s", method, path)
            self.sandbox.rollback()
            return error_response(server_error())

    def _answer_stripe(self, scope: Message, method: str, path: str, form: str) -> SandboxResponse | AnswerByTask:
        sandbox = self.sandbox
        self._requests += 1
        request_id = f"req_{self._boot}{self._requests:08d}"
        headers = {name: value.decode("latin-1") for name, value in scope["headers"] if name in READ_HEADERS}
        echoed = echoed_headers(headers, request_id, sandbox.memory.now())
        try:
            request = parse_request(sandbox, method, path, headers, form, request_id)
        except StripeError as refusal:
            response = error_response(refusal)
        else:
            fault = sandbox.faults.of_request(request.operation.name, request.identity, writes=request.writes)
            if fault is not None:
                return partial(inject_fault, fault, sandbox, self.sender, request, echoed)
            response = execute_request(sandbox, request)
        response.headers += echoed
        return response

    def _answer_payer(self, method: str, intent_id: str, query: str, body: str) -> SandboxResponse:
        secret = dict(decode_pairs(query)).get("client_secret", "")
        html = [(b"content-type", b"text/html; charset=utf-8")]
        if method == "POST":
            outcome = dict(decode_pairs(body)).get("outcome", "")
            back = payer_page.submit_answer(self.sandbox, intent_id, secret, outcome)
            self.sandbox.commit()
            if back is not None:
                return SandboxResponse(303, b"", [*html, (b"location", back.encode())])
        return SandboxResponse(200, payer_page.render_page(self.sandbox, intent_id, secret).encode(), html)


def serve_sandbox(
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    fd: int | None = None,
    memory: Path = Path("sandbox.sqlite"),
    seed: int = 1,
    faults: bool | FaultProfile = False,
    webhook_url: str | None = None,
    webhook_secret: str = WEBHOOK_SECRET,
    settings: SandboxSettings | None = None,
) -> None:
    """Serve until SIGINT or SIGTERM; prints `listening on HOST:PORT` once connections are accepted.

    Port 0 takes a free one; `fd` is an open socket to use instead. `faults=True` is the demo's profile, and the payer
    then completes 3-D Secure automatically. `settings` holds everything else.
    """
    settings = settings or SandboxSettings()
    settings.seed, settings.webhook_url, settings.webhook_secret = seed, webhook_url, webhook_secret
    settings.auto_payer = settings.auto_payer or faults is True
    gc.freeze()
    gc.set_threshold(*GARBAGE_THRESHOLDS)
    profile = faults if isinstance(faults, FaultProfile) else DEMO_FAULTS if faults else NO_FAULTS
    listening = socket.socket(fileno=fd) if fd is not None else socket.create_server((host, port), backlog=BACKLOG)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_run(listening, memory, settings, profile))


async def _run(listening: socket.socket, path: Path, settings: SandboxSettings, profile: FaultProfile) -> None:
    listening.listen(BACKLOG)
    host, port = listening.getsockname()[:2]
    settings.public_url = settings.public_url or f"http://{host}:{port}"
    memory = Memory(path, settings.seed)
    if not memory.has_mode(livemode=settings.livemode):
        memory.close()
        raise SystemExit(f"{path} is the memory of a sandbox in {'test' if settings.livemode else 'live'} mode")
    sandbox = Sandbox(settings, memory, FaultInjector(settings.seed, profile))
    sender = WebhookSender(sandbox)
    config = uvicorn.Config(
        # Only SandboxProtocol calls it.
        cast(Any, SandboxApplication(sandbox, sender)),
        interface="asgi3",
        http=SandboxProtocol,
        ws="none",
        lifespan="off",
        log_level="error",
        access_log=False,
        server_header=False,
        date_header=False,
        proxy_headers=False,
        backlog=BACKLOG,
        timeout_graceful_shutdown=1,
    )
    server = stoppable_server(config)
    print(f"listening on {host}:{port}", flush=True)  # noqa: T201  # the parent process waits for this line
    tasks = [
        asyncio.create_task(scheduled_actions.run_scheduled_actions(sandbox, sender)),
        asyncio.create_task(sender.run()),
    ]
    if settings.payout_seconds > 0:
        tasks.append(asyncio.create_task(scheduled_actions.pay_out_periodically(sandbox)))
    for task in tasks:
        task.add_done_callback(_log_failure)
    try:
        await server.serve(sockets=[listening])
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        memory.close()


def _log_failure(task: asyncio.Task[None]) -> None:
    """Log the exception of a background task: these tasks never end by themselves."""
    if not task.cancelled() and (failure := task.exception()) is not None:
        log.critical("a background task of the sandbox failed", exc_info=failure)
