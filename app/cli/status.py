"""`surety status`: problems, figures, and the next step."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from typing import Any

import click
import psycopg
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict
from rich.console import Console
from rich.table import Table

from app.cli.reading import CanceledOnStandby, connect_to_read, reads
from app.finding import Finding
from app.status_findings import RUNBOOK, VERDICTS, find_problems, verdict_of
from app.wording import count_noun, describe_mode, format_age
from db.connect import reader_conninfo
from db.errors import DatabaseNotReady, SettingsError, is_read_only, kind_of, message_of
from db.replication import PRIMARY_POSITION, REPLICA_POSITION, Position, ReplicaState, judge_replica
from db.settings import Settings, load_settings

STATEMENT_TIMEOUT = "30s"
REPLAY_SECONDS_MAX = 1.0
LOOK_SECONDS = 0.02
INVARIANT_VIEWS = (
    "select relname from pg_class where relnamespace = 'invariant'::regnamespace and relkind = 'v' order by relname"
)
CHECK_INVARIANT = """
select obj_description(%(view)s::regclass, 'pg_class'), count(subject), %(view)s from {}
"""


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print everything as one JSON object.")
@click.option("--check", is_flag=True, help="Also count the violations of every invariant, which reads every row.")
def status(as_json: bool, check: bool) -> None:
    """Report problems and the next step for each. Exit status: 0 good, 1 look, 2 act or not readable."""
    state: dict[str, Any] = {}
    try:
        settings = load_settings()
        address = settings.require("database_url").reveal()
        state = read_state()
        if (replica := check_replica(settings)) is not None:
            state["replica"] = replica
        if check:
            state["invariants"] = check_invariants()
        findings = [*find_missing_primary(state, address), *find_broken_invariants(state), *find_problems(state)]
    except (psycopg.Error, SettingsError, DatabaseNotReady, CanceledOnStandby) as error:
        findings = [finding_for_error(error)]
    urgency = verdict_of(findings)
    if as_json:
        documents = [finding._asdict() for finding in findings]
        click.echo(json.dumps({"verdict": VERDICTS[urgency].lower(), "findings": documents, **state}))
    else:
        print_status(Console(highlight=False, soft_wrap=True), state, findings, urgency)
    sys.exit(urgency)


@reads
def read_state() -> dict[str, Any]:
    """The status report of the database of DATABASE_URL. Raises psycopg.Error, SuretyError."""
    state: dict[str, Any] = {}
    with connect_to_read() as conn:
        conn.execute(f"set statement_timeout = '{STATEMENT_TIMEOUT}'")
        [(state,)] = conn.execute("select surety.read_status()").fetchall()
    return state


def check_replica(settings: Settings) -> ReplicaState | None:
    """The state of the replica for reads; None if the settings name none, or no primary answers for comparison."""
    address = reader_conninfo(settings)
    required = None if address is None else read_position()
    if address is None or required is None:
        return None
    until = time.monotonic() + REPLAY_SECONDS_MAX
    try:
        with psycopg.connect(address, autocommit=True) as conn:
            while True:
                [row] = conn.execute(REPLICA_POSITION).fetchall()
                state = judge_replica(required, row)
                if state != "behind" or time.monotonic() > until:
                    return state
                time.sleep(LOOK_SECONDS)
    except psycopg.Error:
        return "away"


def read_position() -> Position | None:
    """The primary's position; None if only a standby answers."""
    with connect_to_read() as conn:
        if conn.execute("select pg_is_in_recovery()").fetchone() == (True,):
            return None
        [row] = conn.execute(PRIMARY_POSITION).fetchall()
    return Position(*row)


def check_invariants() -> list[dict[str, Any]]:
    """Each invariant with the number of its violations. Raises psycopg.Error, SuretyError.

    On a standby, each invariant has a snapshot of its own: replay may cancel a long one.
    """
    checked = check_at_once()
    if checked is None:
        checked = [check_one(view) for view in list_invariants()]
    return [dict(zip(("name", "violations", "view"), row, strict=True)) for row in checked]


@reads
def check_at_once() -> list[tuple[Any, ...]] | None:
    """Name, violations and view of each invariant, by one snapshot; None on a standby."""
    with connect_to_read() as conn:
        if conn.execute("select pg_is_in_recovery()").fetchone() == (True,):
            return None
        return conn.execute("select name, violations, view_name from surety.check_invariants()").fetchall()


@reads
def list_invariants() -> list[str]:
    """The names of the views of the schema `invariant`."""
    with connect_to_read() as conn:
        return [view for (view,) in conn.execute(INVARIANT_VIEWS)]


