"""Merchants with objects of every kind, and callers with keys of every kind."""

from __future__ import annotations

import re
from collections.abc import Sequence

from msgspec import Struct

from app.api.routes import ROUTES
from app.cli.keys import SCOPES
from app.web.keys import new_key
from tests.api.test_customers import new_customer, save_method
from tests.support.http_client import Connection, Merchant, unique_name
from tests.support.operators import add_operator
from tests.support.payments import fact, record

ROLES = ("viewer", "support", "admin")
ID = re.compile(r"(?:pay|ref|dp|evt|pst|key|mer|cus|spm|aud)_[0-9a-f]{24}")
ELSEWHERE = ("203.0.113.0/24",)
SUSPENDED_ROUTES = frozenset({"POST /v1/payments", "POST /v1/payments/{id}/capture"})
IDS_OF_A_MERCHANT = """
    select id from surety.payments where merchant_id = %(merchant)s
    union all select id from surety.refunds where merchant_id = %(merchant)s
    union all select id from surety.disputes where merchant_id = %(merchant)s
    union all select id from surety.customers where merchant_id = %(merchant)s
    union all select id from surety.payment_methods where merchant_id = %(merchant)s
    union all select id from outbox.events where merchant_id = %(merchant)s
    union all select id from outbox.webhook_endpoints where merchant_id = %(merchant)s
    union all select id from ledger.postings where merchant_id = %(merchant)s
    union all select id from surety.api_keys where merchant_id = %(merchant)s
    union all select id from audit.entries where merchant_id = %(merchant)s
    union all select %(merchant)s
"""
PARAMETERS = {
    "payment_id": "pay", "refund_id": "ref", "dispute_id": "dp", "event_id": "evt", "customer_id": "cus",
    "payment_method_id": "spm", "letter_id": "dlq", "discrepancy_id": "dis",
    "webhook_endpoint_id": "we", "event": "evt",
    "starting_after": "pay", "payment": "pay", "object": "pay",
}  # fmt: skip
"""Fields that name an object, and the prefix that fits them most often."""


class Caller(Struct, frozen=True, kw_only=True):
    """A key, and what it may do."""

    name: str
    key: str | None
    merchant: str | None = None
    """Whose objects it may see, if its key is valid."""
    scopes: frozenset[str] = frozenset()
    is_operator: bool = False
    is_suspended: bool = False

    @property
    def has_all_scopes(self) -> bool:
        """Whether it is a valid key of a merchant for everything."""
        return self.scopes == frozenset(SCOPES)

    def may_succeed(self, route: str) -> bool:
        """Whether a request to a route, named as in the audit trail, may be carried out."""
        row = ROUTES_BY_NAME[route]
        if row.is_public:
            return True
        if self.is_suspended and route in SUSPENDED_ROUTES:
            return False
        return self.is_operator if "/operator/" in row.path else row.scope in self.scopes


class World(Struct, frozen=True):
    """All that a request can name, and all callers."""

    callers: Sequence[Caller]
    owners: dict[str, str]
    """The merchant of each known id. Those that an answer shows first are added."""
    addresses: dict[str, str]
    """The merchant of each payer's e-mail address."""

    def with_prefix(self, prefix: str) -> list[str]:
        """All known ids that begin with a prefix, of any merchant."""
        return sorted(id for id in self.owners if id.startswith(f"{prefix}_"))

    def learn(self, merchant: str, answered: str) -> None:
        """Note the ids that an answer shows to its merchant."""
        for id in ID.findall(answered):
            self.owners.setdefault(id, merchant)


ROUTES_BY_NAME = {row.name: row for row in ROUTES}


