"""`surety api`."""

from __future__ import annotations

import click

from db.settings import load_settings


@click.command()
@click.option("--host", help="Default: SURETY_HOST, else 127.0.0.1.")
@click.option("--port", type=click.IntRange(0, 65535), help="Default: SURETY_API_PORT, else 8000; 0 takes a free one.")
@click.option("--processes", type=click.IntRange(min=1), default=1, show_default=True, help="How many processes.")
def api(host: str | None, port: int | None, processes: int) -> None:
    """Serve the HTTP API until interrupted; requests that wait are finished first."""
    from app.web.database import require_deployed
    from app.web.serving import serve

    settings = load_settings()
    require_deployed("api", settings, "api.create_payments(json)")
    serve(
        "app.api.application:create_app",
        name="api",
        host=host or settings.surety_host,
        port=settings.surety_api_port if port is None else port,
        processes=processes,
    )
