"""`surety health`: a check of one process for its supervisor, such as a container's health check."""

from __future__ import annotations

from http.client import HTTPConnection, HTTPException

import click

from db.connect import connect
from db.errors import DatabaseClosed, SuretyError
from db.settings import Settings, load_settings

ANSWER_SECONDS_MAX = 5.0


class NotHealthy(SuretyError):
    """The process does not answer, or answers that its database can't be used."""


@click.command()
@click.argument("process", type=click.Choice(["api", "webhooks", "worker"]))
@click.option("--port", type=click.IntRange(1, 65535), help="Default: SURETY_API_PORT or SURETY_WEBHOOK_PORT.")
def health(process: str, port: int | None) -> None:
    """Check the process of this machine; exit status 1 if it can't work.

    API and receiver are asked by HTTP, whether they reach their database. For a worker, its settings and its database
    are checked as at its start; its own watchdog ends it if it hangs.
    """
    settings = load_settings()
    if process == "worker":
        check_database_of_workers(settings)
    else:
        default = settings.surety_api_port if process == "api" else settings.surety_webhook_port
        check_server(settings.surety_host, port or default)
    click.echo(f"{process} is healthy")


def check_server(host: str, port: int) -> None:
    """Raises NotHealthy unless the server answers 200 to GET /health."""
    reachable = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104  the address that the server takes
    connection = HTTPConnection(reachable, port, timeout=ANSWER_SECONDS_MAX)
    try:
        connection.request("GET", "/health")
        status = connection.getresponse().status
    except (OSError, HTTPException) as error:
        raise NotHealthy(f"no answer from {reachable}:{port}: {error}") from None
    finally:
        connection.close()
    if status != 200:
        raise NotHealthy(f"{reachable}:{port}/health answered {status}")


def check_database_of_workers(settings: Settings) -> None:
    """Raises SettingsError, DatabaseClosed or psycopg.Error if a worker could not start here."""
    provider = settings.provider
    with connect("worker", settings) as conn:
        [(livemode, refusal)] = conn.execute(
            "select surety.read_livemode(), outbox.provider_refusal(%s)", (provider.url is not None,)
        ).fetchall()
    provider.require_mode(livemode)
    if refusal is not None:
        raise DatabaseClosed(refusal)
