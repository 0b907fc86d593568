"""The response fields RateLimit-Policy and RateLimit, as draft-ietf-httpapi-ratelimit-headers-11 defines them.

    RateLimit-Policy: "key";q=1000;w=2;pk=:…:, "merchant";q=2000;w=2;pk=:…:
    RateLimit: "key";r=998;t=1;pk=:…:, "merchant";r=1870;t=1;pk=:…:

The quota q of a policy is the burst, in requests, and its window w the seconds in which an empty burst is whole again.
r is the rest of the quota, t the seconds for which it must do. The partition key pk is the beginning of a SHA-256: of
the API key, or of the merchant's id.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from typing import NamedTuple

from app.web.asgi import Headers
from app.web.problems import Problem

PARTITION_BYTES = 6


class Policy(NamedTuple):
    """A limit: requests per second, and a burst. `partition` is the SHA-256 of the caller's name, or empty."""

    name: str
    requests_per_second: float
    burst: int
    partition: bytes = b""

    @property
    def item(self) -> str:
        """The policy as an item of RateLimit-Policy."""
        window = max(1, math.ceil(self.burst / self.requests_per_second))
        return f'"{self.name}";q={self.burst};w={window}{self._partition_key}'

    def limit_item(self, wait_seconds: float) -> str:
        """An item of RateLimit, with %d for the rest; `wait_seconds` pass until the next permit, if none is left."""
        return f'"{self.name}";r=%d;t={whole_seconds(wait_seconds)}{self._partition_key}'

    @property
    def meaning(self) -> str:
        """The limit in words."""
        what = "failed authentication" if self.name == "address" else "request"
        plural = "" if self.requests_per_second == 1 else "s"
        rate = f"{self.requests_per_second:g} {what}{plural} a second"
        return f"the limit of this {self.name} is {rate}, with a burst of {self.burst}"

    @property
    def _partition_key(self) -> str:
        if not self.partition:
            return ""
        return f";pk=:{base64.b64encode(self.partition[:PARTITION_BYTES]).decode()}:"


class LimitState(NamedTuple):
    """A limit as it was seen last: the permits left, and the seconds until the next."""

    policy: Policy
    left: int
    wait_seconds: float


def whole_seconds(seconds: float) -> int:
    """Seconds rounded up, at least one."""
    return max(1, math.ceil(seconds))


class FieldsTemplate:
    """Both fields of a caller, made once for many responses; none without a policy."""

    __slots__ = ("_lefts", "_limits", "_policies")

    def __init__(self, limits: Sequence[LimitState] = ()) -> None:
        self._policies = (b"ratelimit-policy", ", ".join(state.policy.item for state in limits).encode())
        self._limits = ", ".join(state.policy.limit_item(state.wait_seconds) for state in limits).encode()
        self._lefts = [(state.left, state.policy.burst) for state in limits]

    def render(self, permits: int) -> Headers:
        """The fields while so many leased permits are left, besides those in the database."""
        if not self._lefts:
            return ()
        lefts = tuple([min(burst, left + permits) for left, burst in self._lefts])
        return self._policies, (b"ratelimit", self._limits % lefts)


class RateLimited(Problem):
    """A request beyond a limit."""

    def __init__(self, policy: Policy, wait_seconds: float, fields: Headers) -> None:
        seconds = whole_seconds(wait_seconds)
        detail = f"{policy.meaning}; repeat after {seconds} s"
        headers = [*fields, (b"retry-after", b"%d" % seconds)]
        super().__init__("rate-limited", detail, headers=headers, rate_limit=policy.name, retry_after=seconds)
