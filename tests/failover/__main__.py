"""`python -m tests.failover`."""

from __future__ import annotations

import json
import secrets
import shutil
import sys
import tempfile
from pathlib import Path

import click
import msgspec

from app.local.demo.workspace import demo_folder
from app.local.processes import Interrupted, interruptible
from db.errors import SuretyError
from tests.failover.disturbances import DISTURBANCES
from tests.failover.run import run


@click.command(context_settings={"show_default": True})
@click.option("--disturbances", default=",".join(DISTURBANCES), help="In this order.")
@click.option("--strict", is_flag=True, help="Patroni's synchronous_mode_strict: no commit without a standby.")
@click.option("--seed", type=int, help="Seed of the load.")
@click.option(
    "--logs", type=click.Path(path_type=Path), help="Keep the logs there; else only if an invariant is broken."
)
@click.option("--json", "as_json", is_flag=True, help="The result as one JSON object on the last line.")
def main(disturbances: str, *, strict: bool, seed: int | None, logs: Path | None, as_json: bool) -> None:
    """Let servers fail over under load, then check every invariant. Exit status 1 if one was violated."""
    seed = secrets.randbelow(10_000) if seed is None else seed
    chosen = disturbances.split(",")
    if unknown := [name for name in chosen if name not in DISTURBANCES]:
        raise click.UsageError(f"unknown: {', '.join(unknown)}; there are {', '.join(DISTURBANCES)}")
    kept = logs
    try:
        with interruptible(), demo_folder() as folder:
            is_sound = False
            try:
                result = run(folder, chosen, seed, lambda line: click.echo(line, err=True), strict=strict)
                is_sound = result.is_sound
            finally:
                if logs or not is_sound:
                    kept = logs or Path(tempfile.mkdtemp(prefix="failover-"))
                    shutil.copytree(folder, kept, dirs_exist_ok=True)
                    click.echo(f"logs in {kept}; seed {seed}", err=True)
    except Interrupted:
        sys.exit(130)
    except SuretyError as error:
        raise click.ClickException(str(error)) from None
    fields = msgspec.to_builtins(result)
    click.echo(json.dumps(fields) if as_json else json.dumps(fields, indent=2))
    sys.exit(0 if result.is_sound else 1)


if __name__ == "__main__":
    main()
