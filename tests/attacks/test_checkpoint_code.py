"""E1 and E2: code in a checkpoint, or in the files beside it, is refused without running.

Every forgery of `trainguard.testing.forge` is scanned first: the scan must refuse it and its marker must not appear.
Then the file is loaded by the loader it was made for, in a child process: where the forgery says it is live, the marker
must appear, so no test here is about a payload that would not have worked.
"""

from __future__ import annotations

import pickle
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from trainguard.scan import ScanPolicy, Verdict, vet, vet_file
from trainguard.scan.verdict import FileReport
from trainguard.testing.forge import BENIGN, Forged, call, forge, named, npy_objects, stream, torch_zip, touch

DETONATE = Path(__file__).parent.parent / "helpers" / "detonate.py"


class Range:
    """All forgeries, scanned once and loaded once."""

    def __init__(self, root: Path) -> None:
        self.marker = root / "markers" / "m"
        self.marker.parent.mkdir()
        self.cases = {forged.name: forged for forged in forge(root / "files", self.marker)}
        self.reports: dict[str, FileReport] = {name: vet_file(forged.path) for name, forged in self.cases.items()}
        self.ran_while_scanned = {path.name for path in self.marker.parent.iterdir()}
        lines = [f"{forged.loader}\t{forged.path}" for forged in self.cases.values() if forged.loader != "none"]
        done = subprocess.run(
            [sys.executable, str(DETONATE)],
            input="\n".join(lines),
            text=True,
            cwd=self.marker.parent,
            capture_output=True,
            timeout=110,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-2000:]

    def went_off(self, forged: Forged) -> bool:
        """Whether loading the file ran its payload."""
        return Path(f"{self.marker}-{forged.name}").exists()


@pytest.fixture(scope="module")
def shooting_range(tmp_path_factory: pytest.TempPathFactory) -> Range:
    pytest.importorskip("torch")
    pytest.importorskip("joblib")
    return Range(tmp_path_factory.mktemp("range"))


def _names() -> list[str]:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        return [forged.name for forged in forge(Path(folder) / "f", Path(folder) / "m")]


@pytest.mark.torch
def test_no_scan_runs_anything(shooting_range: Range) -> None:
    """No marker exists after every forgery was scanned and before the first was loaded."""
    assert shooting_range.ran_while_scanned == set()


@pytest.mark.torch
@pytest.mark.parametrize("name", _names())
def test_forgery_is_refused_and_is_what_it_claims(shooting_range: Range, name: str) -> None:
    """The scan calls it unsafe or unknown, with a reason; loading it really runs its payload where it says so."""
    forged, report = shooting_range.cases[name], shooting_range.reports[name]
    assert report.verdict in (Verdict.UNSAFE, Verdict.UNKNOWN, Verdict.ERROR)
    assert report.reasons
    assert shooting_range.went_off(forged) == forged.live


@pytest.mark.torch
def test_live_forgeries_are_many(shooting_range: Range) -> None:
    """The range is worth its name: more than 120 forgeries go off, in more than 12 families."""
    live = [forged for forged in shooting_range.cases.values() if forged.live]
    assert len(live) > 120
    assert len({forged.family for forged in live}) > 12


def _naive_scanner(folder: Path) -> list[Path]:
    """What scanners in use do: look at *.bin, *.pt and *.pkl, and search them for names on a deny list."""
    bad = re.compile(rb"\b(os|posix|subprocess|builtins|__builtin__)\n(system|popen|eval|exec)")
    return [
        path
        for path in folder.rglob("*")
        if path.suffix in (".bin", ".pt", ".pkl") and path.is_file() and bad.search(path.read_bytes())
    ]


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    """A folder like a training run leaves it, all benign."""
    folder = tmp_path / "checkpoint-100"
    folder.mkdir()
    (folder / "pytorch_model.bin").write_bytes(torch_zip(BENIGN))
    (folder / "config.json").write_text('{"model_type": "bert"}')
    (folder / "rng_state.pth").write_bytes(torch_zip(BENIGN))
    (folder / ".metadata").write_bytes(BENIGN)
    return folder


def test_clean_folder_is_safe(model_folder: Path) -> None:
    """The folder the next tests start from raises nothing."""
    report = vet(model_folder)
    assert report.verdict is Verdict.SAFE
    assert {file.path for file in report.files} == {"pytorch_model.bin", "config.json", "rng_state.pth", ".metadata"}


