"""Customers in some schedules: payments that save their method, later ones without the payer, changes and removals."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from msgspec import Struct, field

from app.api.schemas.payments import Mandate, MethodToSave
from app.sandbox.settings import PLATFORM_ACCOUNT
from app.sandbox.stripe.objects.customers import detach
from app.sandbox.stripe.objects.methods import replace_card
from tests.simulation.clients import WantedPayment, command, request_until_answered
from tests.simulation.erasures import without_payer
from tests.simulation.initial_state import draw_wanted_payments
from tests.simulation.recovery import run_periodic_jobs

if TYPE_CHECKING:
    from tests.simulation.schedule import Schedule

CUSTOMERS_SHARE = 0.25
CUSTOMERS, CUSTOMERS_MAX = 2, 5
# Schedules in which methods are saved before faults begin.
SAVED_SHARE = 0.8
PAYMENTS_MAX = 5
TOKENS = ("pm_card_visa",) * 4 + (
    "pm_card_authenticationRequired",
    "pm_card_authenticationRequiredOnSetup",
    "pm_card_chargeDeclined",
    "pm_card_bypassPending",
)
MANDATE = Mandate(
    accepted_at=datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC), ip_address="203.0.113.7", user_agent="Firefox/150"
)
SAVING = MethodToSave(usage="off_session", mandate=MANDATE)
# The provider refuses the last one.
EMAILS = ("ada@shop.example", "ada.king@shop.example", "ada@shop.invalid")
FIELDS = {"email": EMAILS, "name": ("Payer Ada", "Payer Ada King"), "phone": ("+1 555 0100", "+1 555 0199")}
DATA = ("email", "name", "phone", "description", "shipping")


class KnownCustomer(Struct):
    """A customer of a merchant, and the commands about it."""

    id: str
    number: int
    merchant: int
    commands: int = 0
    command_answers: dict[str, list[tuple[int, str]]] = field(default_factory=dict)
    """Status and document of each answered command that took effect, by key."""
    methods_removed_elsewhere: set[str] = field(default_factory=set)
    """By the provider's ids."""


def has_customers(seed: int) -> bool:
    """Whether the schedules of a seed have customers."""
    return random.Random(f"{seed}:customers").random() < CUSTOMERS_SHARE


async def add_customers(schedule: Schedule) -> list[KnownCustomer]:
    """Create customers and some payments of them in some schedules, by a stream of its own."""
    if not has_customers(schedule.plan.seed):
        return []
    chance = random.Random(f"{schedule.plan.seed}:customers' payments")
    merchant = chance.randrange(len(schedule.merchants))
    customers = [add_customer(schedule, chance, merchant, number) for number in range(CUSTOMERS)]
    early = [draw_payment(chance, customers[0], number) for number in (799, 800, 801)]
    late = [draw_payment(chance, customers[1], 802)]
    schedule.wanted += early + late
    if chance.random() < SAVED_SHARE:
        await asyncio.gather(*(request_until_answered(schedule, wanted) for wanted in early))
        await run_periodic_jobs(schedule, ())
        early = []
        charge_saved_method(schedule, customers[0])
        for act in chance.sample((change_customer, remove_method, change_method_elsewhere), 2):
            act(schedule, customers[0])
    # When faults begin, the second customer is still to be created at the provider.
    await asyncio.gather(*(request_until_answered(schedule, wanted) for wanted in early + late), *schedule.asking)
    return customers


def add_customer(schedule: Schedule, chance: random.Random, merchant: int, number: int) -> KnownCustomer:
    """A new customer of a merchant."""
    fields = {name: chance.choice(texts[:2]) for name, texts in FIELDS.items() if chance.random() < 0.6}
    asked = {
        "key_hash": schedule.keys[merchant].hex(), "request_hash": "00", "idempotency_key": f"customer {number}"
    } | fields  # fmt: skip
    query = "select body::jsonb ->> 'id' from api.create_customer(%s)"
    [(customer_id,)] = schedule.database.rows(query, json.dumps(asked))
    return KnownCustomer(id=customer_id, number=900 + number, merchant=merchant)


def draw_payment(chance: random.Random, customer: KnownCustomer, number: int) -> WantedPayment:
    """A payment of a customer that saves its method, mostly."""
    [wanted] = draw_wanted_payments(chance, 1, first=number)[:1]
    wanted.merchant, wanted.customer_id = customer.merchant, customer.id
    wanted.token = chance.choice(TOKENS)
    wanted.save_method = SAVING if chance.random() < 0.9 else None
    return wanted


