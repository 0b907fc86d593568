"""A PaymentIntent's life, in its order: created, confirmed, authenticated, charged, captured or canceled.

Every function changes records and emits events; the caller commits. A refusal is raised before any change. A decline is
raised after the failed charge was recorded, so that the charge is committed with it.
"""

import re
from hashlib import blake2b
from typing import Any

from app.sandbox.memory import StoredObject
from app.sandbox.state import Sandbox
from app.sandbox.stripe.errors import StripeError, invalid_request, missing, unsupported, wrong_state
from app.sandbox.stripe.events import emit
from app.sandbox.stripe.objects import balance, disputes, methods, payloads
from app.sandbox.stripe.objects.cards import AUTHENTICATION_NEEDED, Card, Decline
from app.sandbox.stripe.objects.currencies import check_amount, check_step
from app.sandbox.stripe.parameters import (
    AutomaticMethods,
    CancelIntent,
    CaptureIntent,
    ConfirmIntent,
    CreateIntent,
    MethodOptions,
    UpdateIntent,
    merge_metadata,
)
from app.sandbox.stripe.queries import card_of, find_owned

AUTHENTICATION_FAILED = Decline(
    "payment_intent_authentication_failure",
    None,
    "The provided PaymentMethod has failed authentication. You can provide payment_method_data or a new PaymentMethod"
    " to attempt to fulfill this PaymentIntent again.",
)
CONFIRMABLE = frozenset({"requires_payment_method", "requires_confirmation"})
CANCELABLE = CONFIRMABLE | {"requires_action", "requires_capture"}
EXPIRED = "expired"
SUFFIX_LENGTH_MAX = 22
DESCRIPTION_LENGTH_MAX = 1000
EMAIL = re.compile(r"[^@\s]+@[^@\s.]+(\.[^@\s.]+)+")


def create(sandbox: Sandbox, account: str, given: CreateIntent) -> StoredObject:
    """A new intent; charged at once only if `confirm` is set."""
    currency = given.currency.lower()
    check_amount(given.amount, currency)
    _check_common(given)
    if given.customer:
        find_owned(sandbox, "customer", account, given.customer, param="customer", status=400)
    method = methods.method_to_charge(sandbox, account, given.payment_method, given.customer)
    if given.confirm and not method:
        raise missing("payment_method")
    memory, created = sandbox.memory, sandbox.unix_seconds()
    id = memory.unused_id("pi", account, (sandbox.call and sandbox.call.key) or f"#{memory.next_seq()}")
    automatic = given.automatic_payment_methods or AutomaticMethods(enabled=True)
    secret, livemode = f"{id}_secret_{memory.unused_id('s', id)[2:]}", sandbox.settings.livemode
    body = payloads.intent(id, secret, created, currency, given, automatic, livemode=livemode)
    body["metadata"] = merge_metadata({}, given.metadata)
    body["payment_method_options"] = _options(None, given.payment_method_options)
    intent = StoredObject(id, "payment_intent", account, created, body, parent=given.customer or "")
    if method:
        card = methods.give_method(sandbox, intent, method)
        body["status"] = "requires_confirmation"
    if given.confirm:
        _check_return_url(body, given)
    memory.save(intent)
    emit(sandbox, "payment_intent.created", intent)
    if method and given.confirm:
        _pay(sandbox, intent, card, off_session=given.off_session, return_url=_return_url(given))
    return intent


