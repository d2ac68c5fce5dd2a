"""Runs every check over the records of one run, in one pass, and draws the verdict.

`CHECKS` is a literal tuple: what is not in it is not checked. An exception in a check is a bug of ours and may not
hide what the others found, so it ends that check alone and makes its link blind with the reason.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from trainguard.appraise.batches import Batches
from trainguard.appraise.code import Code
from trainguard.appraise.deferred import Deferred
from trainguard.appraise.dispatch import Dispatch
from trainguard.appraise.environment import Environment
from trainguard.appraise.gradients import Gradients
from trainguard.appraise.hooks import Hooks
from trainguard.appraise.hyperparameters import Hyperparameters
from trainguard.appraise.inputs import Inputs
from trainguard.appraise.interface import Check, Context, finding_from
from trainguard.appraise.kills import Kills
from trainguard.appraise.live import Live
from trainguard.appraise.loads import Loads
from trainguard.appraise.loss import Loss
from trainguard.appraise.modules import Modules
from trainguard.appraise.optimizer import Optimizer
from trainguard.appraise.order import Order
from trainguard.appraise.plan import Plan
from trainguard.appraise.processes import Processes
from trainguard.appraise.replicas import Replicas
from trainguard.appraise.rng import Rng
from trainguard.appraise.saves import Saves
from trainguard.appraise.seals import Seals
from trainguard.appraise.stalls import Stalls
from trainguard.appraise.surface import Surface
from trainguard.appraise.text import Text
from trainguard.appraise.truth import Truth
from trainguard.appraise.verdict import Verdict, decide
from trainguard.appraise.weights import Weights
from trainguard.errors import MalformedEvidence
from trainguard.evidence import Evidence, unfold
from trainguard.finding import Finding, LinkState

CHECKS: tuple[type[Check], ...] = (
    Environment,
    Processes,
    Seals,
    Kills,
    Stalls,
    Code,
    Inputs,
    Loads,
    Saves,
    Plan,
    Rng,
    Order,
    Batches,
    Loss,
    Truth,
    Gradients,
    Hyperparameters,
    Optimizer,
    Weights,
    Replicas,
    Modules,
    Hooks,
    Dispatch,
    Deferred,
    Surface,
    Live,
    Text,
)

FINDING_LIMIT = 10_000
"""A verdict lists at most this many findings; past it, checks go on counting in their link states."""


class Appraiser:
    """Takes the records of one run in order; usable while the run goes on and afterwards, with the same result."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._checks: list[Check] = [check(context) for check in CHECKS]
        self._failed: dict[str, str] = {}
        self.findings: list[Finding] = []
        self.steps = 0
        self.watched_steps = 0
        self.lock: str | None = None
        self._policy: str | None = None
        self._none = False
        self._stopped: str | None = None

    def see(self, evidence: Evidence) -> list[Finding]:
        """The findings that this record makes certain."""
        if evidence.kind == "start":
            lock, settings = evidence.body.get("lock"), evidence.body.get("settings")
            self.lock = lock if isinstance(lock, str) else None
            self._none = isinstance(settings, dict) and settings.get("links") == "none"
        if evidence.kind == "enforced" and evidence.source == "supervisor":
            self._stopped = _stopped(evidence)
        new: list[Finding] = []
        try:
            for each in unfold(evidence):
                self._each(each, new)
        except MalformedEvidence as error:
            text = f"malformed record: {error}"
            run = self._context.run
            new.append(finding_from("processes", "suspicious", text, evidence, run=run, techniques=("G2",)))
        return self._keep(new)

    def _each(self, evidence: Evidence, new: list[Finding]) -> None:
        if evidence.kind == "step":
            self.steps += 1
            self.watched_steps += evidence.body.get("checked") is True
        for check in self._checks:
            if check.name not in self._failed:
                new.extend(self._findings(check, check.see(evidence)))

    def verdict(self) -> Verdict:
        """Close every check and decide. Call once, after the last record."""
        links: list[LinkState] = []
        for check in self._checks:
            if check.name in self._failed:
                reason = f"the check itself failed: {self._failed[check.name]}"
                links.append(LinkState(link=check.name, blind=(reason,)))
                continue
            for outcome in self._outcomes(check, check.end()):
                if isinstance(outcome, LinkState):
                    links.append(outcome)
                else:
                    self._keep([outcome])
        return decide(
            self.findings,
            links,
            run=self._context.run,
            steps=self.steps,
            watched_steps=self.watched_steps,
            gaps=tuple(self._gaps()),
            policy=self._context.policy.digest,
            lock=self.lock,
        )

    def _gaps(self) -> Iterator[str]:
        if self._stopped is not None:
            yield self._stopped
        if self.lock is None:
            yield "no lock: what ran was compared with nothing approved"
        if self._none:
            yield "every in-process check was switched off (--links none)"
        if not self.steps and not self._none:
            yield "no optimizer step was seen"

    def _keep(self, new: list[Finding]) -> list[Finding]:
        kept = new[: max(0, FINDING_LIMIT - len(self.findings))]
        self.findings.extend(kept)
        return kept

    def _findings(self, check: Check, outcomes: Iterable[Finding]) -> Iterator[Finding]:
        return (outcome for outcome in self._outcomes(check, outcomes) if isinstance(outcome, Finding))

    def _outcomes(self, check: Check, outcomes: Iterable[Finding | LinkState]) -> Iterator[Finding | LinkState]:
        try:
            yield from outcomes
        except Exception as error:  # a failing check must not hide what the others found
            self._failed[check.name] = f"{type(error).__name__}: {error}"[:300]


def _stopped(evidence: Evidence) -> str:
    """Why the guard ended the job, and what is left to go on from."""
    body = evidence.body
    sealed = body.get("checkpoint")
    last = f"{sealed.get('path')} (leaf {sealed.get('leaf')})" if isinstance(sealed, dict) else "none"
    step = f" after step {evidence.step}" if evidence.step is not None else ""
    reason = f"{body.get('check')}: {body.get('message')}"
    return f"stopped by the guard{step} (--enforce stop): {reason[:400]}; last sealed checkpoint: {last[:400]}"


def appraise(records: Iterable[Evidence], context: Context) -> Verdict:
    """The verdict on a whole run."""
    appraiser = Appraiser(context)
    for evidence in records:
        appraiser.see(evidence)
    return appraiser.verdict()
