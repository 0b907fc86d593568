"""Reads: single objects, lists, and `expand`, which puts objects in place of ids."""

from typing import Any

from app.sandbox.memory import Bounds, StoredObject
from app.sandbox.state import Sandbox
from app.sandbox.stripe.errors import invalid_request, not_found
from app.sandbox.stripe.objects.cards import CARD_BY_FINGERPRINT, Card
from app.sandbox.stripe.parameters import Page

EXPANDABLE = {
    "payment_intent": {"customer", "latest_charge", "payment_method"},
    "charge": {"balance_transaction", "payment_intent", "failure_balance_transaction"},
    "refund": {"balance_transaction", "charge", "failure_balance_transaction", "payment_intent"},
    "dispute": {"charge", "payment_intent"},
    "radar.early_fraud_warning": {"charge", "payment_intent"},
    "balance_transaction": {"source"},
    "payout": {"balance_transaction", "failure_balance_transaction"},
    "event": set[str](),
    "payment_method": {"customer"},
    "customer": set[str](),
    "account": set[str](),
    "balance": set[str](),
}


def card_of(sandbox: Sandbox, method_id: str) -> Card:
    """The test card behind a stored payment method."""
    return CARD_BY_FINGERPRINT[sandbox.memory.get(method_id).body["card"]["fingerprint"]]


def find_owned(
    sandbox: Sandbox, kind: str, account: str, id: str, *, param: str = "id", status: int = 404
) -> StoredObject:
    """An object of this account. Raises StripeError, also for objects of other accounts."""
    record = sandbox.memory.find(id)
    if record is None or record.kind != kind or record.account != account:
        raise not_found(kind, id, param=param, status=status)
    return record


def render_object(sandbox: Sandbox, record: StoredObject, expand: list[str] | tuple[str, ...] = ()) -> dict[str, Any]:
    """The object as Stripe would answer it now."""
    body: dict[str, Any] = record.body
    if record.kind == "balance_transaction":
        available = record.available_on <= sandbox.memory.now()
        body = {**body, "status": "available" if available else "pending"}
    if record.kind == "dispute":
        lines = [render_object(sandbox, sandbox.memory.get(line["id"])) for line in body["balance_transactions"]]
        body = {**body, "balance_transactions": lines}
    for head, rest in _by_head(expand).items():
        if head not in EXPANDABLE[record.kind]:
            raise invalid_request(f"This property cannot be expanded ({head}).", param="expand[]")
        id = body.get(head)
        if isinstance(id, str):
            body = {**body, head: render_object(sandbox, sandbox.memory.get(id), rest)}
    return body


def _by_head(expand: list[str] | tuple[str, ...]) -> dict[str, list[str]]:
    heads: dict[str, list[str]] = {}
    for path in expand:
        head, _, rest = path.partition(".")
        heads.setdefault(head, []).extend([rest] if rest else [])
    return heads


def list_page(
    sandbox: Sandbox,
    kind: str,
    account: str,
    given: Page,
    url: str,
    *,
    oldest: int = 0,
    **equal: str | list[str] | None,
) -> dict[str, Any]:
    """A page of a list, newest first, without objects created before `oldest`, Unix seconds."""
    if not 1 <= given.limit <= 100:
        raise invalid_request("Limit must be between 1 and 100.", param="limit", code="parameter_invalid_integer")
    if any(not path.startswith("data.") for path in given.expand):
        raise invalid_request("Lists expand properties of their data: `data.….`", param="expand[]")
    expand = [path.removeprefix("data.") for path in given.expand]

    def cursor(param: str) -> StoredObject | None:
        id = getattr(given, param)
        return find_owned(sandbox, kind, account, id, param=param, status=400) if id else None

    created = given.bounds()
    records, more = sandbox.memory.list_newest(
        kind,
        account,
        created=Bounds(max(created.first, oldest), created.last),
        limit=given.limit,
        after=cursor("starting_after"),
        before=cursor("ending_before"),
        **equal,
    )
    return {
        "object": "list",
        "data": [render_object(sandbox, record, expand) for record in records],
        "has_more": more,
        "url": url,
    }