def update(sandbox: Sandbox, intent: StoredObject, given: UpdateIntent) -> StoredObject:
    """Change an intent; amount, currency and payment method only before it is confirmed."""
    body = intent.body
    _check_common(given)
    if given.customer:
        find_owned(sandbox, "customer", intent.account, given.customer, param="customer", status=400)
    method = methods.method_to_charge(sandbox, intent.account, given.payment_method, given.customer or body["customer"])
    touches_money = (given.amount, given.currency, given.payment_method, given.capture_method) != (None,) * 4
    if touches_money and body["status"] not in CONFIRMABLE | {"requires_action"}:
        raise wrong_state("update", body)
    amount = body["amount"] if given.amount is None else given.amount
    currency = (given.currency or body["currency"]).lower()
    check_amount(amount, currency)
    body.update(
        amount=amount,
        currency=currency,
        capture_method=given.capture_method or body["capture_method"],
        metadata=merge_metadata(body["metadata"], given.metadata),
        payment_method_options=_options(body["payment_method_options"], given.payment_method_options),
    )
    for name in (
        *("customer", "description", "receipt_email", "setup_future_usage", "statement_descriptor_suffix"),
        "transfer_group",
    ):
        value = getattr(given, name)
        if value is not None:
            body[name] = value or None
    intent.parent = body["customer"] or ""
    if method:
        methods.give_method(sandbox, intent, method)
        body.update(status="requires_confirmation", next_action=None)
    sandbox.memory.save(intent)
    return intent


def confirm(sandbox: Sandbox, intent: StoredObject, given: ConfirmIntent) -> StoredObject:
    """Charge the intent's payment method, or ask for 3-D Secure first."""
    body = intent.body
    _check_method_types(given)
    _check_receipt_email(given)
    if body["status"] not in CONFIRMABLE:
        raise wrong_state("confirm", body)
    method = methods.method_to_charge(
        sandbox, intent.account, given.payment_method or body["payment_method"], body["customer"]
    )
    if not method:
        raise StripeError(
            400,
            "You cannot confirm this PaymentIntent because it's missing a payment method. You can either update the"
            " PaymentIntent with a payment method and then confirm it again, or confirm it again directly with a"
            " payment method or ConfirmationToken.",
            code="payment_intent_unexpected_state",
            stored=True,
            payment_intent=body,
        )
    _check_return_url(body, given)
    if given.capture_method:
        body["capture_method"] = given.capture_method
    if given.receipt_email is not None:
        body["receipt_email"] = given.receipt_email or None
    body["payment_method_options"] = _options(body["payment_method_options"], given.payment_method_options)
    if given.setup_future_usage:
        body["setup_future_usage"] = given.setup_future_usage
    card = methods.give_method(sandbox, intent, method)
    sandbox.memory.save(intent)
    _pay(sandbox, intent, card, off_session=given.off_session, return_url=_return_url(given))
    return intent


def complete_authentication(sandbox: Sandbox, intent: StoredObject, approved: bool) -> StoredObject:
    """Record the payer's answer to the 3-D Secure challenge; a decline is recorded, not raised."""
    body = intent.body
    if body["status"] != "requires_action":
        return intent
    card = card_of(sandbox, body["payment_method"])
    body["next_action"] = None
    sandbox.memory.save(intent)
    try:
        if not approved or card.challenge_fails:
            _fail(sandbox, intent, card, AUTHENTICATION_FAILED, charge=None)
        _charge(sandbox, intent, card, authenticated=True)
    except StripeError as decline:
        if decline.status != 402:
            raise
    return intent


def finish_processing(sandbox: Sandbox, intent: StoredObject) -> None:
    """A processing intent succeeds."""
    if intent.body["status"] == "processing":
        _succeed(sandbox, intent, sandbox.memory.get(intent.body["latest_charge"]))


