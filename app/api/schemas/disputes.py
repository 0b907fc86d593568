"""Disputes: the evidence against one, the dispute, its list."""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

from app.api.schemas.fields import DisputeId, Limit, LongText, PaymentId, Provider, Text


class NewEvidence(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Evidence against a dispute, as texts; up to 150,000 characters with what was given before."""

    access_activity_log: LongText | None = None
    billing_address: Text | None = None
    cancellation_policy_disclosure: LongText | None = None
    cancellation_rebuttal: LongText | None = None
    customer_email_address: Text | None = None
    customer_name: Text | None = None
    customer_purchase_ip: Text | None = None
    duplicate_charge_explanation: LongText | None = None
    duplicate_charge_id: Text | None = None
    product_description: LongText | None = None
    refund_policy_disclosure: LongText | None = None
    refund_refusal_explanation: LongText | None = None
    service_date: Text | None = None
    shipping_address: Text | None = None
    shipping_carrier: Text | None = None
    shipping_date: Text | None = None
    shipping_tracking_number: Text | None = None
    uncategorized_text: LongText | None = None


class SubmittedEvidence(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Evidence, kept for later or submitted to the network, which can be done once."""

    evidence: NewEvidence
    submit: bool = False


class EvidenceFailure(Struct):
    """The reason why evidence was not taken. It is open again until the deadline: correct and submit it."""

    code: str
    message: str | None = None


class EvidenceGiven(Struct):
    """The deadline, the fields given so far, the time of the request to submit, and why the last ones were refused.

    `texts` holds the evidence itself where one dispute is read; elsewhere it is null.
    """

    due_at: str | None
    given: list[str]
    texts: dict[str, str] | None
    submit_asked_at: str | None
    failure: EvidenceFailure | None


class Dispute(Struct):
    """A dispute, by which the network claims money back, or an inquiry before one. `status` is the provider's."""

    id: str
    object: Literal["dispute"]
    status: str
    version: int
    payment: str
    amount: int
    amount_withdrawn: int
    currency: str
    reason: str | None
    evidence: EvidenceGiven
    provider: Provider
    created_at: str
    updated_at: str


class DisputeList(Struct):
    """Newest first. The next page starts after the last id: `starting_after`."""

    object: Literal["list"]
    data: list[Dispute]
    has_more: bool


class DisputesQuery(Struct, frozen=True, forbid_unknown_fields=True):
    """Which disputes to list."""

    payment: PaymentId | None = None
    limit: Limit = 20
    starting_after: DisputeId | None = None
