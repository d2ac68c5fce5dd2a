"""Each link of a run, explained: what it asks, how it ended, where it departed, and what would make it visible.

A value made from a verdict alone; `explain --json` prints it and the terminal shows it. Findings are sorted to the link
of the same name, since one name runs from watch/ through appraise/ to docs/checks/.
"""

from __future__ import annotations

import re

import msgspec
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.text import Text

from trainguard.appraise.verdict import Verdict, Word
from trainguard.finding import Citation, Finding, LinkState, Outcome, Subject
from trainguard.render import words
from trainguard.render.line import plain
from trainguard.render.terminal import GLYPHS, cited, glyph, headline, subject_parts

SHOWN_PER_LINK = 6

ASKS: dict[str, str] = {
    "environment": "Is what is about to run what the lock approved: packages byte by byte, start-up hooks, variables?",
    "processes": "Did every interpreter of the job report, without gaps, to the end?",
    "code": "Were exactly the approved bytes compiled, and did nothing else run?",
    "inputs": "Did the job read approved files, and did they stay the same while it ran?",
    "loads": "Were model files vetted before they were read, and did no pickle name what runs code?",
    "plan": "Does it begin as the approved runs did: seeds, loaders, optimizers, flags?",
    "plan.course": "Does it go on as they did: streams, order, rates?",
    "rng": "Do the random streams go on from step to step, unseeded in between?",
    "loss": "Is the loss what the calling lines ask for, recomputed from its inputs in double precision?",
    "truth": "Is the gradient the derivative of the loss, by moving the weights in a replay of the step?",
    "gradients": "Is the gradient the optimizer used the one backward computed, but for one honest clip or scale?",
    "hyperparameters": "Do learning rate and other settings change only through a scheduler or approved code?",
    "optimizer": "Is every update what the optimizer's formula gives, recomputed in double precision?",
    "weights": "Do weights and optimizer state stay untouched between steps?",
    "surface": "Do the names that training calls lead to the code that was verified?",
    "live": "Read from outside: is the code in memory what its files compile to, the guard's own included?",
    "text": "Read from outside: are machine instructions in memory those of the files?",
    "modules": "Do numeric flags, training modes and module settings stay what they were?",
    "hooks": "Are the functions that torch calls on gradients, modules and optimizers known ones?",
    "dispatch": "Do operators still call torch's own kernels?",
    "deferred": "Is code that runs later (threads, timers, signal handlers) known code?",
    "rng.numpy": "Do the streams of numpy and python go on from state to state?",
    "order": "Were the samples of every batch those that the sampler draws from its seed?",
    "batches": "Did labels and batches arrive at the model as the data set has them?",
    "batches.labels": "Did the loss use the labels that the loader handed over?",
    "seals": "Was what the job saved sealed, and is what it opened what was sealed?",
    "saves": "Do saved files hold what torch.save was given?",
    "scale": "Does the same code do the same as rank 0 of a big job?",
    "replicas": "Do ranks that hold the same weights hold the same values?",
    "stalls": "Is the time between steps explained by the work, not by sleeps?",
    "replay": "Does a clean replay of the same command give the same bits?",
    "kills": "Is it known who sent every signal in the job?",
}
"""link → the question it answers; a link that is not here is shown by its name alone."""