def capture(sandbox: Sandbox, intent: StoredObject, given: CaptureIntent) -> StoredObject:
    """Capture the authorized amount or a part of it; the rest is released."""
    body = intent.body
    if not given.final_capture:
        raise unsupported("final_capture", "capturing one authorization several times")
    if given.statement_descriptor:
        raise _descriptor_refused()
    if body["status"] != "requires_capture":
        raise wrong_state("capture", body)
    amount = body["amount_capturable"] if given.amount_to_capture is None else given.amount_to_capture
    if amount < 1:
        raise invalid_request(
            "This value must be greater than or equal to 1.",
            param="amount_to_capture",
            code="parameter_invalid_integer",
        )
    if amount > body["amount_capturable"]:
        raise invalid_request(
            "The payment could not be captured because the requested capture amount is greater than the amount you can"
            " capture for this charge.",
            param="amount_to_capture",
            code="amount_too_large",
        )
    check_step(amount, body["currency"], "amount_to_capture")
    charge = sandbox.memory.get(body["latest_charge"])
    body["metadata"] = merge_metadata(body["metadata"], given.metadata)
    charge.body.update(captured=True, amount_captured=amount)
    balance.book_charge(sandbox, charge)
    sandbox.memory.save(charge)
    emit(sandbox, "charge.captured", charge)
    disputes.schedule_dispute(sandbox, charge)
    body.update(amount_capturable=0, amount_received=amount, status="succeeded")
    sandbox.memory.save(intent)
    emit(sandbox, "payment_intent.succeeded", intent)
    return intent


def cancel(sandbox: Sandbox, intent: StoredObject, reason: CancelIntent | str) -> StoredObject:
    """Cancel an intent; an authorization is released, which is not a refund since 2025-03-31.basil.

    https://docs.stripe.com/changelog/basil/2025-03-31/remove-refund-from-partial-capture-and-payment-cancellation-flow
    """
    body = intent.body
    if body["status"] not in CANCELABLE:
        raise wrong_state("cancel", body)
    body.update(
        amount_capturable=0,
        canceled_at=sandbox.unix_seconds(),
        cancellation_reason=reason if isinstance(reason, str) else reason.cancellation_reason,
        next_action=None,
        status="canceled",
    )
    if reason == EXPIRED:
        emit(sandbox, "charge.expired", sandbox.memory.get(body["latest_charge"]))
    sandbox.memory.save(intent)
    emit(sandbox, "payment_intent.canceled", intent)
    return intent


def expire_authorization(sandbox: Sandbox, intent: StoredObject) -> None:
    """Release an authorization that was not captured in time."""
    if intent.body["status"] == "requires_capture":
        cancel(sandbox, intent, EXPIRED)


def _pay(sandbox: Sandbox, intent: StoredObject, card: Card, *, off_session: bool, return_url: str | None) -> None:
    body = intent.body
    options = (body["payment_method_options"].get("card") or {}).get("request_three_d_secure")
    challenged = card.challenge == "required" or (card.challenge == "optional" and options in ("any", "challenge"))
    if off_session and not card.challenged_when_saved and sandbox.memory.get(body["payment_method"]).body["customer"]:
        challenged = False
    if not challenged:
        _charge(sandbox, intent, card, authenticated=False)
    elif off_session:
        _fail(
            sandbox, intent, card, AUTHENTICATION_NEEDED, charge=_new_charge(sandbox, intent, card, authenticated=False)
        )
    else:
        _challenge(sandbox, intent, return_url)


def _challenge(sandbox: Sandbox, intent: StoredObject, return_url: str | None) -> None:
    """Send the payer to the sandbox's page; without a return URL, Stripe's script does that."""
    body = intent.body
    page = f"{sandbox.settings.public_url}/3ds/{intent.id}?client_secret={page_secret(intent)}"
    if return_url:
        body["next_action"] = {
            "type": "redirect_to_url",
            "redirect_to_url": {"return_url": return_url, "url": page},
        }
    else:
        body["next_action"] = {
            "type": "use_stripe_sdk",
            "use_stripe_sdk": {"type": "three_d_secure_redirect", "stripe_js": page},
        }
    body.update(status="requires_action", last_payment_error=None)
    sandbox.memory.save(intent)
    emit(sandbox, "payment_intent.requires_action", intent)
    if sandbox.settings.auto_payer:
        sandbox.schedule(sandbox.settings.payer_seconds, "payer_answers", intent.id)


