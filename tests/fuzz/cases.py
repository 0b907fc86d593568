"""Requests drawn from the OpenAPI document, with ids and keys of this world put in."""

from __future__ import annotations

import json
import re
from typing import Any

import schemathesis
from hypothesis import strategies as st
from msgspec import Struct
from schemathesis.core.result import Ok
from schemathesis.generation import GenerationMode

from tests.fuzz.world import PARAMETERS, Caller, World

WAIT = re.compile(r"wait\s*=\s*\d+", re.IGNORECASE)
BODY_FIELDS = {"customer_id": "cus", "saved": "spm"}
ALL_SCOPES_WEIGHT = 12
KNOWN_SHARE = 0.8
"""Of the places for ids and addresses."""


class FuzzCase(Struct, frozen=True):
    """A request that is ready to be sent, and the caller who sends it."""

    request: schemathesis.Case[Any]
    caller: Caller

    @property
    def route(self) -> str:
        """The route as the audit trail names it."""
        operation = self.request.operation
        return f"{operation.method.upper()} {re.sub('{[^}]*}', '{id}', operation.path)}"

    @property
    def sent(self) -> str:
        """All that the request says, as one text."""
        request = self.request
        parts = (request.path_parameters, dict(request.headers), request.query, request.body)
        return json.dumps([self.route, *parts], default=repr, ensure_ascii=False)


class CaseSource:
    """A strategy for the cases of one world."""

    def __init__(self, url: str, world: World) -> None:
        schema = schemathesis.openapi.from_url(f"{url}/docs/openapi.json")
        operations = [found.ok() for found in schema.get_all_operations() if isinstance(found, Ok)]
        self.operations = len(operations)
        requests = [
            operation.as_strategy(generation_mode=mode)
            for operation in operations
            for mode in (GenerationMode.POSITIVE, GenerationMode.POSITIVE, GenerationMode.NEGATIVE)
            if mode == GenerationMode.POSITIVE or takes_anything(operation)
        ]
        self._known = {prefix: world.with_prefix(prefix) for prefix in PARAMETERS.values()}
        self._every = sorted(world.owners)
        self._addresses = sorted(world.addresses)
        # Half of the requests come from keys with all rights.
        self._callers = [one for one in world.callers for _ in range(ALL_SCOPES_WEIGHT if one.has_all_scopes else 1)]
        self._requests = st.sampled_from(range(len(requests))).flatmap(requests.__getitem__)

    @property
    def cases(self) -> st.SearchStrategy[FuzzCase]:
        """Any request by any caller."""
        chances = st.randoms(use_true_random=False)
        return st.builds(self._assemble, self._requests, st.sampled_from(self._callers), chances)

    def _assemble(self, request: schemathesis.Case[Any], caller: Caller, chance: Any) -> FuzzCase:
        """A drawn request with known ids in most of its places for ids, and the caller's key."""
        for place in (request.path_parameters, request.query):
            for name in [name for name in place or () if chance.random() < KNOWN_SHARE]:
                if name in PARAMETERS:
                    fitting = self._known[PARAMETERS[name]] or self._every
                    place[name] = chance.choice(fitting if chance.random() < KNOWN_SHARE else self._every)
                elif name in {"email", "customer_email"}:
                    place[name] = chance.choice(self._addresses)
        self._name_known_objects(request.body, chance)
        # A request that waits would hold the run up.
        for name, value in list(request.headers.items()):
            if name.lower() == "prefer" and WAIT.search(str(value)):
                request.headers[name] = "wait=0"
            if name.lower() == "authorization":
                del request.headers[name]
        if caller.key is not None:
            request.headers["Authorization"] = f"Bearer {caller.key}"
        return FuzzCase(request, caller)

    def _name_known_objects(self, body: Any, chance: Any) -> None:
        """Put known ids into the fields of a body that name objects."""
        if isinstance(body, dict):
            for name, value in body.items():
                if name in BODY_FIELDS and chance.random() < KNOWN_SHARE:
                    body[name] = chance.choice(self._known[BODY_FIELDS[name]])
                else:
                    self._name_known_objects(value, chance)


def takes_anything(operation: Any) -> bool:
    """Whether an operation has parameters or a body that can be made wrong."""
    return bool(list(operation.iter_parameters()) or list(operation.body))
