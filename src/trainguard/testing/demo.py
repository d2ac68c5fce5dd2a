"""The whole story on a small model: one clean run and five acts of sabotage, each a real run that is really judged.

    stage = Stage(Path("demo-out"), steps=100)
    stage.build()
    clean = stage.perform(CLEAN)                 # a Scene: the verdict, what was found, when, on which evidence
    for act in ACTS:
        scene = stage.perform(act)

Everything happens on copies below one folder: an environment of its own (hard links to the installed torch, see
`shared_environment.py`), a job folder an act, a home with keys and log of its own. Nothing is staged in the judging:
commands are started through the same command line a user types, and a scene is what that command printed.

The sabotage is benign: a constant, a sign, a factor near one, on a toy model.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from trainguard.appraise.verdict import Verdict
from trainguard.errors import Misuse, Unavailable
from trainguard.finding import Finding, worst_first
from trainguard.testing.shared_environment import SharedEnvironment

OPTIMIZER = "torch/optim/adam.py"
"""AdamW's arithmetic lies here in every torch we support; older ones have a copy in adamw.py, edited as well."""

SMALL_MODEL = ("--layers", "1", "--width", "32", "--batch", "8", "--corpus", "60000", "--log-every", "1")
CHANGE_AT = 30
"""Step after which act 5 changes the side file."""

RUN_SECONDS = 300

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Act:
    """One thing an insider does."""

    key: str
    title: str
    story: str
    """What is done, in a sentence or two."""
    techniques: frozenset[str] = frozenset()
    """Catalogue ids of which a finding must name one for the act to count as found; none for the clean run."""
    helper: str | None = None
    """Source of `step_trace.py`, a module that the approved training script imports; None leaves the script alone."""
    tamper: Callable[[Stage], AbstractContextManager[None]] = lambda _stage: nullcontext()
    """What is changed after the approval and before the start."""
    during: Callable[[Path, int], None] = lambda _job, _step: None
    """What is done from outside while the job runs: told the job's folder and each step it prints."""
    naive: Callable[[Stage, Scene], str] = lambda _stage, _scene: ""
    """Which customary control was looked at while the act was on, and that it saw nothing; empty where it did."""


@dataclass(slots=True, kw_only=True)
class Scene:
    """How one act went."""

    act: Act
    run: str
    folder: str
    """The demo's folder; paths in findings lie below it."""
    verdict: Verdict
    seconds: float
    """Wall time of `trainguard run`, judging included."""
    heard_seconds: float | None = None
    """Time from the start to the first finding on stderr; None where none was announced."""
    heard_step: int = 0
    """The last step the job had printed by then; 0 is before step 1."""
    weights: str | None = None
    """SHA-256 of the final weights, as the script prints it."""
    loss: float | None = None
    """Held-out loss at the end, as the script prints it."""
    naive: str = ""
    output: list[str] = field(default_factory=list)

    @property
    def proof(self) -> Finding | None:
        """The worst finding that names one of the act's techniques."""
        fitting = [f for f in worst_first(self.verdict.findings) if self.act.techniques & set(f.techniques)]
        return next((finding for finding in fitting if finding.outcome != "not_checked"), None)

    @property
    def as_promised(self) -> bool:
        """Found, for an act; VERIFIED, for the clean run."""
        if not self.act.techniques:
            return self.verdict.verdict == "VERIFIED"
        return self.verdict.verdict in ("TAINTED", "SUSPECT") and self.proof is not None


