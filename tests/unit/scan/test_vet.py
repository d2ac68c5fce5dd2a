"""Paths, folders, budgets and the words of a report."""

from __future__ import annotations

import json
import os
import pickle
import resource
import subprocess
import sys
import zlib
from pathlib import Path

import msgspec
import pytest

from trainguard.digest import sha256_hex
from trainguard.errors import Misuse
from trainguard.scan import Report, ScanPolicy, Verdict, parse_trust, vet, vet_file, worst
from trainguard.scan.limits import VERSION
from trainguard.testing.forge import BENIGN, named, stream, torch_zip, touch, zip_of


def test_verdicts_are_ordered() -> None:
    """safe < unknown < error < unsafe; the worst decides."""
    assert [verdict.value for verdict in sorted(Verdict, key=lambda v: v.rank)] == [
        "safe",
        "unknown",
        "error",
        "unsafe",
    ]
    assert worst([Verdict.SAFE, Verdict.ERROR, Verdict.UNKNOWN]) is Verdict.ERROR
    assert worst([]) is Verdict.SAFE


def test_verdict_is_bound_to_the_bytes_the_policy_and_the_loader(tmp_path: Path) -> None:
    """sha256 of the file, digest of the policy, and who may load it."""
    path = tmp_path / "model.pt"
    path.write_bytes(torch_zip(BENIGN))
    report = vet(path)
    (file,) = report.files
    assert file.sha256 == sha256_hex(path.read_bytes())
    assert (file.format, file.loader, file.second_opinion) == ("torch-zip", "torch", "agrees")
    assert report.policy == ScanPolicy().fingerprint != ScanPolicy(tier="weights").fingerprint
    assert vet(path, ScanPolicy(digest="blake3")).files[0].blake3


def test_report_round_trips_through_json(tmp_path: Path) -> None:
    """A report is a frozen value that JSON can hold and give back."""
    (tmp_path / "a.pkl").write_bytes(stream(touch("x")))
    report = vet(tmp_path)
    assert msgspec.json.decode(msgspec.json.encode(report), type=Report) == report
    assert b'"global":"posix.mkdir"' in msgspec.json.encode(report)
    with pytest.raises(AttributeError):
        report.verdict = Verdict.SAFE  # type: ignore[misc]


def test_open_descriptor_is_judged_and_left_as_it_was(tmp_path: Path) -> None:
    """vet_file takes the descriptor that will be loaded from, and does not move it."""
    path = tmp_path / "x"
    path.write_bytes(BENIGN)
    with path.open("rb") as file:
        file.read(3)
        assert vet_file(file.fileno()).verdict is Verdict.SAFE
        assert file.tell() == 3
        assert os.lseek(file.fileno(), 0, os.SEEK_CUR) == len(BENIGN)


def _only_reason(path: Path) -> str:
    report = vet(path)
    assert report.verdict is Verdict.ERROR
    reasons = [*report.reasons, *(reason for file in report.files for reason in file.reasons)]
    (reason,) = reasons
    return reason.what


def test_what_is_no_file_gets_one_sentence(tmp_path: Path) -> None:
    """Missing, FIFO, socket folder, loop, empty file, empty folder: an error with its reason, never clean."""
    assert "No such file" in _only_reason(tmp_path / "missing")
    os.mkfifo(tmp_path / "fifo")
    assert "a FIFO" in _only_reason(tmp_path / "fifo")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert "symbolic links" in _only_reason(tmp_path / "loop")
    (tmp_path / "empty").touch()
    assert "empty file" in _only_reason(tmp_path / "empty")
    (tmp_path / "folder").mkdir()
    assert "empty folder" in _only_reason(tmp_path / "folder")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_file_is_an_error(tmp_path: Path) -> None:
    """No permission is not clean."""
    path = tmp_path / "x"
    path.write_bytes(BENIGN)
    path.chmod(0)
    assert "Permission denied" in _only_reason(path)


