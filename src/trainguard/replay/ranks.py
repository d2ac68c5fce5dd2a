"""Which rank it was: what every rank should have given to the reduction, against what came out of it.

A rank that scales, turns or drops its part leaves all ranks with the same wrong gradient, so that they all part from
the replay at once and agree with one another. Two things tell whose part it was (spec/replay.md, "Ranks"):

    own      what a rank said of its own gradient is not what the replay's same rank had: this rank, by its own word
    share    all own gradients are as they should be, and the reduced one is not their mean: reduction is linear, so the
             shares with which the replay's gradients make the run's can be solved for, and one is apart

What ranks say of themselves is never believed against the replay: in the second case only the result is the run's.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence

import msgspec

from trainguard.appraise.reduction import SHARE_TOLERANCE, reduce_of
from trainguard.replay.committed import Account, Rank
from trainguard.replay.compare import Difference, differences

GRADIENTS = frozenset({"raw", "used", "state", "weights"})
"""Links in which a wrong share shows first."""


class Odd(msgspec.Struct, frozen=True, kw_only=True):
    """Ranks that did otherwise than the others."""

    ranks: tuple[int, ...]
    how: str
    """`link`: only these differ; `own`: only their own gradients do; `share`: their parts in the reduction do."""
    shares: tuple[float, ...] = ()
    """For `share`: of each of these ranks, in units of what the others have."""

    @property
    def text(self) -> str:
        """In words."""
        names = f"rank{'s' if len(self.ranks) > 1 else ''} {', '.join(map(str, self.ranks))}"
        if self.how == "link":
            return f"{names} only"
        if self.how == "own":
            return f"{names}: its own gradient, before the ranks' were reduced, is another than it should be"
        parts = ", ".join(f"{share:.4g}" for share in self.shares)
        return f"{names} gave {parts} times its gradient to the reduction"


def odd_ranks(run: Sequence[Rank], clean: Mapping[int, Account], difference: Difference) -> Odd | None:
    """The ranks behind a difference, or None where nothing tells them from the others."""
    if len(run) < 2:
        return None
    differing = [rank.rank for rank in run if _differs(rank, clean.get(rank.rank), difference)]
    if 0 < len(differing) < len(run):
        return Odd(ranks=tuple(differing), how="link")
    if difference.link not in GRADIENTS:
        return None
    return _by_own(run, clean, difference.step) or _by_share(run, clean, difference.step)


def _differs(rank: Rank, clean: Account | None, difference: Difference) -> bool:
    one = rank.account.steps.get(difference.step)
    two = clean.steps.get(difference.step) if clean is not None else None
    if one is None or two is None:
        return True  # cannot be told from the others
    found = differences(one, two, (), frozenset({1, 2}) if difference.link != "rng" else frozenset())
    return any(each.link == difference.link for each in found)


def _by_own(run: Sequence[Rank], clean: Mapping[int, Account], step: int) -> Odd | None:
    others = []
    for rank in run:
        one, two = rank.account.steps.get(step), clean[rank.rank].steps.get(step) if rank.rank in clean else None
        if one is None or two is None or not one.own or len(one.own) != len(two.own):
            return None
        if one.own != two.own:
            others.append(rank.rank)
    return Odd(ranks=tuple(others), how="own") if 0 < len(others) < len(run) else None


def _by_share(run: Sequence[Rank], clean: Mapping[int, Account], step: int) -> Odd | None:
    """Only the replay's own gradients count here, and the run's reduced one."""
    locals_ = []
    for rank in run:
        account = clean.get(rank.rank)
        told = account.steps.get(step) if account is not None else None
        if account is None or told is None:
            return None
        locals_.append(_tensors(told.own, account.sampled.get(told.opt, ())))
    first = run[0].account
    told = first.steps.get(step)
    got = _tensors(told.got, first.sampled.get(told.opt, ())) if told is not None else []
    if not got or any(len(each) != len(got) for each in locals_):
        return None
    found = reduce_of(locals_, got)
    if found.kind != "shares":
        return None
    shares, apart = found.absolute, _unlike_one(found.absolute)
    if len(apart) == len(run):  # all of them by a common factor, too: a clip
        shares, apart = found.shares, found.apart
        if 2 * len(apart) >= len(run):
            return None  # nothing tells which half is right
    return Odd(ranks=apart, how="share", shares=tuple(shares[place] for place in apart)) if apart else None


def _unlike_one(shares: Sequence[float]) -> tuple[int, ...]:
    return tuple(place for place, share in enumerate(shares) if abs(share - 1.0) > SHARE_TOLERANCE)


def _tensors(data: bytes, lengths: Sequence[int]) -> list[list[float]]:
    """Samples by tensor; those of a tensor without a gradient are left out on all sides alike, as zeros."""
    if not lengths or len(data) != 4 * sum(lengths):
        return []
    values = struct.unpack(f"<{sum(lengths)}f", data)
    found, start = [], 0
    for length in lengths:
        found.append([value if math.isfinite(value) else 0.0 for value in values[start : start + length]])
        start += length
    return found