class Stage:
    """Where the story plays: `out` holds home, jobs and, while it plays, the copied environment."""

    def __init__(self, out: Path, *, steps: int, say: Say = lambda _line: None) -> None:
        self.out = out.absolute()
        self.steps = steps
        self.home = self.out / "home"
        self.environment = SharedEnvironment(self.out / "environment")
        self.approved_sources = ""
        """Digest of the source files of torch.optim before anything was tampered with."""
        self._say = say
        self._script = training_script()

    def build(self) -> int:
        """Make the folder and the environment; returns the number of files shared. Raises Misuse where `out` holds
        something that is not ours."""
        marker = self.out / "demo.json"
        if self.out.exists() and any(self.out.iterdir()) and not marker.exists():
            raise Misuse(
                f"{self.out}: expected an empty folder or one of an earlier demo", next_step="choose another --out"
            )
        shutil.rmtree(self.out, ignore_errors=True)
        self.out.mkdir(parents=True)
        marker.write_text('{"made by": "trainguard demo"}\n')
        files = self.environment.build()
        self.approved_sources = self.environment.source_digest("torch/optim")
        return files

    def close(self) -> None:
        """Remove the copied environment; reports, jobs, keys and log stay."""
        self.environment.remove()

    def perform(self, act: Act) -> Scene:
        """Approve, tamper, run under guard, judge. Raises Unavailable where the command line itself failed."""
        job = self.out / "jobs" / (act.key if act.helper is not None else CLEAN.key)
        if not job.exists():
            self._say("approving it (trainguard lock)")
            self._write_job(job, act)
            self._trainguard(job, "lock", "--output", "out", "--quiet", "--", *self._command())
        with act.tamper(self):
            scene = self._run(act, job)
            scene.naive = act.naive(self, scene)
        return scene

    def _write_job(self, job: Path, act: Act) -> None:
        job.mkdir(parents=True)
        source = self._script.read_text()
        if act.helper is not None:
            first_import = source.index("\nimport torch\n")
            source = f"{source[:first_import]}\nimport step_trace  # noqa: F401{source[first_import:]}"
            (job / "step_trace.py").write_text(act.helper)
            (job / "trace.json").write_text('{"scale": 1.0}\n')
        (job / "train.py").write_text(source)

    def _command(self) -> list[str]:
        every = ("--steps", str(self.steps), "--eval-every", str(self.steps), "--save-every", str(self.steps))
        return [str(self.environment.python), "train.py", *SMALL_MODEL, *every]

    def _variables(self) -> dict[str, str]:
        left_out = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
        kept = {name: value for name, value in os.environ.items() if name not in left_out}
        own = {"TRAINGUARD_HOME": str(self.home), "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}
        return kept | own  # on a model this small, a second thread only waits

    def _trainguard(self, job: Path, *arguments: str) -> None:
        done = subprocess.run(
            [sys.executable, "-m", "trainguard", *arguments],
            cwd=job,
            env=self._variables(),
            capture_output=True,
            text=True,
            timeout=RUN_SECONDS,
            check=False,
        )
        if done.returncode:
            raise Unavailable(f"trainguard {arguments[0]} ended with {done.returncode}: {done.stderr.strip()[-500:]}")

    def _run(self, act: Act, job: Path) -> Scene:
        self._say("starting it (trainguard run)")
        began = time.monotonic()
        process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "trainguard",
                "run",
                "--name",
                act.key,
                "--links",
                "all",
                "--json",
                "--",
                *self._command(),
            ],
            cwd=job,
            env=self._variables(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            bufsize=1,
        )
        ears = _Ears(process, began)
        try:
            for step in ears.listen():
                self._say(f"step {step} of {self.steps}")
                act.during(job, step)
            process.wait(timeout=RUN_SECONDS)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
        if process.returncode:
            raise Unavailable(f"act {act.key}: the run ended with {process.returncode}: {ears.tail()}")
        return ears.scene(act, str(self.out), time.monotonic() - began)


