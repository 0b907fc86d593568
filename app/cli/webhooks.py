"""`surety webhooks`."""

from __future__ import annotations

import click

from db.settings import load_settings


@click.command()
@click.option("--host", help="Default: SURETY_HOST, else 127.0.0.1.")
@click.option(
    "--port", type=click.IntRange(0, 65535), help="Default: SURETY_WEBHOOK_PORT, else 8001; 0 takes a free one."
)
@click.option("--processes", type=click.IntRange(min=1), default=1, show_default=True, help="How many processes.")
def webhooks(host: str | None, port: int | None, processes: int) -> None:
    """Receive providers' webhooks (POST /stripe) until interrupted."""
    from app.web.database import require_deployed
    from app.web.serving import serve

    settings = load_settings()
    assert settings.webhook_secrets
    require_deployed("webhook", settings, "surety.receive_webhooks(jsonb)")
    serve(
        "app.receiver:create_app",
        name="webhooks",
        host=host or settings.surety_host,
        port=settings.surety_webhook_port if port is None else port,
        processes=processes,
    )
