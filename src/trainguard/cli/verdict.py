"""`trainguard verdict RUN`: the four-valued verdict, drawn anew from the log."""

from __future__ import annotations

import sys
from pathlib import Path

import click
import msgspec

from trainguard.appraise.verdict import Verdict
from trainguard.cli._view import show
from trainguard.errors import Misuse
from trainguard.home import Home
from trainguard.policy import load_policy

CHECKPOINT_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin", ".safetensors")


@click.command("verdict")
@click.option("--policy", "policy_path", type=click.Path(path_type=Path), help="Judge by this policy (TOML) instead.")
@click.option("--json", "as_json", is_flag=True, help="Print the verdict document.")
@click.option("--tag", is_flag=True, help="Write the verdict to the MLflow and W&B runs that the run named.")
@click.option("--quiet", is_flag=True, help="Print nothing; the exit status tells.")
@click.argument("run")
def command(policy_path: Path | None, as_json: bool, tag: bool, quiet: bool, run: str) -> int:
    """Verdict on RUN: its id, a unique beginning of it, `latest`, or the path of a checkpoint that a run saved.

    Exit status: 0 VERIFIED, 1 TAINTED, 3 SUSPECT or UNKNOWN.
    """
    from trainguard.appraise.judge import judge_checkpoint, judge_run

    home = Home.find()
    policy = load_policy(policy_path) if policy_path is not None else None
    if is_path(home, run):
        verdict = judge_checkpoint(home, Path(run), policy=policy)
    else:
        verdict = judge_run(home, home.find_run(run), policy=policy)
    if as_json:
        sys.stdout.buffer.write(msgspec.json.encode(verdict) + b"\n")
    elif not quiet:
        from trainguard.render.terminal import verdict_view

        show(lambda ascii_only: verdict_view(verdict, ascii_only=ascii_only))
    if tag:
        _tag(home, run, verdict)
    return verdict.exit_status


def _tag(home: Home, run: str, verdict: Verdict) -> None:
    from trainguard.cli._tags import tag_trackers

    for sentence in tag_trackers(home, named_run(home, run), verdict):
        click.echo(f"trainguard: {sentence}", err=True)


def is_path(home: Home, name: str) -> bool:
    """Whether `name` is meant as a file or folder rather than a run."""
    return "/" in name or (Path(name).suffix in CHECKPOINT_SUFFIXES and not (home.runs / name).is_dir())


def named_run(home: Home, run: str) -> str:
    """The id of the run that `run` names. Raises Misuse, with a hint where it is a file."""
    if is_path(home, run):
        raise Misuse(
            f"{run}: expected a run, found a path",
            next_step="name the run (trainguard runs lists them), or ask for the checkpoint with: trainguard verdict",
        )
    return home.find_run(run)
