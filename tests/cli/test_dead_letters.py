"""What a person does about events that were given up on, by the command line as it is."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
from psycopg import errors

from tests.cli.test_status import surety
from tests.support import dead_letters as letters
from tests.support.http_client import connect_as_owner
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

ME = "operator:tester"


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


def test_discarding_a_never_sent_payment_fails_it_and_keeps_the_record(conn: Connection) -> None:
    letter, payment_id = letters.never_sent_letter(conn)
    outcome, detail = discard(conn, letter)
    assert outcome == "discarded" and "nothing was sent" in detail
    assert path_of(conn, payment_id) == ["initiated", "failed"]
    output = conn.execute(
        "select payload -> 'failure' ->> 'code' from outbox.events where type = 'payment.failed'"
    ).fetchone()
    assert output == ("processing_error",)
    kept = conn.execute(
        "select closed_as, closed_by, closed_because, jsonb_array_length(attempts) from outbox.dead_letters"
    )
    assert kept.fetchone() == ("discarded", "operator:ada", "why", 3)
    assert letters.operator_actions(conn) == [("operator:ada", "discarded", "why")]
    assert violations(conn) == {}


def test_discarding_a_payment_refused_by_the_provider_fails_it(conn: Connection) -> None:
    letter, payment_id = letters.refused(conn)
    outcome, detail = discard(conn, letter)
    assert outcome == "discarded" and "refused to do it (400)" in detail
    assert path_of(conn, payment_id) == ["initiated", "submitting", "failed"]
    assert violations(conn) == {}


def test_discarding_is_refused_while_the_provider_outcome_is_unknown(conn: Connection) -> None:
    for letter, payment_id in (letters.unanswered(conn), letters.held(conn, operation="confirm")):
        before = state_of(conn, payment_id)
        outcome, detail = discard(conn, letter)
        assert outcome == "refused" and "may hold a charge" in detail and "replay" in detail
        assert state_of(conn, payment_id) == before
        assert letters.closed_as(conn, letter) is None
    assert letters.operator_actions(conn) == []


def test_rate_limit_response_does_not_count_as_a_refusal(conn: Connection) -> None:
    [payment_id] = pay(conn, add_merchant(conn)[1])
    [letter] = letters.exhaust_retries(conn, "submit", "Stripe 409", operation="create", status=409)
    assert discard(conn, letter)[0] == "refused"
    assert state_of(conn, payment_id) == "submitting"


def test_discarding_an_unconfirmed_payment_cancels_it_at_the_provider(conn: Connection) -> None:
    letter, payment_id = letters.held(conn)
    outcome, detail = discard(conn, letter)
    assert outcome == "discarded" and "asks the provider to cancel" in detail
    assert state_of(conn, payment_id) == "provider_submitted"
    [batch] = conn.execute("select batch_id, fence from outbox.claim_batch('cancel', 'worker-1')").fetchall()
    todo = conn.execute("select payment_id, verdict from surety.begin_calls(%s, %s, 'cancel', 'worker:w')", batch)
    assert todo.fetchall() == [(payment_id, "send")]


@pytest.mark.parametrize("status", [None, 400])
def test_discarding_a_refund_never_made_releases_its_reserved_amount(conn: Connection, status: int | None) -> None:
    letter, payment_id = letters.refund(conn, "sent" if status else "unsent", status)
    assert conn.execute("select refund_pending_minor from surety.payments").fetchone() == (4000,)
    outcome, detail = discard(conn, letter)
    assert outcome == "discarded" and "gives its amount back" in detail
    assert ("nothing was sent" in detail) == (status is None)
    assert conn.execute("select state, failure ->> 'code' from surety.refunds").fetchone() == (
        "failed", "processing_error"
    )  # fmt: skip
    assert conn.execute("select refund_pending_minor from surety.payments").fetchone() == (0,)
    assert "reserved_for_refunds" not in ledger_of(conn, payment_id)
    assert violations(conn) == {}


def test_discarding_a_refund_is_refused_while_the_provider_may_have_made_it(conn: Connection) -> None:
    letter, payment_id = letters.refund(conn, "sent")
    outcome, detail = discard(conn, letter)
    assert outcome == "refused" and "may have made the refund" in detail
    record(conn, [fact(payment_id, "refund_failed", "re", 4000, data={"refund": letters.refund_of(conn)})])
    assert letters.closed_as(conn, letter) == "resolved"


@pytest.mark.parametrize("status", [None, 400])
def test_discarding_a_capture_never_made_keeps_the_authorization(conn: Connection, status: int | None) -> None:
    letter, payment_id = letters.capture(conn, "sent" if status else "unsent", status)
    outcome, detail = discard(conn, letter)
    assert outcome == "discarded" and "keeps the authorization" in detail
    assert state_of(conn, payment_id) == "authorized"
    assert violations(conn) == {}


def test_discarding_a_capture_is_refused_while_its_outcome_is_unknown(conn: Connection) -> None:
    letter, payment_id = letters.capture(conn, "sent")
    assert discard(conn, letter)[0] == "refused"
    record(conn, [fact(payment_id, "captured", "ch", 10000)])
    outcome, detail = discard(conn, letter)
    assert outcome == "discarded" and "stays confirmed" in detail


def test_discarding_a_bookkeeping_event_does_not_change_the_payment(conn: Connection) -> None:
    letter, payment_id = letters.never_sent_letter(conn)
    letters.end(conn, payment_id)
    assert letters.closed_as(conn, letter) == "resolved"
    conn.execute("update outbox.dead_letters set closed_at = null, closed_as = null, closed_because = null")
    outcome, detail = discard(conn, letter)
    assert outcome == "discarded" and "stays failed" in detail
    assert state_of(conn, payment_id) == "failed"


def test_dead_letter_is_closed_once(conn: Connection, database: str) -> None:
    pairs = [letters.never_sent_letter(conn, f"error {number}") for number in range(6)]

    def end(doing: str, letter: str) -> str:
        with connect_as_owner(database) as other:
            return replay(other, letter) if doing == "replay" else discard(other, letter)[0]

    for letter, _ in pairs:
        with ThreadPoolExecutor(3) as pool:
            output = sorted(pool.map(lambda doing, it=letter: end(doing, it), ("replay", "discard", "replay")))
        if letters.closed_as(conn, letter) == "replayed":
            assert output == ["refused", "replayed", "unchanged"]
        else:
            assert output == ["discarded", "refused", "refused"]
    assert len(letters.operator_actions(conn)) == len(pairs)
    assert violations(conn) == {}


def test_replaying_a_replayed_or_succeeded_event_does_nothing(conn: Connection) -> None:
    resolved, payment_id = letters.unanswered(conn)
    letters.end(conn, payment_id)
    assert replay(conn, resolved) == "unchanged"
    assert due(conn) == 0
    letter, _ = letters.never_sent_letter(conn)
    assert [replay(conn, letter), replay(conn, letter)] == ["replayed", "unchanged"]
    assert due(conn) == 1


def test_replayed_event_that_fails_again_makes_a_new_dead_letter_with_all_errors(conn: Connection) -> None:
    letter, _ = letters.never_sent_letter(conn)
    replay(conn, letter)
    [second] = letters.exhaust_retries(conn, "submit", "another error")
    assert letters.closed_as(conn, letter) == "replayed"
    [(attempts,)] = conn.execute("select attempts from outbox.dead_letters where id = %s", (second,)).fetchall()
    assert [attempt["error"] for attempt in attempts] == [letters.REFUSAL] * 3 + ["another error"] * 3


@pytest.mark.parametrize("doing", ["replay", "discard"])
def test_every_action_requires_a_reason(conn: Connection, doing: str) -> None:
    letter, _ = letters.never_sent_letter(conn)
    with pytest.raises(errors.CheckViolation, match="dead_letter_is_closed_with_a_reason"):
        conn.execute(f"select outbox.{doing}_dead_letter(%s, 'operator:ada', ' ')".encode(), (letter,))
    assert letters.closed_as(conn, letter) is None


# ------------------------------------------------------------------------------------------------- the command line


def test_dead_letter_is_shown_on_one_screen_with_everything_needed_to_decide(conn: Connection, database: str) -> None:
    letter, payment_id = letters.refused(conn)
    shown = surety(database, "dead-letters", "show", letter).stdout.splitlines()
    assert shown[0].startswith(f"{letter}   submit · payment.initiated · {payment_id}   dead since ")
    assert letters.REFUSAL in shown[1]
    assert shown[2].count("same") == 2 and "2  " in shown[2] and "3  " in shown[2]
    text = "\n".join(shown)
    assert "payment     submitting, 100.00 USD; at Stripe: no object (heard at " in text
    assert "replay      creates the intent under the same key, or looks for it first" in text
    assert "discard     ends the payment as failed, notifies the merchant" in text
    assert f'surety dead-letters replay {letter} --reason "…"' in text
    assert f'surety dead-letters discard {letter} --reason "…"' in text


def test_dead_letter_that_cannot_be_discarded_is_shown_with_the_reason(conn: Connection, database: str) -> None:
    letter, _ = letters.unanswered(conn)
    shown = surety(database, "dead-letters", "show", letter).stdout
    assert "at Stripe: unknown: the last call has no answer" in shown
    assert "discard     is refused: the provider may hold a charge" in shown
    assert "dead-letters discard" not in shown


def test_dead_letters_are_selected_by_handler_and_error_and_dry_run_changes_none(
    conn: Connection, database: str
) -> None:
    mended, _ = letters.never_sent_letter(conn, "Stripe 500: mended since")
    other, _ = letters.never_sent_letter(conn, "another error")
    listed = surety(database, "dead-letters", "list", "--error", "mended").stdout
    assert mended in listed and other not in listed
    assert "no dead letters" in surety(database, "dead-letters", "list", "--handler", "apply_webhooks").stdout
    for doing in ("replay", "discard"):
        chosen = ("dead-letters", doing, "--handler", "submit", "--error", "mended", "--reason", "mended")
        assert f"1 letter would {doing}" in surety(database, *chosen, "--dry-run").stdout
    assert (due(conn), letters.operator_actions(conn)) == (0, [])
    done = surety(database, "dead-letters", "replay", "--error", "mended", "--reason", "mended")
    assert "1 letter replayed" in done.stdout
    done = surety(database, "dead-letters", "discard", other, "--reason", "not worth it")
    assert f"{other} is discarded: ends the payment as failed" in done.stdout
    assert letters.operator_actions(conn) == [(ME, "replayed", "mended"), (ME, "discarded", "not worth it")]
    closed = surety(database, "dead-letters", "list", "--closed").stdout
    assert f"{mended} (replayed)" in closed and f"{other} (discarded)" in closed


def test_refusal_is_printed_and_sets_the_exit_status(conn: Connection, database: str) -> None:
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
        (("replay", "dl_17", "--reason", "a" * 1001), "--reason must have at most 1000 characters"),
        (("replay", "dl_17", "--reason", "\x1b[2Jgone"), "--reason must be one line without control characters"),
        (("discard", "--reason", "x"), "select the letters to discard"),
        (("discard", "dl_17", "--error", "x", "--reason", "x"), "select the letters to discard"),
    ],
)
def test_invalid_argument_is_reported_in_one_line(database: str, arguments: tuple[str, ...], message: str) -> None:
    done = surety(database, "dead-letters", *arguments)
    assert done.returncode != 0
    assert message in done.stderr and "Traceback" not in done.stderr
