"""`trainguard lineage [MODEL|RUN]`: what was made from what, what is tainted, and what is not affected."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click
import msgspec

from trainguard.cli.verdict import is_path, named_run
from trainguard.home import Home
from trainguard.log import LogReader

if TYPE_CHECKING:
    from trainguard.incident.lineage import Lineage


@click.command("lineage")
@click.option(
    "--claims",
    multiple=True,
    metavar="[KIND:]PATH",
    help="Edges that others claim: mlflow:, wandb:, openlineage:, huggingface:, or a claims file; repeat.",
)
@click.option("--save-claims", type=click.Path(path_type=Path), help="Write them here as claims files, one a line.")
@click.option("--keep", type=click.Path(path_type=Path), help="Write the lineage here, for --kept.")
@click.option("--kept", type=click.Path(path_type=Path), help="Ask the lineage in this file, as of when it was kept.")
@click.option("--json", "as_json", is_flag=True, help="Print it as one document.")
@click.option("--quiet", is_flag=True, help="Print nothing; the exit status tells.")
@click.argument("subject", required=False)
def command(
    claims: tuple[str, ...],
    save_claims: Path | None,
    keep: Path | None,
    kept: Path | None,
    as_json: bool,
    quiet: bool,
    subject: str | None,
) -> int:
    """Every run and checkpoint with its standing: as good as the worst it was made from.

    With SUBJECT (a checkpoint's path, a run, or a key as --json gives it), only what it was made from and what was
    made from it.

    Exit status: 0 all VERIFIED, 1 something is TAINTED, 3 something could not be told.
    """
    from trainguard.digest import write_durably
    from trainguard.incident.importers import read_any
    from trainguard.incident.lineage import family, read_lineage

    home = Home.find()
    lineage = _kept(home, kept) if kept is not None else read_lineage(home)
    read = [read_any(named) for named in claims]
    for one in read:
        one.known_as(lineage.trackers).join(lineage.graph)
    if save_claims is not None:
        write_durably(save_claims.absolute(), b"".join(msgspec.json.encode(one) + b"\n" for one in read))
    if keep is not None:
        from trainguard.incident.kept import keep as write

        write(lineage, home, keep)
    shown = family(lineage, _key(home, lineage, subject) if subject is not None else None)
    if as_json:
        sys.stdout.buffer.write(msgspec.json.encode(shown) + b"\n")
    elif not quiet:
        from trainguard.cli._view import show
        from trainguard.render.answer import lineage_view

        show(lambda ascii_only: lineage_view(shown, ascii_only=ascii_only))
    return shown.exit_status


def _kept(home: Home, path: Path) -> Lineage:
    """The lineage in a file, with a word on how old it is."""
    from trainguard.incident.kept import read_kept

    kept, lineage = read_kept(path)
    there = home.log.is_dir()
    now = LogReader(home.log, home.keys / "log.vkey").head().size if there else None
    since = f"; the log here has {now:,} now" if now is not None and now != kept.tree_size else ""
    click.echo(f"{path}: as of {kept.tree_size:,} entries of the log {kept.origin}{since}", err=True)
    return lineage


def _key(home: Home, lineage: Lineage, subject: str) -> str:
    from trainguard.incident.lineage import checkpoint_key, root_of, run_key

    if subject in lineage.graph.nodes:
        return subject
    if is_path(home, subject):
        return checkpoint_key(root_of(Path(subject)))
    return run_key(subject) if run_key(subject) in lineage.graph.nodes else run_key(named_run(home, subject))
