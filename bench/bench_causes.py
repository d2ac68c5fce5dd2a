"""Which causes an audit names: faults planted in four unmodified scripts, every in-process check off, audit only.

    python bench/bench_causes.py [--script NAME] [--fault TEXT] [--kept FILE.jsonl] [--seed 0] [--minutes 60]
    python bench/bench_causes.py --kept FILE.jsonl --markdown docs/causes.md --minutes 0

Cases are taken by lot (--seed), those first whose fault has the fewest cases yet, and each result is added to --kept at
once: the same call again goes on with the cases that are not there yet, and --minutes stops it early.

Each case is a run of a script from tests/scripts under `trainguard run --links none`, with a start-up file of an
insider on PYTHONPATH that does one thing at optimizer step 8 of 12, and then `trainguard audit --segments all` in an
environment without that file. Shown per case: whether the first bad step is exact, what cause was named, with which
confidence, and whether that is right (its kind is the fault's, and where the fault has a number, the number).

The insider's file only patches torch and the loader from outside and knows nothing of the audit; the audit knows
nothing of the file. Faults are harmless: factors, signs, seeds, on the run's own numbers. Clean runs of the same
scripts are part of the table: they must be equal.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

AT, STEPS = 8, 12
SCRIPTS = Path(__file__).parents[1] / "tests" / "scripts"
ARGUMENTS = {
    "own_batch_gpt": ["--steps", str(STEPS), "--out", "out"],
    "cnn_workers": ["--steps", str(STEPS)],
    "accum_amp": ["--steps", str(STEPS)],
    "hf_trainer": ["--steps", str(STEPS), "--out", "out"],
}
TEXT = ("own_batch_gpt", "hf_trainer")
ADAM = ("own_batch_gpt", "accum_amp", "hf_trainer")
CLIPPED = ("own_batch_gpt", "accum_amp", "hf_trainer")
LOADED = ("cnn_workers", "hf_trainer")
EVERY = tuple(ARGUMENTS)

INSIDER = """
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
            import insider
            insider.arm(module)
        spec.loader.exec_module = exec_module
        return spec
sys.meta_path.insert(0, Finder())
"""

COMMON = """
import os, sys
AT = {at}
made = 0          # updates so far
optimizer = None
def now():
    return made == AT - 1
def params():
    return [p for g in optimizer.param_groups for p in g["params"]]
def biggest():
    return max(params(), key=lambda p: p.numel())
def arm(torch):
    global T, F, K
    T, F = torch, torch.nn.functional
    K = sys.modules["torch.optim.optimizer"]
    K.register_optimizer_step_post_hook(count)
    {setup}
def count(o, a, k):
    global made, optimizer
    optimizer = o
    made += 1
    if made == AT - 1:
        with T.no_grad():
            between()
    if made == AT:
        with T.no_grad():
            after()
def between(): pass
def after(): pass
def before_update(act):
    def hook(o, a, k):
        if now():
            with T.no_grad():
                act(o)
    K.register_optimizer_step_pre_hook(hook)
def after_update(act):
    def hook(o, a, k):
        if now():
            with T.no_grad():
                act(o)
    K.register_optimizer_step_post_hook(hook)
    K._global_optimizer_post_hooks.move_to_end(next(reversed(K._global_optimizer_post_hooks)), last=False)
def kernel(change):
    import torch.optim.adam as adam, torch.optim.sgd as sgd
    for module, name in ((adam, "adam"), (sgd, "sgd")):
        plain = getattr(module, name)
        def other(*args, plain=plain, **kwargs):
            if now():
                change(kwargs)
            return plain(*args, **kwargs)
        setattr(module, name, other)
def nothing(change=None):
    import torch.optim.adam as adam, torch.optim.sgd as sgd
    for module, name in ((adam, "adam"), (sgd, "sgd")):
        plain = getattr(module, name)
        setattr(module, name, lambda *a, plain=plain, **k: None if now() else plain(*a, **k))
def twice():
    import torch.optim.adam as adam, torch.optim.sgd as sgd
    for module, name in ((adam, "adam"), (sgd, "sgd")):
        plain = getattr(module, name)
        setattr(module, name, lambda *a, plain=plain, **k: (plain(*a, **k), plain(*a, **k) if now() else None))
