"""Processes killed under load: `python -m tests.crash --cycles N --seed S [--json]`.

Everything is real: API (two processes), receiver, two workers, the sandbox with the demo's faults, and a PostgreSQL of
the run's own. Each cycle kills one thing, drawn by lot; a supervisor starts it again; then a new payment must get
through, every invariant is asked of the database, and the sandbox is asked for second charges and refunds.
At the end all must have ended, and every charge, refund and dispute stand here as the sandbox remembers it.

    proxy           the connection between processes and database, where a connection can fall silent
    system           the processes, and the server they share
    kills           what dies, and how
    correspondence  what merchants ask, again and again until it is answered, and write down once it is acknowledged
    aftersales      what they do after the charge, by their feed of events
    traffic         orders without end, some with a story that goes on
    questions       what database and provider are asked
    run             cycles, and the result

What takes minutes in earnest is shortened as in the demo: leases of 4 s, delays of half a second and more.
"""
