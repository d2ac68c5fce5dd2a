"""The report stands alone, obeys nothing it quotes, stays small, and says how to check it."""

from __future__ import annotations

import base64
import hashlib
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from tests.helpers import told

from trainguard.appraise.verdict import Verdict, decide
from trainguard.finding import Citation, Finding, LinkState, Subject
from trainguard.home import Home
from trainguard.render import html, plots, story


class _Page(HTMLParser):
    """Every start tag with its attributes, and all text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def finding(number: int = 1, **fields: object) -> Finding:
    values: dict[str, object] = {
        "check": "optimizer",
        "outcome": "violated",
        "techniques": ("C4",),
        "subject": Subject(run="r", rank=0, step=number, tensor="lm_head.weight"),
        "message": f"update {number} is 1.01 times too long",
        "expected": "1.0",
        "found": "1.01",
        "evidence": (Citation(leaf=3, hash="ab" * 32),),
    }
    return Finding(**(values | fields))  # type: ignore[arg-type]


def a_story(
    home: Home, *findings: Finding, links: tuple[LinkState, ...] = (), steps: int = 40, lock: str | None = None
) -> story.Story:
    """A recorded run, told with a verdict of the test's own."""
    links_value = {"hyperparameters": {"groups": [{"lr": 0.1}]}, "gradients": {"norm": 0.5}}
    told.record(home, "r", told.whole_run(*(told.step(n, **links_value) for n in range(1, steps + 1))))
    verdict = decide(findings, links, run="r", steps=steps, watched_steps=steps, lock=lock)
    return story.tell(home, "r", verdict)


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "home")


def test_the_page_loads_nothing_and_runs_nothing(home: Home):
    """No script, no outside resource, and a policy that would refuse both."""
    page = _Page(html.report_page(a_story(home, finding())))
    names = {tag for tag, _ in page.tags}
    assert not names & {"script", "img", "iframe", "object", "embed", "link", "form", "base", "audio", "video"}
    for _, attributes in page.tags:
        assert not [
            name for name in attributes if name.startswith("on") or name in ("style", "src", "srcset", "action")
        ]
        assert (attributes.get("href") or "#").startswith("#")
    (policy,) = [m["content"] for m in page.all("meta") if m.get("http-equiv") == "Content-Security-Policy"]
    assert policy is not None
    assert policy.startswith("default-src 'none'; style-src 'sha256-")


def test_the_policy_allows_exactly_the_style_sheet_in_the_page(home: Home):
    """The hash is that of the bytes a browser hashes."""
    page = html.report_page(a_story(home))
    (sheet,) = re.findall(r"<style>(.*?)</style>", page, re.S)
    digest = base64.b64encode(hashlib.sha256(sheet.encode()).digest()).decode()
    assert f"style-src 'sha256-{digest}'" in page
    assert "@import" not in sheet
    assert "url(" not in sheet


def test_script_injection_in_every_string_of_a_run_is_inert(home: Home):
    """Command, process, tensor, message, expected, found, path, reason and link names are text, whatever they say."""
    bad = told.HOSTILE
    spawn = ("spawn", {"args": [bad], "place": bad}, {"process": 0, "pid": 800, "source": "process"})
    records = [
        told.start(command=[bad], host=bad, kernel=bad, cwd=bad, account={"uid": 1, "name": bad}),
        told.process(command=[bad]),
        spawn,
        told.step(1),
        *told.leave(),
        told.end(),
    ]
    told.record(home, "r", records)
    hostile = finding(
        subject=Subject(run=bad, rank=0, step=1, tensor=bad, path=bad),
        message=bad,
        expected=bad,
        found=bad,
        techniques=(bad,),
        check=bad,
        evidence=(Citation(leaf=1, hash=bad),),
    )
    lockish = finding(check="environment", message=bad, subject=Subject(path=bad))
    links = (LinkState(link=bad, blind=(bad,), explained=(bad,)),)
    verdict = decide([hostile, lockish], links, run="r", steps=1, gaps=(bad,))
    page = html.report_page(story.tell(home, "r", verdict))
    parsed = _Page(page)
    assert not {tag for tag, _ in parsed.tags} & {"script", "img"}
    assert not [a for _, attributes in parsed.tags for a in attributes if a.startswith("on")]
    assert "alert(1)</script>" in parsed.text
    assert "{{7*7}}" in parsed.text
    assert "\x1b" not in page
    assert "\u202e" not in page


def test_the_header_says_the_word_and_what_it_means(home: Home):
    """The answer stands first."""
    page = _Page(html.report_page(a_story(home, finding()))).text
    assert page.index("TAINTED") < page.index("Findings")
    assert "proved not to be what was approved" in page
    assert "could still be deceived by root on that host" in page


def test_a_finding_carries_its_proof(home: Home):
    """Leaf, hash and the tree head it lies under, and the command that proves it."""
    whole = a_story(home, finding())
    page = _Page(html.report_page(whole)).text
    assert "record in leaf 3" in page
    assert "ab" * 32 in page
    assert f"size {whole.record.tree_size}, root {whole.record.root}" in page
    assert "trainguard log prove 3" in page
    assert "trainguard log verify" in page


