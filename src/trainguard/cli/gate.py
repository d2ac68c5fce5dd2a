"""`trainguard gate MODEL`: may this model be released or served? For CI and for servers."""

from __future__ import annotations

import sys
from pathlib import Path

import click
import msgspec

from trainguard.home import Home


@click.command("gate")
@click.option("--require", "word", default="VERIFIED", metavar="VERDICT", show_default=True, help="Verdict it needs.")
@click.option("--level", default="TIL-1", metavar="LEVEL", show_default=True, help="Integrity level it needs.")
@click.option("--json", "as_json", is_flag=True, help="Print the answer.")
@click.option("--quiet", is_flag=True, help="Print nothing; the exit status tells.")
@click.argument("model", type=click.Path(path_type=Path))
def command(word: str, level: str, as_json: bool, quiet: bool, model: Path) -> int:
    """Let MODEL through only if it, and all it was made from, is VERIFIED.

    Exit status: 0 it may be used, 1 something was found against it, 3 it could not be told.
    """
    from trainguard.incident.gate import ask, parse_level, parse_word

    answer = ask(model, home=Home.find(), word=parse_word(word), level=parse_level(level))
    if as_json:
        sys.stdout.buffer.write(msgspec.json.encode(answer) + b"\n")
    elif not quiet:
        from trainguard.render.answer import gate_lines

        click.echo("\n".join(gate_lines(answer)))
    return answer.exit_status
