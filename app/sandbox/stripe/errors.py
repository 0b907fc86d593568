"""Stripe's errors."""

from typing import Any

DOCUMENTATION = "https://stripe.com/docs/error-codes/"


class StripeError(Exception):
    """A refusal in Stripe's shape."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = "invalid_request_error",
        code: str | None = None,
        param: str | None = None,
        stored: bool = False,
        should_retry: bool | None = None,
        **more: Any,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.stored = stored
        """Whether execution had begun, so that the idempotency key keeps this answer."""
        self.should_retry = should_retry
        fields = {"code": code, "message": message, "param": param, "type": type, **more}
        if code is not None:
            fields["doc_url"] = DOCUMENTATION + code.replace("_", "-")
        self.body = {"error": {name: value for name, value in sorted(fields.items()) if value is not None}}


def invalid_request(message: str, *, param: str | None = None, code: str | None = None) -> StripeError:
    """400: a parameter is invalid; nothing was executed."""
    return StripeError(400, message, param=param, code=code)


def missing(param: str) -> StripeError:
    """400: a required parameter isn't there."""
    return invalid_request(f"Missing required param: {param}.", param=param, code="parameter_missing")


def unsupported(param: str, why: str) -> StripeError:
    """400 of the sandbox's own: Stripe accepts this parameter, the sandbox does not implement it."""
    return invalid_request(f"The sandbox does not support this: {why}", param=param)


def not_found(kind: str, id: str, *, param: str = "id", status: int = 404) -> StripeError:
    """404, or 400 where the id is a parameter: this account has no such object."""
    return StripeError(
        status, f"No such {kind.rpartition('.')[2].replace('_', ' ')}: '{id}'", code="resource_missing", param=param
    )


def wrong_state(verb: str, intent: dict[str, Any]) -> StripeError:
    """400: the intent's status does not allow it; the error carries the intent."""
    return StripeError(
        400,
        f"You cannot {verb} this PaymentIntent because it has a status of {intent['status']}.",
        code="payment_intent_unexpected_state",
        stored=True,
        payment_intent=intent,
    )
