"""The parts of a measurement, one by one: interpreter, packages, start-up files, variables, code root, inputs."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from trainguard.errors import Misuse, Unavailable
from trainguard.lockfile import parse_measurement
from trainguard.measure import bytecode, code, data, measure, numeric, startup, variables
from trainguard.measure.cache import StatCache
from trainguard.measure.interpreter import ask, boot_folder, python_path, where
from trainguard.measure.native import build_id
from trainguard.measure.walk import Walker
from trainguard.testing.installed import InstalledEnvironment


@pytest.fixture
def place(tmp_path: Path) -> InstalledEnvironment:
    made = InstalledEnvironment(tmp_path)
    made.install("tinyoptim", "1.0", {"tinyoptim.py": "RATE = 1\n"})
    (made.job / "train.py").write_text("import tinyoptim\n")
    return made


# -- interpreter ------------------------------------------------------------------------------------------------------


def test_the_interpreter_is_asked_without_any_start_up_file_running(place: InstalledEnvironment) -> None:
    """Neither `.pth` lines, nor sitecustomize, nor variables of the job take part."""
    marker = place.root / "marker"
    line = f"import pathlib; pathlib.Path({str(marker)!r}).touch()\n"
    (place.site / "hook.pth").write_text(line)
    (place.site / "sitecustomize.py").write_text(line)
    (place.job / "usercustomize.py").write_text(line)
    env = place.environment | {"PYTHONPATH": str(place.job), "PYTHONSTARTUP": "x", "PYTHONWARNINGS": "ignore::train.A"}
    found = where(place.python, env)
    measure(["python", "train.py"], cwd=place.job, env=env)
    assert not marker.exists()
    assert found.sites == (str(place.site),)
    assert (found.prefix, found.user) == (str(place.prefix), None)
    assert found.version == ".".join(map(str, sys.version_info[:3]))


@pytest.mark.parametrize("version", ["3.8", "3.9", "3.10", "3.12", "3.13"])
def test_the_probe_runs_on_every_supported_python_there_is(version: str) -> None:
    known = sorted((Path.home() / ".pyenv" / "versions").glob(f"{version}.*/bin/python{version}"))
    python = str(known[-1]) if known else shutil.which(f"python{version}")
    if python is None or subprocess.run([python, "--version"], capture_output=True, check=False).returncode:
        pytest.skip(f"Python {version} is not installed")
    assert where(Path(python), dict(os.environ)).version.startswith(version + ".")


def test_a_program_that_is_no_python_gives_no_answer() -> None:
    with pytest.raises(Unavailable, match="gave no answer"):
        where(Path("/bin/false"), {})


def test_the_guards_own_folder_is_not_on_the_jobs_path(tmp_path: Path) -> None:
    env = {"PYTHONPATH": f"{boot_folder()}:{tmp_path}::lib"}
    assert python_path(env, tmp_path / "job") == [tmp_path, tmp_path / "job", tmp_path / "job" / "lib"]


# -- packages and bytecode --------------------------------------------------------------------------------------------


def test_files_are_listed_under_their_package_and_a_stale_record_is_named(place: InstalledEnvironment) -> None:
    place.install("other", "2.0", {"other/__init__.py": "", "other/a,b.txt": "comma"}, entry_points="[g]\nn = m:f\n")
    place.edit("tinyoptim.py", "RATE = 2\n")
    (place.site / "loose.py").write_text("")
    measurement = measure(["python", "train.py"], cwd=place.job, env=place.environment)
    tiny, other = measurement.distributions["tinyoptim"], measurement.distributions["other"]
    assert (tiny.version, tiny.installer, tiny.mismatched) == ("1.0", "pip", ("tinyoptim.py",))
    assert "other/a,b.txt" in other.files
    assert other.mismatched == ()
    assert set(measurement.trees["site-packages"].files) == {"loose.py"}
    assert [hook.place for hook in measurement.hooks] == ["g: n = m:f"]


def test_a_record_that_points_outside_the_environment_reads_nothing_there(place: InstalledEnvironment) -> None:
    """RECORD is the attacker's: `../../../../secret` is not hashed into a lock."""
    (place.root / "secret").write_text("secret")
    record = next(place.site.glob("*.dist-info")) / "RECORD"
    record.write_text(record.read_text() + "../../../../secret,,\n../../../../../../etc/passwd,,\n")
    measurement = measure(["python", "train.py"], cwd=place.job, env=place.environment)
    assert not [path for path in measurement.distributions["tinyoptim"].files if path.startswith("../../../..")]


