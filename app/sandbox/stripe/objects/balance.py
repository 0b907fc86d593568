"""Balance transactions, the balance, automatic payouts."""

from math import ceil
from typing import Any

from app.sandbox.memory import StoredObject
from app.sandbox.state import Sandbox
from app.sandbox.stripe.events import emit
from app.sandbox.stripe.objects.currencies import exchange_rate, processing_fee, round_half_up
from app.sandbox.stripe.queries import card_of


def book_charge(sandbox: Sandbox, charge: StoredObject) -> None:
    """Create the balance transaction of a captured charge, of the captured amount."""
    amount, currency, rate = in_settlement_currency(sandbox, charge.body["amount_captured"], charge.body["currency"])
    card = card_of(sandbox, charge.body["payment_method"])
    charge.body["balance_transaction"] = create_balance_transaction(
        sandbox,
        charge,
        type="charge",
        amount=amount,
        fee=processing_fee(amount),
        currency=currency,
        exchange_rate=rate,
        description=charge.body["description"],
        delay_seconds=0 if card.available_at_once else sandbox.settings.available_seconds,
    ).id
    sandbox.memory.save(charge)


def in_settlement_currency(sandbox: Sandbox, amount: int, currency: str) -> tuple[int, str, float | None]:
    """An amount converted to the settlement currency: minor units, currency, and the rate if it was converted."""
    into = sandbox.settings.settlement_currency or currency
    if into == currency:
        return amount, currency, None
    rate = exchange_rate(currency, into)
    return round_half_up(amount * rate), into, float(rate)


def book_movement(
    sandbox: Sandbox,
    source: StoredObject,
    amount: int,
    *,
    type: str,
    description: str,
    reporting_category: str | None = None,
    fee: int = 0,
) -> StoredObject:
    """A refund's or a dispute's line: a signed amount in the source's currency, a fee in the balance's.

    A dispute's line has no exchange rate, even if its amount was exchanged.
    """
    sign = 1 if amount > 0 else -1
    size, currency, rate = in_settlement_currency(sandbox, abs(amount), source.body["currency"])
    return create_balance_transaction(
        sandbox,
        source,
        type=type,
        amount=sign * size,
        fee=fee,
        fee_description="Dispute fee",
        currency=currency,
        reporting_category=reporting_category,
        exchange_rate=None if source.kind == "dispute" else rate,
        description=description,
        delay_seconds=sandbox.settings.available_seconds,
    )


def book_charge_late(sandbox: Sandbox, charge: StoredObject) -> None:
    """Create the balance transaction of an `automatic_async` charge, and emit its event."""
    if charge.body["balance_transaction"] is None:
        book_charge(sandbox, charge)
        emit(sandbox, "charge.updated", charge, {"balance_transaction": None})


def create_balance_transaction(
    sandbox: Sandbox,
    source: StoredObject,
    *,
    type: str,
    amount: int,
    fee: int,
    currency: str,
    reporting_category: str | None = None,
    exchange_rate: float | None = None,
    description: str | None = None,
    fee_description: str = "Stripe processing fees",
    delay_seconds: float = 0,
    payout: str = "",
) -> StoredObject:
    """A balance transaction, in minor units of the settlement currency."""
    created = sandbox.unix_seconds()
    available_on = ceil(sandbox.memory.now() + delay_seconds) if delay_seconds else created
    id = sandbox.memory.unused_id("txn", reporting_category or type, source.id)
    details = []
    if fee:
        details.append(
            {
                "amount": fee,
                "application": None,
                "currency": currency,
                "description": fee_description,
                "type": "stripe_fee",
            }
        )
    body: dict[str, Any] = {
        "id": id,
        "object": "balance_transaction",
        "amount": amount,
        "available_on": available_on,
        "balance_type": "payments",
        "created": created,
        "currency": currency,
        "description": description,
        "exchange_rate": exchange_rate,
        "fee": fee,
        "fee_details": details,
        "net": amount - fee,
        "reporting_category": reporting_category or type,
        "source": source.id,
        # Rendered from `available_on`.
        "status": "pending",
        "type": type,
    }
    return sandbox.memory.save(
        StoredObject(
            id,
            "balance_transaction",
            source.account,
            created,
            body,
            parent=source.id,
            label=type,
            currency=currency,
            net=amount - fee,
            available_on=available_on,
            payout=payout,
        )
    )


