"""Deploying: from nothing, twice, at once, beside traffic, after an interruption, and without a superuser."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo

from db import LOCK_ORDER
from db.deploy.deploy import DeployResult, deploy
from db.deploy.source import VersionFiles, state_folder
from db.embedded.binaries import find_binaries
from db.embedded.databases import temporary_database, with_database
from db.embedded.server import EmbeddedServer
from db.errors import DeployError
from tests.conftest import PREFIX, Connection

POSTGRESQL_15 = Path("/usr/lib/postgresql/15/bin")

SCHEMA = """
create schema shop;
create table shop.orders (id int primary key, amount int not null);
create table shop.log (order_id int not null, note text not null);
"""
BEHAVIOUR = """
create or replace function shop.price(p_amount int) returns int language sql immutable
begin atomic
    select p_amount * 2;
end;

create or replace view shop.prices as select o.id, shop.price(o.amount) as price from shop.orders as o;

create or replace function shop.write_log() returns trigger language plpgsql as $$
begin
    insert into shop.log (order_id, note) select new_orders.id, 'v1' from new_orders;
    return null;
end;
$$;

create or replace trigger orders_are_logged
after insert on shop.orders referencing new table as new_orders
for each statement execute function shop.write_log();
"""


class SourceTree:
    """A small version of something like Surety, whose files a test may change."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "migrations").mkdir()
        self.write(SCHEMA, BEHAVIOUR)

    def write(self, schema: str | None = None, behaviour: str | None = None) -> None:
        if schema is not None:
            (self.folder / "schema.sql").write_text(schema)
        if behaviour is not None:
            (self.folder / "shop.sql").write_text(behaviour)

    def change(self, old: str, new: str) -> None:
        behaviour = (self.folder / "shop.sql").read_text()
        assert old in behaviour
        self.write(behaviour=behaviour.replace(old, new))

    def migrate(self, name: str, text: str) -> None:
        (self.folder / "migrations" / name).write_text(text)

    @property
    def source(self) -> VersionFiles:
        return VersionFiles.installed(self.folder, [self.folder / "shop.sql"])

    def deploy(self, url: str, **options: Any) -> DeployResult:
        return deploy(url, self.source, **options)


@pytest.fixture
def shop(tmp_path: Path) -> SourceTree:
    return SourceTree(tmp_path)


