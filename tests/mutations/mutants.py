"""The mutants: each is the code with one guard removed, which the simulation must notice."""

from __future__ import annotations

from pathlib import Path

from msgspec import Struct

FACT_KEY = "(provider, account, livemode, object_id, kind, revision)"
PAYMENT_MODE = """payment_belongs_to_a_merchant foreign key (merchant_id, livemode)
    references surety.merchants (id, livemode)"""


class Patch(Struct, frozen=True):
    """Replaces a text in a file, which must occur there so often: another occurrence may be another guard."""

    path: str
    before: str
    after: str
    occurrences: int = 1


class Mutant(Struct, frozen=True):
    """A guard, and the patches that remove it."""

    guard: str
    patches: tuple[Patch, ...]


def mutant(guard: str, *patches: tuple[str, str, str] | tuple[str, str, str, int]) -> Mutant:
    """A mutant by its patches: path, before, after, and how often the text occurs if more than once."""
    return Mutant(guard, tuple(Patch(*patch) for patch in patches))


MUTANTS: tuple[Mutant, ...] = (
    mutant(
        "a fact counts once",
        (
            "schema.sql",
            f"fact_keys_pkey primary key {FACT_KEY}",
            f"fact_keys_pkey primary key {FACT_KEY[:-1]}, fact_id)",
        ),
        ("db/sql/payments/record_facts.sql", f"on conflict {FACT_KEY} do nothing", "on conflict do nothing", 2),
    ),
    mutant(
        "a key makes one payment",
        ("schema.sql", "primary key (merchant_id, route, key)", "primary key (merchant_id, route, key, payment_id)"),
        ("db/sql/api/payments.sql", "on conflict (merchant_id, route, key) do nothing", "on conflict do nothing"),
    ),
    mutant(
        "a reference belongs to one payment",
        ("schema.sql", "primary key (merchant_id, reference)", "primary key (merchant_id, reference, payment_id)"),
        ("db/sql/api/payments.sql", "on conflict (merchant_id, reference) do nothing", "on conflict do nothing"),
        ("db/sql/payments/steps.sql", "on conflict (merchant_id, reference) do nothing", "on conflict do nothing"),
    ),
    mutant(
        "batches of a limited merchant are accepted one after another",
        (
            "db/sql/limits/new_payments.sql",
            "        for no key update\n",
            "",
        ),
    ),
    mutant(
        "an event that comes after an erasure is stored without the payer's data",
        (
            "db/sql/provider/webhooks.sql",
            "case when v_has_erased then",
            "case when false then",
        ),
    ),
    mutant(
        "an erasure waits for events that are being stored",
        ("db/sql/customers/erasures.sql", "    lock table surety.erasures in access exclusive mode;\n", ""),
    ),
    mutant(
        "a payment on hold is not sent",
        ("db/sql/provider/calls.sql", "when p_operation = 'create' and e.hold is not null", "when false"),
        ("db/sql/limits/holds.sql", "when p_cause = 'command' then", "when false then"),
    ),
    mutant(
        "a repeated webhook is recognized",
        (
            "schema.sql",
            "primary key (provider, account, event_id)",
            "primary key (provider, account, event_id, provider_event_id)",
        ),
        (
            "db/sql/provider/webhooks.sql",
            "on conflict (provider, account, event_id) do nothing",
            "on conflict do nothing",
        ),
    ),
    mutant(
        "an event of the other mode is ignored",
        ("jobs/handlers/webhooks.py", "if webhook.livemode != worker.stripe.livemode]", "if not webhook.type]"),
    ),
    mutant(
        "a payment has the mode of its merchant",
        (
            "schema.sql",
            PAYMENT_MODE,
            "payment_belongs_to_a_merchant foreign key (merchant_id) references surety.merchants (id)",
        ),
    ),
    mutant(
        "a warning of fraud without a webhook is polled",
        (
            "jobs/stripe/webhook_events.py",
            '    "radar.early_fraud_warning.created",\n    "radar.early_fraud_warning.updated",\n}\n',
            "}\n",
        ),
    ),
    mutant(
        "a closed warning of fraud stays closed",
        (
            "db/sql/payments/disputes.sql",
            "order by f.payment_id, f.occurred_at desc, f.object_id desc, f.kind desc",
            "order by f.payment_id, f.recorded_at desc",
        ),
    ),
    mutant(
        "a cause posts once",
        ("schema.sql", "cause_posts_once unique (cause)", "cause_posts_once unique (cause, id)"),
        ("db/sql/ledger/postings.sql", "on conflict (cause) do nothing", "on conflict do nothing"),
    ),
    mutant(
        "a step starts where the last ended",
        (
            "schema.sql",
            "'payment_id, prior_version, from_state',\n    'steps', 'payment_id, version, to_state', false\n",
            "'payment_id', 'payments', 'id', false\n",
        ),
    ),
    mutant(
        "a step is legal",
        (
            "schema.sql",
            "foreign key (from_state, to_state)\n    references surety.transitions (from_state, to_state)",
            "check (from_state <> '')",
        ),
    ),
    mutant(
        "a state is its last step",
        (
            "schema.sql",
            "'payments', 'id, version, state', 'steps', 'payment_id, version, to_state', true",
            "'payments', 'id, version', 'steps', 'payment_id, version', true",
        ),
    ),
    mutant(
        "the trail is append-only",
        (
            "db/sql/core/audit.sql",
            "before update or delete or truncate on audit.entries",
            "before truncate on audit.entries",
        ),
    ),
    mutant(
        "a step is audited",
        (
            "db/sql/payments/steps.sql",
            "    where m.version > 1 or m.cause <> 'request';\n",
            "    where m.version > 1 and m.to_state <> 'provider_submitted';\n",
        ),
    ),
    mutant(
        "the platform's fee is posted",
        ("schema.sql", "('captured', 2, 'pending', 'fee_revenue', 'platform_fee'),\n", ""),
    ),
    mutant(
        "balances are updated",
        (
            "db/sql/ledger/postings.sql",
            "balance_minor = kept.balance_minor + excluded.balance_minor",
            "balance_minor = kept.balance_minor",
        ),
    ),
    mutant(
        "a late commit is not missed",
        ("db/sql/outbox/events.sql", "where pg_visible_in_snapshot(open.xid, p_goal)", "where false"),
    ),
    mutant(
        "all events up to the goal are scanned",
        (
            "db/sql/outbox/claims.sql",
            "if v_scanned = v_scan_limit or cardinality(v_ids) = v_handler.batch_size then",
            "if v_scanned = v_scan_limit then",
        ),
    ),
    mutant(
        "a worker that lost its lease can't complete events",
        (
            "db/sql/outbox/completion.sql",
            "    if not found then\n        return false;\n    end if;\n    if v_batch.event_ids <@ p_event_ids then\n",
            "    if not found then\n        return true;\n    end if;\n    if v_batch.event_ids <@ p_event_ids then\n",
        ),
    ),
    mutant(
        "effects of a lost lease are rolled back",
        ("jobs/database.py", "                    raise psycopg.Rollback(transaction)\n", "                    pass\n"),
    ),
    mutant(
        "a dead worker's batch is taken over",
        ("db/sql/outbox/claims.sql", "    perform outbox.expire_leases(p_handler, v_now);\n", ""),
    ),
    mutant(
        "poison-message candidates run alone",
        (
            "db/sql/outbox/claims.sql",
            "and r.due_at <= v_now and r.worker_deaths > 0",
            "and r.due_at <= v_now and r.worker_deaths > 99",
        ),
        ("db/sql/outbox/claims.sql", "and r.due_at <= v_now and r.worker_deaths = 0", "and r.due_at <= v_now"),
    ),
    mutant(
        "due retries are scheduled",
        (
            "db/sql/outbox/scheduling.sql",
            "or exists (select from outbox.retries as r where r.handler = p_handler and r.due_at <= v_now)",
            "or false",
        ),
        (
            "db/sql/outbox/scheduling.sql",
            "or exists (select from outbox.retries as r where r.handler = h.handler and r.due_at <= v_now)",
            "or false",
        ),
    ),
    mutant(
        "keys are locked in order",
        ("db/sql/api/payments.sql", "order by g.merchant_id, g.idempotency_key, g.n\n", "order by g.n\n"),
    ),
    mutant(
        "a final state precedes a payer action",
        (
            "db/sql/payments/derive.sql",
            "        when p_has_failed then 'failed'\n",
            "        when p_needs_action then 'requires_action'\n        when p_has_failed then 'failed'\n",
        ),
    ),
    mutant(
        "a wrong amount is not accepted",
        ("jobs/handlers/payments.py", 'if intent["amount"] == subject.amount_minor:', 'if intent["amount"]:'),
        (
            "db/sql/payments/fact_checks.sql",
            "                when f.kind = 'submitted' and f.amount_minor <> p.amount_minor then 'amount'\n",
            "",
        ),
    ),
    mutant(
        "a confirmed payment is expected to settle",
        (
            "db/sql/payments/expected_settlements.sql",
            "v_now + interval '7 days'\n    from outbox.batch_events(p_batch, p_fence) as e\n    where ",
            "v_now + interval '7 days'\n    from outbox.batch_events(p_batch, p_fence) as e\n    where false and ",
        ),
    ),
    mutant(
        "a declined intent is canceled",
        ("db/sql/payments/fact_checks.sql", "    if v_declined is not null then\n", "    if false then\n"),
    ),
    mutant(
        "a requested refund is reserved at once",
        (
            "db/sql/payments/derive.sql",
            "coalesce(outcomes.refunding, 0) + reserved.minor as refunding",
            "coalesce(outcomes.refunding, 0) + 0 * reserved.minor as refunding",
        ),
    ),
    mutant(
        "a refund has the same key at the provider",
        ("db/sql/provider/calls.sql", "r.id || ':create',", "r.id || ':create' || random(),"),
        (
            "db/sql/provider/calls.sql",
            "            sends = c.sends + 1,\n",
            "            sends = c.sends + 1,\n            idempotency_key = excluded.idempotency_key,\n",
        ),
        (
            "jobs/handlers/refunds.py",
            "return await worker.stripe.find_refund(call.account, call.provider_id, call.subject_id)",
            "return None",
        ),
    ),
    mutant(
        "a failed refund is credited back",
        ("schema.sql", "('refund_failed', 1, 'reserved_for_refunds', 'available', 'gross'),\n", ""),
    ),
    mutant(
        "a refund can fail after it has succeeded",
        ("schema.sql", "('refund_failed', 'refund', 5, null,", "('refund_failed', 'refund', 0, null,"),
    ),
    mutant(
        "the network's fee is passed on",
        ("schema.sql", "('dispute', 3, 'available', 'fee_revenue', 'fee'),\n", ""),
    ),
    mutant(
        "a disputed amount is withheld",
        (
            "db/sql/ledger/fact_postings.sql",
            "(1, 'dispute_opened', steps.opened),",
            "(1, 'dispute_opened', steps.lost),",
        ),
    ),
    mutant(
        "lost webhooks are read from the event list",
        ("jobs/polling.py", '    for window in await poll_windows(worker, "events"):\n', "    for window in ():\n"),
    ),
    mutant(
        "a second intent is canceled",
        (
            "db/sql/payments/record_facts.sql",
            "    v_types := v_types || surety.cancel_duplicate_intents(v_new, v_now);\n",
            "",
        ),
    ),
    mutant(
        "failures before a circuit opened are not counted",
        (
            "db/sql/provider/circuit_breaker.sql",
            "        failures = greatest(0, r.failures - uncounted.times),\n",
            "        failures = r.failures,\n",
        ),
        (
            "db/sql/provider/circuit_breaker.sql",
            "        attempts = uncounted.attempts,\n",
            "",
        ),
    ),
    mutant(
        "only money meets an expected settlement",
        (
            "db/sql/payments/expected_settlements.sql",
            "    order by e.aggregate_id\n    on conflict (payment_id, kind) do nothing;\n",
            """
    on conflict (payment_id, kind) do nothing;
    update surety.expectations as x set met_at = v_now from surety.payments as p
    where p.id = x.payment_id and x.met_at is null and p.state <> 'confirmed';
""",
        ),
    ),
    mutant(
        "failures during an outage are not counted",
        (
            "db/sql/provider/circuit_breaker.sql",
            "when b.opened_at is not null then extract(epoch from surety.hold_duration())",
            "when true then null",
        ),
    ),
    mutant(
        "refusals of access are not counted",
        (
            "db/sql/provider/circuit_breaker.sql",
            "when b.opened_at is not null then extract(epoch from surety.hold_duration())",
            "when r.result ? 'access_refused' then null\n                    when b.opened_at is not null then 600",
        ),
    ),
    mutant(
        "the circuits of a refused key close together",
        (
            "db/sql/provider/circuit_breaker.sql",
            "(b.account = p_account or (v_cause = 'key_refused' and b.cause = 'key_refused'))",
            "b.account = p_account",
        ),
    ),
    mutant(
        "only a payment that is surely unexecuted is canceled at once",
        ("db/sql/provider/calls.sql", "calls.refused_through < calls.sends", "calls.refused_through < 0"),
    ),
    mutant(
        "the same call has the same key at the provider",
        (
            "db/sql/provider/calls.sql",
            "(j.payment).id || ':' || j.operation\n",
            "(j.payment).id || ':' || j.operation || random()\n",
        ),
        (
            "db/sql/provider/calls.sql",
            "            sends = c.sends + 1,\n",
            "            sends = c.sends + 1,\n            idempotency_key = excluded.idempotency_key,\n",
        ),
    ),
    mutant(
        "polls follow the provider's clock",
        ("jobs/polling.py", "            read_to = began[0]\n", "            read_to = window.read_to\n"),
    ),
    mutant(
        "a poll's delay is bounded",
        ("db/sql/provider/polling.sql", "2 ^ (least(greatest(p_poll_count, -1), 5) + 1)", "2 ^ (p_poll_count + 1)"),
    ),
    mutant(
        "the platform's own account is no merchant's",
        ("db/sql/provider/key_checks.sql", "where p_account in (k.account_id, k.other_account_id))", "where false)"),
    ),
    mutant(
        "a payer can act",
        ("db/sql/provider/requests.sql", "'return_url', p_payment.return_url,", "'return_url', null,"),
    ),
    mutant(
        "a payer can act by script",
        (
            "db/sql/provider/requests.sql",
            "'surety_authentication', case when p_payment.authentication = 'script' then 'script' end,",
            "",
        ),
    ),
    mutant(
        "the payer's address reaches the provider",
        ("db/sql/provider/requests.sql", "'receipt_email', p_payment.customer ->> 'email',", ""),
    ),
    mutant(
        "the audit trail has no address",
        ("db/redaction.py", 'return EMAIL_ADDRESS.sub("(an e-mail address)", text)', "return text"),
    ),
    mutant(
        "an answer without a currency is no mismatch",
        (
            "jobs/handlers/payments.py",
            'for name in ("id", "amount", "currency", "livemode"):',
            'for name in ("id", "amount"):',
        ),
    ),
    mutant(
        "a refused refund gives back what it reserved",
        (
            "db/sql/provider/refusals.sql",
            "p_gross => r.amount_minor)), v_now)\n    from unnest(v_refused) as r;",
            "p_gross => r.amount_minor)), v_now)\n    from unnest(v_refused) as r\n    having false;",
        ),
    ),
    mutant(
        "a payment with a loss stays reversed",
        (
            "db/sql/payments/derive.sql",
            "p_captured_minor > 0 and p_reversed_minor > 0",
            "p_reversed_minor >= p_captured_minor and p_captured_minor > 0",
        ),
    ),
    mutant(
        "a customer has the same key at the provider",
        ("db/sql/customers/calls.sql", "                else ''\n", "                else ':' || random()\n"),
        (
            "db/sql/customers/calls.sql",
            "when p_operation = 'create_customer' then k.idempotency_key else",
            "when false then k.idempotency_key else",
        ),
    ),
    mutant(
        "a customer is searched for before its key is replaced",
        (
            "jobs/handlers/customers.py",
            "found = await worker.stripe.find_customer(",
            "found = None if sent else await worker.stripe.find_customer(",
        ),
    ),
    mutant(
        "a payment has its customer at the provider",
        (
            "db/sql/provider/requests.sql",
            "'customer', (select customers.provider_id from",
            "'customer', (select null from",
        ),
    ),
    mutant(
        "a payment method is saved when a payment has proved it",
        (
            "db/sql/payments/advance.sql",
            "filter (where w.to_state in ('authorized', 'confirmed'))",
            "filter (where w.to_state in ('provider_submitted', 'authorized', 'confirmed'))",
        ),
        (
            "jobs/handlers/customers.py",
            '{"method": saved_card(method)} if owner is not None else {}',
            '{"method": saved_card(method)}',
        ),
    ),
    mutant(
        "a payment method that is removed at the provider is removed here",
        ("jobs/stripe/webhook_events.py", '{"payment_method.automatically_updated", "payment_method.detached", ', "{"),
    ),
    mutant(
        "a removed payment method stays until accepted payments have used it",
        ("db/sql/customers/calls.sql", "when surety.is_method_needed(c, e.method_id) then 'wait'", ""),
    ),
    mutant(
        "a detachment whose outcome is unknown is repeated",
        (
            "db/sql/customers/calls.sql",
            "when k.customer_id is null then 'send'\n                else 'ask'\n",
            "when k.customer_id is null then 'send'\n                else 'skip'\n",
        ),
    ),
)


def apply(mutant: Mutant, folder: Path) -> None:
    """Remove the guard in a copy of the code. Raises ValueError if a patch doesn't fit the code."""
    for patch in mutant.patches:
        file = folder / patch.path
        text = file.read_text()
        if (found := text.count(patch.before)) != patch.occurrences:
            raise ValueError(f"{mutant.guard}: {patch.path} has {found} times {patch.before!r}")
        file.write_text(text.replace(patch.before, patch.after))
