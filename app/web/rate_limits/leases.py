"""Permits of requests, leased from the database for a key and its merchant (api.lease_permits).

One statement at a time leases for all keys of this process that need permits. Requests that come meanwhile share the
next one. All processes together never lease more than rate * time + burst, so they never admit more.

    a permit is left                  the request goes on at once; more are leased ahead while half are left
    none is left                      it waits for the next answer, with all other requests that wait
    the limit is reached              RateLimited, from memory until the next permit can be free
    an unknown key                    no permit: the route refuses it, and nothing about it is kept
    the database can't answer         Unavailable, as the request itself would meet it

Permits act for LEASE_SECONDS at most. Unused ones are lost then, or when the process dies: at most those of
AHEAD_SECONDS of the rate. Nothing else about a key is kept, so a new limit acts after LEASE_SECONDS.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from contextlib import suppress

import msgspec

from app.web.asgi import Headers
from app.web.batching import BatchingConnections, Connect, Row, Unavailable
from app.web.rate_limits.fields import FieldsTemplate, LimitState, Policy, RateLimited
from app.web.refusals import RefusalCounter

log = logging.getLogger("surety.rate_limits")

LEASE_PERMITS = b"""
select
    n, key_id, merchant_id, granted, key_rate, key_burst, key_left, key_wait, merchant_rate, merchant_burst,
    merchant_left, merchant_wait
