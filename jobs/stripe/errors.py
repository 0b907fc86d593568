"""Errors of calls to Stripe: each class says what to do next.

    ProviderError
    ├── ProviderBusy        409 and 429: repeat a little later
    ├── AccessRefused       401 and 403: our key or the account is refused; nothing was executed
    │   └── PermissionMissing  403: a restricted key lacks the permission for this path
    ├── OutcomeUnknown      the call may have taken effect: read the object before sending again
    │   ├── ObjectUnreadable  an object that does not follow Stripe's description
    │   └── ProviderOutage  no response, an incomplete or unreadable one, 5xx: the provider's failure
    ├── ObjectAbsent        a list of the account that was read to its end has no such object
    ├── CallRefused         400, or 404 about a merchant's parameter: Stripe did not execute the POST
    ├── PaymentDeclined     402: the issuer declined; the intent stays open
    ├── ResponseMismatch    a response about another object or amount: it is discarded
    └── RequestRejected     every other 4xx: it proves nothing about the outcome, so an operator must see it

Sources: https://docs.stripe.com/api/errors, https://docs.stripe.com/api/idempotent_requests.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal

import stripe

from db.redaction import without_addresses, without_keys

Json = dict[str, Any]

ReleaseCause = Literal[
    "circuit_open",
    "outage",
    "provider_busy",
    "access_refused",
    "fetched_elsewhere",
    "earlier_call",
    "method_needed",
    "worker_stopped",
    "database_failed",
]
"""The rows of outbox.release_causes: why an event is given back uncounted."""

# Stripe's words for a missing permission: "The provided key 'rk_…' does not have the required permissions for this
# endpoint on account 'acct_…'. Having the 'rak_…' permission would allow this request to continue." Others name no
# permission, or several. With Stripe-Account: "… the restricted API key does not have any Connect permissions."
PERMISSION_REFUSAL = re.compile(r"required permissions|permissions? would allow|any Connect permissions")
PERMISSION_NAME = re.compile(r"'(rak_[a-z0-9_]+)'")
ACCOUNT_NAME = re.compile(r"on account '(acct_[0-9A-Za-z_]+)'")

BUSY_SECONDS = 1.0
BUSY_SECONDS_MAX = 60.0

# Parameters that a merchant's request decides: an absent object that one of them names is the payment's failure.
PAYMENT_PARAMETERS = frozenset(
    {
        *("amount", "amount_to_capture", "customer", "description", "mandate_data", "payment_method", "return_url"),
        *("setup_future_usage", "statement_descriptor_suffix"),
    }
)
# Types of a 400 that prove that nothing was executed. An `idempotency_error` does not: the first request with the key
# may have taken effect.
REFUSAL_TYPES = frozenset({"invalid_request_error", "card_error"})
# Codes of a 400 about the object at Stripe: it is absent, or in another state than we assumed. The object decides.
OBJECT_CODES = frozenset({"resource_missing", "payment_intent_unexpected_state"})


class ProviderError(Exception):
    """A call to a provider without a usable response."""

    outcome = "error"

    def __init__(self, message: str, *, status: int | None = None, body: Json | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.body: Json = body or {}

    @property
    def error(self) -> Json:
        """The object under `error` in the response."""
        error = self.body.get("error")
        return error if isinstance(error, dict) else {"message": str(self)}


class ProviderBusy(ProviderError):
    """The provider asks for a later repetition."""

    outcome = "busy"

    def __init__(self, message: str, *, seconds: float, cause: ReleaseCause = "provider_busy", **more: Any) -> None:
        super().__init__(message, **more)
        self.seconds = seconds
        self.cause = cause


class AccessRefused(ProviderError):
    """The provider refuses our key or the account. It executed nothing."""

    outcome = "access_refused"


class PermissionMissing(AccessRefused):
    """The restricted key may not send this request. `permissions`: any of these would do, if Stripe names them.

    `account_id` is the account that the refusal names, if any.
    """

    def __init__(self, message: str, **more: Any) -> None:
        super().__init__(message, **more)
        self.permissions = tuple(PERMISSION_NAME.findall(message))
        named = ACCOUNT_NAME.search(message)
        self.account_id = named[1] if named else None


class OutcomeUnknown(ProviderError):
    """Whether the call took effect is unknown."""

    outcome = "unknown"


class ObjectUnreadable(OutcomeUnknown):
    """The object isn't as Stripe describes such objects."""


