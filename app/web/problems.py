"""Problem documents (RFC 9457): the types, what each means, and which problem an error of PostgreSQL is.

One table maps constraints to the rule that a request broke, another maps SQLSTATEs to a problem type. A violation of
any other constraint is an error of Surety and gets 500. tests/db/internal_constraints.txt lists those constraints, so
that adding one is a decision.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any, NamedTuple

import msgspec
import psycopg
from litestar.exceptions import HTTPException

from app.web.asgi import Headers, HttpResponse
from app.web.batching import QUERY_CANCELED, DatabaseAway, RefusedByDatabase, Unavailable, unavailable_by
from db.errors import is_retryable, message_of

log = logging.getLogger("surety.http")


class ProblemDefinition(NamedTuple):
    """A type of problem; its address is /problems/{name}."""

    status: int
    title: str
    explanation: str


PROBLEM_TYPES: dict[str, ProblemDefinition] = {
    "invalid-request": ProblemDefinition(
        400,
        "The request breaks a rule",
        "`errors` names each field that breaks a rule: `field` is a JSON pointer into the body (or the name of a query "
        "parameter or header, as `in` says), `rule` the rule, `limit` its bound, `given` what was sent (as text, if it "
        "is a number that a reader of JSON may round), `meant` the field that an unknown one may stand for. Nothing "
        "was stored. Correct the request and send it with the same or another Idempotency-Key.",
    ),
    "malformed-request": ProblemDefinition(
        400,
        "This is not an HTTP request",
        "The bytes are no request of HTTP/1.1, or the request's target is no path. Nothing was stored, and the "
        "connection is closed.",
    ),
    "idempotency-key-missing": ProblemDefinition(
        400,
        "The Idempotency-Key is missing",
        "Every POST of a merchant, except that for a client secret, needs the header Idempotency-Key with 1 to 255 "
        "printable ASCII characters, chosen by you, new for each payment and the same for each repetition: that is "
        "what makes repeating safe.",
    ),
    "unauthenticated": ProblemDefinition(
        401,
        "The API key is missing or not valid",
        "Send `Authorization: Bearer sty_…` with a key that is neither misspelt nor revoked. Where real money moves, "
        "keys begin with `sty_live_`, else with `sty_test_`.",
    ),
    "key-expired": ProblemDefinition(
        401,
        "The API key has expired",
        "The key is one of ours, and its time is over. Use its successor, or ask the operator for a new key.",
    ),
    "key-revoked": ProblemDefinition(
        401,
        "The API key was revoked",
        "The key is one of ours and was revoked, at once and permanently. Ask the operator for a new key.",
    ),
    "network-not-allowed": ProblemDefinition(
        403,
        "The API key may not be used from this address",
        "The key is bound to networks, and `address`, from which the request came, is in none of them. Send the "
        "request from an allowed one, or ask the operator.",
    ),
    "scope-missing": ProblemDefinition(
        403,
        "The API key lacks a scope",
        "The key is valid, but not for this: `scope` names the scope that the route needs. Use a key that has it.",
    ),
    "merchant-suspended": ProblemDefinition(
        403,
        "The merchant is suspended",
        "The key is valid, but its merchant may not take payments at present: new payments and captures are refused, "
        "while refunds, cancels and evidence are not. Nothing was stored, and the Idempotency-Key is free. Ask the "
        "operator.",
    ),
    "forbidden": ProblemDefinition(
        403,
        "The route is for operators",
        "The key is valid, but a merchant's. Use an operator's personal key (`sty_operator_…`).",
    ),
    "provider-account-refused": ProblemDefinition(
        403,
        "The provider refuses this merchant's account",
        "The provider does not accept payments for this merchant at present: its account there was disconnected or "
        "closed. Nothing was stored, and the Idempotency-Key is free. Payments that were accepted before can be "
        "canceled, and their references used again. New payments are accepted once the account is connected again: ask "
        "the operator.",
    ),
    "limit-exceeded": ProblemDefinition(
        403,
        "The payment exceeds the merchant's limit of the day",
        "The operator has set how many payments (`exceeded` is `count`) or how much money (`amount`, in minor units) "
        "may be accepted in `currency` in a day, by UTC. `maximum` is the limit, `remaining` the rest of it on `day`. "
        "It starts anew at `resets_at`. Nothing was stored, and the Idempotency-Key is free: the same request can be "
        "accepted then. Every accepted payment counts, whatever became of it.",
    ),
    "velocity-exceeded": ProblemDefinition(
        403,
        "Too many payments of one payer",
        "A rule of the operator bounds how many payments (`exceeded` is `count`) or how much money (`amount`, in minor "
        "units) of one `subject`, such as an e-mail address, may be accepted within `period_seconds`. `maximum` is the "
        "bound, `rule` the rule's id. Nothing was stored, and the Idempotency-Key is free: the same request can be "
        "accepted once earlier payments of the payer are older than the period.",
    ),
    "not-found": ProblemDefinition(
        404,
        "No such path or object",
        "No route has this path, or this merchant has no object with that id. Other merchants' objects are not shown.",
    ),
    "method-not-allowed": ProblemDefinition(
        405, "The path exists, the method does not", "The header Allow lists the methods that the path knows."
    ),
    "request-timeout": ProblemDefinition(
        408,
        "The request took too long to arrive",
        "The head or the body was not complete in time. Nothing was stored, and the connection is closed. Send the "
        "request again with the same Idempotency-Key.",
    ),
    "reference-taken": ProblemDefinition(
        409,
        "Another payment has this reference",
        "`payment` names it. A reference is unique among a merchant's payments that have neither failed nor been "
        "canceled. Nothing was stored, and the Idempotency-Key is free.",
    ),
    "wrong-state": ProblemDefinition(
        409,
        "Its state does not allow this",
        "`state` is the state of the object, `detail` the reason. Nothing changed, and the Idempotency-Key is free.",
    ),
    "balance-too-low": ProblemDefinition(
        409,
        "The balance does not cover this",
        "What goes back to payers must be covered by what you are owed, settled or not: `balance`, in minor units of "
        "`currency`; `needed` is the requested amount. Nothing changed, and the Idempotency-Key is free.",
    ),
    "too-large": ProblemDefinition(
        413, "The body is too large", "`limit` is the largest body in bytes. Nothing was stored."
    ),
    "target-too-long": ProblemDefinition(
        414, "Path and query are too long", "`limit` is their largest length in bytes. The connection is closed."
    ),
    "not-json": ProblemDefinition(
        415, "The body is not JSON", "Send `Content-Type: application/json`. Nothing was read, nothing stored."
    ),
    "unsupported-encoding": ProblemDefinition(
        415,
        "The body is encoded",
        "Send the body as it is, without the header Content-Encoding, in one piece or by `Transfer-Encoding: chunked`. "
        "Nothing was read, nothing stored.",
    ),
    "idempotency-key-reused": ProblemDefinition(
        422,
        "This Idempotency-Key belongs to another request",
        "The key was sent before with another body. A key names one request for 30 days: choose a new one for a new "
        "payment. Nothing was stored.",
    ),
    "rate-limited": ProblemDefinition(
        429,
        "Too many requests",
        "A rate limit is reached: `rate_limit` is `key` (of this API key), `merchant` (of all its merchant's keys), "
        "`address` (failed authentications of the client's address) or `payment` (client secrets of a payment). "
        "Nothing was stored. Repeat the request with the same Idempotency-Key after as many seconds as the header "
        "Retry-After and `retry_after` say. The headers RateLimit-Policy and RateLimit show the limits and how much is "
        "left.",
    ),
    "head-too-large": ProblemDefinition(
        431,
        "The head of the request is too large",
        "`limit` is the largest number of bytes of request line and headers, or of headers, as `detail` says. The "
        "connection is closed.",
    ),
    "internal": ProblemDefinition(
        500,
        "We made a mistake",
        "The request met an error of ours and took no effect. Repeating it with the same Idempotency-Key is safe. The "
        "request_id leads us to the cause.",
    ),
    "overloaded": ProblemDefinition(
        503,
        "Busy at present",
        "Repeat the request with the same Idempotency-Key after as many seconds as the header Retry-After says. If it "
        "did take effect, the repetition brings its answer; it can't take effect twice.",
    ),
    "provider-unavailable": ProblemDefinition(
        503,
        "The provider can't be asked at present",
        "The answer has to be read at the provider, which gave none in time, or no worker runs that would ask it. "
        "Nothing changed. Repeat the request after as many seconds as the header Retry-After says.",
    ),
    "unavailable": ProblemDefinition(
        503,
        "The database can't be used at present",
        "It restarts, another server takes over, its commits wait for a standby, or it is not ready. Repeat the "
        "request with the same Idempotency-Key until it is answered. If it did take effect, the repetition brings its "
        "answer; it can't take effect twice.",
    ),
}


class RuleViolation(msgspec.Struct, omit_defaults=True, rename={"place": "in"}):
    """A broken rule: its place, name and bound, and the given value unless it must not be repeated.

    `meant` is the field that was probably meant by an unknown one.
    """

    field: str
    rule: str
    message: str = ""
    limit: Any = msgspec.UNSET
    given: Any = msgspec.UNSET
    place: str = "body"
    meant: str | msgspec.UnsetType = msgspec.UNSET


class Problem(Exception):
    """An answer that is a problem document; `more` are members of its own."""

    def __init__(
        self, name: str, detail: str, *, errors: list[RuleViolation] | None = None, headers: Headers = (), **more: Any
    ) -> None:
        super().__init__(detail)
        self.name = name
        self.detail = detail
        self.errors = errors
        self.headers = headers
        self.more = more

    def response(self, request_id: str) -> HttpResponse:
        """The document as an answer."""
        definition = PROBLEM_TYPES[self.name]
        document: dict[str, Any] = {
            "type": f"/problems/{self.name}",
            "title": definition.title,
            "status": definition.status,
            "detail": self.detail,
            "request_id": request_id,
            **self.more,
        }
        if self.errors is not None:
            document["errors"] = self.errors
        headers: list[tuple[bytes, bytes]] = [(b"content-type", b"application/problem+json"), *self.headers]
        if definition.status == 401:
            headers.append((b"www-authenticate", b"Bearer"))
        if definition.status == 503:
            headers.append((b"retry-after", b"1"))
        return HttpResponse(definition.status, msgspec.json.encode(document), request_id, headers)


def invalid_request(errors: list[RuleViolation]) -> Problem:
    """A request that breaks rules; the detail is the first violation's message."""
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    return Problem("invalid-request", errors[0].message + more, errors=errors)


