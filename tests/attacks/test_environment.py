"""What an insider can change before step 0, one test for each row of the catalogue, and the control that misses it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from trainguard.appraise.environment import compare, intrinsic
from trainguard.finding import Finding
from trainguard.lockfile import Lock, Measurement, make_lock
from trainguard.measure import measure
from trainguard.policy import Approval, Policy
from trainguard.testing.installed import InstalledEnvironment

SCRIPT = "import helper, tinyoptim\nprint('rate', tinyoptim.RATE, 'scale', helper.SCALE)\n"


@dataclass
class Job:
    """A job that was approved, and what an attack makes of it."""

    place: InstalledEnvironment
    cache: Path
    command: list[str] = field(default_factory=lambda: ["python", "train.py"])
    variables: dict[str, str] = field(default_factory=dict)
    lock: Lock | None = None

    def measured(self, **options: object) -> Measurement:
        return measure(
            self.command,
            cwd=self.place.job,
            env=self.place.environment | self.variables,
            cache=self.cache,
            against=self.lock.measurement if self.lock else None,
            read_flags=False,
            **options,  # type: ignore[arg-type]
        )

    def approve(self, approvals: Sequence[Approval] = (), **options: object) -> None:
        key = ec.generate_private_key(ec.SECP256R1())
        self.lock = make_lock(self.measured(**options), key, made="2026-11-22T00:00:00Z", approvals=approvals)
        assert self.findings() == []

    def findings(self) -> list[Finding]:
        assert self.lock is not None
        return list(compare(self.lock, self.measured(), Policy()))

    def only(self) -> Finding:
        (finding,) = self.findings()
        return finding


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One stat cache for the standard library's thousands of files; packages and code are new in every test."""
    return tmp_path_factory.mktemp("state") / "cache"


@pytest.fixture
def job(tmp_path: Path, cache: Path) -> Job:
    place = InstalledEnvironment(tmp_path)
    place.install(
        "tinyoptim",
        "1.0",
        {"tinyoptim/__init__.py": "from tinyoptim.adamw import RATE\n", "tinyoptim/adamw.py": "RATE = 0.1\n"},
        scripts={"tinyrun": "import runpy, sys\nsys.argv = sys.argv[1:]\nrunpy.run_path(sys.argv[0])\n"},
    )
    (place.job / "train.py").write_text(SCRIPT)
    (place.job / "helper.py").write_text("SCALE = 1\n")
    return Job(place, cache)


def test_a_sitecustomize_on_the_path_is_found_while_every_record_agrees(job: Job) -> None:
    """A1: start-up code nobody imports."""
    job.approve()
    (job.place.site / "sitecustomize.py").write_text("import builtins\nbuiltins.MARKER = 1\n")
    assert job.place.record_agrees()
    assert job.place.run("-c", "print(MARKER)") == "1\n"
    finding = job.only()
    assert (finding.outcome, finding.techniques[0]) == ("violated", "A1")
    assert finding.subject.path == "site-packages/sitecustomize.py"


def test_a_usercustomize_in_the_users_own_folder_is_found(job: Job) -> None:
    """A1: the user's site folder counts when the interpreter would look there."""
    (job.place.prefix / "pyvenv.cfg").unlink()
    job.command = [sys.executable if sys.prefix == sys.base_prefix else str(Path(sys._base_executable)), "train.py"]  # type: ignore[attr-defined]
    job.approve()
    version = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    user = job.place.home / ".local" / "lib" / version / "site-packages"
    user.mkdir(parents=True)
    (user / "usercustomize.py").write_text("import builtins\nbuiltins.MARKER = 1\n")
    techniques = {technique for finding in job.findings() for technique in finding.techniques}
    assert "A1" in techniques


