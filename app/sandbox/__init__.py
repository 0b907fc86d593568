"""A stateful sandbox of Stripe over real sockets, for tests, benchmarks and the demo.

It imports no other package of Surety.

server             the process, and the routing of requests
connections        HTTP connections, and the ways to break them
state              the state that all operations share
memory             objects, keys and scheduled actions
commit_log         the file of the last commits
tables             the tables in SQLite, which take many commits at once
scheduled_actions  later changes without a request
faults             which request or webhook gets which fault, derived from a seed
control            the control API, `/sandbox/…`
settings           delays, accounts, webhooks
stripe             Stripe's API
"""

from app.sandbox.faults import DEMO_FAULTS, NO_FAULTS, FaultProfile
from app.sandbox.server import serve_sandbox
from app.sandbox.settings import API_VERSION, PLATFORM_ACCOUNT, SandboxSettings

__all__ = [
    "API_VERSION",
    "DEMO_FAULTS",
    "NO_FAULTS",
    "PLATFORM_ACCOUNT",
    "FaultProfile",
    "SandboxSettings",
    "serve_sandbox",
]