def balance(sandbox: Sandbox, account: str) -> dict[str, Any]:
    """`GET /v1/balance`."""
    held = list(sandbox.memory.balance(account, sandbox.memory.now()))

    def lines(which: int) -> list[dict[str, Any]]:
        return [{"amount": row[which], "currency": row[0], "source_types": {"card": row[which]}} for row in held] or [
            {"amount": 0, "currency": "usd", "source_types": {"card": 0}}
        ]

    return {"object": "balance", "available": lines(1), "livemode": sandbox.settings.livemode, "pending": lines(2)}


def create_payouts(sandbox: Sandbox) -> list[str]:
    """Automatic payouts: all available money of every account, one payout for each currency. Returns their ids."""
    now = sandbox.memory.now()
    sandbox.memory.commit()
    made: list[str] = []
    announced = set()
    for account, currency, amount in sandbox.memory.payable(now):
        if account not in announced:
            announced.add(account)
            emit(
                sandbox,
                "balance.available",
                StoredObject("balance", "balance", account, int(now), balance(sandbox, account)),
            )
        id = sandbox.memory.unused_id("po", account, currency, sandbox.memory.next_seq())
        created = sandbox.unix_seconds()
        body: dict[str, Any] = {
            "id": id,
            "object": "payout",
            "amount": amount,
            "application_fee": None,
            "application_fee_amount": None,
            "arrival_date": ceil(now + sandbox.settings.payout_arrival_seconds),
            "automatic": True,
            "balance_transaction": None,
            "created": created,
            "currency": currency,
            "description": "STRIPE PAYOUT",
            "destination": sandbox.memory.unused_id("ba", account, currency),
            "failure_balance_transaction": None,
            "failure_code": None,
            "failure_message": None,
            "livemode": sandbox.settings.livemode,
            "metadata": {},
            "method": "standard",
            "original_payout": None,
            "payout_method": None,
            "reconciliation_status": "in_progress",
            "reversed_by": None,
            "source_type": "card",
            "statement_descriptor": None,
            "status": "in_transit",
            "trace_id": {"status": "pending", "value": None},
            "type": "bank_account",
        }
        payout = StoredObject(id, "payout", account, created, body, label="in_transit", currency=currency)
        sandbox.memory.assign_to_payout(account, currency, id, now)
        line = create_balance_transaction(
            sandbox, payout, type="payout", amount=-amount, fee=0, currency=currency,
            description="STRIPE PAYOUT", payout=id,
        )  # fmt: skip
        body["balance_transaction"] = line.id
        sandbox.memory.save(payout)
        emit(sandbox, "payout.created", payout)
        sandbox.schedule(sandbox.settings.payout_arrival_seconds, "payout_arrives", id)
        made.append(id)
    return made


def complete_payout(sandbox: Sandbox, payout: StoredObject) -> None:
    """The payout has arrived, and its balance transactions are reconciled."""
    if payout.body["status"] != "in_transit":
        return
    trace = sandbox.memory.unused_id("tr", payout.id)[3:18]
    payout.label = "paid"
    payout.body.update(
        status="paid", trace_id={"status": "supported", "value": trace}, reconciliation_status="completed"
    )
    sandbox.memory.save(payout)
    emit(sandbox, "payout.updated", payout, {"trace_id": {"status": "pending", "value": None}})
    emit(sandbox, "payout.paid", payout)
    emit(sandbox, "payout.reconciliation_completed", payout)


def fail_payout(sandbox: Sandbox, payout: StoredObject, failure_code: str) -> None:
    """The bank refused the payout, perhaps after it was paid: its amount is back in the balance."""
    returned = create_balance_transaction(
        sandbox,
        payout,
        type="payout_failure",
        amount=payout.body["amount"],
        fee=0,
        currency=payout.body["currency"],
        reporting_category="payout_reversal",
        description="STRIPE PAYOUT FAILURE",
    )
    payout.label = "failed"
    payout.body.update(
        status="failed",
        failure_balance_transaction=returned.id,
        failure_code=failure_code,
        failure_message="The bank refused the payout.",
    )
    sandbox.memory.save(payout)
    emit(sandbox, "payout.failed", payout)