def _return_url(given: CreateIntent | ConfirmIntent) -> str | None:
    """Where the payer is sent back to; None if Stripe's script handles the action on the merchant's page."""
    return None if given.use_stripe_sdk else given.return_url


def page_secret(intent: StoredObject) -> str:
    """The secret in the address of an intent's page; it is not the intent's own."""
    return f"src_client_secret_{blake2b(intent.body['client_secret'].encode(), digest_size=12).hexdigest()}"


def _charge(sandbox: Sandbox, intent: StoredObject, card: Card, *, authenticated: bool) -> None:
    """Create the charge, which the card's issuer approves or declines."""
    body = intent.body
    if card.decline:
        _fail(
            sandbox, intent, card, card.decline, charge=_new_charge(sandbox, intent, card, authenticated=authenticated)
        )
    charge = _new_charge(sandbox, intent, card, authenticated=authenticated)
    charge.label = "succeeded"
    body.update(latest_charge=charge.id, last_payment_error=None, next_action=None)
    methods.keep_method(sandbox, intent)
    if body["capture_method"] == "manual":
        charge.body.update(paid=True, status="succeeded")
        until = sandbox.unix_seconds() + int(sandbox.settings.hold_seconds)
        charge.body["payment_method_details"]["card"]["capture_before"] = until
        body.update(amount_capturable=body["amount"], status="requires_capture")
        sandbox.memory.save(charge)
        sandbox.memory.save(intent)
        emit(sandbox, "charge.succeeded", charge)
        emit(sandbox, "payment_intent.amount_capturable_updated", intent)
        sandbox.schedule(sandbox.settings.hold_seconds, "hold_expires", intent.id)
    elif sandbox.settings.processing_seconds > 0:
        charge.label = charge.body["status"] = "pending"
        body["status"] = "processing"
        sandbox.memory.save(charge)
        sandbox.memory.save(intent)
        emit(sandbox, "charge.pending", charge)
        emit(sandbox, "payment_intent.processing", intent)
        sandbox.schedule(sandbox.settings.processing_seconds, "processing_ends", intent.id)
    else:
        _succeed(sandbox, intent, charge)


def _succeed(sandbox: Sandbox, intent: StoredObject, charge: StoredObject) -> None:
    amount = charge.body["amount"]
    charge.label = "succeeded"
    charge.body.update(amount_captured=amount, captured=True, paid=True, status="succeeded")
    intent.body.update(amount_received=amount, status="succeeded")
    if intent.body["capture_method"] == "automatic":
        balance.book_charge(sandbox, charge)
    else:
        sandbox.schedule(sandbox.settings.transaction_seconds, "book_charge", charge.id)
    sandbox.memory.save(charge)
    sandbox.memory.save(intent)
    emit(sandbox, "charge.succeeded", charge)
    emit(sandbox, "payment_intent.succeeded", intent)
    disputes.schedule_dispute(sandbox, charge)


def _fail(sandbox: Sandbox, intent: StoredObject, card: Card, decline: Decline, charge: StoredObject | None) -> None:
    """Record a failed attempt and raise its 402."""
    body = intent.body
    method = sandbox.memory.get(body["payment_method"]).body
    error: dict[str, Any] = {
        "code": decline.code,
        "doc_url": "https://stripe.com/docs/error-codes/" + decline.code.replace("_", "-"),
        "message": decline.message,
        "payment_method": method,
        "type": "card_error",
    }
    if decline.decline_code:
        error["decline_code"] = decline.decline_code
    if charge:
        error["charge"] = charge.id
        charge.label = "failed"
        charge.body.update(
            failure_code=decline.code,
            failure_message=decline.message,
            outcome=payloads.outcome(card, decline),
            paid=False,
            status="failed",
        )
        sandbox.memory.save(charge)
        body["latest_charge"] = charge.id
        emit(sandbox, "charge.failed", charge)
    body.update(last_payment_error=error, next_action=None, payment_method=None, status="requires_payment_method")
    sandbox.memory.save(intent)
    emit(sandbox, "payment_intent.payment_failed", intent)
    raise StripeError(
        402,
        decline.message,
        type="card_error",
        code=decline.code,
        decline_code=decline.decline_code,
        charge=charge.id if charge else None,
        payment_intent=body,
        payment_method=method,
        stored=True,
    )


