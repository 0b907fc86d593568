"""Failed authentications, by client address. Each process counts for itself, in bounded memory.

A valid key is never refused because of its address: several clients may share one.
"""

from __future__ import annotations

import ipaddress
import time

from app.web.rate_limits.fields import FieldsTemplate, LimitState, Policy, RateLimited
from app.web.refusals import RefusalCounter

BURST_SECONDS = 5
KEPT_ADDRESSES_MAX = 10_000
IPV6_PREFIX = 64


class FailedAuthentications:
    """Limits the failed authentications of each address to `per_second`, and five times as many at once; 0: no limit.

    The addresses whose last failure is the oldest are forgotten.
    """

    def __init__(self, per_second: float, refusals: RefusalCounter) -> None:
        self._policy = Policy("address", per_second, max(1, round(BURST_SECONDS * per_second)))
        self._refusals = refusals
        # When the burst of each address is whole again.
        self._whole_at: dict[str, float] = {}

    def note(self, address: str) -> None:
        """Note a failed authentication."""
        rate, burst = self._policy.requests_per_second, self._policy.burst
        if not rate:
            return
        now, client = time.monotonic(), client_network(address)
        whole_at = max(now, self._whole_at.pop(client, now)) + 1 / rate
        if len(self._whole_at) >= KEPT_ADDRESSES_MAX:
            del self._whole_at[next(iter(self._whole_at))]
        self._whole_at[client] = min(whole_at, now + burst / rate)

    def require_room(self, address: str) -> None:
        """Raises RateLimited, counted, if the address has failed too often."""
        rate, burst = self._policy.requests_per_second, self._policy.burst
        whole_at = self._whole_at.get(client_network(address)) if rate else None
        if whole_at is None:
            return
        wait_seconds = whole_at - time.monotonic() - (burst - 1) / rate
        if wait_seconds > 0:
            self._refusals.add("address")
            template = FieldsTemplate([LimitState(self._policy, 0, wait_seconds)])
            raise RateLimited(self._policy, wait_seconds, template.render(0))


def client_network(address: str) -> str:
    """An IPv4 address, or the first 64 bits of an IPv6 address, which belong to one client."""
    if ":" not in address:
        return address
    try:
        return str(ipaddress.ip_network(f"{address.partition('%')[0]}/{IPV6_PREFIX}", strict=False))
    except ValueError:
        return address