def build_world(conn: Connection, url: str) -> World:
    """Create merchants, objects and keys."""
    conn.execute("select outbox.publish_sealing_key('slk_1', %s)", (bytes(range(32)),))
    merchants = [Merchant(conn, url, f"Fuzzed Books {number}") for number in range(3)]
    addresses = {address: merchant.id for merchant in merchants for address in add_objects(conn, merchant)}
    suspended = merchants[-1]
    callers = [
        caller for merchant in merchants for caller in callers_of(conn, merchant, is_suspended=merchant is suspended)
    ]
    conn.execute("select surety.suspend_merchant(%s, true, 'fuzz')", (suspended.id,))
    callers += [
        Caller(name=f"operator: {role}", key=add_operator(conn, f"fuzz-{role}", role), is_operator=True)
        for role in ROLES
    ]
    callers += [Caller(name="unknown key", key=new_key(livemode=False).text), Caller(name="no key", key=None)]
    owners = {
        id: merchant.id
        for merchant in merchants
        for (id,) in conn.execute(IDS_OF_A_MERCHANT.encode(), {"merchant": merchant.id}).fetchall()
    }
    for merchant in merchants:
        merchant.client.close()
    return World(callers, owners, addresses)


def add_objects(conn: Connection, merchant: Merchant) -> tuple[str, str]:
    """Objects of every kind; returns the addresses of their payers."""
    inline, stored = (f"{unique_name(kind)}.of.{merchant.id}@shop.example" for kind in ("inline", "stored"))
    disputed = merchant.pay(reference=unique_name("order"), customer={"email": inline}, metadata={"cart": "9"})["id"]
    opened = fact(disputed, "dispute_opened", f"du_{merchant.id}", 3999, revision=1, data={"status": "needs_response"})
    record(conn, [*charge(disputed), opened])
    refunded = merchant.pay()["id"]
    record(conn, charge(refunded))
    headers = {"Idempotency-Key": unique_name("key")}
    refund = merchant.client.post(f"/v1/payments/{refunded}/refunds", json={"amount": 500}, headers=headers)
    assert refund.status_code == 201, refund.text
    customer = new_customer(merchant, email=stored, name="Ada Lovelace")["id"]
    save_method(conn, merchant, customer)
    merchant.pay(customer_id=customer)
    merchant.pay(capture_method="manual")
    hooks = {"url": "https://shop.example/", "event_types": ["*"]}
    headers = {"Idempotency-Key": unique_name("key")}
    assert merchant.client.post("/v1/webhook_endpoints", json=hooks, headers=headers).status_code == 201
    return inline, stored


def charge(payment: str) -> list[dict[str, object]]:
    """The facts of a payment that is captured."""
    return [
        fact(payment, "submitted", f"pi_{payment}", 4999),
        fact(payment, "captured", f"ch_{payment}", 4999),
    ]


def callers_of(conn: Connection, merchant: Merchant, *, is_suspended: bool) -> list[Caller]:
    """A merchant's keys: with all scopes, with each alone and without each, and those that are refused."""
    chosen: dict[str, tuple[str, ...]] = {"all": SCOPES} | {f"only {scope}": (scope,) for scope in SCOPES}
    chosen |= {f"all but {scope}": tuple(one for one in SCOPES if one != scope) for scope in SCOPES}
    valid = [
        Caller(
            name=f"{'suspended ' if is_suspended else ''}merchant: {name}",
            key=merchant.another_key(scopes=scopes),
            merchant=merchant.id,
            scopes=frozenset(scopes),
            is_suspended=is_suspended,
        )
        for name, scopes in chosen.items()
    ]
    expired = Caller(name="expired key", key=merchant.another_key(expires_in="1 hour"))
    conn.execute(
        "update surety.api_keys set created_at = created_at - interval '1 day',"
        " expires_at = surety.time_now() - interval '1 second' where id = %s",
        (merchant.key_id,),
    )
    revoked = Caller(name="revoked key", key=merchant.another_key())
    conn.execute("select surety.revoke_api_key(%s)", (merchant.key_id,))
    elsewhere = Caller(name="key of another network", key=merchant.another_key(networks=ELSEWHERE))
    return [*valid, expired, revoked, elsewhere]
