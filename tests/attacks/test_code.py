"""What is compiled and executed: swapped sources, poisoned bytecode, shadowing modules, code that came from data."""

from __future__ import annotations

import hashlib
import importlib.util
import marshal
import os
import py_compile
import sys
from pathlib import Path

import msgspec
import pytest
from tests.helpers.watched import Watched, measurement_of, plain, touch_back, watch, write

from trainguard.appraise.code import Code
from trainguard.finding import Finding
from trainguard.lockfile import Tree
from trainguard.policy import Approval

MAIN = "import helper\nprint('scale', helper.SCALE)\n"
HELPER = "SCALE = 1.00\n"
POISON = "SCALE = -1.0\n"


@pytest.fixture
def job(tmp_path: Path) -> Path:
    """A script and a module, in a folder of their own."""
    write(tmp_path, {"train.py": MAIN, "helper.py": HELPER})
    return tmp_path


def findings_of(run: Watched, *approvals: Approval) -> list[Finding]:
    assert run.faults() == []
    return run.judge(Code, *approvals)[0]


def poisoned(source: Path) -> Path:
    """The `.pyc` beside `source`, valid by time and size, that holds other code (facts M1 and M2)."""
    target = Path(importlib.util.cache_from_source(str(source)))
    good, kept = source.read_text(), source.stat()
    source.write_text(POISON)
    touch_back(source, kept)
    py_compile.compile(str(source), cfile=str(target), doraise=True)
    source.write_text(good)
    touch_back(source, kept)
    return target


def test_an_unchanged_job_holds_against_its_lock(job: Path) -> None:
    """Every file that was loaded is in the lock with the same hash."""
    locked = measurement_of(watch(job))
    run = watch(job, locked=locked)
    findings, link = run.judge(Code)
    assert (run.output, run.faults(), findings, link.state) == ("scale 1.0\n", [], [], "held")
    assert link.held > 30


def test_without_a_lock_the_link_is_blind_and_says_so(job: Path) -> None:
    """Blind is never green."""
    findings, link = watch(job).judge(Code)
    assert (findings, link.state) == ([], "blind")
    assert any("no lock" in reason for reason in link.blind)


def test_a_changed_module_of_the_job_is_named(job: Path) -> None:
    """One line of the job's code differs from what was approved."""
    locked = measurement_of(watch(job))
    write(job, {"helper.py": POISON})
    changed = measurement_of(watch(job))
    (found,) = findings_of(watch(job, measured=changed, locked=locked))
    assert (found.outcome, found.techniques[0], found.subject.path) == ("violated", "B1", f"{job}/helper.py")
    assert hashlib.sha256(POISON.encode()).hexdigest() in (found.found or "")


def test_a_file_swapped_after_preflight_and_restored_is_found(job: Path) -> None:
    """Swap and restore round an import. The control: before and after the run the file is as approved."""
    locked = measurement_of(watch(job))
    swap = (
        "import os\nkept = open('helper.py').read()\nopen('helper.py', 'w').write('SCALE = -1.0\\n')\n"
        "import helper\nopen('helper.py', 'w').write(kept)\n"
    )
    write(job, {"train.py": MAIN})
    before = (job / "helper.py").read_bytes()
    run = watch(job, "-c", swap + "print('scale', helper.SCALE)", measured=locked, locked=locked)
    assert run.output == "scale -1.0\n"
    assert (job / "helper.py").read_bytes() == before
    (found,) = findings_of(run)
    assert (found.outcome, found.techniques[0], found.subject.path) == ("violated", "A13", f"{job}/helper.py")
    assert "between the measurement before the start and its import" in found.message


def test_a_file_swapped_after_the_measurement_is_found_without_a_lock(job: Path) -> None:
    """The measurement of this attempt is enough."""
    measured = measurement_of(watch(job))
    write(job, {"helper.py": POISON})
    (found,) = findings_of(watch(job, measured=measured))
    assert (found.outcome, found.techniques[0]) == ("violated", "A13")


def test_bytecode_beside_the_source_does_not_run(job: Path) -> None:
    """The edited `.pyc` is valid by time and size, every `.py` hash is green, and plain Python runs it."""
    locked = measurement_of(watch(job))
    target = poisoned(job / "helper.py")
    assert hashlib.sha256((job / "helper.py").read_bytes()).hexdigest() == hashlib.sha256(HELPER.encode()).hexdigest()
    assert plain(job, env={"PYTHONDONTWRITEBYTECODE": "1"}) == "scale -1.0\n"
    run = watch(job, locked=locked)
    findings, link = run.judge(Code)
    assert (run.output, findings, link.state) == ("scale 1.0\n", [], "held")
    assert target.exists()


def test_an_unchecked_hash_pyc_does_not_run(job: Path) -> None:
    """PEP 552's unchecked kind ignores its source for good (fact M3); under watch it is never read."""
    source = job / "helper.py"
    source.write_text(POISON)
    mode = py_compile.PycInvalidationMode.UNCHECKED_HASH
    py_compile.compile(str(source), cfile=importlib.util.cache_from_source(str(source)), invalidation_mode=mode)
    source.write_text(HELPER)
    assert plain(job) == "scale -1.0\n"
    assert watch(job).output == "scale 1.0\n"


