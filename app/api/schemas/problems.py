"""Problem documents (RFC 9457), the explanation of a problem type, and health."""

from __future__ import annotations

from typing import Any, Literal

from msgspec import Struct

from db.replication import ReplicaState


class BrokenRule(Struct, rename={"place": "in"}):
    """A rule that a request breaks. `field` is a JSON pointer into the body, or a header's or parameter's name; `meant`
    is the field that an unknown one may stand for. `given` is text for a number that a reader of JSON may round.
    """

    field: str
    rule: str
    message: str
    limit: Any = None
    given: Any = None
    place: Literal["body", "query", "header", "path"] = "body"
    meant: str | None = None


class ProblemDocument(Struct):
    """The reason why a request was refused, as in RFC 9457. `payment` is the payment that has the reference already;
    `state` is the state that does not allow the request; `scope` the scope that the key lacks; `address` the one from
    which the key may not be used; `rate_limit` the exceeded limit: of the `key`, of its `merchant`, of failed
    authentications of the client's `address` or of client secrets of the `payment`; `retry_after` the seconds after
    which the request may be repeated.
    """

    type: str
    title: str
    status: int
    detail: str
    request_id: str
    errors: list[BrokenRule] | None = None
    payment: str | None = None
    state: str | None = None
    scope: str | None = None
    address: str | None = None
    rate_limit: Literal["key", "merchant", "address", "payment"] | None = None
    retry_after: int | None = None


class ProblemType(Struct):
    """A type of problem, explained."""

    type: str
    title: str
    status: int
    explanation: str


class Health(Struct, omit_defaults=True):
    """Whether this process can take payments."""

    status: Literal["ok"]
    replica: ReplicaState | None = None
