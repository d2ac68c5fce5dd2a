"""Attackers that have read our source: what they do to the guard inside the job, and what sees it all the same.

One job makes every act that leaves the guard deaf and goes on training; the supervisor reads it from outside. Each test
is one act, a row of THREAT-MODEL.md. What nothing here sees is asserted too: it is left to replay.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.helpers.recorded import context, judge
from tests.helpers.training import Run, train
from tests.helpers.watched import cache_folder, write

from trainguard.appraise.gradients import Gradients
from trainguard.appraise.interface import Check
from trainguard.appraise.live import Live
from trainguard.appraise.optimizer import Optimizer
from trainguard.appraise.processes import Processes
from trainguard.appraise.text import Text
from trainguard.appraise.weights import Weights
from trainguard.evidence import Evidence
from trainguard.finding import Finding, LinkState
from trainguard.watch import engine
from trainguard.watch.outside import Outside
from trainguard.watch.supervisor import Settings, Supervisor, blocked_signals

pytestmark = pytest.mark.torch

JOB = """
import os, sys, time
import torch
torch.set_num_threads(1)
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4))
optimizer = torch.optim.AdamW(model.parameters())

def step():
    optimizer.zero_grad()
    model(torch.randn(2, 4)).square().sum().backward()
    optimizer.step()

for _ in range(5):
    step()
import act
act.go()
open("ready", "w").close()
end = time.monotonic() + 60
while not os.path.exists("seen") and time.monotonic() < end:
    step()
    time.sleep(0.05)
"""

DEAF = """
import sys, time, types
import torch

def nothing(*args, **kwargs):
    return None

def forward(self, input):
    return torch.nn.functional.layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps) * 1.0001

def forged(function, new):
    code = function.__code__
    function.__code__ = new.__code__.replace(
        co_filename=code.co_filename, co_firstlineno=code.co_firstlineno, co_name=code.co_name)

class Surface:
    name, every_step, between = "surface", False, nothing
    before = after = nothing

def go():
    from _trainguard import engine, governor, presence, surface, weights
    live = engine._engine
    forged(torch.nn.LayerNorm.forward, forward)                    # the act that all else is to hide
    torch.optim.AdamW.__init__.__defaults__ = (1e-3, (0.9, 0.9), *torch.optim.AdamW.__init__.__defaults__[2:])
    weights.Weights.before = nothing                               # a method of a link, by its class
    forged(engine.Engine.draw_sample, nothing)                     # by its code, with its name kept
    live.ready = nothing                                           # by an attribute of one object
    live.client.send = live.client.send                            # the same of the connection
    live.links[:] = [Surface() if link.name == "surface" else link for link in live.links]
    governor.TOP_LEVEL = 60                                        # a limit of ours
    presence._presence.told = types.SimpleNamespace(update=nothing, __contains__=lambda self, _: True)
    type(presence._presence).look = nothing                        # the second place that would tell
    time.sleep = time.sleep
"""

GONE = """
import sys
import torch

def go():
    tables = torch.optim.optimizer if hasattr(torch.optim, "optimizer") else sys.modules["torch.optim.optimizer"]
    tables._global_optimizer_pre_hooks.clear()
    tables._global_optimizer_post_hooks.clear()
    audit = sys.modules["_trainguard.audit"]
    audit._handlers.clear()
    for name in [name for name in sys.modules if name.startswith("_trainguard")]:
        del sys.modules[name]
    import threading, time
    time.perf_counter_ns = lambda: 0
    threading.Lock = lambda: None
"""


HONEST = """
import collections, dataclasses, enum, functools, pathlib, types, unittest.mock
import torch
import edited

def logged(function):
    @functools.wraps(function)
    def inner(*args, **kwargs):
        return function(*args, **kwargs)
    return inner

@functools.lru_cache
def cached(a, *, b=(1, 2.5, None, True, "x", b"y", -0.0, 10**30)):
    return [x for x in (lambda: range(a))()]

@dataclasses.dataclass
class Config:
    lr: float = 1e-3
    def scale(self, by=2):
        return self.lr * by