def _new_charge(sandbox: Sandbox, intent: StoredObject, card: Card, *, authenticated: bool) -> StoredObject:
    id, created = sandbox.memory.unused_id("ch", intent.id), sandbox.unix_seconds()
    body = payloads.charge(id, intent.body, card, created, authenticated=authenticated)
    return sandbox.memory.save(
        StoredObject(id, "charge", intent.account, created, body, parent=intent.id, label="pending")
    )


def _check_common(given: UpdateIntent) -> None:
    _check_method_types(given)
    _check_receipt_email(given)
    if len(given.description or "") > DESCRIPTION_LENGTH_MAX:
        raise invalid_request(
            f"Invalid string: must be at most {DESCRIPTION_LENGTH_MAX} characters.", param="description"
        )
    if given.statement_descriptor:
        raise _descriptor_refused()
    if len(given.statement_descriptor_suffix or "") > SUFFIX_LENGTH_MAX:
        raise invalid_request(
            f"The statement descriptor suffix must be at most {SUFFIX_LENGTH_MAX} characters.",
            param="statement_descriptor_suffix",
        )


def _check_receipt_email(given: UpdateIntent | ConfirmIntent) -> None:
    """An empty text removes the address."""
    if given.receipt_email and not EMAIL.fullmatch(given.receipt_email):
        raise invalid_request(
            f"Invalid email address: {given.receipt_email}", param="receipt_email", code="email_invalid"
        )


def _check_method_types(given: UpdateIntent | ConfirmIntent) -> None:
    """Since 2026-09-30.endive, requests can only narrow the types of the account's settings."""
    if given.payment_method_types is not None:
        raise invalid_request(
            "payment_method_types can no longer be set. Use automatic_payment_methods, allowed_payment_method_types or"
            " excluded_payment_method_types.",
            param="payment_method_types",
            code="payment_method_types_no_longer_supported",
        )
    if given.allowed_payment_method_types is not None and "card" not in given.allowed_payment_method_types:
        raise unsupported("allowed_payment_method_types", "payment methods other than card")


def _check_return_url(body: dict[str, Any], given: CreateIntent | ConfirmIntent) -> None:
    """Intents that accept redirecting payment methods require a return URL."""
    redirects = body["automatic_payment_methods"]["allow_redirects"] != "never"
    if redirects and not given.return_url and not given.off_session:
        raise invalid_request(
            "This PaymentIntent is configured to accept payment methods enabled in your Dashboard. Because some of"
            " these payment methods might redirect your customer off of your page, you must provide a `return_url`. If"
            " you don't want to accept redirect-based payment methods, set `automatic_payment_methods[enabled]` to"
            " `true` and `automatic_payment_methods[allow_redirects]` to `never` when creating Setup Intents and"
            " Payment Intents.",
            param="return_url",
        )


def _descriptor_refused() -> StripeError:
    return invalid_request(
        "The `statement_descriptor` parameter is not supported for card charges. Use `statement_descriptor_suffix`.",
        param="statement_descriptor",
    )


def _options(held: dict[str, Any] | None, given: MethodOptions | None) -> dict[str, Any]:
    options = held or {
        "card": {"installments": None, "mandate_options": None, "network": None, "request_three_d_secure": "automatic"}
    }
    if given and given.card and given.card.request_three_d_secure:
        options = {"card": {**options["card"], "request_three_d_secure": given.card.request_three_d_secure}}
    return options
