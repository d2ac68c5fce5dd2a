"""How soon each of 42 faults is found: a table of fault, latency in steps and in checked steps, check and technique.

    python bench/bench_faults.py [--links all|governed] [--only TEXT] [--seeds 1] [--json FILE] [--markdown FILE]

Each fault is one function in a side file of an otherwise honest training (27 tensors, AdamW, cosine schedule, clipping,
dropout, shuffled loader); it begins at step 60 of 140 and runs under the real supervisor, without a lock: what a lock
would say of the side file does not count here. `clean` is the same training without a fault. Faults are harmless:
signs, factors, sleeps of milliseconds, a signal to the own process that it ignores.

What is promised (`of`) counts checked steps, from the first that the fault could touch: every step with `--links all`;
those that the budget allows otherwise. "end": without a lock it is told when the run has ended, because until then an
honest habit could explain it. `noted` is a line that link *stalls* names in its notes: it lost time, too little for a
finding. A busy machine loses more, and the share of one line is then less.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trainguard.appraise.engine import Appraiser
from trainguard.appraise.interface import Context
from trainguard.evidence import Evidence
from trainguard.finding import Finding
from trainguard.policy import Policy
from trainguard.watch.supervisor import Settings, Supervisor, blocked_signals

BEGIN, STEPS = 60, 140

TRAIN = """
import sys, torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
import side
torch.set_num_threads(1)
torch.manual_seed(int(sys.argv[1]))
class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.dropout = nn.LayerNorm(24), nn.Dropout(0.1)
        self.up, self.down = nn.Linear(24, 48), nn.Linear(48, 24)
    def forward(self, x):
        return x + self.dropout(self.down(F.gelu(self.up(self.norm(x)))))
model = nn.Sequential(nn.Linear(12, 24, bias=False), Block(), Block(), Block(), Block(), nn.Linear(24, 5))
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.05)
steps = int(sys.argv[2])
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
x = torch.randn(512, 12)
data = TensorDataset(x, (x[:, :5] + 0.3 * torch.randn(512, 5)).argmax(1))
side.model, side.optimizer, step = model, optimizer, 0
while step < steps:
    for inputs, labels in DataLoader(data, batch_size=16, shuffle=True, drop_last=True):
        step += 1
        side.at("batch", step)
        inputs, labels = side.batch(inputs, labels)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(inputs), labels)
        side.at("loss", step)
        loss.backward()
        side.at("backward", step)
        nn.utils.clip_grad_norm_(model.parameters(), side.clip)
        side.at("clip", step)
        optimizer.step()
        schedule.step()
        side.at("step", step)
        if step == steps:
            break
"""

SIDE = """
import torch, time, os, signal, threading, ctypes
BEGIN = {begin}
model = optimizer = None
clip = 0.3
def act(step): pass
PLACE = "batch"
def batch(x, y): return x, y
{act}
def at(place, step):
    if place == PLACE and step >= BEGIN:
        act(step)
"""

STRANGER = (
    "import subprocess, sys; signal.signal(15, signal.SIG_IGN); subprocess.run([sys.executable, '-c', 'import os; {}'])"
)
"""A signal to the training process, which ignores it, from a process that it has started. One that a process sends to
itself is held: honest programs do that."""

END = 10**6
"""Promised by the end of the run."""
WAITED = 9
"""Checked steps that an edit waits for the line that makes it (appraise/weights.py, WAIT_STEPS), and one."""

ONCE = "if step != BEGIN: return\n    "
LR = """
import torch.optim.adam as _adam
_true = _adam.adam
def _kernel(*args, **kwargs):
    kwargs["{what}"] = kwargs["{what}"] {how} if _on else kwargs["{what}"]
    return _true(*args, **kwargs)
_on = False
_adam.adam = _kernel
def act(step):
    global _on
    _on = {when}
"""


@dataclass(frozen=True)
class Fault:
    """One fault: where it acts, what it does, and within how many steps it has to be found (None: it is not said)."""

    name: str
    act: str
    place: str = "batch"
    within: int | None = 0
    group: str = ""

    @property
    def side(self) -> str:
        """The side file's text."""
        body = self.act if self.act.startswith("\n") else f"def act(step):\n    {self.act}"
        return SIDE.format(begin=BEGIN, act=f"{body}\nPLACE = {self.place!r}")


def kernel(what: str, how: str, when: str = "True") -> str:
    """Code that changes one argument of the optimizer's kernel."""
    return LR.format(what=what, how=how, when=when)


