"""Operators for tests, made by the product's own functions."""

from __future__ import annotations

import itertools
from typing import Any

import psycopg

from app.web.keys import new_operator_key
from db.connect import harden

Connection = psycopg.Connection[tuple[Any, ...]]

_numbers = itertools.count(1)


def add_operator(conn: Connection, name: str, role: str) -> str:
    """The personal key of a new operator."""
    key = new_operator_key()
    conn.execute(
        "select surety.add_operator(%s, %s, %s, %s, %s, %s)",
        (
            name,
            f"operator-{next(_numbers)}@example.com",
            role,
            key.hash,
            key.hint,
            name,
        ),
    )
    return key.text


def admin_key(database: str) -> str:
    """A further personal key of the admin `tester`, who is added to a database where Surety is deployed."""
    with psycopg.connect(harden(database, "deploy"), autocommit=True) as conn:
        try:
            if not conn.execute("select from surety.operators where name = 'tester'").fetchall():
                return add_operator(conn, "tester", "admin")
        except psycopg.errors.UndefinedTable:
            return ""
        key = new_operator_key()
        conn.execute("select surety.add_operator_key('tester', %s, %s, 'tester')", (key.hash, key.hint))
        return key.text
