"""Authentication. The database finds the caller by the SHA-256 of the key; a text that can't be a key is not looked up.

Every denial is counted. That of a key that exists is audited: the first hundred of an hour, up to
DENIALS_PER_SECOND_MAX in a second and process.
"""

from __future__ import annotations

import logging
from typing import Any, LiteralString

import psycopg

from app.web.batching import Unavailable
from app.web.database import DatabasePool, Row
from app.web.keys import key_hash_of, livemode_of
from app.web.problems import Problem
from app.web.refusals import RefusalCounter
from app.web.throttle import PerSecondThrottle
from db.errors import error_text

log = logging.getLogger("surety.auth")

DENIALS_PER_SECOND_MAX = 20
KEPT_HASHES_MAX = 4096
OTHER_MODE_DETAILS = {
    True: "this is a live key, and no real money moves here: send a test key (sty_test_…)",
    False: "this is a test key, and real money moves here: send a live key (sty_live_…)",
}
DENIAL_DETAILS = {
    "unauthenticated": "the API key is missing, misspelt, unknown, revoked or an operator's",
    "forbidden": "this merchant is suspended",
    "not-found": "this merchant has no object with that id",
}


class Authenticator:
    """Finds the caller of a request, counts denials, and limits the audit entries about them."""

    def __init__(self, database: DatabasePool, reading: DatabasePool, refusals: RefusalCounter) -> None:
        self.database = database
        self.reading = reading
        self.refusals = refusals
        self._hashes_of_known_keys: dict[bytes, bytes] = {}
        self.denial_throttle = PerSecondThrottle(DENIALS_PER_SECOND_MAX)

    def read_caller(self, headers: dict[bytes, bytes], address: str, request_id: str, route: str) -> Caller:
        """The caller, by the Authorization header alone. Raises Problem for a malformed key."""
        authorization = headers.get(b"authorization", b"")
        key_hash = self._hashes_of_known_keys.get(authorization) or key_hash_of(authorization)
        if key_hash is None:
            self.refusals.add("unauthenticated")
            raise Problem("unauthenticated", DENIAL_DETAILS["unauthenticated"])
        return Caller(self, key_hash, livemode_of(authorization), address, request_id, route)

    def remember_key(self, authorization: bytes, key_hash: bytes) -> None:
        """Keep the hash of a key that the database knows. Other keys are not kept."""
        if authorization not in self._hashes_of_known_keys:
            if len(self._hashes_of_known_keys) >= KEPT_HASHES_MAX:
                self._hashes_of_known_keys.clear()
            self._hashes_of_known_keys[authorization] = key_hash


class Caller:
    """The sender of a well-formed API key, which the database has not checked yet."""

    __slots__ = ("_authenticator", "_key_livemode", "address", "key_hash", "request_id", "route")

    def __init__(
        self,
        authenticator: Authenticator,
        key_hash: bytes,
        key_livemode: bool | None,
        address: str,
        request_id: str,
        route: str,
    ) -> None:
        self._authenticator = authenticator
        self._key_livemode = key_livemode
        self.key_hash = key_hash
        self.address = address
        self.request_id = request_id
        self.route = route

    async def fetch(self, query: LiteralString, *values: Any) -> str:
        """The document that a function renders for this key. Raises Problem for an unknown key or no document."""
        row = await self._authenticator.reading.fetch_row(query, self.key_hash, *values)
        if row is None:
            raise await self.audit_denial("unauthenticated")
        document: str | None = row[0]
        if document is None:
            raise await self.audit_denial("not-found")
        return document

    async def require_known_key(self) -> None:
        """Raises Problem unless the key is known."""
        if await self._authenticator.database.fetch_row("select from api.identify_merchant(%s)", self.key_hash) is None:
            raise await self.audit_denial("unauthenticated")

    async def require_active_merchant(self) -> None:
        """Raises Problem unless the key is known and its merchant may take payments."""
        row = await self._authenticator.database.fetch_row(
            "select is_suspended from api.identify_merchant(%s)", self.key_hash
        )
        if row is None:
            raise await self.audit_denial("unauthenticated")
        if row[0]:
            raise await self.audit_denial("forbidden")

    async def require_operator(self) -> None:
        """Raises Problem unless the key is an operator's."""
        await self.row_as_operator("select operator from api.identify_operator(%s)")

    async def fetch_as_operator(self, query: LiteralString, *values: Any) -> str:
        """The document that a function renders for this operator's key. Raises Problem."""
        document: str | None = (await self._operator_row(self._authenticator.reading, query, *values))[0]
        if document is None:
            raise Problem("not-found", "there is no such object")
        return document

    async def row_as_operator(self, query: LiteralString, *values: Any) -> Row:
        """The row that a function gives for this operator's key. Raises Problem if the key is not an operator's."""
        return await self._operator_row(self._authenticator.database, query, *values)

    async def _operator_row(self, pool: DatabasePool, query: LiteralString, *values: Any) -> Row:
        row = await pool.fetch_row(query, self.key_hash, *values)
        if row is not None:
            return row
        is_audited = self._authenticator.denial_throttle.allows()
        denied = await self._authenticator.database.fetch_row(
            "select reason, is_counted from api.explain_operator_denial(%s, %s, %s, %s, %s)",
            self.key_hash,
            self.request_id,
            self.address,
            self.route,
            is_audited,
        )
        assert denied is not None
        name: str = denied[0]
        if not denied[1]:
            self._authenticator.refusals.add(name)
        raise Problem(name, "this key is no operator's" if name == "forbidden" else DENIAL_DETAILS[name])

    async def audit_denial(self, name: str) -> Problem:
        """The refusal, counted, and audited if the key exists; a failure to audit it changes nothing."""
        is_counted, is_of_other_mode = False, False
        if self._authenticator.denial_throttle.allows():
            try:
                row = await self._authenticator.database.fetch_row(
                    "select api.audit_denial(%s, %s, %s, %s, %s)",
                    self.key_hash,
                    self.request_id,
                    self.address,
                    self.route,
                    name,
                )
                is_counted = bool(row and row[0])
                is_of_other_mode = name == "unauthenticated" and not is_counted and await self._is_key_of_other_mode()
            except (psycopg.Error, Unavailable) as error:
                log.warning("%s: the denial could not be audited: %s", self.request_id, error_text(error))
        if not is_counted:
            self._authenticator.refusals.add("other-mode" if is_of_other_mode else name)
        return Problem(name, OTHER_MODE_DETAILS[bool(self._key_livemode)] if is_of_other_mode else DENIAL_DETAILS[name])

    async def _is_key_of_other_mode(self) -> bool:
        """Whether the key is a merchant's and of the other mode than the database."""
        row = await self._authenticator.database.fetch_row("select surety.read_livemode()")
        return row is not None and self._key_livemode is (not row[0])
