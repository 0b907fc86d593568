"""The sandbox as a server: every request's way from the socket to its answer, faults included.

Between reading a request and committing it nothing is awaited, so requests change the memory one after another.
"""

import asyncio
import binascii
import logging
import signal
import socket
import struct
from base64 import b64decode
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path
from typing import Any, cast

import uvicorn
import uvloop
from msgspec import Struct
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from app.sandbox import agenda, control, payer
from app.sandbox.errors import StripeError, invalid
from app.sandbox.faults import DEMO, NONE, Faults, Profile, RequestFault
from app.sandbox.memory import Memory, StoredAnswer, encode
from app.sandbox.operations import Operation, find_operation
from app.sandbox.parameters import Pairs, decode_pairs, read_parameters
from app.sandbox.settings import API_VERSION, PLATFORM, Settings
from app.sandbox.webhooks import Postman
from app.sandbox.world import Call, World

log = logging.getLogger("sandbox")

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Headers = list[tuple[bytes, bytes]]

WEBHOOK_FIRST_SECONDS_MAX = 2.0
KEY_LENGTH_MAX = 255


class Answer(Struct):
    status: int
    body: bytes
    headers: Headers
    took_effect: bool = False


class ProtocolWithTransport(HttpToolsProtocol):
    """Lets the application break its connection, which ASGI knows no message for."""

    def on_message_begin(self) -> None:
        super().on_message_begin()
        cast(Scope, self.scope)["extensions"] = {"sandbox.transport": self.transport}


class Server:
    """The ASGI application."""

    def __init__(self, world: World, postman: Postman) -> None:
        self.world = world
        self.postman = postman
        self._in_progress: set[tuple[str, str]] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        method, path = scope["method"], scope["path"]
        query = scope["query_string"].decode()
        body = await _read(receive)
        try:
            if path.startswith("/v1/"):
                await self._answer_stripe(scope, receive, send, method, path, query if method == "GET" else body)
            elif path.startswith("/3ds/"):
                await self._answer_payer(send, method, path.removeprefix("/3ds/"), query, body)
            else:
                await control.answer(self.world, method, path, query, body, send)
        except StripeError as refusal:
            await _send(send, Answer(refusal.status, encode(refusal.body), []))

    async def _answer_stripe(
        self, scope: Scope, receive: Receive, send: Send, method: str, path: str, form: str
    ) -> None:
        """Authenticate, find the operation, let chance have its way, and answer."""
        world = self.world
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        key = headers.get(b"idempotency-key") if method == "POST" else None
        request_id = f"req_{world.memory.next_seq():014d}"
        account = headers.get(b"stripe-account", PLATFORM)
        echoed = _echoed(headers, request_id, key)
        try:
            _authenticate(headers)
            _check_version(headers)
            operation, id = find_operation(method, path)
            pairs = decode_pairs(form)
            call = Call(account, request_id, key)
            fingerprint = blake2b(encode((method, path, sorted(pairs))), digest_size=16).digest()
            replay = self._replay(call, fingerprint)
        except StripeError as refusal:
            await _send(send, _refused(refusal, echoed))
            return
        fault = world.faults.of_request(operation.name, key or path, writes=method == "POST")
        if fault is None:
            answer = replay or self._execute(operation, call, id, pairs, fingerprint)
            answer.headers += echoed
            await _send(send, answer)
            return
        answer_late = _Faulty(self, operation, call, id, pairs, fingerprint, replay, echoed)
        await answer_late.send_with(fault, scope, receive, send)

    def _replay(self, call: Call, fingerprint: bytes) -> Answer | None:
        """The answer stored under the key, or None for a new one; refuses a key's misuse."""
        key, memory = call.key, self.world.memory
        if key is None:
            return None
        if not 1 <= len(key) <= KEY_LENGTH_MAX:
            raise invalid("Idempotency keys have 1 to 255 characters.")
        if (call.account, key) in self._in_progress:
            raise _in_use(key)
        stored = memory.stored_answer(call.account, key)
        if stored is None or stored.created + self.world.settings.key_seconds < memory.now():
            return None
        if stored.fingerprint != fingerprint:
            raise StripeError(
                400,
                "Keys for idempotent requests can only be used with the same parameters they were first used with."
                f" Try using a key other than '{key}' if you meant to execute a different request.",
                type="idempotency_error",
            )
        replayed = [(b"idempotent-replayed", b"true"), (b"original-request", stored.request_id.encode())]
        return Answer(stored.status, stored.body, replayed)

    def _execute(
        self,
        operation: Operation,
        call: Call,
        id: str,
        pairs: Pairs,
        fingerprint: bytes,
        instead: StripeError | None = None,
    ) -> Answer:
        """Do it, store the answer under its key and commit both at once.

        With `instead` the answer is that error, whatever was done.
        """
        world, executed = self.world, True
        world.call = call
        try:
            given = read_parameters(operation.parameters, pairs)
            answer = Answer(200, encode(operation.run(world, call.account, id, given)), [], took_effect=True)
        except StripeError as refusal:
            executed = refusal.stored
            if not executed:
                world.rollback()
            answer = _refused(refusal, [])
            answer.took_effect = executed
        except Exception:
            log.exception("%s", operation.name)
            world.rollback()
            answer = _refused(_broken(), [])
        finally:
            world.call = None
        if instead is not None and executed:
            answer.status, answer.body = instead.status, encode(instead.body)
        if executed:
            self.store(call, fingerprint, answer)
        world.commit()
        return answer

    def store(self, call: Call, fingerprint: bytes, answer: Answer) -> None:
        if call.key is not None:
            memory = self.world.memory
            stored = StoredAnswer(fingerprint, answer.status, answer.body, call.request_id, memory.now())
            memory.store_answer(call.account, call.key, stored)

    async def _answer_payer(self, send: Send, method: str, intent_id: str, query: str, body: str) -> None:
        secret = dict(decode_pairs(query)).get("client_secret", "")
        headers = [(b"content-type", b"text/html; charset=utf-8")]
        if method == "POST":
            back = payer.answer(self.world, intent_id, secret, dict(decode_pairs(body)).get("outcome", ""))
            self.world.commit()
            if back is not None:
                await _send(send, Answer(303, b"", [*headers, (b"location", back.encode())]))
                return
        await _send(send, Answer(200, payer.page(self.world, intent_id, secret).encode(), headers))