def test_an_executable_pth_listed_in_record_with_the_right_hash_is_found(job: Job) -> None:
    """A2: a start-up line that RECORD vouches for, as in the litellm incident."""
    job.approve()
    (job.place.site / "tinyoptim_init.pth").write_text("import builtins; builtins.MARKER = 1\n")
    record = next(job.place.site.glob("tinyoptim-*.dist-info")) / "RECORD"
    record.write_text("tinyoptim_init.pth,,\n" + record.read_text())
    job.place.rewrite_records()
    assert job.place.record_agrees()
    assert job.place.run("-c", "print(MARKER)") == "1\n"
    finding = job.only()
    assert finding.techniques[0] == "A2"
    assert "RECORD of tinyoptim lists it with this very hash" in finding.message
    assert "builtins.MARKER" in finding.message


def test_a_start_file_is_found_on_any_python(job: Job) -> None:
    """A2: PEP 829 entry points run at start from Python 3.15 on; an environment may be prepared before."""
    job.approve()
    (job.place.site / "late.start").write_text("tinyoptim.adamw:main\n")
    assert job.only().techniques[0] == "A2"


def test_a_preloaded_library_is_found(job: Job, tmp_path: Path) -> None:
    """A3: what the dynamic loader is told to load first."""
    job.approve()
    library = tmp_path / "libharmless.so"
    library.write_bytes(b"\x7fELF not really\n")
    job.variables["LD_PRELOAD"] = str(library)
    assert job.place.record_agrees()
    findings = job.findings()
    assert {finding.techniques[0] for finding in findings} == {"A3"}
    assert any(finding.subject.path == "LD_PRELOAD" for finding in findings)


def test_a_changed_native_library_of_a_package_is_found_with_record_rewritten(job: Job) -> None:
    """A3: an edited `.so` inside a wheel."""
    job.place.install("native", "2.0", {"native/__init__.py": "", "native/_core.so": "ELF\n"})
    job.approve()
    job.place.edit("native/_core.so", "elf\n")
    job.place.rewrite_records()
    assert job.place.record_agrees()
    assert job.only().techniques[0] == "A3"


def test_a_warning_filter_that_imports_is_found(job: Job) -> None:
    """A4: environment variables are code (PYTHONWARNINGS imports the module of its category)."""
    job.approve()
    job.variables["PYTHONWARNINGS"] = "ignore::helper.Category"
    finding = job.only()
    assert (finding.outcome, finding.techniques[0], finding.subject.path) == ("violated", "A4", "PYTHONWARNINGS")


def test_an_edited_installed_file_is_found_and_a_stale_record_is_said(job: Job) -> None:
    """A5 (a): RECORD left as it was."""
    job.approve()
    job.place.edit("tinyoptim/adamw.py", "RATE = 0.2\n", keep_times=True)
    assert not job.place.record_agrees()
    finding = job.only()
    assert (finding.outcome, finding.techniques) == ("violated", ("A5",))
    assert finding.subject.path == "site-packages/tinyoptim/adamw.py"
    assert "neither the lock nor the RECORD" in finding.message


def test_an_edited_installed_file_is_found_when_record_was_recomputed_and_pip_check_is_green(job: Job) -> None:
    """A5 (b): RECORD agrees with the edit; only the lock does not. Size and mtime are as before."""
    job.approve()
    job.place.edit("tinyoptim/adamw.py", "RATE = 0.2\n", keep_times=True)
    job.place.rewrite_records()
    assert job.place.record_agrees()
    assert _pip_check_is_green(job.place)
    assert "rate 0.2" in job.place.run("-B", "train.py")
    finding = job.only()
    assert (finding.outcome, finding.techniques) == ("violated", ("A5",))
    assert "RECORD of tinyoptim 1.0 agrees with the edit" in finding.message
    assert list(intrinsic(job.measured())) == []


def _pip_check_is_green(place: InstalledEnvironment) -> bool:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(place.python), "check"]
    return subprocess.run(command, capture_output=True, check=False, timeout=60).returncode == 0


