"""Field types: the rules that a value obeys, as types with msgspec's Meta.

The fast decoder, the list of all broken rules (app/web/validation.py) and the OpenAPI document read the same types.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated

from msgspec import Meta, Struct


def whole(pattern: str) -> str:
    """A pattern for the whole text: `$` alone would match before a trailing line break."""
    return rf"^{pattern}$(?!\n)"


# Neither control characters and such that are not seen, nor the signs of lists and of names beside an address.
_EMAIL_SIGN = (
    r"[^@\s.\x00-\x1f\x7f-\x9f\u00ad\u061c\u180e\u200b-\u200f\u202a-\u202e\u2060-\u206f\ufeff"
    r'<>()\[\]\\,;:"-]'
)
_EMAIL_LABEL = rf"{_EMAIL_SIGN}+(-+{_EMAIL_SIGN}+)*"
EMAIL = whole(rf"(\.|-|{_EMAIL_SIGN})+@{_EMAIL_LABEL}(\.{_EMAIL_LABEL})+")

MinorUnits = Annotated[
    int,
    Meta(
        ge=1,
        le=999_999_999_999,
        description="In minor units of the currency (cents). Each currency has a smallest and a largest amount.",
        examples=[4999],
    ),
]
Currency = Annotated[
    str,
    Meta(
        pattern=whole("[A-Za-z]{3}"),
        description="ISO 4217. Requests may use upper or lower case; answers use lower case.",
        examples=["usd"],
        extra={"form": "must be a currency's three letters"},
    ),
]
Token = Annotated[
    str,
    Meta(
        pattern=whole("pm_[A-Za-z0-9_]{1,250}"),
        extra={"form": "must be the provider's token for a card, pm_…; card numbers must not be sent here"},
        description="The provider's token for the card. Card numbers must not be sent here.",
        examples=["pm_card_visa"],
    ),
]
Reference = Annotated[
    str,
    Meta(
        min_length=1,
        max_length=255,
        description="Your own name for the payment, unique among yours that have neither failed nor been canceled.",
        examples=["order-1042"],
    ),
]
Suffix = Annotated[
    str,
    Meta(
        min_length=1,
        max_length=22,
        pattern=whole(r"(?=.*[A-Za-z])[ !#-&()+-;=?-\[\]-~]*"),
        extra={"form": "must be printable ASCII with at least one letter and none of < > \\ ' \" *"},
        description="Added to the text on the payer's statement: printable ASCII with at least one letter and none "
        "of < > \\ ' \" *.",
        examples=["ACME"],
    ),
]
ReturnUrl = Annotated[
    str,
    Meta(
        max_length=2048,
        # Schemes that a browser runs or reads locally are not the links of an app.
        pattern=whole(
            r"([Hh][Tt][Tt][Pp][Ss]?://[^\s/?#@]+([/?#]\S*)?"
            r"|(?!(https?|javascript|vbscript|data|file|ftp|blob|about|filesystem|view-source):)[a-z][a-z0-9+.\-]*://\S+)"
        ),
        extra={"form": "must be an absolute address, https://… or http://…, or an app's link in lower case, myapp://…"},
        description="Where the payer returns to after an action at the card's bank (3-D Secure): an absolute http(s) "
        "address, or an app's link. Required, unless `off_session` is true or `authentication` is `script`.",
        examples=["https://shop.example/return", "myapp://paid"],
    ),
]
OffSession = Annotated[
    bool,
    Meta(
        description="Whether the payer is absent and can't act. If the bank asks for an action, the payment fails with "
        "the code `authentication_required`."
    ),
]
MetadataKey = Annotated[
    str, Meta(min_length=1, max_length=40, pattern=whole(r"[^\[\]]*"), extra={"form": "must not hold [ or ]"})
]
MetadataValue = Annotated[str, Meta(max_length=500)]
Metadata = Annotated[
    dict[MetadataKey, MetadataValue],
    Meta(max_length=50, description="Up to 50 texts of your own, stored and returned.", examples=[{"cart": "9"}]),
]
MetadataUpdate = Annotated[
    dict[MetadataKey, MetadataValue | None],
    Meta(
        max_length=50,
        description="Texts to set, and keys to remove, which have null. The payment may have 50 in all.",
        examples=[{"cart": "9", "gift": None}],
    ),
]
SoughtMetadata = Annotated[
    dict[MetadataKey, MetadataValue],
    Meta(
        max_length=5, description="`metadata[cart]=9`: payments with this text; up to five.", examples=[{"cart": "9"}]
    ),
]
SoughtMetadataTexts = Annotated[
    list[
        Annotated[
            str,
            Meta(
                max_length=541,
                pattern=whole(r"[^\[\]=]{1,40}=[\s\S]*"),
                extra={"form": "must be KEY=TEXT, the key without [ ] and ="},
            ),
        ]
    ],
    Meta(
        max_length=5,
        description="The same as `metadata`, for clients that can't write its names: `metadata_is=cart=9`, up to five "
        "times. A key that holds `=` can be sought by `metadata` alone.",
        examples=[["cart=9"]],
    ),
]
SoughtEmail = Annotated[
    str,
    Meta(
        min_length=3, max_length=254, description="The payer's, in upper or lower case.", examples=["ada@shop.example"]
    ),
]
Email = Annotated[
    str,
    Meta(
        max_length=254,
        pattern=EMAIL,
        extra={"form": "must be an e-mail address"},
        description="Given to the provider as the address for its receipt. In live mode Stripe sends a receipt there.",
        examples=["ada@shop.example"],
    ),
]
Name = Annotated[
    str,
    Meta(
        min_length=1,
        max_length=200,
        description="Given to the provider as `customer_name` in the metadata of its object.",
        examples=["Ada Lovelace"],
    ),
]
CustomerEmail = Annotated[
    str,
    Meta(
        max_length=254,
        pattern=EMAIL,
        extra={"form": "must be an e-mail address"},
        description="Given to the provider with the customer.",
        examples=["ada@shop.example"],
    ),
]
CustomerName = Annotated[str, Meta(min_length=1, max_length=200, examples=["Ada Lovelace"])]
Phone = Annotated[str, Meta(min_length=1, max_length=20, examples=["+1 555 0100"])]
AddressLine = Annotated[str, Meta(min_length=1, max_length=200)]
Country = Annotated[
    str,
    Meta(
        pattern=whole("[A-Z]{2}"),
        extra={"form": "must be a country's two capital letters"},
        description="ISO 3166-1, two capital letters.",
        examples=["US"],
    ),
]
IpAddress = Annotated[
    str,
    Meta(
        max_length=45,
        pattern=whole(r"([0-9]{1,3}(\.[0-9]{1,3}){3}|(?=.*:)[0-9A-Fa-f:.]{2,45})"),
        extra={"form": "must be an IPv4 or IPv6 address"},
        description="An IPv4 or IPv6 address.",
        examples=["203.0.113.7"],
    ),
]
Description = Annotated[str, Meta(min_length=1, max_length=1000)]
Text = Annotated[str, Meta(min_length=1, max_length=5000)]
LongText = Annotated[str, Meta(min_length=1, max_length=20000)]


class Provider(Struct):
    """The provider that carries the payment, and the payment's id there."""

    name: str
    id: str


