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

    def limit_item(self, left: int, wait_seconds: float) -> str:
        """The rest as an item of RateLimit; `wait_seconds` pass until the next permit, if none is left."""
        return f'"{self.name}";r={min(left, self.burst)};t={whole_seconds(wait_seconds)}{self._partition_key}'

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


def whole_seconds(seconds: float) -> int:
    """Seconds rounded up, at least one."""
    return max(1, math.ceil(seconds))


def rate_limit_fields(policies: str, limits: str) -> Headers:
    """Both fields; none without a policy."""
    if not policies:
        return ()
    return (b"ratelimit-policy", policies.encode()), (b"ratelimit", limits.encode())


class RateLimited(Problem):
    """A request beyond a limit. `fields` are those of rate_limit_fields."""

    def __init__(self, policy: Policy, wait_seconds: float, fields: Headers) -> None:
        seconds = whole_seconds(wait_seconds)
        detail = f"{policy.meaning}; repeat after {seconds} s"
        headers = [*fields, (b"retry-after", b"%d" % seconds)]
        super().__init__("rate-limited", detail, headers=headers, given={"limit": policy.name, "retry_after": seconds})
