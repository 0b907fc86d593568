"""Authentication. The database finds the caller by the SHA-256 of the key; a text that can't be a key is not looked up.

No process keeps what the database said about a key: the function that does the work checks it each time. So revoking a
key needs no notice. Why a key is refused is said only to the holder of the whole secret.

Every denial is counted. That of a key that exists is audited: the first hundred of an hour, up to
DENIALS_PER_SECOND_MAX in a second and process.
"""

from __future__ import annotations

import logging
from typing import Any, LiteralString

import psycopg

from app.web.batching import Unavailable
from app.web.database import DatabasePool, Row
from app.web.key_uses import KeyUses
from app.web.keys import key_hash_of, livemode_of, why_no_key
from app.web.problems import Problem, RuleViolation, invalid_request
from app.web.refusals import RefusalCounter
from app.web.replica import POSITION_HEADER, Replica
from app.web.routing import Route
from app.web.throttle import PerSecondThrottle
from db.errors import error_text
from db.replication import GivenPosition, parse_position

log = logging.getLogger("surety.auth")

DENIALS_PER_SECOND_MAX = 20
KEPT_HASHES_MAX = 4096
OTHER_MODE_DETAILS = {
    True: "this is a live key, and no real money moves here: send a test key (sty_test_…)",
    False: "this is a test key, and real money moves here: send a live key (sty_live_…)",
}
OPERATOR_KEY_DETAIL = "this is an operator's key: send a merchant's (sty_test_… or sty_live_…)"
KEY_PROBLEMS = ("key-revoked", "key-expired", "network-not-allowed", "scope-missing")
"""Problems of a key that the database knows."""
DENIAL_DETAILS = {
    "unauthenticated": "no such API key is known here: it is of another installation, or was copied with an error",
    "key-revoked": "this API key was revoked",
    "key-expired": "this API key has expired",
    "network-not-allowed": "this API key may not be used from {address}",
    "scope-missing": "this API key lacks the scope {scope}",
    "merchant-suspended": "this merchant is suspended",
    "not-found": "this merchant has no object with that id",
}
DENIALS = frozenset(DENIAL_DETAILS)


class Authenticator:
    """Finds the caller of a request, counts denials, and limits the audit entries about them."""

    def __init__(
        self,
        database: DatabasePool,
        reading: DatabasePool,
        refusals: RefusalCounter,
        key_uses: KeyUses,
        replica: Replica | None = None,
    ) -> None:
        self.database = database
        self.reading = reading
        self.refusals = refusals
        self.key_uses = key_uses
        self.replica = replica
        self._hashes_of_known_keys: dict[bytes, bytes] = {}
        self.denial_throttle = PerSecondThrottle(DENIALS_PER_SECOND_MAX)

    def read_caller(self, headers: dict[bytes, bytes], address: str, request_id: str, route: Route) -> Caller | None:
        """The caller, by the Authorization header alone; None for a malformed key."""
        authorization = headers.get(b"authorization", b"")
        key_hash = self._hashes_of_known_keys.get(authorization) or key_hash_of(authorization)
        if key_hash is None:
            return None
        caller = Caller(self, key_hash, livemode_of(authorization), address, request_id, route)
        caller.position = headers.get(POSITION_HEADER)
        return caller

    def refuse_malformed_key(self, headers: dict[bytes, bytes]) -> Problem:
        """The refusal of a missing or malformed key, counted."""
        self.refusals.add("unauthenticated")
        return Problem("unauthenticated", why_no_key(headers.get(b"authorization", b"")))

    def remember_key(self, authorization: bytes, key_hash: bytes) -> None:
        """Keep the hash of a key that the database knows. Other keys are not kept."""
        if authorization not in self._hashes_of_known_keys:
            if len(self._hashes_of_known_keys) >= KEPT_HASHES_MAX:
                self._hashes_of_known_keys.clear()
            self._hashes_of_known_keys[authorization] = key_hash


