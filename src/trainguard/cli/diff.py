"""`trainguard diff RUN RUN`: what differs between two runs that should be equal."""

from __future__ import annotations

import sys

import click
import msgspec

from trainguard.cli._view import show
from trainguard.cli.verdict import named_run
from trainguard.home import Home


@click.command("diff")
@click.option("--json", "as_json", is_flag=True, help="Print the comparison as one JSON document.")
@click.option("--quiet", is_flag=True, help="Print nothing; the exit status tells.")
@click.argument("first")
@click.argument("second")
def command(as_json: bool, quiet: bool, first: str, second: str) -> int:
    """Compare two runs: command, environment, seeds, inputs, then the first step at which recorded values part.

    Exit status: 0 equal, 1 different, 3 could not tell.
    """
    from trainguard.appraise.difference import compare_runs

    home = Home.find()
    comparison = compare_runs(home, named_run(home, first), named_run(home, second))
    if as_json:
        sys.stdout.buffer.write(msgspec.json.encode(comparison) + b"\n")
    elif not quiet:
        from trainguard.render.comparison import comparison_view

        show(lambda _ascii_only: comparison_view(comparison))
    return comparison.exit_status
