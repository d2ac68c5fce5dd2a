"""`trainguard recover RUN`: the last checkpoint before anything was wrong, and the command that resumes from it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click
import msgspec

from trainguard.cli._progress import working
from trainguard.cli.verdict import named_run
from trainguard.home import Home

if TYPE_CHECKING:
    from trainguard.incident.recover import Plan


@click.command("recover")
@click.option("--quarantine", is_flag=True, help="Set aside what came after it (moved, never deleted).")
@click.option(
    "--check", "reference", metavar="RUN", help="Does RUN end where this one, resumed, ends? Compares tensors."
)
@click.option("--html", "html_path", type=click.Path(path_type=Path), help="Write the recovery certificate here.")
@click.option("--pdf", "pdf_path", type=click.Path(path_type=Path), help="Write it as PDF/A (needs weasyprint).")
@click.option(
    "--ends",
    nargs=2,
    metavar="RESUMED REFERENCE",
    help="For the certificate: the run that went on, and one that was never attacked.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the plan.")
@click.option("--quiet", is_flag=True, help="Print nothing; the exit status tells.")
@click.argument("run")
def command(
    quarantine: bool,
    reference: str | None,
    html_path: Path | None,
    pdf_path: Path | None,
    ends: tuple[str, str] | None,
    as_json: bool,
    quiet: bool,
    run: str,
) -> int:
    """Show where RUN can go on from: its last checkpoint before the first finding, if its bytes are still there.

    With --check, RUN is the resumed run, and the last checkpoint of each is compared tensor by tensor.

    Exit status: 0 there is a way on (with --check: they end equal), 1 they differ, 3 there is none, or could not tell.
    """
    from trainguard.incident import recover

    home = Home.find()
    if reference is not None:
        return _check(home, named_run(home, run), named_run(home, reference), as_json=as_json, quiet=quiet)
    with working("looking for the last checkpoint that holds", shown=not quiet):
        plan = recover.plan_recovery(home, named_run(home, run))
    moved = recover.quarantine(plan) if quarantine else ()
    if html_path is not None or pdf_path is not None:
        _certify(home, plan, ends, html_path, pdf_path)
    if as_json:
        sys.stdout.buffer.write(msgspec.json.encode({**msgspec.to_builtins(plan), "moved": moved}) + b"\n")
    elif not quiet:
        from trainguard.render.answer import recover_lines

        click.echo("\n".join(recover_lines(plan, moved)))
    return plan.exit_status


def _check(home: Home, resumed: str, reference: str, *, as_json: bool, quiet: bool) -> int:
    from trainguard.incident.recover import compare_ends

    with working("comparing the last checkpoints, tensor by tensor", shown=not quiet):
        ends = compare_ends(home, resumed, reference)
    if as_json:
        sys.stdout.buffer.write(msgspec.json.encode(ends) + b"\n")
    elif not quiet:
        from trainguard.render.answer import ends_lines

        click.echo("\n".join(ends_lines(ends)))
    return ends.exit_status


def _certify(
    home: Home, plan: Plan, ends: tuple[str, str] | None, html_path: Path | None, pdf_path: Path | None
) -> None:
    from trainguard.appraise.judge import judge_run
    from trainguard.cli._documents import write_document
    from trainguard.incident.dossier import source_of
    from trainguard.incident.recover import compare_ends
    from trainguard.render.documents import certificate_page

    compared = compare_ends(home, named_run(home, ends[0]), named_run(home, ends[1])) if ends is not None else None
    detection = judge_run(home, plan.run).coverage.detection_probability
    page = certificate_page(plan, source_of(home), detection=detection, ends=compared)
    write_document(page, html_path, pdf_path, identity=f"recovery {plan.run}", verb="recover")
