"""Findings: the problems in a status report of surety.read_status(), and the next step for each.

`surety status` and GET /v1/operator/status report the same findings.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import Any

from app.finding import Finding, FindingId
from app.replication_findings import (
    are_commits_waiting,
    find_publication_problems,
    find_replication_problems,
    find_restore,
)
from app.wording import count_noun, format_age
from db.replication import REPLICA_PROBLEMS

BACKLOG_SECONDS_MAX = 300
TRANSACTION_SECONDS_MAX = 600
UNKNOWN_SECONDS_MAX = 300
VACUUM_BLOCKER_XIDS_MAX = 100_000_000
SLOT_BYTES_MAX = 1_000_000_000
PARTITIONS_DAYS_MIN = 21
ACCESS_REFUSED_SECONDS_MAX = 45
REFUSALS_NAMED_MAX = 5
WAITING_SECONDS_MAX = 600
WAITING_URGENT_SECONDS_MAX = 3600
JOB_FAILING_SECONDS_MAX = 600
LIST_UNREADABLE_SECONDS_MAX = 900
URGENT_SECONDS_MAX = 3600
POLLED_EVENTS_MIN = 3
WEBHOOKS_MISSING_SECONDS_MAX = 300
OVERDUE_URGENT_SECONDS_MAX = 86_400
EXPIRES_URGENT_SECONDS = 86_400
TAKEOVER_SECONDS = 60
SIGNATURE_REFUSALS = frozenset({"wrong-signature", "old-signature"})
VERDICTS = ("GOOD", "LOOK", "ACT")
RUNBOOK = "docs/operations.md"


def find_problems(state: dict[str, Any]) -> list[Finding]:
    """The problems of a status report, the most urgent first."""
    found = [
        *find_replication_problems(state),
        *find_publication_problems(state["publication"]),
        *find_work_problems(state),
        *find_money_problems(state),
        *find_refused_accounts(state),
        *find_refused_calls(state),
        *find_refused_payments(state),
        *find_held_payments(state),
        *find_waiting_events(state),
        *find_key_problems(state),
        *find_expiring_keys(state),
        *find_overdue_jobs(state),
        *find_unreadable_lists(state),
        *find_silent_webhooks(state),
        *find_overdue_objects(state),
        *(
            finding
            for holder in state["holders"]
            if (finding := find_vacuum_blocker(holder, are_commits_waiting=are_commits_waiting(state)))
        ),
        *(finding for provider in state["providers"] if (finding := find_provider_problem(provider))),
    ]
    found += find_restore(state)
    if days_ahead(state) < PARTITIONS_DAYS_MIN:
        found.append(Finding("partitions-run-out", 2, "partitions run out", "select surety.maintain_partitions()"))
    if problem := REPLICA_PROBLEMS.get(state.get("replica", "ok")):
        found.append(Finding("replica-unusable", 1, f"the replica for reads {problem}", "SURETY_READER_DATABASE_URL"))
    return sorted(found, key=lambda finding: -finding.urgency)


def find_missing_worker(state: dict[str, Any], *, has_work: bool) -> Finding | None:
    """No live worker. A server that has just taken over, or commits that wait, are no sign of that."""
    if state["workers"]["alive"] or are_commits_waiting(state):
        return None
    start = "procrastinate --app jobs.app worker"
    primary_seconds = state["replication"]["primary_seconds"]
    if primary_seconds is not None and primary_seconds < TAKEOVER_SECONDS and state["workers"]["silent"]:
        what = f"the database took over {format_age(primary_seconds)} ago, and no worker has reported since"
        return Finding("no-worker", 1, what, f"wait a minute, then {start}")
    return Finding("no-worker", 2 if has_work else 1, "no worker is alive", start)


def find_work_problems(state: dict[str, Any]) -> Iterator[Finding]:
    """Missing workers, backlogs, paused handlers, dead letters."""
    waiting = [handler for handler in state["handlers"] if handler["backlog"]]
    if finding := find_missing_worker(state, has_work=bool(waiting)):
        yield finding
    for handler in waiting:
        if (handler["oldest_seconds"] or 0) > BACKLOG_SECONDS_MAX:
            what = f"{handler['handler']} is {format_age(handler['oldest_seconds'])} behind"
            yield Finding("handler-behind", 2, what, "more workers, or their logs")
    for handler in state["handlers"]:
        if handler["is_paused"]:
            resume = f'surety handlers resume {handler["handler"]} --reason "…"'
            yield Finding("handler-paused", 1, f"{handler['handler']} is paused", resume)
    letters = state["dead_letters"]
    if letters["open"]:
        oldest = format_age(letters["oldest_seconds"])
        what = f"{count_noun(letters['open'], 'dead letter')}; the oldest has waited {oldest}"
        yield Finding("dead-letters", 1, what, f"surety dead-letters show {letters['first']}")


def find_money_problems(state: dict[str, Any]) -> Iterator[Finding]:
    """Open discrepancies, and calls with an unknown outcome."""
    differing = state["discrepancies"]
    if critical := differing["critical"]:
        what = f"{count_noun(critical, 'critical discrepancy', 'critical discrepancies')}: {differing['first']}"
        yield Finding("critical-discrepancies", 2, what, f"surety discrepancies show {differing['first_id']}")
    elif opened := differing["open"]:
        what = f"{count_noun(opened, 'discrepancy', 'discrepancies')}, the first {differing['first']}"
        yield Finding("discrepancies", 1, what, f"surety discrepancies show {differing['first_id']}")
    unknown = state["unknown"]
    if unknown["count"] and unknown["oldest_seconds"] > UNKNOWN_SECONDS_MAX:
        what = (
            f"{count_noun(unknown['count'], 'unknown outcome')}, the oldest for {format_age(unknown['oldest_seconds'])}"
        )
        yield Finding("unknown-outcomes", 1, what, f"surety trace {unknown['first']}")


def find_refused_accounts(state: dict[str, Any]) -> Iterator[Finding]:
    """Our key, or accounts, that the provider refuses."""
    refused = state["refused_accounts"]
    for one in refused[:REFUSALS_NAMED_MAX]:
        names = ", ".join(one["merchants"] or [])
        subject = "our key" if one["is_key"] else f"account {one['account']} ({names})"
        what = f"{one['provider']} has refused {subject} for {format_age(one['seconds'])}: {one['reason']}; "
        what += f"{count_noun(one['held'], 'event')} held"
        next_step = (
            "set STRIPE_API_KEY to a valid key, restart the workers; what waits goes on by itself"
            if one["is_key"]
            else "let the merchant connect its account again, or suspend it: surety merchants list"
        )
        yield Finding("access-refused", 2, what, next_step)
    if len(refused) > REFUSALS_NAMED_MAX:
        more = count_noun(len(refused) - REFUSALS_NAMED_MAX, "more account")
        yield Finding("access-refused", 2, f"{more} refused", "select * from surety.list_refused_accounts()")


def find_refused_calls(state: dict[str, Any]) -> Iterator[Finding]:
    """Calls that the provider refuses although it accepts our key and the account: a permission is missing."""
    refused = [
        (waiting["account"], f"{waiting['error']}; {count_noun(waiting['count'], 'event')} waiting", waiting["seconds"])
        for waiting in state["waiting_events"]
        if waiting["finding"] == "access-refused" and waiting["seconds"] > ACCESS_REFUSED_SECONDS_MAX
    ]
    refused += [
        (failing["account"], f"{failing['error']}; the list {failing['list']}", failing["seconds"])
        for failing in state["unreadable_lists"]
        if failing["is_refused"]
    ]
    next_step = "give the key the permission; what waits goes on by itself"
    for account, detail, seconds in refused[:REFUSALS_NAMED_MAX]:
        whose = f"account {account}" if account else "the platform's account"
        what = f"the provider has refused calls for {whose} for {format_age(seconds)}: {detail}"
        yield Finding("access-refused", 2, what, next_step)
    if len(refused) > REFUSALS_NAMED_MAX:
        more = count_noun(len(refused) - REFUSALS_NAMED_MAX, "more refusal")
        yield Finding("access-refused", 2, f"{more} of calls", next_step)


def find_refused_payments(state: dict[str, Any]) -> Iterator[Finding]:
    """Accounts at which the provider refuses most new payments: each fails by itself, so no other finding shows it."""
    for one in state["refused_payments"]:
        whose = f"account {one['account']}" if one["account"] else "the platform's account"
        what = f"{one['provider']} refused {one['refused']} of the last {count_noun(one['answered'], 'payment')}"
        what += f" of {whose}, since {format_age(one['seconds'])} ago: {one['error']}"
        yield Finding("refused-payments", 2, what, f"surety trace {one['payment_id']}")


def find_held_payments(state: dict[str, Any]) -> Iterator[Finding]:
    """Payments that a velocity rule holds until an operator decides."""
    holds = state["holds"]
    if not holds["open"]:
        return
    what = f"{count_noun(holds['open'], 'payment')} on hold, the oldest for {format_age(holds['oldest_seconds'])}; "
    what += f"{holds['first']} is canceled in {format_age(max(0, holds['expires_seconds']))}"
    urgency = 2 if holds["expires_seconds"] < EXPIRES_URGENT_SECONDS else 1
    yield Finding("held-payments", urgency, what, f"surety holds show {holds['first']}")


def find_waiting_events(state: dict[str, Any]) -> Iterator[Finding]:
    """Events that are given back uncounted for long, by cause. Those of other findings are left out."""
    for waiting in state["waiting_events"]:
        if waiting["finding"] != "waiting-events" or waiting["seconds"] <= WAITING_SECONDS_MAX:
            continue
        what = f"{count_noun(waiting['count'], 'event')} waiting, the oldest for {format_age(waiting['seconds'])}: "
        what += waiting["meaning"]
        payment_id = waiting["payment_id"]
        next_step = f"surety trace {payment_id}" if payment_id else "select * from surety.list_waiting_events()"
        yield Finding("waiting-events", 2 if waiting["seconds"] > WAITING_URGENT_SECONDS_MAX else 1, what, next_step)


def find_key_problems(state: dict[str, Any]) -> Iterator[Finding]:
    """Permissions that the provider's key lacks, and a merchant that has the platform's own account as its own."""
    for key in state["keys"]:
        if key["missing_permissions"]:
            what = f"the key at {key['provider']} lacks {', '.join(key['missing_permissions'])}"
            what += f", since {format_age(key['missing_seconds'])}"
            yield Finding(
                "key-permissions", 2, what, f"give the key these permissions in {key['provider']}'s dashboard"
            )
        if other := key["other_account_id"]:
            what = f"the key at {key['provider']} is one of {other}, but this database's account is {key['account_id']}"
            next_step = f"set STRIPE_API_KEY to a key of {key['account_id']}, restart the workers"
            yield Finding("key-of-another-account", 2, what, next_step)
        if merchant := key["merchant_on_own_account"]:
            what = f"{merchant} has the platform's own account as its own: its money is booked twice"
            yield Finding("merchant-on-own-account", 2, what, f"surety merchants suspend {merchant}")


def find_expiring_keys(state: dict[str, Any]) -> Iterator[Finding]:
    """Keys that expire within two weeks and have no successor."""
    if not (expiring := state["expiring_keys"]):
        return
    first = expiring[0]
    urgency = 2 if first["seconds"] < EXPIRES_URGENT_SECONDS else 1
    if first["operator"] is None:
        shown, holder, given = f"{first['name']}, …{first['hint']}", first["merchant_id"], "merchant"
    else:
        shown, holder, given = f"…{first['hint']}", f"operator {first['operator']}", "operator"
    what = f"{first['id']} ({shown}) of {holder} expires in "
    what += format_age(first["seconds"])
    if len(expiring) > 1:
        what += f", {count_noun(len(expiring) - 1, 'more key')} within 14 days"
    yield Finding("expiring-keys", urgency, what, f"surety keys rotate {first['id']}, and give the {given} the new key")


def find_overdue_jobs(state: dict[str, Any]) -> Iterator[Finding]:
    """Periodic jobs that fail, or that have not run although a worker is alive."""
    for job in state["overdue_jobs"]:
        age = format_age(job["seconds"])
        if job["failures"] > 1:
            what = f"{job['job']} has failed {job['failures']} times since {age} ago: {job['error']}"
            urgency = 2 if job["seconds"] > JOB_FAILING_SECONDS_MAX else 1
            yield Finding("periodic-job-failing", urgency, what, f"the workers' logs, for {job['job']}")
        elif state["workers"]["alive"]:
            what = f"{job['job']} has not succeeded for {age}, although a worker is alive"
            yield Finding("periodic-job-late", 2, what, f"the workers' logs, for {job['job']}")


def find_unreadable_lists(state: dict[str, Any]) -> Iterator[Finding]:
    """Lists of the provider that can't be read, one finding for each list."""
    by_list: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for failing in state["unreadable_lists"]:
        if failing["seconds"] > LIST_UNREADABLE_SECONDS_MAX and not failing["is_refused"]:
            by_list.setdefault((failing["provider"], failing["list"]), []).append(failing)
    for (provider, name), failing_lists in by_list.items():
        first = failing_lists[0]
        what = f"{provider}'s list {name} can't be read for {format_age(first['seconds'])}"
        what += f" (account {first['account'] or 'of the platform'}): {first['error']}"
        if len(failing_lists) > 1:
            what += f"; and {count_noun(len(failing_lists) - 1, 'other account')}"
        urgency = 2 if first["seconds"] > URGENT_SECONDS_MAX else 1
        yield Finding("list-unreadable", urgency, what, "select * from surety.list_unreadable_lists()")


