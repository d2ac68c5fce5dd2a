"""May this model be released or served? A pure question to the log (DESIGN section 5, `gate`).

    answer = require(Path("model.pt"), home=home, word="VERIFIED", level="TIL-3")
    answer.passed, answer.reasons

A model passes when it is byte for byte what a watched run sealed, its run up to that step has the required verdict at
the required level, and so has everything it was made from. Whatever cannot be told does not pass.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import msgspec

from trainguard.appraise.judge import maintained
from trainguard.appraise.verdict import Level, Verdict, Word
from trainguard.errors import Misuse, TrainguardError
from trainguard.finding import Finding
from trainguard.home import Home
from trainguard.incident.graph import RANK
from trainguard.incident.lineage import Lineage, checkpoint_key, read_lineage
from trainguard.seal.report import SealReport
from trainguard.seal.verify import verify_seal
from trainguard.veil import MAINTENANCE

LEVELS: tuple[Level, ...] = ("TIL-0", "TIL-1", "TIL-2", "TIL-3", "TIL-4")
WORDS: tuple[Word, ...] = ("VERIFIED", "UNKNOWN", "SUSPECT", "TAINTED")
SCHEMA = "trainguard/gate/v1"
REACHED: tuple[Level, ...] = ("TIL-0", "TIL-1", "TIL-3")
"""Levels that this version awards (spec/levels.md)."""


class Refused(TrainguardError):
    """A model whose gate does not hold was about to be used."""

    exit_status = 1


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """What the gate says, with the model's provenance."""

    schema: str = SCHEMA
    model: str
    """Path as asked for."""
    passed: bool
    required: Word
    required_level: Level
    verdict: Word
    """Of the model and all it was made from."""
    level: Level
    """The lowest level on the chain of runs that made it."""
    root: str | None = None
    """OMS root digest of the bytes that were looked at."""
    run: str | None = None
    step: int | None = None
    ancestors: tuple[str, ...] = ()
    """Runs it was made by, near ones first."""
    detection_probability: dict[str, float] = {}
    """As the run that made it states it: share of tampered segments → chance that replay had found it."""
    reasons: tuple[str, ...] = ()
    """Why it does not pass; empty when it does."""
    findings: tuple[Finding, ...] = ()

    @property
    def exit_status(self) -> int:
        """0 may be used; 1 refused for what was found; 3 refused for what could not be told."""
        if self.passed:
            return 0
        return 1 if self.verdict == "TAINTED" or any(f.outcome == "violated" for f in self.findings) else 3


def ask(model: Path, *, home: Home, word: Word = "VERIFIED", level: Level = "TIL-1") -> Answer:
    """Whether the checkpoint at `model` may be used. Reads all of its bytes.

    Raises Misuse or Unavailable where there is nothing to look at.
    """
    report = verify_seal(model, home=home)
    return _blurred(_asked(model, home, report, word, level), home)


def _blurred(answer: Answer, home: Home) -> Answer:
    """The answer as this machine shows it: a mute hides why, and nothing it covers is let through.

    Drawn from the verdicts as they are, so that no mute softens it.
    """
    runs = dict.fromkeys((*answer.ancestors, *((answer.run,) if answer.run is not None else ())))
    if not maintained(home, runs):
        return answer
    return msgspec.structs.replace(
        answer, passed=False, verdict="UNKNOWN", reasons=(MAINTENANCE,), findings=(), detection_probability={}
    )


def _asked(model: Path, home: Home, report: SealReport, word: Word, level: Level) -> Answer:
    lineage = read_lineage(home, lifted=True)
    run, root = report.run, report.root
    key = checkpoint_key(root) if root is not None else ""
    if run is None or key not in lineage.graph.nodes:
        return _unknown(model, report, word, level)
    standing = lineage.standing_of(key)
    runs = _runs(lineage, key, run)
    lowest = min((lineage.verdicts[name].level for name in runs), key=LEVELS.index)
    reasons = list(_against(standing.word, word, lowest, level))
    reasons += _missing({name: lineage.verdicts[name] for name in runs}, level)
    if RANK[standing.word] > RANK[word]:
        reasons += lineage.reasons(standing)
    broken = [finding for finding in report.findings if finding.outcome != "not_checked"]
    reasons += [f"{finding.check}: {finding.message}" for finding in broken]
    reasons += _untold(report)
    verdict: Word = "TAINTED" if any(f.outcome == "violated" for f in broken) else standing.word
    return Answer(
        model=str(model),
        passed=not reasons,
        required=word,
        required_level=level,
        verdict=verdict,
        level=lowest,
        root=root,
        run=run,
        step=report.step,
        ancestors=tuple(runs),
        detection_probability=lineage.verdicts[run].coverage.detection_probability,
        reasons=tuple(reasons),
        findings=report.findings,
    )


