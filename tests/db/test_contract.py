"""Definitions in SQL and in Python agree: documents and structs, rows and literals, functions and calls."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import msgspec
import msgspec.inspect
import psycopg
import pytest

from app.api.create_payment import CREATE_PAYMENTS
from app.api.openapi import openapi_document
from app.api.routes import ROUTES
from app.api.schemas.events import Event, EventList
from app.api.schemas.payments import (
    CaptureMethod,
    Payment,
    PaymentList,
    PaymentRequest,
    State,
    Status,
    Trace,
    TraceEntry,
)
from app.api.schemas.refunds import RefundStatus
from app.receiver import RECEIVE_WEBHOOKS, WebhookRequest
from app.web.problems import PROBLEM_BY_SQLSTATE, PROBLEM_TYPES, RULE_BY_CONSTRAINT
from app.web.routing import Route
from app.web.validation import violation_checker
from db import BEHAVIOUR_FILES
from db.connect import ProcessKind, role_of
from db.deploy.source import VersionFiles
from jobs import app
from jobs.circuit_breaker import circuit_key
from jobs.handlers.calls import Verdict
from jobs.handlers.table import HANDLER_TABLE
from tests.support.http_client import connect_as_owner
from tests.support.payments import Connection, add_merchant, create, request

ROOT = Path(__file__).parent.parent.parent
SQL = {name: (ROOT / "db" / "sql" / f"{name}.sql").read_text(encoding="utf-8") for name in BEHAVIOUR_FILES}
CALL = re.compile(r"\b((?:surety|api|outbox|audit|ledger)\.[a-z_]+)\(")


@pytest.fixture(scope="module")
def owner(module_database: str) -> Iterator[Connection]:
    with connect_as_owner(module_database) as conn:
        yield conn


@pytest.fixture(scope="module")
def key(owner: Connection) -> bytes:
    return add_merchant(owner)[1]


@pytest.fixture(scope="module")
def document(owner: Connection, key: bytes) -> dict[str, Any]:
    """A payment's document, as the database renders it."""
    [row] = create(owner, [request(key, customer={"email": "a@b.c"}, metadata={"cart": "9"})])
    shown: dict[str, Any] = msgspec.json.decode(row["body"])
    return shown


def one(conn: Connection, query: str, *values: Any) -> Any:
    row = conn.execute(query.encode(), values).fetchone()
    assert row is not None
    return row[0]


def column(conn: Connection, query: str) -> list[Any]:
    return [value for (value,) in conn.execute(query.encode()).fetchall()]


def names(struct: type[msgspec.Struct]) -> list[str]:
    return [field.encode_name for field in msgspec.structs.fields(struct)]


def called(*folders: str) -> dict[str, set[str]]:
    """The functions of ours that Python calls, each with the files that call it."""
    found: dict[str, set[str]] = {}
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*.py")):
            for function in CALL.findall(path.read_text(encoding="utf-8")):
                found.setdefault(function, set()).add(str(path.relative_to(ROOT)))
    return found


def test_payment_schema_matches_the_database(document: dict[str, Any]) -> None:
    assert list(document) == names(Payment)
    assert msgspec.convert(document, Payment).metadata == {"cart": "9"}


def test_list_and_trace_schemas_match_the_database(owner: Connection, key: bytes, document: dict[str, Any]) -> None:
    listed = one(owner, "select body::json from api.list_payments(%s, null, null, null, null, null, 20, null)", key)
    happened = one(owner, "select body::json from api.list_events(%s, null, 20)", key)
    traced = one(owner, "select body::json from api.get_trace(%s, %s)", key, document["id"])
    for shown, struct in ((listed, PaymentList), (happened, EventList), (traced, Trace)):
        assert list(shown) == names(struct)
        msgspec.convert(shown, struct)
    assert list(happened["data"][0]) == names(Event)
    assert list(traced["entries"][0]) == names(TraceEntry)
    assert listed["data"] == [happened["data"][0]["data"]] == [traced["payment"]] == [document]


@pytest.mark.parametrize(
    "route", [route for route in ROUTES if route.body and route.method != "DELETE"], ids=lambda route: route.name
)
def test_openapi_says_that_unknown_fields_of_bodies_are_refused(route: Route) -> None:
    schemas = openapi_document(ROUTES)["components"]["schemas"]
    assert route.body is not None
    waiting, seen = [route.body], set[type]()
    while waiting:
        struct = waiting.pop()
        seen.add(struct)
        rules = {violation.rule for violation in violation_checker(struct)({"not_a_field": 1})}
        assert ("known" in rules) == (schemas[struct.__name__].get("additionalProperties") is False), struct
        assert "known" in rules
        with pytest.raises(msgspec.ValidationError):
            msgspec.json.decode(b'{"not_a_field": 1}', type=struct)
        kind = msgspec.inspect.type_info(struct)
        assert isinstance(kind, msgspec.inspect.StructType)
        parts = [part for field in kind.fields for part in parts_of(field.type)]
        waiting += [part.cls for part in parts if isinstance(part, msgspec.inspect.StructType) and part.cls not in seen]


