"""What differs between two runs that should be equal: what was started, what it was made of, and the first step apart.

    comparison = compare_runs(home, "run-a", "run-b")
    comparison.equal, comparison.sentence

Layers are looked at in causal order; the earliest step at which a recorded value differs, and the first layer that
differs there, is the likeliest place of the cause. It is a place to look, not a verdict on either run. Sampled weights
are read at secret places that differ from run to run, so they are compared only where both runs drew the same ones;
the gradient norm, which is of all tensors, speaks for them.

Not compared: what the runs printed, checkpoints (`trainguard verify`), anything past the last sealed segment.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

from trainguard.appraise.environment import differences
from trainguard.archive import LogLeaves, RunReader
from trainguard.errors import MalformedEvidence, TrainguardError, VerificationError
from trainguard.evidence import Evidence, unfold
from trainguard.home import Home
from trainguard.lockfile import Measurement, parse_measurement
from trainguard.policy import Policy
from trainguard.veil import MAINTENANCE, read_veil

STEP_LIMIT = 1_000_000
"""Steps compared; each takes about half a kilobyte of memory in each run."""

LISTED = 200
"""Differences of one layer that are listed."""

LAYERS = (
    "record",
    "command",
    "environment",
    "seeds",
    "inputs",
    "rng",
    "gradients",
    "hyperparameters",
    "weights",
    "end",
)
"""In causal order; `record` is about the evidence itself."""

Key = tuple[int, int, int]
"""Rank (or order of appearance), optimizer, step of that optimizer."""


class Difference(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that differs."""

    layer: str
    what: str
    """File, package, variable, setting or value, as findings name them."""
    first: str | None
    """In the first run; None where it is not there."""
    second: str | None
    step: int | None = None
    """First optimizer step at which it differs; None for what stands before step 1."""
    rank: int | None = None


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """Two runs, compared."""

    schema: str = "trainguard/diff/v1"
    runs: tuple[str, str]
    equal: bool | None
    """None where too little is recorded to tell; `notes` says what."""
    likeliest: str | None
    """The layer in which the cause most likely lies."""
    sentence: str
    differences: tuple[Difference, ...]
    steps_compared: int
    notes: tuple[str, ...]
    """What could not be compared and why."""

    @property
    def exit_status(self) -> int:
        """0 equal, 1 different, 3 could not tell."""
        return 3 if self.equal is None else int(not self.equal)


def compare_runs(home: Home, first: str, second: str) -> Comparison:
    """Everything recorded of two runs, side by side. Raises Misuse or VerificationError where no log can be used."""
    leaves = LogLeaves(home)
    veil = read_veil(lambda: leaves.sealed)
    if any(veil.hides("run", run) for run in (first, second)):
        return _hidden(first, second)
    one, two = (_read(home, run, leaves) for run in (first, second))
    notes = [*one.notes, *two.notes]
    found = [*_launch(one, two), *_environment(one, two, notes), *_inputs(one, two)]
    steps, compared = _steps(one, two, notes)
    found += [*steps, *_ends(one, two)]
    notes += _incomparable(one, two)
    shown = [each for each in found if not veil.hides_path(each.what)]
    if len(shown) < len(found):
        found, one.complete = shown, False
        notes.append(MAINTENANCE)
    likeliest, sentence = _likeliest(found, one, two, compared)
    complete = one.complete and two.complete and compared > 0
    return Comparison(
        runs=(first, second),
        equal=False if found else True if complete else None,
        likeliest=likeliest,
        sentence=sentence if found or complete else "Too little is recorded of these runs to call them equal.",
        differences=tuple(found),
        steps_compared=compared,
        notes=tuple(dict.fromkeys(notes)),
    )


def _hidden(first: str, second: str) -> Comparison:
    """What is said where one of the runs is muted (veil.py): nothing of either, and not that they are equal."""
    return Comparison(
        runs=(first, second),
        equal=None,
        likeliest=None,
        sentence=f"These runs cannot be compared now: {MAINTENANCE}.",
        differences=(),
        steps_compared=0,
        notes=(MAINTENANCE,),
    )


# -- reading one run ----------------------------------------------------------------------------------------------


