"""Two accounts of the same steps: where do they part first? (spec/replay.md, "Comparison")

Links are compared in causal order within a step, so the first that differs is where the cause entered. Bitwise: only
processes of the same build are compared at all (`incomparable`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import msgspec

from trainguard.replay.committed import Account, Step

BUILD = ("torch", "capability", "mkldnn", "devices", "threads", "deterministic", "cpu")
"""Of the build these must be equal for bits to be comparable (where the run said them); python may differ."""

LINKS: tuple[tuple[str, str], ...] = (
    ("modes", "modes and rates of modules"),
    ("rng", "random streams"),
    ("before", "weights before the step"),
    ("raw", "gradient after backward"),
    ("used", "gradient used"),
    ("groups", "settings of the optimizer"),
    ("state", "optimizer state after the step"),
    ("weights", "weights after the step"),
    ("buffers", "buffers after the step"),
    ("file", "what was saved"),
)
"""(name, what it is) in causal order."""

TECHNIQUES: Mapping[str, tuple[str, ...]] = {
    "rng": ("D1",),
    "modes": ("C11",),
    "before": ("E4",),
    "raw": ("C6", "D4", "D2", "C1", "C11"),
    "used": ("C1", "C2"),
    "groups": ("C3", "C4"),
    "state": ("C4", "C1", "C9"),
    "weights": ("C3", "C9", "C4"),
    "buffers": ("C11", "E4"),
    "file": ("E9", "E3"),
}


class Difference(msgspec.Struct, frozen=True, kw_only=True):
    """Where two accounts part. The clean one is `expected`."""

    step: int
    link: str
    rank: int = 0
    tensor: str | None = None
    """First tensor that differs, in the optimizer's order; where slots hold several, the first of them."""
    tensors: int = 0
    """How many slots differ."""
    of: int = 0
    setting: str | None = None
    path: str | None = None
    """For what was saved: the file."""
    expected: str
    found: str
    since: int | None = None
    """Last step before at which this link had been compared and was equal; the act lies after it."""

    @property
    def what(self) -> str:
        """The link in words."""
        return dict(LINKS)[self.link]


def incomparable(run: Mapping[str, Any] | None, clean: Mapping[str, Any] | None) -> str | None:
    """Why the bits of these two builds cannot be expected to be equal, or None."""
    if run is None or clean is None:
        return "one of the two did not say on which build of torch it ran"
    for name in BUILD:
        if run.get(name, clean.get(name)) != clean.get(name):
            return f"{name}: the run had {run.get(name)!r}, the replay {clean.get(name)!r}"
    return None


def idle(run: Account, clean: Account) -> frozenset[int]:
    """Streams (by place in `rng`) that already differ at the first step: nobody seeded them, so they prove nothing.

    The first, torch's own, is always compared.
    """
    one, two = run.steps.get(1), clean.steps.get(1)
    if one is None or two is None:
        return frozenset()
    return frozenset(place for place in (1, 2) if _at(one.rng, place) != _at(two.rng, place))


def first_difference(
    run: Account, clean: Account, *, first: int, last: int, idle_streams: frozenset[int] = frozenset()
) -> tuple[Difference | None, int]:
    """The first difference in steps first … last, and how many steps both accounts have of them."""
    compared = 0
    held: dict[str, int] = {}
    for number in range(first, last + 1):
        one, two = run.steps.get(number), clean.steps.get(number)
        if one is None or two is None:
            continue
        compared += 1
        names = run.tensors.get(one.opt, ())
        for difference in differences(one, two, names, idle_streams):
            return msgspec.structs.replace(difference, since=held.get(difference.link)), compared
        for link in compared_links(one, two):
            held[link] = number
    return None, compared


def first_of_ranks(
    run: Iterable[tuple[int, Account]], clean: Mapping[int, Account], *, first: int, last: int
) -> Difference | None:
    """The first difference over all ranks: of one step the earliest in causal order, then the lowest rank.

    Streams that nobody seeded are found for every rank by itself.
    """
    found: list[tuple[int, int, int, Difference]] = []
    places = {link: place for place, (link, _) in enumerate(LINKS)}
    for rank, account in run:
        other = clean.get(rank)
        if other is None:
            continue
        streams = idle(account, other)
        difference, _ = first_difference(account, other, first=first, last=last, idle_streams=streams)
        if difference is not None:
            difference = msgspec.structs.replace(difference, rank=rank)
            found.append((difference.step, places[difference.link], rank, difference))
    return min(found)[3] if found else None


def compared_links(one: Step, two: Step) -> Iterator[str]:
    """Links that both accounts of a step speak of."""
    yield from ("rng", "modes", "groups")
    yield from (link for link, _ in LINKS if link in one.vectors and link in two.vectors)


def differences(one: Step, two: Step, names: tuple[str, ...], idle_streams: frozenset[int]) -> Iterator[Difference]:
    """What differs between the run's account of a step and the clean one, in causal order."""
    for link, _ in LINKS:
        if link == "rng":
            found = _streams(one, two, idle_streams)
        elif link == "modes":
            found = _plain(one, two, "modes", one.modes, two.modes)
        elif link == "groups":
            found = _settings(one, two)
        else:
            found = _vectors(one, two, link, names)
        if found is not None:
            yield found


def _plain(one: Step, two: Step, link: str, was: object, clean: object) -> Difference | None:
    if was == clean:
        return None
    return Difference(step=one.number, link=link, expected=str(clean), found=str(was))


def _streams(one: Step, two: Step, idle_streams: frozenset[int]) -> Difference | None:
    names = ("torch", "numpy", "python")
    for place in range(max(len(one.rng), len(two.rng))):
        was, clean = _at(one.rng, place), _at(two.rng, place)
        if was != clean and place not in idle_streams:
            name = names[place] if place < len(names) else f"device {place - len(names)}"
            return Difference(step=one.number, link="rng", setting=name, expected=str(clean), found=str(was))
    return None


def _settings(one: Step, two: Step) -> Difference | None:
    if one.groups == two.groups:
        return None
    for group in sorted(set(one.hyper) | set(two.hyper)):
        was, clean = one.hyper.get(group, {}), two.hyper.get(group, {})
        for name in sorted(set(was) | set(clean)):
            if was.get(name) != clean.get(name):
                return Difference(
                    step=one.number,
                    link="groups",
                    setting=f"{name} of group {group}",
                    expected=str(clean.get(name))[:200],
                    found=str(was.get(name))[:200],
                )
    return Difference(step=one.number, link="groups", expected=str(two.groups), found=str(one.groups))


def _vectors(one: Step, two: Step, link: str, names: tuple[str, ...]) -> Difference | None:
    was, clean = one.vector(link), two.vector(link)
    if was is None or clean is None or was == clean:
        return None
    if len(was) != len(clean):
        expected, found = f"{len(clean)} tensors", f"{len(was)} tensors"
        return Difference(step=one.number, link=link, expected=expected, found=found)
    places = [i for i, pair in enumerate(zip(was, clean, strict=True)) if pair[0] != pair[1]]
    place = places[0]
    return Difference(
        step=one.number,
        link=link,
        tensor=names[place] if link != "buffers" and place < len(names) else None,
        tensors=len(places),
        of=len(was),
        expected=f"{clean[place]:08x}",
        found=f"{was[place]:08x}",
    )


def _at(values: tuple[str | None, ...], place: int) -> str | None:
    return values[place] if place < len(values) else None