class ProviderOutage(OutcomeUnknown):
    """The provider gave no response, or an unreadable one."""


class ObjectAbsent(ProviderError):
    """The provider's list has no such object."""

    outcome = "absent"


class CallRefused(ProviderError):
    """The provider did not execute a call. Its words are the failure of the payment, refund, capture or evidence."""

    outcome = "refused"


class PaymentDeclined(ProviderError):
    """The issuer declined."""

    outcome = "declined"


class ResponseMismatch(ProviderError):
    """The response is about something else. `kind` is the discrepancy's, `differs` its field with our value and the
    provider's, `object_id` the object of the response.
    """

    outcome = "misfit"

    def __init__(self, message: str, *, kind: str, differs: tuple[str, Any, Any], object_id: str, **more: Any) -> None:
        super().__init__(message, **more)
        self.kind = kind
        self.field = dict(zip(("field", "here", "there"), differs, strict=True))
        self.object_id = object_id


class RequestRejected(ProviderError):
    """The request was wrong."""

    outcome = "rejected"


def provider_error(error: stripe.StripeError, *, writes: bool) -> ProviderError:
    """The ProviderError for an error of the SDK. `writes` is false for a GET, whose refusal is no payment's failure."""
    status, headers = error.http_status, {name.lower(): value for name, value in (error.headers or {}).items()}
    body: Json = error.json_body if isinstance(error.json_body, dict) else {}
    reported = body.get("error")
    if status is None:
        return ProviderOutage(f"no answer: {error.user_message or type(error).__name__}")
    if not isinstance(reported, dict):
        return senseless_answer(status)
    code = reported.get("code")
    if isinstance(reported.get("message"), str):
        reported = reported | {"message": without_keys(without_addresses(reported["message"]))}
        body = body | {"error": reported}
    message = f"Stripe {status}{f' {code}' if code else ''}: {reported.get('message')}"
    if status >= 500:
        # A replayed failure does not show the provider's present state.
        meant = OutcomeUnknown if headers.get("idempotent-replayed") == "true" else ProviderOutage
        return meant(message, status=status, body=body)
    retry = headers.get("stripe-should-retry")
    if (status in (409, 429) and retry != "false") or retry == "true":
        return ProviderBusy(message, seconds=retry_after_seconds(headers), status=status, body=body)
    if status == 403 and PERMISSION_REFUSAL.search(str(reported.get("message"))):
        return PermissionMissing(message, status=status, body=body)
    if status in (401, 403):
        return AccessRefused(message, status=status, body=body)
    if status == 402:
        return PaymentDeclined(message, status=status, body=body)
    if writes and is_refusal(status, reported):
        return CallRefused(message, status=status, body=body)
    return RequestRejected(message, status=status, body=body)


def senseless_answer(status: int) -> ProviderOutage:
    """The error for an answer that is no object of Stripe's. Its status below 500 is not Stripe's either."""
    return ProviderOutage(f"Stripe {status}: an answer that makes no sense", status=status if status >= 500 else None)


def is_refusal(status: int, reported: Json) -> bool:
    """Whether an error proves that a POST was not executed. Many refusals have neither `code` nor `param`."""
    if reported.get("type") not in REFUSAL_TYPES:
        return False
    if status in (400, 404) and reported.get("param") in PAYMENT_PARAMETERS:
        return True
    return status == 400 and reported.get("code") not in OBJECT_CODES


def retry_after_seconds(headers: Mapping[str, str]) -> float:
    """The pause before the next attempt: the provider's Retry-After, within limits."""
    asked = headers.get("retry-after", "")
    return min(float(asked), BUSY_SECONDS_MAX) if asked.isdecimal() else BUSY_SECONDS