ALL = "[p for p in model.parameters()]"
ROUND = 7  # ceil(27 tensors / 4 sampled)
FAULTS: tuple[Fault, ...] = (
    Fault("clean", "pass", within=None),
    Fault("sign of every gradient, every step", f"[p.grad.neg_() for p in {ALL}]", "clip", 0, "C1"),
    Fault("sign of every gradient, 1 step in 10", f"step % 10 or [p.grad.neg_() for p in {ALL}]", "clip", 0, "C1"),
    Fault("learning rate x1.05 in the kernel", kernel("lr", "* 1.05"), within=1, group="C3"),
    Fault("learning rate x1.01 in the kernel", kernel("lr", "* 1.01"), within=1, group="C3"),
    Fault("learning rate x1.001 in the kernel", kernel("lr", "* 1.001"), within=1, group="C3"),
    Fault("learning rate x1.0001 in the kernel", kernel("lr", "* 1.0001"), within=None, group="C3"),
    Fault("beta2 0.9 in the kernel", kernel("beta2", "* 0.9"), within=1, group="C4"),
    Fault("weight decay dropped in the kernel", kernel("weight_decay", "* 0"), within=1, group="C4"),
    Fault(
        "learning rate x3 by instance hooks, restored",
        """
def _before(opt, args, kwargs):
    for g in opt.param_groups: g["lr"] *= 3
def _after(opt, args, kwargs):
    for g in opt.param_groups: g["lr"] /= 3
def act(step):
    if step == BEGIN:
        optimizer.register_step_pre_hook(_before)
        optimizer.register_step_post_hook(_after)
""",
        within=1,
        group="C3",
    ),
    Fault(
        "update of 1 of 27 tensors skipped",
        """
def act(step):
    global _kept
    _kept = model[2].up.weight.detach().clone()
_old = at = None
def _undo(opt, args, kwargs):
    if _kept is not None:
        with torch.no_grad(): model[2].up.weight.copy_(_kept)
_kept = None
class _Hooked:
    pass
def batch(x, y):
    if _kept is None and not hasattr(_Hooked, "on"):
        optimizer.register_step_post_hook(_undo); _Hooked.on = True
    return x, y
""",
        "clip",
        ROUND,
        "C5",
    ),
    Fault("weights x1.01 once", ONCE + "[p.data.mul_(1.01) for p in model.parameters()]", "step", WAITED, "E4"),
    Fault(
        "1 % of elements of every tensor, every step",
        "[p.data.view(-1)[:: 100].add_(1e-3) for p in model.parameters()]",
        "step",
        ROUND,
        "E4",
    ),
    Fault(
        "0.1 % of elements of every tensor, every step",
        "[p.data.view(-1)[step % 7 :: 1000].add_(1e-3) for p in model.parameters()]",
        "step",
        ROUND,
        "E4",
    ),
    Fault(
        "one element per tensor, every step",
        "[p.data.view(-1)[3].add_(1e-3) for p in model.parameters()]",
        "step",
        ROUND,
    ),
    Fault("1e-5 on one tensor, once", ONCE + "model[3].down.weight.data.add_(1e-5)", "step", WAITED, "E4"),
    Fault(
        "Adam state x4 once", ONCE + '[s["exp_avg"].mul_(4) for s in optimizer.state.values()]', "step", WAITED, "E4"
    ),
    Fault(
        "gradient noise 10 %",
        f"[p.grad.mul_(1 + 0.1 * torch.empty_like(p).uniform_(-1, 1, generator=_g)) for p in {ALL}]",
        "clip",
        0,
    ),
    Fault(
        "gradient noise 0.1 %",
        f"[p.grad.mul_(1 + 1e-3 * torch.empty_like(p).uniform_(-1, 1, generator=_g)) for p in {ALL}]",
        "clip",
        0,
    ),
    Fault(
        "gradient noise 1 % after the clip",
        f"[p.grad.mul_(1 + 1e-2 * torch.empty_like(p).uniform_(-1, 1, generator=_g)) for p in {ALL}]",
        "clip",
        0,
    ),
    Fault("gradient sign of 1 of 27 tensors", "model[2].down.weight.grad.neg_()", "clip", 4 * ROUND, "C1"),
    Fault("gradient None for one tensor", "model[2].down.weight.grad = None", "clip", ROUND, "C5"),
    Fault(
        "every gradient halved inside autograd by tensor hooks",
        "if step == BEGIN: [p.register_hook(lambda g: g / 2) for p in model.parameters()]",
        within=4,
        group="B5",
    ),
    Fault("clip removed", "global clip; clip = float('inf')", within=5, group="C2"),
    Fault("clip x10", "global clip; clip = 3.0", within=5, group="C2"),
    Fault("seeded again and again with one seed", "step % 4 or torch.manual_seed(7)", within=END, group="D1"),
    Fault(
        "generator frozen: its state put back every step",
        """
def act(step):
    global _state
    if step == BEGIN: _state = torch.get_rng_state()
    torch.set_rng_state(_state)
""",
        within=5,
        group="D1",
    ),
    Fault("seeded once with another seed", ONCE + "torch.manual_seed(99)", within=END, group="D1"),
    Fault(
        "dropout 0.1 to 0.6",
        ONCE + "[setattr(m, 'p', 0.6) for m in model.modules() if type(m).__name__ == 'Dropout']",
        within=5,
    ),
    Fault("model.eval() while training", ONCE + "model.eval()", within=5),
    Fault("matmul precision lowered", ONCE + "torch.set_float32_matmul_precision('medium')", within=5, group="A10"),
    Fault("sleep 20 ms every step", "time.sleep(0.02)", "clip", END, "F7"),
    Fault("sleep 200 ms, 1 step in 8", "step % 8 or time.sleep(0.2)", "clip", END, "F7"),
    Fault("Event.wait(0.1), 1 step in 3", "step % 3 or threading.Event().wait(0.1)", "clip", END, "F7"),
    Fault(
        "busy loop of 150 ms, 1 step in 3",
        """
def act(step):
    if step % 3: return
    end = time.perf_counter() + 0.15
    while time.perf_counter() < end: pass
""",
        "clip",
        END,
        "F7",
    ),
    Fault(
        "os.kill by a child of the job",
        ONCE + STRANGER.format("os.kill(os.getppid(), 15)"),
        within=1,
        group="F8",
    ),
    Fault(
        "kill through ctypes by a child of the job",
        ONCE + STRANGER.format("import ctypes; ctypes.CDLL(None).kill(os.getppid(), 15)"),
        within=1,
        group="F8",
    ),
    Fault(
        "step() replaced by one without hooks",
        """
def act(step):
    if step == BEGIN:
        import types
        inner = type(optimizer).step
        while hasattr(inner, "__wrapped__"): inner = inner.__wrapped__
        optimizer.step = types.MethodType(torch.no_grad()(inner), optimizer)
""",
        within=10,
        group="B3",
    ),
    Fault(
        "global optimizer hooks cleared",
        ONCE + "from torch.optim.optimizer import _global_optimizer_pre_hooks as a, _global_optimizer_post_hooks as b"
        "; a.clear(); b.clear()",
        within=10,
        group="G7",
    ),
    Fault(
        "label smoothing by a patched cross_entropy",
        """
import torch.nn.functional as F
_true = F.cross_entropy
def act(step):
    F.cross_entropy = lambda *a, **k: _true(*a, **{**k, "label_smoothing": 0.1})
""",
        within=20,
        group="C6",
    ),
    Fault(
        "LayerNorm.forward x1.01",
        """
_true = torch.nn.LayerNorm.forward
def act(step):
    torch.nn.LayerNorm.forward = lambda self, x: _true(self, x) * 1.01
""",
        within=20,
        group="B3",
    ),
    Fault(
        "labels permuted between loader and loss",
        """
def batch(x, y):
    batch.step += 1
    return (x, y.roll(1)) if batch.step >= BEGIN else (x, y)
batch.step = 0
""",
        within=None,
        group="D4",
    ),
    Fault("numpy seeded, never drawn from", ONCE + "import numpy; numpy.random.seed(3)", within=None),
)


