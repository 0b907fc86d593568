"""Workers: they take events from the outbox, call the provider and run periodic jobs.

Run by `procrastinate --app jobs.app worker`, in any number of processes. A payment's way through these files:

    drain            claims a batch of events, has it handled, finishes it or gives it back
    handlers/        table.py lists the handlers; calls.py makes a batch's calls; one file for each subject
    stripe/          the client, its errors, what Stripe's objects and webhooks say, the check of our key
    circuit_breaker  reports calls to the database's circuits, and probes
    recorder         records the results of calls, in groups
    leader           the one worker that runs the periodic jobs and schedules handlers
    periodic         the periodic jobs and how often they run
    polling          unfinished objects and lists that are read from the provider
    webhooks/        deliveries to merchants' endpoints
    supervision      restarts Procrastinate's worker, stops it by signals
    mode             ends a worker that may not call the provider from its database
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
        # Room for two drains of each handler, and for the upkeep of its tables.
        "concurrency": 2 * len(HANDLERS) + 1,
        "delete_jobs": "always",
        "fetch_job_polling_interval": 1.0,
        "shutdown_graceful_timeout": 30.0,
    },
)
app.task(name="drain", queue="outbox", pass_context=True)(drain.drain)
# Procrastinate watches its side tasks only until the first of them ends, as its deferrer would without a periodic task.
# Then it would not notice the end of its listener.
app.periodic(cron="0 * * * *")(
    app.task(name="delete_orphaned_jobs", queue="periodic", queueing_lock="delete_orphaned_jobs", pass_context=True)(
        periodic.delete_orphaned_jobs
    )
)
