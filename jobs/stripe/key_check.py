"""The check of our key at Stripe: does it work, and does it have the permissions that we need?

A secret key (`sk_…`) may do everything, so one read suffices. A restricted key (`rk_…`) is asked for each permission by
a request without an effect: a list of one object, or a POST to an object whose id can't exist. Stripe refuses a request
with 403 if the key lacks the permission for its path, and otherwise says that there is no such object.
"""

from __future__ import annotations

import hashlib
import logging
from typing import Literal

from msgspec import Struct

from jobs.circuit_breaker import PROVIDER
from jobs.stripe.client import StripeGateway
from jobs.stripe.errors import AccessRefused, Json, PermissionMissing, ProviderBusy, ProviderError, ProviderOutage
from jobs.worker import Worker

log = logging.getLogger("surety.key")

# Stripe's own ids have no underscore after the prefix.
ABSENT_INTENT = "pi_surety_permission_check"
ABSENT_CUSTOMER = "cus_surety_permission_check"
ABSENT_METHOD = "pm_surety_permission_check"
ABSENT_DISPUTE = "du_surety_permission_check"


class KeyPermission(Struct, frozen=True):
    """A permission that a restricted key needs, and the request without an effect that shows whether it has it."""

    name: str
    """As Stripe's refusals name it."""
    resource: str
    """As Stripe's dashboard names it."""
    access: Literal["Read", "Write"]
    purpose: str
    method: Literal["get", "post"]
    path: str
    request: Json


ONE: Json = {"limit": 1}
PERMISSIONS = (
    KeyPermission(
        "rak_payment_intent_write", "Payment Intents", "Write", "create, confirm, capture and cancel payments",
        "post", f"/v1/payment_intents/{ABSENT_INTENT}/cancel", {},
    ),
    KeyPermission(
        "rak_payment_intent_read", "Payment Intents", "Read", "read payments with their charges",
        "get", "/v1/payment_intents", {**ONE, "expand": ["data.latest_charge.balance_transaction"]},
    ),
    KeyPermission(
        "rak_charge_write", "Charges and Refunds", "Write", "create refunds",
        "post", "/v1/refunds", {"payment_intent": ABSENT_INTENT},
    ),
    KeyPermission("rak_charge_read", "Charges and Refunds", "Read", "read refunds", "get", "/v1/refunds", ONE),
    KeyPermission(
        "rak_customer_write", "Customers", "Write", "create and update customers",
        "post", f"/v1/customers/{ABSENT_CUSTOMER}", {"description": ""},
    ),
    KeyPermission("rak_customer_read", "Customers", "Read", "find a customer again", "get", "/v1/customers", ONE),
    KeyPermission(
        "rak_payment_method_write", "Payment Methods", "Write", "detach saved payment methods",
        "post", f"/v1/payment_methods/{ABSENT_METHOD}/detach", {},
    ),
    KeyPermission(
        "rak_payment_method_read", "Payment Methods", "Read", "read saved payment methods",
        "get", f"/v1/payment_methods/{ABSENT_METHOD}", {},
    ),
    KeyPermission(
        "rak_dispute_write", "Disputes", "Write", "submit evidence",
        "post", f"/v1/disputes/{ABSENT_DISPUTE}", {"submit": False},
    ),
    KeyPermission("rak_dispute_read", "Disputes", "Read", "read disputes", "get", "/v1/disputes", ONE),
    KeyPermission("rak_balance_read", "Balance", "Read", "probe whether Stripe answers", "get", "/v1/balance", {}),
    KeyPermission(
        "rak_balance_transaction_source_read", "Balance Transaction Sources", "Read", "book Stripe's money",
        "get", "/v1/balance_transactions", {**ONE, "expand": ["data.source"]},
    ),
    KeyPermission("rak_payout_read", "Payouts", "Read", "reconcile payouts", "get", "/v1/payouts", ONE),
    KeyPermission("rak_event_read", "Events", "Read", "find what no webhook announced", "get", "/v1/events", ONE),
)  # fmt: skip


class AccountToCheck(Struct, frozen=True):
    """A row of surety.accounts_to_check; `account` is empty for the platform's own."""

    account: str
    takes_payments: bool


def key_digest(worker: Worker) -> str:
    """The first eight digits of the SHA-256 of the worker's key, which differ for another key."""
    return hashlib.sha256(worker.settings.provider.key.reveal().encode()).hexdigest()[:8]


async def check_provider_key_if_due(worker: Worker) -> None:
    """Check the key unless the last check was of this key, succeeded, and is younger than ten minutes."""
    if await worker.database.value("select surety.key_check_is_due(%s, %s)", PROVIDER, key_digest(worker)):
        await check_provider_key(worker)


async def check_provider_key(worker: Worker) -> None:
    """Check the key, record the result for `surety status`, and log missing permissions."""
    stripe = worker.stripe
    query = "select account, takes_payments from surety.accounts_to_check(%s)"
    accounts = await worker.database.rows(AccountToCheck, query, PROVIDER)
    if not any(not one.account for one in accounts):
        await note_failed_check(worker, "not asked, because the circuit of the platform's account is open")
        return
    try:
        account_id = await find_own_account(stripe)
        missing: list[str] = []
        for one in accounts if stripe.has_restricted_key else ():
            missing += await find_missing_permissions(stripe, one)
    except ProviderError as error:
        log.warning("the key at Stripe could not be checked: %s", error)
        await note_failed_check(worker, str(error))
        return
    if missing:
        log.error("the key at Stripe lacks permissions that are needed: %s", ", ".join(missing))
    query = "select surety.record_key_check(%s, %s, %s, %s, %s, %s)"
    found = stripe.livemode, stripe.has_restricted_key, account_id, missing, key_digest(worker)
    await worker.database.value(query, PROVIDER, *found)


async def note_failed_check(worker: Worker, reason: str) -> None:
    """Record for `surety status` that a check could not be finished. It is repeated within a minute."""
    query = "select surety.note_failed_key_check(%s, %s, %s, %s, %s)"
    key = worker.stripe.livemode, worker.stripe.has_restricted_key
    await worker.database.value(query, PROVIDER, *key, reason, key_digest(worker))


async def find_own_account(stripe: StripeGateway) -> str | None:
    """The id of the platform's own account; None if Stripe does not name it. Raises ProviderError.

    A restricted key may lack the permission to read it. Then Stripe's refusal may name it.
    """
    try:
        account_id = (await stripe.ask("", "get", "/v1/account", {})).body.get("id")
    except PermissionMissing as refusal:
        return refusal.account_id
    return account_id if isinstance(account_id, str) and account_id.startswith("acct_") else None


async def find_missing_permissions(stripe: StripeGateway, at: AccountToCheck) -> list[str]:
    """The permissions that the key lacks at an account. Raises ProviderError if that remains unknown."""
    missing: dict[str, None] = {}
    for wanted in PERMISSIONS:
        if wanted.access == "Write" and not at.takes_payments:
            continue
        try:
            await stripe.ask(at.account, wanted.method, wanted.path, wanted.request)
        except PermissionMissing as refusal:
            # Stripe may name all permissions each of which would do.
            is_named = not refusal.permissions or wanted.name in refusal.permissions
            name = wanted.name if is_named else refusal.permissions[0]
            missing[f"{name} (Connect)" if at.account else name] = None
        except (ProviderBusy, AccessRefused, ProviderOutage):
            raise
        except ProviderError:
            pass  # There is no such object, which the key was allowed to ask for.
    return list(missing)
