"""What a site decides: limits, sampling, approvals. A value made once and passed in.

Order: built-in default, then the organisation's policy, then the project's file, then flags; a later one may only
tighten the organisation's (`Policy.tightened`). Its digest stands in every verdict, so a widened tolerance shows.
"""

from __future__ import annotations

import tomllib
from pathlib import Path

import msgspec

from trainguard.digest import canonical_json, sha256_hex
from trainguard.errors import MalformedEvidence, Misuse, Unavailable

POLICY_LIMIT_BYTES = 1 << 20
TIERS = ("weights", "training", "framework")

MEASURES = frozenset({"stop", "deny-signals"})
"""What can be enforced beyond recording."""


class Approval(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One honest oddity, approved once."""

    check: str
    """Name of the check whose departure is explained, such as `continuity`."""
    place: str
    """`file:line` or a file, as the finding prints it; relative to the code root where it lies inside."""
    reason: str = ""
    """Why, for the next reader."""


class Policy(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Settings that judges and the watcher read. Every limit is a field with its unit in the name or docstring."""

    links: str = "governed"
    """governed: within the budget; all: every check on every step; none: only start, end and seals."""
    budget_percent: float = 1.0
    """Guard's own time in the training process, commits included, percent of wall time, once the credit is used up."""
    credit_seconds: float = 1.0
    """Own time each process may use before the budget binds, so short runs are watched whole (docs/adr/0002)."""
    kills: str = "ledger"
    """ledger: name the sender of every signal in the job; off: put no filter on the job (docs/checks/kills.md)."""
    enforce: str | tuple[str, ...] = "log"
    """log: only record; stop: end the job at the first proved violation; deny-signals: refuse signals between strangers
    in the job; or a list of the last two (docs/checks/enforcement.md)."""
    stop_grace_seconds: float = 10.0
    """Time between SIGTERM and SIGKILL when the job is stopped."""
    allow_signals: tuple[str, ...] = ()
    """Programs of the job, by base name, that deny-signals lets signal others."""
    commits: bool = True
    """Commit to every step, so that the run can be replayed (spec/replay.md); also with links = "none"."""
    commit_percent: float = 0.4
    """Percent of a step's time for fingerprints: part of budget_percent, at most half of it. Where it is short, steps
    commit to less, and then not every step does."""
    points_percent: float = 0.5
    """Percent of the run's time for writing replay points."""
    points_mb: float = 512.0
    """MiB that the replay points of one process may take; 0 keeps none, and replay starts at the first step."""
    points_every: int = 0
    """Steps between replay points; 0 lets the two budgets decide."""
    always_steps: int = 20
    """First steps of a process that are always checked in full."""
    tensors: int = 4
    """Tensors whose update is recomputed per checked step."""
    elements: int = 32
    """Elements sampled per tensor."""
    heartbeat_seconds: float = 10.0
    """The supervisor writes a heartbeat this often; twice this without one is silence."""
    hang_seconds: float = 300.0
    """A training thread that makes no step for this long is asked where it is (docs/checks/stalls.md)."""
    outside_first_seconds: float = 20.0
    """From a process's first optimizer step to the first look at its code and program text from outside."""
    outside_seconds: float = 600.0
    """Time between such looks, which also follow saved checkpoints; 0: none (docs/checks/live.md)."""
    segment_seconds: float = 2.0
    """Records are sealed into the log at least this often."""
    update_tolerance_ulp: float = 16.0
    """Update truth: allowed error in units of the last place of the weight's type (see docs/checks/update.md)."""
    approve: tuple[Approval, ...] = ()
    """Honest oddities approved by the project."""
    load: str = "log"
    """log: model files the job opens are vetted while it reads them; stop: before, and what is not safe is refused."""
    load_trust: tuple[str, ...] = ()
    """Names a model file may use beyond the lists: lines of a trust file (spec/scan.md)."""
    load_tier: str = "training"
    """weights, training or framework: the lists that count for files the job opens (spec/scan.md)."""
    allow_env: tuple[str, ...] = ()
    """Environment variables, beyond the built-in list, that may differ from the lock."""

    @property
    def measures(self) -> frozenset[str]:
        """What is enforced: a subset of MEASURES; empty for log."""
        named = (self.enforce,) if isinstance(self.enforce, str) else self.enforce
        return frozenset(named) - {"log"}

    @property
    def digest(self) -> str:
        """SHA-256 of the canonical JSON of every field, hex."""
        return sha256_hex(canonical_json(msgspec.to_builtins(self)))

    def tightened(self, organisation: Policy) -> Policy:
        """This policy where it is at least as strict as `organisation`'s; raises Misuse naming the field if not."""
        order = {"none": 0, "governed": 1, "all": 2}
        looser = [
            name
            for name, is_looser in (
                ("links", order[self.links] < order[organisation.links]),
                ("commits", organisation.commits and not self.commits),
                ("kills", self.kills == "off" and organisation.kills != "off"),
                ("enforce", not self.measures >= organisation.measures),
                (
                    "allow_signals",
                    "deny-signals" in organisation.measures
                    and not set(self.allow_signals) <= set(organisation.allow_signals),
                ),
                ("update_tolerance_ulp", self.update_tolerance_ulp > organisation.update_tolerance_ulp),
                ("tensors", self.tensors < organisation.tensors),
                ("elements", self.elements < organisation.elements),
                ("load", self.load == "log" and organisation.load == "stop"),
                ("load_tier", TIERS.index(self.load_tier) > TIERS.index(organisation.load_tier)),
                (
                    "load_trust",
                    organisation.load == "stop" and not set(self.load_trust) <= set(organisation.load_trust),
                ),
                ("always_steps", self.always_steps < organisation.always_steps),
                ("hang_seconds", self.hang_seconds > organisation.hang_seconds),
                (
                    "outside_seconds",
                    (self.outside_seconds or float("inf")) > (organisation.outside_seconds or float("inf")),
                ),
                ("heartbeat_seconds", self.heartbeat_seconds > organisation.heartbeat_seconds),
                (
                    "approve",
                    not set(self.approve) <= set(organisation.approve) and bool(organisation.approve),
                ),
            )
            if is_looser
        ]
        if looser:
            raise Misuse(f"policy: {', '.join(looser)} would be looser than the organisation's policy allows")
        return self

    def approves(self, check: str, place: str) -> bool:
        """Whether a departure of `check` at `place` (`file:line`) is approved, by exact line or whole file."""
        return any(a.check == check and place in (a.place, *_prefixes(place, a.place)) for a in self.approve)


def _prefixes(place: str, approved: str) -> tuple[str, ...]:
    file = place.rsplit(":", 1)[0]
    return (place,) if file == approved or place.endswith("/" + approved) or file.endswith("/" + approved) else ()


def parse_policy(data: bytes, *, where: str) -> Policy:
    """The policy in TOML bytes. Unknown keys, wrong types and sizes over 1 MiB are refused, naming `where`."""
    if len(data) > POLICY_LIMIT_BYTES:
        raise MalformedEvidence(f"{where}: {len(data)} bytes, limit {POLICY_LIMIT_BYTES}")
    try:
        policy = msgspec.convert(tomllib.loads(data.decode()), Policy)
    except (UnicodeDecodeError, tomllib.TOMLDecodeError, msgspec.ValidationError, RecursionError) as error:
        raise Misuse(f"{where}: not a policy: {error}") from error
    if policy.links not in ("governed", "all", "none"):
        raise Misuse(f"{where}: links: expected governed, all or none, found {policy.links!r}")
    if policy.kills not in ("ledger", "off"):
        raise Misuse(f"{where}: kills: expected ledger or off, found {policy.kills!r}")
    if policy.load not in ("log", "stop"):
        raise Misuse(f"{where}: load: expected log or stop, found {policy.load!r}")
    if policy.load_tier not in TIERS:
        raise Misuse(f"{where}: load_tier: expected {', '.join(TIERS)}, found {policy.load_tier!r}")
    if not policy.measures <= MEASURES:
        raise Misuse(f"{where}: enforce: expected log, stop, deny-signals or a list of them, found {policy.enforce!r}")
    return policy


def load_policy(path: Path | None) -> Policy:
    """The policy file `path`, or the built-in default for None."""
    if path is None:
        return Policy()
    try:
        data = path.read_bytes()
    except OSError as error:
        raise Unavailable(f"{path}: policy cannot be read: {error.strerror}") from error
    return parse_policy(data, where=str(path))