@reads
def check_one(view: str) -> tuple[Any, ...]:
    """Name, violations and view of one invariant."""
    count = sql.SQL(CHECK_INVARIANT).format(sql.Identifier("invariant", view))
    with connect_to_read() as conn:
        [row] = conn.execute(count, {"view": f"invariant.{view}"}).fetchall()
    return row


def finding_for_error(
    error: psycopg.Error | SettingsError | DatabaseNotReady | CanceledOnStandby,
) -> Finding:
    """The reason why the status could not be read, and the next step."""
    if isinstance(error, CanceledOnStandby):
        return Finding("status-unreadable", 2, str(error), "run it again, or against the primary")
    if isinstance(error, SettingsError):
        return Finding("settings-invalid", 2, str(error).splitlines()[0], "correct the variable that the text names")
    if isinstance(error, DatabaseNotReady):
        return Finding("database-unreachable", 2, str(error), "the settings of the pooler, and DATABASE_URL")
    match kind_of(error):
        case "not_deployed":
            return Finding("not-deployed", 2, "this database has no Surety, or one of another version", "surety deploy")
        case "unreachable" if is_read_only(error):
            what = f"PostgreSQL is read-only: {message_of(error)}"
            return Finding("database-unreachable", 2, what, "DATABASE_URL, and default_transaction_read_only")
        case "unreachable":
            what = f"PostgreSQL can't be reached: {message_of(error)}"
            return Finding("database-unreachable", 2, what, "the server, its log, and DATABASE_URL")
    return Finding(
        "status-unreadable", 2, f"PostgreSQL refused the query: {message_of(error)}", "the server and its log"
    )


def find_missing_primary(state: dict[str, Any], address: str) -> Iterator[Finding]:
    """No primary among several hosts. An address of a standby alone is one to read from."""
    hosts = str(conninfo_to_dict(address).get("host") or "")
    if state["replication"]["replayed_seconds"] is not None and "," in hosts:
        what = "no server of DATABASE_URL is the primary: nothing is accepted or handled; this is read from a standby"
        yield Finding("no-primary", 2, what, "wait a minute for a failover, then the servers and their cluster manager")


def find_broken_invariants(state: dict[str, Any]) -> list[Finding]:
    """The invariants that do not hold, if they were checked."""
    return [
        Finding(
            "invariant-violated",
            2,
            f"{count_noun(found['violations'], 'violation')} of: {found['name']}",
            f"select * from {found['view']}",
        )
        for found in state.get("invariants", [])
        if found["violations"]
    ]


def print_status(console: Console, state: dict[str, Any], findings: list[Finding], urgency: int) -> None:
    """Print the verdict, the findings, the figures and the next step."""
    console.print(
        f"{VERDICTS[urgency]:<6} {findings[0].what if findings else 'all is well'}", style="bold", markup=False
    )
    for finding in findings[1:]:
        console.print(f"       {finding.what}", markup=False)
    if state:
        print_state(console, state)
    if findings:
        console.print(f"next: {findings[0].next}", markup=False)
        console.print(f"more: heading {findings[0].id} of {RUNBOOK}, in Surety's source", markup=False)


def print_state(console: Console, state: dict[str, Any]) -> None:
    """The figures behind the verdict."""
    table = Table(box=None, pad_edge=False)
    table.add_column("handler")
    for heading in ("backlog", "oldest", "retries due", "suspects", "dead"):
        table.add_column(heading, justify="right")
    for handler in state["handlers"]:
        table.add_row(
            handler["handler"] + (" (paused)" if handler["is_paused"] else ""),
            str(handler["backlog"]),
            format_age(handler["oldest_seconds"]) if handler["oldest_seconds"] is not None else "–",
            *(str(handler[name]) for name in ("retries_due", "suspects", "dead")),
        )
    console.print(table)
    workers, unknown = state["workers"], state["unknown"]
    lines = [
        ("mode", describe_mode(state["livemode"])),
        ("workers", f"{workers['alive']} alive" + (f", {workers['silent']} silent" if workers["silent"] else "")),
        ("providers", " · ".join(map(describe_provider, state["providers"])) or "not called yet"),
    ]
    lines += [("key", describe_key(key)) for key in state["keys"]]
    lines.append(("synchronous standby", describe_replication(state)))
    lines += [("replica for reads", state["replica"])] if "replica" in state else []
    if unknown["count"]:
        lines.append(("unknown outcomes", f"{unknown['count']}, the oldest {format_age(unknown['oldest_seconds'])}"))
    lines += [("refused", describe_refusals(refused)) for refused in state["refusals"]]
    lines += [("limited", describe_limited_merchant(limited)) for limited in state["limited_merchants"]]
    lines += [("waiting", describe_waiting_events(waiting)) for waiting in state["waiting_events"]]
    if unfinished := state["unfinished"]:
        lines.append((
            "oldest unfinished payment",
            f"{unfinished['id']}  {format_age(unfinished['seconds'])}, {unfinished['state']}",
        ))  # fmt: skip
    seen: set[str] = set()
    for holder in state["holders"]:
        if holder["kind"] not in seen:
            seen.add(holder["kind"])
            lines.append((f"oldest {holder['kind']}", describe_vacuum_blocker(holder)))
    if not state["sees_all"]:
        lines.append(
            ("oldest transaction", "those of other logins are hidden: grant pg_read_all_stats to surety_owner")
        )
    if "invariants" in state:
        lines.append(("invariants", f"{len(state['invariants'])} checked"))
    for name, text in lines:
        console.print(f"{name}  {text}", markup=False)


