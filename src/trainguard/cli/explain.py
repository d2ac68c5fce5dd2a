"""`trainguard explain RUN`: how each link ended, where, and what would make visible what was not seen."""

from __future__ import annotations

import sys

import click
import msgspec

from trainguard.cli._view import show
from trainguard.cli.verdict import named_run
from trainguard.home import Home


@click.command("explain")
@click.option("--json", "as_json", is_flag=True, help="Print the explanation as one JSON document.")
@click.option("--quiet", is_flag=True, help="Print nothing; the exit status tells.")
@click.argument("run")
def command(as_json: bool, quiet: bool, run: str) -> int:
    """Per link of RUN: held, broken, blind or explained, with file:line.

    Exit status: that of the verdict.
    """
    from trainguard.appraise.judge import judge_run
    from trainguard.render.explanation import explain, explanation_view

    home = Home.find()
    verdict = judge_run(home, named_run(home, run))
    explanation = explain(verdict)
    if as_json:
        sys.stdout.buffer.write(msgspec.json.encode(explanation) + b"\n")
    elif not quiet:
        show(lambda ascii_only: explanation_view(explanation, verdict, ascii_only=ascii_only))
    return verdict.exit_status