class _Run:
    """What is kept of one run while it is read once."""

    def __init__(self, run: str) -> None:
        self.run = run
        self.start: dict[str, Any] = {}
        self.end: dict[str, Any] = {}
        self.measurement: Measurement | None = None
        self.seeds: dict[tuple[int, str], object] = {}
        self.inputs: dict[str, str] = {}
        self.steps: dict[Key, dict[str, object]] = {}
        self.settings: dict[Key, dict[str, object]] = {}
        self.notes: list[str] = []
        self.complete = True
        self._places: dict[int, int] = {}
        self._groups: dict[tuple[int, int], dict[str, object]] = {}

    def incomplete(self, why: str) -> None:
        self.complete = False
        self.notes.append(f"{self.run}: {why}")

    def place(self, record: Evidence) -> int:
        """The rank, or for processes without one the order in which they first stepped."""
        if record.rank is not None:
            return record.rank
        return self._places.setdefault(record.process if record.process is not None else -1, len(self._places))

    def take_step(self, record: Evidence) -> None:
        body = record.body
        opt, index = body.get("opt"), body.get("index", record.step)
        if not isinstance(opt, int) or not isinstance(index, int):
            return
        place = self.place(record)
        values = dict(_values(body))
        if isinstance(body.get("rng"), dict) and "seed" in body["rng"]:
            self.seeds[place, f"torch at step {index}"] = body["rng"]["seed"]
        changed = _settle(self._groups.setdefault((place, opt), {}), body.get("hyperparameters"))
        if changed:
            self.settings[place, opt, index] = changed
            values["hyperparameters"] = _fingerprint(self._groups[place, opt])
        if len(self.steps) < STEP_LIMIT:
            self.steps[place, opt, index] = values
        elif self.complete:
            self.incomplete(f"more than {STEP_LIMIT:,} steps; the rest was not compared")


def _read(home: Home, run: str, leaves: LogLeaves) -> _Run:
    reader = RunReader(home, run, leaves=leaves)
    taken = _Run(run)
    if reader.begin is None:
        taken.incomplete("the log holds no statement of this run")
        return taken
    try:
        for record in reader.records():
            _take(taken, record, home)
    except VerificationError as error:
        taken.incomplete(str(error))
    if not reader.ended:
        taken.incomplete("the run goes on" if reader.running else "its record has no end")
    if taken.measurement is None:
        taken.incomplete("what it ran was not measured")
    return taken


def _take(taken: _Run, record: Evidence, home: Home) -> None:
    body = record.body
    if record.kind == "start":
        taken.start = body
    elif record.kind == "end":
        taken.end = body
    elif record.kind in ("step", "steps"):
        try:
            for each in unfold(record):
                taken.take_step(each)
        except MalformedEvidence as error:
            taken.incomplete(str(error))
    elif record.kind == "measurement" and taken.measurement is None:
        try:
            taken.measurement = parse_measurement(home.blob(str(body.get("blob"))), where=f"measurement of {taken.run}")
        except TrainguardError as error:
            taken.notes.append(f"{taken.run}: {error}")
    elif record.kind == "open" and isinstance(body.get("files"), list):
        for file in body["files"]:
            if isinstance(file, dict) and isinstance(file.get("sha256"), str) and isinstance(file.get("path"), str):
                taken.inputs.setdefault(file["path"], file["sha256"])


def _values(body: Mapping[str, Any]) -> Iterator[tuple[str, object]]:
    """The values of a step frame that two equal runs have in common."""
    rng, gradients = body.get("rng"), body.get("gradients")
    if isinstance(rng, dict):
        for name in ("torch", "numpy", "python"):
            if name in rng:
                yield f"rng {name}", rng[name]
    if isinstance(gradients, dict) and "norm" in gradients:
        yield "gradient norm", gradients["norm"]
    weights = body.get("weights")
    if isinstance(weights, dict) and "after" in weights:
        yield "weights after", weights["after"]