def parts_of(kind: Any) -> list[Any]:
    """A type and the alternatives of a union."""
    return list(kind.types) if isinstance(kind, msgspec.inspect.UnionType) else [kind]


def test_states_and_statuses_match_the_database(owner: Connection) -> None:
    assert list(get_args(State)) == column(owner, "select state from surety.states order by position")
    assert set(get_args(Status)) == set(
        column(
            owner,
            "select surety.payment_status(status, rail) from surety.states, (values ('card'), ('ach')) as r (rail)",
        )
    )


def test_refund_states_match_the_database(owner: Connection) -> None:
    states = column(owner, "select state from surety.refund_states order by position")
    assert list(get_args(RefundStatus)) == states


def test_capture_methods_match_the_database(owner: Connection) -> None:
    methods = column(owner, "select distinct capture_method from surety.mandatory_steps where rail = 'card'")
    assert set(get_args(CaptureMethod)) == set(methods)


def test_event_types_in_the_sql_sources_are_the_rows_of_event_types(owner: Connection) -> None:
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "db" / "sql").rglob("*.sql")]
    prefixes = {prefix for text in sources for prefix in re.findall(r"'(\w+\.)' \|\| \w+\.(?:to_)?stat", text)}
    assert prefixes == {"payment.", "refund.", "dispute."}, "types that are composed come from tables"
    composed = {f"payment.{state}" for state in column(owner, "select state from surety.states")}
    composed |= {f"refund.{state}" for state in column(owner, "select state from surety.refund_states")}
    composed |= {f"dispute.{status}" for status in column(owner, "select status from surety.dispute_statuses")}
    written = {
        type
        for text in sources
        for type in re.findall(r"'((?:payment|refund|dispute|customer|webhook|merchant_payout)\.\w+)'", text)
    }
    # Names of labels are composed alike.
    written -= {"customer.email", "customer.id"}
    assert written | composed == set(column(owner, "select type from outbox.event_types"))


def test_emitted_events_have_a_merchant_if_their_type_is_for_merchants(owner: Connection, key: bytes) -> None:
    with owner.transaction(force_rollback=True):
        owner.execute(
            "select outbox.emit_event('payment', 'pay_test', type, '{}', merchants.id, 1)"
            " from outbox.event_types, surety.merchants"
        )
        emitted = owner.execute(
            "select type, is_for_merchants, merchant_id is not null"
            " from outbox.events join outbox.event_types using (type) where aggregate_id = 'pay_test'"
        ).fetchall()
    assert len(emitted) > 30
    assert [row for row in emitted if row[1] != row[2]] == []


@pytest.mark.parametrize(
    ("statement", "refusal"),
    [
        ("select outbox.emit_event('payment', 'pay_test', 'payment.initated', '{}', null, 1)", "SU007"),
        ("select outbox.schedule_handlers('{submit,sumbit}')", "SU004"),
        ("insert into outbox.handler_events values ('sumbit', 'payment.initiated')", "23503"),
        ("insert into outbox.handler_events values ('submit', 'payment.initated')", "23503"),
    ],
)
def test_misspelt_event_type_or_handler_is_an_error(owner: Connection, statement: str, refusal: str) -> None:
    with pytest.raises(psycopg.Error) as refused:
        owner.execute(statement.encode())
    assert refused.value.sqlstate == refusal


def test_handlers_in_sql_and_python_sources_exist(owner: Connection) -> None:
    sources = [
        path.read_text(encoding="utf-8")
        for folder in ("app", "jobs", "db")
        for path in (ROOT / folder).rglob("*.*")
        if path.suffix in {".py", ".sql"}
    ]
    calls = [found for text in sources for found in re.findall(r"schedule_handlers\('\{([\w,]+)\}'\)", text)]
    scheduled = {handler for call in calls for handler in call.split(",")}
    assert scheduled
    assert scheduled <= set(column(owner, "select handler from outbox.handlers"))