def find_silent_webhooks(state: dict[str, Any]) -> Iterator[Finding]:
    """Events of the provider that were found by polling alone, because webhooks don't arrive or are rejected."""
    silent = state["silent_webhooks"]
    if silent["polled"] < POLLED_EVENTS_MIN or silent["seconds"] <= WEBHOOKS_MISSING_SECONDS_MAX:
        return
    last = (
        f"the last one {format_age(silent['last_seconds'])} ago" if silent["last_seconds"] is not None else "none yet"
    )
    what = f"no webhook arrives ({last}): {count_noun(silent['polled'], 'event')} found by polling alone, the first "
    what += f"{format_age(silent['seconds'])} ago"
    rejected = sum(row["hour_count"] for row in state["refusals"] if row["reason"] in SIGNATURE_REFUSALS)
    if rejected:
        what += f"; {rejected} with a wrong or old signature in this hour"
    next_step = (
        "compare STRIPE_WEBHOOK_SECRET with the endpoint's signing secret"
        if rejected
        else "the receiver (surety webhooks), the proxy before it, and the endpoint at the provider"
    )
    yield Finding("webhooks-missing", 2 if silent["seconds"] > URGENT_SECONDS_MAX else 1, what, next_step)


def find_overdue_objects(state: dict[str, Any]) -> Iterator[Finding]:
    """Payments, refunds and disputes that stay unfinished for too long."""
    for overdue in state["overdue_objects"]:
        what = f"{count_noun(overdue['count'], overdue['kind'])} in {overdue['state']} for longer than "
        what += (
            f"{format_age(overdue['limit_seconds'])}; the oldest, {overdue['first']}, {format_age(overdue['seconds'])}"
        )
        is_urgent = overdue["seconds"] - overdue["limit_seconds"] > OVERDUE_URGENT_SECONDS_MAX
        urgency = 2 if is_urgent and overdue["kind"] == "payment" else 1
        yield Finding("unfinished-objects", urgency, what, f"surety trace {overdue['payment_id']}")


