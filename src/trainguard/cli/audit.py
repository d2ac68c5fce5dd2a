"""`trainguard audit RUN`: replay unpredictable segments of a run in clean processes and compare."""

from __future__ import annotations

import shlex
import shutil
import sys
from pathlib import Path

import click
import msgspec

from trainguard.cli._session import warn
from trainguard.cli._view import show
from trainguard.cli.verdict import named_run
from trainguard.errors import Misuse
from trainguard.home import Home
from trainguard.veil import MAINTENANCE

NAMES = ("local", "slurm", "ray", "kubernetes")
"""As in replay.executors, which is imported when it is used."""


class _Share(click.ParamType[float]):
    """A share: `1%`, or a number from 0 to 1."""

    name = "share"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> float:
        text = str(value)
        try:
            number = float(text[:-1]) / 100 if text.endswith("%") else float(text)
        except ValueError:
            number = -1.0
        if not 0.0 < number <= 1.0:
            self.fail(f"expected a share such as 1% or 0.05, found {text!r}", param, ctx)
        return number


@click.command("audit")
@click.option("--budget", type=_Share(), default="1%", show_default=True, help="Share of the run's steps to replay.")
@click.option("--confidence", type=_Share(), help="Replay as many segments as give this chance, instead of --budget.")
@click.option("--tampered", type=_Share(), default="0.05", show_default=True, help="Share of segments for that chance.")
@click.option("--segments", help="Exactly these segments, by number: 0,3,7 or all.")
@click.option("--bisect", is_flag=True, help="Find the first segment that differs, instead of drawing segments.")
@click.option("--explain/--no-explain", default=True, help="Look for the cause of a difference.  [default: explain]")
@click.option(
    "--env", "python", metavar="PYTHON", help="Python of another environment, `ssh HOST PYTHON`, or image:NAME."
)
@click.option("--executor", type=click.Choice(NAMES), default="local", show_default=True, help="Where to replay.")
@click.option("--set", "given", multiple=True, metavar="NAME=VALUE", help="Setting of the executor; several are fine.")
@click.option("--worker", metavar="PYTHON", help="Python that has trainguard, where tasks are performed.")
@click.option(
    "--limit", type=click.FloatRange(min=1), default=3600.0, show_default=True, help="Seconds for one replay."
)
@click.option("--json", "as_json", is_flag=True, help="Print the verdict document.")
@click.option("--quiet", is_flag=True, help="Print nothing; the exit status tells.")
@click.argument("run")
def command(
    budget: float,
    confidence: float | None,
    tampered: float,
    segments: str | None,
    bisect: bool,
    explain: bool,
    python: str | None,
    executor: str,
    given: tuple[str, ...],
    worker: str | None,
    limit: float,
    as_json: bool,
    quiet: bool,
    run: str,
) -> int:
    """Replay segments of RUN that nobody could know before, on the clean side, and compare every link.

    A difference that two replays from the first step agree on is explained: its step is tried again with what may have
    been done to it, until one gives the recorded bytes.

    Where this machine mutes the run, it is replayed and logged, and only the verdict as it is shown here is told.

    Exit status: 0 every drawn segment is equal bit for bit, 1 one differs, 3 something could not be replayed.
    """
    from trainguard.appraise.judge import judge_run
    from trainguard.replay.audit import EXPLAIN_SECONDS, Options, audit

    if bisect and segments is not None:
        raise Misuse("--bisect chooses the segments itself: leave out --segments")
    home = Home.find()
    name = named_run(home, run)
    options = Options(
        budget=budget,
        confidence=confidence,
        tampered=tampered,
        only=_segments(home, name, segments),
        python=_python(python),
        executor=executor,
        worker=tuple(shlex.split(worker)) if worker else (),
        settings=tuple(_setting(word) for word in given),
        limit_seconds=limit,
        bisect=bisect,
        explain_seconds=EXPLAIN_SECONDS if explain else 0.0,
    )
    muted = MAINTENANCE in judge_run(home, name).gaps
    report = audit(home, name, options, progress=(lambda _text: None) if quiet or as_json or muted else warn)
    verdict = judge_run(home, name) if muted or as_json else None
    if as_json:
        sys.stdout.buffer.write(msgspec.json.encode(verdict) + b"\n")
    elif muted and not quiet:
        click.echo(f"run {name}: {MAINTENANCE}")
    elif not quiet:
        from trainguard.render.audit import audit_view

        show(lambda ascii_only: audit_view(report, ascii_only=ascii_only))
    return verdict.exit_status if muted and verdict is not None else report.exit_status


def _segments(home: Home, run: str, text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    if text == "all":
        return ()
    try:
        return tuple(dict.fromkeys(int(word) for word in text.split(",")))
    except ValueError as error:
        raise Misuse(f"--segments: expected numbers such as 0,3,7 or all, found {text!r}") from error


def _setting(word: str) -> tuple[str, str]:
    name, sign, value = word.partition("=")
    if not sign or not name:
        raise Misuse(f"--set {word}: expected NAME=VALUE")
    return name, value


def _python(given: str | None) -> str | None:
    """An interpreter on this machine as it is called (a virtual environment's link is not followed), or words."""
    if given is None or given.startswith("image:") or (len(given.split()) > 1 and not Path(given).exists()):
        return given
    found = shutil.which(given)
    if found is None:
        raise Misuse(f"--env {given}: expected a Python interpreter, found no such program")
    return str(Path(found).absolute())
