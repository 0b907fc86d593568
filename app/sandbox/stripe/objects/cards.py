"""Stripe's test cards: their tokens and their behaviour.

Names follow https://docs.stripe.com/testing; the short forms without a brand are accepted there too. Unknown tokens are
refused.
"""

from hashlib import sha256
from typing import Literal

from msgspec import Struct


class Decline(Struct, frozen=True):
    """The reason why a card is not charged."""

    code: str
    """The error's code; `decline_code` is the issuer's reason, where there is one."""
    decline_code: str | None
    message: str


class Card(Struct, frozen=True):
    """A test card and its behaviour."""

    token: str
    brand: str = "visa"
    last4: str = "4242"
    funding: str = "credit"
    country: str = "US"
    decline: Decline | None = None
    challenge: Literal["required", "optional", "unsupported"] = "unsupported"
    """Whether 3-D Secure is required by the issuer, possible on request, or impossible."""
    challenged_when_saved: bool = True
    """Whether an attached payment method still requires 3-D Secure without the payer."""
    challenge_fails: bool = False
    """3-D Secure fails, whatever the payer does."""
    available_at_once: bool = False
    """The amount is available at once, without being pending."""
    risk: Literal["normal", "elevated", "highest"] = "normal"
    refunds: Literal["succeed", "pend", "fail_late", "need_action"] = "succeed"
    """A refund succeeds at once; succeeds later; succeeds and then fails; waits for an action of the payer."""
    dispute: Literal["fraudulent", "product_not_received", "inquiry"] | None = None
    """The dispute that the cardholder opens a little later."""
    fraud_warning: bool = False
    """The issuer warns that the charge may be fraudulent."""

    @property
    def fingerprint(self) -> str:
        """Identifies the card behind a stored payment method."""
        return sha256(self.token.encode()).hexdigest()[:16]


GENERIC = Decline("card_declined", "generic_decline", "Your card was declined.")
INSUFFICIENT = Decline("card_declined", "insufficient_funds", "Your card has insufficient funds.")
LOST = Decline("card_declined", "lost_card", "Your card was declined.")
STOLEN = Decline("card_declined", "stolen_card", "Your card was declined.")
VELOCITY = Decline("card_declined", "card_velocity_exceeded", "Your card was declined for making repeated attempts.")
FRAUDULENT = Decline("card_declined", "fraudulent", "Your card was declined.")
EXPIRED = Decline("expired_card", None, "Your card has expired.")
INCORRECT_CVC = Decline("incorrect_cvc", None, "Your card's security code is incorrect.")
PROCESSING = Decline("processing_error", None, "An error occurred while processing your card. Try again later.")
AUTHENTICATION_NEEDED = Decline(
    "authentication_required", "authentication_required", "Your card was declined. It requires authentication."
)

COUNTRIES = (
    "us ar br ca cl co cr ec mx pa py pe uy ae at be bg by hr cy cz dk ee fi fr de gi gr hu ie it lv li lt lu mt nl no"
    " pl pt ro sa si sk es se ch gb au cn hk in jp my nz sg tw th"
)

