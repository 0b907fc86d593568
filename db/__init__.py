"""The database: its state (schema.sql, migrations), its behaviour (the files below) and the ways to reach it.

CAPABILITIES lists the files of behaviour in a payment's life order, which is the order in which they are deployed: a
file may use what stands above it.

LOCK_ORDER lists the tables that transactions write, in the order in which all of them do; a deploy that needs several
takes them in that order, too. Those that aren't listed come last.
"""

CAPABILITIES: tuple[str, ...] = (
    "time",
    "partitions",
    "audit",
    "epochs",
    "outbox",
    "waking",
    "ledger",
    "lifecycle",
    "posting",
    "parking",
    "facts",
    "merchants",
    "requests",
    "commands",
    "refunds",
    "disputes",
    "balance",
    "reading",
    "breaker",
    "calls",
    "inbox",
    "settlement",
    "trace",
    "dead_letters",
    "invariants",
    "status",
    "operators",
    "report",
    "grants",
)

LOCK_ORDER: tuple[str, ...] = (
    "surety.idempotency_keys",
    "surety.payment_references",
    "surety.inbox",
    "surety.fact_keys",
    "surety.facts",
    "surety.payments",
    "surety.steps",
    "surety.refunds",
    "surety.refund_steps",
    "surety.disputes",
    "outbox.events",
    "audit.entries",
    "ledger.postings",
    "ledger.transfers",
    "ledger.balances",
    "surety.breakers",
    "outbox.batches",
)
