"""The balance by currency, the transactions that changed it, and payouts of it."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta, Struct

from app.api.schemas.fields import Limit, PaymentId, PostingId, whole


class CurrencyBalance(Struct):
    """Your balance in one currency, in minor units: not settled yet, settled (it may be negative), withheld for
    disputes, reserved for refunds that have not arrived yet and for payouts to you that have not left yet.
    """

    currency: str
    pending: int
    available: int
    disputed: int
    reserved_for_refunds: int
    reserved_for_payouts: int


class Balance(Struct):
    object: Literal["balance"]
    data: list[CurrencyBalance]


class BalanceChange(Struct):
    account: Literal["pending", "available", "disputed", "reserved_for_refunds", "reserved_for_payouts"]
    amount: int
    currency: str


class BalanceTransaction(Struct):
    """A change of your balance; `type` names its cause."""

    id: str
    object: Literal["balance_transaction"]
    type: str
    payment: str | None
    changes: list[BalanceChange]
    created_at: str


class BalanceTransactionList(Struct):
    """Newest first. The next page starts after the last id: `starting_after`."""

    object: Literal["list"]
    data: list[BalanceTransaction]
    has_more: bool


class BalanceTransactionsQuery(Struct, frozen=True, forbid_unknown_fields=True):
    """Which balance transactions to list."""

    payment: PaymentId | None = None
    limit: Limit = 20
    starting_after: PostingId | None = None


class StatementBalance(Struct):
    """An account's balance at the beginning and at the end of the statement, in minor units."""

    currency: str
    account: Literal["pending", "available", "disputed", "reserved_for_refunds", "reserved_for_payouts"]
    opening: int
    closing: int


class BookedLine(Struct):
    """A booking in one currency. `gross` and `fee` add up to `net`, and `net` is the sum of the `changes`."""

    id: str
    object: Literal["statement_line"]
    type: str
    payment: str | None
    reference: str | None
    currency: str
    gross: int
    fee: int
    net: int
    changes: list[BalanceChange]
    booked_at: str
    recorded_at: str | None
    adjusts: str | None


class StatementPage(Struct):
    """A month's statement with a page of its lines, oldest first. The next page starts after the last id:
    `starting_after`. All lines lead from the opening to the closing balances.
    """

    object: Literal["statement"]
    month: str
    status: Literal["under_way", "over", "closed"]
    starts_at: str
    ends_at: str
    closed_at: str | None
    balances: list[StatementBalance]
    data: list[BookedLine]
    has_more: bool


class StatementQuery(Struct, frozen=True, forbid_unknown_fields=True):
    """Which statement to read."""

    month: Annotated[
        str,
        Meta(
            pattern=whole("2[0-9]{3}-(0[1-9]|1[0-2])"),
            description="A month by UTC that has begun.",
            extra={"form": "must be a month such as 2027-01"},
            examples=["2027-01"],
        ),
    ]
    limit: Limit = 100
    starting_after: PostingId | None = None


class MerchantPayout(Struct):
    """Money that we owe you and send you. The amount, in minor units, is reserved until the payout has left."""

    id: str
    object: Literal["merchant_payout"]
    status: Literal["asked", "left", "returned", "canceled"]
    amount: int
    currency: str
    schedule: Literal["manual", "daily", "weekly", "monthly"]
    period_begins: str
    created_at: str
    sent_at: str | None
    proof: str | None
    ended_at: str | None
    reason: str | None


class Currency(Struct):
    """A currency accepted. `exponent` is the number of decimal places; `minimum`, `maximum` and `step` bound the amount
    of a payment in minor units.
    """

    id: str
    object: Literal["currency"]
    exponent: int
    minimum: int
    maximum: int
    step: int


class CurrencyList(Struct):
    """All currencies, by their letters."""

    object: Literal["list"]
    data: list[Currency]
    has_more: bool