def test_file_that_changes_while_read_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Longer, shorter or rewritten during the scan: no verdict."""
    import importlib

    from trainguard.scan import vet as package_function

    engine = importlib.import_module("trainguard.scan.vet")
    assert package_function is engine.vet
    path = tmp_path / "x"
    real = engine.judge

    def meddle(job: object) -> tuple[str, str]:
        os.truncate(path, size)
        return real(job)

    for size in (3, 4000):
        path.write_bytes(pickle.dumps(list(range(400))))
        monkeypatch.setattr(engine, "judge", meddle)
        report = vet(path)
        assert report.verdict is Verdict.ERROR, size
        assert "while it was read" in report.files[0].reasons[0].what


def test_whole_folder_is_vetted(tmp_path: Path) -> None:
    """Every file whatever its name, dot files, sub-folders, links to files; each once."""
    (tmp_path / "sub" / ".deep").mkdir(parents=True)
    for name in (".hidden", "no_extension", "sub/x.safetensors", "sub/.deep/.metadata"):
        (tmp_path / name).write_bytes(BENIGN)
    (tmp_path / "link").symlink_to(tmp_path / ".hidden")
    (tmp_path / "sub" / "up").symlink_to(tmp_path)
    report = vet(tmp_path)
    assert report.verdict is Verdict.SAFE
    assert sorted(file.path for file in report.files) == [
        ".hidden",
        "link",
        "no_extension",
        "sub/.deep/.metadata",
        "sub/x.safetensors",
    ]


def test_link_to_a_folder_outside_is_not_silently_left_out(tmp_path: Path) -> None:
    """What was not looked at is said."""
    (tmp_path / "inside").mkdir()
    (tmp_path / "inside" / "a").write_bytes(BENIGN)
    (tmp_path / "outside").mkdir()
    (tmp_path / "inside" / "b").symlink_to(tmp_path / "outside")
    report = vet(tmp_path / "inside")
    assert report.verdict is Verdict.UNKNOWN
    assert "outside" in report.reasons[0].what


def test_too_many_files_is_an_error(tmp_path: Path) -> None:
    """The folder budget."""
    for number in range(5):
        (tmp_path / str(number)).write_bytes(BENIGN)
    assert vet(tmp_path, ScanPolicy(files=3)).verdict is Verdict.ERROR


def test_findings_follow_the_verdicts(tmp_path: Path) -> None:
    """violated for unsafe, suspicious for unknown, not_checked for error; check, technique, path and run."""
    (tmp_path / "model.pkl").write_bytes(stream(touch("x")))
    (tmp_path / "rng_state.pth").write_bytes(torch_zip(stream(named("mine", "Thing") + b")\x81")))
    os.mkfifo(tmp_path / "fifo")
    findings = {finding.subject.path: finding for finding in vet(tmp_path).to_findings(run="r1")}
    assert {path: finding.outcome for path, finding in findings.items()} == {
        "model.pkl": "violated",
        "rng_state.pth": "suspicious",
        "fifo": "not_checked",
    }
    assert findings["model.pkl"].techniques == ("E1",)
    assert findings["rng_state.pth"].techniques == ("E2",)
    assert findings["fifo"].techniques == ()
    assert {(finding.check, finding.subject.run) for finding in findings.values()} == {("scan", "r1")}
    assert vet(tmp_path / "model.pkl").to_findings()[0].found == "posix.mkdir"


def test_clean_folder_has_no_findings(tmp_path: Path) -> None:
    """Quiet."""
    (tmp_path / "model.pkl").write_bytes(BENIGN)
    assert vet(tmp_path).to_findings(run="r1") == []


def test_trust_file_is_read_strictly() -> None:
    """One name a line with its use, comments, an optional hash; anything else is refused with its line."""
    data = b"# mine\nmine.Config instance\nmine.make call sha256:" + b"a" * 64 + b"  # why\n\n"
    assert parse_trust(data, where="t") == ("mine.Config instance", "mine.make call sha256:" + "a" * 64)
    for bad in (b"mine.Config", b"Config instance", b"mine.* instance", b"os.system call", b"a.b use", b"\xff"):
        with pytest.raises(Misuse):
            parse_trust(bad, where="t")


def test_trust_bound_to_a_hash_counts_for_that_file_only(tmp_path: Path) -> None:
    """The same class in another file stays unknown."""
    path = tmp_path / "a.pkl"
    path.write_bytes(stream(named("mine", "Config") + b")\x81"))
    good = f"mine.Config instance sha256:{sha256_hex(path.read_bytes())}"
    assert vet(path, ScanPolicy(trust=(good,))).verdict is Verdict.SAFE
    assert vet(path, ScanPolicy(trust=("mine.Config instance sha256:" + "0" * 64,))).verdict is Verdict.UNKNOWN


def test_trusting_an_instance_does_not_trust_its_calls(tmp_path: Path) -> None:
    """instance allows no constructor call; call allows both."""
    path = tmp_path / "a.pkl"
    path.write_bytes(stream(named("mine", "Config") + b"N\x85R"))
    assert vet(path, ScanPolicy(trust=("mine.Config instance",))).verdict is Verdict.UNSAFE
    assert vet(path, ScanPolicy(trust=("mine.Config call",))).verdict is Verdict.SAFE


def test_tiers_widen(tmp_path: Path) -> None:
    """A name of a higher tier is unknown below it, and the reason says where it is listed."""
    path = tmp_path / "a.pkl"
    path.write_bytes(stream(named("torch.nn.modules.linear", "Linear") + b")\x81}b"))
    assert vet(path, ScanPolicy(tier="framework")).verdict is Verdict.SAFE
    report = vet(path)
    assert report.verdict is Verdict.UNKNOWN
    assert "tier framework" in report.files[0].reasons[0].what


def test_reasons_are_printable(tmp_path: Path) -> None:
    """Names from a file cannot move a terminal's cursor."""
    path = tmp_path / "a.pkl"
    path.write_bytes(stream(named("evil\x1b[2J", "na\u202eme") + b")R"))
    for reason in vet(path).files[0].reasons:
        assert reason.what.isprintable()


