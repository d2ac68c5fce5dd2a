"""Patches of the functions that training calls: each found with its place, and the control that stays green."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.helpers.watched import Watched, training, watch, write

from trainguard.appraise.origin import Origins
from trainguard.appraise.surface import Surface
from trainguard.finding import Finding
from trainguard.policy import Approval

PATCH = """
import torch
import torch.nn.functional as F
from torch.nn.utils import clip_grad

def patched(real):
    def clip_grad_norm_(parameters, max_norm, *args, **kwargs):
        return real(parameters, max_norm * 0.1, *args, **kwargs)
    return clip_grad_norm_

def forward(self, input):
    return F.layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps) * 1.0

def linear(self, input):
    return F.linear(input, self.weight, self.bias) * 1.0

def same(value, code):
    print("id same", value, "code same", code)

def go():
    for what in ("replace", "code", "forged", "defaults", "base", "constant", "other", "object", "string"):
        patch(what)

def patch(what):
    if what == "replace":
        torch.nn.utils.clip_grad_norm_ = patched(torch.nn.utils.clip_grad_norm_)
    if what == "code":
        f = torch.nn.LayerNorm.forward
        was = id(f)
        f.__code__ = forward.__code__
        same(id(torch.nn.LayerNorm.forward) == was, None)
    if what == "forged":
        f = torch.nn.Linear.forward
        kept = f.__code__
        f.__code__ = linear.__code__.replace(
            co_filename=kept.co_filename, co_firstlineno=kept.co_firstlineno, co_name=kept.co_name)
    if what == "defaults":
        f = torch.optim.AdamW.__init__
        was, code = id(f), hash(f.__code__)
        f.__defaults__ = (1e-3, (0.9, 0.99), *f.__defaults__[2:])
        same(id(f) == was, hash(f.__code__) == code)
    if what == "base":
        def zero_grad(self, set_to_none=True):
            for group in self.param_groups:
                for p in group["params"]:
                    p.grad = None
        torch.optim.Optimizer.zero_grad = zero_grad
    if what == "constant":
        import torch.utils.data._utils as utils
        utils.MP_STATUS_CHECK_INTERVAL = 0.1
    if what == "other":
        F.l1_loss = F.mse_loss
    if what == "object":
        import __main__
        __main__.model[2].forward = lambda x: x
    if what == "string":
        names = {}
        exec("def clip_grad_value_(parameters, value, foreach=None): pass", names)
        clip_grad.clip_grad_value_ = names["clip_grad_value_"]
"""

ATTACKS = {
    "replace": ("torch.nn.utils.clip_grad_norm_", "B3", "suspicious", "def clip_grad_norm_"),
    "code": ("torch.nn.modules.normalization.LayerNorm.forward", "B4", "violated", "def forward"),
    "forged": ("torch.nn.modules.linear.Linear.forward", "B4", "violated", None),
    "defaults": ("torch.optim.adamw.AdamW.__init__", "B4", "violated", None),
    "base": ("torch.optim.optimizer.Optimizer.zero_grad", "B3", "suspicious", "def zero_grad"),
    "constant": ("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", "B4", "suspicious", None),
    "other": ("torch.nn.functional.l1_loss", "B3", "suspicious", None),
    "string": ("torch.nn.utils.clip_grad.clip_grad_value_", "B3", "suspicious", None),
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Watched:
    """Eight steps; every patch is made before step 3."""
    folder = tmp_path_factory.mktemp("job")
    write(
        folder, {"train.py": training(steps=8, before="import helper; step == 3 and helper.go()"), "helper.py": PATCH}
    )
    run = watch(folder)
    assert run.status == 0, run.output
    assert run.faults() == []
    return run


def about(findings: list[Finding], binding: str) -> Finding:
    (found,) = [finding for finding in findings if binding in finding.message]
    return found


@pytest.mark.parametrize("what", sorted(ATTACKS))
def test_a_patch_is_found_with_its_binding_and_place(run: Watched, what: str) -> None:
    """In the sweep of the very step; the message says since when."""
    binding, technique, outcome, line = ATTACKS[what]
    findings, link = run.judge(Surface)
    found = about(findings, binding)
    assert (found.outcome, found.techniques[0], found.subject.step) == (outcome, technique, 3)
    assert "appeared after step 2" in found.message
    assert link.state == "broken"
    if line is not None:
        assert found.subject.path == run.line_of("helper.py", line)


def test_identity_and_code_hash_stay_green_where_defaults_change(run: Watched) -> None:
    """The control: `id()` of the function and the hash of its code are the same before and after."""
    assert "id same True code same True" in run.output


def test_identity_stays_green_where_code_is_swapped(run: Watched) -> None:
    """The control for a swapped `__code__`."""
    assert "id same True code same None" in run.output


def test_a_patch_that_is_approved_is_explained(run: Watched) -> None:
    """Approval by `file:line`, relative to the code root; the others stay."""
    place = run.line_of("helper.py", "def clip_grad_norm_")
    findings, link = run.judge(Surface, Approval(check="surface", place=place))
    assert not [finding for finding in findings if "clip_grad_norm_" in finding.message]
    assert link.explained == ("helper.py:" + place.rsplit(":", 1)[1],)
    assert len(findings) == len(run.judge(Surface)[0]) - 1


def test_a_method_hidden_by_an_attribute_of_one_module_is_found(run: Watched) -> None:
    """`model[2].forward = f` changes no class."""
    found = about(run.judge(Surface)[0], "module 2.forward")
    assert (found.outcome, found.techniques[0]) == ("suspicious", "B3")


JOB = """
import dataclasses, sys, types
import torch, conf
import torch.nn as nn
from torch.utils.data import DataLoader, Dataset