Point = collections.namedtuple("Point", "x y")
generated = {}
exec("def made(x): return x", generated)
made = generated["made"]
copied = types.FunctionType(Config.scale.__code__, globals(), "copied")
STATE = {"steps": 0}

class Patched(torch.nn.Linear):
    def forward(self, input):
        return super().forward(input)

def go():
    torch.nn.functional.gelu = logged(torch.nn.functional.gelu)     # the job's own patch: for check surface
    unittest.mock.patch.object(Config, "scale", autospec=True).start()
    for n in range(3000):
        cached(3); Config().lr; STATE["steps"] += 1                 # hot code is rewritten in place
    pathlib.Path(edited.__file__).write_text("def f(a):\\n    return a + 2\\n")
"""


class Records(list[Evidence]):
    """Keeps records; tells the job once it was read from outside."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def add(self, kind: str, body: dict[str, Any], *, source: str = "supervisor", **fields: Any) -> Evidence:
        self.append(Evidence(n=len(self), at=len(self), source=source, kind=kind, body=body, **fields))
        if kind == "live":
            (self.folder / "seen").touch()
        return self[-1]

    def seal(self, *, final: bool = False) -> int | None:
        return None


def watch(folder: Path, act: str, **settings: Any) -> Records:
    """The records of the job with one attacker in it, under the real supervisor."""
    write(folder, {"train.py": JOB, "act.py": act, "edited.py": "def f(a):\n    return a + 1\n"})
    records = Records(folder)
    values = {"outside_first_seconds": 0.5, "pycache": str(cache_folder()), "kills": "off", **settings}
    before, following = Path.cwd(), Outside._next
    os.chdir(folder)
    Outside._next = lambda self: following(self) if (folder / "ready").exists() else None  # type: ignore[method-assign]
    records.add("start", {"command": ["python", "train.py"], "cwd": str(folder)})
    try:
        with blocked_signals() as mask:
            ended = Supervisor(records, Settings(**values)).run((sys.executable, "train.py"), os.environ, mask=mask)
    finally:
        Outside._next = following  # type: ignore[method-assign]
        os.chdir(before)
    assert ended.status == 0
    return records


def appraise(check: type[Check], records: Records) -> list[Finding]:
    made = check(context())
    return [finding for record in records for finding in made.see(record)]


@pytest.fixture(scope="module")
def deaf(tmp_path_factory: pytest.TempPathFactory) -> Records:
    """Every link is silenced or fed, nothing is removed."""
    return watch(tmp_path_factory.mktemp("deaf"), DEAF)


@pytest.fixture(scope="module")
def gone(tmp_path_factory: pytest.TempPathFactory) -> Records:
    """Hooks cleared, audit handlers dropped, modules unloaded, clocks and locks patched."""
    return watch(tmp_path_factory.mktemp("gone"), GONE)


@pytest.mark.parametrize(
    ("act", "outcome", "technique"),
    [
        ("LayerNorm.forward runs other code", "violated", "B4"),
        ("the defaults of torch.optim.adamw.AdamW.__init__", "violated", "B4"),
        ("_trainguard.weights.Weights.before leads to nothing", "violated", "G6"),
        ("_trainguard.engine.Engine.draw_sample runs other code", "violated", "G6"),
        ("methods of the guard are hidden: ready", "suspicious", "G7"),
        ("client.send", "suspicious", "G7"),
        ("links were replaced: Surface", "suspicious", "G7"),
        ("the value of _trainguard.governor.TOP_LEVEL", "violated", "G6"),
        ("_trainguard.presence.Presence.look leads to nothing", "violated", "G6"),
    ],
)
def test_an_act_against_the_inner_half_is_seen_from_outside(
    deaf: Records, act: str, outcome: str, technique: str
) -> None:
    """Code, defaults, methods, objects, constants: read from memory, whatever the process says."""
    (found,) = [finding for finding in appraise(Live, deaf) if act in finding.message]
    assert (found.outcome, found.techniques[0]) == (outcome, technique)
    assert "read from outside" in found.message


def test_nothing_else_is_said_of_that_job(deaf: Records) -> None:
    """Nine acts, eight findings, one of them about two: what was left alone is not accused."""
    assert len(appraise(Live, deaf)) == 8
    assert appraise(Text, deaf) == []