def test_bytecode_without_source_is_named(job: Path) -> None:
    """A `.pyc` alone cannot be compared with anything."""
    locked = measurement_of(watch(job))
    py_compile.compile(str(job / "helper.py"), cfile=str(job / "helper.pyc"))
    (job / "helper.py").unlink()
    run = watch(job, locked=locked)
    assert run.output == "scale 1.0\n"
    (found,) = findings_of(run)
    assert (found.outcome, found.techniques[0], found.subject.path) == ("violated", "A6", f"{job}/helper.pyc")
    (found,) = findings_of(watch(job))
    assert (found.outcome, found.techniques[0]) == ("suspicious", "A6")


def test_a_standard_module_from_the_working_folder_is_named(job: Path) -> None:
    """`colorsys.py` beside the script hides the standard library's, with or without a lock."""
    write(job, {"train.py": MAIN + "import colorsys\n", "colorsys.py": "MINE = True\n"})
    (found,) = findings_of(watch(job))
    assert (found.outcome, found.techniques[0], found.subject.path) == ("violated", "A7", f"{job}/colorsys.py")


GENERATOR = """
import importlib.util, sys, tempfile
def make(folder, write):
    with tempfile.NamedTemporaryFile("w", suffix=".py", dir=folder, delete=False) as file:
        file.write("X = 1")
    spec = importlib.util.spec_from_file_location("generator.made", write() if write else file.name)
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
"""


@pytest.mark.parametrize("own", [False, True])
def test_source_that_a_locked_package_generates_and_imports_is_its_own_business(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, own: bool
) -> None:
    """Templates filled in, written under a new name, and imported. Written by the job's own line it is not."""
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    job = f"import sys\nsys.path.insert(0, 'lib/site-packages')\nimport generator\nmine = '{elsewhere}/mine.py'\n"
    job += "def write():\n    open(mine, 'w').write('X = 2')\n    return mine\n"
    job += f"generator.make('{elsewhere}', write if {own} else None)\n"
    write(tmp_path, {"train.py": job, "lib/site-packages/generator.py": GENERATOR})
    locked = measurement_of(watch(tmp_path))
    digest = locked.trees["code"].files.pop("lib/site-packages/generator.py")
    site = Tree(name="site-packages:lib", root=str(tmp_path / "lib/site-packages"), files={"generator.py": digest})
    locked = msgspec.structs.replace(locked, trees={**locked.trees, site.name: site})
    found = findings_of(watch(tmp_path, locked=locked))
    assert [(f.outcome, f.subject.path) for f in found] == ([("violated", f"{elsewhere}/mine.py")] if own else [])