def cross(change):
    plain = F.cross_entropy
    def cross_entropy(x, y, *a, **k):
        if now() and T.is_grad_enabled():
            return change(plain, x, y, a, k)
        return plain(x, y, *a, **k)
    F.cross_entropy = cross_entropy
def backward(change):
    plain = T.Tensor.backward
    def other(self, *a, **k):
        if now():
            return change(plain, self, a, k)
        return plain(self, *a, **k)
    T.Tensor.backward = other
def starts(change):
    plain, last = T.randint, []
    def randint(*a, **k):
        found = plain(*a, **k)
        if T.is_grad_enabled() and found.dim() == 1:
            last.append(found)
            if len(last) in ((AT - 1) * PER_STEP + 1, AT * PER_STEP) or now_drawing(len(last)):
                return change(plain, last, a, k)
        return found
    T.randint = randint
def loader(change):
    from torch.utils.data import DataLoader
    plain = DataLoader.__iter__
    def __iter__(self):
        kept = None
        for batch in plain(self):
            if self.dataset is not None and due(self):
                out = change(kept, batch)
                if out is None:
                    continue
                kept, batch = batch, out
            else:
                kept = batch
            yield batch
    DataLoader.__iter__ = __iter__
seen = {{}}
def due(which):
    if not T.is_grad_enabled():
        return False
    key = id(which)
    seen[key] = seen.get(key, 0) + 1
    return seen[key] in WHICH
