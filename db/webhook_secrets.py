"""Signing secrets of merchants' webhooks, and the keys that encrypt them.

A secret is made in the API, shown once, and stored in a sealed box for the public key of SURETY_WEBHOOK_KEY. Only
workers have the private key, so neither the API nor a copy of the database can sign.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from base64 import b64decode, b64encode
from typing import Any, Literal

from msgspec import Struct
from nacl.exceptions import CryptoError
from nacl.public import PrivateKey, PublicKey, SealedBox
from nacl.signing import SigningKey

from db.errors import SettingsError
from db.settings import Settings

OPENED_MAX = 10_000

Scheme = Literal["v1", "v1a"]
"""HMAC-SHA256, and Ed25519, as Standard Webhooks name them."""


class SealedSecret(Struct):
    """A secret as it is stored; `sealed` is base64."""

    scheme: Scheme
    sealing_key: str
    sealed: str
    public_key: str | None = None


class NewSecrets(Struct):
    """The secrets of a new endpoint or of a rotation: the one to show, and both as they are stored."""

    shown: str
    """whsec_…, for HMAC-SHA256."""
    sealed: list[SealedSecret]


def make_secrets(sealing_key_id: str, sealing_key: bytes) -> NewSecrets:
    """A secret for HMAC-SHA256, and a key pair for Ed25519, sealed for a public key."""
    box = SealedBox(PublicKey(sealing_key))

    def seal(scheme: Scheme, secret: bytes, public_key: str | None = None) -> SealedSecret:
        return SealedSecret(scheme, sealing_key_id, b64encode(box.encrypt(secret)).decode(), public_key)

    shared, pair = secrets.token_bytes(32), SigningKey.generate()
    public_key = f"whpk_{b64encode(pair.verify_key.encode()).decode()}"
    return NewSecrets(
        f"whsec_{b64encode(shared).decode()}", [seal("v1", shared), seal("v1a", pair.encode(), public_key)]
    )


class WebhookKeys:
    """The private keys of SURETY_WEBHOOK_KEY, the first of which is the present one."""

    def __init__(self, private_keys: list[PrivateKey]) -> None:
        self._keys = {sealing_key_id(key.public_key): key for key in private_keys}
        self.id = next(iter(self._keys))
        self.public_key = self._keys[self.id].public_key.encode()
        self._opened: dict[str, bytes] = {}

    @classmethod
    def from_settings(cls, settings: Settings) -> WebhookKeys | None:
        """The keys, or None without any. Raises SettingsError for a text that is no key."""
        given = settings.surety_webhook_key
        texts = [text.strip() for text in given.reveal().split(",") if text.strip()] if given else []
        keys = []
        for place, text in enumerate(texts, start=1):
            try:
                raw = b64decode(text, validate=True)
            except ValueError:
                raw = b""
            if len(raw) != PrivateKey.SIZE:
                raise SettingsError(
                    f"SURETY_WEBHOOK_KEY: key {place} of {len(texts)} is not 32 random bytes in base64;"
                    " `openssl rand -base64 32` makes one"
                )
            keys.append(PrivateKey(raw))
        return cls(keys) if keys else None

    def open(self, secret: SealedSecret) -> bytes | None:
        """The secret; None if it was sealed for another key."""
        if (known := self._opened.get(secret.sealed)) is not None:
            return known
        private_key = self._keys.get(secret.sealing_key)
        if private_key is None:
            return None
        try:
            opened = SealedBox(private_key).decrypt(b64decode(secret.sealed))
        except (CryptoError, ValueError):
            return None
        if len(self._opened) >= OPENED_MAX:
            self._opened.clear()
        self._opened[secret.sealed] = opened
        return opened


def sealing_key_id(public_key: PublicKey) -> str:
    """The name of a public key in the database."""
    return f"slk_{hashlib.sha256(public_key.encode()).hexdigest()[:24]}"


class Signer:
    """Signs deliveries with the active secrets of an endpoint."""

    def __init__(self, keys: WebhookKeys, sealed: list[SealedSecret]) -> None:
        opened = [(secret.scheme, keys.open(secret)) for secret in sealed]
        self._shared = [secret for scheme, secret in opened if scheme == "v1" and secret is not None]
        self._pairs = [SigningKey(secret) for scheme, secret in opened if scheme == "v1a" and secret is not None]

    @property
    def is_usable(self) -> bool:
        """Whether there is a secret that this process can open."""
        return bool(self._shared)

    def headers(self, webhook_id: str, timestamp: int, body: bytes) -> dict[str, Any]:
        """The headers of Standard Webhooks."""
        content = b"%s.%d.%s" % (webhook_id.encode(), timestamp, body)
        signatures = [f"v1,{b64encode(hmac.digest(secret, content, 'sha256')).decode()}" for secret in self._shared] + [
            f"v1a,{b64encode(pair.sign(content).signature).decode()}" for pair in self._pairs
        ]
        return {
            "webhook-id": webhook_id,
            "webhook-timestamp": str(timestamp),
            "webhook-signature": " ".join(signatures),
        }
