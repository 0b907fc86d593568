"""Failovers under load: `python -m tests.failover [--json]`.

Everything is real: two PostgreSQL servers, each with Patroni (installed by the run from its package) and replicating
synchronously, one etcd (`apt-get install etcd-server`), and Surety's processes with the load and the checks of
tests/crash. `DATABASE_URL` names both servers behind a first host that can fall silent. Surety's processes are started
once: one that ends is counted, and makes the run fail.

    programs       etcd and Patroni, found or installed
    cluster        the servers, the link between them, and the ways in which they fail
    disturbances   the failures, in the order of the phases
    observer       the longest time without an acknowledged payment, and the findings of `surety status` meanwhile
    run            the phases, and the result

After each disturbance a new payment must be confirmed, every invariant is checked, and both servers become primary and
synchronous standby again. At the end everything must have ended, and agree with the sandbox's record.
"""