def test_an_edited_standard_library_module_is_found(job: Job, tmp_path: Path) -> None:
    """A5: `random.py` belongs to no RECORD. (A copy of the interpreter's prefix stands in for the shared one.)"""
    approved = job.measured()
    tree = approved.trees["stdlib"]
    job.approve()
    changed = measure_with(approved, "stdlib", "random.py", "0" * 64 + " 1")
    assert tree.files["random.py"] != changed.trees["stdlib"].files["random.py"]
    assert job.lock is not None
    (finding,) = compare(job.lock, changed, Policy())
    assert (finding.outcome, finding.techniques, finding.subject.path) == ("violated", ("A5",), "stdlib/random.py")


def measure_with(measurement: Measurement, tree: str, path: str, value: str) -> Measurement:
    """`measurement` with one file of other content."""
    found = measurement.trees[tree]
    changed = msgspec.structs.replace(found, files=found.files | {path: value})
    return msgspec.structs.replace(measurement, trees=measurement.trees | {tree: changed})


def _compiled(job: Job) -> Path:
    """Have the job write its bytecode, and return that of the installed module."""
    job.place.run("train.py")
    return Path(next((job.place.site / "tinyoptim" / "__pycache__").glob("adamw.*.pyc")))


def _poison(job: Job, pyc: Path, source: str) -> None:
    """Put other code behind the header of `pyc`, compiled by the job's own Python; times are put back."""
    before = pyc.stat()
    code = (
        "import marshal,sys; p=sys.argv[1]; head=open(p,'rb').read()[:16];"
        "open(p,'wb').write(head+marshal.dumps(compile(sys.argv[2],'adamw.py','exec')))"
    )
    job.place.run("-c", code, str(pyc), source)
    os.utime(pyc, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_a_bytecode_edit_is_found_while_all_sources_records_and_times_are_as_before(job: Job) -> None:
    """A6: Python runs the `.pyc`, and no RECORD lists its hash."""
    pyc = _compiled(job)
    job.approve()
    sources = job.place.source_hashes()
    _poison(job, pyc, "RATE = 0.2\n")
    assert job.place.source_hashes() == sources
    assert job.place.record_agrees()
    assert "rate 0.2" in job.place.run("train.py")
    finding = job.only()
    assert (finding.outcome, finding.techniques) == ("violated", ("A6",))
    assert finding.subject.path == f"site-packages/tinyoptim/__pycache__/{pyc.name}"


def test_a_bytecode_file_that_is_new_since_the_lock_and_wrong_is_found(job: Job) -> None:
    """A6: the lock was made before anything was compiled."""
    job.approve()
    pyc = _compiled(job)
    assert job.findings() == []
    _poison(job, pyc, "RATE = 0.3\n")
    assert job.only().techniques == ("A6",)


def test_poisoned_bytecode_of_the_jobs_own_module_is_found(job: Job) -> None:
    """A6 in the code tree."""
    job.approve()
    job.place.run("train.py")
    pyc = next((job.place.job / "__pycache__").glob("helper.*.pyc"))
    _poison(job, pyc, "SCALE = 2\n")
    assert "scale 2" in job.place.run("train.py")
    finding = job.only()
    assert (finding.techniques, finding.subject.path) == (("A6",), f"__pycache__/{pyc.name}")


def test_bytecode_that_python_never_checks_and_bytecode_without_source_are_found(job: Job) -> None:
    """A6: PEP 552 unchecked-hash, and a sourceless module."""
    job.approve()
    job.place.run(
        "-c",
        "import py_compile as p; p.compile('helper.py', invalidation_mode=p.PycInvalidationMode.UNCHECKED_HASH);"
        "p.compile('helper.py', cfile='orphan.pyc')",
    )
    paths = {finding.subject.path: finding for finding in job.findings()}
    assert all(finding.techniques[0] == "A6" for finding in paths.values())
    assert "orphan.pyc" in paths
    assert any(path is not None and path.startswith("__pycache__/helper.") for path in paths)


def test_a_module_that_hides_an_installed_one_is_found(job: Job) -> None:
    """A7: the script's folder stands first on sys.path."""
    job.approve()
    (job.place.job / "tinyoptim.py").write_text("RATE = 9\n")
    assert job.place.record_agrees()
    assert "rate 9" in job.place.run("-B", "train.py")
    finding = job.only()
    assert (finding.outcome, finding.techniques[0], finding.subject.path) == ("violated", "A7", "tinyoptim.py")


def test_a_module_that_hides_one_of_the_standard_library_is_found_through_pythonpath(job: Job, tmp_path: Path) -> None:
    """A7: an earlier entry of PYTHONPATH."""
    job.approve()
    (tmp_path / "early").mkdir()
    (tmp_path / "early" / "random.py").write_text("SEED = 4\n")
    job.variables["PYTHONPATH"] = str(tmp_path / "early")
    techniques = [finding.techniques[0] for finding in job.findings()]
    assert techniques[0] == "A7"
    assert "A4" in techniques


def test_remote_modules_of_the_hub_that_changed_are_found(job: Job) -> None:
    """A8: code that is kept by name in a cache and imported from there."""
    modules = job.place.home / ".cache" / "huggingface" / "modules" / "transformers_modules"
    modules.mkdir(parents=True)
    (modules / "modeling.py").write_text("SCALE = 1\n")
    job.approve()
    (modules / "modeling.py").write_text("SCALE = 2\n")
    assert job.only().techniques[0] == "A8"


def test_a_compiled_code_cache_open_to_every_account_is_suspicious(job: Job) -> None:
    """A8: compiled kernels are taken from there unseen."""
    job.approve()
    folder = job.place.home / ".triton" / "cache"
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    finding = job.only()
    assert (finding.outcome, finding.techniques) == ("suspicious", ("A8",))


def test_an_entry_point_that_torch_would_call_is_found(job: Job, tmp_path: Path) -> None:
    """A9: a folder with entry_points.txt on the path is enough; nothing is installed."""
    job.approve()
    info = job.place.job / "innocent-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Name: innocent\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[torch.backends]\ninnocent = helper:autoload\n")
    assert job.place.record_agrees()
    finding = job.only()
    assert (finding.outcome, finding.techniques[0]) == ("violated", "A9")
    assert "torch.backends: innocent = helper:autoload" in finding.message
    (alone,) = intrinsic(job.measured())
    assert alone.techniques == ("A9",)


