"""Unlikely requests by every kind of caller: `python -m tests.fuzz --cases N --seed S [--json]`.

One API process, three merchants (one of them suspended) with payments, refunds, disputes and customers, and keys of
every scope, expired, revoked, of another network, unknown, and of operators of every role. A case is a request that the
OpenAPI document allows or just forbids, with ids that are the caller's, another merchant's, or unknown, and one of the
keys. No answer may be a 5xx, show an id or an e-mail address of another merchant, succeed without the right, or differ
from the description.

    world      merchants, their objects, and the callers
    cases      requests drawn from the OpenAPI document
    verdicts   faults of an answer
    run        cases, and the result
"""
