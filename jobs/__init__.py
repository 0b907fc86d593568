"""Workers: they take events from the outbox, call the provider and run periodic jobs.

Run by `procrastinate --app jobs.app worker`, in any number of processes. A payment's way through these files:

    drain            claims a batch of events, has it handled, finishes it or gives it back
    handlers/        table.py lists the handlers; calls.py makes a batch's calls; one file for each subject
    stripe/          the client, its errors, what Stripe's objects and webhooks say, the check of our key
    circuit_breaker  reports calls to the database's circuits, and probes
    recorder         records the results of calls, in groups
    periodic         the periodic jobs and when they run
    polling          unfinished objects and lists that are read from the provider
    supervision      restarts Procrastinate's worker, stops it by signals
    mode             ends a worker whose key has another mode than the database
    watchdog         ends a worker process that hangs
    worker           what all tasks share: name, database, Stripe client, handlers
    database         the workers' connections to PostgreSQL

Procrastinate's tables hold nothing that would be missed: deleting all their rows loses nothing. Importing this package
needs no settings; starting a worker does.
"""

from __future__ import annotations

from procrastinate import PsycopgConnector

from jobs import drain, periodic
from jobs.handlers.table import HANDLERS
from jobs.supervision import WorkerApp, open_pool

app = WorkerApp(
    connector=PsycopgConnector(pool_factory=open_pool),
    worker_defaults={
        # Room for two drains of each handler and for every periodic job at once.
        "concurrency": 2 * len(HANDLERS) + len(periodic.PERIODIC_JOBS),
        "delete_jobs": "always",
        "fetch_job_polling_interval": 1.0,
        "shutdown_graceful_timeout": 30.0,
    },
)
app.task(name="drain", queue="outbox", pass_context=True)(drain.drain)
periodic.add_periodic_tasks(app)
