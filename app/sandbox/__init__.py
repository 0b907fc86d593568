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

from app.sandbox.faults import DEMO, NONE, Profile
from app.sandbox.server import serve
from app.sandbox.settings import API_VERSION, PLATFORM, Settings

__all__ = ["API_VERSION", "DEMO", "NONE", "PLATFORM", "Profile", "Settings", "serve"]
