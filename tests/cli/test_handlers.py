"""Handlers on the command line: an operator pauses and resumes them, and the audit trail records it."""

from __future__ import annotations

import json

from tests.cli.conftest import Run, refused, said
from tests.support.payments import Connection, add_merchant, pay


def test_paused_handler_takes_no_events_until_it_is_resumed(run: Run, conn: Connection) -> None:
    pay(conn, add_merchant(conn)[1])
    assert said(run("handlers", "pause", "submit", "--reason", "maintenance")) == "submit is paused"
    assert said(run("handlers", "pause", "submit", "--reason", "again")) == "submit is paused already"
    assert conn.execute("select event_ids from outbox.claim_batch('submit', 'worker-1')").fetchall() == []
    assert said(run("handlers", "resume", "submit", "--reason", "done")) == "submit is active"
    assert said(run("handlers", "resume", "submit", "--reason", "again")) == "submit is active already"
    assert len(conn.execute("select event_ids from outbox.claim_batch('submit', 'worker-1')").fetchall()) == 1
    actor = "operator:tester"
    entries = conn.execute(
        "select actor, outcome, reason, snapshot ->> 'handler' from audit.entries"
        " where kind = 'operator' and outcome like 'handler%' order by id"
    ).fetchall()
    assert entries == [
        (actor, "handler paused", "maintenance", "submit"),
        (actor, "handler resumed", "done", "submit"),
    ]


def test_handlers_are_listed_with_the_time_of_their_pause(run: Run, conn: Connection) -> None:
    run("handlers", "pause", "expect_settlement", "--reason", "maintenance")
    listed = json.loads(said(run("handlers", "list", "--json")))
    assert [each["handler"] for each in listed if each["paused_at"]] == ["expect_settlement"]
    names = [name for (name,) in conn.execute("select handler from outbox.handlers order by handler").fetchall()]
    assert [each["handler"] for each in listed] == names
    assert all(each["meaning"] in said(run("handlers", "list")) for each in listed)


def test_unknown_handler_or_blank_reason_is_refused(run: Run) -> None:
    for action in ("pause", "resume"):
        message = refused(run("handlers", action, "sumbit", "--reason", "maintenance"))
        assert "HANDLER: there is no handler sumbit; the handlers are apply_webhooks, " in message
        assert refused(run("handlers", action, "submit", "--reason", " ")) == "--reason must say why"