WHICH = {which}
{more}
"""


@dataclass(frozen=True)
class Fault:
    """One fault: what the insider writes, and which cause is right."""

    name: str
    kinds: tuple[str, ...]
    """Kinds that are right; several where the bytes cannot tell them apart."""
    setup: str = "pass"
    more: str = ""
    scripts: tuple[str, ...] = EVERY
    value: float | None = None
    """The number, where a cause must name it (relative to the script's own where below)."""


GRADS = "[p.grad for p in params() if p.grad is not None]"


def pre(code: str) -> str:
    """Code right before the update."""
    return f"before_update(lambda o: ({code}))"


def after_backward(code: str) -> str:
    """Code after each backward pass."""
    return f"backward(lambda f, t, a, k: (f(t, *a, **k), {code}))"


FAULTS: tuple[Fault, ...] = (
    Fault("clean", ()),
    Fault(
        "lr x1.3 shown",
        ("learning rate",),
        "\n    ".join(
            (
                pre("[g.__setitem__('lr', g['lr'] * 1.3) for g in o.param_groups]"),
                "after_update(lambda o: [g.__setitem__('lr', g['lr'] / 1.3) for g in o.param_groups])",
            )
        ),
    ),
    Fault(
        "lr x1.05 in the kernel",
        ("learning rate",),
        "kernel(lambda k: k.__setitem__('lr', k['lr'] * 1.05))",
        value=1.05,
    ),
    Fault(
        "beta1 0.8 in the kernel", ("beta1",), "kernel(lambda k: k.__setitem__('beta1', 0.8))", scripts=ADAM, value=0.8
    ),
    Fault(
        "beta2 0.9 in the kernel", ("beta2",), "kernel(lambda k: k.__setitem__('beta2', 0.9))", scripts=ADAM, value=0.9
    ),
    Fault("eps 1e-5 in the kernel", ("eps",), "kernel(lambda k: k.__setitem__('eps', 1e-5))", scripts=ADAM, value=1e-5),
    Fault(
        "momentum 0.7 in the kernel",
        ("momentum",),
        "kernel(lambda k: k.__setitem__('momentum', 0.7))",
        scripts=("cnn_workers",),
        value=0.7,
    ),
    Fault(
        "nesterov off in the kernel",
        ("nesterov",),
        "kernel(lambda k: k.__setitem__('nesterov', False))",
        scripts=("cnn_workers",),
    ),
    Fault(
        "weight decay 0.03 in the kernel",
        ("weight decay",),
        "kernel(lambda k: k.__setitem__('weight_decay', 0.03))",
        scripts=("cnn_workers", "accum_amp"),
        value=0.03,
    ),
    Fault(
        "weight decay x5 in the kernel",
        ("weight decay",),
        "kernel(lambda k: k.__setitem__('weight_decay', k['weight_decay'] * 5))",
        scripts=TEXT,
    ),
    Fault("maximize in the kernel", ("maximize", "gradient sign"), "kernel(lambda k: k.__setitem__('maximize', True))"),
    Fault(
        "gradient sign after each backward",
        ("gradient sign",),
        after_backward("[g.neg_() for g in GRADS()]"),
        "def GRADS(): return " + GRADS,
    ),
    Fault(
        "gradient x1.7 after each backward",
        ("gradient scaled", "loss scaled"),
        after_backward("[g.mul_(1.7) for g in GRADS()]"),
        "def GRADS(): return " + GRADS,
    ),
    Fault(
        "gradient of one tensor zeroed",
        ("gradient zeroed", "parameter frozen"),
        "backward(lambda f, t, a, k: (f(t, *a, **k), biggest().grad.zero_()))",
    ),
    Fault(
        "gradient rounded to bfloat16",
        ("gradient rounded",),
        after_backward("[g.copy_(g.bfloat16()) for g in GRADS()]"),
        "def GRADS(): return " + GRADS,
    ),
    Fault(
        "noise 0.01 on gradients",
        ("noise on gradient",),
        after_backward("[g.add_(T.randn_like(g) * 0.01) for g in GRADS()]"),
        "def GRADS(): return " + GRADS,
        scripts=("cnn_workers",),
    ),
    Fault(
        "clipping left out",
        ("clip",),
        "clip(lambda p, n, *a, **k: plain_clip(p, 1e9, *a, **k))",
        "CLIP",
        scripts=CLIPPED,
    ),
    Fault(
        "clipping limit x0.3",
        ("clip",),
        "clip(lambda p, n, *a, **k: plain_clip(p, n * 0.3, *a, **k))",
        "CLIP",
        scripts=CLIPPED,
    ),
    Fault("batch repeated", ("batch repeated",), "REPEAT"),
    Fault("batch skipped", ("batch skipped", "extra draws"), "SKIP"),
    Fault("rows of the batch reversed", ("batch reordered",), "REVERSE"),
    Fault("labels moved on by one row", ("labels permuted",), "cross(lambda f, x, y, a, k: f(x, y.roll(1), *a, **k))"),
    Fault(
        "one label changed",
        ("one label changed",),
        "cross(lambda f, x, y, a, k: f(x, other(y), *a, **k))",
        "def other(y):\n    y = y.clone(); y[5] = (y[5] + 1) % 3; return y",
        scripts=("cnn_workers", "accum_amp"),
    ),
    Fault(
        "label smoothing 0.2",
        ("label smoothing",),
        "cross(lambda f, x, y, a, k: f(x, y, *a, **dict(k, label_smoothing=0.2)))",
        value=0.2,
    ),
    Fault(
        "loss x1.5",
        ("loss scaled", "gradient scaled"),
        "cross(lambda f, x, y, a, k: f(x, y, *a, **k) * 1.5)",
        value=1.5,
    ),
    Fault(
        "dropout rate 0.4 in the modules",
        ("rate of modules",),
        more="def between():\n    for m in dropouts(): m.p = 0.4",
    ),
    Fault(
        "dropout left out, unseen",
        ("dropout", "mode"),
        "plain = F.dropout\n    F.dropout = lambda x, *a, **k: x if now() else plain(x, *a, **k)",
    ),
    Fault(
        "evaluation mode",
        ("mode",),
        more="""
def between():
    for m in models(): m.eval()
    plain = T.nn.Module.train
    T.nn.Module.train = lambda m, mode=True: m if now() else plain(m, mode)""",
    ),
    Fault("reseed with 1234", ("reseed",), more="def between():\n    T.manual_seed(1234)"),
    Fault("1000 extra draws", ("extra draws",), more="def between():\n    T.rand(1000)"),
    Fault("one weight +0.05", ("one weight edited",), more="def between():\n    biggest().view(-1)[77] += 0.05"),
    Fault("one tensor x1.01", ("weights scaled",), more="def between():\n    biggest().mul_(1.01)"),
    Fault(
        "rows of a tensor turned round",
        ("weights edited", "weights permuted"),
        more="def between():\n    biggest().copy_(biggest().flip(0))",
    ),
    Fault(
        "noise 0.02 on all weights",
        ("noise on weights",),
        more="def between():\n    for p in params(): p.add_(T.randn_like(p) * 0.02)",
    ),
    Fault(
        "optimizer state zeroed",
        ("optimizer state zeroed", "optimizer state reset", "momentum", "beta1"),
        more="""
def between():
    for held in optimizer.state.values():
        for key in ("exp_avg", "momentum_buffer"):
            if held.get(key) is not None: held[key].zero_()""",
    ),
    Fault(
        "optimizer state x0.5",
        ("optimizer state scaled", "momentum", "beta1"),
        more="""
def between():
    for held in optimizer.state.values():
        for key in ("exp_avg", "momentum_buffer"):
            if held.get(key) is not None: held[key].mul_(0.5)""",
    ),
    Fault("update left out", ("update skipped",), "nothing()", scripts=("own_batch_gpt", "cnn_workers", "hf_trainer")),
    Fault("update made twice", ("update repeated",), "twice()", scripts=("cnn_workers",)),
    Fault(
        "one tensor not updated",
        ("update skipped",),
        "keep = {}\n    "
        + pre("keep.update(w=params()[0].clone())")
        + "\n    after_update(lambda o: params()[0].copy_(keep['w']))",
    ),
    Fault(
        "parameter frozen",
        ("parameter frozen", "gradient zeroed"),
        more="def between():\n    params()[0].requires_grad_(False)\n"
        "def after():\n    params()[0].requires_grad_(True)",
    ),
    Fault("forward in bfloat16", ("precision",), "BF16", scripts=("own_batch_gpt", "cnn_workers", "hf_trainer")),
)

CLIP = """
def clip(other):
    import torch.nn.utils as utils
    global plain_clip
    plain_clip = utils.clip_grad_norm_
    def clip_grad_norm_(*a, **k):
        if "max_norm" in k:
            a = (*a, k.pop("max_norm"))
        return other(*a, **k) if now() else plain_clip(*a, **k)
    utils.clip_grad_norm_ = clip_grad_norm_
"""
MODELS = """
def models():
    import gc
    held = [m for m in gc.get_objects() if isinstance(m, T.nn.Module)]
    return [m for m in held if any(q is params()[0] for q in m.parameters())]
def dropouts():
    return [m for top in models() for m in top.modules() if type(m).__name__ == "Dropout"]
"""
BF16 = """
plain_call = T.nn.Module.__call__
    def call(self, *a, **k):
        if now() and T.is_grad_enabled():
            with T.autocast("cpu", dtype=T.bfloat16):
                return plain_call(self, *a, **k)
        return plain_call(self, *a, **k)
    T.nn.Module.__call__ = call
""".strip()
BATCHES = {
    # delivered batches by number: the ones that step 8 is made from
    "cnn_workers": {"which": "{8}"},
    "hf_trainer": {"which": "{15, 16}"},
}
LOADER = {
    "REPEAT": "loader(lambda kept, batch: kept)",
    "SKIP": "loader(lambda kept, batch: None)",
    "REVERSE": "loader(lambda kept, batch: turned(batch))",
}
TURNED = """
def turned(batch):
    return T.utils._pytree.tree_map(lambda x: x.flip(0), batch)
"""
OWN = {
    # what the script itself draws, for the micro-batches of step 8
    "REPEAT": "draws(lambda last, found: last[-3] if len(last) > 2 else found)",
    "SKIP": "draws(lambda last, found: again())",
    "REVERSE": "draws(lambda last, found: found.flip(0))",
}
DRAWS = """
def draws(change):
    plain, last = T.randint, []
    def randint(*a, **k):
        found = plain(*a, **k)
        if not T.is_grad_enabled():
            return found
        last.append(found)
        global again
        again = lambda: plain(*a, **k)
        return change(last, found) if len(last) in ({first}, {first} + 1) else found
    T.randint = randint
"""


def written(fault: Fault, script: str) -> str:
    """The insider's file for one script."""
    setup, more = fault.setup, fault.more
    more = CLIP if more == "CLIP" else more
    which = "()"
    if setup in LOADER:
        if script in LOADED:
            which = BATCHES[script]["which"]
            setup, more = LOADER[setup], TURNED
        else:
            first = {"own_batch_gpt": 2 * (AT - 1) + 1, "accum_amp": 4 * (AT - 1) + 1}[script]
            setup, more = OWN[setup], DRAWS.format(first=first)
            if script == "accum_amp":
                more = more.replace(f"({first}, {first} + 1)", f"range({first}, {first} + 4)").replace(
                    "last[-3]", "last[-5]"
                )
    setup = BF16 if setup == "BF16" else setup
    return COMMON.format(at=AT, setup=setup, more=more + MODELS, which=which)


@dataclass(frozen=True)
class Case:
    """What came of one fault in one script."""

    script: str
    fault: str
    step: int | None
    exact: bool
    kind: str
    words: str
    confidence: str
    right: bool
    tried: int
    seconds: float
    note: str = ""
    cpu: float = 0.0
    """CPU seconds of recording and audit together; of all cases under way where several are."""
    digest: str = ""
    """Of the final weights, as the script prints it: the same as a clean run's where an act did nothing."""


def trainguard(folder: Path, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("TRAINGUARD_", "PYTHONPATH"))}
    return subprocess.run(
        [sys.executable, "-m", "trainguard", *arguments], cwd=folder, env=kept | {"OMP_NUM_THREADS": "1"} | env,
        capture_output=True, text=True, timeout=1200, check=False,
    )  # fmt: skip


