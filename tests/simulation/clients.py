"""The merchants: what they want, asked for until it is answered, and what they were told."""

from __future__ import annotations

import asyncio
import hashlib
import json
from typing import TYPE_CHECKING, Any

import psycopg
from msgspec import Struct, field

from app.api.schemas.payments import PaymentRequest
from app.web.batching import RefusedByDatabase, Unavailable
from tests.simulation.database import Pool
from tests.simulation.loop import Killed

if TYPE_CHECKING:
    from tests.simulation.schedule import Schedule

PATIENCE_SECONDS = 30.0
RETRY_AFTER_SECONDS = 1.0
REFUNDS_MAX = 3
# What a merchant who looks first wants, by the payment's state; others want anything at any time.
COMMANDS_BY_STATE: dict[str, tuple[str, ...]] = {
    "authorized": ("capture_payment", "capture_payment", "cancel_payment"),
    "disputed": ("submit_evidence",),
    **dict.fromkeys(("submitting", "provider_submitted", "requires_action"), ("cancel_payment",)),
    **dict.fromkeys(("confirmed", "settled", "partially_refunded"), ("create_refund",)),
}
# Who does what a command asks for.
HANDLER = {
    "capture_payment": "capture",
    "cancel_payment": "cancel",
    "create_refund": "refund",
    "submit_evidence": "evidence",
}
COMMANDS = tuple(HANDLER)
EVIDENCE_TEXTS = ("winning_evidence", "losing_evidence", "escalate_inquiry_evidence", "no more than the truth")


class WantedPayment(Struct):
    """A payment that a merchant wants, under one key, however often it is asked for."""

    number: int
    merchant: int
    key: str
    amount: int
    currency: str
    token: str
    capture_method: str
    reference: str | None
    answers: list[tuple[Any, ...]] = []
    """What was acknowledged: rows of api.create_payments."""

    command_answers: dict[str, list[tuple[int, str]]] = field(default_factory=dict)
    """By key, what was told of commands that took effect: status and document."""

    @property
    def payment_id(self) -> str | None:
        """The payment that was acknowledged."""
        return next((row[6] for row in self.answers if row[1] == 201), None)

    def asked(self, key_hash: bytes) -> PaymentRequest:
        """The request."""
        body = f"{self.amount} {self.currency} {self.token} {self.capture_method} {self.reference}"
        return PaymentRequest(
            n=0,
            request_id=f"req_{self.number}",
            key_hash=key_hash.hex(),
            address="127.0.0.1",
            idempotency_key=self.key,
            request_hash=hashlib.sha256(body.encode()).hexdigest(),
            amount=self.amount,
            currency=self.currency,
            rail="card",
            method_token=self.token,
            capture_method=self.capture_method,
            reference=self.reference,
            description=None,
            statement_descriptor_suffix=None,
            return_url=None,
            customer=None,
            metadata={},
        )


async def request_until_answered(schedule: Schedule, wanted: WantedPayment, *, at_once: bool = False) -> None:
    """A client: asks until it is answered, wherever somebody listens; for the first time at once, or in its turn."""
    while True:
        if not at_once:
            await schedule.turn(schedule.clients, "client asks")
        at_once = False
        try:
            async with asyncio.timeout(PATIENCE_SECONDS):
                row = await schedule.api.payments.submit(wanted.asked(schedule.keys[wanted.merchant]))
        except (Unavailable, RefusedByDatabase, TimeoutError) as error:
            if isinstance(error, RefusedByDatabase):
                schedule.report_violation("no statement fails", repr(error))
            await asyncio.sleep(RETRY_AFTER_SECONDS)
            continue
        wanted.answers.append(tuple(row))
        schedule.wake("submit")
        return


def send_command(schedule: Schedule) -> None:
    """A merchant wants something done about a payment of his: taken, called off, given back, defended."""
    known = [wanted for wanted in schedule.wanted if wanted.payment_id is not None]
    if not known:
        return
    chance = schedule.chance
    wanted = chance.choice(known)
    functions: tuple[str, ...] = COMMANDS
    if chance.random() < 0.8:
        [(state,)] = schedule.database.rows("select state from surety.payments where id = %s", wanted.payment_id)
        functions = COMMANDS_BY_STATE.get(state, ())
    if not functions:
        return
    function = chance.choice(functions)
    asked: dict[str, Any] = {"payment_id": wanted.payment_id}
    key = function
    match function:
        case "capture_payment" if chance.random() < 0.3:
            asked["amount"] = wanted.amount // 2
        case "create_refund":
            number = chance.randrange(REFUNDS_MAX)
            key = f"{function} {number}"
            # The last one wants all that is left.
            asked["amount"] = None if number == REFUNDS_MAX - 1 else wanted.amount // 3
        case "submit_evidence":
            disputes = schedule.database.rows(
                "select id from surety.disputes where payment_id = %s order by id", wanted.payment_id
            )
            if not disputes:
                return
            text = chance.choice(EVIDENCE_TEXTS)
            submit = chance.random() < 0.7
            key = f"{function} {text} {submit}"
            asked = {"dispute_id": disputes[0][0], "evidence": {"uncategorized_text": text}, "submit": submit}
    schedule.asking.append(schedule.clients.start(command(schedule, wanted, function, f"{key} {wanted.number}", asked)))


async def command(schedule: Schedule, wanted: WantedPayment, function: str, key: str, about: dict[str, Any]) -> None:
    """A client wants something done about a payment, until it is told what becomes of that."""
    asked = {
        "key_hash": schedule.keys[wanted.merchant].hex(),
        "request_id": f"req_{wanted.number}",
        "address": "127.0.0.1",
        "idempotency_key": key,
        "request_hash": hashlib.sha256(json.dumps(about).encode()).hexdigest(),
        **about,
    }
    while True:
        await schedule.turn(schedule.clients, "client asks")
        try:
            async with Pool(schedule, schedule.api).connection() as connection:
                query = f"select status, body from api.{function}(%s)"
                row = await (await connection.cursor().execute(query.encode(), (json.dumps(asked),))).fetchone()
        except (psycopg.OperationalError, Killed):
            await asyncio.sleep(RETRY_AFTER_SECONDS)
            continue
        assert row is not None
        if row[1] is not None:
            wanted.command_answers.setdefault(key, []).append((row[0], row[1]))
        schedule.wake(HANDLER[function])
        return
