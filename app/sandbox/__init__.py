"""A stateful Stripe look-alike over real sockets, for tests, benchmarks and the demo. It imports none of the rest.

server       a request's way: key, fault, operation, answer     operations   the table of all operations
parameters   form encoding, one struct per operation            errors       Stripe's refusals
intents      a payment intent's life                            payer        the 3-D Secure page
money        balance transactions, balance, payouts             reading      objects, lists, expand
world        what all share; events                             agenda       what happens by itself, in time
webhooks     signed deliveries                                  faults       how it misbehaves, from a seed
memory       one SQLite file                                    control      /sandbox/…: asked and steered
cards, currencies, settings                                     tables
"""

from app.sandbox.faults import DEMO, NONE, Profile
from app.sandbox.server import serve
from app.sandbox.settings import API_VERSION, PLATFORM, Settings

__all__ = ["API_VERSION", "DEMO", "NONE", "PLATFORM", "Profile", "Settings", "serve"]
