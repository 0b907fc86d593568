"""A worker's part in the circuit breakers (db/sql/provider/circuit_breaker.sql): it reports its calls, and probes.

Failed calls are reported before their results are recorded, so that the database can decide whether the provider or the
event failed. If no worker has had a response since the failed call began, a probe is sent. A failure counts against its
event only if the account answers.

A call that was refused (401, 403) has its account probed in the same way. A refused probe opens the circuit: our key or
the account is the reason. If a probe of the platform's own account is refused as well, it is the key.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping
from datetime import datetime, timedelta
from typing import Literal

from msgspec import Struct
from psycopg.types.json import Jsonb

from jobs.database import WorkerDatabase
from jobs.stripe.client import StripeGateway
from jobs.stripe.errors import AccessRefused, PermissionMissing, ProviderBusy, ProviderError, ProviderOutage

log = logging.getLogger("surety.circuit_breaker")

PROVIDER = "stripe"
# Calls that fail at about the same time share a check.
FAILURES_GATHER_SECONDS = 0.1
PLATFORM_ACCOUNT = ""

CircuitCause = Literal["outage", "account_refused", "key_refused"]
"""Why a circuit is open; surety.circuit_breakers explains each."""


def circuit_key(account: str) -> str:
    """The key of an account's circuit, composed as in surety.circuit_key."""
    return f"{PROVIDER}:{account}"


class CallCounts(Struct):
    """An account's calls since the last report. Times are on the monotonic clock."""

    answered: int = 0
    failed: int = 0
    consecutive_failures: int = 0
    answered_at: float | None = None

    def followed_by(self, later: CallCounts) -> CallCounts:
        """The counts of both; `later` counts calls that ended after these."""
        since_answer = later.consecutive_failures + (0 if later.answered_at else self.consecutive_failures)
        return CallCounts(
            self.answered + later.answered,
            self.failed + later.failed,
            since_answer,
            later.answered_at or self.answered_at,
        )


class AccountState(Struct):
    """A row of surety.count_call_results."""

    account: str
    is_open: bool
    is_refused: bool
    answered_seconds: float | None


