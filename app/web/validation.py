"""All the rules that a request breaks, told at once.

The fast way decodes a body straight into its struct and stops at the first rule broken. This is the slow, careful way,
walked only then: it reads the same types and collects every rule, each with a JSON pointer.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import datetime
from itertools import islice
from typing import Annotated, Any, TypeVar, cast
from urllib.parse import parse_qsl

import msgspec
from msgspec import inspect

from app.web.problems import Broken, Problem, invalid

T = TypeVar("T")

ERRORS_MAX = 50
CARD_FIELDS = frozenset({"number", "card_number", "cvc", "cvv", "exp_month", "exp_year", "pan", "card"})
UNTOLD = frozenset({"token"})
GIVEN_CHARACTERS_MAX = 100
INTEGER = re.compile("-?[0-9]{1,9}")
TYPE_NAMES: dict[type, str] = {
    bool: "boolean",
    int: "integer",
    float: "number",
    str: "string",
    list: "array",
    dict: "object",
    type(None): "null",
}


class Pairs(dict[str, Any]):
    """A JSON object that remembers which of its keys were given twice."""

    twice: tuple[str, ...] = ()


def parse(body: bytes) -> Any:
    """JSON, strictly: in UTF-8, no NaN, nothing nested too deep. Raises Problem."""
    try:
        return json.loads(body.decode(), object_pairs_hook=object_of, parse_constant=refuse_constant)
    except UnicodeDecodeError as error:
        raise malformed(f"byte {error.start} is not UTF-8") from None
    except RecursionError:
        raise invalid([Broken("", "depth", "the body is nested too deep")]) from None
    except json.JSONDecodeError as error:
        raise malformed(f"{error.msg.lower()} (line {error.lineno}, column {error.colno})") from None
    except ValueError:
        raise malformed("a number is NaN, infinite or has thousands of digits") from None


def object_of(pairs: list[tuple[str, Any]]) -> Pairs:
    """A JSON object's pairs as a dictionary."""
    made = Pairs(pairs)
    if len(made) < len(pairs):
        times = Counter(name for name, _ in pairs)
        made.twice = tuple(sorted(name for name, count in times.items() if count > 1))
    return made


def refuse_constant(name: str) -> Any:
    """NaN and Infinity are no JSON."""
    raise ValueError(name)


def malformed(why: str) -> Problem:
    """The body can't be read."""
    return invalid([Broken("", "json", f"the body is not JSON: {why}")])


def broken_rules(  # noqa: C901  a case for each kind of type
    value: Any, kind: Any, at: str = "", form: str = ""
) -> Iterator[Broken]:
    """Every rule of `kind`, as msgspec.inspect tells it, that a parsed value breaks. `form` says a pattern in words."""
    match kind:
        case inspect.UnionType():
            if value is not None:
                wanted = [part for part in kind.types if not isinstance(part, inspect.NoneType)]
                yield from broken_rules(value, wanted[0], at)
        case inspect.Metadata():
            yield from broken_rules(value, kind.type, at, (kind.extra or {}).get("form", ""))
        case inspect.StructType():
            yield from of_struct(value, kind, at)
        case inspect.DictType():
            yield from of_dict(value, kind, at)
        case inspect.BoolType():
            if not isinstance(value, bool):
                yield wrong_type(at, "boolean", value)
        case inspect.IntType():
            yield from of_int(value, kind, at)
        case inspect.StrType():
            yield from of_str(value, kind, at, form)
        case inspect.DateTimeType():
            yield from of_time(value, at)
        case inspect.LiteralType():
            yield from of_literal(value, kind, at)
        case _:
            raise AssertionError(f"no rule is known for {kind}")


def of_struct(value: Any, kind: inspect.StructType, at: str) -> Iterator[Broken]:
    """Fields that are missing, unknown, given twice or break rules of their own."""
    if not isinstance(value, dict):
        yield wrong_type(at, "object", value)
        return
    yield from given_twice(value, at)
    fields = {field.encode_name: field for field in kind.fields}
    for name, given in value.items():
        here = f"{at}/{escaped(name)}"
        if name in fields:
            yield from broken_rules(given, fields[name].type, here)
        elif name.lower() in CARD_FIELDS:
            yield broken(
                here, "no_card_data", "must not be sent: card data never enters here; send the provider's token, pm_…"
            )
        else:
            yield broken(here, "known", "is not a field that we know")
    for name, field in fields.items():
        if field.required and name not in value:
            yield broken(f"{at}/{name}", "required", "is required")


def of_dict(value: Any, kind: inspect.DictType, at: str) -> Iterator[Broken]:
    """Too many entries, and keys and values that break rules."""
    if not isinstance(value, dict):
        yield wrong_type(at, "object", value)
        return
    yield from given_twice(value, at)
    if kind.max_length is not None and len(value) > kind.max_length:
        yield broken(at, "max_entries", f"must have at most {kind.max_length} entries", kind.max_length, len(value))
    for name, given in value.items():
        here = f"{at}/{escaped(name)}"
        for rule in broken_rules(name, kind.key_type, here):
            rule.rule = f"key_{rule.rule}"
            rule.message = f"the key {rule.message}"
            yield rule
        yield from broken_rules(given, kind.value_type, here)