def test_a_pipe_in_the_place_of_any_file_we_read_does_not_hold_up_the_measurement(place: InstalledEnvironment) -> None:
    info = next(place.site.glob("*.dist-info"))
    record = (info / "RECORD").read_text() + "../../../bin/pipe,,\n../../../bin/absent,,\n"
    (info / "RECORD").write_text(record)
    (info / "METADATA").unlink()
    for path in (
        place.prefix / "bin" / "pipe",
        info / "METADATA",
        place.site / "x.pth",
        place.job / "usercustomize.py",
    ):
        os.mkfifo(path)
    measurement = measure(["python", "train.py"], cwd=place.job, env=place.environment)
    assert measurement.distributions["tinyoptim"].version == "1.0"
    assert any("neither a file nor a folder" in note for note in measurement.notes)


def test_hostile_records_words_and_names_are_measured_all_the_same(place: InstalledEnvironment) -> None:
    """A cell past the CSV limit, a word too long to be a path, names that are no text, a file nobody may read."""
    info = next(place.site.glob("*.dist-info"))
    (info / "RECORD").write_text('tinyoptim.py,"' + "x" * 200_000 + '",1\n')
    (info / "entry_points.txt").write_bytes(b"[a\n=\xff\n[b]\nc")
    (place.site / "odd.pth").write_bytes(b"import \xff\xfe\n/nowhere\x00\n")
    Path(os.fsdecode(os.fsencode(place.job) + b"/\xff.py")).write_text("a = 1\n")
    (place.job / "rows.csv").write_text("1\n")
    (place.job / "rows.csv").chmod(0)
    words = ["python", "train.py", "x" * 5000, "--data", "y" * 300, os.fsdecode(b"--name=\xff"), "a=" + "z" * 5000]
    measurement = measure(words, cwd=place.job, env=place.environment)
    assert parse_measurement(measurement.encode(), where="blob") == measurement
    assert "\\xff.py" in measurement.trees["code"].files
    assert measure(["python", "-c", "x" * 10_000], cwd=place.job, env=place.environment).launch.kind == "code"


def test_bytecode_is_compared_as_code_and_not_as_bytes(place: InstalledEnvironment) -> None:
    """Compiled under another file name it is the same; a constant of another type or sign is not."""
    answers = {}
    for name, compiled in (("same", "a = 1.0"), ("sign", "a = -1.0"), ("type", "a = 1"), ("doc", "'x'\na = 1.0")):
        source = place.job / f"{name}.py"
        source.write_text("a = 1.0")
        pyc = place.job / "__pycache__" / f"{name}.cpython-{sys.version_info[0]}{sys.version_info[1]}.pyc"
        pyc.parent.mkdir(exist_ok=True)
        text = "import marshal,sys; code=marshal.dumps(compile(sys.argv[2],'/x','exec'))\n"
        text += "open(sys.argv[1],'wb').write(bytes(16)+code)"
        place.run("-c", text, str(pyc), compiled)
        answers[f"__pycache__/{pyc.name}"] = name
    (place.job / "bad.py").write_text("")
    (place.job / "__pycache__" / "bad.cpython-311.pyc").write_bytes(bytes(16) + b"\xff" * 40)
    candidates = dict.fromkeys([*answers, "__pycache__/bad.cpython-311.pyc"], "0" * 64 + " live")
    candidates = {path: f"{index:064d} live" for index, path in enumerate(candidates)}
    found = bytecode.compare(
        place.job, candidates, {}, executable=place.python, env=place.environment, cache=StatCache(None)
    )
    told = {answers.get(path, "bad"): answer for path, answer in found.items()}
    assert told == {"same": "same", "sign": "differs", "type": "differs", "doc": "differs", "bad": "unreadable"}