def overloaded() -> Problem:
    """The service is busy; the request may be repeated."""
    return Problem("overloaded", "too many requests are under way; repeat with the same Idempotency-Key")


def database_away() -> Problem:
    """No database answers; the request may be repeated."""
    return Problem("unavailable", "the database can't be used at present; repeat with the same Idempotency-Key")


RULE_BY_CONSTRAINT: dict[str, tuple[str, str, int | None]] = {
    "payment_amount_is_positive": ("/amount", "minimum", 1),
    "payment_currency_is_known": ("/currency", "known", None),
    "payment_rail_has_a_path": ("/capture_method", "one_of", None),
    "payment_reference_is_short": ("/reference", "max_length", 255),
    "payment_description_is_short": ("/description", "max_length", 1000),
    "payment_descriptor_suffix_is_short": ("/statement_descriptor_suffix", "max_length", 22),
    "payment_return_url_is_short": ("/return_url", "max_length", 2048),
    "payment_returns_its_payer": ("/return_url", "required", None),
    "payment_authentication_is_known": ("/authentication", "one_of", None),
    "payment_by_script_keeps_its_payer": ("/authentication", "exclusive", None),
    "payment_metadata_is_an_object": ("/metadata", "type", None),
    "refund_metadata_is_an_object": ("/metadata", "type", None),
    "idempotency_key_is_printable": ("Idempotency-Key", "pattern", None),
}

