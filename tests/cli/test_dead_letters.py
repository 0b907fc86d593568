"""What a person does about events that were given up on, by the command line as it is."""

from __future__ import annotations

import getpass
from concurrent.futures import ThreadPoolExecutor

import pytest
from psycopg import errors

from tests.cli.test_status import surety
from tests.support import dead_letters as letters
from tests.support.http_client import connected
from tests.support.payments import (
    Connection,
    add_merchant,
    fact,
    ledger_of,
    path_of,
    pay,
    record,
    state_of,
    violations,
)

ME = f"operator:{getpass.getuser()}"


def discard(conn: Connection, letter: str, *, dry_run: bool = False) -> tuple[str, str]:
    row = conn.execute(
        "select outcome, detail from outbox.discard_dead_letter(%s, 'operator:ada', 'why', %s)", (letter, dry_run)
    ).fetchone()
    assert row is not None
    return row[0], row[1]


def replay(conn: Connection, letter: str) -> str:
    row = conn.execute("select outcome from outbox.replay_dead_letter(%s, 'operator:ada', 'why')", (letter,)).fetchone()
    assert row is not None
    return str(row[0])


def due(conn: Connection) -> int:
    row = conn.execute("select count(*) from outbox.retries where due_at is not null").fetchone()
    assert row is not None
    return int(row[0])


# ------------------------------------------------------------------------------------------------------- discarding


def test_discarding_what_was_never_sent_ends_the_payment_as_failed_and_keeps_the_record(conn: Connection) -> None:
    letter, payment_id = letters.unsent(conn)
    outcome, detail = discard(conn, letter)
    assert outcome == "discarded" and "nothing was sent" in detail
    assert path_of(conn, payment_id) == ["initiated", "failed"]
    told = conn.execute(
        "select payload -> 'failure' ->> 'code' from outbox.events where type = 'payment.failed'"
    ).fetchone()
    assert told == ("processing_error",)
    kept = conn.execute(
        "select closed_as, closed_by, closed_because, jsonb_array_length(attempts) from outbox.dead_letters"
    )
    assert kept.fetchone() == ("discarded", "operator:ada", "why", 3)
    assert letters.doings(conn) == [("operator:ada", "discarded", "why")]
    assert violations(conn) == {}


def test_discarding_what_the_provider_refused_to_make_ends_the_payment_as_failed(conn: Connection) -> None:
    letter, payment_id = letters.refused(conn)
    outcome, detail = discard(conn, letter)
    assert outcome == "discarded" and "refused to do it (400)" in detail
    assert path_of(conn, payment_id) == ["initiated", "submitting", "failed"]
    assert violations(conn) == {}


def test_discarding_is_refused_while_nobody_knows_what_the_provider_has(conn: Connection) -> None:
    for letter, payment_id in (letters.unanswered(conn), letters.held(conn, operation="confirm")):
        before = state_of(conn, payment_id)
        outcome, detail = discard(conn, letter)
        assert outcome == "refused" and "may hold a charge" in detail and "replay" in detail
        assert state_of(conn, payment_id) == before
        assert letters.closed_as(conn, letter) is None
    assert letters.doings(conn) == []


def test_a_busy_provider_has_refused_nothing(conn: Connection) -> None:
    [payment_id] = pay(conn, add_merchant(conn)[1])
    [letter] = letters.give_up(conn, "submit", "Stripe 409", operation="create", status=409)
    assert discard(conn, letter)[0] == "refused"
    assert state_of(conn, payment_id) == "submitting"


def test_discarding_what_was_never_confirmed_asks_the_provider_to_cancel_it(conn: Connection) -> None:
    letter, payment_id = letters.held(conn)
    outcome, detail = discard(conn, letter)
    assert outcome == "discarded" and "asks the provider to cancel" in detail
    assert state_of(conn, payment_id) == "provider_submitted"
    [batch] = conn.execute("select batch_id, fence from outbox.claim_batch('cancel', 'worker-1')").fetchall()
    todo = conn.execute("select payment_id, todo from surety.begin_calls(%s, %s, 'cancel', 'worker:w')", batch)
    assert todo.fetchall() == [(payment_id, "send")]