@pytest.mark.parametrize(
    ("name", "value", "technique", "outcome"),
    [
        ("NVIDIA_TF32_OVERRIDE", "1", "A10", "violated"),
        ("PYTHONOPTIMIZE", "1", "A10", "violated"),
        ("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1", "A10", "violated"),
        ("CUBLAS_WORKSPACE_CONFIG", ":16:8", "A10", "violated"),
        ("PYTHONHASHSEED", "7", "D1", "violated"),
        ("CUDA_LAUNCH_BLOCKING", "1", "A11", "suspicious"),
        ("OMP_NUM_THREADS", "1", "A11", "suspicious"),
        ("TORCHINDUCTOR_CACHE_DIR", "/shared/cache", "A8", "suspicious"),
        ("NCCL_NET_PLUGIN", "other", "A4", "violated"),
        ("CUDA_INJECTION64_PATH", "/shared/lib.so", "A4", "violated"),
        ("PYTHONPYCACHEPREFIX", "/shared/pyc", "A6", "violated"),
    ],
)
def test_a_variable_that_changes_numbers_speed_or_code_is_found(
    job: Job, name: str, value: str, technique: str, outcome: str
) -> None:
    """A4, A8, A10, A11: set for one rank only, no file changes."""
    job.approve()
    sources = job.place.source_hashes()
    job.variables[name] = value
    assert (job.place.source_hashes(), job.place.record_agrees()) == (sources, True)
    assert [(f.techniques[0], f.outcome) for f in job.findings() if f.subject.path == name] == [(technique, outcome)]