CURSOR_REFUSED = "SU006"
PROBLEM_BY_SQLSTATE = {
    CURSOR_REFUSED: "invalid-request",
    "SU003": "internal",  # a change to an append-only table
    "SU004": "internal",  # an unknown handler
    "SU005": "unavailable",  # a restored database whose new restore generation is not open yet
    "SU007": "internal",  # an unknown event type
    "SU008": "internal",  # an audit entry of a kind that its caller may not write
    "SU009": "internal",  # facts and refusals in one call of record_call_results
    "SU010": "internal",  # a third active key of one name and the same scopes
    "SU011": "internal",  # an operator's key with a greater role than the operator's
    "SU012": "internal",  # a command after a restore that this database refuses
    "22P05": "invalid-request",  # text that PostgreSQL can't hold
    "22021": "invalid-request",  # likewise
}


def problem_from_database_error(error: psycopg.Error) -> Problem:
    """The problem for an error of PostgreSQL: the request's or, by default, ours."""
    broken = RULE_BY_CONSTRAINT.get(error.diag.constraint_name or "")
    if broken is not None:
        field, rule, limit = broken
        what = RuleViolation(field, rule, f"{field} breaks the rule {error.diag.constraint_name}")
        if limit is not None:
            what.limit = limit
        return invalid_request([what])
    if error.sqlstate == CURSOR_REFUSED:
        text = "starting_after must be the last id of the page before; for events, `next` of the answer before"
        return invalid_request([RuleViolation("starting_after", "cursor", text, place="query")])
    if error.sqlstate == QUERY_CANCELED or is_retryable(error):
        unavailable = unavailable_by(error)
        return database_away() if isinstance(unavailable, DatabaseAway) else overloaded()
    name = PROBLEM_BY_SQLSTATE.get(error.sqlstate or "", "internal")
    if name == "internal":
        return Problem("internal", "an error of ours; nothing took effect")
    if name == "invalid-request":
        message = f"a text can't be stored: {error.diag.message_primary}"
        return invalid_request([RuleViolation("", "unicode", message)])
    return Problem(name, error.diag.message_primary or "the database refuses this")