@pytest.mark.parametrize("status", [None, 400])
def test_discarding_a_refund_that_was_not_made_gives_its_amount_back(conn: Connection, status: int | None) -> None:
    letter, payment_id = letters.refund(conn, "sent" if status else "unsent", status)
    assert conn.execute("select refund_pending_minor from surety.payments").fetchone() == (4000,)
    outcome, detail = discard(conn, letter)
    assert outcome == "discarded" and "gives its amount back" in detail
    assert ("nothing was sent" in detail) == (status is None)
    assert conn.execute("select state, failure ->> 'code' from surety.refunds").fetchone() == (
        "failed", "processing_error"
    )  # fmt: skip
    assert conn.execute("select refund_pending_minor from surety.payments").fetchone() == (0,)
    assert "refunding" not in ledger_of(conn, payment_id)
    assert violations(conn) == {}


def test_discarding_a_refund_is_refused_while_the_provider_may_have_made_it(conn: Connection) -> None:
    letter, payment_id = letters.refund(conn, "sent")
    outcome, detail = discard(conn, letter)
    assert outcome == "refused" and "may have made the refund" in detail
    record(conn, [fact(payment_id, "refund_failed", "re", 4000, data={"refund": letters.refund_of(conn)})])
    assert letters.closed_as(conn, letter) == "resolved"


@pytest.mark.parametrize("status", [None, 400])
def test_discarding_a_capture_that_was_not_made_leaves_what_is_held(conn: Connection, status: int | None) -> None:
    letter, payment_id = letters.capture(conn, "sent" if status else "unsent", status)
    outcome, detail = discard(conn, letter)
    assert outcome == "discarded" and "stays held" in detail
    assert state_of(conn, payment_id) == "authorized"
    assert violations(conn) == {}


def test_discarding_a_capture_is_refused_while_nobody_knows_whether_it_was_made(conn: Connection) -> None:
    letter, payment_id = letters.capture(conn, "sent")
    assert discard(conn, letter)[0] == "refused"
    record(conn, [fact(payment_id, "captured", "ch", 10000)])
    outcome, detail = discard(conn, letter)
    assert outcome == "discarded" and "stays confirmed" in detail


def test_discarding_bookkeeping_leaves_its_payment_alone(conn: Connection) -> None:
    letter, payment_id = letters.unsent(conn)
    letters.end(conn, payment_id)
    assert letters.closed_as(conn, letter) == "resolved"
    conn.execute("update outbox.dead_letters set closed_at = null, closed_as = null, closed_because = null")
    outcome, detail = discard(conn, letter)
    assert outcome == "discarded" and "stays failed" in detail
    assert state_of(conn, payment_id) == "failed"


def test_a_letter_ends_once_however_often_and_by_whomever_it_is_ended(conn: Connection, database: str) -> None:
    pairs = [letters.unsent(conn, f"error {number}") for number in range(6)]

    def end(doing: str, letter: str) -> str:
        with connected(database) as other:
            return replay(other, letter) if doing == "replay" else discard(other, letter)[0]

    for letter, _ in pairs:
        with ThreadPoolExecutor(3) as pool:
            told = sorted(pool.map(lambda doing, it=letter: end(doing, it), ("replay", "discard", "replay")))
        if letters.closed_as(conn, letter) == "replayed":
            assert told == ["refused", "replayed", "unchanged"]
        else:
            assert told == ["discarded", "refused", "refused"]
    assert len(letters.doings(conn)) == len(pairs)
    assert violations(conn) == {}


def test_replaying_what_was_replayed_or_has_meanwhile_succeeded_does_nothing(conn: Connection) -> None:
    resolved, payment_id = letters.unanswered(conn)
    letters.end(conn, payment_id)
    assert replay(conn, resolved) == "unchanged"
    assert due(conn) == 0
    letter, _ = letters.unsent(conn)
    assert [replay(conn, letter), replay(conn, letter)] == ["replayed", "unchanged"]
    assert due(conn) == 1


def test_a_replayed_event_that_fails_again_makes_a_letter_of_its_own_with_all_its_errors(conn: Connection) -> None:
    letter, _ = letters.unsent(conn)
    replay(conn, letter)
    [second] = letters.give_up(conn, "submit", "another error")
    assert letters.closed_as(conn, letter) == "replayed"
    [(attempts,)] = conn.execute("select attempts from outbox.dead_letters where id = %s", (second,)).fetchall()
    assert [attempt["error"] for attempt in attempts] == [letters.REFUSAL] * 3 + ["another error"] * 3