def test_a_guard_that_is_unloaded_is_missed(gone: Records) -> None:
    """The modules are gone from sys.modules and the hooks from torch's tables; the steps had been reported before."""
    (found,) = [finding for finding in appraise(Live, gone) if "read from outside" in finding.message]
    assert (found.outcome, found.techniques[0]) == ("suspicious", "G7")
    assert "the guard's modules were removed" in found.message


def test_cleared_hooks_are_told_from_a_second_place_inside_too(gone: Records) -> None:
    """Where reading from outside is not allowed, or comes too late, the exit handler says what is missing."""
    inside = [finding for finding in appraise(Live, gone) if "read from outside" not in finding.message]
    assert {finding.outcome for finding in inside} == {"suspicious"}
    assert any("_before is not in torch's _global_optimizer_pre_hooks" in finding.message for finding in inside)


def test_steps_stop_in_the_record_while_the_process_goes_on(gone: Records) -> None:
    """No record claims a step that nobody saw: the count ends where the hooks did."""
    assert max(record.step or 0 for record in gone if record.kind == "step") == 5
    assert appraise(Processes, gone) == []


def test_an_honest_job_has_no_difference(tmp_path: Path) -> None:
    """Decorators, caches, data classes, mocks, generated and copied functions, a patch, hot code, an edit on disk."""
    records = watch(tmp_path, HONEST)
    (reading,) = [record.body for record in records if record.kind == "live"]
    assert reading["code"] > 2000
    assert reading["guard"]["hooks"] == [True, True]
    assert reading["guard"]["engine"] is True
    assert [finding.message for finding in appraise(Live, records)] == []
    assert appraise(Text, records) == []
    made = Live(context())
    for record in records:
        list(made.see(record))
    (state,) = list(made.end())
    assert isinstance(state, LinkState)
    assert (state.held, state.broken, state.required) == (1, 0, False)
    assert any("edited since they were loaded" in reason for reason in state.blind)


# -- acting between samples ---------------------------------------------------------------------------------------


def findings_of(run: Run) -> list[Finding]:
    """What the step links say of a run."""
    return [finding for check in (Weights, Gradients, Optimizer) for finding in judge(check, run.records)[0]]


def test_weights_that_are_put_back_before_the_step_escape_the_step_links() -> None:
    """Not caught: other weights in forward and backward, the right ones at both samples. Left to gradient truth and
    replay; the trace that stays is the code that does it."""
    kept: list[torch.Tensor] = []

    def edit(run: Run) -> None:
        kept[:] = run.weights
        for parameter in run.net.parameters():
            parameter.data.mul_(1.01)

    def restore(run: Run) -> None:
        for parameter, weight in zip(run.net.parameters(), kept, strict=False):
            parameter.data.copy_(weight)

    run = train(12, after_step=edit, before_step=restore)
    assert kept
    assert findings_of(run) == []


def nudge_unchecked(run: Run) -> None:
    """Edit every weight where the guard's own plan says that the next step is not checked."""
    made = engine.current()
    tracks = list(made.tracks.values()) if made is not None else []
    if tracks and (run.step > 10 if run.checked_all else not tracks[0].next_full):  # type: ignore[attr-defined]
        for parameter in run.net.parameters():
            parameter.data.add_(1e-3)
        run.edits = getattr(run, "edits", 0) + 1  # type: ignore[attr-defined]


@pytest.mark.parametrize("everything", [False, True])
def test_who_acts_only_in_unchecked_steps_escapes_the_budget_and_not_links_all(everything: bool) -> None:
    """The plan lies in the process and can be read there. Coverage says how many steps were checked; with --links all
    there are no others."""

    def act(run: Run) -> None:
        run.checked_all = everything  # type: ignore[attr-defined]
        nudge_unchecked(run)

    settings = {"links": "all"} if everything else {"links": "governed", "credit_seconds": 0.0, "always_steps": 5}
    run = train(14 if everything else 40, after_step=act, **settings)
    assert getattr(run, "edits", 0) > 2
    assert bool(findings_of(run)) is everything
