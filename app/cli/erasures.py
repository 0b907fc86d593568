"""`surety customers erase`: a payer asks to be forgotten."""

from __future__ import annotations

import hmac
import json
from collections import Counter
from typing import Any

import click
import psycopg
from psycopg.types.json import Jsonb
from rich.table import Table

from app.cli.identity import authorize
from app.cli.options import json_option, require_merchant
from app.cli.tables import print_table
from app.wording import count_noun
from db.connect import connect
from db.errors import SuretyError
from db.settings import load_settings

Connection = psycopg.Connection[tuple[Any, ...]]

EVENTS_AT_ONCE = 1000
ID_DIGITS = 11
"""Digits of an id that are its time, all but the last one."""


class NotErased(SuretyError):
    """Some payments are in progress, so their data were not erased."""


@click.command()
@click.option("--merchant", "merchant_id", required=True, metavar="MERCHANT", help="Whose payer it is.")
@click.option("--email", metavar="ADDRESS", help="Payments and customers with this address, in upper or lower case.")
@click.option("--payment", "payment_id", metavar="PAYMENT", help="One payment.")
@click.option("--customer", "customer_id", metavar="CUSTOMER", help="One customer, with its payments.")
@click.option("--dry-run", is_flag=True, help="Only count the rows that would change.")
@json_option
def erase(
    merchant_id: str,
    email: str | None,
    payment_id: str | None,
    customer_id: str | None,
    *,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Erase a payer's data: e-mail address, name, descriptions, metadata, evidence, and all that the provider sent.

    Amounts, states, the ledger and the audit trail stay, and so do references, ids and a card's last digits. Repeated
    requests get their first answer without the data. What the provider reports later is stored without them, too. A
    payment in progress is left, because its data are still needed: repeat the command when it has ended (exit status
    1). What the provider itself holds is erased there; the command names its ids.
    """
    if [email, payment_id, customer_id].count(None) != 2:
        raise SuretyError("give one of --email, --payment and --customer")
    with connect("deploy", load_settings()) as conn:
        by = authorize(conn, "customers:erase")
        require_merchant(conn, merchant_id, "--merchant")
        if dry_run:
            counts, refused, provider_ids, payments = count_all(conn, merchant_id, email, payment_id, customer_id)
        else:
            counts, refused, provider_ids, payments = erase_all(conn, by, merchant_id, email, payment_id, customer_id)
        methods = find_kept_mandates(conn, payments)
    if as_json:
        rows = {name: number for name, number in sorted(counts.items()) if number}
        kept = {"kept_by_provider": provider_ids, "methods_with_mandate": methods}
        click.echo(json.dumps({"is_dry_run": dry_run, "rows": rows, "in_progress": refused} | kept))
    else:
        show(counts, provider_ids, methods, dry_run=dry_run)
    if refused:
        named = "; ".join(f"{payment}: {reason}" for payment, reason in sorted(refused.items()))
        raise NotErased(f"{count_noun(len(refused), 'payment')} in progress, not erased: {named}")


def erase_all(
    conn: Connection,
    by: str,
    merchant_id: str,
    email: str | None,
    payment_id: str | None,
    customer_id: str | None,
) -> tuple[Counter[str], dict[str, str], list[str], list[str]]:
    """Erase all that matches.

    Returns the rows changed by table, the payments in progress with the reason, the provider's ids and all payments.

    Raises SuretyError if nothing is found.
    """
    counts: Counter[str] = Counter()
    found: set[str] = set()
    named: set[str] = set()
    erased: set[str] = set()
    # Until nothing new is found: a payment can be accepted meanwhile.
    while True:
        payments, customers, provider_ids = find(conn, merchant_id, email, payment_id, customer_id)
        if not erased and not payments and not customers:
            raise nothing_found(merchant_id)
        found.update(payments)
        named.update(provider_ids)
        refused = find_refused(conn, payments)
        new_payments = [payment for payment in payments if payment not in refused and payment not in erased]
        new_customers = [customer for customer in customers if not refused and customer not in erased]
        if not new_payments and not new_customers:
            break
        erased |= erase_found(conn, counts, new_payments, new_customers)
    subject = {"payment": payment_id, "customer": customer_id, "email_digest": digest_of(conn, email)}
    totals = {"rows": dict(counts), "payments": len(found), "in_progress": len(refused)}
    snapshot = totals | {name: value for name, value in subject.items() if value is not None}
    conn.execute(
        "select surety.audit_operator_action(%s, %s, 'payer erased', %s)",
        (by, merchant_id, Jsonb(snapshot)),
    )
    return counts, refused, sorted(named), sorted(found)


def count_all(
    conn: Connection, merchant_id: str, email: str | None, payment_id: str | None, customer_id: str | None
) -> tuple[Counter[str], dict[str, str], list[str], list[str]]:
    """What erase_all would return if nothing happened meanwhile. Changes and locks nothing.

    Raises SuretyError if nothing is found.
    """
    counts: Counter[str] = Counter()
    with conn.transaction():
        conn.execute("set transaction isolation level repeatable read, read only")
        payments, customers, provider_ids = find(conn, merchant_id, email, payment_id, customer_id)
        if not payments and not customers:
            raise nothing_found(merchant_id)
        refused = find_refused(conn, payments)
        erasable = [payment for payment in payments if payment not in refused]
        erasable_customers = customers if not refused else []
        if subjects := [*erasable, *erasable_customers]:
            [(rows, events)] = conn.execute(
                "select surety.count_erasable_rows(%s, %s), surety.count_erasable_events(%s, %s)",
                (erasable, erasable_customers, subjects, first_event_id(subjects)),
            ).fetchall()
            counts.update(rows | {"provider_events": events})
    return counts, refused, provider_ids, payments


def find_refused(conn: Connection, payments: list[str]) -> dict[str, str]:
    """Those of the payments that are in progress, with the reason."""
    rows = conn.execute(
        "select p.id, surety.why_not_erasable(p) from surety.payments as p where p.id = any(%s)", (payments,)
    ).fetchall()
    return {payment: reason for payment, reason in rows if reason is not None}


def nothing_found(merchant_id: str) -> SuretyError:
    """The merchant has no such payer."""
    return SuretyError(f"nothing of {merchant_id} was found: no payment and no customer")


def first_event_id(subjects: list[str]) -> str:
    """An id before those of all events about these payments and customers."""
    oldest = min(id.partition("_")[2] for id in subjects)
    return f"whk_{oldest[:ID_DIGITS]}"


def find(
    conn: Connection, merchant_id: str, email: str | None, payment_id: str | None, customer_id: str | None
) -> tuple[list[str], list[str], list[str]]:
    """The ids of the payments and customers that match, and of their objects at the provider."""
    [row] = conn.execute(
        "select * from surety.find_erasable(%s, %s, %s, %s)", (merchant_id, email, payment_id, customer_id)
    ).fetchall()
    return row


def erase_found(conn: Connection, counts: Counter[str], payments: list[str], customers: list[str]) -> set[str]:
    """Erase payments and customers, and count the rows; returns the ids of those that were not refused."""
    # In this order a repetition after a kill finds the rest: first the ids with which later events are compared, last
    # the labels and addresses by which payments and customers are found.
    conn.execute("select surety.begin_erasure(%s)", ([*payments, *customers],))
    counts["provider_events"] += redact_events(conn, first_event_id([*payments, *customers]))
    erased = {
        payment
        for payment in payments
        if "refused" not in count(counts, conn, "select surety.erase_payment(%s)", payment)
    }
    erased |= {
        customer
        for customer in customers
        if "refused" not in count(counts, conn, "select surety.erase_customer(%s, surety.time_now())", customer)
    }
    return erased


def count(counts: Counter[str], conn: Connection, query: str, subject: str) -> dict[str, Any]:
    """The rows that a function changed, added to the counts."""
    [(changed,)] = conn.execute(query.encode(), (subject,)).fetchall()
    counts.update({table: number for table, number in changed.items() if table != "refused"})
    return dict(changed)


def redact_events(conn: Connection, after: str) -> int:
    """Redact the provider's events since an id, a page at a time; returns how many have changed."""
    total = 0
    # Events that are stored from here on are redacted when they are received.
    [(until,)] = conn.execute("select max(id) from surety.provider_events").fetchall()
    while True:
        [(last, redacted)] = conn.execute(
            "select last_id, redacted from surety.redact_events(%s, %s, %s)", (after, until, EVENTS_AT_ONCE)
        ).fetchall()
        total += int(redacted)
        if last is None:
            return total
        after = last


def digest_of(conn: Connection, email: str | None) -> str | None:
    """A keyed digest of the address, by which the audit trail answers whether it was erased, without naming it."""
    if email is None:
        return None
    query = "select id, surety.fold_email(%s) from surety.environment"
    [(environment, folded)] = conn.execute(query, (email,)).fetchall()
    return hmac.digest(environment.encode(), folded.encode(), "sha256").hex()


def find_kept_mandates(conn: Connection, payments: list[str]) -> list[str]:
    """The methods that payments saved and that can be charged, so that they keep the payer's mandate."""
    rows = conn.execute(
        "select id from surety.payment_methods where payment_id = any(%s) and mandate <> '{}' order by id", (payments,)
    ).fetchall()
    return [method for (method,) in rows]


def show(counts: Counter[str], provider_ids: list[str], methods: list[str], *, dry_run: bool) -> None:
    """The rows by table, the methods with a mandate, and the provider's ids."""
    table = Table("table", "rows to change" if dry_run else "rows changed", box=None)
    print_table(table, sorted((name, number) for name, number in counts.items() if number))
    if methods:
        click.echo(f"kept until the customer is erased: the mandate of {' '.join(methods)}")
    if provider_ids:
        click.echo(f"the provider still holds: {' '.join(provider_ids)}")