@pytest.mark.parametrize("doing", ["replay", "discard"])
def test_nothing_is_done_without_a_reason(conn: Connection, doing: str) -> None:
    letter, _ = letters.unsent(conn)
    with pytest.raises(errors.CheckViolation, match="dead_letter_is_closed_with_a_reason"):
        conn.execute(f"select outbox.{doing}_dead_letter(%s, 'operator:ada', ' ')".encode(), (letter,))
    assert letters.closed_as(conn, letter) is None


# ------------------------------------------------------------------------------------------------- the command line


def test_a_letter_is_shown_on_one_screen_with_all_that_a_decision_needs(conn: Connection, database: str) -> None:
    letter, payment_id = letters.refused(conn)
    shown = surety(database, "dead-letters", "show", letter).stdout.splitlines()
    assert shown[0].startswith(f"{letter}   submit · payment.initiated · {payment_id}   dead since ")
    assert letters.REFUSAL in shown[1]
    assert shown[2].count("same") == 2 and "2  " in shown[2] and "3  " in shown[2]
    text = "\n".join(shown)
    assert "payment     submitting, 100.00 USD; at Stripe: no object (heard at " in text
    assert "replay      creates the intent under the same key, or looks for it first" in text
    assert "discard     ends the payment as failed, tells the merchant" in text
    assert f'surety dead-letters replay {letter} --reason "…"' in text
    assert f'surety dead-letters discard {letter} --reason "…"' in text


def test_what_may_not_be_discarded_is_shown_with_the_reason_and_without_the_command(
    conn: Connection, database: str
) -> None:
    letter, _ = letters.unanswered(conn)
    shown = surety(database, "dead-letters", "show", letter).stdout
    assert "at Stripe: unknown: what was sent has no answer" in shown
    assert "discard     is refused: the provider may hold a charge" in shown
    assert "dead-letters discard" not in shown


def test_letters_are_chosen_by_handler_and_error_and_a_dry_run_touches_none(conn: Connection, database: str) -> None:
    mended, _ = letters.unsent(conn, "Stripe 500: mended since")
    other, _ = letters.unsent(conn, "another error")
    listed = surety(database, "dead-letters", "list", "--error", "mended").stdout
    assert mended in listed and other not in listed
    assert "no dead letters" in surety(database, "dead-letters", "list", "--handler", "apply").stdout
    for doing in ("replay", "discard"):
        chosen = ("dead-letters", doing, "--handler", "submit", "--error", "mended", "--reason", "mended")
        assert f"1 letter would {doing}" in surety(database, *chosen, "--dry-run").stdout
    assert (due(conn), letters.doings(conn)) == (0, [])
    done = surety(database, "dead-letters", "replay", "--error", "mended", "--reason", "mended")
    assert "1 letter replayed" in done.stdout
    done = surety(database, "dead-letters", "discard", other, "--reason", "not worth it")
    assert f"{other} is discarded: ends the payment as failed" in done.stdout
    assert letters.doings(conn) == [(ME, "replayed", "mended"), (ME, "discarded", "not worth it")]
    closed = surety(database, "dead-letters", "list", "--closed").stdout
    assert f"{mended} (replayed)" in closed and f"{other} (discarded)" in closed


def test_a_refusal_is_told_and_the_exit_status_says_so(conn: Connection, database: str) -> None:
    letter, _ = letters.unanswered(conn)
    done = surety(database, "dead-letters", "discard", letter, "--reason", "away with it")
    assert done.returncode == 1
    assert "may hold a charge" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("show", "dl_17"), "there is no dead letter dl_17"),
        (("replay", "dl_17", "--reason", "x"), "there is no dead letter dl_17"),
        (("discard", "dl_17", "--reason", "x"), "there is no dead letter dl_17"),
        (("replay", "dl_17"), "--reason"),
        (("replay", "dl_17", "--reason", " "), "--reason must say why"),
        (("discard", "--reason", "x"), "say which to discard"),
        (("discard", "dl_17", "--error", "x", "--reason", "x"), "say which to discard"),
    ],
)
def test_a_mistake_is_told_in_a_line(database: str, arguments: tuple[str, ...], message: str) -> None:
    done = surety(database, "dead-letters", *arguments)
    assert done.returncode != 0
    assert message in done.stderr and "Traceback" not in done.stderr
