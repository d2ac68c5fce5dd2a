"""The allowlists of `scan` are what their generator makes of the releases they name."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools" / "scan_lists.py"
LISTS = sorted((ROOT / "src" / "trainguard" / "scan" / "lists").glob("*_*.json"))
ALL = sorted({path.stem.partition("_")[2] for path in LISTS})


def digest_of(package: str) -> str | None:
    """As tools/scan_lists.py says in `provenance`: over names and contents of every source file; None if not here."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        return None
    root = Path(next(iter(spec.submodule_search_locations)))
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root.parent).with_suffix("").parts
        module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        digest.update(module.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def installed_as(library: str) -> None:
    """Skip unless the very release is installed that the lists of a library were made from."""
    (path, *_) = (path for path in LISTS if path.stem.endswith(f"_{library}"))
    wanted = json.loads(path.read_text())["provenance"]["version"]
    names = {"sklearn": "scikit-learn", "xgboost": "xgboost-cpu"}
    found = {one.version for name in (library, names.get(library)) for one in distributions(name=name or library)}
    if wanted not in found:
        pytest.skip(f"{library} {wanted} is not installed, found {sorted(found) or 'none'}")


@pytest.mark.parametrize("path", LISTS, ids=lambda path: path.stem)
def test_a_list_names_the_sources_it_was_made_from(path: Path) -> None:
    """Where its release is installed, every source file is one that the generator read."""
    installed_as(path.stem.partition("_")[2])
    sources = json.loads(path.read_text())["provenance"]["sources"]
    assert {package: digest_of(package) for package in sources} == sources


def check(tool: Path, *libraries: str) -> subprocess.CompletedProcess[str]:
    """`scan_lists.py --check`."""
    command = [sys.executable, tool, "--check", *libraries]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=900)


@pytest.mark.parametrize(
    "libraries", [("torch",), pytest.param(ALL, marks=[pytest.mark.nightly, pytest.mark.timeout(900)])], ids=len
)
def test_the_lists_are_what_the_generator_makes_again(libraries: tuple[str, ...]) -> None:
    """From the syntax trees of the installed release: nobody wrote a name in by hand."""
    for name in libraries:
        installed_as(name)
    done = check(TOOL, *libraries)
    assert done.returncode == 0, done.stderr


def test_a_name_that_was_written_in_by_hand_is_told(tmp_path: Path) -> None:
    """A copy of the tool beside a list with one name more."""
    installed_as("sklearn")
    lists = tmp_path / "src" / "trainguard" / "scan" / "lists"
    lists.mkdir(parents=True)
    (tmp_path / "tools").mkdir()
    shutil.copy(TOOL, tmp_path / "tools")
    value = json.loads((TOOL.parents[1] / "src/trainguard/scan/lists/framework_sklearn.json").read_text())
    value["tiers"]["framework"]["instance"].append("os.system")
    (lists / "framework_sklearn.json").write_text(json.dumps(value, indent=1) + "\n")
    done = check(tmp_path / "tools" / "scan_lists.py", "sklearn")
    assert done.returncode == 1
    assert "framework_sklearn.json: differs from what the installed release gives" in done.stderr
