"""A merchant's statement as it is read: the balances, then the lines in pages, and the proof that both tie."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import date, datetime
from decimal import Decimal
from typing import Any

import psycopg
from psycopg.rows import dict_row

from db.errors import SuretyError

PAGE_LINES = 5_000
HEAD = """
    select
        m.name, now.at, (%(month)s::date)::timestamp at time zone 'UTC' as starts_at,
        least(ledger.month_end(%(month)s), now.at) as ends_at, now.at >= ledger.month_end(%(month)s) as is_over,
        surety.format_time(c.closed_at) as closed_at,
        (select jsonb_object_agg(k.currency, k.exponent) from surety.currencies as k) as exponents,
        (select array_agg(k.kind order by k.kind) from ledger.account_kinds as k where k.owner = 'merchant') as kinds
    from surety.merchants as m
    cross join (select surety.read_clock() as at) as now
    left join ledger.closed_months as c on c.month = %(month)s
    where m.id = %(merchant)s
"""
LINES = "select * from ledger.statement_lines(%s, %s, %s, %s, %s)"


@dataclass(frozen=True)
class Line:
    """A posting in one currency. Amounts in minor units; `changes` by kind of account, whose sum is `net`."""

    id: str
    booked_at: datetime
    type: str
    payment: str | None
    reference: str | None
    object: str
    currency: str
    gross: int
    fee: int
    net: int
    changes: dict[str, int]
    recorded_at: datetime | None
    adjusts: str | None
    """The earlier month to which the provider's record belongs."""


@dataclass
class MerchantStatement:
    """The head of a statement. `balances` is (opening, closing) in minor units by currency and kind of account."""

    merchant: str
    name: str
    month: str
    starts_at: datetime
    ends_at: datetime
    status: str
    closed_at: str | None
    exponents: dict[str, int]
    kinds: list[str]
    balances: dict[str, dict[str, tuple[int, int]]] = field(default_factory=dict)

    def text_of(self, amount: int, currency: str) -> str:
        """An amount in major units. Of a currency that is not accepted it stays in minor units."""
        return str(Decimal(amount).scaleb(-self.exponents.get(currency, 0)))

    def currency_name(self, currency: str) -> str:
        """The currency as readers write it, and a remark where amounts are in minor units."""
        return currency.upper() if currency in self.exponents else f"{currency.upper()} (minor units)"


class NotTied(SuretyError):
    """The lines of a statement do not lead from its opening to its closing balances."""


def read_statement(conn: psycopg.Connection[Any], merchant_id: str, month: date) -> MerchantStatement:
    """The head of a statement. The transaction must see the lines as of the same instant.

    Raises SuretyError for an unknown merchant, and for a month that has not begun.
    """
    with conn.cursor(row_factory=dict_row) as cursor:
        head = cursor.execute(HEAD, {"merchant": merchant_id, "month": month}).fetchone()
        if head is None:
            raise SuretyError(f"--merchant: there is no merchant {merchant_id}")
        if head["starts_at"] > head["at"]:
            raise SuretyError(f"--month: {month:%Y-%m} has not begun")
        status = "closed" if head["closed_at"] else "over" if head["is_over"] else "under way"
        statement = MerchantStatement(
            merchant_id, head["name"], f"{month:%Y-%m}", head["starts_at"], head["ends_at"], status, head["closed_at"],
            head["exponents"], head["kinds"],
        )  # fmt: skip
        rows = cursor.execute(
            "select * from ledger.statement_balances(%s, %s, %s)",
            (merchant_id, statement.starts_at, statement.ends_at),
        ).fetchall()
    for row in rows:
        of_currency = statement.balances.setdefault(row["currency"], dict.fromkeys(statement.kinds, (0, 0)))
        of_currency[row["kind"]] = (row["opening_minor"], row["closing_minor"])
    return statement


def read_statement_lines(conn: psycopg.Connection[Any], statement: MerchantStatement) -> Iterator[Line]:
    """The lines, in pages. Raises NotTied after the last one if they do not lead to the closing balances."""
    moved: Counter[tuple[str, str]] = Counter()
    after = ""
    with conn.cursor(row_factory=dict_row) as cursor:
        while rows := cursor.execute(
            LINES, (statement.merchant, statement.starts_at, statement.ends_at, after, PAGE_LINES)
        ).fetchall():
            for row in rows:
                for kind, amount in row["changes"].items():
                    moved[row["currency"], kind] += amount
                yield line_of(row, statement)
            after = rows[-1]["posting_id"]
    expected = {
        (currency, kind): closing - opening
        for currency, kinds in statement.balances.items()
        for kind, (opening, closing) in kinds.items()
        if closing != opening
    }
    if expected != {key: amount for key, amount in moved.items() if amount}:
        raise NotTied(
            f"the statement of {statement.month} does not tie: a row was changed by hand; see `surety status`"
        )


def line_of(row: dict[str, Any], statement: MerchantStatement) -> Line:
    """A line from its row."""
    recorded_at = row["recorded_at"]
    is_late = recorded_at is not None and recorded_at < statement.starts_at
    return Line(
        row["posting_id"], row["booked_at"], row["rule"], row["payment_id"], row["reference"], row["object_id"],
        row["currency"], row["gross_minor"], row["fee_minor"], row["net_minor"], row["changes"], recorded_at,
        f"{recorded_at:%Y-%m}" if is_late else None,
    )  # fmt: skip