class Caller:
    """The sender of a well-formed API key, which the database has not checked yet."""

    __slots__ = ("_authenticator", "_key_livemode", "address", "key_hash", "position", "request_id", "route", "scope")

    def __init__(
        self,
        authenticator: Authenticator,
        key_hash: bytes,
        key_livemode: bool | None,
        address: str,
        request_id: str,
        route: Route,
    ) -> None:
        self._authenticator = authenticator
        self._key_livemode = key_livemode
        self.key_hash = key_hash
        self.address = address
        self.request_id = request_id
        self.route = route.name
        self.scope = route.scope
        self.position: bytes | None = None

    async def fetch(self, query: LiteralString, *values: Any) -> str:
        """The document that a function renders for this key, from a replica if there is one that may answer.

        Raises Problem: the key may not read, or no document.
        """
        given = await self.given_position()
        if (replica := self._authenticator.replica) is not None:
            row = await replica.fetch_row(given, query, self.key_hash, *values, self.address)
            # A replica may lack a new key or object: only the primary refuses.
            if row is not None and row[0] is not None:
                self.note_use()
                return str(row[0])
        return await self.fetch_from_primary(query, *values)

    async def fetch_from_primary(self, query: LiteralString, *values: Any) -> str:
        """The document as the primary has it now. Raises Problem."""
        row = await self._authenticator.reading.fetch_row(query, self.key_hash, *values, self.address)
        if row is None:
            raise await self.audit_denial(None)
        self.note_use()
        document: str | None = row[0]
        if document is None:
            raise await self.audit_denial("not-found")
        return document

    async def given_position(self) -> GivenPosition | None:
        """The position that the request names. Raises Problem: unauthenticated first, then one that no answer has."""
        if self.position is None:
            return None
        given = parse_position(self.position)
        if given is None:
            await self.require_valid_key()
            message = "Surety-Position must be the value of that header in an earlier answer"
            raise invalid_request([RuleViolation("Surety-Position", "pattern", message, place="header")])
        return given

    async def read_position(self, cursor: str) -> Row:
        """Merchant, restore generation and snapshot of a reader of events at this cursor. Raises Problem."""
        query = "select merchant_id, generation, seen from api.read_position(%s, %s, %s)"
        row = await self._authenticator.reading.fetch_row(query, self.key_hash, cursor, self.address)
        if row is None:
            raise await self.audit_denial(None)
        return row

    def note_use(self) -> None:
        """Note that the database accepted the key."""
        self._authenticator.key_uses.note(self.key_hash)

    async def require_valid_key(self) -> bool:
        """Whether the key's merchant is suspended. Raises Problem unless the key is valid for the route."""
        row = await self._authenticator.database.fetch_row(
            "select is_suspended from api.identify_merchant(%s, %s, %s)", self.key_hash, self.scope, self.address
        )
        if row is None:
            raise await self.audit_denial(None)
        is_suspended: bool = row[0]
        return is_suspended

    async def require_active_merchant(self) -> None:
        """Raises Problem unless the key is valid for the route and its merchant may take payments."""
        if await self.require_valid_key():
            raise await self.audit_denial("merchant-suspended")

    async def require_operator(self) -> None:
        """Raises Problem unless the key is an operator's."""
        query: LiteralString = "select operator from api.identify_operator(%s, %s, %s)"
        await self.row_as_operator(query, self.scope)

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
        row = await pool.fetch_row(query, self.key_hash, *values, self.address)
        if row is not None:
            self.note_use()
            return row
        is_audited = self._authenticator.denial_throttle.allows()
        denied = await self._authenticator.database.fetch_row(
            "select reason, is_counted from api.explain_operator_denial(%s, %s, %s, %s, %s, %s)",
            self.key_hash,
            self.request_id,
            self.address,
            self.route,
            is_audited,
            self.scope,
        )
        assert denied is not None
        name: str = denied[0]
        if not denied[1]:
            self._authenticator.refusals.add(name)
        raise Problem(name, "this key is no operator's") if name == "forbidden" else self._problem(name)

    async def audit_denial(self, name: str | None) -> Problem:
        """The refusal, counted, and audited if the key exists; a failure to audit it changes nothing.

        Without a name, the database says why the key may not do what the route needs.
        """
        is_counted, is_of_other_mode = False, False
        try:
            if self._authenticator.denial_throttle.allows():
                row = await self._authenticator.database.fetch_row(
                    "select reason, is_counted from api.audit_denial(%s, %s, %s, %s, %s, %s)",
                    self.key_hash,
                    self.request_id,
                    self.address,
                    self.route,
                    name,
                    self.scope,
                )
                assert row is not None
                name, is_counted = row
                is_of_other_mode = name == "unauthenticated" and not is_counted and await self._is_key_of_other_mode()
            elif name is None:
                row = await self._authenticator.database.fetch_row(
                    "select api.explain_denial(%s, %s, %s)", self.key_hash, self.scope, self.address
                )
                name = row[0] if row else None
        except (psycopg.Error, Unavailable) as error:
            log.warning("%s: the denial could not be audited: %s", self.request_id, error_text(error))
        name = name or "unauthenticated"
        if not is_counted:
            self._authenticator.refusals.add("other-mode" if is_of_other_mode else name)
        if is_of_other_mode:
            return Problem(name, OTHER_MODE_DETAILS[bool(self._key_livemode)])
        if name == "unauthenticated" and self._key_livemode is None:
            return Problem(name, OPERATOR_KEY_DETAIL)
        return self._problem(name)

    def _problem(self, name: str) -> Problem:
        detail = DENIAL_DETAILS[name].format(address=self.address or "an unknown address", scope=self.scope)
        match name:
            case "network-not-allowed":
                return Problem(name, detail, address=self.address)
            case "scope-missing":
                return Problem(name, detail, scope=self.scope)
        return Problem(name, detail)

    async def _is_key_of_other_mode(self) -> bool:
        """Whether the key is a merchant's and of the other mode than the database."""
        row = await self._authenticator.database.fetch_row("select surety.read_livemode()")
        return row is not None and self._key_livemode is (not row[0])