@pytest.mark.parametrize("name", ["rng_state.pth", ".metadata"])
def test_payload_in_side_file_is_found_where_a_naive_scanner_stays_green(model_folder: Path, name: str) -> None:
    """Clean weights, payload in a side file: the naive control passes, the scan names the file and says E2."""
    marker = model_folder.parent / "marker"
    payload = stream(touch(str(marker)))
    (model_folder / name).write_bytes(payload if name == ".metadata" else torch_zip(payload))
    assert _naive_scanner(model_folder) == []
    report = vet(model_folder)
    assert report.verdict is Verdict.UNSAFE
    bad = [file for file in report.files if file.verdict is not Verdict.SAFE]
    assert [file.path for file in bad] == [name]
    assert bad[0].reasons[0].technique == "E2"
    assert not marker.exists()


def test_payload_in_weights_is_e1(model_folder: Path) -> None:
    """The checkpoint itself: E1, with the member, the offset and the global."""
    (model_folder / "pytorch_model.bin").write_bytes(torch_zip(stream(touch("x"))))
    (bad,) = [file for file in vet(model_folder).files if file.verdict is Verdict.UNSAFE]
    (reason,) = bad.reasons
    assert (reason.technique, reason.global_name, reason.use) == ("E1", "posix.mkdir", "call")
    assert reason.member == "archive/data.pkl"
    assert reason.offset is not None


def test_module_shadowed_by_a_file_of_the_folder_is_refused(model_folder: Path) -> None:
    """A listed name is no protection when the folder brings its own module of that name."""
    (model_folder / "model.pkl").write_bytes(pickle.dumps({"w": 1}))
    (model_folder / "argparse.py").write_text("class Namespace: ...")
    report = vet(model_folder)
    assert report.verdict is Verdict.UNSAFE
    assert any(reason.rule == "shadow" for reason in report.reasons)


def _mutants() -> Iterator[tuple[str, bytes]]:
    data = torch_zip(stream(call(named("collections", "OrderedDict"))))
    for position in range(0, len(data), 7):
        yield f"cut-at-{position}", data[:position]


def test_every_truncation_of_a_checkpoint_is_refused(tmp_path: Path) -> None:
    """A checkpoint cut anywhere is not clean."""
    path = tmp_path / "cut.pt"
    for name, data in _mutants():
        path.write_bytes(data)
        assert vet_file(path).verdict is not Verdict.SAFE, name


def test_every_flipped_bit_outside_tensor_bytes_is_refused_or_harmless(tmp_path: Path) -> None:
    """Flips in the zip's own bytes are noticed, or lie in fields no reader acts on (times, attributes)."""
    data = torch_zip(stream(call(named("collections", "OrderedDict"))))
    path, silent = tmp_path / "flip.pt", []
    for position in range(0, len(data), 3):
        path.write_bytes(data[:position] + bytes((data[position] ^ 0x40,)) + data[position + 1 :])
        if vet_file(path).verdict is Verdict.SAFE:
            silent.append(position)
    with zipfile.ZipFile(_bytes(data)) as archive:
        assert not any(_in_pickle(archive, position) for position in silent)


def _bytes(data: bytes):
    import io

    return io.BytesIO(data)


def _in_pickle(archive: zipfile.ZipFile, position: int) -> bool:
    info = archive.getinfo("archive/data.pkl")
    start = info.header_offset + 30 + len(info.filename)
    return start <= position < start + info.file_size


def test_object_array_inside_npz_inside_zip_is_found(tmp_path: Path) -> None:
    """Three containers deep: the member path names all of them."""
    inner, outer = tmp_path / "a.npz", tmp_path / "b.zip"
    with zipfile.ZipFile(inner, "w") as archive:
        archive.writestr("x.npy", npy_objects(stream(touch("x"))))
    with zipfile.ZipFile(outer, "w") as archive:
        archive.write(inner, "a.npz")
    (reason,) = vet_file(outer).reasons
    assert reason.member == "a.npz!x.npy"


def test_user_trust_does_not_reach_past_its_name(tmp_path: Path) -> None:
    """Trusting one class lets that class pass and nothing else; names that run code cannot be trusted."""
    from trainguard.errors import Misuse

    path = tmp_path / "x.pkl"
    path.write_bytes(stream(named("mine.models", "Config") + b")\x81" + named("mine.models", "Other") + b")\x81\x86"))
    report = vet(path, ScanPolicy(trust=("mine.models.Config instance",)))
    assert report.trust_lines == ("mine.models.Other instance",)
    both = ScanPolicy(trust=("mine.models.Config instance", "mine.models.Other instance"))
    assert vet(path, both).verdict is Verdict.SAFE
    with pytest.raises(Misuse):
        vet(path, ScanPolicy(trust=("os.system call",)))
