"""Calibrates a machine: how far honest arithmetic differs on it (spec/replay.md, "Tolerance").

    calibration = calibrate(python, progress)         minutes: a reference training under every variation
    store(home, calibration)                          home/numerics/<machine>.json, signed with the attestation key
    find(home, build)                                 the calibration of the machine that a replay ran on, or None

The variations: numbers of threads, vector instructions (ATEN and oneDNN), MKL's compatible mode, oneDNN off. Each is
one process of `_reference.py` for each workload, compared with one that differs in nothing else.
"""

from __future__ import annotations

import datetime
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from trainguard.digest import canonical_json, sha256_hex, write_durably
from trainguard.envelope import load_or_create_key, load_public_key, sign_statement, statement, verify_statement
from trainguard.errors import MalformedEvidence, TrainguardError, Unavailable, VerificationError
from trainguard.home import Home
from trainguard.replay import states
from trainguard.replay.rerun import INHERITED
from trainguard.replay.tolerance import Calibration, Variation
from trainguard.watch.commits import processor

REFERENCE = Path(__file__).parent / "_reference.py"
PREDICATE = "numerics/v1"
WORKLOADS = ("transformer", "convolution", "mixed")
STEPS = (1, 10, 50)
SECONDS = 600.0
FILE_LIMIT_BYTES = 1 << 20