def allowed_methods(methods: Iterable[str]) -> str:
    """The value of the header Allow for the methods of a path's routes: HEAD where GET is, and OPTIONS."""
    allowed = {*methods, "OPTIONS"}
    return ", ".join(sorted(allowed | {"HEAD"} if "GET" in allowed else allowed))


def problem_from_error(error: Exception, request_id: str, path: str) -> Problem:
    """The problem for an error of an endpoint or of Litestar; an unexpected one is logged and becomes `internal`."""
    match error:
        case Problem():
            return error
        case DatabaseAway():
            return database_away()
        case Unavailable():
            return overloaded()
        case RefusedByDatabase():
            return problem_from_database_error(error.error)
        case psycopg.Error():
            problem = problem_from_database_error(error)
            # A request that breaks a rule is its sender's affair, who could fill the log.
            if PROBLEM_TYPES[problem.name].status >= 500:
                log.error("%s %s failed: %s", request_id, path[:200], message_of(error))
            return problem
        case HTTPException(status_code=405):
            allowed = allowed_methods((error.headers or {}).get("allow", "").split(", "))
            return Problem("method-not-allowed", f"here are only {allowed}", headers=[(b"allow", allowed.encode())])
        case HTTPException(status_code=404):
            return Problem("not-found", f"nothing is at {path[:200]}")
        case HTTPException(status_code=status) if status < 500:
            return invalid_request([RuleViolation(path[:200], "request", error.detail, place="path")])
    log.error("%s %s failed", request_id, path[:200], exc_info=error)
    return Problem("internal", "an error of ours; nothing took effect")
