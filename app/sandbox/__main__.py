"""`python -m app.sandbox`: the sandbox as a process of its own."""

from pathlib import Path
from typing import Any

import click
import msgspec

from app.sandbox.server import serve_sandbox
from app.sandbox.settings import WEBHOOK_SECRET, SandboxSettings
from app.sandbox.stripe.webhooks import ReceiverConnection

NUMBERS = [
    field for field in msgspec.structs.fields(SandboxSettings) if field.type in (float, int) and field.name != "seed"
]


def setting_options(command: Any) -> Any:
    """One option for each number in the settings, `--hang-seconds` and so on."""
    for field in reversed(NUMBERS):
        option = "--" + field.name.replace("_", "-")
        command = click.option(option, type=field.type, default=field.default, show_default=True)(command)
    return command


def require_http(_context: click.Context, _option: click.Parameter, url: str | None) -> str | None:
    """The address of a receiver: http with a host, because the sandbox speaks no TLS."""
    if url is None:
        return None
    try:
        ReceiverConnection(url)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None
    return url


@click.command(context_settings={"show_default": True})
@click.option("--host", default="127.0.0.1")
@click.option("--port", default=0, help="0 takes a free one; it is printed.")
@click.option("--fd", type=int, help="An open socket to listen on, instead of host and port.")
@click.option("--memory", type=click.Path(path_type=Path, dir_okay=False), default=Path("sandbox.sqlite"))
@click.option("--seed", default=1)
@click.option("--live", "livemode", is_flag=True, help="Pretend to move real money: livemode is true everywhere.")
@click.option("--faults/--no-faults", default=False, help="Misbehave as in the demo.")
@click.option("--auto-payer", is_flag=True, help="Complete 3-D Secure automatically; implied by --faults.")
@click.option("--webhook-url", callback=require_http, help="Where webhooks are delivered, by http://.")
@click.option("--webhook-secret", default=WEBHOOK_SECRET)
@click.option("--webhook-event", "webhook_events", multiple=True, help="Deliver only these event types; repeatable.")
@click.option("--settlement-currency", help="Convert all charges to this currency; by default each settles in its own.")
@setting_options
def main(
    *,
    host: str,
    port: int,
    fd: int | None,
    memory: Path,
    seed: int,
    livemode: bool,
    faults: bool,
    auto_payer: bool,
    webhook_url: str | None,
    webhook_secret: str,
    webhook_events: tuple[str, ...],
    settlement_currency: str | None,
    **numbers: Any,
) -> None:
    """Serve a sandbox of Stripe until SIGINT or SIGTERM."""
    settings = SandboxSettings(
        livemode=livemode, auto_payer=auto_payer, webhook_events=webhook_events,
        settlement_currency=settlement_currency, **numbers,
    )  # fmt: skip
    serve_sandbox(
        host=host, port=port, fd=fd, memory=memory, seed=seed, faults=faults,
        webhook_url=webhook_url, webhook_secret=webhook_secret, settings=settings,
    )  # fmt: skip


if __name__ == "__main__":
    main()
