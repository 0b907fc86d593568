"""Stripe's API as the sandbox serves it.

requests         authentication, idempotency keys, execution
operations       the table of all operations
parameters       form encoding, one struct for each operation
queries          single objects, lists, expand
events           events, and the schedule of their webhooks
webhooks         signed deliveries
variants         answers and events that lack fields, thin events, events of the other mode
request_faults   the effect of each fault on a request
payer_page       the 3-D Secure page
control          summaries, and actions of others, for the control API
errors           Stripe's errors
objects          the life of each kind of object
"""
