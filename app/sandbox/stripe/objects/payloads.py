"""New objects: every property of Stripe's objects, with its initial value."""

from typing import Any

from app.sandbox.stripe.objects.cards import Card, Decline
from app.sandbox.stripe.parameters import AutomaticMethods, CreateIntent


def intent(
    id: str,
    secret: str,
    created: int,
    currency: str,
    given: CreateIntent,
    automatic: AutomaticMethods,
    *,
    livemode: bool,
) -> dict[str, Any]:
    """A payment intent without a payment method."""
    return {
        "id": id,
        "object": "payment_intent",
        "amount": given.amount,
        "amount_capturable": 0,
        "amount_details": {"tip": {}},
        "amount_received": 0,
        "application": None,
        "application_fee_amount": None,
        "automatic_payment_methods": {"allow_redirects": automatic.allow_redirects, "enabled": automatic.enabled},
        "canceled_at": None,
        "cancellation_reason": None,
        "capture_method": given.capture_method or "automatic_async",
        "client_secret": secret,
        "confirmation_method": given.confirmation_method,
        "created": created,
        "currency": currency,
        "customer": given.customer or None,
        "description": given.description or None,
        "last_payment_error": None,
        "latest_charge": None,
        "livemode": livemode,
        "metadata": {},
        "next_action": None,
        "on_behalf_of": None,
        "payment_method": None,
        "payment_method_configuration_details": None,
        "payment_method_options": None,
        "payment_method_types": ["card"],
        "processing": None,
        "receipt_email": given.receipt_email or None,
        "review": None,
        "setup_future_usage": given.setup_future_usage,
        "shipping": None,
        "statement_descriptor": None,
        "statement_descriptor_suffix": given.statement_descriptor_suffix or None,
        "status": "requires_payment_method",
        "transfer_data": None,
        "transfer_group": given.transfer_group or None,
    }


def method(id: str, card: Card, created: int, *, livemode: bool) -> dict[str, Any]:
    """A payment method made from a test card."""
    return {
        "id": id,
        "object": "payment_method",
        "allow_redisplay": "unspecified",
        "billing_details": empty_billing_details(),
        "card": {
            "brand": card.brand,
            "checks": {"address_line1_check": None, "address_postal_code_check": None, "cvc_check": None},
            "country": card.country,
            "display_brand": card.brand,
            "exp_month": 11,
            "exp_year": 2030,
            "fingerprint": card.fingerprint,
            "funding": card.funding,
            "generated_from": None,
            "last4": card.last4,
            "networks": {"available": [card.brand], "preferred": None},
            "regulated_status": "unregulated",
            "three_d_secure_usage": {"supported": card.challenge != "unsupported"},
            "wallet": None,
        },
        "created": created,
        "customer": None,
        "livemode": livemode,
        "metadata": {},
        "type": "card",
    }


def charge(id: str, intent: dict[str, Any], card: Card, created: int, *, authenticated: bool) -> dict[str, Any]:
    """A charge that the issuer has not answered yet."""
    three_d_secure = None
    if authenticated:
        three_d_secure = {
            "authentication_flow": "challenge",
            "electronic_commerce_indicator": "05",
            "exemption_indicator": None,
            "result": "authenticated",
            "result_reason": None,
            "transaction_id": None,
            "version": "2.2.0",
        }
    return {
        "id": id,
        "object": "charge",
        "amount": intent["amount"],
        "amount_captured": 0,
        "amount_refunded": 0,
        "application": None,
        "application_fee": None,
        "application_fee_amount": None,
        "balance_transaction": None,
        "billing_details": empty_billing_details(),
        "calculated_statement_descriptor": "SURETY SANDBOX",
        "captured": False,
        "created": created,
        "currency": intent["currency"],
        "customer": intent["customer"],
        "description": intent["description"],
        "disputed": False,
        "failure_balance_transaction": None,
        "failure_code": None,
        "failure_message": None,
        "fraud_details": {},
        "livemode": intent["livemode"],
        "metadata": dict(intent["metadata"]),
        "on_behalf_of": None,
        "outcome": outcome(card, None),
        "paid": False,
        "payment_intent": intent["id"],
        "payment_method": intent["payment_method"],
        "payment_method_details": {
            "card": {
                "amount_authorized": intent["amount"],
                "authorization_code": None,
                "brand": card.brand,
                "checks": {"address_line1_check": None, "address_postal_code_check": None, "cvc_check": None},
                "country": card.country,
                "exp_month": 11,
                "exp_year": 2030,
                "extended_authorization": {"status": "disabled"},
                "fingerprint": card.fingerprint,
                "funding": card.funding,
                "incremental_authorization": {"status": "unavailable"},
                "installments": None,
                "last4": card.last4,
                "mandate": None,
                "multicapture": {"status": "unavailable"},
                "network": card.brand,
                "network_token": {"used": False},
                "network_transaction_id": None,
                "overcapture": {"maximum_amount_capturable": intent["amount"], "status": "unavailable"},
                "regulated_status": "unregulated",
                "three_d_secure": three_d_secure,
                "wallet": None,
            },
            "type": "card",
        },
        "radar_options": {},
        "receipt_email": intent["receipt_email"],
        "receipt_number": None,
        "receipt_url": None,
        "refunded": False,
        "review": None,
        "shipping": None,
        "source_transfer": None,
        "statement_descriptor": None,
        "statement_descriptor_suffix": intent["statement_descriptor_suffix"],
        "status": "pending",
        "transfer_data": None,
        "transfer_group": intent["transfer_group"],
    }


