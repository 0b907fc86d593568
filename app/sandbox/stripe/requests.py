"""A request: authentication, its operation, the stored answer of its idempotency key, its execution.

Stripe's rules for idempotency keys, https://docs.stripe.com/api/idempotent_requests: a key belongs to its account; the
first answer is stored once execution has begun, 500s included, and replayed for 24 hours; other parameters under the
same key are an error; so is the key of a request that is still being executed, but that may be retried.
"""

import binascii
import logging
import re
from base64 import b64decode
from contextlib import suppress
from email.utils import formatdate
from functools import lru_cache
from hashlib import blake2b

from msgspec import Struct

from app.sandbox.connections import Headers, SandboxResponse
from app.sandbox.memory import StoredResponse, encode
from app.sandbox.settings import API_VERSION, PLATFORM_ACCOUNT
from app.sandbox.state import RequestContext, Sandbox
from app.sandbox.stripe.errors import StripeError, invalid_request
from app.sandbox.stripe.operations import Operation, find_operation
from app.sandbox.stripe.parameters import Pairs, decode_pairs, read_parameters
from app.sandbox.stripe.permissions import check_access, shown_key

log = logging.getLogger("sandbox")

KEY_LENGTH_MAX = 255
TEST_KEY = re.compile(r"[sr]k_test_.+")
# The key of Stripe.js on a page. It reads an intent by its client secret, and does nothing else here.
PUBLISHABLE_TEST_KEY = re.compile(r"pk_test_.+")
PUBLISHABLE_LIVE_KEY = re.compile(r"pk_live_sandbox(_[0-9A-Za-z_]*)?")
# No key of Stripe's has this form, so no real key is accepted.
LIVE_KEY = re.compile(r"[sr]k_live_sandbox(_[0-9A-Za-z_]*)?")


READ_HEADERS = frozenset({b"authorization", b"idempotency-key", b"stripe-account", b"stripe-version"})


class StripeRequest(Struct):
    """An authenticated request for a known operation."""

    operation: Operation
    call: RequestContext
    id: str
    """Of the object in the path; "" without one."""
    pairs: Pairs
    writes: bool
    fingerprint: bytes
    """A hash of method, path and parameters, which a repetition of the key must match."""
    identity: str
    """The idempotency key, else the path; drawn faults follow from it."""
    replay: SandboxResponse | None = None
    """The stored answer of its key."""


def echoed_headers(headers: dict[bytes, str], request_id: str, now: float) -> Headers:
    """The time of the answer, and headers that repeat those of the request."""
    echoed = [
        (b"date", http_date(int(now))),
        (b"request-id", request_id.encode()),
        (b"stripe-version", API_VERSION.encode()),
    ]
    given = [name for name in (b"idempotency-key", b"stripe-account") if name in headers]
    return echoed + [(name, headers[name].encode("latin-1")) for name in given]


@lru_cache(maxsize=1)
def http_date(seconds: int) -> bytes:
    """Unix seconds as HTTP writes them."""
    return formatdate(seconds, usegmt=True).encode()


def parse_request(
    sandbox: Sandbox, method: str, path: str, headers: dict[bytes, str], form: str, request_id: str
) -> StripeRequest:
    """Authenticate, find the operation and the stored answer of its key. Raises StripeError."""
    api_key = _authenticate(sandbox, headers)
    version = headers.get(b"stripe-version", API_VERSION)
    if version != API_VERSION:
        raise invalid_request(f"The sandbox speaks API version {API_VERSION}, not {version}.", param="Stripe-Version")
    operation, id = find_operation(method, path)
    pairs = decode_pairs(form)
    if api_key.startswith("pk_"):
        _check_publishable(operation, pairs)
    check_access(sandbox, api_key, headers.get(b"stripe-account", PLATFORM_ACCOUNT), method, path)
    key = headers.get(b"idempotency-key") if method == "POST" else None
    request = StripeRequest(
        operation,
        RequestContext(headers.get(b"stripe-account", PLATFORM_ACCOUNT), request_id, key),
        id,
        pairs,
        method == "POST",
        blake2b(encode((method, path, sorted(pairs))), digest_size=16).digest(),
        key or path,
    )
    request.replay = _stored_response(sandbox, request)
    return request