from api.lease_permits(%s)
"""
LEASE_SECONDS = 1.0
# How much of a key's demand is leased ahead. api.lease_permits leases as much of the rate while there is plenty.
AHEAD_SECONDS = 0.1
# A key at its limit asks this seldom, and gets the permits of the pause together.
PAUSE_SECONDS_MAX = 0.01
KEPT_KEYS_MAX = 10_000
WITHOUT_LIMIT = 1 << 60


class PermitRequest(msgspec.Struct):
    """A key that needs permits: those that requests wait for, besides `held`, which are unused."""

    n: int
    request_id: str
    key_hash: str
    wanted: int
    held: int


class KeyLease:
    """The permits of one key."""

    __slots__ = (
        "answered", "asked_at", "ends_at", "held_min", "is_known", "key_hash", "merchant_id", "permits", "refused_by",
        "refused_until", "request", "template", "used", "waiting",
    )  # fmt: skip

    def __init__(self, key_hash: bytes) -> None:
        self.key_hash = key_hash
        self.is_known = False
        self.merchant_id = ""
        self.permits = 0
        self.ends_at = float("-inf")
        self.held_min = 0
        """With fewer permits, more are leased ahead."""
        self.used = 0
        """Permits used since the last answer."""
        self.asked_at = float("-inf")
        self.waiting = 0
        self.request: PermitRequest | None = None
        self.answered: asyncio.Future[None] | None = None
        self.template = FieldsTemplate()
        self.refused_until = float("-inf")
        self.refused_by: LimitState | None = None

    def fields(self) -> Headers:
        """RateLimit-Policy and RateLimit of a response."""
        return self.template.render(self.permits)


class PermitLeases:
    """The leases of a process. A lease is dropped when its key is unknown, or when there are too many."""

    def __init__(self, connect: Connect, refusals: RefusalCounter) -> None:
        self._batching = BatchingConnections(
            connect, LEASE_PERMITS, connections=1, batch_max=500, queue_max=KEPT_KEYS_MAX, sustained_max=KEPT_KEYS_MAX
        )
        self._refusals = refusals
        self._leases: dict[bytes, KeyLease] = {}

    async def open(self) -> None:
        """Connect."""
        self._loop = asyncio.get_running_loop()
        await self._batching.open()

    async def close(self) -> None:
        """Answer the waiting requests, and disconnect."""
        await self._batching.close()

    def take(self, key_hash: bytes, request_id: str) -> KeyLease | None:
        """Take a permit, if one is leased; None if the database must be asked. Raises RateLimited."""
        lease = self._leases.get(key_hash)
        if lease is None:
            return None
        now = self._loop.time()
        if now >= lease.ends_at:
            lease.permits = 0
        if lease.permits > 0:
            lease.permits -= 1
            lease.used += 1
            if lease.permits < lease.held_min and lease.request is None and now >= lease.refused_until:
                with suppress(Unavailable):
                    self._ask(lease, request_id, now)
            return lease
        if now < lease.refused_until:
            raise self._refusal(lease, now)
        return None

    async def wait(self, key_hash: bytes, request_id: str) -> KeyLease | None:
        """Take a permit; None for an unknown key. Raises RateLimited or Unavailable."""
        lease: KeyLease | None
        while (lease := self.take(key_hash, request_id)) is None:
            lease = self._leases.get(key_hash) or self._new_lease(key_hash)
            lease.waiting += 1
            try:
                if lease.request is None:
                    self._ask(lease, request_id, self._loop.time())
                elif lease.request.n < 0:
                    lease.request.wanted += 1
                assert lease.answered is not None
                await asyncio.shield(lease.answered)
            finally:
                lease.waiting -= 1
            if not lease.is_known:
                return None
        return lease

    def _new_lease(self, key_hash: bytes) -> KeyLease:
        if len(self._leases) >= KEPT_KEYS_MAX:
            # One batch never asks twice for a key.
            oldest = next((known for known, lease in self._leases.items() if lease.request is None), None)
            self._leases.pop(oldest or b"", None)
        lease = self._leases[key_hash] = KeyLease(key_hash)
        return lease

    def _ask(self, lease: KeyLease, request_id: str, now: float) -> None:
        """Queue a request for as many permits as requests wait for, and those of AHEAD_SECONDS of the demand."""
        elapsed = max(AHEAD_SECONDS, min(LEASE_SECONDS, now - lease.asked_at))
        ahead = int(lease.used * AHEAD_SECONDS / elapsed)
        wanted = max(lease.waiting, 1 if not lease.permits else 0) + max(0, ahead - lease.permits)
        # n stays negative until the request is sent: until then, waiting requests are added to it.
        lease.request = request = PermitRequest(-1, request_id, lease.key_hash.hex(), wanted, lease.permits)
        lease.answered = self._loop.create_future()
        lease.used = 0
        lease.asked_at = now
        try:
            answer = self._batching.submit(request)
        except Unavailable:
            lease.request = None
            if not lease.is_known:
                self._leases.pop(lease.key_hash, None)
            raise
        answer.add_done_callback(lambda answer: self._receive(lease, answer))

    def _receive(self, lease: KeyLease, answer: asyncio.Future[Row]) -> None:
        """Note the answer, and let the requests go on that wait for it."""
        answered = lease.answered
        assert answered is not None
        lease.request = None
        if answer.cancelled() or (error := answer.exception()) is not None:
            failure = Unavailable() if answer.cancelled() else error
            assert failure is not None
            if not lease.is_known:
                self._leases.pop(lease.key_hash, None)
            answered.set_exception(failure)
            answered.exception()  # it is no mistake if no request waits for it
            return
        self._note_answer(lease, answer.result())
        answered.set_result(None)

    def _note_answer(self, lease: KeyLease, row: Row) -> None:
        (
            _, key_id, merchant_id, granted, key_rate, key_burst, key_left, key_wait, merchant_rate, merchant_burst,
            merchant_left, merchant_wait,
        ) = row  # fmt: skip
        lease.is_known = key_id is not None
        if not lease.is_known:
            self._leases.pop(lease.key_hash, None)
            return
        now = self._loop.time()
        lease.merchant_id = merchant_id or ""
        limits = []
        if key_rate is not None:
            limits.append(LimitState(Policy("key", key_rate, key_burst, lease.key_hash), key_left, key_wait))
        if merchant_rate is not None:
            partition = hashlib.sha256(merchant_id.encode()).digest()
            policy = Policy("merchant", merchant_rate, merchant_burst, partition)
            limits.append(LimitState(policy, merchant_left, merchant_wait))
        lease.template = FieldsTemplate(limits)
        lease.ends_at = now + LEASE_SECONDS
        if not limits:
            lease.permits, lease.held_min = WITHOUT_LIMIT, 0
            return
        lease.permits += granted
        lease.held_min = lease.permits // 2
        empty = [state for state in limits if state.left <= 0]
        if empty:
            lease.refused_by = state = max(empty, key=lambda state: state.wait_seconds)
            pause = min(PAUSE_SECONDS_MAX, state.policy.burst / state.policy.requests_per_second / 2)
            lease.refused_until = now + max(state.wait_seconds, pause)

    def _refusal(self, lease: KeyLease, now: float) -> RateLimited:
        """The refusal of a request, counted."""
        assert lease.refused_by is not None
        policy = lease.refused_by.policy
        self._refusals.add(f"{policy.name} {lease.merchant_id}" if lease.merchant_id else policy.name)
        return RateLimited(policy, lease.refused_until - now, lease.fields())