def test_unlisted_names_keep_being_found_after_the_first(tmp_path: Path) -> None:
    """The report names all of them at once."""
    path = tmp_path / "a.pkl"
    path.write_bytes(stream(b"(" + named("a", "B") + b")\x81" + named("c", "D") + b")\x81t"))
    assert vet(path).trust_lines == ("a.B instance", "c.D instance")


# Second opinion --------------------------------------------------------------------------------------------------


def test_second_opinion_refuses_what_it_reads_differently(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When CPython's unpickler asks for another name than the machine saw, the file is unsafe."""
    from trainguard.scan import second_opinion

    path = tmp_path / "a.pkl"
    path.write_bytes(stream(named("collections", "OrderedDict") + b")R"))
    assert vet(path).verdict is Verdict.SAFE
    real = second_opinion.read

    def other(data: bytes, *, persistent: bool) -> second_opinion.Opinion:
        opinion = real(data, persistent=persistent)
        opinion.globals.append(("os", "system"))
        return opinion

    monkeypatch.setattr(second_opinion, "read", other)
    (file,) = vet(path).files
    assert file.verdict is Verdict.UNSAFE
    assert file.reasons[0].rule == "second-opinion"


def test_second_opinion_runs_nothing(tmp_path: Path) -> None:
    """CPython's unpickler with stubs asks for names and leaves the marker alone."""
    from trainguard.scan import second_opinion

    marker = tmp_path / "marker"
    opinion = second_opinion.read(stream(touch(str(marker))), persistent=False)
    assert opinion.globals == [("posix", "mkdir")]
    assert opinion.error is None
    assert not marker.exists()


# Bombs -----------------------------------------------------------------------------------------------------------

PAYLOAD = touch("never")


def _bomb(name: str) -> bytes:
    head = b"\x80\x04"
    if name == "opcodes":
        return head + b"N0" * 2_000_000 + PAYLOAD + b"."
    if name == "lists":
        return head + b"]" * 4_000_000 + PAYLOAD + b"."
    if name == "memo":
        return head + b"]" + b"\x94" * 4_000_000 + PAYLOAD + b"."
    if name == "nested":
        return head + b")" + b"\x85" * 3_000_000 + PAYLOAD + b"."
    if name == "doubling":
        return head + b"]q\0" + b"h\0h\0e" * 1_000_000 + PAYLOAD + b"."
    if name == "zlib":
        packer, mebibyte = zlib.compressobj(9), bytes(1 << 20)
        return b"".join(packer.compress(mebibyte) for _ in range(300)) + packer.compress(PAYLOAD) + packer.flush()
    if name == "zip":
        import zipfile

        return zip_of([("archive/data.pkl", bytes(1 << 27))], compression=zipfile.ZIP_DEFLATED)
    if name == "members":
        return zip_of([(f"m{number}", b"") for number in range(20_000)] + [("x.pkl", head + PAYLOAD + b".")])
    if name == "json":
        return b"[" * 3_000_000
    return b"PK\3\4" + bytes(1 << 20)


BOMB_SCRIPT = """
import sys, time
from trainguard.scan import vet
report = vet(sys.argv[1])
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(report.verdict.value, time.process_time(), int(peak.split()[1]) / 1024)
"""
"""VmHWM, because ru_maxrss would begin with the size of the process that started this one."""


@pytest.mark.parametrize(
    "name", ["opcodes", "lists", "memo", "nested", "doubling", "zlib", "zip", "members", "json", "header"]
)
def test_bomb_is_bounded_and_never_clean(tmp_path: Path, name: str) -> None:
    """At most 10 CPU seconds and 256 MiB, whatever the file; and never safe."""
    path = tmp_path / "bomb"
    path.write_bytes(_bomb(name))
    done = subprocess.run(
        [sys.executable, "-c", BOMB_SCRIPT, str(path)], capture_output=True, text=True, check=True, timeout=100
    )
    verdict, seconds, mebibytes = done.stdout.split()
    assert verdict in ("unsafe", "error", "unknown")
    assert float(seconds) <= 10
    assert float(mebibytes) <= 256


def test_large_sparse_checkpoint_is_judged_without_holding_it(tmp_path: Path) -> None:
    """Tensor bytes are hashed in passing and never kept."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    path = tmp_path / "big.npy"
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (67108864,), }"
    header += b" " * (118 - 1 - len(header)) + b"\n"
    with path.open("wb") as file:
        file.write(b"\x93NUMPY\1\0" + len(header).to_bytes(2, "little") + header)
        file.truncate(10 + len(header) + 4 * 67_108_864)
    assert vet(path).verdict is Verdict.SAFE
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 40_000


# The fuzz, for a moment ------------------------------------------------------------------------------------------


def _fuzz():
    import importlib.util

    path = Path(__file__).parents[3] / "bench" / "fuzz_scan.py"
    spec = importlib.util.spec_from_file_location("fuzz_scan", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_moment_of_fuzzing_finds_no_divergence() -> None:
    """Machine, C and Python unpickler agree on every mutant the machine calls safe."""
    counts = _fuzz().fuzz(seconds=300, seed=11, mutants=1500)
    assert counts["mutants"] == 1500
    assert counts["safe"] > 50
    assert counts["divergences"] == []
    assert counts.get("caught", []) == []


def test_the_fuzz_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that overlooks names is caught by the fuzz."""
    fuzz = _fuzz()
    real = fuzz.machine_reads

    def blind(data: bytes, loader: object):
        trace = real(data, loader)
        if trace is not None:
            trace.raw_globals.clear()
        return trace

    monkeypatch.setattr(fuzz, "machine_reads", blind)
    counts = fuzz.fuzz(seconds=300, seed=3, mutants=500)
    assert counts.get("caught") or counts["divergences"]


def test_report_json_is_plain(tmp_path: Path) -> None:
    """What the command prints with --json is the report and nothing else."""
    (tmp_path / "a.pkl").write_bytes(BENIGN)
    assert json.loads(msgspec.json.encode(vet(tmp_path)))["schema"] == "trainguard/scan/v1"


def test_the_specification_shows_this_version() -> None:
    """Whoever compares a report with spec/scan.md sees the version that made it."""
    shown = (Path(__file__).parents[3] / "spec" / "scan.md").read_text()
    assert f'"version": "{VERSION}"' in shown


def test_a_hole_of_terabytes_is_not_read(tmp_path: Path) -> None:
    """Hashing it would take hours and say nothing."""
    path = tmp_path / "model.safetensors"
    path.write_bytes((2).to_bytes(8, "little") + b"{}")
    os.truncate(path, 1 << 42)
    report = vet_file(path)
    assert report.verdict is Verdict.ERROR
    assert "are stored; not read" in report.reasons[0].what
    assert vet(tmp_path).verdict is Verdict.ERROR
