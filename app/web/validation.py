"""All rules that a request breaks, in one answer.

msgspec decodes a body directly into its struct and stops at the first broken rule. Only then this module reads the same
types and collects every violation, each with a JSON pointer.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator
from datetime import datetime
from decimal import Decimal, DecimalException
from difflib import get_close_matches
from itertools import islice
from typing import Annotated, Any, TypeVar, cast
from urllib.parse import parse_qsl

import msgspec
from msgspec import inspect

from app.web.problems import Problem, RuleViolation, invalid_request

T = TypeVar("T")

ERRORS_MAX = 50
CARD_FIELDS = frozenset({"number", "card_number", "cvc", "cvv", "exp_month", "exp_year", "pan", "card"})
SECRET_FIELDS = frozenset({"token"})
ECHOED_CHARACTERS_MAX = 100
# Readers of JSON that know only binary floating-point numbers round integers from here on.
ROUNDED_INTEGERS_MIN = 2**53
NAME_SIMILARITY_MIN = 0.75
ENTRY = re.compile(r"(\w+)\[([^\[\]]*)\]")
INTEGER = re.compile("-?[0-9]{1,100}")
INTEGER_PARAMETERS = frozenset({"limit", "max_delta"})


class JsonDecimal(float):
    """A JSON number with a fraction or an exponent, which remembers its digits."""

    digits: str


TYPE_NAMES: dict[type, str] = {
    bool: "boolean",
    int: "integer",
    JsonDecimal: "number",
    str: "string",
    list: "array",
    dict: "object",
    type(None): "null",
}


class JsonObject(dict[str, Any]):
    """A JSON object that remembers which of its keys were given twice."""

    duplicate_keys: tuple[str, ...] = ()


def parse(body: bytes) -> Any:
    """JSON, strictly: in UTF-8, no NaN, nothing nested too deep. Raises Problem."""
    try:
        return json.loads(
            body.decode(), object_pairs_hook=json_object, parse_float=json_decimal, parse_constant=refuse_constant
        )
    except UnicodeDecodeError as error:
        raise malformed_json(f"byte {error.start} is not UTF-8") from None
    except RecursionError:
        raise invalid_request([RuleViolation("", "depth", "the body is nested too deep")]) from None
    except json.JSONDecodeError as error:
        raise malformed_json(f"{error.msg.lower()} (line {error.lineno}, column {error.colno})") from None
    except ValueError:
        raise invalid_request([RuleViolation("", "json", "a number in the body has thousands of digits")]) from None


def json_decimal(digits: str) -> JsonDecimal:
    """A JSON number that is no integer."""
    made = JsonDecimal(digits)
    made.digits = digits
    return made


def json_object(pairs: list[tuple[str, Any]]) -> JsonObject:
    """A JSON object's pairs as a dictionary."""
    made = JsonObject(pairs)
    if len(made) < len(pairs):
        times = Counter(name for name, _ in pairs)
        made.duplicate_keys = tuple(sorted(name for name, count in times.items() if count > 1))
    return made


def refuse_constant(name: str) -> Any:
    """Refuse NaN and Infinity, which JSON does not have."""
    raise malformed_json(f"it has no {name}")


def malformed_json(why: str) -> Problem:
    """The body can't be read."""
    return invalid_request([RuleViolation("", "json", f"the body is not JSON: {why}")])


def rule_violations(  # noqa: C901, PLR0912  a case for each kind of type
    value: Any, kind: Any, at: str = "", form: str = ""
) -> Iterator[RuleViolation]:
    """Every rule of `kind`, a type of msgspec.inspect, that a parsed value breaks. `form` states a pattern in words."""
    match kind:
        case inspect.UnionType():
            if value is not None:
                wanted = [part for part in kind.types if not isinstance(part, inspect.NoneType)]
                yield from rule_violations(value, wanted[0], at)
        case inspect.Metadata():
            yield from rule_violations(value, kind.type, at, (kind.extra or {}).get("form", ""))
        case inspect.StructType():
            yield from struct_violations(value, kind, at)
        case inspect.DictType():
            yield from dict_violations(value, kind, at)
        case inspect.ListType():
            yield from list_violations(value, kind, at)
        case inspect.BoolType():
            if not isinstance(value, bool):
                yield type_violation(at, "boolean", value)
        case inspect.IntType():
            yield from integer_violations(value, kind, at)
        case inspect.StrType():
            yield from text_violations(value, kind, at, form)
        case inspect.DateTimeType():
            yield from time_violations(value, at)
        case inspect.LiteralType():
            yield from literal_violations(value, kind, at)
        case _:
            raise AssertionError(f"no rule is known for {kind}")


