"""The verbs people read with, through the real command line: one document, honest exit statuses, no surprises."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.helpers import told

from trainguard.home import Home

SPAWN = (
    "spawn",
    {"how": "subprocess", "program": "python", "args": ["python", "-I", told.HOSTILE], "place": "/home/u/train.py:8"},
    {"process": 0, "pid": 800, "source": "process", "step": 1},
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four runs: `quiet`, `drift` (a rate changes), `odd` (with something suspicious in it) and `unended`."""
    place = tmp_path_factory.mktemp("views")
    home = Home(place / ".trainguard")
    rates = [{"hyperparameters": {"groups": [{"lr": 0.1}]}, "rng": {"torch": "aa"}, "gradients": {"norm": 1.0}}, {}]
    told.record(home, "quiet", told.whole_run(*(told.step(n, **rates[n > 1]) for n in range(1, 9))))
    changed = {"hyperparameters": {"changed": [[0, "lr", 0.07]]}}
    steps = [told.step(n, **(changed if n == 5 else rates[n > 1])) for n in range(1, 9)]
    told.record(home, "drift", told.whole_run(*steps))
    told.record(home, "odd", [told.start(), told.process(), SPAWN, told.step(1, **rates[0]), *told.leave(), told.end()])
    told.record(home, "unended", [told.start(), told.process(), told.step(1)], final=False)
    return place