def act_on_customer(schedule: Schedule) -> None:
    """A merchant gets a customer, charges a saved payment method, changes a customer, or removes a method."""
    if not schedule.customers:
        return
    chance = schedule.chance
    with_methods = [customer for customer in schedule.customers if saved_methods(schedule, customer)]
    customer = chance.choice(with_methods or schedule.customers)
    match chance.choice(("create", "charge", "charge", "update", "detach", "detach", "elsewhere")):
        case "create":
            number = len(schedule.customers)
            if number < CUSTOMERS_MAX:
                new = add_customer(schedule, chance, customer.merchant, number)
                wanted = draw_payment(chance, new, 801 + number)
                schedule.customers.append(new)
                schedule.wanted.append(wanted)
                schedule.unasked.append(wanted)
        case "charge":
            charge_saved_method(schedule, customer)
        case "update":
            change_customer(schedule, customer)
        case "detach":
            remove_method(schedule, customer)
        case "elsewhere":
            change_method_elsewhere(schedule, customer)


def change_customer(schedule: Schedule, customer: KnownCustomer) -> None:
    """Change or remove some data of a customer."""
    chance = schedule.chance
    fields: dict[str, Any] = {
        name: chance.choice((None, *texts)) for name, texts in FIELDS.items() if chance.random() < 0.5
    }
    # A change without effect would make no version.
    fields["metadata"] = {"change": str(chance.getrandbits(40))}
    send(schedule, customer, "update_customer", {"customer_id": customer.id, **fields})


def remove_method(schedule: Schedule, customer: KnownCustomer) -> None:
    """Remove a saved payment method, if there is one."""
    if methods := saved_methods(schedule, customer):
        asked = {"payment_method_id": f"{customer.id}/{schedule.chance.choice(methods)}"}
        send(schedule, customer, "detach_payment_method", asked)


def change_method_elsewhere(schedule: Schedule, customer: KnownCustomer) -> None:
    """The network replaces the card of a saved payment method, or the method is removed in the dashboard."""
    methods = schedule.database.rows(
        "select provider_id from surety.payment_methods where customer_id = %s and detached_at is null order by id",
        customer.id,
    )
    if not methods:
        return
    chance, provider = schedule.chance, schedule.provider
    method = provider.memory.get(chance.choice(methods)[0])
    if method.body["customer"] is None:
        return
    if chance.random() < 0.3:
        detach(provider.sandbox, method, None)
        customer.methods_removed_elsewhere.add(method.id)
    else:
        replaced = {"last4": f"{chance.randrange(10_000):04}", "exp_month": chance.randrange(1, 13), "exp_year": 2034}
        replace_card(provider.sandbox, method, replaced)
    provider.commit()


def saved_methods(schedule: Schedule, customer: KnownCustomer) -> list[str]:
    """The ids of a customer's saved payment methods."""
    query = "select id from surety.payment_methods where customer_id = %s and detached_at is null order by id"
    return [method_id for (method_id,) in schedule.database.rows(query, customer.id)]


def charge_saved_method(schedule: Schedule, customer: KnownCustomer) -> None:
    """Request a payment by a saved method, mostly without the payer."""
    chance, methods = schedule.chance, saved_methods(schedule, customer)
    number = 700 + sum(wanted.saved_method is not None for wanted in schedule.wanted)
    if not methods or number == 700 + PAYMENTS_MAX:
        return
    wanted = WantedPayment(
        number=number,
        merchant=customer.merchant,
        key=f"key-{number}",
        amount=chance.randrange(100, 20_000),
        currency="usd",
        token="",
        capture_method=chance.choice(("automatic", "automatic", "manual")),
        reference=None,
        customer_id=chance.choice((None, customer.id)),
        saved_method=chance.choice(methods),
        off_session=chance.random() < 0.8,
    )
    schedule.wanted.append(wanted)
    schedule.unasked.append(wanted)


def send(schedule: Schedule, customer: KnownCustomer, function: str, fields: Mapping[str, str | None]) -> None:
    """Send a command about a customer, possibly twice at once."""
    customer.commands += 1
    key = f"{function} {customer.number} {customer.commands}"
    for _ in range(schedule.chance.choice((1, 1, 2))):
        asked = dict(fields)
        schedule.asking.append(schedule.clients.start(command(schedule, customer, function, key, asked)))


