"""The sandbox's own record: its charges, refunds, disputes, faults and webhooks, independent of our database."""

from __future__ import annotations

from typing import Any

import httpx
import msgspec

Json = dict[str, Any]
TIMEOUT_SECONDS = 30
CHARGES_SUMMARY = "charges/summary?metadata_key=surety_payment"
REFUNDS_SUMMARY = "refunds/summary?metadata_key=surety_refund"


class SandboxRecord(msgspec.Struct, kw_only=True, frozen=True):
    """The answers of the sandbox's control API at one time. Amounts are minor units."""

    charges: list[Json]
    """Charges that took money."""
    charges_summary: Json
    """`charges`, `payments`, and in `double` the payments that were charged more than once."""
    refunds: list[Json]
    refunds_summary: Json
    """`refunds` that stand, and in `double` the refunds that were made more than once."""
    disputes: list[Json]
    faults: Json
    webhooks: dict[str, int]


def read_sandbox(url: str, what: str) -> Any:
    """One answer of the control API, such as `refunds`. Raises httpx.HTTPError."""
    return httpx.get(f"{url}/sandbox/{what}", timeout=TIMEOUT_SECONDS).raise_for_status().json()


def read_record(url: str) -> SandboxRecord:
    """The whole record. Raises httpx.HTTPError."""
    return SandboxRecord(
        charges=read_sandbox(url, "charges"),
        charges_summary=read_sandbox(url, CHARGES_SUMMARY),
        refunds=read_sandbox(url, "refunds"),
        refunds_summary=read_sandbox(url, REFUNDS_SUMMARY),
        disputes=read_sandbox(url, "disputes"),
        faults=read_sandbox(url, "faults"),
        webhooks=read_sandbox(url, "webhooks"),
    )
