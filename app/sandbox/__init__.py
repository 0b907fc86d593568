"""A stateful Stripe look-alike over real sockets, for tests, benchmarks and the demo. It imports none of the rest.

server       the process, routing               wire         sockets, and breaking them
answering    a request: key, execution, answer  misbehaving  what each fault does to it
operations   the table of all operations        parameters   form encoding, one struct per operation
intents      a payment intent's life            shapes       what new objects look like
refunds      a refund's life                    disputes     a dispute's life
fraud        early warnings                     money        balance transactions, payouts
payer        the 3-D Secure page                reading      objects, lists, expand
world        what all share; events             agenda       what happens by itself, in time
webhooks     signed deliveries                  faults       how it misbehaves, from a seed
control      /sandbox/…: asked and steered      outside      what others do, on demand
memory       one SQLite file                    cards, currencies, errors, settings: tables
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