def _authenticate(sandbox: Sandbox, headers: dict[bytes, str]) -> str:
    scheme, _, credentials = headers.get(b"authorization", "").partition(" ")
    if scheme.lower() == "basic":
        with suppress(binascii.Error, UnicodeDecodeError):
            credentials = b64decode(credentials).decode().partition(":")[0]
    if not credentials:
        raise StripeError(401, "You did not provide an API key.")
    live, test = (LIVE_KEY, PUBLISHABLE_LIVE_KEY), (TEST_KEY, PUBLISHABLE_TEST_KEY)
    is_known = any(form.fullmatch(credentials) for form in (live if sandbox.settings.livemode else test))
    if not is_known or sandbox.key_state == "revoked":
        raise StripeError(401, f"Invalid API Key provided: {shown_key(credentials)}")
    if sandbox.key_state == "expired":
        raise StripeError(401, f"Expired API Key provided: {shown_key(credentials)}", code="api_key_expired")
    return credentials


def _check_publishable(operation: Operation, pairs: Pairs) -> None:
    """Raises StripeError unless a publishable key may send this request: an intent is read by its client secret."""
    if operation.name != "payment_intents.retrieve" or "client_secret" not in dict(pairs):
        raise StripeError(
            401,
            "This API call cannot be made with a publishable API key. Please use a secret API key. You can find a list"
            " of your API keys at https://dashboard.stripe.com/account/apikeys.",
            code="secret_key_required",
        )


def _stored_response(sandbox: Sandbox, request: StripeRequest) -> SandboxResponse | None:
    key, account = request.call.key, request.call.account
    if key is None:
        return None
    if not 1 <= len(key) <= KEY_LENGTH_MAX:
        raise invalid_request("Idempotency keys have 1 to 255 characters.")
    if (account, key) in sandbox.keys_in_use:
        raise key_in_use(key)
    stored = sandbox.memory.stored_response(account, key)
    if stored is None or stored.created + sandbox.settings.key_seconds < sandbox.memory.now():
        return None
    if stored.fingerprint != request.fingerprint:
        raise key_reused(key)
    replayed = [(b"idempotent-replayed", b"true"), (b"original-request", stored.request_id.encode())]
    return SandboxResponse(stored.status, stored.body, replayed)


def execute_request(sandbox: Sandbox, request: StripeRequest, instead: StripeError | None = None) -> SandboxResponse:
    """Replay the stored answer; or execute, store the answer under the key, and commit both in one transaction.

    With `instead`, that error is answered and stored in place of the result.
    """
    if request.replay is not None:
        return request.replay
    sandbox.call = request.call
    try:
        given = read_parameters(request.operation.parameters, request.pairs)
        body = request.operation.run(sandbox, request.call.account, request.id, given)
        response = SandboxResponse(200, encode(body), [], took_effect=True)
    except StripeError as refusal:
        response = error_response(refusal)
        response.took_effect = refusal.stored
        if not refusal.stored:
            sandbox.rollback()
    except Exception:
        log.exception("%s", request.operation.name)
        sandbox.rollback()
        response = error_response(server_error())
    finally:
        sandbox.call = None
    if response.took_effect:
        if instead is not None:
            response = SandboxResponse(instead.status, encode(instead.body), [], took_effect=True)
        keep_response(sandbox, request, response)
    sandbox.commit()
    return response


def keep_response(sandbox: Sandbox, request: StripeRequest, response: SandboxResponse) -> None:
    """Keep the answer under the request's key, from the next commit on."""
    call, memory = request.call, sandbox.memory
    if call.key is not None and request.replay is None:
        memory.store_response(
            call.account,
            call.key,
            StoredResponse(request.fingerprint, response.status, response.body, call.request_id, memory.now()),
        )


def error_response(refusal: StripeError) -> SandboxResponse:
    """A refusal as an answer."""
    headers: Headers = []
    if refusal.should_retry is not None:
        headers.append((b"stripe-should-retry", b"true" if refusal.should_retry else b"false"))
    return SandboxResponse(refusal.status, encode(refusal.body), headers)


def key_in_use(key: str) -> StripeError:
    """409: the first request with this key is still being executed."""
    return StripeError(
        409,
        "There is currently another in-progress request using this Idempotent Key (that probably means you submitted"
        f" twice, and the other request is still going through): {key}. Please try again later.",
        type="idempotency_error",
        code="idempotency_key_in_use",
        should_retry=True,
    )


def key_reused(key: str) -> StripeError:
    """400: the first request with this key had other parameters. It may have taken effect."""
    return StripeError(
        400,
        "Keys for idempotent requests can only be used with the same parameters they were first used with."
        f" Try using a key other than '{key}' if you meant to execute a different request.",
        type="idempotency_error",
    )


def rate_limited() -> StripeError:
    """429: the same request may succeed a second later."""
    return StripeError(
        429, "Request rate limit exceeded. Please retry your request later.", code="rate_limit", should_retry=True
    )


def server_error() -> StripeError:
    """500: it is unknown whether the request was executed."""
    return StripeError(500, "An unknown error occurred.", type="api_error")