class _Faulty:
    """One request that goes wrong."""

    def __init__(
        self,
        server: Server,
        operation: Operation,
        call: Call,
        id: str,
        pairs: Pairs,
        fingerprint: bytes,
        replay: Answer | None,
        echoed: Headers,
    ) -> None:
        self.server, self.world = server, server.world
        self.operation, self.call, self.echoed = operation, call, echoed
        self.id, self.pairs, self.fingerprint, self.replay = id, pairs, fingerprint, replay

    async def send_with(self, fault: RequestFault, scope: Scope, receive: Receive, send: Send) -> None:
        transport: asyncio.Transport = scope["extensions"]["sandbox.transport"]
        world, settings = self.world, self.world.settings
        match fault:
            case "timeout_before":
                self._count(fault)
                world.commit()
                await _hang(transport, receive, settings.hang_seconds)
            case "timeout_after":
                self._count(fault, self._answer())
                world.commit()
                await _hang(transport, receive, settings.hang_seconds)
            case "reset":
                answer = self._answer()
                self._count(fault, answer)
                world.commit()
                await _break_off(transport, receive, send, answer)
            case "error_500_before":
                broken = _refused(_broken(), [])
                if self.replay is None:
                    self.server.store(self.call, self.fingerprint, broken)
                self._count(fault)
                world.commit()
                await self._send(send, self.replay or broken)
            case "error_500_after":
                answer = self._answer(instead=_broken())
                self._count(fault, answer)
                await self._send(send, answer)
            case "conflict_409":
                self._count(fault)
                await self._send(send, _refused(_in_use(self.call.key or ""), []))
            case "rate_limit_429":
                self._count(fault)
                limited = StripeError(
                    429,
                    "Request rate limit exceeded. Please retry your request later.",
                    code="rate_limit",
                    should_retry=True,
                )
                await self._send(send, _refused(limited, [(b"retry-after", b"1")]))
            case "garbage_200":
                answer = self._answer()
                self._count(fault, answer)
                await self._send(send, Answer(200, b"<html>upstream connect error\x00", []))
            case "slow":
                held = (self.call.account, self.call.key or self.call.request_id)
                self.server._in_progress.add(held)
                try:
                    await asyncio.sleep(settings.slow_seconds)
                finally:
                    self.server._in_progress.discard(held)
                answer = self._answer()
                self._count(fault, answer)
                await self._send(send, answer)
            case "webhook_first":
                emitted = self._emitted_while_answering()
                with suppress(TimeoutError):
                    async with asyncio.timeout(WEBHOOK_FIRST_SECONDS_MAX):
                        await self.server.postman.expect(emitted)
                await self._send(send, self.answer)

    def _answer(self, instead: StripeError | None = None) -> Answer:
        if self.replay is not None:
            return self.replay
        return self.server._execute(self.operation, self.call, self.id, self.pairs, self.fingerprint, instead)

    def _emitted_while_answering(self) -> list[str]:
        """Answer, and tell which of the events are on their way to the receiver."""
        before = self.world.delivering
        self.world.delivering = emitted = list[str]()
        self.answer = self._answer()
        self.world.delivering = before
        self._count("webhook_first", self.answer)
        return emitted

    def _count(self, fault: RequestFault, answer: Answer | None = None) -> None:
        self.world.memory.tally(f"faults:{self.operation.name}:{fault}")
        if answer is not None and answer.took_effect:
            self.world.memory.tally(f"effects:{self.operation.name}:{fault}")

    async def _send(self, send: Send, answer: Answer) -> None:
        self.world.commit()
        answer.headers += self.echoed
        await _send(send, answer)


