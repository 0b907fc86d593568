"""`python -m tests.crash`."""

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
from tests.crash.kills import KINDS
from tests.crash.run import run


@click.command(context_settings={"show_default": True})
@click.option("--cycles", default=20, type=click.IntRange(1), help="Kills.")
@click.option("--seed", type=int, help="Seed of the kills: their targets, order and times.")
@click.option("--kinds", help=f"Kinds in this order, instead of random ones: {','.join(KINDS)}.")
@click.option(
    "--logs", type=click.Path(path_type=Path), help="Keep the logs there; else only if an invariant is broken."
)
@click.option("--json", "as_json", is_flag=True, help="The result as one JSON object on the last line.")
def main(cycles: int, seed: int | None, kinds: str | None, logs: Path | None, as_json: bool) -> None:
    """Kill processes under load, and check every invariant after recovery. Exit status 1 if one was violated."""
    seed = secrets.randbelow(10_000) if seed is None else seed
    chosen = kinds.split(",") if kinds else None
    click.echo(f"seed {seed}", err=True)
    try:
        with interruptible(), demo_folder() as folder:
            result = run(folder, cycles, seed, chosen, lambda line: click.echo(line, err=True))
            if logs or not result.is_sound:
                kept = logs or Path(tempfile.mkdtemp(prefix="crash-"))
                shutil.copytree(folder, kept, dirs_exist_ok=True)
                click.echo(f"logs in {kept}; repeat with: --cycles {cycles} --seed {seed}", err=True)
    except Interrupted:
        sys.exit(130)
    result_fields = msgspec.to_builtins(result)
    click.echo(json.dumps(result_fields) if as_json else json.dumps(result_fields, indent=2))
    sys.exit(0 if result.is_sound else 1)


if __name__ == "__main__":
    main()
