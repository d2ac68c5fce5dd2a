"""What a format is, and the job it is given: judge these bytes, note what is wrong, say who could load them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from trainguard.scan.budget import Meter, OverBudget
from trainguard.scan.limits import ScanPolicy
from trainguard.scan.source import Source
from trainguard.scan.trust import Trust, runs_code, tier_of
from trainguard.scan.values import Global
from trainguard.scan.verdict import Reason, Verdict, worst

HEAD_BYTES = 4096
"""What a format may look at to recognise itself."""


def printable(text: str, limit: int = 300) -> str:
    """`text` with everything a terminal could act on escaped, at most `limit` characters."""
    safe = "".join(character if character.isprintable() else ascii(character)[1:-1] for character in text[:limit])
    return safe + ("…" if len(text) > limit else "")


@dataclass(slots=True)
class Notes:
    """What was found in one file so far."""

    technique: str
    limit: int
    reasons: list[Reason] = field(default_factory=list)
    verdict: Verdict = Verdict.SAFE
    globals: set[str] = field(default_factory=set)
    opinions: set[str] = field(default_factory=set)

    def add(self, reason: Reason) -> None:
        """Keep a reason; past the limit only its verdict counts."""
        self.verdict = worst((self.verdict, reason.verdict))
        if len(self.reasons) < self.limit:
            self.reasons.append(reason)


@dataclass(slots=True)
class Job:
    """One stretch of bytes to judge: a file, or a member of one."""

    source: Source
    notes: Notes
    meter: Meter
    trust: Trust
    judge: Callable[[Job], tuple[str, str]]
    """The engine: recognise and judge a job; returns (format, loader)."""
    name: str = ""
    """Name of the file or member; only for what is imported by name (`.py`) and for messages."""
    members: tuple[str, ...] = ()
    """Path inside containers."""
    in_folder: bool = False

    @property
    def policy(self) -> ScanPolicy:
        """The limits of this scan."""
        return self.meter.policy

    def note(
        self,
        verdict: Verdict,
        rule: str,
        what: str,
        *,
        offset: int | None = None,
        global_name: str | None = None,
        use: str | None = None,
    ) -> None:
        """Record one reason, in this member."""
        self.notes.add(
            Reason(
                verdict=verdict,
                rule=rule,
                what=printable(what),
                offset=offset,
                member=printable("!".join(self.members)) or None,
                global_name=printable(global_name) if global_name else None,
                use=use,
                technique=self.notes.technique,
            )
        )

    def unsafe(self, rule: str, what: str, offset: int | None = None) -> None:
        """Record that these bytes run or hide something."""
        self.note(Verdict.UNSAFE, rule, what, offset=offset)

    def unknown(self, rule: str, what: str, offset: int | None = None) -> None:
        """Record something nobody vetted."""
        self.note(Verdict.UNKNOWN, rule, what, offset=offset)

    def unlisted(self, name: Global, use: str, offset: int) -> None:
        """Record the use of a name outside the lists; the last use of a name is the one that counts."""
        self._forget(name.name)
        if runs_code(name.name):
            self.note(
                Verdict.UNSAFE,
                "global",
                f"names {name.name}, which runs code or reaches outside the process",
                offset=offset,
                global_name=name.name,
                use=use,
            )
            return
        tier = tier_of(name.name)
        hint = f"; it is listed in tier {tier}, not in {self.policy.tier}" if tier else ""
        verb = {"value": "names", "instance": "makes a", "call": "calls"}[use]
        self.note(
            Verdict.UNKNOWN,
            "global",
            f"{verb} {name.name}, which is on no list of this tier{hint}",
            offset=offset,
            global_name=name.name,
            use=use,
        )

    def _forget(self, name: str) -> None:
        member = printable("!".join(self.members)) or None
        self.notes.reasons[:] = [
            reason
            for reason in self.notes.reasons
            if not (reason.rule == "global" and reason.global_name == name and reason.member == member)
        ]

    def inside(self, name: str, source: Source) -> Job:
        """The job for a member called `name`."""
        members = (*self.members, name)
        self.meter.check_depth(len(members))
        return Job(
            source=source,
            notes=self.notes,
            meter=self.meter,
            trust=self.trust,
            judge=self.judge,
            name=name,
            members=members,
            in_folder=self.in_folder,
        )

    def judge_inside(self, name: str, source: Source) -> tuple[str, str]:
        """Judge a member; returns its (format, loader)."""
        try:
            return self.judge(self.inside(name, source))
        except OverBudget as error:
            self.note(Verdict.ERROR, "budget", f"{name}: {error}; not read further")
            return "none", "none"


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """One kind of content."""

    name: str
    loader: str
    """Whose reading of the bytes the verdict is about."""
    sniff: Callable[[bytes, Source], bool]
    """(first 4 KiB, everything) → whether the content is meant to be this format. Never looks at a name."""
    judge: Callable[[Job], tuple[str, str] | None]
    """Note everything wrong; may return a more exact (format, loader)."""