def of_int(value: Any, kind: inspect.IntType, at: str) -> Iterator[Broken]:
    """An integer within its bounds; true is none, and 1.0 is none either."""
    if not isinstance(value, int) or isinstance(value, bool):
        yield wrong_type(at, "integer", value)
    elif kind.ge is not None and value < kind.ge:
        yield broken(at, "minimum", f"must be at least {kind.ge}", kind.ge, value)
    elif kind.le is not None and value > kind.le:
        yield broken(at, "maximum", f"must be at most {kind.le}", kind.le, value)


def of_str(value: Any, kind: inspect.StrType, at: str, form: str) -> Iterator[Broken]:
    """A text that PostgreSQL can hold, of the right length and form."""
    if not isinstance(value, str):
        yield wrong_type(at, "string", value)
    elif "\0" in value:
        yield broken(at, "no_nul", "must not hold the character NUL")
    elif has_lone_surrogate(value):
        yield broken(at, "unicode", "holds half of a surrogate pair, which is no character")
    elif kind.min_length is not None and len(value) < kind.min_length:
        yield broken(at, "min_length", f"must have at least {plural(kind.min_length)}", kind.min_length, len(value))
    elif kind.max_length is not None and len(value) > kind.max_length:
        yield broken(at, "max_length", f"must have at most {plural(kind.max_length)}", kind.max_length, len(value))
    elif kind.pattern is not None and re.search(kind.pattern, value) is None:
        yield broken(at, "pattern", form or f"must match {kind.pattern}", kind.pattern, value)


def of_time(value: Any, at: str) -> Iterator[Broken]:
    """An instant: one without an offset is none."""
    try:
        msgspec.convert(value, Annotated[datetime, msgspec.Meta(tz=True)])
    except msgspec.ValidationError:
        yield broken(at, "format", "must be a time as in RFC 3339, such as 2026-11-22T14:03:07Z", given=value)


def of_literal(value: Any, kind: inspect.LiteralType, at: str) -> Iterator[Broken]:
    """One of a few texts."""
    if value not in kind.values:
        yield broken(at, "one_of", f"must be one of {', '.join(map(str, kind.values))}", list(kind.values), value)


def given_twice(value: dict[str, Any], at: str) -> Iterator[Broken]:
    """Keys given twice: which of the two is meant, nobody can know."""
    for name in getattr(value, "twice", ()):
        yield broken(f"{at}/{escaped(name)}", "once", "is given twice")


def has_lone_surrogate(value: str) -> bool:
    """Whether a text can't be encoded in UTF-8."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return True
    return False


def wrong_type(at: str, wanted: str, value: Any) -> Broken:
    """A value of another type than wanted."""
    is_one = TYPE_NAMES.get(type(value), "object")
    article = "an" if wanted[0] in "aeiou" else "a"
    return broken(at, "type", f"must be {article} {wanted}, not {is_one}", wanted, value)


def broken(at: str, rule: str, text: str, limit: Any = msgspec.UNSET, given: Any = msgspec.UNSET) -> Broken:
    """A rule broken at a place. What was given is told if it is short, well-formed and no secret."""
    is_long = isinstance(given, str) and (len(given) > GIVEN_CHARACTERS_MAX or has_lone_surrogate(given))
    is_big = isinstance(given, int) and not -(2**63) <= given < 2**63
    if isinstance(given, dict | list) or is_long or is_big or at.rpartition("/")[2] in UNTOLD:
        given = msgspec.UNSET
    subject = at.removeprefix("/").replace("/", ".") if at.isprintable() and len(at) < 200 else "a field"
    return Broken(at.encode(errors="replace").decode(), rule, f"{subject or 'the body'} {text}", limit, given)


def escaped(name: str) -> str:
    """A name as a part of a JSON pointer (RFC 6901)."""
    return name.replace("~", "~0").replace("/", "~1")


def plural(characters: int) -> str:
    """Characters, counted."""
    return f"{characters} character{'s' if characters != 1 else ''}"


def checker(struct: type) -> Callable[[Any], list[Broken]]:
    """What tells the rules of a struct that a parsed value breaks, the first fifty of them."""
    kind = inspect.type_info(struct)
    return lambda value: list(islice(broken_rules(value, kind), ERRORS_MAX))


def read_query(query: bytes, struct: type[T]) -> T:
    """A query string as a struct. Raises Problem, with all broken rules, each under its parameter's name."""
    pairs = parse_qsl(query.decode("latin-1"), keep_blank_values=True, errors="replace")
    given: dict[str, Any] = object_of(pairs)
    for field in msgspec.structs.fields(cast(type[msgspec.Struct], struct)):
        if field.encode_name == "limit" and INTEGER.fullmatch(given.get("limit", "")):
            given["limit"] = int(given["limit"])
    errors = checker(struct)(given)
    for error in errors:
        error.field, error.place = error.field.removeprefix("/"), "query"
    if errors:
        raise invalid(errors)
    return msgspec.convert(given, struct)
