"""Processes killed under load: `python -m tests.crash --cycles N --seed S [--json]`.

Everything is real: API (two processes), receiver, two workers, the sandbox with the demo's faults, and a PostgreSQL of
the run's own. Each cycle kills one process or connection, drawn at random, and a supervisor restarts it. Then a new
payment must succeed, every invariant is checked, and the sandbox is searched for second charges and refunds.
At the end everything must have ended, and every charge, refund and dispute must agree with the sandbox's record.

    processes          the processes, and the server they share
    kills              the victims, and the ways to kill them
    retrying_client    merchants' requests, repeated until answered, logged once acknowledged
    scenarios          what merchants do after the charge, driven by their events
    background_load    payments without end, some of which continue with a scenario
    customers          customers whose methods are saved, charged without the payer, and removed
    limits             a limited merchant, payments on hold, and an operator who decides
    checks             queries to database and provider
    run                cycles, and the result

A silent connection between processes and database comes from tests/support/postgres_proxy.py.

Delays of minutes in production are shortened as in the demo: leases of 4 s, delays of half a second and more.
"""
