"""Merchants: their requests, each repeated until it is answered, and the answers they got."""

from __future__ import annotations

import asyncio
import hashlib
import json
from typing import TYPE_CHECKING, Any

import psycopg
from msgspec import Struct, field

from app.api.schemas.payments import MethodToSave, PayerDetails, PaymentRequest
from app.api.versions import VERSIONS
from app.web.batching import RefusedByDatabase, Unavailable
from tests.simulation.database import Pool
from tests.simulation.loop import Killed

if TYPE_CHECKING:
    from tests.simulation.customers import KnownCustomer
    from tests.simulation.schedule import Schedule

PATIENCE_SECONDS = 30.0
RETRY_AFTER_SECONDS = 1.0
REFUNDS_MAX = 3
# Commands of merchants that look at the payment's state first. Others send any command at any time.
COMMANDS_BY_STATE: dict[str, tuple[str, ...]] = {
    "authorized": ("capture_payment", "capture_payment", "cancel_payment"),
    "disputed": ("submit_evidence",),
    **dict.fromkeys(("submitting", "provider_submitted", "requires_action"), ("cancel_payment",)),
    **dict.fromkeys(("confirmed", "settled", "partially_refunded"), ("create_refund",)),
}
# The handler of each command.
HANDLER = {
    "capture_payment": "capture",
    "cancel_payment": "cancel",
    "create_refund": "refund",
    "submit_evidence": "evidence",
}
COMMANDS = tuple(HANDLER)
CUSTOMER_HANDLER = {"update_customer": "update_customer", "detach_payment_method": "detach_method"}
EVIDENCE_TEXTS = ("winning_evidence", "losing_evidence", "escalate_inquiry_evidence", "no more than the truth")


class WantedPayment(Struct):
    """A payment that a merchant requests under one key, any number of times."""

    number: int
    merchant: int
    key: str
    amount: int
    currency: str
    token: str
    capture_method: str
    reference: str | None
    customer_id: str | None = None
    saved_method: str | None = None
    save_method: MethodToSave | None = None
    off_session: bool = False
    answers: list[tuple[Any, ...]] = []
    """Rows of api.create_payments that were acknowledged."""

    command_answers: dict[str, list[tuple[int, str]]] = field(default_factory=dict)
    """Status and document of each answered command that took effect, by key."""

    @property
    def is_by_script(self) -> bool:
        """Whether its payer acts by the provider's script if it must."""
        return not self.off_session and self.number % 3 == 0

    @property
    def email(self) -> str:
        """The payer's address, which the provider refuses for some."""
        return f"payer{self.number}@{'nowhere' if self.amount % 16 == 0 else 'shop.example'}"

    @property
    def payment_id(self) -> str | None:
        """The id of the acknowledged payment."""
        return next((row[6] for row in self.answers if row[1] == 201), None)

    def request(self, key_hash: bytes) -> PaymentRequest:
        """The request."""
        body = f"{self.amount} {self.currency} {self.token} {self.capture_method} {self.reference}"
        is_inline = self.customer_id is None and self.saved_method is None
        return PaymentRequest(
            n=0,
            request_id=f"req_{self.number}",
            key_hash=key_hash.hex(),
            address="127.0.0.1",
            api_version=VERSIONS[0],
            idempotency_key=self.key,
            request_hash=hashlib.sha256(body.encode()).hexdigest(),
            amount=self.amount,
            currency=self.currency,
            rail="card",
            method_token=self.token or None,
            capture_method=self.capture_method,
            reference=self.reference,
            description=None,
            statement_descriptor_suffix=None,
            return_url=None if self.off_session or self.is_by_script else "https://shop.example/return",
            off_session=self.off_session,
            customer=PayerDetails(email=self.email, name=f"Payer {self.number}") if is_inline else None,
            metadata={},
            customer_id=self.customer_id,
            saved_method=self.saved_method,
            save_method=self.save_method,
            authentication="script" if self.is_by_script else "redirect",
        )


async def request_until_answered(schedule: Schedule, wanted: WantedPayment, *, at_once: bool = False) -> None:
    """Send a request until it is answered. `at_once` skips the first turn."""
    while True:
        if not at_once:
            await schedule.turn(schedule.clients, "client request")
        at_once = False
        was_accepted = wanted.payment_id is not None
        try:
            async with asyncio.timeout(PATIENCE_SECONDS):
                row = await schedule.api.payments.submit(wanted.request(schedule.keys[wanted.merchant]))
        except (Unavailable, RefusedByDatabase, TimeoutError) as error:
            if isinstance(error, RefusedByDatabase):
                schedule.report_violation("no statement fails", repr(error))
            await asyncio.sleep(RETRY_AFTER_SECONDS)
            continue
        wanted.answers.append(tuple(row))
        if was_accepted and row[1] != 201:
            schedule.report_violation("an accepted request gets its answer again", f"{wanted.key}: {row[2]}")
        schedule.schedule_handlers("submit")
        return


def send_command(schedule: Schedule) -> None:
    """A merchant sends a command about one of its payments: capture, cancel, refund or submit evidence."""
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
            # The last refund takes the whole rest.
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
    schedule.asking.append(
        schedule.clients.start(command(schedule, wanted, function, f"{key} {wanted.number} {schedule.period}", asked))
    )


async def command(
    schedule: Schedule, wanted: WantedPayment | KnownCustomer, function: str, key: str, fields: dict[str, Any]
) -> None:
    """Send a command about a payment or a customer until it is answered."""
    asked = {
        "key_hash": schedule.keys[wanted.merchant].hex(),
        "request_id": f"req_{wanted.number}",
        "address": "127.0.0.1",
        "idempotency_key": key,
        "request_hash": hashlib.sha256(json.dumps(fields).encode()).hexdigest(),
        **fields,
    }
    while True:
        await schedule.turn(schedule.clients, "client request")
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
        schedule.schedule_handlers((HANDLER | CUSTOMER_HANDLER)[function])
        return