def _settle(groups: dict[str, object], link: object) -> dict[str, object]:
    """Apply a frame's `hyperparameters` to what the groups said before; returns what it changed."""
    if not isinstance(link, dict):
        return {}
    changed: dict[str, object] = {}
    listed = link.get("groups")
    for number, group in enumerate(listed if isinstance(listed, list) else ()):
        if isinstance(group, dict):
            changed |= {f"group {number} {name}": value for name, value in group.items()}
    for entry in (*_list(link.get("changed")), *_list(link.get("inside"))):
        if isinstance(entry, list) and len(entry) == 3:
            changed[f"group {entry[0]} {entry[1]}"] = entry[2]
    new = {name: value for name, value in changed.items() if groups.get(name, _MISSING) != value}
    groups.update(new)
    return new


_MISSING = object()


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def _fingerprint(groups: Mapping[str, object]) -> str:
    return hashlib.sha256(msgspec.json.encode(groups, order="sorted")).hexdigest()


# -- comparing ----------------------------------------------------------------------------------------------------


def _launch(one: _Run, two: _Run) -> Iterator[Difference]:
    """The command, from the start record."""
    first, second = one.start.get("command"), two.start.get("command")
    if first != second:
        yield Difference(layer="command", what="command", first=_shown(first), second=_shown(second))


def _environment(one: _Run, two: _Run, notes: list[str]) -> Iterator[Difference]:
    """Files, packages, start-up hooks, variables, flags: what a lock would object to."""
    if one.measurement is None or two.measurement is None or one.measurement.digest == two.measurement.digest:
        return
    for number, finding in enumerate(differences(one.measurement, two.measurement, Policy())):
        if finding.outcome == "not_checked":
            notes.append(finding.message)
        elif number < LISTED:
            layer = "seeds" if finding.techniques[:1] == ("D1",) else "environment"
            what = finding.subject.path or finding.message
            yield Difference(layer=layer, what=what, first=finding.expected, second=finding.found)


def _inputs(one: _Run, two: _Run) -> Iterator[Difference]:
    """Files that both opened, with another content at the first reading."""
    listed = sorted(path for path in one.inputs.keys() & two.inputs.keys() if one.inputs[path] != two.inputs[path])
    for path in listed[:LISTED]:
        yield Difference(layer="inputs", what=path, first=one.inputs[path], second=two.inputs[path])


def _steps(one: _Run, two: _Run, notes: list[str]) -> tuple[list[Difference], int]:
    """The first step at which each recorded value differs, and how many steps both have."""
    left_out = _idle_streams(one) & _idle_streams(two)
    if one.end.get("key") is None or one.end.get("key") != two.end.get("key"):
        left_out.add("weights after")
    common = sorted(one.steps.keys() & two.steps.keys(), key=lambda key: (key[2], key[0], key[1]))
    first: dict[str, Difference] = {}
    idle: set[str] = set()
    for key in common:
        a, b = one.steps[key], two.steps[key]
        for name in a.keys() | b.keys():
            if name in first or a.get(name, _MISSING) == b.get(name, _MISSING):
                continue
            if name in left_out:
                idle.add(name)
            elif name == "hyperparameters" or (name in a and name in b):
                first[name] = _step_difference(name, key, one, two)
    notes += [f"{name}: never seeded and never drawn from, so it differs and does not matter" for name in
              sorted(idle - {"weights after"})]  # fmt: skip
    seeds = [
        Difference(layer="seeds", what=f"seed of {what}", first=_shown(one.seeds[place, what]), second=_shown(value))
        for (place, what), value in two.seeds.items()
        if (place, what) in one.seeds and one.seeds[place, what] != value
    ]
    ordered = sorted(first.values(), key=_causal)
    return [*seeds[:LISTED], *ordered], len(common)


def _idle_streams(run: _Run) -> set[str]:
    """Random streams that stayed where they were through all the steps they were read at."""
    seen: dict[tuple[int, str], set[object]] = {}
    for (place, _, _), values in run.steps.items():
        for name, value in values.items():
            if name.startswith("rng "):
                seen.setdefault((place, name), set()).add(value)
    names = {name for _, name in seen}
    return {name for name in names if all(len(s) == 1 for (_, other), s in seen.items() if other == name)}


