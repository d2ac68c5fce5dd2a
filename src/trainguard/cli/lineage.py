"""`trainguard lineage [MODEL|RUN]`: what was made from what, what is tainted, and what is not affected."""

from __future__ import annotations

import sys
from pathlib import Path

import click
import msgspec

from trainguard.cli.verdict import is_path, named_run
from trainguard.home import Home


@click.command("lineage")
@click.option(
    "--claims",
    multiple=True,
    metavar="[KIND:]PATH",
    help="Edges that others claim: mlflow:, wandb:, openlineage:, huggingface:, or a claims file; repeat.",
)
@click.option("--save-claims", type=click.Path(path_type=Path), help="Write them here as claims files, one a line.")
@click.option("--json", "as_json", is_flag=True, help="Print it as one document.")
@click.option("--quiet", is_flag=True, help="Print nothing; the exit status tells.")
@click.argument("subject", required=False)
def command(claims: tuple[str, ...], save_claims: Path | None, as_json: bool, quiet: bool, subject: str | None) -> int:
    """Every run and checkpoint with its standing: as good as the worst it was made from.

    With SUBJECT (a checkpoint's path or a run), only what it was made from and what was made from it.

    Exit status: 0 all VERIFIED, 1 something is TAINTED, 3 something could not be told.
    """
    from trainguard.digest import write_durably
    from trainguard.incident.importers import read_any
    from trainguard.incident.lineage import checkpoint_key, family, read_lineage, root_of, run_key

    home = Home.find()
    lineage = read_lineage(home)
    read = [read_any(named) for named in claims]
    for one in read:
        one.known_as(lineage.trackers).join(lineage.graph)
    if save_claims is not None:
        write_durably(save_claims.absolute(), b"".join(msgspec.json.encode(one) + b"\n" for one in read))
    key = None
    if subject is not None:
        path = is_path(home, subject)
        key = checkpoint_key(root_of(Path(subject))) if path else run_key(named_run(home, subject))
    shown = family(lineage, key)
    if as_json:
        sys.stdout.buffer.write(msgspec.json.encode(shown) + b"\n")
    elif not quiet:
        from trainguard.cli._view import show
        from trainguard.render.answer import lineage_view

        show(lambda ascii_only: lineage_view(shown, ascii_only=ascii_only))
    return shown.exit_status
