"""Run a small script under watch, and appraise its records with one check: what the attack tests are written with."""

from __future__ import annotations

import functools
import hashlib
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec
from tests.helpers.guarded import clean_environment

from trainguard.appraise.interface import Check, Context
from trainguard.evidence import Evidence, unfold
from trainguard.finding import Finding, LinkState
from trainguard.lockfile import Code, Interpreter, Launch, Measurement, Tree, make_lock
from trainguard.policy import Approval, Policy
from trainguard.testing.guarded import run_guarded

TRAIN = """
import torch
torch.manual_seed(0)
torch.set_num_threads(1)
model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4), torch.nn.Dropout(0.1), torch.nn.Linear(4, 1))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
for step in range(1, {steps} + 1):
    {before}
    optimizer.zero_grad()
    loss = model(torch.randn(8, 4)).square().mean()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    {after}
import hashlib
print("digest", hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in model.parameters())).hexdigest())
"""


def training(*, steps: int = 12, before: str = "pass", after: str = "pass", top: str = "") -> str:
    """A training script; `before` and `after` are single lines of Python around each step, `top` stands first."""
    return top + TRAIN.format(steps=steps, before=before, after=after)


@dataclass
class Watched:
    """A finished guarded run."""

    folder: Path
    records: list[Evidence]
    status: int
    output: str
    blobs: dict[str, bytes] = field(default_factory=dict)

    def judge(self, check: type[Check], *approvals: Approval) -> tuple[list[Finding], LinkState]:
        """The findings of one check, and the balance of its link."""
        context = Context(run="test", policy=Policy(approve=approvals), blob=self.blobs.__getitem__)
        appraiser = check(context)
        findings = [f for record in self.records for each in unfold(record) for f in appraiser.see(each)]
        ends = list(appraiser.end())
        findings += [end for end in ends if isinstance(end, Finding)]
        (link,) = [end for end in ends if isinstance(end, LinkState)]
        return findings, link

    def faults(self) -> list[Any]:
        """What the guard itself got wrong inside the process."""
        return [r.body for r in self.records if r.kind == "note" or (r.kind == "bye" and r.body.get("faults"))]

    def line_of(self, file: str, text: str) -> str:
        """`file:line` of the first line that contains `text`."""
        path = self.folder / file
        lines = path.read_text().splitlines()
        return f"{path}:{next(n for n, line in enumerate(lines, 1) if text in line)}"


@functools.cache
def cache_folder() -> Path:
    """One bytecode cache for all tests; content-addressed, so it may stay from one session to the next."""
    folder = Path(__file__).parents[2] / ".pytest_cache" / "bytecode"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder


def write(folder: Path, files: Mapping[str, str]) -> None:
    """Put text files into `folder`."""
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def watch(
    folder: Path,
    *arguments: str,
    measured: Measurement | None = None,
    locked: Measurement | None = None,
    env: Mapping[str, str] | None = None,
    **settings: Any,
) -> Watched:
    """Run `python ARGUMENTS` (default `train.py`) in `folder` under watch.

    measured: what was measured before the start; locked: what was approved (both None: nothing is known).
    """
    blobs: dict[str, bytes] = {}
    first = []
    if measured is not None or locked is not None:
        body: dict[str, Any] = {"attempt": 0, "lock": None}
        taken = measured if measured is not None else locked
        assert taken is not None
        body["blob"] = _store(blobs, taken.encode())
        if locked is not None:
            lock = make_lock(locked, ec.generate_private_key(ec.SECP256R1()), made="2026-11-22T00:00:00Z")
            body["lock"] = _store(blobs, lock.data)
        first.append(("measurement", body))
    records, done = run_guarded(
        [sys.executable, *(arguments or ("train.py",))],
        cwd=folder,
        cache=cache_folder(),
        env={"OMP_NUM_THREADS": "1", **(env or {})},
        first=first,
        **{"links": "all", **settings},
    )
    return Watched(folder, records, done.returncode, done.stdout, blobs)


def plain(folder: Path, *arguments: str, env: Mapping[str, str] | None = None) -> str:
    """The output of `python ARGUMENTS` in `folder` without any guard."""
    done = subprocess.run(
        [sys.executable, *(arguments or ("train.py",))],
        cwd=folder,
        env=clean_environment() | dict(env or {}),
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
    )
    return done.stdout


def measurement_of(run: Watched) -> Measurement:
    """What a measurement would have said before `run`: the files it loaded, and every file of its folder as now."""
    where = next(r.body["where"] for r in run.records if r.kind == "code" and "where" in r.body)
    real = where["real"]
    roots = {"code": str(run.folder), "stdlib": where["roots"]["stdlib"], "site-packages": where["site"][0]}
    files: dict[str, dict[str, str]] = {name: {} for name in roots}
    for record in run.records:
        for path, digest, *_ in record.body.get("files", ()) if record.kind == "code" else ():
            for name in ("site-packages", "stdlib"):
                if path.startswith(roots[name] + "/") and digest is not None:
                    files[name].setdefault(path[len(roots[name]) + 1 :], f"{digest} 0")
                    break
    for path in sorted(run.folder.rglob("*")):
        if path.is_file() and path.suffix != ".pyc":
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            files["code"][str(path.relative_to(run.folder))] = f"{digest} {path.stat().st_size}"
    return Measurement(
        cwd=str(run.folder),
        launch=Launch(argv=("python", "train.py"), kind="script", script="train.py"),
        interpreter=Interpreter(
            executable=sys.executable,
            version="",
            implementation="cpython",
            cache_tag="",
            prefix=where["roots"]["prefix"],
            base_prefix=sys.base_prefix,
            path=(),
            user_site=False,
        ),
        code=Code(root=str(run.folder)),
        trees={name: Tree(name=name, root=real.get(root, root), files=files[name]) for name, root in roots.items()},
        distributions={},
    )


def digest_line(output: str) -> str:
    """The line a training script prints of its final weights."""
    return next(line for line in output.splitlines() if line.startswith("digest "))


def _store(blobs: dict[str, bytes], data: bytes) -> str:
    digest = hashlib.sha256(data).hexdigest()
    blobs[digest] = data
    return digest


def touch_back(path: Path, status: os.stat_result) -> None:
    """Give a file the times it had, as an attacker would."""
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
