"""The demo as people see it: one block an act in the terminal, and an index page over the reports."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from trainguard.appraise.verdict import Verdict
from trainguard.finding import Finding
from trainguard.render import words
from trainguard.render.html import render_page
from trainguard.render.line import plain
from trainguard.render.techniques import labelled
from trainguard.render.terminal import WORD_STYLE, cited, glyph, subject_parts


class _Act(Protocol):
    @property
    def key(self) -> str: ...
    @property
    def title(self) -> str: ...
    @property
    def story(self) -> str: ...
    @property
    def techniques(self) -> frozenset[str]: ...


class Scene(Protocol):
    """How one act went; `testing.demo.Scene` is one, and render does not import testing."""

    @property
    def act(self) -> _Act: ...
    @property
    def run(self) -> str: ...
    @property
    def folder(self) -> str: ...
    @property
    def verdict(self) -> Verdict: ...
    @property
    def proof(self) -> Finding | None: ...
    @property
    def as_promised(self) -> bool: ...
    @property
    def seconds(self) -> float: ...
    @property
    def heard_seconds(self) -> float | None: ...
    @property
    def heard_step(self) -> int: ...
    @property
    def weights(self) -> str | None: ...
    @property
    def loss(self) -> float | None: ...
    @property
    def naive(self) -> str: ...


def scene_view(scene: Scene, clean: Scene | None, *, ascii_only: bool = False) -> RenderableType:
    """One act: what was done, which customary control stayed green, what was found, when, on which evidence."""
    sign = glyph("ok" if scene.as_promised else "fail", ascii_only=ascii_only)
    word = scene.verdict.verdict
    title = Text.assemble(" ", sign, "  ", (scene.act.title, "bold"), "  ", (f" {word} ", WORD_STYLE[word]))
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True, style="dim")
    table.add_column(ratio=1, overflow="fold")
    for name, value in rows(scene, clean):
        table.add_row(name, value)
    body = Group(Text(scene.act.story, style="dim"), table)
    return Group(title, Padding(body, (0, 0, 1, 4)))


def rows(scene: Scene, clean: Scene | None) -> list[tuple[str, str]]:
    """(label, text) of one act, shared by terminal and page; every text comes from the run, with paths below the
    demo's folder shortened to where they lie in it."""
    below = scene.folder.rstrip("/") + "/"
    return [(name, value.replace(below, "")) for name, value in _rows(scene, clean)]


def _rows(scene: Scene, clean: Scene | None) -> list[tuple[str, str]]:
    listed: list[tuple[str, str]] = []
    if scene.naive:
        listed.append(("stayed green", scene.naive))
    proof = scene.proof
    if proof is not None:
        listed.append(("found", found(scene, proof)))
        listed.append(("by check", f"{proof.check}, {words.OUTCOME_WORDS[proof.outcome]}: {plain(proof.message, 500)}"))
        if proof.expected is not None:
            listed.append(("expected", plain(proof.expected, 300)))
        if proof.found is not None:
            listed.append(("found there", plain(proof.found, 300)))
        listed.append(("could be", " · ".join(labelled(technique) for technique in proof.techniques)))
        if proof.evidence:
            listed.append(("evidence", cited(proof.evidence)))
    elif scene.act.techniques:
        listed.append(("found", "not found" if not scene.verdict.findings else "other things, but not this"))
    if not scene.as_promised or not scene.act.techniques:
        listed.extend(("because", plain(reason, 500)) for reason in scene.verdict.reasons)
    if clean is not None and clean is not scene and scene.weights and clean.weights:
        listed.append(("damage", damage(scene, clean)))
    elif scene.loss is not None:
        listed.append(("held-out loss", f"{scene.loss:.4f} at the end"))
    return listed


def found(scene: Scene, proof: Finding) -> str:
    """Where the proof stands, and when somebody who watched heard of the first finding."""
    place = ", ".join(subject_parts(proof)) or "the run as a whole"
    when = "" if proof.subject.step is not None else ", before step 1" if scene.heard_step == 0 else ""
    if scene.heard_seconds is None:
        return f"{place}{when}; heard at the end of the run"
    during = f", with the job at step {scene.heard_step}" if scene.heard_step else ", before the first step"
    return f"{place}; first heard {scene.heard_seconds:.1f} s after the start{during}"


def damage(scene: Scene, clean: Scene) -> str:
    """Whether the act changed the final weights, and what the loss would have told."""
    if scene.weights == clean.weights:
        return "none: the final weights are those of the clean run, bit for bit"
    loss = ""
    if scene.loss is not None and clean.loss is not None:
        loss = f"; held-out loss {scene.loss:.4f}, clean {clean.loss:.4f}"
    return f"final weights are not those of the clean run{loss}"


def ending(scenes: Sequence[Scene], seconds: float) -> str:
    """One sentence on the whole demo."""
    acts = [scene for scene in scenes if scene.act.techniques]
    caught = sum(scene.as_promised for scene in acts)
    missed = [scene.act.title for scene in scenes if not scene.as_promised]
    sentence = f"{caught} of {words.plural(len(acts), 'act')} found, in {seconds:.0f} s."
    return (
        f"{sentence} Not as it should be: {'; '.join(missed)}." if missed else f"{sentence} The clean run is VERIFIED."
    )


def index_page(scenes: Sequence[Scene], seconds: float, *, log: str) -> str:
    """The page over the reports of a demo; each report lies beside it as `<run>.html`."""
    clean = next((scene for scene in scenes if not scene.act.techniques), None)
    acts = [
        {
            "title": scene.act.title,
            "story": scene.act.story,
            "word": scene.verdict.verdict,
            "as_promised": scene.as_promised,
            "rows": rows(scene, clean),
            "page": f"{scene.run}.html",
            "seconds": f"{scene.seconds:.1f}",
        }
        for scene in scenes
    ]
    return render_page("demo.html", {"acts": acts, "ending": ending(scenes, seconds), "log": plain(log)})