REMEDIES: tuple[tuple[str, str], ...] = (
    (r"^no lock|\bno lock:", "approve what runs, then run again: trainguard lock -- CMD"),
    (r"holds no plan", "make one of approved runs: trainguard lock --plan RUN --plan RUN -- CMD"),
    (
        r"reference runs differ in",
        "nothing where the script leaves it to chance; else seed it and plan again",
    ),
    (r"make it of two sizes", "record runs with other numbers of ranks and name them too: trainguard lock --plan RUN"),
    (r"it was started again;|it goes on from saved state", "replay covers it: trainguard audit"),
    (r"not measured|nothing was measured|no measurement", "find out why measuring failed: trainguard preflight -- CMD"),
    (r"switched off|--links none", "run again without --links none"),
    (
        r"no interpreter of the job reported",
        "start Python without -I, -E or -S, and keep PYTHONPATH for child processes",
    ),
    (r"who sent it is not known", "see whether this machine allows a seccomp listener: trainguard doctor"),
    (
        r"dropped while nobody read|never arrived|could not be stored",
        "free disk space or processor time; the gap stays",
    ),
    (r"check (itself )?failed", "a fault of trainguard, not of the run: report it with its text"),
    (r"no reference for its update", "only torch.optim's optimizers are recomputed; replay covers others"),
    (
        r"no optimizer step|none was sampled|was sampled",
        "the script steps without torch.optim, or too briefly; replay covers it",
    ),
    (r"cannot be sampled|are not recomputed", "tensors of this layout or type are not read; replay covers them"),
    (r"too large to hash", "put the data into the lock: trainguard lock --data PATH -- CMD"),
    (r"more files than", "put data into fewer, larger files, or into the lock with --data"),
    (r"co-tenant load|throttled:", "give the rank the processors and the quota that the others have"),
    (r"training thread could not be looked at", "allow reading /proc/PID/syscall of own children (Yama scope 0 or 1)"),
    (r"sender is outside the job", "start the node's ledger as root: trainguard node"),
    (r"budget|not chosen", "check more of it: --links all, or a larger budget_percent in the policy"),
    (
        r"on tape|loss functions takes part|was not recomputed|run again in double|own backward code|has a kink|"
        r"compiles code|are shards|another dispatch mode",
        "the derivative cannot be had there; replay on a clean host covers it",
    ),
    (r"no sweep was completed", "let it run longer, or check everything: --links all"),
    (r"numeric flags", "run again on a less loaded machine: torch did not answer in time"),
)
"""(pattern in a reason for blindness, what would make it visible); the first that fits is taken."""


class Blindness(msgspec.Struct, frozen=True, kw_only=True):
    """Why part of a link was not seen."""

    reason: str
    remedy: str


