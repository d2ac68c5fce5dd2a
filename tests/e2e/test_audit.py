"""`trainguard audit`: clean runs are equal to the bit, acts are found at their step, the rest is said."""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tests.helpers import guarded

from trainguard.archive import LogLeaves, RunReader
from trainguard.home import Home
from trainguard.replay.audit import Auditor, Options, Report
from trainguard.replay.committed import committed
from trainguard.replay.rerun import Rerun
from trainguard.replay.tasks import Task

pytestmark = [pytest.mark.torch, pytest.mark.slow, pytest.mark.timeout(400)]
"""Each replay is a process that imports torch; the first one of a machine compiles it too."""

SCRIPT = """
import sys
from pathlib import Path
import torch
from torch import nn
torch.set_num_threads(1)
torch.manual_seed(0)
out = Path(sys.argv[1])
out.mkdir()
net = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Dropout(0.2), nn.Linear(32, 3))
optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 24)
teacher = torch.randn(8, 3)
batch = torch.randn(16, 8)
for step in range(1, 25):
    loss = nn.functional.cross_entropy(net(batch), (batch @ teacher).argmax(1))
    batch = torch.randn(16, 8)
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(net.parameters(), 1.0)
    optimizer.step()
    schedule.step()
    if step % 8 == 0:
        net.eval()
        print(step, net(batch).sum().item())
        net.train()
        torch.save(net.state_dict(), out / f"{step}.pt")
"""

ACT = """
import os, sys, importlib.util
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name != "torch":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        run = spec.loader.exec_module
        def exec_module(module):
            run(module)
            arm(module)
        spec.loader.exec_module = exec_module
        return spec
def arm(torch):
    made = [0]
    def act(optimizer, args, kwargs):
        made[0] += 1
        if made[0] == 13:
            weight = optimizer.param_groups[0]["params"][2]
            with torch.no_grad():
                weight.view(-1)[5] += 0.05
    sys.modules["torch.optim.optimizer"].register_optimizer_step_post_hook(act)
sys.meta_path.insert(0, Finder())
"""

POLICY = "points_every = 8\nkills = 'off'\n"


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """One clean run with every in-process check off, and a copy of its state."""
    folder, kept = tmp_path_factory.mktemp("clean"), tmp_path_factory.mktemp("kept") / "state"
    record(folder)
    shutil.copytree(folder / ".trainguard", kept, symlinks=True)
    return folder, kept


@pytest.fixture
def clean(recorded: tuple[Path, Path]) -> Iterator[Path]:
    """That run, without the audits of other tests."""
    folder, kept = recorded
    yield folder
    shutil.rmtree(folder / ".trainguard")
    shutil.copytree(kept, folder / ".trainguard", symlinks=True)


def trainguard(folder: Path, *arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "trainguard", *arguments],
        cwd=folder,
        env=guarded.clean_environment() | (env or {}),
        capture_output=True,
        text=True,
        timeout=380,
        check=False,
    )


def record(folder: Path, *, script: str = SCRIPT, **env: str) -> None:
    (folder / "train.py").write_text(script)
    (folder / "policy.toml").write_text(POLICY)
    command = (
        "run",
        "--name",
        "r",
        "--links",
        "none",
        "--policy",
        "policy.toml",
        "--",
        sys.executable,
        "train.py",
        "out",
    )
    done = trainguard(folder, *command, env=env)
    assert done.returncode == 0, done.stderr


def audit(folder: Path, *options: str) -> tuple[int, dict[str, Any]]:
    done = trainguard(folder, "audit", "r", "--json", *options)
    assert done.returncode in (0, 1, 3), done.stderr
    return done.returncode, json.loads(done.stdout)


def replays(verdict: dict[str, Any]) -> list[dict[str, Any]]:
    return [finding for finding in verdict["findings"] if finding["check"] == "replay"]