def test_differences_from_the_lock_stand_in_their_own_section(home: Home):
    """What was not approved is not mixed with what went wrong in a step."""
    change = finding(check="environment", message="adam.py is not the approved file", subject=Subject(path="adam.py"))
    whole = a_story(home, change, finding(), lock="cd" * 32)
    page = _Page(html.report_page(whole)).text
    findings_at, lock_at = page.index("update 1 is 1.01"), page.index("Differences from the lock")
    assert findings_at < lock_at < page.index("adam.py is not the approved file", lock_at)


def test_an_oddity_of_the_environment_is_shown_without_a_lock_too(home: Home):
    """Where there is nothing to compare with, what is odd in itself stands among the findings."""
    page = _Page(html.report_page(a_story(home, finding(check="environment", message="a .pth runs code")))).text
    assert page.index("a .pth runs code") < page.index("Differences from the lock")


def test_an_absent_loss_curve_is_explained_and_not_drawn_empty(home: Home):
    """The guard does not read what a script prints."""
    page = html.report_page(a_story(home))
    assert "No loss curve" in page
    assert page.count('class="line"') == 4  # step time, own time, learning rate, gradient norm


def test_without_steps_the_page_says_that_there_is_nothing_to_plot(home: Home):
    """An empty plot would look like a result."""
    told.record(home, "r", [told.start(), told.process(), *told.leave(), told.end()])
    page = html.report_page(story.tell_run(home, "r"))
    assert "No optimizer step was recorded, so there is nothing to plot." in page
    assert 'class="line"' not in page


@pytest.mark.parametrize("worst", [told.HOSTILE * 20, "&" * 1000])
def test_the_largest_report_stays_within_its_limit(home: Home, worst: str):
    """350 kB, whatever was recorded: less is shown and the rest is counted."""
    spawns = [("spawn", {"args": [worst], "place": worst}, {"process": 0, "pid": 800, "source": "process"})] * 20
    processes = [told.process(number, command=[worst]) for number in range(120)]
    told.record(home, "r", [told.start(command=[worst]), *processes, *spawns, told.step(1), told.end()])
    many = [
        finding(number, check=f"check-{number % 15}", message=f"{number} {worst}", expected=worst, found=worst)
        for number in range(1, 3000)
    ]
    links = tuple(LinkState(link=f"check-{number}", blind=(worst,) * 50) for number in range(15))
    verdict = decide(many, links, run="r", steps=1, watched_steps=1)
    page = html.report_page(story.tell(home, "r", verdict))
    assert len(page.encode()) <= html.PAGE_LIMIT_BYTES
    assert "all of them:" in page


def test_every_table_has_headings_and_every_drawing_has_words(home: Home):
    """Readable with a screen reader: scopes, names, a language, a way past the header, one main part."""
    page = _Page(html.report_page(a_story(home, finding(), links=(LinkState(link="code", held=3),))))
    assert all(attributes.get("scope") in ("col", "row") for attributes in page.all("th"))
    assert all(
        svg.get("role") == "img" and (svg.get("aria-label") or svg.get("aria-labelledby")) for svg in page.all("svg")
    )
    assert page.all("html")[0].get("lang") == "en"
    assert page.all("a")[0] == {"class": "skip", "href": "#main"}
    assert len(page.all("main")) == len(page.all("h1")) == 1
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    targets = {(attributes.get("href") or "")[1:] for attributes in page.all("a")}
    assert targets <= set(ids)
    regions = [attributes for _, attributes in page.tags if attributes.get("role") == "region"]
    assert all(region.get("tabindex") == "0" for region in regions)


def test_a_page_is_written_whole(home: Home, tmp_path: Path):
    """A reader never sees half a report."""
    target = tmp_path / "report.html"
    target.write_text("old")
    html.write_page(target, html.report_page(a_story(home)))
    assert target.read_text().rstrip().endswith("</html>")
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["report.html"]


def test_the_same_story_gives_the_same_page(home: Home):
    """Anybody with the log can make it again and compare."""
    whole = a_story(home, finding())
    assert html.report_page(whole) == html.report_page(whole)


@pytest.mark.parametrize(
    ("low", "high"), [(0.0, 0.0), (1.0, 1.0), (-3.0, 5.0), (1e-12, 2e-12), (1e29, 9e29), (0.0, 1e-30)]
)
def test_a_plot_of_any_range_has_ticks_within_its_frame(low: float, high: float):
    """Flat, negative, tiny and huge curves are drawn inside the box."""
    points = (story.Point(1, 5, low, (low + high) / 2, high), story.Point(6, 9, low, low, low))
    curve = story.Curve(
        name="learning_rate", unit="", process=0, rank=None, count=9, low=low, mean=low, high=high, points=points
    )
    drawn = plots.plot(curve, [1, 5, 900])
    assert drawn.y_ticks
    assert all(drawn.top - 1 <= tick.at <= drawn.bottom + 1 for tick in drawn.y_ticks)
    assert len(drawn.marks) == 2
    assert re.fullmatch(r"[-MLZ0-9. ]+", drawn.band + drawn.line)


def test_a_verdict_without_a_record_still_gives_a_page(home: Home):
    """A log that holds nothing of a run is a report too."""
    told.record(home, "other", told.whole_run(told.step(1)))
    home.run("planted").mkdir()
    verdict: Verdict = story.judge_run(home, "planted")
    page = html.report_page(story.tell(home, "planted", verdict))
    assert "the log holds nothing of this run" in page
    assert "UNKNOWN" in page