@pytest.fixture
def at_once() -> Callable[..., list[Any]]:
    """Calls functions at the same time; gives what they return, in their order."""

    def run(*calls: Callable[[], Any]) -> list[Any]:
        results: dict[int, Any] = {}
        barrier = threading.Barrier(len(calls))

        def work(number: int, call: Callable[[], Any]) -> None:
            barrier.wait()
            try:
                results[number] = call()
            except BaseException as error:  # noqa: BLE001  shown by the test that asked
                results[number] = error

        threads = [threading.Thread(target=work, args=numbered) for numbered in enumerate(calls)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return [results[number] for number in range(len(calls))]

    return run


def fetch(url: str, query: str) -> list[tuple[Any, ...]]:
    with psycopg.connect(url, autocommit=True) as conn:
        return conn.execute(query.encode()).fetchall()


def execute(url: str, *statements: str) -> None:
    with psycopg.connect(url, autocommit=True) as conn:
        for statement in statements:
            conn.execute(statement.encode())


def dump(url: str) -> str:
    """The structure of a database, without partitions: those are made as time goes by."""
    partitions = fetch(url, "select oid::regclass::text from pg_class where relispartition and relkind in ('r', 'p')")
    left_out = [option for (name,) in partitions for option in ("-T", name)]
    command = [find_binaries()["pg_dump"], "-s", "--restrict-key=x", *left_out, "-d", url]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


# --- Surety itself ---------------------------------------------------------------------------------------------------


def test_baseline_and_migrations_give_what_schema_sql_gives(blank: str, database: str, tmp_path: Path) -> None:
    deltas = sorted(path.name for path in (state_folder() / "migrations").glob("*.sql"))
    baselines = [name for name in deltas if name.endswith("baseline.sql")]
    assert len(baselines) <= 1
    assert baselines == deltas[:1], "there is no delta without a baseline before it"
    baseline = state_folder() / ("migrations/" + baselines[0] if baselines else "schema.sql")
    shutil.copy(baseline, tmp_path / "schema.sql")
    deploy(blank, VersionFiles.installed(tmp_path))
    deploy(blank, force=True)
    assert dump(blank) == dump(database)


def test_surety_deployed_twice_has_nothing_to_do(blank: str) -> None:
    assert deploy(blank).outcome == "created"
    before = dump(blank)
    assert deploy(blank).outcome == "unchanged"
    again = deploy(blank, force=True)
    assert (again.outcome, again.written, again.dropped) == ("changed", [], [])
    assert dump(blank) == before


@pytest.mark.skipif(not POSTGRESQL_15.is_dir(), reason="PostgreSQL 15 is not installed here")
def test_surety_deploys_on_postgresql_15(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SURETY_PG_BIN", str(POSTGRESQL_15))
    with EmbeddedServer() as server, temporary_database(server.url, PREFIX) as url:
        assert deploy(url).outcome == "created"
        assert deploy(url, force=True).written == []


def test_surety_deploys_by_a_login_that_is_no_superuser(server: str) -> None:
    login, password = f"surety_test_{os.urandom(4).hex()}", os.urandom(8).hex()
    with EmbeddedServer() as embedded, psycopg.connect(embedded.url, autocommit=True) as conn:
        create = sql.SQL("create role {} login createrole password {}")
        conn.execute(create.format(sql.Identifier(login), sql.Literal(password)))
        conn.execute(sql.SQL("create database shop owner {}").format(sql.Identifier(login)))
        url = make_conninfo(with_database(embedded.url, "shop"), user=login, password=password)
        assert deploy(url).outcome == "created"
        assert deploy(url, force=True).outcome == "changed"


# --- from nothing ----------------------------------------------------------------------------------------------------


def test_a_fresh_database_gets_everything(blank: str, shop: SourceTree) -> None:
    done = shop.deploy(blank)
    assert (done.outcome, done.attempts, done.migrations, done.dropped) == ("created", 1, [], [])
    execute(blank, "insert into shop.orders values (1, 5)")
    assert fetch(blank, "select * from shop.prices") == [(1, 10)]
    assert fetch(blank, "select * from shop.log") == [(1, "v1")]
    assert fetch(blank, "select count(*) from procrastinate.procrastinate_jobs") == [(0,)]
    assert fetch(blank, "select to_regclass('public.procrastinate_jobs')") == [(None,)]


def test_a_failed_first_deploy_leaves_nothing_and_names_the_line(blank: str, shop: SourceTree) -> None:
    shop.write(behaviour="select 1;\n\n-- a comment\nselect 1,\n    nothing;")
    with pytest.raises(DeployError, match=re.escape('shop.sql:5: column "nothing" does not exist')):
        shop.deploy(blank)
    assert fetch(blank, "select nspname from pg_namespace where nspname in ('shop', 'deploy', 'procrastinate')") == []


def test_foreign_database_is_refused(blank: str, shop: SourceTree) -> None:
    execute(blank, "create schema shop")
    with pytest.raises(DeployError, match="no deploy created"):
        shop.deploy(blank)


def test_several_deploys_at_once_make_one(blank: str, shop: SourceTree, at_once: Callable[..., list[Any]]) -> None:
    source = shop.source
    done = at_once(*[lambda: deploy(blank, source).outcome] * 4)
    assert sorted(done) == ["created", "unchanged", "unchanged", "unchanged"]


def test_concurrent_deploys_in_one_cluster_create_roles_once(
    server: str, shop: SourceTree, at_once: Callable[..., list[Any]]
) -> None:
    role = f"surety_test_{os.urandom(4).hex()}"
    block = f"""
        do $$
        begin
            create role {role};
        exception
            when duplicate_object or unique_violation then null;
        end;
        $$;
        alter role {role} set lock_timeout = '1s';
        grant {role} to current_user;
    """
    shop.write(schema=block + SCHEMA)
    with temporary_database(server, PREFIX) as a, temporary_database(server, PREFIX) as b:
        outcomes = at_once(lambda: shop.deploy(a).outcome, lambda: shop.deploy(b).outcome)
        execute(server, f"drop role {role}")
        assert outcomes == ["created", "created"]


# --- a changed version -----------------------------------------------------------------------------------------------


def test_deploy_without_changes_does_nothing(blank: str, shop: SourceTree) -> None:
    shop.deploy(blank)
    assert shop.deploy(blank).outcome == "unchanged"
    assert fetch(blank, "select count(*) from deploy.deploys") == [(1,)]


def test_a_changed_function_is_replaced_and_keeps_its_identity(blank: str, shop: SourceTree) -> None:
    shop.deploy(blank)
    before = fetch(blank, "select 'shop.price'::regproc::oid")
    shop.change("p_amount * 2", "p_amount * 3")
    done = shop.deploy(blank)
    assert (done.outcome, done.written, done.dropped) == ("changed", [], [])
    assert fetch(blank, "select shop.price(1)") == [(3,)]
    assert fetch(blank, "select 'shop.price'::regproc::oid") == before


def test_only_the_view_that_changed_is_written(blank: str, shop: SourceTree) -> None:
    shop.change("create or replace view", "create or replace view shop.other as select 1 as n;\ncreate or replace view")
    shop.deploy(blank)
    shop.change("as price from", "as price, o.amount from")
    assert shop.deploy(blank).written == ["shop.prices"]


def test_only_the_trigger_that_changed_is_written(blank: str, shop: SourceTree) -> None:
    shop.deploy(blank)
    before = fetch(blank, "select oid from pg_trigger where tgname = 'orders_are_logged'")
    shop.change("'v1'", "'v2'")
    assert shop.deploy(blank).written == []
    assert fetch(blank, "select oid from pg_trigger where tgname = 'orders_are_logged'") == before
    shop.change("after insert on shop.orders", "after insert on shop.orders")
    shop.change("for each statement execute", "for each statement\nexecute")
    assert shop.deploy(blank).written == ["shop.orders.orders_are_logged"]


def test_changed_constraint_trigger_is_recreated(blank: str, shop: SourceTree) -> None:
    plain = (
        "create constraint trigger check_late after insert on shop.log {} for each row execute function shop.pass();"
    )
    behaviour = BEHAVIOUR + (
        "create or replace function shop.pass() returns trigger language plpgsql as $$ begin return null; end $$;\n"
    )
    shop.write(behaviour=behaviour + plain.format(""))
    assert shop.deploy(blank).written[-1] == "shop.log.check_late"
    shop.write(behaviour=behaviour + plain.format("deferrable initially deferred"))
    assert shop.deploy(blank).written == ["shop.log.check_late"]
    assert fetch(blank, "select tgdeferrable from pg_trigger where tgname = 'check_late'") == [(True,)]


def test_manual_changes_are_reverted(blank: str, shop: SourceTree) -> None:
    shop.deploy(blank)
    execute(
        blank,
        "alter table shop.orders disable trigger orders_are_logged",
        "create or replace view shop.prices as select 1 as id, 2 as price",
        "create or replace function shop.price(p_amount int) returns int language sql return 0",
    )
    assert shop.deploy(blank, force=True).written == ["shop.prices", "shop.orders.orders_are_logged"]
    execute(blank, "insert into shop.orders values (1, 5)")
    assert fetch(blank, "select * from shop.prices") == [(1, 10)]
    assert fetch(blank, "select * from shop.log") == [(1, "v1")]


def test_obsolete_objects_are_dropped_in_dependency_order(blank: str, shop: SourceTree) -> None:
    shop.deploy(blank)
    shop.write(behaviour="create or replace function shop.remains() returns int language sql return 1;")
    done = shop.deploy(blank)
    assert sorted(done.dropped) == [
        "orders_are_logged on shop.orders",
        "shop.price(integer)",
        "shop.prices",
        "shop.write_log()",
    ]
    assert fetch(blank, "select proname from pg_proc where pronamespace = 'shop'::regnamespace") == [("remains",)]
    assert shop.deploy(blank).outcome == "unchanged"


def test_obsolete_object_with_foreign_dependents_is_an_error_and_stays(blank: str, shop: SourceTree) -> None:
    shop.deploy(blank)
    execute(blank, "create schema analysts", "create view analysts.own as select id, price from shop.prices")
    shop.write(behaviour="select 1;")
    with pytest.raises(DeployError, match=r"analysts\.own depends on view shop\.prices"):
        shop.deploy(blank)
    assert fetch(blank, "select * from analysts.own") == []


def test_foreign_objects_are_left_alone(blank: str, shop: SourceTree) -> None:
    shop.deploy(blank)
    execute(blank, "create schema analysts", "create function analysts.f() returns int language sql return 1")
    assert shop.deploy(blank, force=True).dropped == []


def test_a_changed_signature_under_the_old_name_is_refused(blank: str, shop: SourceTree) -> None:
    shop.deploy(blank)
    shop.change("shop.price(p_amount int)", "shop.price(p_amount bigint)")
    with pytest.raises(DeployError, match="a changed signature is a new name"):
        shop.deploy(blank)
    assert fetch(blank, "select shop.price(1)") == [(2,)]


@pytest.mark.parametrize(
    ("behaviour", "complaint"),
    [
        ("create function shop.f() returns int language sql return 1;", "write `create or replace`"),
        ("create or replace view prices as select 1 as n;", "name the schema"),
        (
            "create or replace function shop.f(p int) returns int language plpgsql as $$ declare p int; begin end $$;",
            "p",
        ),
    ],
)
def test_statement_that_is_not_repeatable_is_refused(
    blank: str, shop: SourceTree, behaviour: str, complaint: str
) -> None:
    shop.write(behaviour=behaviour)
    with pytest.raises(DeployError, match=rf"shop\.sql:1: .*{complaint}"):
        shop.deploy(blank)


# --- migrations ------------------------------------------------------------------------------------------------------


def test_migrations_run_once_and_a_fresh_database_needs_none(server: str, blank: str, shop: SourceTree) -> None:
    shop.deploy(blank)
    shop.write(schema=SCHEMA.replace("note text not null", "note text not null, at timestamptz"))
    shop.migrate("0001_log_at.sql", "alter table shop.log add column at timestamptz;")
    assert shop.deploy(blank).migrations == ["0001_log_at.sql"]
    assert shop.deploy(blank).outcome == "unchanged"
    with temporary_database(server, PREFIX) as fresh:
        assert shop.deploy(fresh).migrations == []
        assert shop.deploy(fresh).outcome == "unchanged"
        assert dump(fresh) == dump(blank)


def test_drift_between_migrations_and_schema_shows_in_the_dump(server: str, blank: str, shop: SourceTree) -> None:
    shop.deploy(blank)
    shop.write(schema=SCHEMA.replace("note text not null", "note text not null, at timestamptz not null"))
    shop.migrate("0001_log_at.sql", "alter table shop.log add column at timestamptz;")
    shop.deploy(blank)
    with temporary_database(server, PREFIX) as fresh:
        shop.deploy(fresh)
        assert dump(fresh) != dump(blank)


def test_a_migration_and_the_behaviour_that_needs_it_arrive_together_or_not_at_all(
    blank: str, shop: SourceTree
) -> None:
    shop.deploy(blank)
    shop.migrate("0001_rate.sql", "alter table shop.orders add column rate int not null default 4;")
    shop.change("shop.price(o.amount) as price from", "shop.price(o.amount) as price, o.rates from")
    with pytest.raises(DeployError, match="rates"):
        shop.deploy(blank)
    assert fetch(blank, "select count(*) from pg_attribute where attname = 'rate'") == [(0,)]
    shop.change("o.rates", "o.rate")
    assert shop.deploy(blank).migrations == ["0001_rate.sql"]


def test_a_migration_may_drop_behaviour_in_its_way_but_never_create_any(blank: str, shop: SourceTree) -> None:
    shop.deploy(blank)
    shop.migrate("0001_wide.sql", "drop view shop.prices; alter table shop.orders alter column id type bigint;")
    assert shop.deploy(blank).written == ["shop.prices"]
    shop.migrate("0002_bad.sql", "create view shop.more as select 1 as n;")
    with pytest.raises(DeployError, match=r"0002_bad\.sql:1: a migration may drop a view, never create one"):
        shop.deploy(blank)


def test_an_older_version_is_not_deployed_over_a_newer_state(blank: str, shop: SourceTree) -> None:
    shop.migrate("0001_more.sql", "alter table shop.orders add column more int;")
    shop.deploy(blank)
    (shop.folder / "migrations" / "0001_more.sql").unlink()
    with pytest.raises(DeployError, match=r"ahead of this version: it has 0001_more\.sql"):
        shop.deploy(blank)


def test_interrupted_concurrent_migration_is_resumed(blank: str, shop: SourceTree) -> None:
    shop.deploy(blank)
    execute(blank, "insert into shop.log values (1, 'twice'), (1, 'twice')")
    shop.migrate("0001_more.sql", "alter table shop.orders add column more int;")
    shop.migrate(
        "0002_notes.concurrent.sql",
        "create index concurrently if not exists log_by_note on shop.log (note);\n"
        "create unique index concurrently if not exists log_note_is_unique on shop.log (order_id, note);",
    )
    with pytest.raises(DeployError, match=r"0002_notes\.concurrent\.sql:2: could not create unique index"):
        shop.deploy(blank)
    unusable = "select indexrelid::regclass::text from pg_index where not indisvalid"
    assert fetch(blank, unusable) == [("shop.log_note_is_unique",)]
    execute(blank, "delete from shop.log")
    assert shop.deploy(blank).migrations == ["0002_notes.concurrent.sql"]
    assert fetch(blank, unusable) == []
    assert fetch(blank, "select count(*) from pg_indexes where tablename = 'log'") == [(2,)]
    assert shop.deploy(blank).outcome == "unchanged"


def test_procrastinates_migrations_that_wait_for_new_workers_come_one_deploy_later(
    blank: str, shop: SourceTree, tmp_path: Path
) -> None:
    shop.deploy(blank)
    newer = tmp_path / "newer"
    shutil.copytree(shop.source.procrastinate, newer)
    (newer / "migrations" / "09.00.00_01_pre_x.sql").write_text("create table procrastinate_pre ();")
    (newer / "migrations" / "09.00.00_50_post_x.sql").write_text("drop table procrastinate_pre;")
    source = replace(shop.source, procrastinate=newer, procrastinate_version="9.0.0")
    assert deploy(blank, source).migrations == ["09.00.00_01_pre_x.sql"]
    assert fetch(blank, "select count(*) from procrastinate.procrastinate_pre") == [(0,)]
    assert deploy(blank, source).migrations == ["09.00.00_50_post_x.sql"]
    assert deploy(blank, source).outcome == "unchanged"


# --- the order of locks ----------------------------------------------------------------------------------------------


def test_every_table_of_the_lock_order_exists(conn: Connection) -> None:
    assert [name for name in LOCK_ORDER if conn.execute("select to_regclass(%s)", (name,)).fetchone() == (None,)] == []