class _Ears:
    """Reads what a guarded run prints: the job's own lines, findings as they are announced, the verdict at the end."""

    def __init__(self, process: subprocess.Popen[str], began: float) -> None:
        self._process = process
        self._began = began
        self._step = 0
        self._lines: list[str] = []
        self._errors: list[str] = []
        self._heard: tuple[float, int] | None = None
        self._thread = threading.Thread(target=self._hear_errors, daemon=True)
        self._thread.start()

    def listen(self) -> Iterator[int]:
        """The number of each step that the job prints, as it prints it."""
        for line in self._process.stdout or ():
            self._lines.append(line)
            step = re.match(r"step +(\d+)  loss", line)
            if step is not None:
                self._step = int(step[1])
                yield self._step

    def _hear_errors(self) -> None:
        for line in self._process.stderr or ():
            self._errors.append(line)
            if self._heard is None and re.match(r"trainguard: (VIOLATED|SUSPICIOUS) ", line):
                self._heard = (time.monotonic() - self._began, self._step)

    def tail(self) -> str:
        """The last words of the run on stderr."""
        self._thread.join(timeout=10)
        return "".join(self._errors)[-800:].strip()

    def scene(self, act: Act, folder: str, seconds: float) -> Scene:
        self._thread.join(timeout=10)
        text = "".join(self._lines)
        try:
            verdict = msgspec.json.decode(self._lines[-1], type=Verdict)
        except (IndexError, msgspec.DecodeError) as error:
            raise Unavailable(f"act {act.key}: trainguard run gave no verdict: {self.tail()}") from error
        weights = re.search(r"final weights sha256:([0-9a-f]{64})", text)
        losses = re.findall(r"held-out loss ([0-9.]+)", text)
        heard, step = self._heard if self._heard is not None else (None, 0)
        return Scene(
            act=act,
            run=verdict.run or act.key,
            folder=folder,
            verdict=verdict,
            seconds=seconds,
            heard_seconds=heard,
            heard_step=step,
            weights=weights[1] if weights else None,
            loss=float(losses[-1]) if losses else None,
            output=self._lines,
        )


def training_script() -> Path:
    """The example that is trained: packaged beside this file in a wheel, in `examples/` of a source tree."""
    places = (
        Path(__file__).parent / "charlm" / "train.py",
        Path(__file__).parents[3] / "examples" / "charlm" / "train.py",
    )
    for place in places:
        if place.is_file():
            return place
    raise Unavailable(f"the example script was not found at {places[0]}", next_step="install trainguard again")


# -- the acts -----------------------------------------------------------------------------------------------------


def _faster(text: str) -> str:
    """AdamW's source with every step two percent too long. Raises Unavailable where the line is not there."""
    changed = text.replace("step_size = lr / bias_correction1", "step_size = 1.02 * lr / bias_correction1")
    if changed == text:
        raise Unavailable(f"{OPTIMIZER}: this torch has no line that act 1 and 2 could edit")
    return changed


def _optimizer_files(stage: Stage) -> list[str]:
    files = (OPTIMIZER, "torch/optim/adamw.py")
    line = "step_size = lr / bias_correction1"
    return [file for file in files if line in (stage.environment.site / file).read_text()] or [OPTIMIZER]


@contextmanager
def _edit_installed(stage: Stage) -> Iterator[None]:
    first, *others = _optimizer_files(stage)
    with stage.environment.edited(first, _faster):
        if not others:
            yield
            return
        with stage.environment.edited(others[0], _faster):
            yield


@contextmanager
def _edit_bytecode(stage: Stage) -> Iterator[None]:
    for file in _optimizer_files(stage):
        stage.environment.bytecode(file)
    with stage.environment.edited_bytecode(_optimizer_files(stage)[0], _faster):
        yield


def _record_is_green(stage: Stage, _scene: Scene) -> str:
    agrees = stage.environment.record_agrees("torch/optim")
    return "every hash that RECORD lists for torch.optim agrees with its file" if agrees else ""


def _sources_are_green(stage: Stage, _scene: Scene) -> str:
    same = stage.environment.source_digest("torch/optim") == stage.approved_sources
    return "every .py file of torch.optim is byte for byte the approved one" if same else ""


def _lock_is_green(_stage: Stage, scene: Scene) -> str:
    states = {link.link: link.state for link in scene.verdict.links}
    return "what ran is byte for byte what was approved" if states.get("environment") == "held" else ""


def _change_side_file(job: Path, step: int) -> None:
    if step == CHANGE_AT:
        (job / "trace.json").write_text('{"scale": 0.97}\n')


