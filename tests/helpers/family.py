"""A family of runs in one log: who was made from what is real, what each run's record is worth is scripted."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from msgspec.structs import replace
from tests.helpers import told

from trainguard.appraise.verdict import Level, Verdict, decide
from trainguard.finding import Citation, Finding, LinkState, Outcome, Subject
from trainguard.home import Home
from trainguard.incident import lineage
from trainguard.seal.write import seal_path

SECOND = 1_000_000_000


def finding(
    step: int | None,
    outcome: Outcome = "violated",
    *,
    check: str = "weights",
    techniques: tuple[str, ...] = ("E4",),
    rank: int | None = 0,
    path: str | None = None,
    leaf: int | None = None,
    message: str = "a weight changed between two steps",
) -> Finding:
    """One finding as a judge makes it."""
    return Finding(
        check=check,
        outcome=outcome,
        techniques=techniques if outcome != "not_checked" else (),
        subject=Subject(step=step, rank=rank, path=path),
        message=message,
        evidence=(Citation(leaf=leaf, hash="0" * 64),) if leaf is not None else (),
    )


def verdict(*findings: Finding, steps: int = 10, gaps: Iterable[str] = (), level: Level = "TIL-1") -> Verdict:
    """The verdict that these findings make, drawn by the real rule."""
    links = (LinkState(link="weights", held=steps, broken=sum(f.outcome == "violated" for f in findings)),)
    return replace(decide(findings, links, steps=steps, watched_steps=steps, gaps=tuple(gaps)), level=level)


def ticking(*, begin: int = 1_700_000_000 * SECOND, second: float = 1.0) -> Callable[[], int]:
    """A clock that moves on by `second` whenever it is asked."""
    count = itertools.count()
    return lambda: begin + int(next(count) * second * SECOND)


@dataclass(slots=True)
class Family:
    """Runs of one log with the verdicts they are to have."""

    home: Home
    folder: Path
    verdicts: dict[str, Verdict] = field(default_factory=dict)

    def run(
        self,
        name: str,
        *findings: Finding,
        opens: Iterable[Path] = (),
        saves: Mapping[int, str] | None = None,
        steps: int = 10,
        ranks: int = 1,
        gaps: Iterable[str] = (),
        level: Level = "TIL-1",
        second: float = 1.0,
        command: tuple[str, ...] = ("python", "train.py"),
    ) -> list[Path]:
        """Record a run of `steps` steps on `ranks` devices; step s ends s × ranks × `second` after the last hello.

        saves: step → file name below the family's folder. Returns the files.
        """
        self.verdicts[name] = verdict(*findings, steps=steps, gaps=gaps, level=level)
        lines = [told.start(command), *(told.process(rank, rank) for rank in range(ranks))]
        for path in opens:
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            body = {"files": [{"path": str(path), "sha256": digest, "mode": "r", "first": 0}]}
            lines.append(("open", body, {"process": 0, "rank": 0, "source": "process"}))
        lines += [told.step(number, rank, rank) for number in range(1, steps + 1) for rank in range(ranks)]
        lines += [line for rank in range(ranks) for line in told.leave(rank)]
        told.record(self.home, name, [*lines, told.end()], clock=ticking(second=second))
        return [self.save(name, step, file) for step, file in (saves or {}).items()]

    def save(self, run: str, step: int | None, file: str, content: str | None = None) -> Path:
        """Write and seal a file as the work of `run` after `step`."""
        path = self.folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content if content is not None else f"{run} {step}")
        seal_path(self.home, path, run=run, step=step, source="run")
        return path

    def judged(self, patch: pytest.MonkeyPatch) -> None:
        """From now on every run of the log has its scripted verdict."""
        patch.setattr(lineage, "judge_run", lambda home, run, **options: self.verdicts[run])
