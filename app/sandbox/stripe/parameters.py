"""Request parameters: Stripe's form encoding, decoded into one struct per operation.

A parameter that Stripe does not know is refused as Stripe refuses it. One that only Stripe knows is refused too: to
ignore it would hide a mistake until production.
"""

import re
from functools import lru_cache
from typing import Any, Literal, TypeVar
from urllib.parse import unquote_plus

import msgspec
from msgspec import Struct

from app.sandbox.memory import Bounds
from app.sandbox.stripe.errors import invalid_request, missing

Pairs = list[tuple[str, str]]
PAIRS_MAX = 1000


class Parameters(Struct, kw_only=True, forbid_unknown_fields=True):
    expand: list[str] = []


P = TypeVar("P", bound=Parameters)


class CreatedRange(Struct, forbid_unknown_fields=True):
    gt: int | None = None
    gte: int | None = None
    lt: int | None = None
    lte: int | None = None

    def bounds(self) -> Bounds:
        firsts = [0, self.gte or 0, self.gt + 1 if self.gt is not None else 0]
        lasts = [2**62]
        if self.lte is not None:
            lasts.append(self.lte)
        if self.lt is not None:
            lasts.append(self.lt - 1)
        return Bounds(max(firsts), min(lasts))


class Page(Parameters, kw_only=True):
    limit: int = 10
    starting_after: str | None = None
    ending_before: str | None = None
    created: CreatedRange | int | None = None

    def bounds(self) -> Bounds:
        if isinstance(self.created, int):
            return Bounds(self.created, self.created)
        return self.created.bounds() if self.created else Bounds()


class ListIntents(Page):
    customer: str | None = None


class ListCharges(Page):
    payment_intent: str | None = None
    customer: str | None = None


class ListBalanceTransactions(Page):
    source: str | None = None
    payout: str | None = None
    type: str | None = None
    currency: str | None = None


class ListPayouts(Page):
    status: str | None = None


class ListOfCharge(Page):
    """Lists of refunds, disputes and fraud warnings."""

    charge: str | None = None
    payment_intent: str | None = None


class ListEvents(Page):
    type: str | None = None
    types: list[str] | None = None


CaptureMethod = Literal["automatic", "automatic_async", "manual"]
Metadata = dict[str, str] | str | None
"""Merged into the stored metadata; an empty value removes its key, an empty string all keys."""


class CustomerShipping(Struct, forbid_unknown_fields=True):
    name: str
    address: dict[str, str]
    phone: str | None = None


class SetCustomer(Parameters, kw_only=True):
    """A customer's fields; an empty text removes one."""

    description: str | None = None
    email: str | None = None
    metadata: Metadata = None
    name: str | None = None
    phone: str | None = None
    shipping: CustomerShipping | str | None = None


class ListCustomers(Page):
    email: str | None = None


class AttachMethod(Parameters, kw_only=True):
    customer: str


class ListMethods(Page):
    customer: str | None = None
    type: str | None = None


class OnlineAcceptance(Struct, forbid_unknown_fields=True):
    ip_address: str
    user_agent: str


class CustomerAcceptance(Struct, forbid_unknown_fields=True):
    type: Literal["online", "offline"]
    accepted_at: int | None = None
    online: OnlineAcceptance | None = None


class MandateData(Struct, forbid_unknown_fields=True):
    customer_acceptance: CustomerAcceptance


class AutomaticMethods(Struct, forbid_unknown_fields=True):
    enabled: bool
    allow_redirects: Literal["always", "never"] = "always"


class CardOptions(Struct, forbid_unknown_fields=True):
    request_three_d_secure: Literal["any", "automatic", "challenge"] | None = None


class MethodOptions(Struct, forbid_unknown_fields=True):
    card: CardOptions | None = None


class RetrieveIntent(Parameters):
    client_secret: str | None = None


class ConfirmIntent(Parameters, kw_only=True):
    payment_method: str | None = None
    payment_method_options: MethodOptions | None = None
    allowed_payment_method_types: list[str] | None = None
    payment_method_types: list[str] | None = None
    capture_method: CaptureMethod | None = None
    mandate_data: MandateData | None = None
    off_session: bool = False
    receipt_email: str | None = None
    return_url: str | None = None
    setup_future_usage: Literal["off_session", "on_session"] | None = None
    use_stripe_sdk: bool = False


class UpdateIntent(Parameters, kw_only=True):
    amount: int | None = None
    currency: str | None = None
    capture_method: CaptureMethod | None = None
    customer: str | None = None
    description: str | None = None
    metadata: Metadata = None
    payment_method: str | None = None
    payment_method_options: MethodOptions | None = None
    allowed_payment_method_types: list[str] | None = None
    payment_method_types: list[str] | None = None
    receipt_email: str | None = None
    setup_future_usage: Literal["off_session", "on_session"] | None = None
    statement_descriptor: str | None = None
    statement_descriptor_suffix: str | None = None
    transfer_group: str | None = None


class CreateIntent(UpdateIntent, kw_only=True):
    amount: int
    currency: str
    automatic_payment_methods: AutomaticMethods | None = None
    confirm: bool = False
    confirmation_method: Literal["automatic", "manual"] = "automatic"
    off_session: bool = False
    return_url: str | None = None
    use_stripe_sdk: bool = False


class CancelIntent(Parameters):
    cancellation_reason: Literal["abandoned", "duplicate", "fraudulent", "requested_by_customer"] | None = None


