"""The environment that replays: is it another one than the run's, and the one that the lock approves? (spec/replay.md)

    rule = Rule(lock, run_prefix, start, blob)
    rule.admit(place, measurement, why_not)      Refused where it is not what the lock approves, naming the files
    rule.told                                    what the report says

The rule: every machine that replays measures the interpreter it is about to use, before it uses it. A measurement that
departs from the lock in anything but speed, place or ownership is refused, and nothing it says counts: equal bits from
an environment that somebody changed would clear a run, others would accuse one. Without a lock there is nothing to hold
it against: the replay counts, and the level stays. The level rises only when every replay that counts came from an
environment that is not the run's own (another host, or another folder there) and is as approved.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainguard.appraise.environment import compare
from trainguard.errors import Misuse, TrainguardError, Unavailable
from trainguard.lockfile import Lock, Measurement, parse_measurement
from trainguard.policy import Policy
from trainguard.replay.tasks import Place

FILES_NAMED = 40
IMAGE = "image:"


class Refused(Unavailable):
    """The environment that replayed is not the approved one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What `--env` asks for."""

    python: str | None = None
    """The interpreter, as it is called there; None is the run's own."""
    words: tuple[str, ...] = ()
    """Words that lead to another machine."""
    image: str | None = None
    """A container image."""


def wanted(text: str | None) -> Wanted:
    """`PYTHON`, `WORDS… PYTHON` (as `ssh verifier /opt/job/bin/python`) or `image:NAME`. Raises Misuse."""
    if text is None:
        return Wanted()
    if text.startswith(IMAGE):
        name = text[len(IMAGE) :]
        if not name or name.startswith("-") or any(mark.isspace() for mark in name):
            raise Misuse(f"--env {text}: expected image:NAME")
        return Wanted(python="python", image=name)
    if Path(text).exists():
        return Wanted(python=text)
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise Misuse(f"--env {text}: cannot be read as words: {error}") from error
    if not words:
        raise Misuse("--env: expected a Python interpreter, found nothing")
    return Wanted(python=words[-1], words=tuple(words[:-1]))


@dataclass(slots=True)
class Rule:
    """Admits places, one after another, and remembers what it saw."""

    lock: Lock | None
    own_prefix: str | None
    """Where the run's own environment lies, as it was measured when the run began."""
    start: Mapping[str, Any]
    """The run's statement."""
    blob: Callable[[str], bytes]
    policy: Policy = field(default_factory=Policy)
    places: list[dict[str, Any]] = field(default_factory=list)
    _known: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def admit(self, place: Place, measurement: str | None, why_not: str | None) -> None:
        """measurement: digest of what the place measured. Raises Refused where nothing from there may count."""
        apart, why = self._apart(place)
        differences = self._differences(measurement)
        seen = {
            "host": place.host, "python": place.python, "prefix": place.prefix, "apart": apart, "why": why,
            "measurement": measurement, "unmeasured": why_not, "differences": list(differences),
        }  # fmt: skip
        if seen not in self.places:
            self.places.append(seen)
        if self.lock is None:
            return
        if measurement is None:
            raise Refused(
                f"the environment that replayed, {place.python} on {place.host}, is not measured: "
                f"{why_not or 'no reason given'}; nothing it gives counts"
            )
        if differences:
            raise Refused(_refusal(place, differences))

    @property
    def told(self) -> dict[str, Any]:
        """For the report: `apart` and `approved` of all that was used, the reason where not, and the places."""
        apart = bool(self.places) and all(place["apart"] for place in self.places)
        differences = [line for place in self.places for line in place["differences"]]
        reason = self._reason(apart, differences)
        measured = sorted({place["measurement"] for place in self.places if place["measurement"]})
        return {
            "apart": apart,
            "approved": reason == "",
            "reason": reason,
            "differences": list(dict.fromkeys(differences))[:FILES_NAMED],
            "measurements": measured,
            "places": [{name: place[name] for name in ("host", "python", "prefix")} for place in self.places],
        }

    def _reason(self, apart: bool, differences: list[str]) -> str:
        if not self.places:
            return "nothing was replayed in it"
        if self.lock is None:
            return "the run has no lock to measure the environment against"
        if differences:
            return f"{len(differences)} differences from the lock, first: {differences[0]}"[:500]
        unmeasured = [place["unmeasured"] for place in self.places if place["measurement"] is None]
        if unmeasured:
            return str(unmeasured[0] or "it was not measured")
        return "" if apart else next(str(place["why"]) for place in self.places if not place["apart"])

    def _apart(self, place: Place) -> tuple[bool, str]:
        """Whether this is another environment than the run's own; else why not."""
        boot, host = self.start.get("boot_id"), self.start.get("host")
        same_host = place.boot_id == boot if place.boot_id and boot else place.host == host
        if not same_host:
            return True, ""
        if self.own_prefix is None or place.prefix is None:
            return False, "it is not known where the run's own environment lies"
        own = Path(self.own_prefix).resolve()
        if own == Path(place.prefix).resolve() or _site(own) == place.site:
            return False, f"it is the run's own environment, {place.prefix} on {place.host}"
        return True, ""

    def _differences(self, digest: str | None) -> tuple[str, ...]:
        """What is not as the lock approves, worst first."""
        if digest is None or self.lock is None:
            return ()
        if digest not in self._known:
            self._known[digest] = tuple(_lines(self.lock, self._measurement(digest), self.policy))
        return self._known[digest]

    def _measurement(self, digest: str) -> Measurement:
        try:
            return parse_measurement(self.blob(digest), where="measurement of the environment that replayed")
        except TrainguardError as error:
            raise Refused(f"the measurement of the environment that replayed cannot be read: {error}") from error


def _lines(lock: Lock, found: Measurement, policy: Policy) -> list[str]:
    """One line a difference that is more than speed, place or ownership."""
    bad = [finding for finding in compare(lock, found, policy) if finding.outcome != "suspicious"]
    return [f"{f.subject.path}: {f.message}" if f.subject.path else f.message for f in bad][:FILES_NAMED]


def _refusal(place: Place, differences: Sequence[str]) -> str:
    named = "; ".join(differences[:5])
    more = f"; and {len(differences) - 5} more" if len(differences) > 5 else ""
    return (
        f"the environment that replayed, {place.python} on {place.host}, is not what the lock approves, so nothing it "
        f"gives counts: {named}{more}"
    )[:2000]


def _site(prefix: Path) -> str | None:
    """Device and number of an environment's package folder, as `Place.site`."""
    for site in sorted((prefix / "lib").glob("python3*/site-packages")):
        status = site.stat()
        return f"{status.st_dev}:{status.st_ino}"
    return None