def _step_difference(name: str, key: Key, one: _Run, two: _Run) -> Difference:
    place, _, step = key
    a, b = one.steps[key].get(name), two.steps[key].get(name)
    if name != "hyperparameters":
        layer = {"gradient norm": "gradients", "weights after": "weights"}.get(name, "rng")
        return Difference(layer=layer, what=name, first=_shown(a), second=_shown(b), step=step, rank=place)
    old, new = (_settings_at(run, key) for run in (one, two))
    changed = sorted(what for what in old.keys() | new.keys() if old.get(what) != new.get(what))
    return Difference(
        layer="hyperparameters",
        what=", ".join(changed[:8]) or "settings",
        first=", ".join(_shown(old.get(what)) or "none" for what in changed[:8]),
        second=", ".join(_shown(new.get(what)) or "none" for what in changed[:8]),
        step=step,
        rank=place,
    )


def _settings_at(run: _Run, key: Key) -> dict[str, object]:
    """What the groups said at that step: all changes up to it, in order."""
    place, opt, index = key
    settled: dict[str, object] = {}
    for (other, other_opt, step), changed in run.settings.items():
        if (other, other_opt) == (place, opt) and step <= index:
            settled |= changed
    return settled


def _ends(one: _Run, two: _Run) -> Iterator[Difference]:
    if not one.complete or not two.complete:
        return
    if len(one.steps) != len(two.steps):
        yield Difference(layer="end", what="steps", first=f"{len(one.steps):,}", second=f"{len(two.steps):,}")
    for name in ("status", "signal"):
        first, second = one.end.get(name), two.end.get(name)
        if first != second:
            yield Difference(layer="end", what=name, first=_shown(first), second=_shown(second))


def _incomparable(one: _Run, two: _Run) -> Iterator[str]:
    for name in ("lock", "policy", "trainguard"):
        if one.start.get(name) != two.start.get(name):
            yield f"they were recorded under different values of {name}; that changes no arithmetic"
    if one.run != two.run and one.end.get("key") != two.end.get("key"):
        yield "sampled weights were read at different secret places, so they are not compared; gradient norms are"
    if not (one.steps and two.steps):
        yield "no optimizer step was recorded in both"


def _shown(value: object) -> str | None:
    if value is None:
        return None
    if isinstance(value, list):
        return " ".join(str(word) for word in value)[:1000]
    return str(value)[:1000]


# -- the likeliest layer ------------------------------------------------------------------------------------------

SENTENCES: dict[str, str] = {
    "command": "They were started with different commands, so they need not be equal.",
    "environment": "They ran different code, or in another environment; that stands before any step.",
    "seeds": "They were seeded differently, so every random number differs from the start.",
    "inputs": "They read different data.",
    "rng": "What they were made of is the same, but the random streams part at {at}: something drew or seeded numbers "
    "in one run and not in the other.",
    "gradients": "What they were made of and their random streams are the same, but gradients part at {at}: data, "
    "loss, weights or gradients were changed while one of them ran.",
    "hyperparameters": "What they were made of, their random streams and their gradients are the same until settings "
    "of the optimizer part at {at}: something set them while one of the runs went on.",
    "weights": "Everything before is the same, but weights part after the update of {at}: the update itself differs.",
    "end": "They are the same as far as both went, but ended differently.",
}


def _likeliest(found: list[Difference], one: _Run, two: _Run, compared: int) -> tuple[str | None, str]:
    if not found:
        return None, f"No difference in anything recorded, over {compared:,} steps."
    before = [
        difference for difference in found if difference.step is None and difference.layer not in ("end", "record")
    ]
    during = [difference for difference in found if difference.step is not None]
    ends = [difference for difference in found if difference.layer == "end"]
    chosen = min(before, key=_causal, default=None) or min(during, key=_causal, default=None) or (*ends, *found)[0]
    at = f"step {chosen.step}" if chosen.step is not None else ""
    sentence = SENTENCES[chosen.layer].format(at=at)
    if chosen.step is None and during:
        first = min(during, key=_causal)
        sentence += f" The first recorded value apart is {first.what} at step {first.step}."
    if chosen.layer in ("command", "environment", "inputs") and compared and not during:
        sentence += f" Over {compared:,} steps no recorded value differs."
    return chosen.layer, sentence


def _causal(difference: Difference) -> tuple[int, int]:
    return difference.step or 0, LAYERS.index(difference.layer)