def test_bytecode_that_brings_its_reader_down_spares_the_others(place: InstalledEnvironment, tmp_path: Path) -> None:
    """marshal is not safe against hostile bytes; a crash of the child may not hide a neighbour."""
    questions: list[int] = []

    def crash(_python: Path, _question: str, _env: object, *, given: list[list[str]], seconds: float) -> list[str]:
        questions.append(len(given))
        if any("bad" in pyc for _, pyc in given):
            raise Unavailable("crashed")
        return ["same"] * len(given)

    monkey = pytest.MonkeyPatch()
    monkey.setattr(bytecode, "ask", crash)
    names = [f"__pycache__/{name}.cpython-311.pyc" for name in ("a", "b", "bad", "c")]
    candidates = {name: f"{index:064d} live" for index, name in enumerate(names)}
    found = bytecode.compare(tmp_path, candidates, {}, executable=place.python, env={}, cache=StatCache(None))
    monkey.undo()
    assert list(found.values()) == ["same", "same", "unreadable", "same"]


def test_a_build_id_is_read_from_an_elf_note_and_from_nothing_else() -> None:
    note = struct.pack("<III", 4, 20, 3) + b"GNU\0" + bytes(range(20))
    program = struct.pack("<IIQQQQQQ", 4, 4, 120, 0, 0, len(note), len(note), 4)
    head = b"\x7fELF\x02\x01\x01" + bytes(9) + struct.pack("<HHIQQQIHHHHHH", 3, 62, 1, 0, 64, 0, 0, 64, 56, 1, 0, 0, 0)
    image = head + program + note
    assert build_id(image) == bytes(range(20)).hex()
    for cut in range(len(image)):
        assert build_id(image[:cut]) in (None, bytes(range(20)).hex()[: 2 * max(0, cut - 136)])
    assert build_id(b"\x7fELF" + b"\xff" * 500) is None


# -- start-up files and variables -------------------------------------------------------------------------------------


def test_only_lines_that_site_would_execute_count(tmp_path: Path) -> None:
    """`site` executes lines that begin with `import` and a blank; all else is a folder, and a model is no start-up."""
    (tmp_path / "paths.pth").write_text("# import os\n./lib\nimportant\n")
    (tmp_path / "model.pth").write_bytes(b"PK\x03\x04" + bytes(100))
    (tmp_path / "run.pth").write_text("./lib\nimport os; os.x = 1\n")
    (tmp_path / "lib").mkdir()
    hooks = list(startup.site_hooks(tmp_path, "site-packages", {}, ()))
    assert [(hook.place, hook.runs) for hook in hooks] == [("site-packages/run.pth", ("import os; os.x = 1",))]
    assert startup.pth_folders(tmp_path) == [tmp_path / "lib"]


def test_the_start_up_file_of_virtualenv_is_known_only_with_its_own_text(tmp_path: Path) -> None:
    (tmp_path / "_virtualenv.pth").write_text("import _virtualenv")
    assert list(startup.site_hooks(tmp_path, "site-packages", {}, ("uv",))) == []
    assert len(list(startup.site_hooks(tmp_path, "site-packages", {}, ()))) == 1
    (tmp_path / "_virtualenv.pth").write_text("import _virtualenv; import os")
    assert len(list(startup.site_hooks(tmp_path, "site-packages", {}, ("uv",)))) == 1