def test_handler_table_matches_the_database(owner: Connection) -> None:
    rows = owner.execute("select handler, event_types from outbox.list_handlers()").fetchall()
    assert {row.name: sorted(row.events) for row in HANDLER_TABLE} == {name: sorted(types) for name, types in rows}
    assert [row.function for row in HANDLER_TABLE if one(owner, "select to_regproc(%s)", row.function) is None] == []
    calling = column(owner, "select handler from outbox.handlers where calls_provider")
    beginning = {"surety.begin_calls", "surety.begin_customer_calls"}
    assert {row.name for row in HANDLER_TABLE if row.function in beginning} == set(calling)


def test_worker_has_room_for_all_batches_at_once(owner: Connection) -> None:
    batches = one(owner, "select sum(batches_at_once) from outbox.handlers")
    assert app.worker_defaults["concurrency"] > batches


def test_verdicts_match_the_database(owner: Connection) -> None:
    verdicts = column(owner, "select verdict from surety.call_verdicts")
    assert sorted(get_args(Verdict)) == sorted(verdicts)
    planned = SQL["provider/calls"].partition("create or replace function surety.begin_calls")[0]
    given = set(re.findall(r"(?:then|else) '(\w+)'", planned))
    assert given == set(verdicts)


def test_trace_entry_kinds_cover_all_audit_kinds(owner: Connection) -> None:
    written = one(
        owner, "select pg_get_constraintdef(oid) from pg_constraint where conname = 'entry_kind_is_known' limit 1"
    )
    kinds = set(re.findall(r"'(\w+)'", written)) - {"answer", "dead_letter"}
    sources = one(
        owner, "select pg_get_constraintdef(oid) from pg_constraint where conname = 'fact_source_is_known' limit 1"
    )
    kinds |= set(re.findall(r"'(\w+)'", sources)) - {"response"} | {"transfer"}
    of_no_payment = {"denied", "system"}
    assert set(get_args(msgspec.structs.fields(TraceEntry)[1].type)) == kinds - of_no_payment


@pytest.mark.parametrize(
    ("struct", "function"), [(PaymentRequest, "api.create_payments"), (WebhookRequest, "surety.receive_webhooks")]
)
def test_request_has_the_fields_that_its_sql_function_reads(
    owner: Connection, struct: type[msgspec.Struct], function: str
) -> None:
    source = one(owner, "select prosrc from pg_proc where oid = %s::regproc", function)
    recordset = re.search(r"jsonb?_to_recordset\(p_\w+\) as \w+ \(([^)]+)\)", source)
    assert recordset
    read = [column.split()[0] for column in recordset[1].split(",")]
    assert sorted(set(names(struct)) | {"request_id"}) == sorted({*read, "request_id"})


@pytest.mark.parametrize(
    ("statement", "function"), [(CREATE_PAYMENTS, "api.create_payments"), (RECEIVE_WEBHOOKS, "surety.receive_webhooks")]
)
def test_batched_statement_reads_every_column_of_its_sql_function(
    owner: Connection, statement: bytes, function: str
) -> None:
    returned = one(
        owner,
        "select proargnames[array_position(proargmodes, 't') :] from pg_proc where oid = %s::regproc",
        function,
    )
    read = re.search(r"select (.+) from", statement.decode())
    assert read
    assert read[1].split(", ") == returned


@pytest.mark.parametrize(
    ("kind", "files"),
    [("api", "app/(api|web)/[a-z_/]+.py"), ("webhook", "app/receiver.py")],
)
def test_process_role_may_execute_every_function_it_calls(owner: Connection, kind: ProcessKind, files: str) -> None:
    functions = {name for name, places in called("app").items() if any(re.fullmatch(files, place) for place in places)}
    assert functions
    denied = [
        name
        for name in sorted(functions)
        if not one(owner, "select has_function_privilege(%s, %s::regproc, 'execute')", role_of(kind), name)
    ]
    assert denied == []


def test_every_function_that_is_called_exists(owner: Connection) -> None:
    missing = {
        name: sorted(places)
        for name, places in called("app", "jobs", "db").items()
        if one(owner, "select to_regproc(%s)", name) is None
    }
    assert missing == {}


def test_every_function_has_its_contract_as_a_comment(owner: Connection) -> None:
    missing = owner.execute(
        "select p.oid::regprocedure::text from pg_proc as p join pg_namespace as n on n.oid = p.pronamespace"
        " where n.nspname = any(%s) and coalesce(obj_description(p.oid, 'pg_proc'), '') = '' order by 1",
        (VersionFiles.installed().schemas,),
    ).fetchall()
    assert missing == []


