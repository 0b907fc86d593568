"""`surety dead-letters`: events whose handler gave up. A person replays or discards them."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from itertools import groupby
from typing import Any, LiteralString

import click
import psycopg
from rich.console import Console
from rich.table import Table

from app.api.schemas.operators import DeadLetterAction
from app.cli.identity import authorize
from app.cli.options import json_option, reason_option
from app.cli.reading import connect_to_read, reads
from app.wording import count_noun, format_age
from db.connect import connect
from db.errors import SuretyError
from db.settings import load_settings

Connection = psycopg.Connection[tuple[Any, ...]]
Letter = dict[str, Any]
CommandFunction = Callable[..., None]

PAGE = 100
EXIT_REFUSED = 1


class DeadLetterError(SuretyError):
    """No dead letter has this id, or the command names none."""


@click.group()
def dead_letters() -> None:
    """List events whose handler gave up, show one with all its errors, replay or discard them."""


def letter_filters(command: CommandFunction) -> CommandFunction:
    """The options that choose letters."""
    error = click.option("--error", help="Only dead letters whose last error contains this text.")
    return click.option("--handler", help="Only those of one handler.")(error(command))


def decision_options(command: CommandFunction) -> CommandFunction:
    """The arguments and options of a command that changes letters."""
    for option in (
        click.option("--dry-run", is_flag=True, help="Only report what would happen."),
        reason_option,
        letter_filters,
        click.argument("letter_ids", nargs=-1, metavar="[ID]..."),
    ):
        command = option(command)
    return command


@dead_letters.command("list")
@letter_filters
@click.option("--closed", is_flag=True, help="Those that are closed, too.")
@json_option
@reads
def list_letters(handler: str | None, error: str | None, closed: bool, as_json: bool) -> None:
    """List dead letters, the oldest first. With --json, each as `show --json` shows it."""
    if as_json:
        with connect_to_read() as conn:
            click.echo(json.dumps(list(find_letters(conn, handler, error, status=None if closed else "open"))))
        return
    table = Table(box=None, pad_edge=False)
    for heading in ("letter", "handler", "payment", "since", "last error"):
        table.add_column(heading, no_wrap=heading != "last error")
    with connect_to_read() as conn:
        for letter in find_letters(conn, handler, error, status=None if closed else "open"):
            closed_as = f" ({letter['status']})" if letter["closed"] else ""
            table.add_row(
                letter["id"] + closed_as,
                letter["handler"],
                letter["payment"]["id"] if letter["payment"] else "–",
                f"{letter['died_at'][:19]}Z",
                letter["attempts"][-1]["error"] if letter["attempts"] else letter["reason"],
            )
    console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 200)
    console.print(table if table.row_count else "no dead letters")


@dead_letters.command("show")
@click.argument("letter_id", metavar="ID")
@json_option
@reads
def show_letter(letter_id: str, as_json: bool) -> None:
    """Show a dead letter: its attempts, the state of its payment, the effects of a replay and of a discard."""
    with connect_to_read() as conn:
        row = conn.execute(
            "select shown.document,"
            " extract(epoch from surety.time_now() - d.died_at)::float8"
            " from outbox.dead_letters as d cross join lateral outbox.show_dead_letter(d) as shown where d.id = %s",
            (letter_id,),
        ).fetchone()
    if row is None:
        raise DeadLetterError(f"there is no dead letter {letter_id}")
    if as_json:
        click.echo(json.dumps(row[0]))
        return
    Console(highlight=False, markup=False, soft_wrap=True).print("\n".join(render_letter(*row)))


def render_letter(letter: Letter, seconds: float) -> Iterator[str]:
    """The lines of a letter."""
    payment, at_provider, closed = letter["payment"], letter["provider"], letter["closed"]
    about = [letter["handler"], letter["event"]["type"], payment["id"] if payment else letter["event"]["id"]]
    yield f"{letter['id']}   {' · '.join(about)}   dead since {time_of_day(letter['died_at'])} ({format_age(seconds)})"
    yield from render_attempts(letter["attempts"])
    yield f"reason      {letter['reason']}"
    if payment:
        yield f"payment     {payment['state']}, {payment['text']}; at {at_provider['name'].capitalize()}: " + (
            describe_provider_object(at_provider)
        )
    if closed:
        yield f"closed      {letter['status']} at {time_of_day(closed['at'])} by {closed['by']}: {closed['because']}"
        return
    yield f"replay      {letter['on_replay']}"
    yield f"discard     {letter['on_discard']['detail']}"
    actions = ["replay"] if letter["on_discard"]["verdict"] == "refuse" else ["replay", "discard"]
    for action in actions:
        yield f'surety dead-letters {action} {letter["id"]} --reason "…"     (--dry-run first)'


def render_attempts(attempts: list[dict[str, Any]]) -> Iterator[str]:
    """Each error once; further attempts with the same error follow on one line."""
    numbered = list(enumerate(attempts, start=1))
    for error, group in groupby(numbered, key=lambda one: one[1]["error"]):
        (number, first), *others = list(group)
        yield f"{number}  {time_of_day(first['at'])}  {error}  [{first['worker']}]"
        if others:
            yield "       ".join(f"{number}  {time_of_day(attempt['at'])}  same" for number, attempt in others)


def describe_provider_object(at_provider: dict[str, Any]) -> str:
    """The last known object at the provider."""
    as_of = f" (heard at {time_of_day(at_provider['as_of'])})" if at_provider["as_of"] else ""
    match at_provider["holds"]:
        case "object":
            return f"{at_provider['id']}{as_of}"
        case "nothing":
            return f"no object{as_of or ', nothing was sent'}"
    return f"unknown: the last call has no answer{as_of}"


def time_of_day(at: str) -> str:
    """The time of day of a timestamp."""
    return at[11:19]


@dead_letters.command("replay")
@decision_options
def replay_letters(
    letter_ids: tuple[str, ...], handler: str | None, error: str | None, reason: str, dry_run: bool
) -> None:
    """Make events due again at once: those of the ids, or all that match. Their failures no longer count.

    Letters that were replayed already, or whose payment has ended, stay unchanged. Exit status 1 if one was refused.
    """
    apply_to_letters("replay", letter_ids, handler, error, reason, dry_run=dry_run)


@dead_letters.command("discard")
@decision_options
def discard_letters(
    letter_ids: tuple[str, ...], handler: str | None, error: str | None, reason: str, dry_run: bool
) -> None:
    """Discard events: those of the ids, or all that match. They are not processed again.

    A payment, refund or capture that was never sent ends as failed. A discard is refused, with exit status 1, if the
    provider may have carried the operation out.
    """
    apply_to_letters("discard", letter_ids, handler, error, reason, dry_run=dry_run)


DEAD_LETTER_STATEMENTS: dict[DeadLetterAction, LiteralString] = {
    "replay": "select outcome, detail from outbox.replay_dead_letter(%s, %s, %s, %s)",
    "discard": "select outcome, detail from outbox.discard_dead_letter(%s, %s, %s, %s)",
}
OUTCOMES = {
    "replayed": "is due again",
    "discarded": "is discarded",
    "would_replay": "would be replayed",
    "would_discard": "would be discarded",
    "unchanged": "is left alone",
    "refused": "is refused",
}


def apply_to_letters(
    action: DeadLetterAction,
    letter_ids: tuple[str, ...],
    handler: str | None,
    error: str | None,
    reason: str,
    *,
    dry_run: bool,
) -> None:
    """Apply the action to each letter in a transaction of its own, and print each outcome."""
    if bool(letter_ids) == bool(handler or error):
        raise DeadLetterError(f"select the letters to {action}: by ID, or by --handler or --error")
    outcomes: dict[str, int] = {}
    with connect("deploy", load_settings()) as conn:
        actor = f"operator:{authorize(conn, f'dead-letters:{action}')}"
        for letter_id in letter_ids or [letter["id"] for letter in find_letters(conn, handler, error, status="open")]:
            row = conn.execute(DEAD_LETTER_STATEMENTS[action], (letter_id, actor, reason, dry_run)).fetchone()
            assert row is not None
            outcome, detail = row
            if outcome == "not_found":
                raise DeadLetterError(detail)
            outcomes[outcome] = outcomes.get(outcome, 0) + 1
            click.echo(f"{letter_id} {OUTCOMES[outcome]}: {detail}")
    if not letter_ids:
        click.echo(
            ", ".join(
                f"{count_noun(number, 'letter')} {outcome.replace('_', ' ')}" for outcome, number in outcomes.items()
            )
            or "no dead letter matches"
        )
    if "refused" in outcomes:
        sys.exit(EXIT_REFUSED)


def find_letters(conn: Connection, handler: str | None, error: str | None, *, status: str | None) -> Iterator[Letter]:
    """All letters that match, the oldest first, page by page."""
    after = None
    while True:
        rows = conn.execute(
            "select found.id, shown.document from outbox.find_dead_letters(%s, %s, %s, %s, %s) as found"
            " cross join lateral outbox.show_dead_letter(found) as shown order by found.id",
            (status, handler, error, after, PAGE),
        ).fetchall()
        yield from (document for _, document in rows)
        if len(rows) < PAGE:
            return
        after = rows[-1][0]