CARDS = {
    card.token: card
    for card in (
        Card("pm_card_visa"),
        Card("pm_card_visa_debit", last4="5556", funding="debit"),
        Card("pm_card_mastercard", brand="mastercard", last4="4444"),
        Card("pm_card_mastercard_debit", brand="mastercard", last4="8210", funding="debit"),
        Card("pm_card_mastercard_prepaid", brand="mastercard", last4="5100", funding="prepaid"),
        Card("pm_card_amex", brand="amex", last4="8431"),
        Card("pm_card_amex_threeDSecureNotSupported", brand="amex", last4="0005"),
        Card("pm_card_discover", brand="discover", last4="1117"),
        Card("pm_card_diners", brand="diners", last4="0004"),
        Card("pm_card_jcb", brand="jcb", last4="0505", country="JP"),
        Card("pm_card_unionpay", brand="unionpay", last4="0005", country="CN"),
        *(Card(f"pm_card_{country}", last4="0000", country=country.upper()) for country in COUNTRIES.split()),
        Card("pm_card_visa_chargeDeclined", last4="0002", decline=GENERIC),
        Card("pm_card_chargeDeclined", last4="0002", decline=GENERIC),
        Card("pm_card_visa_chargeDeclinedInsufficientFunds", last4="9995", decline=INSUFFICIENT),
        Card("pm_card_chargeDeclinedInsufficientFunds", last4="9995", decline=INSUFFICIENT),
        Card("pm_card_visa_chargeDeclinedLostCard", last4="9987", decline=LOST),
        Card("pm_card_chargeDeclinedLostCard", last4="9987", decline=LOST),
        Card("pm_card_visa_chargeDeclinedStolenCard", last4="9979", decline=STOLEN),
        Card("pm_card_chargeDeclinedStolenCard", last4="9979", decline=STOLEN),
        Card("pm_card_visa_chargeDeclinedVelocityLimitExceeded", last4="6975", decline=VELOCITY),
        Card("pm_card_visa_chargeDeclinedExpiredCard", last4="0069", decline=EXPIRED),
        Card("pm_card_chargeDeclinedExpiredCard", last4="0069", decline=EXPIRED),
        Card("pm_card_chargeDeclinedIncorrectCvc", last4="0127", decline=INCORRECT_CVC),
        Card("pm_card_chargeDeclinedProcessingError", last4="0119", decline=PROCESSING),
        Card("pm_card_chargeDeclinedFraudulent", last4="0019", decline=FRAUDULENT, risk="highest"),
        Card("pm_card_chargeCustomerFail", last4="0341", decline=GENERIC),
        Card("pm_card_radarBlock", last4="0019", decline=FRAUDULENT, risk="highest"),
        Card("pm_card_riskLevelHighest", last4="4954", risk="highest"),
        Card("pm_card_riskLevelElevated", last4="9235", risk="elevated"),
        Card("pm_card_authenticationRequired", last4="3184", challenge="required"),
        Card("pm_card_authenticationRequiredOnSetup", last4="3155", challenge="required", challenged_when_saved=False),
        Card(
            "pm_card_authenticationRequiredSetupForOffSession",
            last4="0446",
            challenge="required",
            challenged_when_saved=False,
        ),
        Card(
            "pm_card_authenticationRequiredChargeDeclinedInsufficientFunds",
            last4="3178",
            challenge="required",
            decline=INSUFFICIENT,
        ),
        Card("pm_card_threeDSecure2Required", last4="3220", country="IE", challenge="required"),
        Card("pm_card_threeDSecureRequired", last4="3063", challenge="required"),
        Card("pm_card_threeDSecureRequiredChargeDeclined", last4="1629", challenge="required", decline=GENERIC),
        Card(
            "pm_card_threeDSecureRequiredProcessingError",
            last4="1280",
            challenge="required",
            challenge_fails=True,
        ),
        Card("pm_card_threeDSecureOptional", last4="3055", challenge="optional"),
        Card(
            "pm_card_threeDSecureOptionalProcessingError",
            last4="3097",
            challenge="optional",
            challenge_fails=True,
        ),
        Card("pm_card_bypassPending", last4="0077", available_at_once=True),
        Card("pm_card_pendingRefund", last4="7726", refunds="pend"),
        Card("pm_card_refundFail", last4="5126", refunds="fail_late"),
        # The sandbox's own card: at Stripe only payment methods without native refunds require an action of the payer.
        Card("pm_card_sandboxRefundRequiresAction", refunds="need_action"),
        Card("pm_card_createDispute", last4="0259", dispute="fraudulent"),
        Card("pm_card_createDisputeProductNotReceived", last4="2685", dispute="product_not_received"),
        Card("pm_card_createDisputeInquiry", last4="1976", dispute="inquiry"),
        Card("pm_card_createIssuerFraudRecord", last4="5423", fraud_warning=True),
    )
}

CARD_BY_FINGERPRINT = {card.fingerprint: card for card in CARDS.values()}
