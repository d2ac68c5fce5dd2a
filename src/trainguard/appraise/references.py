"""Makes the plan of a lock from runs that were recorded: which runs may be references, and what they have in common.

plan = plan_from(home, ["20261123-101500-3f2a", "20261123-110200-77c1"], measurement)
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from trainguard.appraise.course import Told, agreed, told_by
from trainguard.appraise.environment import differences
from trainguard.appraise.judge import judge_run
from trainguard.archive import LogLeaves, RunReader
from trainguard.errors import Misuse, TrainguardError
from trainguard.evidence import Evidence
from trainguard.home import Home
from trainguard.lockfile import Launch, Measurement, Plan, parse_measurement
from trainguard.policy import Policy

LEAST = 2
HOW = "record one with: trainguard run -- CMD…"


def plan_from(home: Home, runs: Sequence[str], measurement: Measurement) -> Plan:
    """What `runs` have in common, as a plan for a lock over `measurement`.

    Raises Misuse where they are fewer than two, where one has not ended, has findings against it, or ran something
    else than `measurement`, or where nobody can tell whose values are whose; VerificationError for a broken log.
    """
    if len(set(runs)) < LEAST:
        raise Misuse(
            f"--plan: expected {LEAST} runs of the command or more, found {len(set(runs))}: one run does not tell "
            f"what is another from run to run",
            next_step=HOW,
        )
    leaves = LogLeaves(home)
    return agreed([_reference(home, run, measurement, leaves) for run in dict.fromkeys(runs)])


def _reference(home: Home, run: str, measurement: Measurement, leaves: LogLeaves) -> Told:
    reader = RunReader(home, run, leaves=leaves)
    records = list(reader.records())
    if not reader.ended:
        raise Misuse(f"--plan {run}: expected a run that has ended, and its record has no end", next_step=HOW)
    verdict = judge_run(home, run, leaves=leaves, lifted=True)
    if verdict.verdict in ("TAINTED", "SUSPECT"):
        raise Misuse(
            f"--plan {run}: expected a run that nothing speaks against, and it is {verdict.verdict}",
            next_step=f"see why with: trainguard verdict {run}",
        )
    _of_the_same(home, run, records, measurement)
    told = told_by(run, records)
    if told.problem:
        raise Misuse(f"--plan {run}: no plan can be made of it: {told.problem}")
    return told


def _of_the_same(home: Home, run: str, records: Sequence[Evidence], measurement: Measurement) -> None:
    """Raises Misuse unless this run was of what is about to be locked."""
    blobs = [str(record.body.get("blob")) for record in records if record.kind == "measurement"]
    if not blobs:
        raise Misuse(f"--plan {run}: what it ran was not measured, so nobody can tell that it is what is locked now")
    try:
        recorded = parse_measurement(home.blob(blobs[0]), where=f"measurement of {run}")
    except TrainguardError as error:
        raise Misuse(f"--plan {run}: {error}") from error
    if _own_words(recorded.launch) == _own_words(measurement.launch):
        recorded = msgspec.structs.replace(recorded, launch=measurement.launch)
    for finding in differences(recorded, measurement, Policy()):
        if finding.outcome == "violated":
            raise Misuse(f"--plan {run}: ran something else than what is locked now: {finding.message[:500]}")


def _own_words(launch: Launch) -> tuple[str, ...]:
    """The script and its arguments: a launcher's own say at how many ranks, in which references may differ."""
    started = launch.script or launch.module or ""
    name = started.rsplit("/", 1)[-1]
    begins = (number for number, word in enumerate(launch.argv) if word.rsplit("/", 1)[-1] == name)
    return (started, *launch.argv[next(begins, -1) + 1 :])
