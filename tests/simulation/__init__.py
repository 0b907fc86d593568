"""Whole lives of payments under a seeded scheduler: the real SQL on a real PostgreSQL, the real lanes and workers.

Everything that could come in another order on another day is decided here instead, by lot from one seed:

    loop        time stands still until it is moved; nothing happens but what was decided
    database      the database: its clock, and whose connection is whose
    connections       the connections: they take turns, can be cut at each statement's boundaries, and feel locks
    locks       who waits for whom: all but one held still, and a circle broken
    provider    the sandbox's own mind without its sockets, and everything that can go wrong on the way to it
    outages     all of its calls fail for a while, and nobody may be blamed for it
    clients     the merchants: what they want, until they are told
    actors      the processes: API, receiver, workers; they can be killed, stopped, replaced
    beginning   who is there, what is wanted, and where its payments are when trouble finds them
    schedule    one schedule: what it is made of, who is next, what goes wrong
    healing     what a healthy day does, until nothing is to be expected any more
    invariants    what must hold afterwards
    shrinking   a failing schedule with less in it
    running     schedules side by side
    __main__    many of them: python -m tests.simulation --schedules 300 --seed 1 --json
"""
