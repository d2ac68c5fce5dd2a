"""Brings a verdict to the experiment trackers that the run had open."""

from __future__ import annotations

from collections.abc import Iterator

from trainguard.appraise.verdict import Verdict
from trainguard.archive import RunReader
from trainguard.errors import TrainguardError, Unavailable
from trainguard.home import Home

RUN_LIMIT = 32
"""Tracker runs tagged at most; their names are claims of the job."""


def tag_trackers(home: Home, run: str, verdict: Verdict) -> Iterator[str]:
    """Tag every tracker run that `run` named; yields one sentence each, of what was done or why it was not.

    Raises Unavailable where the run named none.
    """
    named = list(dict.fromkeys(_named(home, run)))[:RUN_LIMIT]
    if not named:
        raise Unavailable(f"{run}: the record names no MLflow or Weights & Biases run, so there is nothing to tag")
    tags = {
        "trainguard.verdict": verdict.verdict,
        "trainguard.level": verdict.level,
        "trainguard.run": run,
        "trainguard.findings": str(len(verdict.findings)),
    }
    for tracker, identity, where in named:
        try:
            yield _tag(tracker, identity, where, tags)
        except TrainguardError as error:
            yield f"{error}; {error.next_step}" if error.next_step else str(error)


def _tag(tracker: str, identity: str, where: str, tags: dict[str, str]) -> str:
    if tracker == "mlflow":
        from trainguard.integrations import mlflow

        place = mlflow.tag(identity, tags)
        return f"mlflow run {identity} tagged {tags['trainguard.verdict']} at {place}"
    from trainguard.integrations import wandb

    folder = wandb.tag(identity, where, tags, word=tags["trainguard.verdict"])
    return f"wandb run {identity} tagged {tags['trainguard.verdict']}, files in {folder}"


def _named(home: Home, run: str) -> Iterator[tuple[str, str, str]]:
    for record in RunReader(home, run).records():
        said = record.body.get("trackers") if record.kind == "step" else None
        for line in said if isinstance(said, list) else ():
            if isinstance(line, list) and len(line) == 3 and all(isinstance(word, str) for word in line):
                tracker, identity, where = line
                if tracker in ("mlflow", "wandb"):
                    yield tracker, identity, where
