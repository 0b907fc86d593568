"""The database: its state (schema.sql, migrations), its behaviour (the files below) and the ways to reach it.

CAPABILITIES lists the files of behaviour in a payment's life order, which is the order in which they are deployed: a
file may use what stands above it.
"""

CAPABILITIES: tuple[str, ...] = (
    "time",
    "partitions",
    "audit",
    "outbox",
    "dead_letters",
    "ledger",
    "lifecycle",
    "facts",
    "requests",
    "calls",
    "inbox",
    "settlement",
    "trace",
    "invariants",
    "report",
    "grants",
)
