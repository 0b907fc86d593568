"""Taking SQL files apart."""

from __future__ import annotations

import pytest

from db.deploy.source import VersionFiles
from db.deploy.statements import split


def texts(text: str) -> list[str]:
    return [statement.text for statement in split(text)]


@pytest.mark.parametrize(
    "statement",
    [
        "select ';', 'it''s;', e'\\';', \"a;b\", $$;$$, $body$ $$;$$ $body$, $1;",
        "select 1 /* a; */ -- b;\n, 2;",
        "create function a.f() returns int language sql begin atomic select case when true then 1 end; select 2; end;",
        "create function a.f() returns int\nBEGIN\n  ATOMIC select case 1 when 1 then case when b then 2 end end; end;",
        "do $$ begin perform 1; end $$;",
        "select case when a then b end;",
        "select 'no semicolon at the end'",
    ],
)
def test_a_semicolon_ends_a_statement_only_outside_of_text_comments_and_bodies(statement: str) -> None:
    assert texts(f"select 0; {statement}")[1:] == [statement]
    if statement.endswith(";"):
        assert texts(f"{statement} select 0;") == [statement, "select 0;"]


def test_comments_before_a_statement_are_no_part_of_it() -> None:
    assert texts("-- one;\nselect 1;\n\n/* two */ -- three\nselect 2;\n-- the end") == ["select 1;", "select 2;"]


def test_a_statement_knows_its_line() -> None:
    assert [statement.line for statement in split("select 1;\n\n-- two\nselect\n2;select 3;")] == [1, 4, 5]


@pytest.mark.parametrize(
    ("text", "kind", "identity"),
    [
        ("create or replace function api.f(p text) returns int return 1;", "function", "api.f"),
        ("CREATE PROCEDURE api.p() language sql begin atomic end;", "function", "api.p"),
        ("create or replace view report.v with (security_invoker = true) as select 1;", "view", "report.v"),
        ("create or replace trigger t after insert on a.b execute function a.f();", "trigger", "a.b.t"),
        ("create constraint trigger t after update of x, y on a.b execute function a.f();", "trigger", "a.b.t"),
        ("create schema if not exists a;", "schema", "a"),
        ("create schema a authorization b;", "schema", "a"),
        ("create unique index concurrently if not exists i on a.b (c);", "index", "i"),
        ("alter table only a.b add column c int;", "alteration", ""),
        ("create table a.b (c int);", "other", ""),
    ],
)
def test_statement_names_the_object_it_creates(text: str, kind: str, identity: str) -> None:
    [statement] = split(text)
    assert (statement.kind, statement.identity) == (kind, identity)


def test_every_own_object_is_defined_once() -> None:
    statements = [statement for statement in VersionFiles.installed().statements if statement.identity]
    identities = [(statement.kind, statement.identity) for statement in statements]
    assert len(identities) > 50
    assert len(identities) == len(set(identities))