VARIATIONS: tuple[tuple[str, str, dict[str, str], tuple[str, ...]], ...] = (
    ("2 threads", "threads", {"OMP_NUM_THREADS": "2"}, ()),
    ("4 threads", "threads", {"OMP_NUM_THREADS": "4"}, ()),
    ("AVX2", "instructions", {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}, ()),
    ("no vector instructions", "instructions", {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41"}, ()),
    ("MKL compatible", "instructions", {"MKL_CBWR": "COMPATIBLE"}, ()),
    ("oneDNN off", "mkldnn", {}, ("--no-mkldnn",)),
)
"""(name, kind, variables, words): what each changes of BASE."""

BASE = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"}
"""One thread; and waiting threads that sleep, or a busy machine takes minutes for seconds."""


def calibrate(
    python: str = sys.executable, *, workloads: Sequence[str] = WORKLOADS, steps: Sequence[int] = STEPS,
    variations: Sequence[tuple[str, str, dict[str, str], tuple[str, ...]]] = VARIATIONS,
    progress: Callable[[str], None] = lambda _text: None,
) -> Calibration:  # fmt: skip
    """The calibration of this machine for the torch of `python`. Raises Unavailable where it cannot run."""
    with tempfile.TemporaryDirectory(prefix="trainguard-numerics-") as name:
        folder = Path(name)
        progress("reference")
        machine = _trained(python, folder / "base", workloads, steps, {}, ())
        measured = []
        for place, (title, kind, settings, words) in enumerate(variations):
            progress(f"variation {place + 1} of {len(variations)}: {title}")
            measured.append(_varied(python, folder, workloads, steps, title, kind, settings, words))
    made = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return Calibration(
        machine=machine | {"cpu": processor()}, made=made, steps=tuple(steps), variations=tuple(measured)
    )


def _varied(
    python: str, folder: Path, workloads: Sequence[str], steps: Sequence[int], title: str, kind: str,
    settings: Mapping[str, str], words: Sequence[str],
) -> Variation:  # fmt: skip
    began = time.monotonic()
    base, other = folder / "base", folder / title
    _trained(python, other, workloads, steps, settings, words)
    names = [f"{workload}/{step}" for workload in workloads for step in steps]
    told = states.distances(
        python, {name: base / name for name in names}, {name: str(other / name) for name in names},
        {workload: str(base / workload / "0") for workload in workloads},
    )  # fmt: skip
    weights: dict[str, dict[str, float]] = {workload: {} for workload in workloads}
    gradients: dict[str, dict[str, float]] = {workload: {} for workload in workloads}
    changes = False
    for name, tensors in told.items():
        workload, _, step = name.partition("/")
        moved = [(apart, by) for tensor, (apart, by, _) in tensors.items() if tensor.startswith("param/")]
        sized = [(apart, by) for tensor, (apart, _, by) in tensors.items() if not tensor.startswith("param/")]
        weights[workload][step], gradients[workload][step] = _share(moved), _share(sized)
        changes = changes or any(apart > 0 for apart, _ in (*moved, *sized))
    seconds = round(time.monotonic() - began, 1)
    return Variation(
        name=title, kind=kind, settings=dict(settings), changes=changes, weights=weights, gradients=gradients,
        seconds=seconds,
    )  # fmt: skip


def _share(pairs: Sequence[tuple[float, float]]) -> float:
    """That of three tensors in four, and not the largest: one whose true gradient is nothing only adds up noise."""
    shares = sorted(apart / by for apart, by in pairs if by > 0)
    return shares[(3 * len(shares)) // 4] if shares else 0.0


def _trained(
    python: str, folder: Path, workloads: Sequence[str], steps: Sequence[int], settings: Mapping[str, str],
    words: Sequence[str],
) -> dict[str, Any]:  # fmt: skip
    """The reference trainings in one process; what torch said of itself."""
    env = {name: value for name, value in os.environ.items() if name not in INHERITED and name != "PYTHONPATH"}
    command = [python, "-I", str(REFERENCE), str(folder), ",".join(workloads), *(str(step) for step in steps), *words]
    try:
        done = subprocess.run(
            command, env=env | BASE | dict(settings), capture_output=True, timeout=SECONDS, check=False
        )
        if done.returncode == 0:
            told: dict[str, Any] = json.loads(done.stdout)
            return told
        reason = done.stderr.decode(errors="replace").strip().splitlines()[-1:] or [f"status {done.returncode}"]
    except (OSError, subprocess.TimeoutExpired, ValueError) as error:
        reason = [str(error)]
    raise Unavailable(
        f"{python}: the reference training did not end: {reason[0][:300]}",
        next_step="name a Python that has torch: trainguard doctor --numerics --python PYTHON",
    )


# -- kept --------------------------------------------------------------------------------------------------------------


def path_of(home: Home, machine: Mapping[str, Any]) -> Path:
    """Where the calibration of a machine lies: by processor and torch."""
    told = canonical_json({"cpu": machine.get("cpu"), "torch": machine.get("torch")})
    return home.root / "numerics" / f"{sha256_hex(told)[:16]}.json"


def store(home: Home, calibration: Calibration) -> Path:
    """Write it, signed."""
    home.prepare()
    data = msgspec.json.encode(calibration)
    key = load_or_create_key(home.keys / "attestation.pem")
    subject = [{"name": "calibration", "digest": {"sha256": sha256_hex(data)}}]
    envelope = sign_statement(statement(PREDICATE, {"machine": calibration.machine}, subject), key)
    path = path_of(home, calibration.machine)
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_durably(path, msgspec.json.encode({"calibration": data.decode(), "envelope": envelope.decode()}))
    return path


def find(home: Home, build: Mapping[str, Any]) -> Calibration | None:
    """The calibration for the machine and torch that a build names; None where there is none.

    Raises VerificationError where it was altered, MalformedEvidence where it is none.
    """
    path = path_of(home, build)
    try:
        if path.stat().st_size > FILE_LIMIT_BYTES:
            raise MalformedEvidence(f"{path}: larger than {FILE_LIMIT_BYTES} bytes")
        file = msgspec.json.decode(path.read_bytes(), type=dict[str, str])
        data = file["calibration"].encode()
        told = verify_statement(file["envelope"].encode(), [load_public_key(home.keys / "attestation.pub")])
        calibration = msgspec.json.decode(data, type=Calibration)
    except FileNotFoundError:
        return None
    except (OSError, KeyError, msgspec.DecodeError) as error:
        raise MalformedEvidence(f"{path}: not a calibration: {error}") from error
    except VerificationError as error:
        raise VerificationError(f"{path}: {error}") from error
    except TrainguardError as error:
        raise MalformedEvidence(f"{path}: {error}") from error
    digests = [each.get("digest", {}).get("sha256") for each in told.get("subject", [])]
    if digests != [sha256_hex(data)]:
        raise VerificationError(f"{path}: altered since it was signed: it is {sha256_hex(data)[:16]}")
    if calibration.schema != "trainguard/numerics/v1" or path_of(home, calibration.machine) != path:
        raise VerificationError(f"{path}: the calibration of another machine")
    return calibration