def test_source_folders_of_editable_packages_are_found(tmp_path: Path) -> None:
    (tmp_path / "src" / "pkg").mkdir(parents=True)
    text = f"MAPPING: dict[str, str] = {{'pkg': {str(tmp_path / 'src' / 'pkg')!r}, 'bad': '/nowhere'}}\n"
    (tmp_path / "__editable___pkg_1_0_finder.py").write_text(text)
    (tmp_path / "__editable___evil_1_0_finder.py").write_text("MAPPING = {'x': __import__('os').getcwd()}\n")
    assert startup.editable_folders(tmp_path) == [("pkg", tmp_path / "src" / "pkg")]


def test_the_systems_own_preload_list_is_read(tmp_path: Path) -> None:
    (tmp_path / "ld.so.preload").write_text("/lib/first.so /lib/second.so\n")
    hooks = list(startup.preloads({"LD_PRELOAD": "a.so:b.so"}, lambda _path: "0" * 64, tmp_path / "ld.so.preload"))
    assert [hook.place.rsplit(" ", 1)[-1] for hook in hooks] == ["a.so", "b.so", "first.so", "second.so"]


def test_variables_that_do_not_matter_or_are_secret_are_not_written_down() -> None:
    """Default deny; a token appears by digest only."""
    env = {"HOME": "/x", "EDITOR": "vi", "AWS_SECRET_ACCESS_KEY": "s", "HF_TOKEN": "t", "OMP_NUM_THREADS": "2"}
    env |= {"PYTHONPATH": boot_folder(), "RANK": "1", "NCCL_API_KEY": "secret", "TORCH_X": "y" * 5000}
    kept = variables.relevant(env)
    assert set(kept) == {"OMP_NUM_THREADS", "NCCL_API_KEY", "TORCH_X"}
    assert "secret" not in json.dumps(kept)
    assert kept["TORCH_X"].startswith("sha256:")


def test_secrets_in_the_command_are_kept_out_of_the_lock(place: InstalledEnvironment) -> None:
    words = ["python", "train.py", "--api-key", "hunter2", "--hf_token=hunter3", "--lr", "1"]
    argv = measure(words, cwd=place.job, env=place.environment).launch.argv
    assert "hunter" not in " ".join(argv)
    assert argv[-2:] == ("--lr", "1")


# -- code and inputs --------------------------------------------------------------------------------------------------


def test_a_home_folder_is_not_read_through_and_that_is_said(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text("")
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "letters.py").write_text("")
    env = InstalledEnvironment(tmp_path / "elsewhere").environment | {"HOME": str(tmp_path)}
    measurement = measure(["python", "train.py"], cwd=tmp_path, env=env)
    assert set(measurement.trees["code"].files) == {"train.py"}
    assert any("not read through" in note for note in measurement.notes)


@pytest.mark.parametrize("folder", ["/", "/tmp", "/root", "/home"])
def test_whole_disks_are_no_code_root(folder: str) -> None:
    assert code.find_root(None, Path(folder), "/nowhere").top_only or not Path(folder).exists()


def test_git_runs_nothing_the_repository_configures(tmp_path: Path) -> None:
    """The repository may be the attacker's: monitor, filter, external diff and text converter would all be programs."""
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    git = ["git", "-c", "user.name=victim-a", "-c", "user.email=victim-a@example.org", "-C", str(tmp_path)]
    (tmp_path / "train.py").write_text("a = 1\n")
    (tmp_path / ".gitattributes").write_text("*.py filter=evil diff=evil\n")
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "approved"]):
        subprocess.run([*git, *words], check=True, capture_output=True)
    marker = tmp_path / "marker"
    program = tmp_path / "program.sh"
    program.write_text(f"#!/bin/sh\necho $0 >> {marker}\ncat\n")
    program.chmod(0o755)
    settings = (
        "core.fsmonitor",
        "filter.evil.clean",
        "filter.evil.process",
        "filter.evil.smudge",
        "diff.evil.textconv",
    )
    for setting in (*settings, "diff.evil.command", "diff.external", "core.sshCommand", "core.pager"):
        subprocess.run([*git, "config", setting, str(program)], check=True, capture_output=True)
    (tmp_path / "train.py").write_text("a = 2\n")
    root = code.find_root(tmp_path / "train.py", tmp_path, None)
    assert not marker.exists()
    assert root.code.commit is not None
    assert "train.py" in root.code.changed
    assert root.code.dirty is not None