async def _read(receive: Receive) -> str:
    body = b""
    while True:
        message = await receive()
        body += message.get("body", b"")
        if not message.get("more_body"):
            return body.decode()


async def _send(send: Send, answer: Answer) -> None:
    headers = answer.headers
    if not any(name == b"content-type" for name, _ in headers):
        headers.append((b"content-type", b"application/json"))
    headers.append((b"content-length", b"%d" % len(answer.body)))
    await send({"type": "http.response.start", "status": answer.status, "headers": headers})
    await send({"type": "http.response.body", "body": answer.body})


async def _hang(transport: asyncio.Transport, receive: Receive, seconds: float) -> None:
    """Say nothing until the client leaves or the time is over, then cut the connection."""
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            while (await receive())["type"] != "http.disconnect":
                pass
    await _cut(transport, receive)


async def _break_off(transport: asyncio.Transport, receive: Receive, send: Send, answer: Answer) -> None:
    """Send the head and half of the body, then reset the connection."""
    length = (b"content-length", b"%d" % len(answer.body))
    await send({"type": "http.response.start", "status": answer.status, "headers": [*answer.headers, length]})
    await send({"type": "http.response.body", "body": answer.body[: len(answer.body) // 2], "more_body": True})
    await asyncio.sleep(0.02)
    await _cut(transport, receive)


async def _cut(transport: asyncio.Transport, receive: Receive) -> None:
    held = transport.get_extra_info("socket")
    if held is not None and not transport.is_closing():
        held.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    transport.abort()
    while (await receive())["type"] != "http.disconnect":
        pass


def _authenticate(headers: dict[bytes, str]) -> None:
    scheme, _, credentials = headers.get(b"authorization", "").partition(" ")
    if scheme.lower() == "basic":
        with suppress(binascii.Error, UnicodeDecodeError):
            credentials = b64decode(credentials).decode().partition(":")[0]
    if not credentials:
        raise StripeError(401, "You did not provide an API key.")
    if not credentials.startswith("sk_test_"):
        raise StripeError(401, f"Invalid API Key provided: {credentials[:8]}***")


def _check_version(headers: dict[bytes, str]) -> None:
    version = headers.get(b"stripe-version", API_VERSION)
    if version != API_VERSION:
        raise invalid(f"The sandbox speaks API version {API_VERSION}, not {version}.", param="Stripe-Version")


def _echoed(headers: dict[bytes, str], request_id: str, key: str | None) -> Headers:
    echoed = [(b"request-id", request_id.encode()), (b"stripe-version", API_VERSION.encode())]
    if key is not None:
        echoed.append((b"idempotency-key", key.encode("latin-1")))
    if b"stripe-account" in headers:
        echoed.append((b"stripe-account", headers[b"stripe-account"].encode("latin-1")))
    return echoed


def _refused(refusal: StripeError, headers: Headers) -> Answer:
    if refusal.should_retry is not None:
        headers = [*headers, (b"stripe-should-retry", str(refusal.should_retry).lower().encode())]
    return Answer(refusal.status, encode(refusal.body), headers)


def _in_use(key: str) -> StripeError:
    return StripeError(
        409,
        "There is currently another in-progress request using this Idempotent Key (that probably means you submitted"
        f" twice, and the other request is still going through): {key}. Please try again later.",
        type="idempotency_error",
        code="idempotency_key_in_use",
        should_retry=True,
    )


def _broken() -> StripeError:
    return StripeError(500, "An unknown error occurred.", type="api_error")


def serve(
    host: str = "127.0.0.1",
    port: int = 0,
    memory: Path = Path("sandbox.sqlite"),
    seed: int = 1,
    faults: bool | Profile = False,
    webhook_url: str | None = None,
    webhook_secret: str = "whsec_sandbox",
    *,
    fd: int | None = None,
    settings: Settings | None = None,
) -> None:
    """Serve until SIGINT or SIGTERM; prints `listening on HOST:PORT` once connections are accepted.

    Port 0 takes a free one, `fd` an open listening socket. `faults=True` is the demo's profile, in which the payer
    completes 3-D Secure by himself. `settings` gives the times; seed and webhook arguments go into them.
    """
    settings = settings or Settings()
    settings.seed, settings.webhook_url, settings.webhook_secret = seed, webhook_url, webhook_secret
    profile = faults if isinstance(faults, Profile) else DEMO if faults else NONE
    settings.auto_payer = settings.auto_payer or faults is True
    listening = socket.socket(fileno=fd) if fd is not None else _listen(host, port)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve(listening, memory, settings, profile))


def _listen(host: str, port: int) -> socket.socket:
    listening = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listening.bind((host, port))
    return listening


async def _serve(listening: socket.socket, path: Path, settings: Settings, profile: Profile) -> None:
    memory = Memory(path, settings.seed)
    world = World(settings, memory, Faults(settings.seed, profile))
    postman = Postman(world)
    config = uvicorn.Config(
        Server(world, postman),  # type: ignore[arg-type]
        http=ProtocolWithTransport,
        ws="none",
        lifespan="off",
        log_level="error",
        access_log=False,
        server_header=False,
        date_header=False,
        backlog=2048,
        timeout_graceful_shutdown=1,
    )
    for ending in (signal.SIGINT, signal.SIGTERM):
        # uvicorn raises the signal that ended it once more: that one must not end us before we have closed.
        signal.signal(ending, lambda *_: None)
    listening.listen(2048)
    host, port = listening.getsockname()[:2]
    settings.public_url = settings.public_url or f"http://{host}:{port}"
    print(f"listening on {host}:{port}", flush=True)
    own_life = [asyncio.create_task(agenda.follow(world, postman)), asyncio.create_task(postman.run())]
    if settings.payout_seconds > 0:
        own_life.append(asyncio.create_task(agenda.pay_out_regularly(world)))
    try:
        await uvicorn.Server(config).serve(sockets=[listening])
    finally:
        for task in own_life:
            task.cancel()
        await asyncio.gather(*own_life, return_exceptions=True)
        memory.close()