def find_provider_problem(provider: dict[str, Any]) -> Finding | None:
    """An open circuit of a provider."""
    if not provider["open"]:
        return None
    what = f"{provider['provider']} is out for {format_age(provider['open_seconds'])}: {provider['reason']}"
    if provider["accounts"] > 1:
        what += f" ({provider['open']} of {provider['accounts']} accounts)"
    return Finding("circuit-open", 1, what, f"{provider['provider']}'s status page; what waits goes on by itself")


def find_vacuum_blocker(holder: dict[str, Any], *, are_commits_waiting: bool = False) -> Finding | None:
    """A transaction, slot or standby that has prevented vacuuming for long, or for very many transactions.

    No session that waits for a standby may be ended: a commit that the standby lacks would become visible.
    """
    if holder["kind"] == "commit":
        return None
    kind, name, seconds = holder["kind"], holder["name"], holder["seconds"] or 0
    is_urgent = (holder["xids"] or 0) > VACUUM_BLOCKER_XIDS_MAX
    is_idle_slot = (
        kind == "replication slot" and not holder["is_active"] and ((holder["wal_bytes"] or 0) > SLOT_BYTES_MAX)
    )
    if not (is_urgent or seconds > TRANSACTION_SECONDS_MAX or is_idle_slot):
        return None
    where = f" in {holder['database']}" if holder["database"] else ""
    finding_id: FindingId
    match kind:
        case "transaction":
            finding_id = "old-transaction"
            what = f"a transaction of {name} is open for {format_age(seconds)}{where}"
            next_step = (
                "the standby first: don't end sessions while commits wait for it"
                if are_commits_waiting
                else f"select pg_terminate_backend(pid) from pg_stat_activity where pid = {holder['pid']}"
                " and wait_event is distinct from 'SyncRep'"
            )
        case "prepared transaction":
            finding_id = "prepared-transaction"
            what = f"the prepared transaction {name} has waited {format_age(seconds)}{where}"
            next_step = f"rollback prepared '{name}', or commit it{where}"
        case "replication slot":
            finding_id = "replication-slot"
            what = f"the replication slot {name} has no reader" if is_idle_slot else f"the slot {name} is far behind"
            what += f": it keeps {(holder['wal_bytes'] or 0) / 1e9:.1f} GB"
            next_step = f"its reader; or select pg_drop_replication_slot('{name}')"
        case _:
            finding_id = "standby-behind"
            what = f"the standby {name} holds back {holder['xids']} transactions"
            next_step = f"long queries on {name}"
    return Finding(finding_id, 2 if is_urgent else 1, what, next_step)


def days_ahead(state: dict[str, Any]) -> float:
    """For how many days partitions exist."""
    until = datetime.fromisoformat(state["partitions_until"])
    now = datetime.fromisoformat(state["at"])
    return (until - now).total_seconds() / 86_400


def verdict_of(findings: Sequence[Finding]) -> int:
    """The greatest urgency, which is the exit status: 0 good, 1 look, 2 act."""
    return max((finding.urgency for finding in findings), default=0)