def measure(script: str, fault: Fault, cache: Path) -> Case:
    """Record, audit, compare with what was done."""
    began, used = time.monotonic(), _used()
    with tempfile.TemporaryDirectory(prefix="bench-causes-") as top:
        case = _measured(Path(top), script, fault, cache, began)
    return replace(case, cpu=round(_used() - used, 1))


def _used() -> float:
    """CPU seconds of processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _measured(folder: Path, script: str, fault: Fault, cache: Path, began: float) -> Case:
    try:
        plant = folder / "plant"
        plant.mkdir()
        (plant / "sitecustomize.py").write_text(INSIDER)
        (plant / "insider.py").write_text(written(fault, script))
        work = folder / "work"
        work.mkdir()
        shutil.copy(SCRIPTS / f"{script}.py", work / "train.py")
        (work / "policy.toml").write_text("kills = 'off'\n")
        _share_bytecode(work, cache)
        done = trainguard(
            work, "run", "--name", "r", "--links", "none", "--policy", "policy.toml", "--", sys.executable, "train.py",
            *ARGUMENTS[script], PYTHONPATH=str(plant), TRAINGUARD_CACHE=str(cache),
        )  # fmt: skip
        if done.returncode:
            return _failed(script, fault, began, done.stderr.strip()[-1500:])
        digest = next((line[7:] for line in done.stdout.splitlines()[::-1] if line.startswith("digest ")), "")
        done = trainguard(work, "audit", "r", "--segments", "all", "--json", TRAINGUARD_CACHE=str(cache))
        return replace(_judged(script, fault, work, done, began), digest=digest)
    except (subprocess.TimeoutExpired, OSError) as error:
        return _failed(script, fault, began, str(error)[:300])


def _share_bytecode(work: Path, cache: Path) -> None:
    """A state folder keeps the bytecode of its replays, so that only its first audit compiles torch. Here every case
    has a new state folder: they share one cache, as the audits of one project do."""
    (cache / "replayed").mkdir(mode=0o700, exist_ok=True)
    (work / ".trainguard" / "cache").mkdir(mode=0o700, parents=True)
    (work / ".trainguard").chmod(0o700)
    (work / ".trainguard" / "cache" / "replayed").symlink_to(cache / "replayed")


def _failed(script: str, fault: Fault, began: float, note: str) -> Case:
    return Case(script, fault.name, None, False, "", "", "", False, 0, round(time.monotonic() - began, 1), note)


def _judged(script: str, fault: Fault, work: Path, done: Any, began: float) -> Case:
    reports = sorted((work / ".trainguard" / "audits" / "r").glob("*/report.json"))
    if not reports:
        return _failed(script, fault, began, done.stderr.strip()[-1500:])
    report: dict[str, Any] = json.loads(reports[-1].read_bytes())
    spent = round(time.monotonic() - began, 1)
    bad = next((result for result in report["results"] if result["outcome"] == "differs"), None)
    if bad is None:
        reason = "; ".join(str(r.get("reason")) for r in report["results"] if r.get("reason"))
        equal = all(result["outcome"] == "equal" for result in report["results"])
        clean = fault.name == "clean" and equal
        return Case(script, fault.name, None, clean, "", "equal" if equal else reason, "", clean, 0, spent, reason)
    cause = bad.get("cause") or {}
    step = bad["difference"]["step"]
    right = cause.get("kind") in fault.kinds and cause.get("confidence") != "none"
    if right and fault.value is not None and cause.get("value") is not None:
        right = abs(cause["value"] - fault.value) <= 1e-4 * abs(fault.value)
    note = f"{bad['difference']['link']}; {cause.get('reason', '')}; also: {', '.join(cause.get('alternatives', ()))}"
    return Case(
        script, fault.name, step, _exact(script, fault, step), cause.get("kind", ""), cause.get("words", ""),
        cause.get("confidence", ""), right, cause.get("tried", 0), spent, note,
    )  # fmt: skip


def _exact(script: str, fault: Fault, step: int) -> bool:
    """The step in which the act is: a batch that a script draws one micro-batch ahead is drawn in the step before."""
    ahead = script == "own_batch_gpt" and fault.setup == "SKIP"
    return step == (AT - 1 if ahead else AT)


def effective(cases: list[Case]) -> list[Case]:
    """The acts that did something: a limit that a gradient does not reach can be left out without any effect."""
    clean = {case.script: case.digest for case in cases if case.fault == "clean" and case.digest}
    return [c for c in cases if c.fault != "clean" and (not c.digest or c.digest != clean.get(c.script))]


def table(cases: list[Case]) -> str:
    """The cases as lines, and what they come to."""
    lines = [
        f"{'script':14} {'fault':34} {'step':>4} {'':5} {'right':5} {'confidence':11} {'trials':>6} {'s':>6}  cause"
    ]
    for c in cases:
        lines.append(
            f"{c.script:14} {c.fault:34} {c.step or '-':>4} "
            f"{'exact' if c.exact else '-':5} {'yes' if c.right else 'NO':5} "
            f"{c.confidence or '-':11} {c.tried:>6} {c.seconds:>6}  {c.words or c.note[-300:]}"
        )
    acts = effective(cases)
    if acts:
        exact, right = sum(c.exact for c in acts), sum(c.right for c in acts)
        sure = sum(c.right and c.confidence == "reproduced" for c in acts)
        kinds = len({c.fault for c in acts})
        lines.append(
            f"{len(acts)} cases of {kinds} kinds: first bad step exact in {exact}, cause right in {right} "
            f"({right / len(acts):.0%}), {sure} of them reproduced bit for bit"
        )
    return "\n".join(lines)


def markdown(cases: list[Case], possible: int) -> str:
    """The page: what was done, by fault and script."""
    scripts = [script for script in EVERY if any(c.script == script for c in cases)]
    names = [fault.name for fault in FAULTS if any(c.fault == fault.name for c in cases)]
    known = {(c.fault, c.script): c for c in cases}
    acts = effective(cases)
    exact, right = sum(c.exact for c in acts), sum(c.right for c in acts)
    sure = sum(c.right and c.confidence == "reproduced" for c in acts)
    lines = [
        PAGE.format(
            cases=len(acts),
            possible=possible,
            kinds=len({c.fault for c in acts}),
            scripts=len(scripts),
            exact=exact,
            right=right,
            share=right / max(1, len(acts)),
            sure=sure,
            at=AT,
            steps=STEPS,
            cpu=_middle([c.cpu for c in acts]),
            clean=sum(c.fault == "clean" and c.right for c in cases),
            cleans=sum(c.fault == "clean" for c in cases),
        ),
        "| what was done | " + " | ".join(f"`{script}`" for script in scripts) + " |",
        "|---" * (1 + len(scripts)) + "|",
    ]
    for name in names:
        cells = (_cell(known.get((name, script)), name, acts) for script in scripts)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


PAGE = """# Which causes an audit names

