"""Whole lives of payments under a seeded scheduler, with the real SQL on a real PostgreSQL and the real worker code.

Everything that could happen in another order is decided at random from one seed:

    loop            simulated time; nothing runs except what the schedule decides
    database        the database, its clock, and the connections leased to processes
    connections     connections that take turns, can be cut around each statement, and wait for locks visibly
    locks           which connection waits for which; a deadlock is reported and broken
    provider        the sandbox without its sockets, and every fault of a provider call
    outages         all provider calls fail for a while; no event may be blamed for it
    clients         merchants, who repeat each request until it is answered
    processes       API, receiver and workers, which can be killed, stopped and replaced
    initial_state   merchants, requested payments, and payments that are already in the middle of their lives
    months          400 days in the middle of a schedule, with everything unfinished left unfinished
    schedule        one schedule: its parts, the next decision, the faults
    recovery        normal operation without faults until nothing is left to do
    invariants      what must hold afterwards
    shrinking       a smaller schedule that fails as well
    process_pool    schedules in parallel
    __main__        python -m tests.simulation --schedules 300 --seed 1 --json
"""