class Departure(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that did not hold, with how often the same was said."""

    outcome: Outcome
    message: str
    place: str | None
    """`file:line` or file, where it is known."""
    step: int | None
    rank: int | None
    tensor: str | None
    times: int
    evidence: tuple[Citation, ...]


class Link(msgspec.Struct, frozen=True, kw_only=True):
    """One link of a run, explained."""

    link: str
    asks: str | None
    state: str
    """held, broken, blind, explained or unused."""
    required: bool
    held: int
    broken: int
    blind: tuple[Blindness, ...]
    explained: tuple[str, ...]
    """Approved `file:line` entries that account for departures."""
    installed: tuple[str, ...]
    """What installed packages put in the place of other code, `name: file:line`."""
    departures: tuple[Departure, ...]


class Explanation(msgspec.Struct, frozen=True, kw_only=True):
    """All links of one run."""

    schema: str = "trainguard/explain/v1"
    run: str | None
    verdict: Word
    links: tuple[Link, ...]
    elsewhere: tuple[Departure, ...]
    """Findings of checks that keep no link, such as a log that does not verify."""


def explain(verdict: Verdict) -> Explanation:
    """Every link of `verdict`, broken ones first, then blind, explained, held and unused ones."""
    order = ("broken", "blind", "explained", "held", "unused")
    links = sorted((_link(link, verdict) for link in verdict.links), key=lambda link: order.index(link.state))
    names = {link.link for link in verdict.links}
    elsewhere = [finding for finding in verdict.findings if finding.check not in names]
    return Explanation(run=verdict.run, verdict=verdict.verdict, links=tuple(links), elsewhere=_departures(elsewhere))


def remedy(link: str, reason: str) -> str:
    """What would make visible what `reason` says was not seen."""
    fitting = (advice for pattern, advice in REMEDIES if re.search(pattern, reason[:1000]))
    return next(fitting, f"see docs/checks/{link.partition('.')[0]}.md")


def _link(link: LinkState, verdict: Verdict) -> Link:
    state = words.link_word(link)
    reasons = link.blind or (("nothing of it was seen",) if state == "blind" else ())
    return Link(
        link=link.link,
        asks=ASKS.get(link.link),
        state=state,
        required=link.required,
        held=link.held,
        broken=link.broken,
        blind=tuple(Blindness(reason=reason, remedy=remedy(link.link, reason)) for reason in reasons),
        explained=link.explained,
        installed=link.installed,
        departures=_departures([finding for finding in verdict.findings if finding.check == link.link]),
    )


def _departures(findings: list[Finding]) -> tuple[Departure, ...]:
    groups: dict[tuple[Outcome, str], list[Finding]] = {}
    for finding in findings:
        groups.setdefault((finding.outcome, finding.message), []).append(finding)
    return tuple(
        Departure(
            outcome=outcome,
            message=message,
            place=same[0].subject.path,
            step=same[0].subject.step,
            rank=same[0].subject.rank,
            tensor=same[0].subject.tensor,
            times=len(same),
            evidence=same[0].evidence,
        )
        for (outcome, message), same in groups.items()
    )


# -- in the terminal ----------------------------------------------------------------------------------------------


def explanation_view(explanation: Explanation, verdict: Verdict, *, ascii_only: bool = False) -> RenderableType:
    """Every link with its question, its balance and what to do about what was not seen."""
    parts: list[RenderableType] = [headline(verdict), Text()]
    for link in explanation.links:
        parts += [_link_view(link, ascii_only), Text()]
    for departure in explanation.elsewhere:
        parts += [_departure_view(departure, ascii_only), Text()]
    if not explanation.links:
        parts += [Text("No link was balanced: the run goes on, or its record does not verify."), Text()]
    return Group(*parts[:-1])


def _link_view(link: Link, ascii_only: bool) -> RenderableType:
    counts = words.link_counts(LinkState(link=link.link, held=link.held, broken=link.broken))
    title = Text.assemble(
        " ",
        glyph(link.state, ascii_only=ascii_only),
        "  ",
        (plain(link.link), "bold"),
        "  ",
        (link.state, GLYPHS[link.state][2]),
        "  " + (counts if link.state != "unused" else "not part of this run"),
    )
    body: list[RenderableType] = [Text(link.asks, style="dim")] if link.asks else []
    body += [_departure_view(departure, ascii_only) for departure in link.departures[:SHOWN_PER_LINK]]
    if len(link.departures) > SHOWN_PER_LINK:
        body.append(Text(f"and {len(link.departures) - SHOWN_PER_LINK} more: --json", style="dim"))
    for blind in link.blind[:SHOWN_PER_LINK]:
        body.append(Text.assemble(("not seen: ", GLYPHS["blind"][2]), plain(blind.reason)))
        body.append(Padding(Text.assemble(("to see it: ", "dim"), blind.remedy), (0, 0, 0, 2)))
    if len(link.blind) > SHOWN_PER_LINK:
        body.append(Text(f"and {len(link.blind) - SHOWN_PER_LINK} more reasons: --json", style="dim"))
    body += [Text.assemble(("approved: ", GLYPHS["explained"][2]), plain(place)) for place in link.explained]
    body += [
        Text.assemble(("by an installed package: ", "dim"), plain(each)) for each in link.installed[:SHOWN_PER_LINK]
    ]
    if len(link.installed) > SHOWN_PER_LINK:
        body.append(Text(f"and {len(link.installed) - SHOWN_PER_LINK} more by installed packages: --json", style="dim"))
    return Group(title, Padding(Group(*body), (0, 0, 0, 4)))


def _departure_view(departure: Departure, ascii_only: bool) -> RenderableType:
    finding = Finding(
        check="",
        outcome=departure.outcome,
        message=departure.message,
        subject=Subject(step=departure.step, rank=departure.rank, tensor=departure.tensor, path=departure.place),
    )
    line = Text.assemble(glyph(departure.outcome, ascii_only=ascii_only), " ")
    for part in subject_parts(finding):
        line.append(part, style="cyan").append("  ")
    line.append(plain(departure.message, 600))
    if departure.times > 1:
        line.append(f"  ({departure.times:,} times)", style="dim")
    if departure.evidence:
        line.append(f"  {cited(departure.evidence)}", style="dim")
    return line