def test_every_constraint_is_a_rule_or_listed_as_a_bug(owner: Connection) -> None:
    claims = set(
        column(
            owner,
            "select k.conname from pg_constraint as k join pg_namespace as n on n.oid = k.connamespace"
            " where n.nspname in ('surety', 'ledger', 'outbox', 'audit', 'api', 'report', 'invariant')"
            " and k.contype not in ('n', 't', 'p') and k.conparentid = 0 and k.conislocal",
        )
    )
    bugs = (ROOT / "tests" / "db" / "internal_constraints.txt").read_text(encoding="utf-8").split()
    assert bugs == sorted(set(bugs))
    assert not RULE_BY_CONSTRAINT.keys() & set(bugs)
    assert claims == RULE_BY_CONSTRAINT.keys() | set(bugs)


def test_circuit_key_is_the_same_in_sql_and_python(owner: Connection) -> None:
    assert one(owner, "select surety.circuit_key('stripe', 'acct_1')") == circuit_key("acct_1")


def test_every_own_sqlstate_has_a_problem_type_with_a_page() -> None:
    raised = {state for text in SQL.values() for state in re.findall(r"\bSU\d{3}\b", text)}
    assert raised <= PROBLEM_BY_SQLSTATE.keys()
    assert {state for state in PROBLEM_BY_SQLSTATE if state.startswith("SU")} <= raised
    assert set(PROBLEM_BY_SQLSTATE.values()) <= PROBLEM_TYPES.keys()


def test_constraint_violation_is_reported_as_its_rule(owner: Connection, key: bytes) -> None:
    for fields, constraint in (
        ({"reference": "r" * 256}, "payment_reference_is_short"),
        ({"description": "d" * 1001}, "payment_description_is_short"),
        ({"statement_descriptor_suffix": "s" * 23}, "payment_descriptor_suffix_is_short"),
        ({"return_url": "u" * 2049}, "payment_return_url_is_short"),
        ({"return_url": None}, "payment_returns_its_payer"),
        ({"authentication": "later"}, "payment_authentication_is_known"),
        ({"authentication": "script"}, "payment_by_script_keeps_its_payer"),
        ({"authentication": "script", "return_url": None, "off_session": True}, "payment_by_script_keeps_its_payer"),
        ({"metadata": []}, "payment_metadata_is_an_object"),
        ({"capture_method": "later"}, "payment_rail_has_a_path"),
        ({"idempotency_key": "é"}, "idempotency_key_is_printable"),
    ):
        with pytest.raises(psycopg.errors.CheckViolation) as refused:
            create(owner, [request(key, **fields)])
        assert refused.value.diag.constraint_name == constraint
        assert constraint in RULE_BY_CONSTRAINT


def test_routes_in_the_sql_sources_are_rows_of_the_table_of_routes() -> None:
    routes = {route.name for route in ROUTES}
    named = {name for text in SQL.values() for name in re.findall(r"'((?:GET|POST|DELETE) /v1/[^']+)'", text)}
    assert named == {row.name for row in ROUTES if "idempotency-key-missing" in row.problems or row.is_secret}
    assert len(routes) == len(ROUTES), "two routes have one name"


def test_every_type_of_problem_is_given_by_the_code() -> None:
    tables = {"openapi.py", "routes.py"}
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "app").rglob("*.py") if path.name not in tables]
    text = re.sub(r'"[a-z-]+": ProblemDefinition', "", "\n".join([*sources, *SQL.values()]))
    assert {name for name in PROBLEM_TYPES if not re.search(rf"""["']{name}["']""", text)} == set()


def test_every_problem_of_a_route_has_a_page() -> None:
    assert {name for route in ROUTES for name in route.problems} <= PROBLEM_TYPES.keys()


def test_lists_and_balance_have_the_fields_that_the_table_of_routes_declares(owner: Connection, key: bytes) -> None:
    documents = {
        "/v1/payments": one(
            owner, "select body::json from api.list_payments(%s, null, null, null, null, null, 20, null)", key
        ),
        "/v1/refunds": one(owner, "select body::json from api.list_refunds(%s, null, 20, null)", key),
        "/v1/disputes": one(owner, "select body::json from api.list_disputes(%s, null, 20, null)", key),
        "/v1/balance": one(owner, "select body::json from api.get_balance(%s)", key),
        "/v1/balance/transactions": one(
            owner, "select body::json from api.list_balance_transactions(%s, null, 20, null)", key
        ),
        "/v1/statements": one(owner, "select body::json from api.get_statement(%s, '2020-01-01', 20, null)", key),
        "/v1/events": one(owner, "select body::json from api.list_events(%s, null, 20)", key),
    }
    answers = {route.path: route.answers[200] for route in ROUTES if route.method == "GET" and "{" not in route.path}
    for path, document in documents.items():
        assert list(document) == names(answers[path]), path
        msgspec.convert(document, answers[path])
