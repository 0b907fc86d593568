"""`surety up`: every service on this machine, for everyday work."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import click
import psycopg
from rich.console import Console
from rich.text import Text

from app.local.output import PrintedLines
from app.local.processes import Interrupted, ProcessGroup, free_port, interruptible
from app.local.up import (
    LOOPBACK,
    STOP_SECONDS_MAX,
    exclusive_folder,
    load_or_create_secret,
    new_provider_secret,
    new_webhook_key,
    supervise,
)
from app.web.keys import new_key, new_operator_key
from app.wording import describe_mode
from db.connect import harden
from db.deploy.deploy import deploy
from db.embedded.server import EmbeddedServer
from db.errors import SettingsError
from db.settings import Settings, livemode_of_key, load_settings

COLORS = ("cyan", "green", "magenta", "yellow", "blue", "bright_cyan", "bright_green", "bright_magenta")

EXAMPLE_REQUEST_OPTIONS = (
    "--header 'Idempotency-Key: order-1' --json "
    """'{"amount": 4999, "currency": "usd", "payment_method": {"type": "card", "token": "pm_card_visa"},"""
    """ "return_url": "https://shop.example/paid"}'"""
)


@click.command()
@click.option(
    "--folder", type=click.Path(path_type=Path, file_okay=False), default=Path(".surety"), show_default=True,
    help="Holds the data of the embedded PostgreSQL and the sandbox's memory.",
)  # fmt: skip
@click.option("--sandbox", is_flag=True, help="Start a sandbox of Stripe as well; no real money moves.")
@click.option(
    "--auto-payer/--no-auto-payer", default=True, show_default=True,
    help="Whether the sandbox completes 3-D Secure by itself; without, open the payer's page in a browser.",
)  # fmt: skip
@click.option("--workers", type=click.IntRange(1, 16), default=1, show_default=True, help="How many workers.")
def up(folder: Path, sandbox: bool, auto_payer: bool, workers: int) -> None:
    """Run the API, the webhook receiver and the workers on this machine until Ctrl-C.

    Uses the database of DATABASE_URL, else an embedded PostgreSQL that keeps its data in the folder. Deploys first.
    Restarts processes that end. Stripe needs STRIPE_API_KEY and STRIPE_WEBHOOK_SECRET; --sandbox needs nothing.
    """
    if not (sandbox or auto_payer):
        raise SettingsError("--no-auto-payer is about the sandbox: add --sandbox")
    settings = load_settings()
    require_provider_settings(settings, sandbox=sandbox)
    console = Console(highlight=False, soft_wrap=True)
    try:
        with interruptible(), ExitStack() as stack:
            run_everything(
                stack, settings, folder.absolute(), console, sandbox=sandbox, auto_payer=auto_payer, workers=workers
            )
    except Interrupted as interruption:
        console.print(f"{interruption}: all has ended; the data are kept")
        sys.exit(130)


def require_provider_settings(settings: Settings, *, sandbox: bool) -> None:
    """Raises SettingsError without a provider, with no secret key, or with a live key for the sandbox."""
    if sandbox:
        if settings.stripe_api_key and livemode_of_key(settings.stripe_api_key):
            raise SettingsError("STRIPE_API_KEY is a live key, which must not go to a sandbox")
        return
    if settings.surety_sandbox_url is None and settings.stripe_api_key is None:
        raise SettingsError("set STRIPE_API_KEY and STRIPE_WEBHOOK_SECRET, or use a sandbox: surety up --sandbox")
    assert settings.provider and settings.webhook_secrets


def run_everything(
    stack: ExitStack,
    settings: Settings,
    folder: Path,
    console: Console,
    *,
    sandbox: bool,
    auto_payer: bool,
    workers: int,
) -> None:
    """Start every service and supervise them until an interrupt."""
    kept = stack.enter_context(exclusive_folder(folder))
    print_line = line_printer(console)
    server = None
    if settings.database_url is None:
        server = stack.enter_context(EmbeddedServer(kept / "postgresql"))
    url = settings.database_url.reveal() if settings.database_url else server.url if server else ""
    require_mode_if_deployed(url, settings, sandbox=sandbox)
    outcome, livemode = deploy(url).outcome, read_livemode(url)
    print_line("up", f"database: {outcome}, mode {describe_mode(livemode)}")
    require_mode(settings, livemode, sandbox=sandbox)
    ports = {"api": free_port(settings.surety_api_port), "webhooks": free_port(settings.surety_webhook_port)}
    environment = {
        name: value for name, value in os.environ.items() if server is None or not is_database_variable(name)
    }
    environment.pop("DATABASE_URL_FILE", None)
    environment |= {"DATABASE_URL": url, "PYTHONUNBUFFERED": "1"}
    if settings.surety_webhook_key is None:
        environment["SURETY_WEBHOOK_KEY"] = load_or_create_secret(kept / "webhook-key", new_webhook_key)
    process_group = ProcessGroup(environment, PrintedLines(print_line), STOP_SECONDS_MAX)
    stack.callback(process_group.stop)
    if sandbox:
        ports["sandbox"] = free_port(settings.surety_sandbox_port)
        secret = (
            settings.webhook_secrets[0].reveal()
            if settings.stripe_webhook_secret
            else load_or_create_secret(kept / "webhook-secret", new_provider_secret)
        )
        process_group.environment.pop("STRIPE_WEBHOOK_SECRET_FILE", None)
        process_group.environment |= {
            "STRIPE_WEBHOOK_SECRET": secret,
            "SURETY_SANDBOX_URL": f"http://127.0.0.1:{ports['sandbox']}",
            "SURETY_POLL_SECONDS": os.environ.get("SURETY_POLL_SECONDS") or "5",
            "SURETY_WEBHOOK_NETWORKS": os.environ.get("SURETY_WEBHOOK_NETWORKS") or LOOPBACK,
        }
        process_group.start(
            "sandbox", "-m", "app.sandbox", "--port", str(ports["sandbox"]), *(["--auto-payer"] if auto_payer else []),
            "--memory", str(kept / "sandbox.sqlite"), "--webhook-secret", secret,
            "--webhook-url", f"http://127.0.0.1:{ports['webhooks']}/stripe",
        )  # fmt: skip
        process_group.wait_for_port("sandbox", ports["sandbox"])
    for name in ("webhooks", "api"):
        process_group.start(name, "-m", "app.cli", name, "--port", str(ports[name]))
        process_group.wait_for_port(name, ports[name])
    for number in range(1, workers + 1):
        name = f"worker-{number}"
        process_group.start(
            name, "-m", "procrastinate", "--app", "jobs.app", "worker", "--name", f"{name}-{os.getpid()}"
        )
    print_welcome(console, url, ports, create_first_key(url), create_first_admin(url, kept / "operator-key"))
    supervise(process_group, server, print_line)