class CaptureIntent(Parameters, kw_only=True):
    amount_to_capture: int | None = None
    final_capture: bool = True
    metadata: Metadata = None
    statement_descriptor: str | None = None
    statement_descriptor_suffix: str | None = None


class CreateRefund(Parameters, kw_only=True):
    charge: str | None = None
    payment_intent: str | None = None
    amount: int | None = None
    reason: Literal["duplicate", "fraudulent", "requested_by_customer"] | None = None
    instructions_email: str | None = None
    metadata: Metadata = None


class UpdateRefund(Parameters, kw_only=True):
    metadata: Metadata = None


class UpdateDispute(Parameters, kw_only=True):
    evidence: dict[str, str] = {}
    submit: bool | None = None
    """Defaults to true where evidence is given."""
    metadata: Metadata = None


def merge_metadata(held: dict[str, str], given: Metadata) -> dict[str, str]:
    """Metadata after a change."""
    if given is None:
        return held
    if isinstance(given, str):
        return {}
    if len(given) > 50 or any(len(key) > 40 or len(value) > 500 for key, value in given.items()):
        raise invalid_request("Metadata holds up to 50 keys of 40 characters, with values of 500.", param="metadata")
    return {key: value for key, value in {**held, **given}.items() if value != ""}


def decode_pairs(form: str) -> Pairs:
    """Names and values of a form or query string, in its order. Raises StripeError for too many."""
    if form.count("&") >= PAIRS_MAX:
        raise invalid_request(f"A request has at most {PAIRS_MAX} parameters.")
    pairs = [pair.partition("=") for pair in form.split("&") if pair]
    return [
        (_decode_name(name), unquote_plus(value) if "%" in value or "+" in value else value) for name, _, value in pairs
    ]


@lru_cache(maxsize=1000)
def _decode_name(name: str) -> str:
    return unquote_plus(name)


def nest(pairs: Pairs) -> dict[str, Any]:
    """`a[b][c]=1` and `a[]=1` (or `a[0]=1`) as dictionaries and lists."""
    nested: dict[str, Any] = {}
    for name, value in pairs:
        *path, last = name.replace("]", "").split("[") if name.endswith("]") else [name]
        place = nested
        for key in path:
            place = place.setdefault(key or str(len(place)), {})
            if not isinstance(place, dict):
                raise invalid_request(f"Invalid object: {name}", param=name)
        place[last or str(len(place))] = value
    return {name: value if name == "metadata" else _listed(value) for name, value in nested.items()}


def _listed(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    if value and all(key.isdigit() for key in value):
        return [_listed(item) for item in value.values()]
    return {key: _listed(item) for key, item in value.items()}


AT = re.compile(r" - at `\$\.?(.*)`$")


def read_parameters(kind: type[P], pairs: Pairs) -> P:
    """The operation's parameters. Raises StripeError."""
    given = nest(pairs)
    try:
        parameters = msgspec.convert(given, kind, strict=False)
    except msgspec.ValidationError as refusal:
        raise _refused(kind, given, str(refusal)) from None
    _check_texts(given, msgspec.to_builtins(parameters), "")
    return parameters


def _check_texts(given: Any, read: Any, param: str) -> None:
    """Refuse what msgspec converts and Stripe does not: `1e3` and `1050.0` as integers, `1` as a boolean, `null`."""
    if isinstance(given, dict) and isinstance(read, dict):
        for name, value in given.items():
            _check_texts(value, read.get(name), f"{param}[{name}]" if param else name)
    elif isinstance(given, list) and isinstance(read, list):
        for value, one in zip(given, read, strict=True):
            _check_texts(value, one, param)
    elif isinstance(read, bool):
        if given not in ("true", "false"):
            raise invalid_request(f"Invalid boolean: {given}", param=param)
    elif isinstance(read, int):
        if not re.fullmatch(r"-?[0-9]+", str(given)):
            raise invalid_request(f"Invalid integer: {given}", param=param, code="parameter_invalid_integer")
    elif read is None:
        raise invalid_request(f"Invalid value: {given}", param=param)


def _refused(kind: type[Parameters], given: dict[str, Any], refusal: str) -> Exception:
    """Stripe's error for an error of msgspec."""
    found = AT.search(refusal)
    path = found[1].replace("[...]", "").split(".") if found else []
    param = path[0] + "".join(f"[{part}]" for part in path[1:]) if path else ""
    quoted = re.findall(r"`([^`]*)`", refusal)
    if "unknown field" in refusal:
        name = f"{param}[{quoted[0]}]" if param else quoted[0]
        return invalid_request(f"Received unknown parameter: {name}", param=name, code="parameter_unknown")
    if "missing required field" in refusal:
        return missing(f"{param}[{quoted[0]}]" if param else quoted[0])
    value: Any = given
    for part in path:
        value = value.get(part) if isinstance(value, dict) else value
    if value == "":
        return invalid_request(
            f"You passed an empty string for '{param}'. We assume empty values are an attempt to unset a parameter;"
            f" however '{param}' cannot be unset. You should remove '{param}' from your request or supply a non-empty"
            " value.",
            param=param,
            code="parameter_invalid_empty",
        )
    if "Expected `int" in refusal:
        return invalid_request(f"Invalid integer: {value}", param=param, code="parameter_invalid_integer")
    return invalid_request(f"Invalid {param}: {value}. {refusal.partition(' - at')[0]}.", param=param)