class CircuitBreaker:
    """This worker's view of the provider's accounts: `blocked` are those whose circuit is open, `refused` those of them
    that refuse our access.
    """

    def __init__(self, database: WorkerDatabase, stripe: StripeGateway, actor: str, report_seconds: float) -> None:
        self.blocked: frozenset[str] = frozenset()
        self.refused: frozenset[str] = frozenset()
        self._database = database
        self._stripe = stripe
        self._actor = actor
        self._report_seconds = report_seconds
        self._tallies: defaultdict[str, CallCounts] = defaultdict(CallCounts)
        self._probing: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._probed: dict[str, tuple[float, ProviderError | None]] = {}
        """By account: the end of its last probe on the monotonic clock, and its error."""
        self._failed: list[tuple[str, float]] = []
        self._check: asyncio.Task[None] | None = None
        """The check that takes all failed calls of the moment."""
        self._reported_at = 0.0
        self._is_reported = False
        stripe.on_call = self.count_call

    def count_call(self, account: str, error: ProviderError | None, is_command: bool) -> None:
        """Count a call that has ended. A refused one is no failure of the provider, and no answer of the account."""
        tally = self._tallies[account]
        if isinstance(error, AccessRefused):
            return
        if not isinstance(error, ProviderOutage):
            tally.answered += is_command
            tally.consecutive_failures = 0
            tally.answered_at = time.monotonic()
        else:
            tally.failed += 1
            tally.consecutive_failures += 1

    async def report_and_probe(self) -> bool:
        """Report calls and send the probes that are due, every second; whether the database took a report lately.

        Reports of check_accounts count, because none is due for a while after them.
        """
        is_time = time.monotonic() - self._reported_at > self._report_seconds
        if is_time or any(tally.failed for tally in self._tallies.values()):
            await self._report_calls()
        if self.blocked:
            due: list[str] = await self._database.value("select surety.claim_circuit_probes(%s)", PROVIDER)
            await asyncio.gather(*(self._probe(account) for account in due))
        is_reported, self._is_reported = self._is_reported, False
        return is_reported

    async def check_accounts(self, failed: Iterable[tuple[str, float]]) -> None:
        """Probe accounts of failed calls, given as (account, call's begin, monotonic), unless they answered since.

        Calls that fail at about the same time are counted together: one probe decides about all of them.
        """
        calls = list(failed)
        if not calls:
            return
        self._failed += calls
        if self._check is None:
            self._check = asyncio.create_task(self._check_failed())
        await asyncio.shield(self._check)

    async def _check_failed(self) -> None:
        await asyncio.sleep(FAILURES_GATHER_SECONDS)
        failed, self._failed, self._check = self._failed, [], None
        began: dict[str, float] = {}
        for account, at in failed:
            began[account] = max(at, began.get(account, at))
        answered = await self._report_calls()
        unsure = [account for account, at in began.items() if answered.get(account, 0.0) < at]
        await asyncio.gather(
            *(self._probe(account, may_close=False) for account in unsure if account not in self.blocked)
        )

    async def probe_platform_if_open(self) -> None:
        """Probe the platform's own account if its circuit is open: a worker may have started with another key."""
        await self._report_calls()
        if PLATFORM_ACCOUNT in self.blocked:
            await self._probe(PLATFORM_ACCOUNT)

    async def _report_calls(self) -> dict[str, float]:
        """Report calls. Returns by account the time of the last answer to any worker, on the monotonic clock.

        Calls that the database did not take are reported again.
        """
        tallies, self._tallies = self._tallies, defaultdict(CallCounts)
        try:
            return await self._report(tallies)
        except BaseException:
            for account, tally in tallies.items():
                self._tallies[account] = tally.followed_by(self._tallies[account])
            raise

    async def _report(self, tallies: Mapping[str, CallCounts]) -> dict[str, float]:
        clock: datetime | None = None
        if any(tally.answered_at is not None for tally in tallies.values()):
            clock = await self._database.value("select surety.read_clock()")
        # The database's clock is read before ours, so an answer may seem older than it is, never younger. A failure
        # before an answer may be the event's own. Times are sent, not ages, because the statement may wait.
        reported_at = self._reported_at = time.monotonic()
        calls = [
            {
                "account": account,
                "answered": tally.answered,
                "failed": tally.failed,
                "in_flight": self._stripe.commands_in_flight[account],
                "consecutive_failures": tally.consecutive_failures,
                "answered_at": clock
                and tally.answered_at
                and (clock - timedelta(seconds=reported_at - tally.answered_at)).isoformat(),
            }
            for account, tally in tallies.items()
        ]
        query = "select account, is_open, is_refused, answered_seconds from surety.count_call_results(%s, %s, %s)"
        states = await self._database.rows(AccountState, query, PROVIDER, Jsonb(calls), self._actor)
        self._is_reported = True
        self.blocked = frozenset(row.account for row in states if row.is_open)
        self.refused = frozenset(row.account for row in states if row.is_refused)
        return {row.account: reported_at - row.answered_seconds for row in states if row.answered_seconds is not None}

    async def probe_accounts(self, accounts: Iterable[str]) -> None:
        """Probe accounts at once, also those whose circuit is open."""
        await asyncio.gather(*(self._probe(account) for account in accounts))

    async def _probe(self, account: str, *, may_close: bool = True) -> ProviderError | None:
        """Probe an account, and return the error. No answer and a refusal open its circuit, if it is not open already.

        An answer closes a circuit that was open before the probe. A circuit that opened during the probe, by calls that
        failed beside it, stays open until the next one; so it does if the probe was wanted while it was not open.
        """
        wanted_at = time.monotonic()
        async with self._probing[account]:
            if self._probed.get(account, (0.0, None))[0] > wanted_at:
                return self._probed[account][1]
            was_open = may_close and account in self.blocked
            error: ProviderError | None = None
            try:
                await self._stripe.probe(account)
            except ProviderError as failure:
                error = failure
            if isinstance(error, ProviderOutage):
                await self._open(account, "outage", f"no answer: {error}")
            elif is_refusal_of_access(error):
                await self._open_refused(account, error)
            # An account that is busy is there, but may still refuse us.
            elif was_open and not (account in self.refused and isinstance(error, ProviderBusy)):
                await self._close(account, f"it answers: {error}" if error else "it answers")
            self._probed[account] = time.monotonic(), error
            return error

    async def _open_refused(self, account: str, error: ProviderError | None) -> None:
        """Open the circuit of an account whose probe was refused; all circuits if the platform's account is as well."""
        if account == PLATFORM_ACCOUNT:
            await self._open(account, "key_refused", str(error))
        elif account in self.refused:
            return
        elif is_refusal_of_access(await self._probe(PLATFORM_ACCOUNT)):
            # The key was refused between the two probes, or the account is new.
            await self._open(account, "key_refused", str(error))
        else:
            await self._open(account, "account_refused", str(error))

    async def _open(self, account: str, cause: CircuitCause, reason: str) -> None:
        query = "select surety.open_circuit(%s, %s, %s, %s, %s)"
        if await self._database.value(query, PROVIDER, account, cause, reason, self._actor):
            log.warning("circuit of account %r at %s opened (%s): %s", account, PROVIDER, cause, reason)
        self.blocked |= {account}
        if cause != "outage":
            await self._report_calls()

    async def _close(self, account: str, reason: str) -> None:
        query = "select surety.close_circuit(%s, %s, %s, %s)"
        if await self._database.value(query, PROVIDER, account, reason, self._actor):
            log.warning("circuit of account %r at %s closed: %s", account, PROVIDER, reason)
        self.blocked -= {account}
        if account in self.refused:
            # The key is accepted again: the circuits of all accounts have closed.
            await self._report_calls()


def is_refusal_of_access(error: ProviderError | None) -> bool:
    """Whether a probe's error is a refusal of our key or of the account.

    A key that lacks a permission that the provider names is valid for the account.
    """
    return isinstance(error, AccessRefused) and not (isinstance(error, PermissionMissing) and error.permissions)
