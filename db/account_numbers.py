"""Account numbers at rest: encrypted, compared by a keyed hash, shown by their last four characters.

SURETY_ACCOUNT_KEYS holds keys as NAME:BASE64, separated by commas, each of 32 random bytes. The first one encrypts,
each decrypts. To rotate, put a new key first, run `surety ach accounts rotate`, and remove the old key.

A number is encrypted by XChaCha20-Poly1305 for the id of its account: the ciphertext of another account does not open.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import re
import secrets

from nacl.bindings import (
    crypto_aead_xchacha20poly1305_ietf_decrypt,
    crypto_aead_xchacha20poly1305_ietf_encrypt,
    crypto_aead_xchacha20poly1305_ietf_NPUBBYTES,
)
from nacl.exceptions import CryptoError

from db.errors import SettingsError, SuretyError
from db.settings import Secret

KEY_BYTES = 32
KEY_NAME = re.compile(r"[a-z0-9-]{1,32}")
ACCOUNT_NUMBER = re.compile(r"[0-9A-Za-z -]{4,17}")
NONCE_BYTES = crypto_aead_xchacha20poly1305_ietf_NPUBBYTES


class AccountNumberUnreadable(SuretyError):
    """No key opens the number: the key is missing, or the row was changed."""


class AccountKeys:
    """The keys of account numbers, the one that encrypts first. Raises SettingsError for any other text."""

    def __init__(self, setting: Secret) -> None:
        self._keys: dict[str, bytes] = {}
        for place, part in enumerate(setting.reveal().split(","), start=1):
            name, _, encoded = part.strip().partition(":")
            if not KEY_NAME.fullmatch(name):
                raise SettingsError(f"SURETY_ACCOUNT_KEYS: key {place} must be NAME:BASE64, NAME of a-z, 0-9 and -")
            try:
                key = base64.b64decode(encoded, validate=True)
            except binascii.Error:
                key = b""
            if len(key) != KEY_BYTES:
                raise SettingsError(f"SURETY_ACCOUNT_KEYS: {name} must be {KEY_BYTES} bytes as base64")
            if name in self._keys:
                raise SettingsError(f"SURETY_ACCOUNT_KEYS: {name} is there twice")
            self._keys[name] = key
        self.first = next(iter(self._keys))

    def __repr__(self) -> str:
        return f"AccountKeys({', '.join(self._keys)})"

    def seal(self, number: str, account_id: str) -> bytes:
        """A number encrypted by the first key, for the account of that id: nonce and ciphertext."""
        nonce = secrets.token_bytes(NONCE_BYTES)
        key = derive(self._keys[self.first], b"encrypt")
        return nonce + crypto_aead_xchacha20poly1305_ietf_encrypt(number.encode(), account_id.encode(), nonce, key)

    def open(self, sealed: bytes, key_id: str, account_id: str) -> str:
        """The number. Raises AccountNumberUnreadable."""
        if key_id not in self._keys:
            raise AccountNumberUnreadable(f"{account_id}: SURETY_ACCOUNT_KEYS has no key {key_id}")
        nonce, ciphertext = sealed[:NONCE_BYTES], sealed[NONCE_BYTES:]
        key = derive(self._keys[key_id], b"encrypt")
        try:
            return crypto_aead_xchacha20poly1305_ietf_decrypt(ciphertext, account_id.encode(), nonce, key).decode()
        except (CryptoError, ValueError, TypeError):
            raise AccountNumberUnreadable(
                f"{account_id}: key {key_id} does not open its number: the key is another one, or the row was changed"
            ) from None

    def fingerprints(self, routing_number: str, number: str) -> list[bytes]:
        """The keyed hashes of an account by each key, the first key's first. Equal accounts have equal ones."""
        account = f"{routing_number}:{comparable(number)}".encode()
        return [hmac.digest(derive(key, b"fingerprint"), account, "sha256") for key in self._keys.values()]


def derive(key: bytes, purpose: bytes) -> bytes:
    """A key of its own for each purpose."""
    return hmac.digest(key, b"surety account numbers: " + purpose, "sha256")


def comparable(number: str) -> str:
    """A number without what people write between its digits."""
    return number.replace(" ", "").replace("-", "").upper()


def last_four(number: str) -> str:
    """The characters by which an account is shown; two of a short number."""
    kept = comparable(number)
    return kept[-4:] if len(kept) >= 8 else kept[-2:]


def check_account_number(number: str) -> str | None:
    """The rule that an account number breaks, or None. It may have 17 characters in an entry."""
    if not ACCOUNT_NUMBER.fullmatch(number) or len(comparable(number)) < 4:
        return "must have 4 to 17 digits, letters, spaces or hyphens"
    return None


def new_account_key(name: str) -> str:
    """A new random key in the form of SURETY_ACCOUNT_KEYS. Raises SuretyError for a name of another form."""
    if not KEY_NAME.fullmatch(name):
        raise SuretyError("NAME must have 1 to 32 characters of a-z, 0-9 and -")
    return f"{name}:{base64.b64encode(secrets.token_bytes(KEY_BYTES)).decode()}"
