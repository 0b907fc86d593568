"""Processes killed under load: `python -m tests.crash --cycles N --seed S [--json]`.

Everything is real: API (two processes), receiver, two workers, the sandbox with the demo's faults, and a PostgreSQL of
the run's own. Each cycle kills one thing, drawn by lot; a supervisor starts it again; then a new payment must get
through, every promise is asked of the database, and the sandbox is asked whether it charged anybody twice. At the end
every payment must have ended.

    proxy     the wire between processes and database, where a connection can fall silent
    house     the processes, and the server they share
    kills     what dies, and how
    traffic   merchants' systems: they repeat what went unanswered and write down what was acknowledged
    run       cycles, questions, the result

What takes minutes in earnest is shortened as in the demo: leases of 4 s, delays of half a second and more.
"""