def check_customers(schedule: Schedule) -> None:
    """Customers, their data and their saved payment methods are the same at the provider and here."""
    if not schedule.customers:
        return
    check_customer_commands(schedule)
    memory = schedule.provider.memory
    there = {one.id: one for one in memory.all_of_kind("customer")}
    owners = Counter((one.account, one.body["metadata"].get("surety_customer")) for one in there.values())
    # Only a request that is executed later than any search for its customer makes a second one.
    if not any(fault.startswith(("slow", "stalled")) for fault in schedule.faults) and owners.total() > len(owners):
        schedule.report_violation("a customer is one at the provider", str(owners.most_common(1)))
    query = (
        "select id, provider_id, provider_account, provider_version = version, provider_failure is not null,"
        f" erased_at is not null, {', '.join(DATA)} from surety.customers order by id"
    )
    rows = schedule.database.rows(query)
    for customer_id, provider_id, named_account, is_passed_on, is_refused, is_erased, *data in rows:
        account = named_account or PLATFORM_ACCOUNT
        if provider_id is None:
            # Its payments ended before the answer. The next one finds it.
            continue
        found = there.get(provider_id)
        if found is None or (found.account, found.body["metadata"]["surety_customer"]) != (account, customer_id):
            schedule.report_violation("a customer is known as the provider has it", f"{customer_id}: {provider_id}")
            continue
        if not is_passed_on:
            schedule.report_violation("the provider has a customer's present data", f"{customer_id}: not passed on")
        sent = [found.body[name] for name in DATA]
        # What the provider holds is erased there.
        if sent != data and not is_refused and not is_erased:
            schedule.report_violation("the provider has a customer's present data", f"{customer_id}: {sent}")
    check_saved_methods(schedule)
    check_charged_methods(schedule)


def check_customer_commands(schedule: Schedule) -> None:
    """Answered commands keep their answers; each changed its customer once."""
    for customer in schedule.customers:
        [(version, is_erased)] = schedule.database.rows(
            "select version, erased_at is not null from surety.customers where id = %s", customer.id
        )
        for key, answers in customer.command_answers.items():
            shown = {(status, without_payer(schedule, text) if is_erased else text) for status, text in answers}
            if len(shown) > 1:
                schedule.report_violation("a repeated request gets the first answer", f"{key}: {answers}")
        updates = sum(key.startswith("update_customer") for key in customer.command_answers)
        if version != 1 + updates + is_erased:
            schedule.report_violation("a change of a customer takes effect once", f"{customer.id}: {version}")


def check_saved_methods(schedule: Schedule) -> None:
    """The methods that customers have at the provider are saved here; removed ones are detached there."""
    there = {
        method.id: method.body["customer"]
        for method in schedule.provider.memory.all_of_kind("payment_method")
        if method.body["customer"] is not None
    }
    rows = schedule.database.rows(
        "select m.id, m.provider_id, c.provider_id, m.detached_at is not null, m.last4, m.exp_month"
        " from surety.payment_methods as m"
        " join surety.customers as c on c.id = m.customer_id order by m.id"
    )
    for method_id, provider_id, owner, is_detached, *shown in rows:
        card = schedule.provider.memory.get(provider_id).body["card"]
        if not is_detached and shown != [card["last4"], card["exp_month"]]:
            schedule.report_violation("a saved payment method has its present card", f"{method_id}: {shown}")
        attached_to = there.pop(provider_id, None)
        if is_detached and attached_to is not None:
            schedule.report_violation("a removed payment method is detached", method_id)
        if not is_detached and attached_to != owner:
            schedule.report_violation("a saved payment method is its customer's", f"{method_id}: of {attached_to}")
    # A payment that was canceled before we saw it authorized saves nothing here.
    succeeded = {
        intent.body["payment_method"]
        for intent in schedule.provider.memory.all_of_kind("payment_intent")
        if intent.body["status"] == "succeeded"
    }
    if left := sorted(there.keys() & succeeded):
        schedule.report_violation("a payment method that the payer agreed to save is saved", left[0])


def check_charged_methods(schedule: Schedule) -> None:
    """Payments have their customers at the provider, and charge the saved methods that they name."""
    removed = set().union(*(customer.methods_removed_elsewhere for customer in schedule.customers))
    refused = schedule.database.rows(
        "select p.id from surety.payments as p join surety.payment_methods as m on m.id = p.saved_method_id"
        " where p.failure ->> 'message' like '%%detached%%' and m.provider_id <> all(%s)",
        sorted(removed),
    )
    if refused:
        schedule.report_violation("a saved payment method stays until accepted payments have used it", refused[0][0])
    rows = schedule.database.rows(
        "select p.id, c.provider_id, m.provider_id from surety.payments as p join surety.customers as c"
        " on c.id = p.customer_id left join surety.payment_methods as m on m.id = p.saved_method_id order by p.id"
    )
    expected = {payment_id: (customer, method) for payment_id, customer, method in rows}
    for intent in schedule.provider.memory.all_of_kind("payment_intent"):
        customer, _ = expected.get(intent.body["metadata"]["surety_payment"], (None, None))
        if intent.body["customer"] != customer:
            schedule.report_violation("a payment has its customer at the provider", intent.id)
    for charge in schedule.provider.memory.all_of_kind("charge"):
        _, method = expected.get(charge.body["metadata"]["surety_payment"], (None, None))
        if method is not None and charge.body["payment_method"] != method:
            schedule.report_violation("a payment charges the saved method that it names", charge.id)