Limit = Annotated[int, Meta(ge=1, le=100, description="How many at most.")]
Instant = Annotated[datetime, Meta(tz=True, description="RFC 3339 with an offset.", examples=["2026-11-22T14:03:07Z"])]
PaymentId = Annotated[str, Meta(pattern=whole("pay_[0-9a-f]{24}"), extra={"form": "must be a payment's id"})]
RefundId = Annotated[str, Meta(pattern=whole("ref_[0-9a-f]{24}"), extra={"form": "must be a refund's id"})]
DisputeId = Annotated[str, Meta(pattern=whole("dp_[0-9a-f]{24}"), extra={"form": "must be a dispute's id"})]
CustomerId = Annotated[
    str,
    Meta(
        pattern=whole("cus_[0-9a-f]{24}"),
        extra={"form": "must be a customer's id"},
        description="A customer of yours.",
        examples=["cus_019a2b3c4d5e6f708192a3b4"],
    ),
]
SavedMethodId = Annotated[
    str,
    Meta(
        pattern=whole("spm_[0-9a-f]{24}"),
        extra={"form": "must be the id of a saved payment method"},
        description="A payment method that a customer of yours has saved.",
        examples=["spm_019a2b3c4d5e6f708192a3b4"],
    ),
]
PostingId = Annotated[
    str, Meta(pattern=whole("pst_[0-9a-f]{24}"), extra={"form": "must be a balance transaction's id"})
]