@pytest.mark.parametrize(
    ("words", "read", "written"),
    [
        (["--data", "rows.csv"], [("data", "rows.csv")], []),
        (["--data=rows.csv"], [("data", "rows.csv")], []),
        (["data.path=rows.csv"], [("data", "rows.csv")], []),
        (["rows.csv"], [("data", "rows.csv")], []),
        (["--resume", "last.pt"], [("weights", "last.pt")], []),
        (["--out", "results", "--log-dir", "logs"], [], ["results", "logs"]),
        (["--ckpt-dir", "weights"], [], ["weights"]),
        (["--model_name_or_path", "weights"], [("weights", "weights")], []),
        (["--save", "rows.csv"], [], ["rows.csv"]),
        (["--out=results", "rows.csv"], [("data", "rows.csv")], ["results"]),
        (["--log-config", "conf.yaml"], [("data", "conf.yaml")], []),
        (["--lr", "0.1", "--name", "absent.csv", "."], [], []),
    ],
)
def test_words_of_a_command_are_sorted_into_what_is_read_and_written(
    tmp_path: Path, words: list[str], read: list[tuple[str, str]], written: list[str]
) -> None:
    for name in ("rows.csv", "last.pt", "conf.yaml"):
        (tmp_path / name).write_text("x")
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "model.safetensors").write_text("x")
    found = data.inputs_of(words, cwd=tmp_path, code_root=tmp_path, data=(), outputs=())
    assert [(entry.role, entry.label) for entry in found.read] == read
    assert [path.name for path in found.written] == written


def test_data_that_was_declared_and_is_not_there_is_a_note(tmp_path: Path) -> None:
    found = data.inputs_of([], cwd=tmp_path, code_root=tmp_path, data=["absent"], outputs=())
    tree, notes = data.measure_input(found.read[0], Walker(StatCache(None)))
    assert tree.files == {}
    assert "not there" in notes[0]


def test_an_output_folder_that_holds_the_code_is_measured_all_the_same(place: InstalledEnvironment) -> None:
    """`--out .` may not take the code out of the measurement."""
    measurement = measure(["python", "train.py", "--out", "."], cwd=place.job, env=place.environment)
    assert "train.py" in measurement.trees["code"].files


def test_a_wrong_word_for_the_bytecode_rule_is_misuse(place: InstalledEnvironment) -> None:
    with pytest.raises(Misuse, match="compare_bytecode"):
        measure(["python", "train.py"], cwd=place.job, env=place.environment, compare_bytecode="some")


@pytest.mark.torch
def test_torch_states_its_flags_in_a_clean_process(tmp_path: Path) -> None:
    """Read back from torch itself; the answer is kept for the same environment only."""
    pytest.importorskip("torch")
    cache = StatCache(tmp_path)
    folders = [path for path in sys.path if path.endswith("site-packages")]
    flags = {}
    for override in ("0", "1"):
        env = dict(os.environ) | {"TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": override}
        found, note = numeric.read_back(Path(sys.executable), folders, env, installed="x", cache=cache)
        assert (note, found is not None and found.overrides) == (None, ())
        assert found is not None
        flags[override] = found.flags["float32_matmul_precision"]
        assert numeric.read_back(Path("/bin/false"), folders, env, installed="x", cache=cache)[0] is None
        assert numeric.read_back(Path(sys.executable), folders, env, installed="x", cache=cache)[0] == found
    assert flags == {"0": '"highest"', "1": '"high"'}


def test_the_probes_answer_is_bounded_and_typed() -> None:
    with pytest.raises(Unavailable):
        ask(Path(sys.executable), "no-such-question", {})
