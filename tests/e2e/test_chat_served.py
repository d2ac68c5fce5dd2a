"""The chat example as its README tells it: trained under a lock, asked for at the gate, served, then altered."""

from __future__ import annotations

import http.client
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tests.helpers.environments import torch_environment
from tests.helpers.guarded import run, trainguard

pytest.importorskip("torch")
pytestmark = [pytest.mark.torch, pytest.mark.nightly, pytest.mark.slow, pytest.mark.timeout(1500)]
EXAMPLES = Path(__file__).parents[2] / "examples"
BASE = ("--steps", "24", "--layers", "1", "--width", "32", "--context", "64", "--corpus", "60000", "--save-every", "12")
MODEL = Path("chat") / "step-000020.pt"


@contextmanager
def served(folder: Path, level: str, *options: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """`serve.py` as its own process, and the port it names."""
    command = [
        sys.executable,
        folder / "examples" / "chat" / "serve.py",
        MODEL,
        "--port",
        "0",
        "--level",
        level,
        *options,
    ]
    env = os.environ | {"TRAINGUARD_HOME": str(folder / ".trainguard"), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        assert process.stdout is not None
        said = process.stdout.readline()
        told = re.match(rf"http://127\.0\.0\.1:(\d+)  VERIFIED at {level}$", said)
        assert told is not None, said + process.stdout.read()
        yield process, int(told.group(1))
    finally:
        process.kill()
        process.communicate()


def ask(port: int, method: str, path: str, body: str | None = None) -> tuple[int, str, list[bytes]]:
    """Status, text, and the pieces in which it came."""
    link = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    link.request(method, path, body=body)
    answer = link.getresponse()
    pieces = list(iter(answer.read1, b""))
    link.close()
    return answer.status, b"".join(pieces).decode(), pieces


def test_it_is_served_only_as_long_as_every_byte_of_it_is_vouched_for(tmp_path: Path) -> None:
    """Its base and itself VERIFIED, replayed apart; a question is answered; one changed weight, and it says no more."""
    python, clean = str(torch_environment(tmp_path / "own")), str(torch_environment(tmp_path / "clean"))
    shutil.copytree(EXAMPLES, tmp_path / "examples", ignore=shutil.ignore_patterns("out", "chat.lock", "__pycache__"))
    subprocess.run(["git", "init", "-q", tmp_path], check=True)  # the lock covers the work tree: both examples
    made = subprocess.run(
        [sys.executable, "examples/chat/dialogue.py", "--turns", "60"], cwd=tmp_path, capture_output=True, check=False
    )
    assert made.returncode == 0, made.stderr
    base = ("examples/charlm/train.py", *BASE)
    tuned = ("examples/chat/finetune.py", "--base", "out/step-000024.pt", "--steps", "20", "--batch", "8")
    for name, words in (("base", base), ("chat", tuned)):
        locked = trainguard(tmp_path, "lock", "-o", f"{name}.lock", "--", python, *words)
        assert locked.returncode == 0, locked.stderr
        done = run(tmp_path, python, *words, options=("--name", name, "--lock", f"{name}.lock"))
        assert done.status == 0, done.stderr
        assert done.verdict["verdict"] == "VERIFIED", done.stderr
    strict = trainguard(tmp_path, "gate", str(MODEL), "--level", "TIL-3")
    assert strict.returncode == 3, "nothing was replayed on a clean host"
    for name in ("base", "chat"):
        assert f"run {name}: no segment of it was replayed: trainguard audit {name} --env PYTHON" in strict.stdout
    assert trainguard(tmp_path, "gate", str(MODEL)).returncode == 0

    with served(tmp_path, "TIL-1") as (_, port):
        assert "VERIFIED at TIL-1" in ask(port, "GET", "/")[1]
    for name in ("base", "chat"):
        replayed = trainguard(tmp_path, "audit", name, "--env", clean, "--segments", "0")
        assert replayed.returncode == 0, replayed.stdout + replayed.stderr
    assert trainguard(tmp_path, "gate", str(MODEL), "--level", "TIL-3").returncode == 0

    with served(tmp_path, "TIL-3", "--recheck", "0") as (_, port):
        status, page, _ = ask(port, "GET", "/")
        assert status == 200
        for words in ("VERIFIED at TIL-3", "run chat, step 20", "Apache-2.0", "PSF-2.0"):
            assert words in page
        status, answer, pieces = ask(port, "POST", "/say", "2 + 2?")
        assert (status, len(answer) <= 80) == (200, True)
        assert len(pieces) >= min(2, len(answer)), "it comes in pieces, not at once"

        data = bytearray((tmp_path / MODEL).read_bytes())
        data[len(data) // 2] ^= 1
        (tmp_path / MODEL).write_bytes(data)
        status, answer, _ = ask(port, "POST", "/say", "2 + 2?")
        assert status == 503
        assert "seal" in answer
        assert "disabled" in ask(port, "GET", "/")[1]

    refused = subprocess.run(
        [sys.executable, "examples/chat/serve.py", MODEL, "--port", "0"],
        cwd=tmp_path,
        env=os.environ | {"TRAINGUARD_HOME": str(tmp_path / ".trainguard")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert refused.returncode != 0
    assert "not served: the gate does not hold" in refused.stderr