def test_a_changed_console_script_in_the_launch_chain_is_found(job: Job) -> None:
    """A12: what the launcher does before the script starts."""
    job.command = ["tinyrun", "train.py"]
    job.approve()
    script = job.place.prefix / "bin" / "tinyrun"
    script.write_text(script.read_text() + "# one line more\n")
    finding = job.only()
    assert (finding.outcome, finding.techniques[0], finding.subject.path) == ("violated", "A12", str(script))


def test_a_changed_shell_script_that_starts_the_job_is_found(job: Job) -> None:
    """A12: the wrapper around the wrapper."""
    script = job.place.job / "start"
    script.write_text("#!/bin/sh\nexec python train.py\n")
    script.chmod(0o755)
    job.command = ["./start"]
    job.approve()
    script.write_text("#!/bin/sh\nexport OMP_NUM_THREADS=1\nexec python train.py\n")
    assert "A12" in job.only().techniques


def test_a_dependency_of_another_version_is_one_finding_with_both_versions(job: Job) -> None:
    """A13: upgraded, removed and added packages, once each."""
    job.place.install("gone", "0.1", {"gone.py": "A = 1\n"})
    job.approve()
    job.place.install("tinyoptim", "1.1", {"tinyoptim/__init__.py": "RATE = 0.1\n", "tinyoptim/more.py": "B = 1\n"})
    job.place.uninstall("gone")
    job.place.install("lookalike", "9.0", {"lookalike/__init__.py": ""})
    assert job.place.record_agrees()
    found = {finding.subject.path: (finding.techniques, finding.expected, finding.found) for finding in job.findings()}
    assert found == {
        "tinyoptim": (("A13",), "1.0", "1.1"),
        "gone": (("A13",), "0.1", "not installed"),
        "lookalike": (("A13",), "not installed", "9.0"),
    }


def test_a_swap_between_lock_and_preflight_is_found_although_size_and_times_are_restored(job: Job) -> None:
    """A13: swap-and-restore; the stat cache must not be what hides it."""
    job.approve()
    before = job.place.site / "tinyoptim" / "adamw.py"
    info = before.stat()
    job.measured()
    swapped = before.with_suffix(".swap")
    swapped.write_text("RATE = 0.7\n")
    os.utime(swapped, ns=(info.st_atime_ns, info.st_mtime_ns))
    swapped.rename(before)
    assert (before.stat().st_size, before.stat().st_mtime_ns) == (info.st_size, info.st_mtime_ns)
    assert [finding.techniques for finding in job.findings()] == [("A5",)]
    job.place.edit("tinyoptim/adamw.py", "RATE = 0.1\n", keep_times=True)
    assert job.findings() == []


def test_another_python_is_one_finding(job: Job) -> None:
    """A13, A12: the interpreter is part of what was approved."""
    job.approve()
    found = job.measured()
    assert found.interpreter is not None
    assert job.lock is not None
    other = msgspec.structs.replace(found, interpreter=msgspec.structs.replace(found.interpreter, version="3.9.1"))
    (finding,) = compare(job.lock, other, Policy())
    assert finding.techniques == ("A13", "A12")


def test_one_uncommitted_line_in_the_approved_tree_is_found(job: Job) -> None:
    """B1: the commit is the approved one, the working tree is not."""
    git = ["git", "-c", "user.name=victim-a", "-c", "user.email=victim-a@example.org", "-C", str(job.place.job)]
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "approved"]):
        subprocess.run([*git, *words], check=True, capture_output=True)
    job.approve()
    (job.place.job / "helper.py").write_text("SCALE = 2\n")
    head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    assert job.lock is not None
    assert head == job.lock.measurement.code.commit
    finding = job.only()
    assert (finding.outcome, finding.techniques, finding.subject.path) == ("violated", ("B1",), "helper.py")
    assert "not committed" in finding.message