torch.manual_seed(0)
torch.set_num_threads(1)

@dataclasses.dataclass
class Config:
    lr: float = 1e-3
    epoch: int = 0

CFG = Config()

class Net(nn.Sequential):
    factor = 1.0
    count = 0
    def forward(self, x):
        Net.count += 1
        return super().forward(x) * self.factor

class Data(Dataset):
    def __init__(self, transform):
        self.transform, self.x, self.served = transform, torch.randn(64, 4), 0
    def __len__(self):
        return 64
    def __getitem__(self, i):
        self.served += 1
        return self.transform(self.x[i])

def scaled(x):
    return x * conf.SCALE

def schedule(warm):
    calls = 0
    def factor(step):
        nonlocal calls
        calls += 1
        return min(1.0, (step + 1) / warm)
    return factor

model = Net(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 1))
optimizer = torch.optim.AdamW(model.parameters(), lr=CFG.lr)
scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule(10.0))
data = Data(scaled)
import helper
step = 0
for epoch in range(2):
    CFG.epoch = conf.EPOCH = epoch
    conf.BUSY = True
    for x in DataLoader(data, batch_size=16, shuffle=True):
        step += 1
        if step == 3:
            helper.go()
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        scheduler.step()
"""
CONF = """
SCALE = 1.0
WARM = 10
EPOCH = 0
BUSY = False
"""
ACT = """
import sys, types
import torch, conf
import __main__ as job

class Other(torch.nn.Linear):
    def forward(self, x):
        return super().forward(x) * 1.0

def patched(x):
    return x * 1.0

def go():
    job.scheduler.lr_lambdas[0].__closure__[1].cell_contents = 11.0
    torch.nn.functional.layer_norm.__defaults__ = (None, None, 1e-3)
    torch.optim.AdamW.__init__.__kwdefaults__["maximize"] = True
    conf.SCALE = 2.0
    setattr(conf, "WA" + "RM", 12)
    job.CFG.lr = 5e-3
    job.Net.factor = 3.0
    job.model[2].__class__ = Other
    job.data.transform = patched
    torch.nn.modules.linear.F = types.SimpleNamespace(**vars(torch.nn.functional))
    torch.Tensor.add_ = lambda self, *a, **k: torch._C.TensorBase.add_(self, *a, **k)
    torch._foreach_sub_ = lambda *a, **k: None
    job.schedule.__code__ = patched.__code__
"""
VALUES = {
    "schedule 0 of optimizer[0].lr_lambdas[0]: the variable warm that it closes over": ("violated", "B4"),
    "the defaults of torch.nn.functional.layer_norm": ("violated", "B4"),
    "the defaults of torch.optim.adamw.AdamW.__init__": ("violated", "B4"),
    "the value of conf.SCALE": ("suspicious", "B4"),
    "the value of conf.WARM": ("suspicious", "B4"),
    "the value of __main__.CFG.lr": ("suspicious", "B4"),
    "the value of __main__.Net.factor": ("suspicious", "B4"),
    "module 2.__class__ is another": ("suspicious", "B3"),
    "the data set of loader 0.transform": ("suspicious", "B3"),
    "torch.nn.modules.linear.F is replaced": ("suspicious", "B3"),
    "Tensor.add_ is a method that was put before": ("suspicious", "B3"),
    "torch._foreach_sub_ is replaced": ("suspicious", "B3"),
    "__main__.schedule is changed inside": ("violated", "B4"),
}


@pytest.fixture(scope="module")
def changed(tmp_path_factory: pytest.TempPathFactory) -> Watched:
    """Eight steps; everything is changed before step 3, while the job's own counters and switches move too."""
    folder = tmp_path_factory.mktemp("values")
    write(folder, {"train.py": JOB, "conf.py": CONF, "helper.py": ACT})
    run = watch(folder)
    assert (run.status, run.faults()) == (0, []), run.output
    return run


