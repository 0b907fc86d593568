"""Values in problem documents: what was sent, as it was sent; and the field that was probably meant."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from app.api.routes import ROUTES
from app.api.schemas.payments import PaymentsQuery
from app.web.problems import Problem
from app.web.validation import parse, read_query, violation_checker
from tests.support.http_client import Merchant, payment, problem

NUMBERS: list[tuple[str, Any]] = [
    ("9007199254740991", 2**53 - 1),
    ("9007199254740992", "9007199254740992"),
    ("-9007199254740993", "-9007199254740993"),
    ("9223372036854775808", "9223372036854775808"),
    ("-9223372036854775809", "-9223372036854775809"),
    ("1" * 100, "1" * 100),
    ("1" * 101, None),
    ("1e5", 100000.0),
    ("1.10", 1.1),
    ("1e400", "1e400"),
    ("-1e400", "-1e400"),
    ("1e-400", "1e-400"),
    ("1e9999999999999999999", "1e9999999999999999999"),
    ("0.1000000000000000055511151231257827", "0.1000000000000000055511151231257827"),
    ("100000000000000000000000000000.5", "100000000000000000000000000000.5"),
    ("0." + "3" * 200, None),
]
NAMES = (
    ("amount", "amuont"),
    ("payment_method", "paymentMethod"),
    ("return_url", "returnUrl"),
)


@pytest.mark.parametrize(("sent", "given"), NUMBERS, ids=lambda value: str(value)[:30])
def test_given_number_is_what_was_sent_never_rounded(merchant: Merchant, sent: str, given: Any) -> None:
    body = msgspec.json.encode(payment(amount=0)).replace(b'"amount":0', b'"amount":' + sent.encode())
    [error] = problem(merchant.post(body), 400, "invalid-request")["errors"]
    assert error["field"] == "/amount"
    assert error.get("given") == given
    assert type(error.get("given")) is type(given)


def test_given_currency_has_the_letters_that_were_sent(merchant: Merchant) -> None:
    for amount in (4999, 10**20):
        error = problem(merchant.post(payment(currency="XyZ", amount=amount)), 400, "invalid-request")["errors"][0]
        assert (error["field"], error["given"]) == ("/currency", "XyZ")
        assert error["message"] == "currency XyZ is not accepted"


def test_misspelled_field_is_one_error_that_names_the_field_that_was_meant(merchant: Merchant) -> None:
    for meant, name in NAMES:
        body = payment()
        body[name] = body.pop(meant)
        [error] = problem(merchant.post(body), 400, "invalid-request")["errors"]
        assert (error["field"], error["rule"], error["meant"]) == (f"/{name}", "known", f"/{meant}")
        assert error["message"] == f"{name} is not a field that we know; {meant} may be meant"
    both = problem(merchant.post(payment(amuont=1, colour="red")), 400, "invalid-request")["errors"]
    assert [(error["field"], error.get("meant")) for error in both] == [("/amuont", None), ("/colour", None)]


@pytest.mark.parametrize("struct", {row.body or row.query: None for row in ROUTES if row.body or row.query})
def test_each_field_of_each_route_is_recognized_by_a_misspelling(struct: type[msgspec.Struct]) -> None:
    for field in msgspec.structs.fields(struct):
        name = field.encode_name
        for misspelled in (name + "s", name.replace("_", "-").upper()):
            if misspelled == name or len(name) < 3:
                continue
            violations = violation_checker(struct)({misspelled: "value"})
            assert [v.meant for v in violations if v.field == f"/{misspelled}"] == [f"/{name}"]
            assert not [v for v in violations if v.field == f"/{name}"]


@pytest.mark.parametrize(
    ("query", "message", "given"),
    [
        (b"limit=99999999999999999999", "limit must be at most 100", "99999999999999999999"),
        (b"limit=1.5", "limit must be an integer", "1.5"),
        (b"limit=", "limit must be an integer", ""),
    ],
)
def test_message_about_a_query_does_not_contradict_what_was_given(query: bytes, message: str, given: Any) -> None:
    with pytest.raises(Problem) as refused:
        read_query(query, PaymentsQuery)
    assert refused.value.errors is not None
    [error] = refused.value.errors
    assert (error.field, error.message, error.given, error.place) == ("limit", message, given, "query")
    with pytest.raises(Problem) as unknown:
        read_query(b"limt=1", PaymentsQuery)
    assert str(unknown.value) == "limt is not a parameter that we know; limit may be meant"


@pytest.mark.parametrize("body", [b'{"a": NaN}', b'{"a": -Infinity}', b'{"a": ' + b"9" * 5000 + b"}"])
def test_message_about_a_number_says_what_is_wrong_with_it(body: bytes) -> None:
    with pytest.raises(Problem) as refused:
        parse(body)
    assert ("thousands of digits" in str(refused.value)) == (b"9" in body)
    assert ("is not JSON" in str(refused.value)) == (b"9" not in body)
