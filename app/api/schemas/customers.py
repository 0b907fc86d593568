"""Customers: the bodies that create or change one; the customer and its list."""

from __future__ import annotations

from typing import Literal

from msgspec import UNSET, Struct, UnsetType

from app.api.schemas.fields import (
    AddressLine,
    Country,
    CustomerEmail,
    CustomerId,
    CustomerName,
    Description,
    Limit,
    Metadata,
    MetadataUpdate,
    Phone,
    Provider,
    SavedMethodId,
    SoughtEmail,
)


class Address(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A postal address."""

    line1: AddressLine
    line2: AddressLine | None = None
    city: AddressLine | None = None
    state: AddressLine | None = None
    postal_code: AddressLine | None = None
    country: Country | None = None


class Shipping(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Where goods are sent."""

    name: CustomerName
    address: Address
    phone: Phone | None = None


class NewCustomer(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A customer. All fields are optional."""

    email: CustomerEmail | None = None
    name: CustomerName | None = None
    phone: Phone | None = None
    description: Description | None = None
    shipping: Shipping | None = None
    metadata: Metadata = {}


class CustomerUpdate(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """The fields to change. Null removes one; fields that are left out stay."""

    email: CustomerEmail | UnsetType | None = UNSET
    name: CustomerName | UnsetType | None = UNSET
    phone: Phone | UnsetType | None = UNSET
    description: Description | UnsetType | None = UNSET
    shipping: Shipping | UnsetType | None = UNSET
    metadata: MetadataUpdate | UnsetType = UNSET


class CustomerFailure(Struct):
    """The reason why the provider did not take the last change of a customer."""

    code: str
    message: str | None = None


class Customer(Struct):
    """A customer. The provider gets it before its first payment, and later changes after that."""

    id: str
    object: Literal["customer"]
    livemode: bool
    version: int
    email: str | None
    name: str | None
    phone: str | None
    description: str | None
    shipping: Shipping | None
    metadata: dict[str, str]
    provider: Provider | None
    failure: CustomerFailure | None
    created_at: str
    updated_at: str
    erased_at: str | None


class CustomerList(Struct):
    """Newest first. The next page starts after the last id: `starting_after`."""

    object: Literal["list"]
    data: list[Customer]
    has_more: bool


class CustomersQuery(Struct, frozen=True, forbid_unknown_fields=True):
    """Which customers to list."""

    email: SoughtEmail | None = None
    limit: Limit = 20
    starting_after: CustomerId | None = None


class SavedMandate(Struct):
    """The payer's consent to payments without it, as you gave it."""

    accepted_at: str
    ip_address: str
    user_agent: str
    text: str | None = None


class SavedPaymentMethod(Struct):
    """A payment method that a payment has saved. A payment names it by `payment_method.saved`."""

    id: str
    object: Literal["payment_method"]
    customer_id: str
    type: Literal["card"]
    brand: str | None
    last4: str | None
    exp_month: int | None
    exp_year: int | None
    country: str | None
    fingerprint: str | None
    usage: Literal["off_session"]
    mandate: SavedMandate | None
    payment: str
    provider: Provider
    created_at: str
    detached_at: str | None


class SavedPaymentMethodList(Struct):
    """Newest first. The next page starts after the last id: `starting_after`."""

    object: Literal["list"]
    data: list[SavedPaymentMethod]
    has_more: bool


class PaymentMethodsQuery(Struct, frozen=True, forbid_unknown_fields=True):
    """Which saved payment methods to list."""

    limit: Limit = 20
    starting_after: SavedMethodId | None = None


class MethodRemoval(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Remove a saved payment method. The body has no fields."""