def test_a_new_module_in_the_code_tree_and_a_changed_config_are_found(job: Job) -> None:
    """B1: what the script may import or read."""
    (job.place.job / "config.yaml").write_text("lr: 0.1\n")
    job.approve()
    (job.place.job / "plugin.py").write_text("A = 1\n")
    (job.place.job / "config.yaml").write_text("lr: 0.2\n")
    assert {(f.subject.path, f.techniques) for f in job.findings()} == {
        ("plugin.py", ("B1",)),
        ("config.yaml", ("B1",)),
    }


@pytest.mark.parametrize(
    ("words", "technique"),
    [(["--seed", "2"], "D1"), (["--lr=0.5"], "C3"), (["--grad-clip", "9"], "C2"), (["--name", "x"], "B1")],
)
def test_other_arguments_are_found_with_the_technique_they_suggest(job: Job, words: list[str], technique: str) -> None:
    """B1 and what the changed option decides."""
    job.approve()
    job.command += words
    finding = job.only()
    assert (finding.outcome, finding.techniques[0]) == ("violated", technique)


def test_ten_changed_labels_in_a_data_file_named_by_the_command_are_found(job: Job) -> None:
    """D5: the same number of rows and bytes."""
    data = job.place.job / "rows.csv"
    data.write_text("".join(f"{index},{index % 2}\n" for index in range(100)))
    job.command += ["--data", "rows.csv"]
    job.approve()
    size = data.stat().st_size
    data.write_text("".join(f"{index},{(index % 2) ^ (index < 10)}\n" for index in range(100)))
    assert data.stat().st_size == size
    finding = job.only()
    assert (finding.outcome, finding.techniques) == ("violated", ("D5",))


def test_a_shard_that_changed_vanished_or_came_in_a_declared_folder_is_found(job: Job, tmp_path: Path) -> None:
    """D5: a folder the command does not name, declared with --data."""
    shards = tmp_path / "shards"
    shards.mkdir()
    for index in range(3):
        (shards / f"part-{index}.bin").write_bytes(bytes([index]) * 64)
    job.approve(data_paths=[str(shards)])
    (shards / "part-0.bin").write_bytes(b"x" * 64)
    (shards / "part-1.bin").unlink()
    (shards / "part-9.bin").write_bytes(b"y")
    findings = job.findings()
    assert {finding.techniques for finding in findings} == {("D5",)}
    assert len(findings) == 3


def test_two_swapped_token_ids_are_found(job: Job) -> None:
    """D6: a vocabulary beside the code."""
    vocabulary = job.place.job / "vocab.json"
    vocabulary.write_text('{"a": 0, "b": 1}\n')
    job.approve()
    vocabulary.write_text('{"a": 1, "b": 0}\n')
    assert job.only().techniques[0] == "D6"


def test_edited_start_weights_are_found(job: Job) -> None:
    """E3: the checkpoint the command starts from."""
    weights = job.place.job / "start.pt"
    weights.write_bytes(b"\x00" * 256)
    job.command += ["--resume", "start.pt"]
    job.approve()
    weights.write_bytes(b"\x00" * 255 + b"\x01")
    assert job.only().techniques == ("E3",)


def test_an_approved_place_is_left_out_and_nothing_else(job: Job) -> None:
    """An approval explains one file, not its neighbour."""
    (job.place.job / "config.yaml").write_text("lr: 0.1\n")
    job.approve([Approval(check="environment", place="config.yaml")])
    (job.place.job / "config.yaml").write_text("lr: 0.2\n")
    (job.place.job / "helper.py").write_text("SCALE = 2\n")
    assert job.only().subject.path == "helper.py"


def test_what_could_not_be_measured_is_never_green(job: Job) -> None:
    """A file that cannot be read is not checked, with its reason."""
    job.approve()
    os.mkfifo(job.place.site / "tinyoptim" / "pipe")
    finding = job.only()
    assert finding.outcome == "not_checked"
    assert "neither a file nor a folder" in finding.message


def test_without_an_attack_there_is_no_finding(job: Job) -> None:
    """The same job, measured again."""
    job.approve()
    assert job.findings() == []
    assert list(intrinsic(job.measured())) == []
