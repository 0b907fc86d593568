"""Faults of an answer: a 5xx, a leak, a success without the right, a difference from the description."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import schemathesis
from schemathesis.core.failures import Failure, FailureGroup
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.fuzz.world import ID, Caller, World

CHECKS: list[Callable[..., bool | None]] = [
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
]
KINDS = ("server_errors", "leaks", "admitted", "differences")


def find_faults(
    world: World, caller: Caller, route: str, sent: str, status: int, answered: str
) -> Iterator[tuple[str, str]]:
    """Kind and example of each fault of an answer that needs no description.

    `answered` is the body with the headers, `sent` the whole request.
    """
    if status >= 500:
        yield "server_errors", f"{status} {answered[:500]}"
    for shown in find_leaks(world, caller, route, sent, answered):
        yield "leaks", f"{shown} in {answered[:500]}"
    if status < 300 and not caller.may_succeed(route):
        yield "admitted", f"{status} {answered[:500]}"


def find_leaks(world: World, caller: Caller, route: str, sent: str, answered: str) -> Iterator[str]:
    """Ids and addresses of other merchants in an answer, except those that the request named."""
    if caller.is_operator and "/operator/" in route:
        return
    owners = {id: world.owners.get(id, caller.merchant) for id in ID.findall(answered)}
    owners |= {address: merchant for address, merchant in world.addresses.items() if address in answered}
    yield from sorted(secret for secret, owner in owners.items() if owner != caller.merchant and secret not in sent)


def find_differences(case: schemathesis.Case[Any], response: schemathesis.Response) -> Iterator[tuple[str, str]]:
    """Kind and example of each difference between an answer and the OpenAPI document."""
    try:
        case.validate_response(response, checks=CHECKS)
    except FailureGroup as group:
        for failure in group.exceptions:
            yield "differences", str(failure)[:800]
    except Failure as failure:
        yield "differences", str(failure)[:800]
