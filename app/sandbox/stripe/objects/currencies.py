"""Stripe's minimum amounts by currency, fixed exchange rates, and the processing fee."""

from fractions import Fraction

from app.sandbox.stripe.errors import invalid_request

MINIMUM_MINOR = {
    "usd": 50, "aed": 200, "aud": 50, "bgn": 100, "brl": 50, "cad": 50, "chf": 50, "czk": 1500, "dkk": 250, "eur": 50,
    "gbp": 30, "hkd": 400, "huf": 17500, "inr": 50, "jpy": 50, "mxn": 1000, "myr": 200, "nok": 300, "nzd": 50,
    "pln": 200, "ron": 200, "sek": 300, "sgd": 50, "thb": 1000,
    # Stripe names no minimum for these.
    "bhd": 1, "clp": 1, "cop": 1, "idr": 1, "ils": 1, "isk": 1, "jod": 1, "krw": 1, "kwd": 1, "omr": 1, "pen": 1,
    "php": 1, "sar": 1, "tnd": 1, "try": 1, "twd": 1, "uah": 1, "uyu": 1, "vnd": 1, "zar": 1,
}  # fmt: skip
"""Smallest charge in minor units, by currency."""

MAXIMUM_MINOR = 99_999_999
THREE_DECIMALS = frozenset({"bhd", "jod", "kwd", "omr", "tnd"})
STEP_MINOR = {**dict.fromkeys(THREE_DECIMALS, 10), "isk": 100}
"""Every amount is a multiple of this. Three decimals: the last is 0. The krona is written with two that are 0."""

US_CENTS_PER_MINOR_UNIT = {
    "usd": Fraction(1), "eur": Fraction("1.085"), "gbp": Fraction("1.27"), "cad": Fraction("0.73"),
    "aud": Fraction("0.66"), "chf": Fraction("1.12"), "sek": Fraction("0.095"), "nok": Fraction("0.094"),
    "dkk": Fraction("0.145"), "pln": Fraction("0.25"), "jpy": Fraction("0.67"), "mxn": Fraction("0.055"),
}  # fmt: skip


def check_amount(amount: int, currency: str) -> None:
    """Raises StripeError for an unknown currency or an amount outside its limits."""
    if currency not in MINIMUM_MINOR:
        known = ", ".join(sorted(MINIMUM_MINOR))
        raise invalid_request(f"Invalid currency: {currency}. The sandbox knows these: {known}", param="currency")
    if amount < 1:
        raise invalid_request(
            "This value must be greater than or equal to 1.", param="amount", code="parameter_invalid_integer"
        )
    if amount < MINIMUM_MINOR[currency]:
        raise invalid_request(
            f"Amount must be at least {MINIMUM_MINOR[currency]} {currency}.", param="amount", code="amount_too_small"
        )
    if amount > MAXIMUM_MINOR:
        raise invalid_request(f"Amount must be no more than {MAXIMUM_MINOR}.", param="amount", code="amount_too_large")
    check_step(amount, currency, "amount")


def check_step(amount: int, currency: str, param: str) -> None:
    """Raises StripeError for an amount that is no multiple of its currency's step."""
    step = STEP_MINOR.get(currency, 1)
    if amount % step:
        raise invalid_request(
            f"Amounts in {currency} must be divisible by {step}.", param=param, code="parameter_invalid_integer"
        )


NO_DECIMALS = frozenset({"clp", "jpy", "krw", "vnd"})
SYMBOLS = {"usd": "$", "eur": "€", "gbp": "£"}


def format_amount(amount: int, currency: str) -> str:
    """Minor units as text: $40.00."""
    decimals = 0 if currency in NO_DECIMALS else 3 if currency in THREE_DECIMALS else 2
    number = f"{amount / 10**decimals:.{decimals}f}"
    return SYMBOLS[currency] + number if currency in SYMBOLS else f"{number} {currency.upper()}"


def exchange_rate(currency: str, into: str) -> Fraction:
    """Minor units of `into` for one minor unit of `currency`."""
    try:
        return US_CENTS_PER_MINOR_UNIT[currency] / US_CENTS_PER_MINOR_UNIT[into]
    except KeyError as unknown:
        raise invalid_request(f"The sandbox has no exchange rate for {unknown}.", param="currency") from None


def round_half_up(value: Fraction) -> int:
    """The nearest integer; exact halves go up."""
    return int((value * 2 + 1) // 2)


def processing_fee(amount_minor: int) -> int:
    """2.9 % + 30 minor units, the percentage rounded half up."""
    return (amount_minor * 29 + 500) // 1000 + 30