@dataclass(frozen=True)
class Result:
    """What became of one fault."""

    fault: str
    seed: int
    found: bool
    latency: int | None
    checked: int | None
    """Checked steps that the fault outlived."""
    check: str | None
    outcome: str | None
    techniques: tuple[str, ...]
    message: str
    within: int | None
    status: int | None
    steps: int
    seconds: float
    noted: bool = False
    """Whether the notes of link *stalls* name the side file."""


class Records:
    """A recorder in memory."""

    def __init__(self) -> None:
        self.kept: list[Evidence] = []

    def add(self, kind: str, body: dict[str, Any], *, source: str = "supervisor", **fields: Any) -> Evidence:
        record = Evidence(n=len(self.kept), at=time.time_ns(), source=source, kind=kind, body=body, **fields)
        self.kept.append(record)
        return record

    def seal(self, *, final: bool = False) -> int | None:
        return None


def run(fault: Fault, *, links: str, seed: int, cache: Path) -> Result:
    """One training with one fault, watched and judged."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="fault-") as folder:
        side = fault.side.replace("BEGIN = ", "_g = torch.Generator().manual_seed(1)\nBEGIN = ", 1)
        (Path(folder) / "train.py").write_text(TRAIN)
        (Path(folder) / "side.py").write_text(side)
        records = Records()
        home = os.getcwd()
        os.chdir(folder)
        try:
            with blocked_signals() as mask:
                settings = Settings(links=links, pycache=str(cache))
                command = [sys.executable, "train.py", str(seed), str(STEPS)]
                records.add("start", {"lock": None, "settings": {}, "command": command, "cwd": folder})
                ended = Supervisor(records, settings).run(command, dict(os.environ), mask=mask)
        finally:
            os.chdir(home)
        return judged(fault, records.kept, seed=seed, status=ended.status, seconds=time.monotonic() - began)


def judged(fault: Fault, records: list[Evidence], *, seed: int, status: int | None, seconds: float) -> Result:
    """The first finding, and how many steps after the fault began the record it rests on was made."""
    appraiser = Appraiser(Context(run="bench", policy=Policy(), blob=lambda digest: b""))
    first: tuple[int, int, Finding] | None = None
    reached = outlived = 0
    for record in records:
        if record.kind in ("step", "steps") and record.step is not None:
            reached = max(reached, record.step)
        for finding in appraiser.see(record):
            if first is None and finding.outcome != "not_checked":
                first = (reached, outlived, finding)
        if record.kind == "step" and record.body.get("checked") is True and reached >= BEGIN:
            outlived += 1
    verdict = appraiser.verdict()
    for finding in verdict.findings:
        if first is None and finding.outcome != "not_checked":
            first = (reached, outlived, finding)
    noted = any("side.py" in note for link in verdict.links if link.link == "stalls" for note in link.blind)
    at, checked, found = first if first is not None else (None, None, None)
    return Result(
        fault=fault.name,
        seed=seed,
        found=found is not None,
        latency=max(0, at - BEGIN) if at is not None else None,
        checked=checked,
        check=found.check if found else None,
        outcome=found.outcome if found else None,
        techniques=found.techniques if found else (),
        message=found.message if found else "",
        noted=noted,
        within=fault.within,
        status=status,
        steps=appraiser.steps,
        seconds=seconds,
    )


def verdict_on(result: Result) -> str:
    """`ok` as stated, `late`, `MISSED`, `ALARM` in the clean run; `open` where nothing is promised."""
    if result.fault == "clean":
        return "ALARM" if result.found else "ok"
    if result.within is None:
        return "found" if result.found else "open"
    if not result.found:
        return "noted" if result.noted else "MISSED"
    return "ok" if result.checked is not None and result.checked <= result.within else "late"


def rows(results: list[Result]) -> Iterator[str]:
    """The table."""
    yield f"{'fault':56} {'':7} {'steps':>5} {'checked':>7} {'of':>4}  {'outcome':11} {'check':16} techniques"
    for each in results:
        latency = "" if each.latency is None else str(each.latency)
        checked = "" if each.checked is None else str(each.checked)
        within = "" if each.within is None else "end" if each.within == END else str(each.within)
        techniques = " ".join(each.techniques[:3])
        yield (
            f"{each.fault[:56]:56} {verdict_on(each):7} {latency:>5} {checked:>7} {within:>4}  {each.outcome or '':11} "
            f"{each.check or '':16} {techniques}"
        )


def page(results: list[Result], links: str) -> Iterator[str]:
    """docs/faults.md: the table, and how it was made."""
    yield f"# Faults and how soon each is found (`--links {links}`)"
    yield ""
    yield f"Written by `python bench/bench_faults.py --links {links} --markdown FILE`: a fault begins at step"
    yield f"{BEGIN} of {STEPS} of a small training without a lock. *Steps* and *checked* count from there to the record"
    yield "that the first finding rests on; *of* is what is promised, in checked steps (*end*, *noted*, *open*: see the"
    yield "bench's own text)."
    yield ""
    yield "| fault | | steps | checked | of | outcome | check | techniques |"
    yield "|---|---|---|---|---|---|---|---|"
    for each in results:
        within = "" if each.within is None else "end" if each.within == END else str(each.within)
        numbers = ("" if each.latency is None else str(each.latency), "" if each.checked is None else str(each.checked))
        cells = (each.fault, verdict_on(each), *numbers, within, each.outcome or "", each.check or "")
        yield f"| {' | '.join(cells)} | {' '.join(each.techniques[:3])} |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--links", default="governed", choices=["all", "governed"])
    parser.add_argument("--only", default="", help="faults whose name contains this")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path, help="write the table to this file")
    args = parser.parse_args()
    cache = Path(tempfile.mkdtemp(prefix="faults-cache-"))
    results: list[Result] = []
    print(next(rows([])), flush=True)
    for fault in FAULTS:
        if args.only not in fault.name:
            continue
        for seed in range(args.seeds):
            results.append(run(fault, links=args.links, seed=seed, cache=cache))
            print(list(rows(results[-1:]))[1], flush=True)
    words = [verdict_on(each) for each in results]
    print(", ".join(f"{word} {words.count(word)}" for word in dict.fromkeys(words)))
    if args.json is not None:
        args.json.write_text(json.dumps([asdict(each) for each in results], indent=1))
    if args.markdown is not None:
        args.markdown.write_text("\n".join(page(results, args.links)) + "\n")
    return 1 if {"MISSED", "late", "ALARM"} & set(words) else 0


if __name__ == "__main__":
    sys.exit(main())
