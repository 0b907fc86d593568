"""`surety`, the command line: one file per command, imported only when that command is called.

To add one, write its file beside this one and a line in COMMANDS.
"""

from __future__ import annotations

import errno
import importlib
import os
import sys
from typing import NamedTuple, NoReturn

import click

from db.errors import SuretyError, is_read_only, kind_of, message_of

# Of a terminal or file that takes no more output.
OUTPUT_ERRORS = frozenset({errno.ENOSPC, errno.EBADF, errno.EIO})


class CommandEntry(NamedTuple):
    """A command's place (`module:name`) and its line in the list of commands."""

    target: str
    help: str


COMMANDS = {
    "demo": CommandEntry(
        "app.cli.demo:demo", "Payments against a misbehaving sandbox on this machine; every invariant checked."
    ),
    "up": CommandEntry("app.cli.up:up", "Run everything on this machine, for everyday work."),
    "sandbox": CommandEntry("app.sandbox.__main__:main", "A sandbox of Stripe, for development and tests."),
    "deploy": CommandEntry("app.cli.deploy:deploy", "Bring the database to this version, beside traffic."),
    "api": CommandEntry("app.cli.api:api", "Serve the HTTP API."),
    "webhooks": CommandEntry("app.cli.webhooks:webhooks", "Receive providers' webhooks."),
    "health": CommandEntry("app.cli.health:health", "Check one process for its supervisor: api, webhooks or worker."),
    "mode": CommandEntry("app.cli.mode:mode", "Show or decide whether real money moves: live or test."),
    "merchants": CommandEntry(
        "app.cli.merchants:merchants", "Add, change, list, suspend and resume merchants; their fees and limits."
    ),
    "customers": CommandEntry("app.cli.customers:customers", "Merchants' customers: list, show, erase a payer's data."),
    "keys": CommandEntry("app.cli.keys:keys", "Create, rotate, list and revoke keys of merchants and operators."),
    "operators": CommandEntry("app.cli.operators:operators", "Accounts of operators, and what their roles may do."),
    "roles": CommandEntry("app.cli.roles:database_roles", "Logins of analysts and auditors: grant, list, revoke."),
    "trace": CommandEntry("app.cli.trace:trace", "Show the history of a payment."),
    "status": CommandEntry("app.cli.status:status", "Report problems and the next step for each."),
    "dead-letters": CommandEntry(
        "app.cli.dead_letters:dead_letters", "Events whose handler gave up: list, show, replay, discard."
    ),
    "discrepancies": CommandEntry(
        "app.cli.discrepancies:discrepancies", "Differences from other records: list, show, assign, snooze, resolve."
    ),
    "reconcile": CommandEntry(
        "app.cli.reconcile:reconcile", "Compare a report of the provider's with our records; every difference is named."
    ),
    "bank-statements": CommandEntry(
        "app.cli.bank_statements:bank_statements", "Statements of our bank accounts: import, list, show."
    ),
    "reconciliation": CommandEntry(
        "app.cli.reconciliation:reconciliation", "Records that are pending, overdue, discrepant or explained."
    ),
    "payouts": CommandEntry("app.cli.payouts:payouts", "The provider's payouts to our bank: list, show."),
    "balance": CommandEntry("app.cli.balance:balance", "Balances of a merchant, or of all accounts, at any time."),
    "statement": CommandEntry(
        "app.cli.statements:statement", "A merchant's statement of a month, as CSV, JSON or PDF."
    ),
    "close": CommandEntry("app.cli.closing:close", "Close the books of a month; its balances stay as they are."),
    "merchant-payouts": CommandEntry(
        "app.cli.merchant_payouts:merchant_payouts", "Payouts to merchants: terms, create, list, mark as sent."
    ),
    "ach": CommandEntry("app.cli.ach:ach", "NACHA files, and customers' bank accounts."),
    "velocity": CommandEntry("app.cli.velocity:velocity", "Rules about many payments of one payer: list, add, remove."),
    "webhook-endpoints": CommandEntry(
        "app.cli.webhook_endpoints:webhook_endpoints", "Merchants' webhook endpoints: list, enable, replay."
    ),
    "holds": CommandEntry("app.cli.holds:holds", "Payments on hold: list, show, release, refuse."),
    "handlers": CommandEntry("app.cli.handlers:handlers", "Handlers of events: list, pause, resume."),
    "restored": CommandEntry("app.cli.restored:restored", "Open a database that was restored, for business."),
    "drill": CommandEntry("app.cli.restored:drill", "Open a restored copy for a drill: it can never do business."),
    "servers": CommandEntry("app.cli.servers:servers", "Servers that may do business: show or set them."),
}


class LazyCommandGroup(click.Group):
    """A group whose commands are imported when they are called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The names, in the order of COMMANDS."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of that name, or None."""
        if cmd_name not in COMMANDS:
            return None
        module, _, name = COMMANDS[cmd_name].target.partition(":")
        command = getattr(importlib.import_module(module), name)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The list of commands, without importing any."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, entry.help) for name, entry in COMMANDS.items()])


@click.group(cls=LazyCommandGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="surety")
@click.option("--as", "as_operator", metavar="NAME", help="Act for another operator; needs the scope operators:act-as.")
@click.pass_context
def cli(context: click.Context, as_operator: str | None) -> None:
    """A payment service that never loses a payment, never charges twice, and can prove what happened to every one."""
    context.obj = as_operator


def main() -> None:
    """Run `surety`. An error that the user can correct is one line and status 1, not a traceback."""
    for place, argument in enumerate(sys.argv[1:], start=1):
        if not is_encodable(argument):
            stop(f"argument {place} is not UTF-8")
    if sys.stdout is None:
        stop("standard output is closed, so that nothing could be shown")
    try:
        cli(prog_name="surety")
    except Exception as error:
        if (message := user_message(error)) is None:
            raise
        if isinstance(error, OSError):
            # The rest of the buffer would fail again at the end of the process.
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        stop(message)


def stop(message: str) -> NoReturn:
    """End with a line and status 1."""
    click.echo(f"surety: {message}", err=True)
    sys.exit(1)


def is_encodable(text: str) -> bool:
    """Whether a text of the command line or the environment was valid UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def user_message(error: Exception) -> str | None:
    """The line for an error that the user can correct; None for a mistake of ours."""
    if isinstance(error, SuretyError):
        return str(error)
    if isinstance(error, OSError) and error.filename is None and error.errno in OUTPUT_ERRORS:
        return f"the output can't be written ({error.strerror}); what the command did is done"
    psycopg = sys.modules.get("psycopg")
    if psycopg is None or not isinstance(error, psycopg.Error):
        return None
    match kind_of(error):
        case "unreachable" if is_read_only(error):
            return f"this command needs the primary, and PostgreSQL is read-only here: {message_of(error)}"
        case "unreachable":
            return f"PostgreSQL can't be reached: {message_of(error)}"
        case "not_deployed":
            return "this database has no Surety, or one of another version: run `surety deploy`"
    return None
