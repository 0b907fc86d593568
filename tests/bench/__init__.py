"""What Surety is fast at, measured: `python -m tests.bench accept | drain | lifecycle | trace [--json]`.

Every figure that matters is a ratio of two things measured in one run, in rounds that take turns, and reported as the
median of the rounds: machines differ and have neighbours. Progress goes to stderr; with --json the last line of stdout
is one object.

    ground      a server, databases of our own, the load's arithmetic
    history     payments by the hundred thousand: one is made by the product, the others are copies of it
    bench.sql   the copying, and the handler that `drain` measures
    drainers    the processes that drain, Surety's and Procrastinate's
    load        HTTP requests, by wrk (accept.lua) or by ourselves; servers: the API that gets them
    provider    a wire to the sandbox that notes when it hears of a payment
"""
