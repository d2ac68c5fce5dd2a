"""The import graph keeps its absences, and src/ keeps its habits."""

import ast
import functools
from collections.abc import Callable, Iterator
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


@functools.cache
def nodes(path: Path) -> tuple[ast.AST, ...]:
    """Every node of a file."""
    return tuple(ast.walk(ast.parse(path.read_text())))


def imported(path: Path) -> Iterator[str]:
    """Every module a file imports, absolute; relative ones are resolved against the file's package."""
    package = ("trainguard", *path.relative_to(SOURCE).parts[:-1])
    for node in nodes(path):
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


def those(broken: Callable[[Path], bool], *rooms: str) -> list[str]:
    """Files, of all rooms or of these, for which a rule is broken."""
    return [str(p.relative_to(SOURCE)) for p in MODULES if (not rooms or room(p) in rooms) and broken(p)]


def test_no_judge_meets_torch_or_the_watchers() -> None:
    """appraise, incident, render and server judge values: they import neither torch nor what runs in the job."""

    def meets(path: Path) -> bool:
        outside = {name.split(".")[0] for name in imported(path)}
        return bool(rooms_imported(path) & WATCHERS or outside & {"torch", "numpy"})

    assert those(meets, *JUDGES) == []


def test_no_watcher_judges_or_signs() -> None:
    """measure and watch import no judge and nothing that can sign a statement or a tree head."""
    signers = JUDGES | {"log", "envelope", "archive", "cli"}
    assert those(lambda path: bool(rooms_imported(path) & signers), *WATCHERS) == []


def test_only_the_command_line_prints() -> None:
    """Library code returns data; cli/ prints it."""

    def prints(path: Path) -> bool:
        calls = [node.func for node in nodes(path) if isinstance(node, ast.Call)]
        return any(isinstance(call, ast.Name) and call.id == "print" for call in calls)

    assert those(lambda path: room(path) not in ("cli", "__main__") and prints(path)) == []


def test_no_assert_in_source() -> None:
    """`python -O` removes asserts, so no run-time check is one."""
    assert those(lambda path: any(isinstance(node, ast.Assert) for node in nodes(path))) == []


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