def test_a_clean_run_is_equal_bit_for_bit_from_a_sealed_state(clean: Path) -> None:
    """Segment 2 is warped to: dropout, a prefetched batch, a schedule and evaluation in the part that is skipped."""
    before = {path.name: path.read_bytes() for path in (clean / "out").iterdir()}
    status, verdict = audit(clean, "--segments", "2")
    assert (status, replays(verdict)) == (0, [])
    assert verdict["coverage"]["replayed_steps"] == 8
    assert verdict["coverage"]["detection_probability"]["0.1"] == pytest.approx(1 / 3, abs=1e-3)
    (link,) = (link for link in verdict["links"] if link["link"] == "replay")
    assert (link["held"], link["broken"], link["blind"]) == (8, 0, [])
    assert verdict["level"] == "TIL-1"
    home = Home(clean / ".trainguard")
    (body,) = LogLeaves(home).audits["r"]
    report = msgspec.json.decode(home.blob(body["report"]))
    assert [(r["way"], r["outcome"]) for r in report["results"]] == [("warp", "equal")]
    assert report["selftest"]["passed"] is True
    assert {path.name: path.read_bytes() for path in (clean / "out").iterdir()} == before


@pytest.mark.nightly
@pytest.mark.parametrize("when", [11, 20])
def test_a_script_that_loads_what_it_saved_itself_is_replayed_from_a_sealed_state(tmp_path: Path, when: int) -> None:
    """What it saves while the warp goes forward is there to be loaded; what it holds is overwritten at landing. Where
    it is loaded after landing, the warp goes to the state sealed before it was saved."""
    loads = f"    if step == {when}:\n        net.load_state_dict(torch.load(out / '8.pt'))\n"
    record(tmp_path, script=SCRIPT + loads)
    status, verdict = audit(tmp_path, "--segments", "2")
    assert (status, replays(verdict)) == (0, [])
    home = Home(tmp_path / ".trainguard")
    (body,) = LogLeaves(home).audits["r"]
    report = msgspec.json.decode(home.blob(body["report"]))
    assert [(r["way"], r["outcome"]) for r in report["results"]] == [("warp", "equal")]


def test_points_are_sealed_in_the_log_and_the_key_is_the_one_committed_to(clean: Path) -> None:
    """What binds is hashed outside the process; the key that was said at the end was promised at the start."""
    home = Home(clean / ".trainguard")
    reader = RunReader(home, "r", leaves=LogLeaves(home))
    records = list(reader.records())
    assert [r.step for r in records if r.kind == "point_sealed"] == [8, 16, 24]
    assert reader.begin is not None
    assert len(reader.begin["key_sha256"]) == 64
    assert list(reader.begin["inputs"]) == [str(clean / "train.py")]


@pytest.mark.nightly
def test_a_weight_edited_between_two_steps_is_found_at_its_step(tmp_path: Path) -> None:
    """E4 from a start-up hook that the auditor's environment does not have; no in-process check was on."""
    plant = tmp_path / "plant"
    plant.mkdir()
    (plant / "sitecustomize.py").write_text(ACT)
    record(tmp_path, PYTHONPATH=str(plant))
    status, verdict = audit(tmp_path, "--segments", "all")
    assert status == 1, verdict["links"]
    assert verdict["verdict"] == "TAINTED"
    (finding,) = replays(verdict)
    assert finding["outcome"] == "violated"
    assert (finding["subject"]["step"], finding["subject"]["tensor"]) == (14, "3.weight")
    assert finding["techniques"][0] == "E4"
    assert finding["evidence"]
    assert "cause: one weight of 3.weight edited: element 5 from" in finding["message"]
    assert "(gives the recorded bytes)" in finding["message"]
    home = Home(tmp_path / ".trainguard")
    assert [c["confidence"] for body in LogLeaves(home).audits["r"] for c in body["causes"]] == ["reproduced"]
    status, verdict = audit(tmp_path, "--bisect", "--no-explain")
    assert status == 1
    assert {found["subject"]["step"] for found in replays(verdict)} == {14}