def test_a_module_that_hides_a_locked_one_is_named(job: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """An earlier folder on PYTHONPATH holds a module of the same name as an installed one."""
    write(job, {"train.py": "import idna\nprint('idna', idna.__file__.endswith('planted/idna.py'))\n"})
    locked = measurement_of(watch(job))
    planted = tmp_path_factory.mktemp("x") / "planted"
    write(planted, {"idna.py": "MINE = True\n"})
    run = watch(job, locked=locked, env={"PYTHONPATH": str(planted)})
    assert run.output == "idna True\n"
    (found,) = findings_of(run)
    assert (found.outcome, found.techniques[0], found.subject.path) == ("violated", "A7", f"{planted}/idna.py")
    assert found.expected == "site-packages/idna/__init__.py"


def test_text_from_a_data_file_that_is_executed_is_named(job: Path) -> None:
    """`exec(open(…).read())`: the file it came from is found by the hash of the text."""
    write(job, {"train.py": "exec(open('/tmp/../' + __file__.rsplit('/', 1)[0] + '/side/x.txt').read())\n"})
    write(job, {"side/x.txt": "print('ran')\n"})
    locked = measurement_of(watch(job))
    del locked.trees["code"].files["side/x.txt"]
    run = watch(job, locked=locked)
    assert run.output == "ran\n"
    (found,) = findings_of(run)
    assert (found.outcome, found.techniques[0]) == ("violated", "B2")
    assert f"{job}/side/x.txt" in found.message
    assert found.subject.path == f"{job}/train.py:1"


def test_a_file_run_by_path_is_held_to_the_lock_too(job: Path) -> None:
    """`runpy`, and a loader made by hand: neither goes through sys.path."""
    runner = (
        "import runpy\nrunpy.run_path('side/one.py')\n"
        "from importlib.machinery import SourceFileLoader as L\nL('two', 'side/two.cfg').load_module()\n"
    )
    write(job, {"train.py": "import warnings; warnings.simplefilter('ignore')\n" + runner})
    locked = measurement_of(watch(job))
    write(job, {"side/one.py": "pass\n", "side/two.cfg": "pass\n"})
    found = {(f.subject.path, f.techniques[0], f.outcome) for f in findings_of(watch(job, locked=locked))}
    assert found == {(f"{job}/side/one.py", "B1", "violated"), (f"{job}/side/two.cfg", "B1", "violated")}


def test_a_code_object_that_claims_an_honest_file_is_found(job: Path) -> None:
    """Marshalled code with the file name of an approved module: hash of the file green, code not its own."""
    locked = measurement_of(watch(job))
    code = compile("print('planted')", str(job / "helper.py"), "exec")
    (job / "blob.bin").write_bytes(marshal.dumps(code))
    locked.trees["code"].files["blob.bin"] = hashlib.sha256((job / "blob.bin").read_bytes()).hexdigest() + " 0"
    run = watch(job, "-c", "import marshal, helper; exec(marshal.loads(open('blob.bin', 'rb').read()))", locked=locked)
    assert run.output == "planted\n"
    (found,) = findings_of(run)
    assert (found.outcome, found.techniques[0]) == ("violated", "A6")
    assert "does not compile to it" in found.message


def test_two_processes_that_compile_other_bytes_from_one_path_are_named(job: Path) -> None:
    """The odd one out among ranks, here among a process and its child."""
    child = "import subprocess, sys\nsubprocess.run([sys.executable, 'child.py'], check=True)\n"
    write(job, {"child.py": "import helper\n"})
    change = f"open('helper.py', 'w').write({POISON!r})\n"
    write(job, {"train.py": MAIN + change + child})
    (found,) = findings_of(watch(job))
    assert (found.outcome, found.techniques[0], found.subject.path) == ("suspicious", "F1", f"{job}/helper.py")


def test_code_that_a_pickle_executes_is_named_by_the_loader(job: Path) -> None:
    """The frame that executes is the unpickler: no honest data runs text as code."""
    bomb = "class B:\n    def __reduce__(self):\n        return exec, ('MARK = 1',)\n"
    write(job, {"train.py": f"import pickle\n{bomb}pickle._loads(pickle.dumps(B()))\n"})
    (found,) = findings_of(watch(job))
    assert (found.outcome, found.techniques[0]) == ("suspicious", "E1")
    assert "/pickle.py:" in (found.subject.path or "")


def test_an_approved_file_is_explained(job: Path) -> None:
    """By its path below the code root."""
    locked = measurement_of(watch(job))
    write(job, {"helper.py": POISON})
    run = watch(job, locked=locked)
    findings, link = run.judge(Code, Approval(check="code", place="helper.py"))
    assert (findings, link.explained) == ([], ("helper.py",))


def test_a_private_cache_that_others_can_write_is_not_used(job: Path) -> None:
    """The guard then compiles every file anew; the job does not notice."""
    cache = job.parent / "cache"
    cache.mkdir(mode=0o700)
    os.chmod(cache, 0o777)
    run = watch(job, pycache=str(cache))
    where = next(r.body["where"] for r in run.records if "where" in r.body)
    assert (run.output, where["cache"]) == ("scale 1.0\n", False)
    assert not (cache / "code").exists()


def test_a_syntax_error_reads_the_same_with_and_without_the_guard(job: Path) -> None:
    """No frame of ours in the traceback."""
    write(job, {"helper.py": "def broken(:\n", "train.py": "import traceback\ntry:\n    import helper\n"})
    with (job / "train.py").open("a") as file:
        file.write("except SyntaxError:\n    print(traceback.format_exc())\n")
    run = watch(job)
    assert run.faults() == []
    frames = [line for line in run.output.splitlines() if "trainguard" in line]
    assert (frames, "helper.py" in run.output) == ([], True)


def test_two_interpreters_of_other_options_do_not_share_bytecode(job: Path) -> None:
    """`-O` strips asserts: its code objects are kept apart."""
    write(job, {"helper.py": "SCALE = 1\ntry:\n    assert False\nexcept AssertionError:\n    SCALE = 2\n"})
    assert watch(job).output == "scale 2\n"
    assert watch(job, "-O", "train.py").output == "scale 1\n"
    assert watch(job).output == "scale 2\n"
    assert sys.flags.optimize == 0


def test_a_poisoned_entry_of_the_private_cache_is_found_by_compiling_anew(tmp_path: Path) -> None:
    """The entry of one watched module is replaced between two starts: source hash green, code not its own."""
    cache = tmp_path / "cache"
    cache.mkdir(mode=0o700)
    write(
        tmp_path, {"random_target.py": "VALUE = 1\n", "train.py": "import random_target\nprint(random_target.VALUE)\n"}
    )
    assert watch(tmp_path, pycache=str(cache)).output == "1\n"
    (entry,) = cache.rglob(hashlib.sha256(b"VALUE = 1\n").hexdigest())
    entry.write_bytes(marshal.dumps(compile("VALUE = 2\n", "x", "exec")))
    ask = "import sys, random_target\nprint(random_target.VALUE)\nlink = sys.modules['_trainguard.code'].current()\n"
    write(tmp_path, {"train.py": ask + "[link.recompile_one() for _ in range(60)]\n"})
    run = watch(tmp_path, pycache=str(cache))
    assert run.output == "2\n"
    (found,) = findings_of(run)
    assert (found.outcome, found.techniques[0]) == ("violated", "A6")
    assert found.subject.path == f"{tmp_path}/random_target.py"
