"""`trainguard runs`: what was recorded here."""

from __future__ import annotations

import math
import sys

import click
import msgspec

from trainguard.cli._view import show
from trainguard.home import Home


@click.command("runs")
@click.option("--all", "every", is_flag=True, help="Judge every run, however long that takes.")
@click.option("--json", "as_json", is_flag=True, help="Print the list as one JSON document.")
@click.option("--quiet", is_flag=True, help="Print only the ids, newest first.")
def command(every: bool, as_json: bool, quiet: bool) -> int:
    """List recorded runs, newest first, with a verdict drawn anew for as many as one second allows."""
    from trainguard.render import listing

    rows = listing.rows(Home.find(), budget_seconds=math.inf if every else listing.BUDGET_SECONDS)
    if as_json:
        sys.stdout.buffer.write(msgspec.json.encode({"schema": "trainguard/runs/v1", "runs": rows}) + b"\n")
    elif quiet:
        sys.stdout.write("".join(f"{row.run}\n" for row in rows))
    else:
        from trainguard.render.terminal import runs_view

        show(lambda _ascii_only: runs_view(rows))
    return 0
