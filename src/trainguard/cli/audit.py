"""`trainguard audit RUN`: replay unpredictable segments of a run in clean processes and compare."""

from __future__ import annotations

import shlex
import shutil
import signal
import sys
import time
from pathlib import Path

import click
import msgspec

from trainguard.archive import is_running
from trainguard.cli._progress import working
from trainguard.cli._session import warn
from trainguard.cli._view import show
from trainguard.cli.verdict import named_run
from trainguard.errors import Misuse
from trainguard.home import Home
from trainguard.veil import MAINTENANCE

NAMES = ("local", "slurm", "ray", "kubernetes")
"""As in replay.executors, which is imported when it is used."""

BEGIN_SECONDS = 30.0
"""How long --follow waits for its run to be there."""


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
@click.option("--follow", is_flag=True, help="Audit while RUN goes on: each segment is drawn once it is sealed.")
@click.option("--ranks-in-turn", is_flag=True, help="Replay a job of several ranks with one process at a time.")
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
    follow: bool,
    ranks_in_turn: bool,
    as_json: bool,
    quiet: bool,
    run: str,
) -> int:
    """Replay segments of RUN that nobody could know before, on the clean side, and compare every link.

    A difference that two replays from the first step agree on is explained: its step is tried again with what may have
    been done to it, until one gives the recorded bytes.

    With --follow the run is audited while it goes on, by processes that give way to everything else, until it ends or
    differs; what is drawn is decided when it cannot be changed any more. Causes are then left to an audit afterwards.

    Where this machine mutes the run, it is replayed and logged, and only the verdict as it is shown here is told.

    Exit status: 0 every drawn segment is equal bit for bit, 1 one differs, 3 something could not be replayed.
    """
    from trainguard.appraise.judge import judge_run
    from trainguard.replay.audit import EXPLAIN_SECONDS, Options, audit
    from trainguard.replay.follow import follow as follow_run
    from trainguard.replay.follow import lower

    if bisect and segments is not None:
        raise Misuse("--bisect chooses the segments itself: leave out --segments")
    home = Home.find()
    name = _begun(home, run) if follow else named_run(home, run)
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
        in_turn=ranks_in_turn,
        bisect=bisect,
        explain_seconds=EXPLAIN_SECONDS if explain and not follow else 0.0,
    )
    muted = MAINTENANCE in judge_run(home, name).gaps
    silent = quiet or muted or (as_json and not follow)
    if follow:
        lower()
        signal.signal(signal.SIGTERM, _leave)
    if follow:
        report = follow_run(home, name, options, progress=_silence if silent else warn)
    else:
        with working("reading the record", shown=not silent) as say:
            lines = sys.stderr.isatty()
            report = audit(home, name, options, progress=_silence if silent else say if lines else warn)
    verdict = judge_run(home, name) if muted or as_json else None
    if as_json:
        sys.stdout.buffer.write(msgspec.json.encode(verdict) + b"\n")
    elif muted and not quiet:
        click.echo(f"run {name}: {MAINTENANCE}")
    elif not quiet:
        from trainguard.render.audit import audit_view

        show(lambda ascii_only: audit_view(report, ascii_only=ascii_only))
    return verdict.exit_status if muted and verdict is not None else report.exit_status


def _begun(home: Home, run: str) -> str:
    """The id of a run that was started beside this audit, and may take a moment until it is on record: until then an
    older one whose name begins alike is not meant."""
    deadline = time.monotonic() + BEGIN_SECONDS
    while True:
        late = time.monotonic() > deadline
        try:
            name = named_run(home, run)
            if late or name == run or is_running(home.run(name)):
                return name
        except Misuse:
            if late:
                raise
        time.sleep(0.2)


def _silence(_text: str) -> None:
    """Say nothing."""


def _leave(_number: int, _frame: object) -> None:
    """Leave the rest: what was drawn and replayed is kept, and the same command goes on with it."""
    sys.exit(3)


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