def require(model: Path, *, home: Home | None = None, word: Word = "VERIFIED", level: Level = "TIL-1") -> Answer:
    """`ask`, raising Refused where the gate does not hold: for servers and release jobs, before the file is loaded.

    The bytes looked at are those on the disk now; load them through `trainguard.open_checkpoint` to load no others.
    """
    answer = ask(model, home=home if home is not None else Home.find(), word=word, level=level)
    if not answer.passed:
        raise Refused(
            f"{model}: expected {word} at {level}, found {answer.verdict} at {answer.level}: {answer.reasons[0]}",
            next_step=f"trainguard gate {model} lists every reason",
        )
    return answer


def parse_word(text: str) -> Word:
    """The verdict a gate can require. Raises Misuse for anything else."""
    for word in WORDS:
        if text == word:
            return word
    raise Misuse(f"gate: expected a verdict of {', '.join(WORDS)}, found {text[:40]!r}")


def parse_level(text: str) -> Level:
    """The level a gate can require. Raises Misuse for anything else."""
    for level in LEVELS:
        if text == level:
            return level
    raise Misuse(f"gate: expected a level of {', '.join(LEVELS)}, found {text[:40]!r}")


def _against(found: Word, word: Word, lowest: Level, level: Level) -> list[str]:
    said = []
    if RANK[found] > RANK[word]:
        said.append(f"the verdict is {found}, {word} is required")
    if LEVELS.index(lowest) < LEVELS.index(level):
        said.append(f"the level is {lowest}, {level} is required")
    return said


def _missing(verdicts: Mapping[str, Verdict], level: Level) -> list[str]:
    """Which step each run on the way lacks for `level`, and what to type; nothing for those that have it."""
    short = {run: one for run, one in verdicts.items() if LEVELS.index(one.level) < LEVELS.index(level)}
    if not short:
        return []
    if level not in REACHED:
        return [f"{level} is not awarded by this version, whatever is done (spec/levels.md)"]
    return [f"run {run}: {_step_for(run, one, level)}" for run, one in short.items()]


def _step_for(run: str, verdict: Verdict, level: Level) -> str:
    if level != "TIL-3":
        return "nothing was recorded of it that a level could stand on"
    if verdict.lock is None:
        return "it ran without a lock, which cannot be made up for: trainguard lock, run it again, audit that run"
    if not verdict.coverage.replayed_steps:
        return f"no segment of it was replayed: trainguard audit {run} --env PYTHON"
    return (
        "no audit of it was made in an environment measured apart and as its lock approves: "
        f"trainguard audit {run} --env PYTHON"
    )


def _untold(report: SealReport) -> list[str]:
    """Why the seal does not hold where nothing was found against it: what could not be told may not pass."""
    if report.status != "unknown":
        return []
    missing = [f"{finding.check}: {finding.message}" for finding in report.findings if finding.outcome == "not_checked"]
    return missing or ["seal: whether these are the bytes that were sealed could not be told"]


def _runs(lineage: Lineage, key: str, run: str) -> list[str]:
    """The run that made it and those that made what it was made from."""
    nodes = (lineage.graph.nodes.get(ancestor) for ancestor in lineage.graph.ancestors(key))
    named = [run, *(node.run for node in nodes if node is not None and node.run is not None)]
    return [name for name in dict.fromkeys(named) if name in lineage.verdicts]


def _unknown(model: Path, report: SealReport, word: Word, level: Level) -> Answer:
    broken = [finding for finding in report.findings if finding.outcome == "violated"]
    reasons = [f"{finding.check}: {finding.message}" for finding in broken] + _untold(report)
    reasons.append("no watched run is known that made these bytes")
    return Answer(
        model=str(model),
        passed=False,
        required=word,
        required_level=level,
        verdict="TAINTED" if broken else "UNKNOWN",
        level="TIL-0",
        root=report.root,
        run=report.run,
        step=report.step,
        reasons=tuple(reasons),
        findings=report.findings,
    )
