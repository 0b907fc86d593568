"""Processes killed under load: `python -m tests.crash --cycles N --seed S [--json]`.

Everything is real: API (two processes), receiver, two workers, the sandbox with the demo's faults, and a PostgreSQL of
the run's own. Each cycle kills one thing, drawn by lot; a supervisor starts it again; then a new payment must get
through, every invariant is asked of the database, and the sandbox is asked for second charges and refunds.
At the end all must have ended, and every charge, refund and dispute stand here as the sandbox remembers it.

    processes          the processes, and the server they share
    kills              the victims, and the ways to kill them
    retrying_client    merchants' requests, repeated until answered, logged once acknowledged
    scenarios          what merchants do after the charge, driven by their events
    background_load    payments without end, some of which continue with a scenario
    checks             queries to database and provider
    run                cycles, and the result

A silent connection between processes and database comes from tests/support/postgres_proxy.py.

What takes minutes in earnest is shortened as in the demo: leases of 4 s, delays of half a second and more.
"""