def describe_waiting_events(waiting: dict[str, Any]) -> str:
    """2 events, the oldest for 3 min: the provider asks for a later repetition."""
    count = count_noun(waiting["count"], "event")
    return f"{count}, the oldest for {format_age(waiting['seconds'])}: {waiting['meaning']}"


def describe_refusals(refused: dict[str, Any]) -> str:
    """API keys: 3 unauthenticated this hour, 41 in 24 h, by keys of ours."""
    what = {"webhook": "webhooks", "denied": "API keys", "limited": "by rate limit"}[refused["kind"]]
    known = ", by keys of ours" if refused["is_known_key"] else ""
    return f"{what}: {refused['hour_count']} {refused['reason']} this hour, {refused['day_count']} in 24 h{known}"


def describe_limited_merchant(limited: dict[str, Any]) -> str:
    """Acme Books (mer_1…): 12 requests refused this hour, 40 in 24 h."""
    counts = f"{count_noun(limited['hour_count'], 'request')} refused this hour, {limited['day_count']} in 24 h"
    return f"{limited['name']} ({limited['merchant_id']}): {counts}"


def describe_key(key: dict[str, Any]) -> str:
    """Test key at stripe, restricted, of acct_1…, checked 3 min ago; a live key at stripe, not checked yet."""
    kind = f"{'live' if key['livemode'] else 'test'} key at {key['provider']}"
    parts = [kind, *(["restricted"] if key["is_restricted"] else [])]
    parts.append(f"of {key['other_account_id'] or key['account_id'] or 'an unknown account'}")
    checked = key["checked_seconds"]
    parts.append(f"checked {format_age(checked)} ago" if checked is not None else "not checked yet")
    return ", ".join(parts) + (f"; the last check failed: {key['error']}" if key["error"] else "")


def describe_provider(provider: dict[str, Any]) -> str:
    """Stripe healthy (0.4 % errors); stripe refused for 3 min (1 of 7 accounts), 41 held, next probe in 12 s."""
    share = f" ({provider['error_share'] * 100:.1f} % errors)" if provider["error_share"] is not None else ""
    words = [
        f"{word} for {format_age(provider[seconds])}"
        + (f" ({provider[count]} of {provider['accounts']} accounts)" if provider["accounts"] > 1 else "")
        for word, count, seconds in (
            ("refused", "refused", "refused_seconds"),
            ("unreachable", "open", "open_seconds"),
        )
        if provider[count]
    ]
    if not words:
        return f"{provider['provider']} healthy{share}"
    probe = max(0.0, provider["probe_seconds"] or 0.0)
    return f"{provider['provider']} {', '.join(words)}, {provider['held']} held, next probe in {format_age(probe)}"


def describe_replication(state: dict[str, Any]) -> str:
    """None; this is a standby; standby_1, 1 of 1 present; ANY 1 (a, b), 0 of 1 present, 3 commits wait."""
    replication = state["replication"]
    if replication["replayed_seconds"] is not None:
        return f"this is a standby; its last commit is {format_age(replication['replayed_seconds'])} old"
    if not replication["names"]:
        return "none: a failover may lose the last commits"
    if not state["sees_all"]:
        return f"{replication['names']}, hidden: grant pg_read_all_stats to surety_owner"
    waiting = f", {count_noun(replication['waiting'], 'commit')} under way" if replication["waiting"] else ""
    return f"{replication['names']}, {replication['present']} of {replication['needed']} present{waiting}"


def describe_vacuum_blocker(holder: dict[str, Any]) -> str:
    """12 ms, surety-worker in surety, holds back 3 transactions."""
    where = f" in {holder['database']}" if holder["database"] else ""
    parts = [format_age(holder["seconds"])] if holder["seconds"] is not None else []
    parts.append(f"{holder['name']}{where}")
    if holder["xids"] is not None:
        parts.append(f"holds back {holder['xids']} transactions")
    return ", ".join(parts)