def struct_violations(value: Any, kind: inspect.StructType, at: str) -> Iterator[RuleViolation]:
    """Fields that are missing, unknown, given twice or break rules of their own."""
    if not isinstance(value, dict):
        yield type_violation(at, "object", value)
        return
    yield from duplicate_key_violations(value, at)
    fields = {field.encode_name: field for field in kind.fields}
    meant: set[str] = set()
    for name, given in value.items():
        here = f"{at}/{escape_pointer(name)}"
        if name in fields:
            yield from rule_violations(given, fields[name].type, here)
        elif name.lower() in CARD_FIELDS:
            yield violation(
                here, "no_card_data", "must not be sent: card data is not accepted; send the provider's token, pm_…"
            )
        else:
            yield unknown_field_violation(at, name, fields.keys() - value.keys(), meant)
    for name, field in fields.items():
        if field.required and name not in value and name not in meant:
            yield violation(f"{at}/{name}", "required", "is required")


def unknown_field_violation(at: str, name: str, absent: Iterable[str], meant: set[str]) -> RuleViolation:
    """An unknown field, with the absent field that was probably meant, which is added to `meant`."""
    broken = violation(f"{at}/{escape_pointer(name)}", "known", "is not a field that we know")
    if len(name) > ECHOED_CHARACTERS_MAX:
        return broken
    by_letters = {letters_of(field): field for field in sorted(absent) if field not in meant}
    written = letters_of(name)
    singular = [written[:-1]] if written[:-1] in by_letters else []
    for letters in singular or get_close_matches(written, by_letters, 1, NAME_SIMILARITY_MIN):
        meant.add(by_letters[letters])
        broken.meant = f"{at}/{by_letters[letters]}"
        broken.message += f"; {by_letters[letters]} may be meant"
    return broken


def letters_of(name: str) -> str:
    """A name without its way of dividing words: returnUrl, return-url and return_url are alike."""
    return re.sub("[^a-z0-9]", "", name.lower())


def dict_violations(value: Any, kind: inspect.DictType, at: str) -> Iterator[RuleViolation]:
    """Too many entries, and keys and values that break rules."""
    if not isinstance(value, dict):
        yield type_violation(at, "object", value)
        return
    yield from duplicate_key_violations(value, at)
    if kind.max_length is not None and len(value) > kind.max_length:
        yield violation(at, "max_entries", f"must have at most {kind.max_length} entries", kind.max_length, len(value))
    for name, given in value.items():
        here = f"{at}/{escape_pointer(name)}"
        for rule in rule_violations(name, kind.key_type, here):
            rule.rule = f"key_{rule.rule}"
            rule.message = f"the key {rule.message}"
            yield rule
        yield from rule_violations(given, kind.value_type, here)


def list_violations(value: Any, kind: inspect.ListType, at: str) -> Iterator[RuleViolation]:
    """Too many items or too few, and items that break rules."""
    if not isinstance(value, list):
        yield type_violation(at, "array", value)
        return
    if kind.max_length is not None and len(value) > kind.max_length:
        yield violation(at, "max_items", f"must be given at most {kind.max_length} times", kind.max_length, len(value))
    if kind.min_length is not None and len(value) < kind.min_length:
        least = "one item" if kind.min_length == 1 else f"{kind.min_length} items"
        yield violation(at, "min_items", f"must have at least {least}", kind.min_length, len(value))
    for number, item in enumerate(value):
        yield from rule_violations(item, kind.item_type, f"{at}/{number}")


def integer_violations(value: Any, kind: inspect.IntType, at: str) -> Iterator[RuleViolation]:
    """Check an integer and its bounds; `true` and `1.0` are not integers."""
    if not isinstance(value, int) or isinstance(value, bool):
        yield type_violation(at, "integer", value)
    elif kind.ge is not None and value < kind.ge:
        yield violation(at, "minimum", f"must be at least {kind.ge}", kind.ge, value)
    elif kind.le is not None and value > kind.le:
        yield violation(at, "maximum", f"must be at most {kind.le}", kind.le, value)


def text_violations(value: Any, kind: inspect.StrType, at: str, form: str) -> Iterator[RuleViolation]:
    """A text that PostgreSQL can hold, of the right length and form."""
    if not isinstance(value, str):
        yield type_violation(at, "string", value)
    elif "\0" in value:
        yield violation(at, "no_nul", "must not hold the character NUL")
    elif has_lone_surrogate(value):
        yield violation(at, "unicode", "holds half of a surrogate pair, or bytes that are not UTF-8: no character")
    elif kind.min_length is not None and len(value) < kind.min_length:
        yield violation(
            at, "min_length", f"must have at least {count_characters(kind.min_length)}", kind.min_length, len(value)
        )
    elif kind.max_length is not None and len(value) > kind.max_length:
        yield violation(
            at, "max_length", f"must have at most {count_characters(kind.max_length)}", kind.max_length, len(value)
        )
    elif kind.pattern is not None and re.search(kind.pattern, value) is None:
        yield violation(at, "pattern", form or f"must match {kind.pattern}", kind.pattern, value)


def time_violations(value: Any, at: str) -> Iterator[RuleViolation]:
    """Check a time: it must have an offset from UTC."""
    try:
        msgspec.convert(value, Annotated[datetime, msgspec.Meta(tz=True)])
    except msgspec.ValidationError:
        yield violation(at, "format", "must be a time as in RFC 3339, such as 2026-11-22T14:03:07Z", given=value)