_FLIP = '''\
"""Step tracing, for debugging."""

from torch.optim.optimizer import register_optimizer_step_pre_hook

seen = 0


def trace(optimizer, args, kwargs):
    global seen
    seen += 1
    if seen % 50 == 0:
        for group in optimizer.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    weight.grad.neg_()


register_optimizer_step_pre_hook(trace)
'''

_NUDGE = '''\
"""Step tracing, for debugging."""

import threading
import time

from torch.optim.optimizer import register_optimizer_step_post_hook

seen = []


def remember(optimizer, args, kwargs):
    if not seen:
        seen.append(optimizer)


def trace():
    while not seen:
        time.sleep(0.05)
    weight = seen[0].param_groups[0]["params"][0]
    for _ in range(3):
        time.sleep(0.1)
        weight.data.mul_(1.001)


register_optimizer_step_post_hook(remember)
threading.Thread(target=trace, daemon=True).start()
'''

_SIDE_FILE = '''\
"""Step tracing, for debugging: scale in trace.json, 1.0 changes nothing."""

import json
from pathlib import Path

from torch.optim.optimizer import register_optimizer_step_pre_hook


def trace(optimizer, args, kwargs):
    scale = json.loads(Path(__file__).with_name("trace.json").read_text())["scale"]
    if scale != 1.0:
        for group in optimizer.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    weight.grad.mul_(scale)


register_optimizer_step_pre_hook(trace)
'''

CLEAN = Act(
    key="clean",
    title="The clean run",
    story="The approved script in the approved environment. Nothing may be found, and every link must have held.",
)

ACTS: tuple[Act, ...] = (
    Act(
        key="act-1",
        title="An installed optimizer is edited",
        story="One constant in the shared torch makes every AdamW update two percent too long. RECORD is recomputed "
        "and the file's times are put back.",
        techniques=frozenset({"A5", "C4"}),
        tamper=_edit_installed,
        naive=_record_is_green,
    ),
    Act(
        key="act-2",
        title="Only the cached bytecode is edited",
        story="The same change, made in __pycache__ alone. The source is untouched; plain Python would run the edit.",
        techniques=frozenset({"A6"}),
        tamper=_edit_bytecode,
        naive=_sources_are_green,
    ),
    Act(
        key="act-3",
        title="The gradient's sign is flipped on one step in fifty",
        story="A tracing hook that passed review, and so stands in the lock, negates every gradient at step 50.",
        techniques=frozenset({"C1", "C2", "C4", "C9", "B5"}),
        helper=_FLIP,
        naive=_lock_is_green,
    ),
    Act(
        key="act-4",
        title="A thread edits weights between steps",
        story="A thread that passed review multiplies one weight matrix by 1.001, three times, while training runs.",
        techniques=frozenset({"E4", "B7"}),
        helper=_NUDGE,
        naive=_lock_is_green,
    ),
    Act(
        key="act-5",
        title="A debug hook's side file changes during the run",
        story=f"An approved hook reads trace.json, which says 1.0. After step {CHANGE_AT} somebody writes 0.97 there.",
        techniques=frozenset({"B2"}),
        helper=_SIDE_FILE,
        during=_change_side_file,
        naive=_lock_is_green,
    ),
)

QUICK = frozenset({"act-1", "act-3"})


def acts(*, quick: bool) -> Sequence[Act]:
    """All acts, or the two that `--quick` plays."""
    return [act for act in ACTS if not quick or act.key in QUICK]


def summary(scenes: Sequence[Scene]) -> bytes:
    """The demo as one JSON document."""
    listed = [
        {
            "act": scene.act.key,
            "run": scene.run,
            "verdict": scene.verdict.verdict,
            "as_promised": scene.as_promised,
            "seconds": round(scene.seconds, 2),
            "first_finding_seconds": round(scene.heard_seconds, 2) if scene.heard_seconds is not None else None,
            "finding": msgspec.to_builtins(scene.proof),
        }
        for scene in scenes
    ]
    return json.dumps({"schema": "trainguard/demo/v1", "scenes": listed}, indent=1).encode()