Made by `python bench/bench_causes.py --kept FILE --markdown docs/causes.md`. Each case is one run of an unmodified
script from tests/scripts under `trainguard run --links none` (no check in the process), in which a start-up file of an
insider does one thing at optimizer step {at} of {steps}; then `trainguard audit --segments all` without that file. The
audit knows nothing of the file.

**{cases} of {possible} possible cases, drawn by lot, of {kinds} kinds in {scripts} scripts: first bad step exact in
{exact}, cause right in {right} ({share:.0%}), {sure} of these reproduced bit for bit.** Clean runs equal in every
segment: {clean} of {cleans}. Recording and audit of one case: {cpu:.0f} CPU seconds (median).

A cell has the cause that the audit named. **Bold**: wrong, or none was named; *wrong step*: the first bad step was not
exact; ~: the values fit and no round number gives the bytes (*consistent*); (did nothing): the weights at the end are
those of a clean run, so there is nothing to find, and it is in no sum. Empty: no such fault in that script, or not
drawn.
"""


def _cell(case: Case | None, name: str, acts: list[Case]) -> str:
    if case is None:
        return ""
    if name != "clean" and case not in acts:
        return "(did nothing)"
    if name == "clean":
        return "equal" if case.right else f"**{case.words or case.note[:80]}**"
    words = (case.words or case.note[-80:] or "nothing").replace("|", "/").replace("\n", " ")
    text = words if case.confidence == "reproduced" else f"~ {words}"
    return (text if case.right else f"**{text}**") + ("" if case.exact else " *wrong step*")


def _middle(values: list[float]) -> float:
    return sorted(values)[len(values) // 2] if values else 0.0


def rarest_first(wanted: list[tuple[str, Fault]], known: set[tuple[str, str]], seed: int) -> list[tuple[str, Fault]]:
    """Cases by lot, those first whose fault has the fewest: stopped early, the table has as many kinds as it can."""
    drawn = random.Random(seed).sample(wanted, len(wanted))
    turns = Counter(fault for _, fault in known)
    order = []
    for case in drawn:
        order.append((turns[case[1].name], case))
        turns[case[1].name] += 1
    return [case for _, case in sorted(order, key=lambda each: each[0])]


def kept_cases(path: Path | None) -> list[Case]:
    """What earlier calls left."""
    if path is None or not path.exists():
        return []
    return [Case(**json.loads(line)) for line in path.read_text().splitlines() if line]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--script", choices=EVERY, action="append")
    parser.add_argument("--fault", default="", help="only faults with this in their name")
    parser.add_argument("--kept", type=Path, help="where results are added, and read from")
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=1e9)
    parser.add_argument("--jobs", type=int, default=1)
    options = parser.parse_args()
    cache = Path(tempfile.gettempdir()) / "bench-causes-cache"
    cache.mkdir(mode=0o700, exist_ok=True)
    cases = kept_cases(options.kept)
    known = {(case.script, case.fault) for case in cases}
    everything = [(script, fault) for script in EVERY for fault in FAULTS if script in fault.scripts]
    wanted = [
        (script, fault)
        for script, fault in everything
        if script in (options.script or EVERY) and options.fault in fault.name and (script, fault.name) not in known
    ]
    wanted = rarest_first(wanted, known, options.seed)
    until = time.monotonic() + 60 * options.minutes

    def one(script: str, fault: Fault) -> Case | None:
        return measure(script, fault, cache) if time.monotonic() < until else None

    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        for future in concurrent.futures.as_completed([pool.submit(one, *each) for each in wanted]):
            case = future.result()
            if case is None:
                continue
            cases.append(case)
            print(table([case]).splitlines()[1], flush=True)
            if options.kept:
                with options.kept.open("a") as file:
                    file.write(json.dumps(asdict(case)) + "\n")
    cases.sort(key=lambda case: (case.script, case.fault))
    print(table(cases))
    if options.markdown:
        possible = sum(fault.name != "clean" for _, fault in everything)
        options.markdown.write_text(markdown(cases, possible))


if __name__ == "__main__":
    main()
