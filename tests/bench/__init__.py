"""Benchmarks: `python -m tests.bench accept | drain | idle | lifecycle | overload | trace [--json]`.

Every important figure is a ratio of two measurements of one run, taken in alternating rounds and reported as the median
of the rounds, because machines differ and share their hardware. Progress goes to stderr; with --json the last line of
stdout is one object.

    databases         a server, databases, and the arithmetic of results
    history           payments by the hundred thousand: one is made by the product, the others are copies of it
    bench.sql         the copying, and the handler that `drain` measures
    drain_processes   the processes that drain events: Surety's and Procrastinate's
    load              HTTP requests, by wrk (accept.lua) or by a Python client
    payment_client    posts payments and waits until they are settled
    api_server        the API that `accept` measures
    services          all processes of a deployment
    recording_proxy   records when the sandbox receives a payment
    comparison        `lifecycle` in turns with another revision's (revisions.py) and with DBOS (dbos_services.py)
    dbos_payments     the payments as DBOS workflows
    scale             `lifecycle` in a large database, with more workers, at half load
    costs             CPU time, log and commits of a payment
    cpu_time          CPU time and memory of groups of processes
    command           runs a benchmark for a test
"""
