"""Two readers that others wrote hold our log to the specification: Go's x/mod/sumdb, and aics-tlog.

Each is skipped with its reason where it is not installed. To have them on Debian:
    apt-get install golang-go golang-golang-x-mod-dev
    python3.12 -m venv V && V/bin/pip install aics-tlog && PATH=V/bin:$PATH pytest tests/tool
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from trainguard.log import Log, LogReader, TreeHead, encode_proof

pytestmark = pytest.mark.tool

SIZES = (1, 2, 255, 256, 257, 700, 1100)
GO_LIBRARIES = Path("/usr/share/gocode")
"""Where Debian's golang-*-dev packages lie."""

Judge = Callable[..., subprocess.CompletedProcess[str]]
"""(log folder, older heads) → the verifier's process; status 0 and the size on stdout, or 1 and a reason."""

AICS = """
import base64, sys
from pathlib import Path
import aics_tlog as t
vkey, folder, older = t.parse_vkey(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
try:
    note = t.parse_note((folder / "checkpoint").read_text())
    checked = t.verify_checkpoint(note, vkey, expected_origin=sys.argv[1].split("+")[0])
    if not checked.ok:
        raise ValueError(checked.error)
    head = t.parse_checkpoint(note.text)
    root = head.root
    reader = t.FileSystemTileReader(folder)
    t.audit_tiles(reader, head.size, root)
    for index in range(0, head.size, 97):
        proof = t.inclusion_proof_from_tiles(reader, index, head.size)
        if not t.verify_leaf_inclusion(t.read_entry(reader, index, head.size), index, head.size, proof, root):
            raise ValueError(index)
    while older:
        size, old = int(older.pop(0)), bytes.fromhex(older.pop(0))
        proof = t.consistency_proof_from_tiles(reader, size, head.size)
        if not t.verify_consistency(size, head.size, old, root, proof):
            raise ValueError("does not extend")
except Exception as error:
    sys.exit(repr(error))
print(head.size)
"""


@pytest.fixture(scope="module")
def go_verifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Our verifier of tests/tool/tlogverify, built on Go's packages."""
    if shutil.which("go") is None:
        pytest.skip("go is not installed")
    if not (GO_LIBRARIES / "src/golang.org/x/mod/sumdb/tlog").is_dir():
        pytest.skip("golang.org/x/mod is not installed (package golang-golang-x-mod-dev)")
    folder = tmp_path_factory.mktemp("go")
    environment = os.environ | {
        "GO111MODULE": "off", "GOPATH": str(GO_LIBRARIES), "GOFLAGS": "", "GOCACHE": str(folder / "cache"),
    }  # fmt: skip
    source = Path(__file__).parent / "tlogverify" / "main.go"
    subprocess.run(["go", "build", "-o", folder / "tlogverify", source], check=True, env=environment, cwd=folder)
    return folder / "tlogverify"


@pytest.fixture(scope="module")
def aics_python() -> str:
    """An interpreter that has aics-tlog."""
    for name in ("python3.13", "python3.12"):
        found = shutil.which(name)
        if (
            found
            and subprocess.run([found, "-c", "import aics_tlog"], capture_output=True, check=False).returncode == 0
        ):
            return found
    pytest.skip("no python3.12 or python3.13 on PATH has aics-tlog")


@pytest.fixture(params=["go", "aics"])
def judge(request: pytest.FixtureRequest) -> Judge:
    """One of the two verifiers."""
    if request.param == "go":
        start = [str(request.getfixturevalue("go_verifier"))]
    else:
        start = [request.getfixturevalue("aics_python"), "-c", AICS]

    def run(folder: Path, *older: TreeHead) -> subprocess.CompletedProcess[str]:
        vkey = (folder.parent / "log.vkey").read_text().strip()
        heads = [part for head in older for part in (str(head.size), head.root.hex())]
        return subprocess.run(
            [*start, vkey, str(folder), *heads], capture_output=True, text=True, check=False, timeout=60
        )

    return run


def test_another_reader_upholds_our_log_at_every_size(judge: Judge, tmp_path: Path) -> None:
    """Published at sizes on and beside tile borders; each extends all before it."""
    heads: list[TreeHead] = []
    with Log.open(tmp_path / "log", tmp_path / "log.key", origin="log.example.org") as log:
        for size in SIZES:
            log.append([b"entry %d " % i * (i % 40) for i in range(heads[-1].size if heads else 0, size)])
            heads.append(log.publish())
            done = judge(tmp_path / "log", *heads)
            assert (done.returncode, done.stdout, done.stderr) == (0, f"{size}\n", "")


def test_another_reader_refuses_a_head_that_our_log_does_not_extend(judge: Judge, tmp_path: Path) -> None:
    """Fork: the same key, another history."""
    with Log.open(tmp_path / "log", tmp_path / "log.key") as log:
        log.append([b"a", b"b", b"c"])
        log.publish()
    with Log.open(tmp_path / "fork", tmp_path / "log.key") as log:
        log.append([b"a", b"x"])
        forked = log.publish()
    assert judge(tmp_path / "log").returncode == 0
    assert judge(tmp_path / "log", forked).returncode == 1


def test_another_reader_and_we_find_the_same_flipped_bits(judge: Judge, tmp_path: Path) -> None:
    """40 bits of published files: both refuse each."""
    with Log.open(tmp_path / "log", tmp_path / "log.key") as log:
        log.append([b"entry %d" % i for i in range(600)])
        log.publish()
    published = [tmp_path / "log/checkpoint", *(p for p in (tmp_path / "log/tile").rglob("*") if p.is_file())]
    source = random.Random(4)
    for _ in range(40):
        path = source.choice(published)
        data = path.read_bytes()
        bit = source.randrange(8 * len(data))
        path.write_bytes(data[: bit // 8] + bytes([data[bit // 8] ^ 1 << bit % 8]) + data[bit // 8 + 1 :])
        assert judge(tmp_path / "log").returncode == 1, (path, bit)
        path.write_bytes(data)
    assert judge(tmp_path / "log").returncode == 0
    assert LogReader(tmp_path / "log", tmp_path / "log.vkey").verify().head.size == 600


def test_aics_tlog_takes_our_offline_proofs(aics_python: str, tmp_path: Path) -> None:
    """Index, hashes and tree head of a .tlog-proof, read by its text and checked by other code."""
    with Log.open(tmp_path / "log", tmp_path / "log.key") as log:
        log.append([b"entry %d" % i for i in range(500)])
    text = encode_proof(LogReader(tmp_path / "log", tmp_path / "log.vkey").inclusion(321))
    code = """
import base64, json, sys, aics_tlog as t
vkey, text = json.load(sys.stdin)
top, note = text.split("\\n\\n", 1)
version, index, *hashes = top.split("\\n")
note = t.parse_note(note)
head = t.parse_checkpoint(note.text)
root = head.root
path = [base64.b64decode(line) for line in hashes]
print(version, t.verify_checkpoint(note, t.parse_vkey(vkey)).ok,
      bool(t.verify_leaf_inclusion(b"entry 321", int(index.split()[1]), head.size, path, root)))
"""
    done = subprocess.run(
        [aics_python, "-c", code],
        input=json.dumps([(tmp_path / "log.vkey").read_text().strip(), text]),
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.split() == ["c2sp.org/tlog-proof@v1", "True", "True"]
