"""Who asks. The database decides by the key's SHA-256; what can't be a key never gets that far.

A denial of a key that exists is written into the audit trail, so many in a second and process.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, LiteralString

import psycopg

from app.web.batching import Unavailable
from app.web.database import Database, Row
from app.web.keys import hash_of
from app.web.problems import Problem
from app.web.throttle import PerSecond

log = logging.getLogger("surety.doorkeeper")

DENIALS_PER_SECOND_MAX = 20
DETAILS = {
    "unauthenticated": "the API key is missing, misspelt, unknown, revoked or an operator's",
    "forbidden": "this merchant is suspended",
    "not-found": "this merchant has nothing of that id",
}


class Doorkeeper:
    """Tells callers from strangers."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self.denials = PerSecond(DENIALS_PER_SECOND_MAX)

    def caller(self, scope: Mapping[str, Any], headers: dict[bytes, bytes], request_id: str, route: str) -> Caller:
        """Who sent this, as far as that can be told without the database. Raises Problem."""
        key_hash = hash_of(headers.get(b"authorization", b""))
        if key_hash is None:
            raise Problem("unauthenticated", DETAILS["unauthenticated"])
        client = scope.get("client")
        return Caller(self, key_hash, client[0] if client else "", request_id, route)


class Caller:
    """Whoever holds a key that might be one."""

    __slots__ = ("_doorkeeper", "address", "key_hash", "request_id", "route")

    def __init__(self, doorkeeper: Doorkeeper, key_hash: bytes, address: str, request_id: str, route: str) -> None:
        self._doorkeeper = doorkeeper
        self.key_hash = key_hash
        self.address = address
        self.request_id = request_id
        self.route = route

    async def fetch(self, query: LiteralString, *values: Any) -> str:
        """The document that a function renders for this key. Raises Problem for an unknown key or no document."""
        row = await self._doorkeeper.database.row(query, self.key_hash, *values)
        if row is None:
            raise await self.denied("unauthenticated")
        document: str | None = row[0]
        if document is None:
            raise await self.denied("not-found")
        return document

    async def must_be_known(self) -> None:
        """Raises Problem unless the key is known."""
        if await self._doorkeeper.database.row("select from api.identify(%s)", self.key_hash) is None:
            raise await self.denied("unauthenticated")

    async def must_be_active(self) -> None:
        """Raises Problem unless the key is known and its merchant may take payments."""
        row = await self._doorkeeper.database.row("select is_suspended from api.identify(%s)", self.key_hash)
        if row is None:
            raise await self.denied("unauthenticated")
        if row[0]:
            raise await self.denied("forbidden")

    async def must_be_operator(self) -> None:
        """Raises Problem unless the key is an operator's."""
        await self.row_as_operator("select operator from api.identify_operator(%s)")

    async def fetch_as_operator(self, query: LiteralString, *values: Any) -> str:
        """The document that a function renders for this operator's key. Raises Problem."""
        document: str | None = (await self.row_as_operator(query, *values))[0]
        if document is None:
            raise Problem("not-found", "there is no such thing")
        return document

    async def row_as_operator(self, query: LiteralString, *values: Any) -> Row:
        """The row that a function gives for this operator's key. Raises Problem for a key that is none."""
        row = await self._doorkeeper.database.row(query, self.key_hash, *values)
        if row is not None:
            return row
        is_told = self._doorkeeper.denials.lets_through()
        denied = await self._doorkeeper.database.row(
            "select api.deny_operator(%s, %s, %s, %s, %s)",
            self.key_hash,
            self.request_id,
            self.address,
            self.route,
            is_told,
        )
        assert denied is not None
        name: str = denied[0]
        raise Problem(name, "this key is no operator's" if name == "forbidden" else DETAILS[name])

    async def denied(self, name: str) -> Problem:
        """The refusal, written down if the key exists. It stands whether or not that can be done."""
        if self._doorkeeper.denials.lets_through():
            try:
                await self._doorkeeper.database.row(
                    "select api.deny(%s, %s, %s, %s, %s)",
                    self.key_hash,
                    self.request_id,
                    self.address,
                    self.route,
                    name,
                )
            except (psycopg.Error, Unavailable):
                log.exception("%s: the denial could not be written down", self.request_id)
        else:
            log.warning("%s: denied, and too many are written down already", self.request_id)
        return Problem(name, DETAILS[name])
