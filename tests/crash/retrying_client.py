"""A merchant's client. It repeats each request under its key until it is answered.

Acknowledged answers are on disk before the client continues.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import msgspec

ANSWER_SECONDS_MAX = 6.0
PAUSE_SECONDS = 0.1
REPEAT_SHARE = 0.1

Json = dict[str, Any]


class Request(msgspec.Struct, frozen=True):
    """A request. Its key makes every repetition the same request."""

    api_key: str
    idempotency_key: str
    path: str
    body: Json
    reference: str = ""
    """The reference of the request's payment, if there is one."""
    method: str = "POST"

    @property
    def headers(self) -> dict[str, str]:
        """Authorization and idempotency key."""
        return {"Authorization": f"Bearer {self.api_key}", "Idempotency-Key": self.idempotency_key}


class LoggedAnswer(msgspec.Struct):
    """A line of the log. The answer is kept because every repetition must return the same."""

    id: str
    request: Request
    status: int
    body: bytes


class RetryingClient:
    """One client for all merchants, with one log."""

    def __init__(self, log: Path, chance: random.Random) -> None:
        self.payments: list[str] = []
        """Acknowledged."""
        self.refunds: dict[str, int] = {}
        """Acknowledged, with their amounts."""
        self.customers: list[str] = []
        """Acknowledged."""
        self.removed: list[str] = []
        """Saved payment methods whose removal was acknowledged."""
        self.off_session = 0
        """Acknowledged payments by a saved method."""
        self.decisions: dict[str, str] = {}
        """Acknowledged outcomes of holds, by payment."""
        self.refused: Counter[str] = Counter()
        """Expected refusals, by the problem's name."""
        self.wrong_answers: list[str] = []
        """Unexpected refusals, and repetitions that differ from the first answer."""
        self.repeated = 0
        self.asked_again = 0
        self._chance = chance
        self._log = log.open("wb")

    async def ask(self, client: httpx.AsyncClient, request: Request, *, may_be_refused: bool = False) -> bool:
        """Send a request until it is answered, log the answer, and sometimes send it again. False if it was refused."""
        return await self.ask_for(client, request, may_be_refused=may_be_refused) is not None

    async def ask_for(
        self, client: httpx.AsyncClient, request: Request, *, may_be_refused: bool = False
    ) -> Json | None:
        """As `ask`; returns the answered document, or None."""
        answer = await self._answer(client, request)
        if not answer.is_success:
            refusal = expected_refusal(answer) if may_be_refused else None
            if refusal:
                self.refused[refusal] += 1
            else:
                self.wrong_answers.append(format_answer(request, answer))
            return None
        logged = self.log_answer(request, answer)
        if self._chance.random() < REPEAT_SHARE:
            again = await self._answer(client, request)
            self.asked_again += 1
            if (again.status_code, again.content) != (logged.status, logged.body):
                self.wrong_answers.append(f"{format_answer(request, again)}, not {logged.status} {logged.body!r}")
        document: Json = answer.json()
        return document

    async def _answer(self, client: httpx.AsyncClient, request: Request) -> httpx.Response:
        """The first answer that is final."""
        while True:
            try:
                body = request.body if request.method == "POST" else None
                answer = await client.request(request.method, request.path, json=body, headers=request.headers)
            except httpx.TransportError:
                pass
            else:
                if answer.status_code < 500:
                    return answer
                if answer.status_code != 503:
                    self.wrong_answers.append(format_answer(request, answer))
            self.repeated += 1
            await asyncio.sleep(PAUSE_SECONDS)

    def log_answer(self, request: Request, answer: httpx.Response) -> LoggedAnswer:
        """Write an answer to disk, then to memory."""
        document = answer.json()
        logged = LoggedAnswer(document["id"], request, answer.status_code, answer.content)
        self._log.write(msgspec.json.encode(logged) + b"\n")
        self._log.flush()
        os.fsync(self._log.fileno())
        match document["object"]:
            case "refund":
                self.refunds[logged.id] = document["amount"]
            case "payment" if request.path == "/v1/payments":
                self.payments.append(logged.id)
                self.off_session += "saved" in request.body["payment_method"]
            case "customer" if request.path == "/v1/customers":
                self.customers.append(logged.id)
            case "payment_method":
                self.removed.append(logged.id)
        return logged


def expected_refusal(answer: httpx.Response) -> str | None:
    """The problem's name if a valid request can get it: too late, too much, or not covered. Else None."""
    problem = answer.json()
    name = str(problem["type"]).removeprefix("/problems/")
    is_too_much = name == "invalid-request" and [(e["field"], e["rule"]) for e in problem["errors"]] == [
        ("/amount", "maximum")
    ]
    return name if is_too_much or name in {"wrong-state", "balance-too-low", "limit-exceeded"} else None


def format_answer(request: Request, answer: httpx.Response) -> str:
    """An answer in one line."""
    return f"{request.path} {request.idempotency_key}: {answer.status_code} {answer.text}"
