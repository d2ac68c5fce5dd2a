"""The import graph keeps its absences, and src/ keeps its habits."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "src" / "trainguard"
MODULES = sorted(p for p in SOURCE.rglob("*.py") if "boot" not in p.parts)
JUDGES = {"appraise", "incident", "cases", "sources", "render", "server"}
WATCHERS = {"measure", "watch", "integrations"}
OUTER = ("supervisor", "processes", "outputs", "outside", "text", "stalls", "node")
INSIDE = {p.stem for p in (SOURCE / "watch").glob("*.py") if p.stem not in OUTER}
"""watch/ files that run inside the training process."""


def room(path: Path) -> str:
    """The first folder under src/trainguard, or the file's own name for the words at the bottom."""
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imported(path: Path) -> Iterator[str]:
    """Every module a file imports, absolute; relative ones are resolved against the file's package."""
    package = ("trainguard", *path.relative_to(SOURCE).parts[:-1])
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            name = ".".join((*base, *((node.module or "").split(".") if node.module else ())))
            yield name
            yield from (f"{name}.{alias.name}" for alias in node.names)


def rooms_imported(path: Path) -> set[str]:
    """Names of trainguard rooms a file imports."""
    return {name.split(".")[1] for name in imported(path) if name.startswith("trainguard.") and name.count(".") >= 1}


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_no_judge_meets_torch_or_the_watchers(path: Path) -> None:
    """appraise, incident, render and server judge values: they import neither torch nor what runs in the job."""
    if room(path) not in JUDGES:
        return
    assert not rooms_imported(path) & WATCHERS
    assert not {name.split(".")[0] for name in imported(path)} & {"torch", "numpy"}


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_no_watcher_judges_or_signs(path: Path) -> None:
    """measure and watch import no judge and nothing that can sign a statement or a tree head."""
    if room(path) not in WATCHERS:
        return
    assert not rooms_imported(path) & (JUDGES | {"log", "envelope", "archive", "cli"})


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_only_the_command_line_prints(path: Path) -> None:
    """Library code returns data; cli/ prints it."""
    if room(path) in ("cli", "__main__"):
        return
    calls = [n.func for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
    assert not [c for c in calls if isinstance(c, ast.Name) and c.id == "print"]


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_no_assert_in_source(path: Path) -> None:
    """`python -O` removes asserts, so no run-time check is one."""
    assert not [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Assert)]


@pytest.mark.parametrize("name", sorted(INSIDE))
def test_code_inside_the_training_process_stands_alone(name: str) -> None:
    """What runs inside the job imports the standard library, its siblings, and torch only lazily."""
    path = SOURCE / "watch" / f"{name}.py"
    tree = ast.parse(path.read_text())
    outside = {
        module
        for node in ast.walk(tree)
        for module in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom) and not node.level
            else []
        )
        if module.split(".")[0] in ("trainguard", "msgspec", "numpy", "blake3", "cryptography", "click", "rich")
    }
    assert not outside
    top = {alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names}
    assert "torch" not in top