def is_database_variable(name: str) -> bool:
    """Whether a variable addresses a database; with an embedded server, none may lead elsewhere."""
    return name.startswith("PG") or name.removesuffix("_FILE").endswith("_DATABASE_URL")


def read_livemode(url: str) -> bool:
    """Whether the database is in live mode."""
    with psycopg.connect(harden(url, "deploy"), autocommit=True) as conn:
        [(livemode,)] = conn.execute("select surety.read_livemode()").fetchall()
    return bool(livemode)


def require_mode_if_deployed(url: str, settings: Settings, *, sandbox: bool) -> None:
    """Raises SettingsError as require_mode does, before the deploy of another version could change the database."""
    try:
        livemode = read_livemode(url)
    except psycopg.Error:
        return  # Surety was not deployed yet, or the database is away, which the deploy reports.
    require_mode(settings, livemode, sandbox=sandbox)


def require_mode(settings: Settings, livemode: bool, *, sandbox: bool) -> None:
    """Raises SettingsError for a key of the other mode than the database, and for a sandbox with a live database."""
    if not sandbox:
        settings.provider.require_mode(livemode)
    elif livemode:
        raise SettingsError("this database moves real money (surety mode): no sandbox may touch it")


def create_first_key(url: str) -> str | None:
    """Create a first merchant and its key in a test database without merchants; returns the key."""
    key = new_key(livemode=False)
    with psycopg.connect(harden(url, "deploy"), autocommit=True) as conn:
        made = conn.execute(
            "select surety.add_api_key(surety.add_merchant('First merchant', '', 'up'), %s, %s, 'up')"
            " from surety.environment where not livemode and not exists (select from surety.merchants)",
            (key.hash, key.hint),
        ).fetchone()
    return key.text if made else None


def create_first_admin(url: str, path: Path) -> Path | None:
    """The file of the personal key of this machine's admin, `local`, in a test database; None without one.

    It is made while no active admin has a valid key.
    """
    key = new_operator_key()
    with psycopg.connect(harden(url, "deploy"), autocommit=True) as conn, conn.transaction():
        made = conn.execute(
            "select surety.add_first_admin('local', 'local@localhost', %s, %s, 'up')"
            " from surety.environment where not livemode",
            (key.hash, key.hint),
        ).fetchone()
        if made and made[0]:
            path.unlink(missing_ok=True)
            with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as new:
                new.write(f"{key.text}\n")
    return path if path.exists() else None


def line_printer(console: Console) -> Callable[[str, str], None]:
    """Returns a function that prints a line after the name of its process."""
    colors: dict[str, str] = {}

    def print_line(name: str, line: str) -> None:
        color = colors.setdefault(name, COLORS[len(colors) % len(COLORS)])
        console.print(Text.assemble((f"{name:<9} ", color), line))

    return print_line


def print_welcome(
    console: Console, url: str, ports: dict[str, int], key: str | None, operator_key_file: Path | None
) -> None:
    """Print the addresses, the key and an example request."""
    console.print("  ".join(f"{name} http://127.0.0.1:{port}" for name, port in ports.items()), markup=False)
    console.print(f"export DATABASE_URL='{url}'", markup=False)
    if operator_key_file is not None:
        console.print(f"export SURETY_OPERATOR_KEY_FILE='{operator_key_file}'", markup=False)
    if key is None:
        console.print("a key: surety merchants list, then surety keys create MERCHANT_ID", markup=False)
        return
    console.print(
        f"the first merchant's key, shown this once: {key}\n"
        f"curl http://127.0.0.1:{ports['api']}/v1/payments --header 'Authorization: Bearer {key}'"
        f" {EXAMPLE_REQUEST_OPTIONS}",
        markup=False,
    )