def test_segments_are_not_named_where_they_are_looked_for(clean: Path) -> None:
    """--bisect chooses by itself: together with --segments it is a usage error."""
    done = trainguard(clean, "audit", "r", "--bisect", "--segments", "1")
    assert done.returncode == 2
    assert "leave out --segments" in done.stderr


SAVER = (
    ACT[: ACT.index("def arm")]
    + """
def arm(torch):
    real = torch.save
    def save(value, path):
        if str(path).endswith("24.pt"):
            value = {name: tensor * 1.01 if name == "3.weight" else tensor for name, tensor in value.items()}
        real(value, path)
    torch.save = save
sys.meta_path.insert(0, Finder())
"""
)


@pytest.mark.nightly
def test_a_checkpoint_that_was_altered_while_it_was_saved_is_found(tmp_path: Path) -> None:
    """E9, in the last checkpoint and only there: no step is other than it should be, and no in-process check was on."""
    plant = tmp_path / "plant"
    plant.mkdir()
    (plant / "sitecustomize.py").write_text(SAVER)
    record(tmp_path, PYTHONPATH=str(plant))
    status, verdict = audit(tmp_path, "--segments", "2")
    assert (status, verdict["verdict"]) == (1, "TAINTED")
    (finding,) = replays(verdict)
    assert finding["techniques"][0] == "E9"
    assert (finding["subject"]["step"], finding["subject"]["tensor"]) == (24, "3.weight")
    assert finding["subject"]["path"] == str(tmp_path / "out" / "24.pt")


@pytest.mark.nightly
def test_an_altered_point_is_not_used_and_is_no_finding(tmp_path: Path) -> None:
    """Replay begins at the first step instead, and is equal."""
    record(tmp_path)
    data = tmp_path / ".trainguard" / "runs" / "r" / "points" / "p0-step-00000016" / "data"
    content = bytearray(data.read_bytes())
    content[8] ^= 1
    data.write_bytes(content)
    status, verdict = audit(tmp_path, "--segments", "2")
    assert (status, replays(verdict)) == (0, [])
    home = Home(tmp_path / ".trainguard")
    (body,) = LogLeaves(home).audits["r"]
    (result,) = msgspec.json.decode(home.blob(body["report"]))["results"]
    assert result["way"] == "start"
    assert "altered after it was sealed" in result["reason"]


def test_a_changed_script_is_said_and_is_no_finding(clean: Path) -> None:
    """Other code proves nothing about the run: exit status 3, with the file, before anything is started."""
    path = clean / "train.py"
    path.write_text(SCRIPT + "\n")
    try:
        status, verdict = audit(clean, "--segments", "0")
    finally:
        path.write_text(SCRIPT)
    assert status == 3
    assert replays(verdict) == []
    (link,) = (link for link in verdict["links"] if link["link"] == "replay")
    assert any("train.py changed since the run began" in reason for reason in link["blind"])


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (("--segments", "7"), "expected numbers from 0 to 2"),
        (("--segments", "x"), "expected numbers such as"),
        (("--budget", "200%"), "expected a share"),
        (("--env", "no-such-python"), "found no such program"),
    ],
)
def test_an_option_that_cannot_be_meant_is_a_usage_error(clean: Path, options: tuple[str, ...], word: str) -> None:
    """One sentence, exit status 2."""
    done = trainguard(clean, "audit", "r", *options)
    assert done.returncode == 2
    assert word in done.stderr


# -- audits that are cut short, and input that is not as it was: replays are stood in for, the rest is real ----------


