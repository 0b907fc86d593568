"""The balance by currency, the transactions that changed it, and payouts of it."""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

from app.api.schemas.fields import Limit, PaymentId, PostingId


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
