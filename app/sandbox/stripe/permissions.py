"""Keys that are refused, permissions of restricted keys, and accounts that the platform has no access to.

A restricted key (`rk_test_…`) may do everything until `POST /sandbox/keys` gives it a list of permissions. Stripe
checks a key's permission for the path before it looks for the object; its words are those of its refusals. Write
includes read. Permissions for connected accounts are a list of their own.
"""

from typing import Any

from msgspec import Struct

from app.sandbox.memory import StoredObject
from app.sandbox.settings import PLATFORM_ACCOUNT
from app.sandbox.state import KeyState, Sandbox
from app.sandbox.stripe.errors import StripeError
from app.sandbox.stripe.events import emit

APPLICATION_ID = "ca_SuretyPlatform"

RESOURCES = {
    "account": "accounts_kyc_basic",
    "balance": "balance",
    "balance_transactions": "balance_transaction_source",
    "charges": "charge",
    "customers": "customer",
    "disputes": "dispute",
    "events": "event",
    "payment_intents": "payment_intent",
    "payment_methods": "payment_method",
    "payouts": "payout",
    "radar": "review",
    "refunds": "charge",
}
"""The permission's resource by the first part of the path after the version."""


class RestrictedKey(Struct, forbid_unknown_fields=True):
    """The body of `POST /sandbox/keys`: all that a restricted key may do."""

    key: str
    permissions: frozenset[str]
    connect: frozenset[str] = frozenset()
    """With `Stripe-Account`."""


class Connection(Struct, forbid_unknown_fields=True):
    """The body of `POST /sandbox/accounts`: whether an account is connected to the platform. All are by default."""

    id: str
    connected: bool


class AllKeys(Struct, forbid_unknown_fields=True):
    """The body of `POST /sandbox/key-state`: what Stripe says of every key."""

    state: KeyState


def set_key_state(sandbox: Sandbox, given: AllKeys) -> dict[str, Any]:
    """Refuse all keys, or accept them again."""
    sandbox.key_state = given.state
    return {"state": given.state}


def restrict_key(sandbox: Sandbox, given: RestrictedKey) -> dict[str, Any]:
    """Restrict a key until the sandbox ends."""
    sandbox.restricted_keys[given.key] = (given.permissions, given.connect)
    return {"key": given.key, "permissions": sorted(given.permissions), "connect": sorted(given.connect)}


def connect_account(sandbox: Sandbox, given: Connection) -> dict[str, Any]:
    """Connect an account to the platform, or disconnect it, until the sandbox ends. A change emits its event."""
    if given.connected == (given.id in sandbox.unconnected_accounts):
        sandbox.unconnected_accounts.discard(given.id)
        change = "authorized" if given.connected else "deauthorized"
        body = {"id": APPLICATION_ID, "name": "Surety", "object": "application"}
        application = StoredObject(APPLICATION_ID, "application", given.id, sandbox.unix_seconds(), body)
        emit(sandbox, f"account.application.{change}", application)
        if not given.connected:
            sandbox.unconnected_accounts.add(given.id)
    return {"id": given.id, "connected": given.connected}


def shown_key(key: str) -> str:
    """What Stripe's messages show of a key."""
    return f"{key[:8]}{'*' * 20}{key[-4:]}"


def check_access(sandbox: Sandbox, key: str, account: str, method: str, path: str) -> None:
    """Raises StripeError if the account is not connected, or if the key lacks the permission for this path."""
    shown = shown_key(key)
    if account in sandbox.unconnected_accounts:
        raise StripeError(
            403,
            f"The provided key '{shown}' does not have access to account '{account}' (or that account does not exist)."
            " Application access may have been revoked.",
            code="account_invalid",
        )
    if key not in sandbox.restricted_keys:
        return
    own, connect = sandbox.restricted_keys[key]
    permissions = own if account == PLATFORM_ACCOUNT else connect
    if not permissions and account != PLATFORM_ACCOUNT:
        raise StripeError(
            403,
            "You passed a restricted API key with the Stripe-Account header, but the restricted API key does not have"
            " any Connect permissions.",
        )
    resource = RESOURCES[path.split("/")[2]]
    needed = f"rak_{resource}_{'write' if method == 'POST' else 'read'}"
    if not permissions & {needed, f"rak_{resource}_write"}:
        raise StripeError(
            403,
            f"The provided key '{shown}' does not have the required permissions for this endpoint on account"
            f" '{account}'. Having the '{needed}' permission would allow this request to continue.",
        )