class Stand:
    """Stands in for replays: gives the run's own account again, and counts. `act` may raise or change the result."""

    def __init__(self, home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
        reader = RunReader(home, "r", leaves=LogLeaves(home))
        assert reader.begin is not None
        self.account = committed("r", reader.records(), reader.begin).account
        self.asked: list[tuple[int, int]] = []
        """(begin, until) of every replay that was asked for; the self-test is (-1, …)."""
        self.act: Callable[[Rerun], None] = lambda _: None
        self.seeing = True
        """Whether a planted fault shows."""
        self.done: dict[str, Rerun] = {}
        self.read: list[str] = []
        """What every replay reads."""
        self.clocks: set[float] = set()
        monkeypatch.setattr(Auditor, "_rerun", lambda _, task: self.give(task))

    def give(self, task: Task) -> Rerun:
        """One replay; each task is done once."""
        if task.id not in self.done:
            self.clocks.add(task.clock)
            self.asked.append((-1 if task.plant else task.begin, task.until))
            self.done[task.id] = self.make(task.begin, task.until, task.plant if self.seeing else None)
        return self.done[task.id]

    def make(self, begin: int, until: int, plant: int | None) -> Rerun:
        """What it comes to."""
        account = deepcopy(self.account)
        account.steps = {number: step for number, step in account.steps.items() if number <= until}
        if plant:
            turned = {**account.steps[plant].vectors, "weights": bytes(4 * len(account.tensors[0]))}
            account.steps[plant] = msgspec.structs.replace(account.steps[plant], vectors=turned)
        result = Rerun(account=account, accounts={0: account}, trained=1, landed=begin > 0, status=0)
        result.read = list(self.read)
        if not plant:
            self.act(result)
        return result


@pytest.fixture
def home(clean: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    monkeypatch.chdir(clean)
    return Home(clean / ".trainguard")


def test_an_audit_that_was_cut_short_goes_on_where_it_was(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same draw, nothing that was done is done again, and no verdict in between."""
    stand, options = Stand(home, monkeypatch), Options(only=(0, 2), limit_seconds=11.0)
    turns = iter((None, KeyboardInterrupt))

    def cut(_: Rerun) -> None:
        if (error := next(turns, None)) is not None:
            raise error

    stand.act = cut
    before = len(LogLeaves(home).audits["r"]) if "r" in LogLeaves(home).audits else 0
    with pytest.raises(KeyboardInterrupt):
        Auditor(home, "r", options).run()
    assert stand.asked == [(-1, 3), (0, 8), (16, 25)]
    assert len(LogLeaves(home).audits.get("r", ())) == before
    stand.asked.clear()
    report = Auditor(home, "r", options).run()
    assert stand.asked == [(16, 25)]
    assert [result.outcome for result in report.results] == ["equal", "equal"]
    assert report.exit_status == 0


def test_results_that_cannot_be_read_are_made_again(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    """A result that was cut off, or of another kind, counts as none; what was replayed for it is still known."""
    stand, options = Stand(home, monkeypatch), Options(only=(0, 2), limit_seconds=12.0)
    turns = iter((None, KeyboardInterrupt))
    stand.act = lambda _: (_ for _ in ()).throw(error) if (error := next(turns, None)) else None
    with pytest.raises(KeyboardInterrupt):
        Auditor(home, "r", options).run()
    folders = [f for f in (home.root / "audits" / "r").iterdir() if not (f / "report.json").exists()]
    (task,) = (path for path in (folders[0] / "tasks").iterdir() if len(path.stem) == 32)
    task.write_text('{"results": [{"segment": 0}]}')
    stand.asked.clear()
    assert Auditor(home, "r", options).run().exit_status == 0
    assert stand.asked == [(16, 25)]


def test_two_audits_at_once_do_not_share_a_draw(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second draws for itself while the first is at it; neither deletes the other's files."""
    stand, options = Stand(home, monkeypatch), Options(only=(0,), limit_seconds=13.0)
    inner: list[str] = []

    def second(_: Rerun) -> None:
        if not inner:
            inner.append("")
            inner[0] = Auditor(home, "r", options).run().plan.nonce

    stand.act = second
    assert Auditor(home, "r", options).run().plan.nonce != inner[0]


def test_a_verifier_that_does_not_see_the_planted_fault_says_nothing_of_the_run(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    """G8: a verifier that shares what was tampered with finds every run clean, this one's planted fault included."""
    stand = Stand(home, monkeypatch)
    stand.seeing = False
    report = Auditor(home, "r", Options(only=(0,), limit_seconds=14.0)).run()
    assert (report.exit_status, report.selftest["passed"], report.replayed_steps) == (3, False, 0)
    assert [result.outcome for result in report.results] == ["not replayed"]
    assert "did not find the fault that was planted" in str(report.results[0].reason)
    assert stand.asked == [(-1, 3)]


@pytest.mark.parametrize("how", ["build", "failed", "silent", "parted"])
def test_what_could_not_be_replayed_is_said_and_is_no_finding(
    home: Home, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """Another torch, data that is gone, time that is up, a command that depends on what was not recorded: status 3."""
    stand, count = Stand(home, monkeypatch), itertools.count()
    why = {
        "build": "not comparable: torch: the run had",
        "failed": "it ended with status 1 at step 0 of 8: FileNotFoundError: data.bin",
        "silent": "it came to step 0 of 8 in the time it was given",
        "parted": "two clean replays of the same command part from each other at step 5",
    }[how]

    def act(result: Rerun) -> None:
        if how == "build":
            result.account.build = {**(result.account.build or {}), "torch": "2.0"}
        elif how == "parted":
            odd = {**result.account.steps[5].vectors, "raw": bytes([next(count)] * 4 * len(result.account.tensors[0]))}
            result.account.steps[5] = msgspec.structs.replace(result.account.steps[5], vectors=odd)
        else:
            result.account.steps.clear()
            result.status, result.timed_out = 1, how == "silent"
            result.output = "Traceback\nFileNotFoundError: data.bin"

    stand.act = act
    limit = 20.0 + len(how) + len(why)
    report = Auditor(home, "r", Options(only=(0,), limit_seconds=limit, explain_seconds=0.0)).run()
    assert report.exit_status == 3
    assert report.findings == ()
    (result,) = report.results
    assert (result.outcome, why in str(result.reason)) == ("not replayed", True)


@pytest.mark.parametrize(("carried", "begins"), [(11, [16, 8]), (8, [16, 8]), (7, [16, 0]), (None, [16, 0])])
def test_a_warp_that_loads_what_it_saved_on_the_way_is_made_from_an_earlier_state(
    home: Home, monkeypatch: pytest.MonkeyPatch, carried: int | None, begins: list[int]
) -> None:
    """Weights in such a file are not those of its step. From a state sealed before the save they are; where there is
    none, or nothing of the kind was loaded, replay begins at the first step."""
    stand = Stand(home, monkeypatch)

    def act(result: Rerun) -> None:
        if stand.asked[-1][0] == 16:
            result.carried = carried
            odd = {**result.account.steps[20].vectors, "before": bytes(4 * len(result.account.tensors[0]))}
            result.account.steps[20] = msgspec.structs.replace(result.account.steps[20], vectors=odd)

    stand.act = act
    report = Auditor(home, "r", Options(only=(2,), limit_seconds=70.0 + (carried or 0))).run()
    (result,) = report.results
    assert (report.exit_status, result.outcome) == (0, "equal")
    asked = [begin for begin, _ in stand.asked if begin >= 0]
    assert list(dict.fromkeys(asked)) == begins
    assert result.way == ("warp" if begins[-1] else "start")


@pytest.mark.parametrize("how", ["gone", "altered", "no folder"])
def test_a_point_that_is_not_as_it_was_sealed_is_not_used(
    home: Home, clean: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """Replay begins at the first step instead, and says why."""
    stand, point = Stand(home, monkeypatch), home.run("r") / "points" / "p0-step-00000016"
    aside = clean / f"aside-{how.replace(' ', '-')}"
    shutil.copytree(point, aside)
    if how == "no folder":
        shutil.rmtree(point)
    elif how == "gone":
        (point / "data").unlink()
    else:
        (point / "index.json").write_text((point / "index.json").read_text().replace("16", "17", 1))
    try:
        report = Auditor(home, "r", Options(only=(2,), limit_seconds=40.0 + len(how))).run()
    finally:
        shutil.rmtree(point, ignore_errors=True)
        shutil.move(aside, point)
    assert stand.asked[-1] == (0, 25)
    (result,) = report.results
    assert (result.outcome, result.way) == ("equal", "start")
    assert ("altered after it was sealed" if how == "altered" else "replay point of step 16") in str(result.reason)


def test_a_checkpoint_that_was_altered_before_the_run_read_it_is_named(
    home: Home, clean: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """S11: a run that resumes from another run's checkpoint, of which one layer was multiplied in between. The replay
    reads the same file, so that its steps are equal; what it read is not what was sealed. S12: nor is an older one."""
    import torch

    path = clean / "out" / "16.pt"
    kept = {each: each.read_bytes() for each in (clean / "out").iterdir()}
    stand = Stand(home, monkeypatch)
    stand.read = [str(path)]
    monkeypatch.setattr("trainguard.replay.opened._old", lambda *_: True)  # as if written before this run began
    monkeypatch.setattr("trainguard.replay.opened._own", lambda *_: False)  # and by an earlier one

    def audited(number: float) -> Report:
        return Auditor(home, "r", Options(only=(0,), limit_seconds=number)).run()

    try:
        assert audited(61.0).exit_status == 0
        state = torch.load(path)
        state["3.weight"] *= 1.01
        torch.save(state, path)
        report = audited(62.0)
        (finding,) = report.findings
        assert (report.exit_status, finding.outcome, finding.techniques[0]) == (1, "violated", "E3")
        assert (finding.check, finding.subject.path, finding.subject.tensor) == ("replay", str(path), "3.weight")
        assert finding.evidence
        path.write_bytes(kept[clean / "out" / "8.pt"])
        report = audited(63.0)
        assert (report.exit_status, {each.outcome for each in report.findings}) == (1, {"violated"})
    finally:
        for each, data in kept.items():
            each.write_bytes(data)


def test_what_a_run_told_otherwise_than_its_replays_is_suspicious(
    home: Home, clean: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """C10: steps and files are equal, and the command goes on after the last step of the run: exit status 3."""
    stand = Stand(home, monkeypatch)

    def act(result: Rerun) -> None:
        last = max(result.account.steps)
        if last == 24:
            result.account.steps[25] = msgspec.structs.replace(result.account.steps[24], number=25)

    stand.act = act
    report = Auditor(home, "r", Options(only=(), limit_seconds=64.0)).run()
    (finding,) = report.findings
    assert (report.exit_status, finding.outcome, finding.techniques) == (3, "suspicious", ("C10",))
    assert "the command goes on" in finding.message
    assert {result.outcome for result in report.results} == {"equal"}
    assert stand.clocks == {1.0, 3.0}


@pytest.mark.nightly
def test_an_audit_that_is_killed_half_way_goes_on_where_it_was(clean: Path) -> None:
    """SIGKILL after the first of two replays: the second call finds it done, and both are equal."""
    arguments = ("audit", "r", "--segments", "0,2", "--limit", "300")
    folder = clean / ".trainguard" / "audits" / "r"
    known = set(folder.iterdir()) if folder.is_dir() else set()
    command = [sys.executable, "-m", "trainguard", *arguments]
    first = subprocess.Popen(command, cwd=clean, env=guarded.clean_environment(), stderr=subprocess.DEVNULL)
    try:
        while first.poll() is None and not (done := _tasks(folder, known)):
            time.sleep(0.05)
    finally:
        first.kill()
        first.wait()
    assert first.returncode == -9, "it was over before it could be killed"
    written = {path: path.stat().st_mtime_ns for path in done}
    status, verdict = audit(clean, *arguments[2:])
    assert (status, replays(verdict)) == (0, [])
    assert {path: path.stat().st_mtime_ns for path in done} == written
    assert len(set(folder.iterdir()) - known) == 1


def _tasks(folder: Path, known: set[Path]) -> list[Path]:
    """Results of replays of an audit that was begun since; the self-test has a name of its own."""
    fresh = (path for path in (folder.iterdir() if folder.is_dir() else ()) if path not in known)
    return [task for path in fresh for task in (path / "tasks").glob("*.json") if len(task.stem) == 32]