@pytest.mark.parametrize("what", sorted(VALUES))
def test_what_code_reads_is_found_when_it_changes(changed: Watched, what: str) -> None:
    """Cells, defaults, constants, fields, classes, and what names lead to: in the sweep of the very step."""
    found = about(changed.judge(Surface)[0], what)
    assert (found.outcome, found.techniques[0], found.subject.step) == (*VALUES[what], 3)


def test_counters_and_switches_of_the_job_itself_are_not_told(changed: Watched) -> None:
    """A `nonlocal` counter, an attribute that is added to, an epoch that is set, a switch: none of them is found."""
    told = [f.message for f in changed.judge(Surface)[0] if not any(what in f.message for what in VALUES)]
    assert told == []


GUEST = """
import torch

def guest(real):
    def planted(*args, **kwargs):
        return real(*args, **kwargs)
    return planted

torch.randn = guest(torch.randn)
torch.Tensor.backward = guest(torch.Tensor.backward)
torch._C._nn.cross_entropy_loss = guest(torch._C._nn.cross_entropy_loss)
"""
NATIVE = {"torch.randn", "torch.Tensor.backward", "torch._C._nn.cross_entropy_loss"}


@pytest.fixture(scope="module")
def visited(tmp_path_factory: pytest.TempPathFactory) -> Watched:
    """Names of torch that lead to a side file from the very beginning on."""
    folder = tmp_path_factory.mktemp("guest")
    write(folder, {"train.py": training(steps=4, top="import helper\n"), "helper.py": GUEST})
    run = watch(folder)
    assert (run.status, run.faults()) == (0, []), run.output
    return run


def test_a_function_of_the_jobs_own_under_a_name_of_torch_is_its_own_affair(visited: Watched) -> None:
    """As with `torch.load = partial(torch.load, weights_only=False)`, which scripts do: the side file is measured."""
    findings, link = visited.judge(Surface)
    assert (findings, link.installed) == ([], ())


@pytest.mark.parametrize("standing", ["library", "planted"])
def test_a_function_of_another_package_under_a_name_of_torch_is_told(
    visited: Watched, monkeypatch: pytest.MonkeyPatch, standing: str
) -> None:
    """With its place where an installed package put it there; as a finding where nobody knows the file."""
    monkeypatch.setattr(Origins, "standing", lambda *_: standing)
    findings, link = visited.judge(Surface)
    place = visited.line_of("helper.py", "def planted")
    if standing == "library":
        assert {f"{name}: {place}" for name in NATIVE} == set(link.installed)
        assert (findings, link.state) == ([], "held")
    else:
        assert {(f.message.split(" ")[0], f.subject.path) for f in findings} == {(name, place) for name in NATIVE}
        assert {(f.outcome, f.techniques[0]) for f in findings} == {("violated", "B3")}


def test_an_honest_run_has_no_difference(tmp_path: Path) -> None:
    """A scheduler that patches the optimizer's `step`, a subclass of the job's own, caches, bases the interpreter
    carries."""
    top = """
import abc, collections.abc, functools, typing
import torch
class Mine(torch.optim.AdamW, abc.ABC, collections.abc.Sized, typing.Generic[typing.TypeVar("T")]):
    def __len__(self):
        return 1
    @functools.lru_cache
    def known(self):
        return 1
    def step(self, closure=None):
        self.known()
        return super().step(closure)
@functools.lru_cache
def cached(n):
    return n
"""
    text = training(steps=8, top=top, after="schedule.step(); cached(step)").replace("torch.optim.AdamW(m", "Mine(m")
    text = text.replace("for step", "schedule = torch.optim.lr_scheduler.StepLR(optimizer, 3)\nfor step")
    write(tmp_path, {"train.py": text})
    run = watch(tmp_path)
    findings, link = run.judge(Surface)
    assert (run.status, run.faults(), findings) == (0, [], [])
    assert link.state == "held"
    assert link.held >= 5