def literal_violations(value: Any, kind: inspect.LiteralType, at: str) -> Iterator[RuleViolation]:
    """Check that a value is one of the allowed texts."""
    if value not in kind.values:
        yield violation(at, "one_of", f"must be one of {', '.join(map(str, kind.values))}", list(kind.values), value)


def duplicate_key_violations(value: dict[str, Any], at: str) -> Iterator[RuleViolation]:
    """Report duplicate keys: it is unclear which of the values is meant."""
    for name in getattr(value, "duplicate_keys", ()):
        yield violation(f"{at}/{escape_pointer(name)}", "once", "is given twice")


def has_lone_surrogate(value: str) -> bool:
    """Whether a text can't be encoded in UTF-8."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return True
    return False


def type_violation(at: str, wanted: str, value: Any) -> RuleViolation:
    """A value of another type than the expected one."""
    is_one = TYPE_NAMES.get(type(value), "object")
    article = "an" if wanted[0] in "aeiou" else "a"
    return violation(at, "type", f"must be {article} {wanted}, not {is_one}", wanted, value)


def violation(at: str, rule: str, text: str, limit: Any = msgspec.UNSET, given: Any = msgspec.UNSET) -> RuleViolation:
    """A rule broken at a place. The given value is repeated if it is short, well-formed and no secret."""
    given = msgspec.UNSET if at.rpartition("/")[2] in SECRET_FIELDS else echo(given)
    subject = ".".join(part or '""' for part in at.split("/")[1:]) if at.isprintable() and len(at) < 200 else "a field"
    return RuleViolation(at.encode(errors="replace").decode(), rule, f"{subject or 'the body'} {text}", limit, given)


def echo(given: Any) -> Any:
    """A given value as a problem document repeats it: not if it is long or no text, and never rounded.

    A number that some readers of JSON would round, or can't read, is repeated as text.
    """
    match given:
        case dict() | list():
            return msgspec.UNSET
        case bool():
            return given
        case int():
            given = given if abs(given) < ROUNDED_INTEGERS_MIN else str(given)
        case JsonDecimal():
            given = float(given) if is_kept(given) else given.digits
    is_long = isinstance(given, str) and (len(given) > ECHOED_CHARACTERS_MAX or has_lone_surrogate(given))
    return msgspec.UNSET if is_long else given


def is_kept(number: JsonDecimal) -> bool:
    """Whether a binary floating-point number has the value of these digits, as its shortest decimal form."""
    if not math.isfinite(number) or len(number.digits) > ECHOED_CHARACTERS_MAX:
        return False
    try:
        return Decimal(number.digits) == Decimal(repr(float(number)))
    except DecimalException:
        return False


def escape_pointer(name: str) -> str:
    """A name as a part of a JSON pointer (RFC 6901)."""
    return name.replace("~", "~0").replace("/", "~1")


def count_characters(characters: int) -> str:
    """1 character, 2 characters."""
    return f"{characters} character{'s' if characters != 1 else ''}"


def violation_checker(struct: type) -> Callable[[Any], list[RuleViolation]]:
    """A function from a parsed value to the rules of a struct that it breaks, the first fifty of them."""
    kind = inspect.type_info(struct)
    return lambda value: list(islice(rule_violations(value, kind), ERRORS_MAX))


def flat_pairs(pairs: list[tuple[str, str]], lists: Container[str] = ()) -> list[tuple[str, Any]]:
    """The pairs of a query: those of `name[key]=value` are one object, those of a name in `lists` one list."""
    flat: list[tuple[str, Any]] = []
    entries: dict[str, list[tuple[str, str]]] = {}
    items: dict[str, list[str]] = {}
    for name, value in pairs:
        parts = ENTRY.fullmatch(name)
        if name in lists:
            items.setdefault(name, []).append(value)
        elif parts is None:
            flat.append((name, value))
        else:
            entries.setdefault(parts[1], []).append((parts[2], value))
    return [*flat, *items.items(), *((name, json_object(of)) for name, of in entries.items())]


def read_query(query: bytes, struct: type[T]) -> T:
    """A query string as a struct. Raises Problem, with all broken rules, each under its parameter's name."""
    # Bytes that are not UTF-8 become lone surrogates, which no text may hold.
    pairs = parse_qsl(query.decode("latin-1"), keep_blank_values=True, errors="surrogateescape")
    fields = msgspec.structs.fields(cast(type[msgspec.Struct], struct))
    # A list in a query is its name given several times. Its default is an empty list.
    lists = {field.encode_name for field in fields if field.default_factory is list}
    given: dict[str, Any] = json_object(flat_pairs(pairs, lists))
    for field in fields:
        name = field.encode_name
        if name in INTEGER_PARAMETERS and INTEGER.fullmatch(given.get(name, "")):
            given[name] = int(given[name])
    errors = violation_checker(struct)(given)
    for error in errors:
        error.field, error.place = error.field.removeprefix("/"), "query"
        # In a query all values are strings.
        error.message = error.message.removesuffix(", not string").replace("a field that", "a parameter that")
        if error.meant is not msgspec.UNSET:
            error.meant = error.meant.removeprefix("/")
    if errors:
        raise invalid_request(errors)
    return msgspec.convert(given, struct)