def call(folder: Path, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("TRAINGUARD")}
    return subprocess.run(
        [sys.executable, "-W", "error", "-m", "trainguard", *arguments],
        cwd=folder,
        env=kept | {"LC_ALL": "C.UTF-8"} | env,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize(
    ("arguments", "schema", "status"),
    [
        (("verdict", "odd"), "trainguard/verdict/v1", 3),
        (("verdict", "quiet"), "trainguard/verdict/v1", 3),
        (("explain", "odd"), "trainguard/explain/v1", 3),
        (("show", "odd"), "trainguard/show/v1", 0),
        (("runs",), "trainguard/runs/v1", 0),
        (("diff", "drift", "quiet"), "trainguard/diff/v1", 1),
        (("doctor",), "trainguard/doctor/v1", None),
    ],
)
def test_json_is_exactly_one_document_on_stdout(
    folder: Path, arguments: tuple[str, ...], schema: str, status: int | None
):
    """A script reads stdout whole; the exit status says the same as the document."""
    done = call(folder, *arguments, "--json")
    assert json.loads(done.stdout)["schema"] == schema
    assert done.stdout.count("\n") == 1
    assert done.stderr == ""
    assert status is None or done.returncode == status


@pytest.mark.parametrize(
    "arguments",
    [("verdict", "odd"), ("explain", "odd"), ("show", "odd"), ("runs",), ("diff", "drift", "quiet"), ("doctor",)],
)
def test_text_has_no_colour_no_controls_and_no_trailing_blanks(folder: Path, arguments: tuple[str, ...]):
    """What lands in a file or a ticket is plain text, whatever the run called itself."""
    done = call(folder, *arguments, COLUMNS="72")
    assert done.stdout
    assert done.stderr == ""
    assert not [line for line in done.stdout.splitlines() if line != line.rstrip() or len(line) > 72]
    assert not [c for c in done.stdout if not c.isprintable() and c != "\n"]


def test_the_verdict_document_is_the_contract(folder: Path):
    """Every field that scripts rely on, null where it does not apply."""
    document = json.loads(call(folder, "verdict", "odd", "--json").stdout)
    assert document["run"] == "odd"
    assert document["verdict"] == "SUSPECT"
    assert document["level"] == "TIL-1"
    assert set(document["coverage"]) == {"steps", "watched_steps", "replayed_steps", "detection_probability"}
    finding = next(f for f in document["findings"] if f["outcome"] == "suspicious")
    assert set(finding["subject"]) == {"run", "rank", "step", "tensor", "path"}
    assert finding["subject"]["tensor"] is None
    assert finding["evidence"][0].keys() == {"leaf", "hash"}
    assert document["reasons"]


@pytest.mark.parametrize("name", ["odd", "od", "o"])
def test_a_run_is_named_by_any_unique_beginning(folder: Path, name: str):
    """Long ids need not be typed."""
    assert json.loads(call(folder, "verdict", name, "--json").stdout)["run"] == "odd"


def test_latest_names_the_newest_run(folder: Path):
    """The usual question is about the run just made."""
    assert json.loads(call(folder, "verdict", "latest", "--json").stdout)["run"] == "unended"


@pytest.mark.parametrize(
    ("name", "status", "says"),
    [
        ("nobody", 2, "no such run"),
        ("../../nowhere/model.pt", 3, "nowhere/model.pt"),
        ("model.safetensors", 3, "model.safetensors"),
    ],
)
def test_what_is_no_run_and_no_sealed_checkpoint_is_one_sentence(folder: Path, name: str, status: int, says: str):
    """One sentence that names it, and no verdict."""
    done = call(folder, "verdict", name)
    assert done.returncode == status
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_quiet_prints_nothing_and_keeps_the_status(folder: Path):
    """For scripts that only ask."""
    for arguments in (("verdict", "odd"), ("explain", "odd"), ("diff", "drift", "quiet")):
        done = call(folder, *arguments, "--quiet")
        assert (done.stdout, done.stderr) == ("", "")
        assert done.returncode == (1 if arguments[0] == "diff" else 3)


def test_a_stricter_policy_is_taken_and_stands_in_the_verdict(folder: Path):
    """The same record, judged by another policy, has another policy digest."""
    (folder / "strict.toml").write_text("heartbeat_seconds = 0.000001\n")
    plain = json.loads(call(folder, "verdict", "quiet", "--json").stdout)
    strict = json.loads(call(folder, "verdict", "quiet", "--json", "--policy", "strict.toml").stdout)
    assert plain["policy"] != strict["policy"]
    assert strict["verdict"] == "SUSPECT"
    (folder / "wrong.toml").write_text("no_such_setting = 1\n")
    assert call(folder, "verdict", "quiet", "--policy", "wrong.toml").returncode == 2


def test_an_edited_record_is_tainted_in_every_view(folder: Path, tmp_path: Path):
    """One flipped bit in the spool, and no view shows green."""
    home = Home(tmp_path / ".trainguard")
    told.record(home, "r", told.whole_run(told.step(1)))
    spool = told.spool(home, "r")
    data = bytearray(spool.read_bytes())
    data[len(data) // 2] ^= 1
    spool.write_bytes(data)
    assert call(tmp_path, "verdict", "r", "--quiet").returncode == 1
    assert call(tmp_path, "explain", "r", "--quiet").returncode == 1
    assert "TAINTED" in call(tmp_path, "runs").stdout
    assert "not what was sealed" in call(tmp_path, "show", "r").stdout
    assert call(tmp_path, "diff", "r", "r", "--quiet").returncode == 3


def test_show_writes_a_report_that_names_the_run(folder: Path, tmp_path: Path):
    """--html goes to the file; stdout stays a line, or the document with --json."""
    done = call(folder, "show", "odd", "--html", str(tmp_path / "r.html"))
    assert done.stdout.startswith("report written to ")
    page = (tmp_path / "r.html").read_text()
    assert "SUSPECT" in page
    assert "<script>" not in page
    done = call(folder, "show", "odd", "--json", "--html", str(tmp_path / "again.html"))
    assert json.loads(done.stdout)["run"] == "odd"
    assert (tmp_path / "again.html").read_text() == page


def test_diff_names_the_first_step_and_the_layer(folder: Path):
    """A rate that changed at step 5 is found there."""
    document = json.loads(call(folder, "diff", "quiet", "drift", "--json").stdout)
    assert document["likeliest"] == "hyperparameters"
    (difference,) = [d for d in document["differences"] if d["layer"] == "hyperparameters"]
    assert (difference["step"], difference["what"]) == (5, "group 0 lr")
    assert (difference["first"], difference["second"]) == ("0.1", "0.07")


def test_the_first_call_in_an_empty_folder_says_how_to_begin(tmp_path: Path):
    """No traceback, no empty table without a word."""
    for arguments in (("runs",), ("verdict", "latest"), ("show", "latest")):
        done = call(tmp_path, *arguments)
        assert done.returncode == 2
        assert "Traceback" not in done.stderr
        assert done.stderr.startswith("trainguard: ")


@pytest.mark.parametrize("verb", ["verdict", "runs", "show", "diff", "explain", "doctor", "demo"])
def test_every_view_has_json_quiet_and_help(folder: Path, verb: str):
    """The same switches everywhere."""
    text = call(folder, verb, "--help").stdout
    assert "--json" in text
    assert "--quiet" in text


@pytest.mark.parametrize(
    "arguments", [("--help",), ("runs", "--json"), ("verdict", "odd", "--json"), ("doctor", "--quiet")]
)
def test_no_view_imports_torch(folder: Path, arguments: tuple[str, ...]):
    """Reading a verdict must not take the seconds that torch does, nor run what lies in the job's environment."""
    program = (
        "import sys\nfrom trainguard.cli import main\ntry:\n    main(sys.argv[1:])\nexcept SystemExit:\n    pass\n"
        "found = {'torch', 'numpy'} & set(sys.modules)\nprint(sorted(found), file=sys.stderr)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], cwd=folder, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stderr.strip() == "[]"


def test_help_imports_neither_rich_nor_any_verb(folder: Path):
    """`trainguard --help` is to take 0.15 s at most (bench/); what it imports decides that, and is held here."""
    program = (
        "import sys\nfrom trainguard.cli import main\ntry:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        "loaded = (n for n in sys.modules if n.startswith(('rich', 'jinja2', 'cryptography', 'trainguard.')))\n"
        "print(sorted(loaded), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=folder, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stderr.strip() == "['trainguard.cli', 'trainguard.errors']"
