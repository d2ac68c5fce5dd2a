"""The command line: one file per verb; a verb parses, calls one library function and renders.

Verbs are imported only when called, so `trainguard --help` stays fast and nothing here imports torch.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

import click

from trainguard import __version__
from trainguard.errors import TrainguardError

VERBS: dict[str, tuple[str, str]] = {
    "run": ("trainguard.cli.run", "Run a command guarded, unmodified; verdict at the end."),
    "lock": ("trainguard.cli.lock", "Write the approved reference values of a command."),
    "preflight": ("trainguard.cli.preflight", "Compare what would run now with the lock."),
    "scan": ("trainguard.cli.scan", "Vet model files without loading them."),
    "seal": ("trainguard.cli.seal", "Sign a checkpoint file or folder and log it."),
    "verify": ("trainguard.cli.verify", "Check a sealed checkpoint, naming the tensors that changed."),
    "probe": ("trainguard.cli.probe", "The same code as rank 0 of a big job, on one CPU."),
    "explain": ("trainguard.cli.explain", "Per link of a run: held, broken, blind or explained."),
    "audit": ("trainguard.cli.audit", "Replay unpredictable segments of a run on the clean side and compare."),
    "verdict": ("trainguard.cli.verdict", "The four-valued verdict of a run, with findings and reasons."),
    "runs": ("trainguard.cli.runs", "List recorded runs."),
    "show": ("trainguard.cli.show", "One run as a timeline; --html for the report."),
    "diff": ("trainguard.cli.diff", "What differs between two runs that should be equal."),
    "recover": ("trainguard.cli.recover", "The last good checkpoint of a run, and the command that resumes from it."),
    "incident": ("trainguard.cli.incident", "What belongs together, from where, what it touched; reports."),
    "case": ("trainguard.cli.case", "Need-to-know rooms for those who look for a cause."),
    "damage": ("trainguard.cli.damage", "Device-hours and money lost, as ranges with their rows."),
    "lineage": ("trainguard.cli.lineage", "What was made from what; what is tainted, what is not affected."),
    "data": ("trainguard.cli.data", "Sources of training data: register, withdraw, prove that one was not used."),
    "gate": ("trainguard.cli.gate", "May this model be released or served?"),
    "export": (
        "trainguard.cli.export",
        "Findings, models and lineage in others' formats; signed delivery to a webhook.",
    ),
    "log": ("trainguard.cli.log", "The transparency log: head, show, prove, verify."),
    "demo": ("trainguard.cli.demo", "The whole story on a small model."),
    "node": ("trainguard.cli.node", "As root: record who signals whom on this machine, for every run on it."),
    "doctor": ("trainguard.cli.doctor", "Is this machine set up well?"),
}
"""verb → (module with a click command named `command`, the line `--help` prints)."""


class _Verbs(click.Group):
    """A group that knows its verbs by table and imports one only when it is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in VERBS:
            return None
        command: click.Command = importlib.import_module(VERBS[cmd_name][0]).command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Verbs"):
            formatter.write_dl([(verb, line) for verb, (_, line) in VERBS.items()])


@click.group(cls=_Verbs, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="trainguard")
def cli() -> None:
    """Guards PyTorch training against quiet sabotage.

    Exit status: 0 upheld or clean, 1 violated or findings, 2 usage error, 3 could not tell.
    """


def main(arguments: list[str] | None = None) -> Any:
    """Entry point: errors become one sentence on stderr and the exit status of their family."""
    try:
        return cli.main(args=arguments, prog_name="trainguard", standalone_mode=False) or 0
    except click.exceptions.Abort:
        print("trainguard: interrupted", file=sys.stderr)
        sys.exit(130)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except TrainguardError as error:
        hint = f"\n  next: {error.next_step}" if error.next_step else ""
        print(f"trainguard: {error}{hint}", file=sys.stderr)
        sys.exit(error.exit_status)