def outcome(card: Card, decline: Decline | None) -> dict[str, Any]:
    """The answer of the network and of the risk rules."""
    if decline is None:
        return {
            "advice_code": None,
            "network_advice_code": None,
            "network_decline_code": None,
            "network_status": "approved_by_network",
            "reason": "elevated_risk_level" if card.risk == "elevated" else None,
            "risk_level": card.risk,
            "risk_score": {"normal": 20, "elevated": 67, "highest": 92}[card.risk],
            "seller_message": "Payment complete.",
            "type": "authorized",
        }
    blocked = card.risk == "highest"
    return {
        "advice_code": None,
        "network_advice_code": None,
        "network_decline_code": None if blocked else "05",
        "network_status": "not_sent_to_network" if blocked else "declined_by_network",
        "reason": "highest_risk_level" if blocked else decline.decline_code or decline.code,
        "risk_level": card.risk,
        "risk_score": 92 if blocked else 20,
        "seller_message": "Stripe blocked this payment as too risky." if blocked else "The bank declined this payment.",
        "type": "blocked" if blocked else "issuer_declined",
    }


def refund(
    id: str, charge: dict[str, Any], amount: int, reason: str | None, metadata: dict[str, str], created: int
) -> dict[str, Any]:
    """A refund that has succeeded at once; its reference at the payer's bank is not known yet."""
    return {
        "id": id,
        "object": "refund",
        "amount": amount,
        "balance_transaction": None,
        "charge": charge["id"],
        "created": created,
        "currency": charge["currency"],
        "destination_details": {
            "card": {
                "reference_status": "pending",
                "reference_type": "acquirer_reference_number",
                "type": "refund",
            },
            "type": "card",
        },
        "metadata": metadata,
        "payment_intent": charge["payment_intent"],
        "reason": reason,
        "receipt_number": None,
        "source_transfer_reversal": None,
        "status": "succeeded",
        "transfer_reversal": None,
    }


EVIDENCE = (
    *("access_activity_log", "billing_address", "cancellation_policy", "cancellation_policy_disclosure"),
    *("cancellation_rebuttal", "customer_communication", "customer_email_address", "customer_name"),
    *("customer_purchase_ip", "customer_signature", "duplicate_charge_documentation", "duplicate_charge_explanation"),
    *("duplicate_charge_id", "product_description", "receipt", "refund_policy", "refund_policy_disclosure"),
    *("refund_refusal_explanation", "service_date", "service_documentation", "shipping_address", "shipping_carrier"),
    *("shipping_date", "shipping_documentation", "shipping_tracking_number", "uncategorized_file"),
    "uncategorized_text",
)
"""A merchant's evidence: texts, and ids of files."""

NETWORK_REASONS = {"fraudulent": "10.4", "product_not_received": "13.1"}
"""Visa's codes."""


def dispute(
    id: str, charge: dict[str, Any], amount: int, reason: str, created: int, due_by: int, *, inquiry: bool
) -> dict[str, Any]:
    """A dispute that needs a response; no money has moved yet."""
    card = charge["payment_method_details"]["card"]
    return {
        "id": id,
        "object": "dispute",
        "amount": amount,
        "balance_transactions": [],
        "charge": charge["id"],
        "created": created,
        "currency": charge["currency"],
        "enhanced_eligibility_types": [],
        "evidence": {**dict.fromkeys(EVIDENCE), "enhanced_evidence": {}},
        "evidence_details": {
            "due_by": due_by,
            "enhanced_eligibility": {},
            "has_evidence": False,
            "past_due": False,
            "submission_count": 0,
            "submission_method": "not_submitted",
        },
        "is_charge_refundable": inquiry,
        "livemode": charge["livemode"],
        "metadata": {},
        "payment_intent": charge["payment_intent"],
        "payment_method_details": {
            "card": {
                "brand": card["brand"],
                "case_type": "inquiry" if inquiry else "chargeback",
                "network": card["network"],
                "network_reason_code": "10" if inquiry else NETWORK_REASONS.get(reason),
            },
            "type": "card",
        },
        "reason": reason,
        "status": "warning_needs_response" if inquiry else "needs_response",
    }


def empty_billing_details() -> dict[str, Any]:
    """Empty billing details."""
    address = dict.fromkeys(("city", "country", "line1", "line2", "postal_code", "state"))
    return {"address": address, "email": None, "name": None, "phone": None, "tax_id": None}
