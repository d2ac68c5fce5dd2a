"""Inputs that are not code: data, start weights, vocabularies, named in the command, declared, or found by convention.

A word of the command that names an existing file or folder is an input, unless its option says that it is written
(`--out`, `--save…`, `--log…`). So are the defaults of the script's own options and the files that its text reads by
name (literals.py). The usual folders (`data`, `dataset`, …) beside the script are read too.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from trainguard.lockfile import Tree
from trainguard.measure.literals import Literals
from trainguard.measure.walk import Limits, Walker, escaped

WEIGHTS = frozenset({".pt", ".pth", ".ckpt", ".safetensors", ".bin", ".pkl", ".distcp", ".gguf", ".h5", ".msgpack"})
DATA_FOLDERS = ("data", "dataset", "datasets", "corpus")
DATA_SUFFIXES = frozenset(
    {".txt", ".csv", ".tsv", ".jsonl", ".bin", ".npy", ".npz", ".parquet", ".arrow", ".idx", ".pkl", ".mds", ".tar"}
)
LOOKS_WRITTEN = re.compile(r"log|metric|result|loss|hist|out|pred|eval|summary|ckpt|checkpoint|model|weight", re.I)
IS_PROSE = re.compile(r"requirement|constraint|readme|licen[cs]e|notice|note|todo|changes|changelog|cmakelists", re.I)
WRITTEN = re.compile(
    r"(^|[-_])(out|output|save|saved|log|logs|logging|tensorboard|wandb|results?)([-_]|$)|(work|run|exp)s?[-_]?dir"
)
CONFIG = (".py", ".yaml", ".yml", ".json", ".toml", ".cfg", ".ini", ".sh")
"""Files of these kinds are read, whatever the option that names them is called."""
CHECKPOINTS = re.compile(r"(^|[-_])(ckpt|checkpoint|checkpoints)([-_]|$)")
STARTS = re.compile(r"(^|[-_])(resume|init|load|from|pretrained|model|weights)([-_]|$)")
NAMED_LIMITS = Limits(files=2_000_000, bytes=64 << 30)
DECLARED_LIMITS = Limits(files=50_000_000, bytes=1 << 46)
CONVENTION_LIMITS = Limits(files=20_000, bytes=4 << 30, depth=8)
NOTHING_NAMED = Literals()
SHARED_FOLDERS = frozenset({"/tmp", "/var/tmp", "/dev/shm", os.path.expanduser("~")})  # noqa: S108, PTH111
"""Folders that hold other things than one job's input: no default means all of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Input:
    """One file or folder the job reads."""

    role: str
    """data or weights."""
    label: str
    """How the command or the user calls it; the same on every host."""
    path: Path
    limits: Limits


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """What the command reads and writes besides code."""

    read: tuple[Input, ...]
    written: tuple[Path, ...]
    """Folders and files the job writes: never compared."""


# os.path and not Path asks whether a word is a path: a word may be too long to be one, and only Path raises then.
# ruff: noqa: PTH110, PTH112, PTH113


def inputs_of(
    argv: Sequence[str],
    *,
    cwd: Path,
    code_root: Path,
    data: Sequence[str],
    outputs: Sequence[str],
    literals: Literals = NOTHING_NAMED,
) -> Inputs:
    """Sort the words of a command (without the program), its script's literals and the declared paths."""
    read: dict[Path, Input] = {}
    written = [Path(os.path.normpath(cwd / path)) for path in outputs]
    said = list(valued(argv))
    options = {option for option, _ in said}
    unsaid = [(option, word) for option, word in literals.options if option not in options]
    for limits, (option, word) in [(NAMED_LIMITS, pair) for pair in said] + [(CONVENTION_LIMITS, p) for p in unsaid]:
        path = Path(os.path.normpath(cwd / word))
        if WRITTEN.search(option) and not (path.suffix in CONFIG and os.path.isfile(path)):
            written.append(path)
        elif (
            not os.path.exists(path)
            or path.suffix == ".py"
            or path in (cwd, code_root)
            or (limits is CONVENTION_LIMITS and not _is_data(path) and not _is_data_folder(path))
            or code_root.is_relative_to(path)
        ):
            continue
        elif path.is_dir() and CHECKPOINTS.search(option) and not STARTS.search(option):
            written.append(path)
        elif path not in read:
            read[path] = Input(role=_role(path, option), label=word, path=path, limits=limits)
    for word in literals.read:
        path = Path(os.path.normpath(cwd / word))
        if path not in read and path not in written and _is_data(path):
            read[path] = Input(role=_role(path, ""), label=word, path=path, limits=CONVENTION_LIMITS)
    for word in data:
        path = Path(os.path.normpath(cwd / word))
        read[path] = Input(role="data", label=word, path=path, limits=DECLARED_LIMITS)
    return Inputs(read=tuple(read.values()), written=tuple(dict.fromkeys(written)))


def _role(path: Path, option: str) -> str:
    return "weights" if _holds_weights(path, option) else "data"


def _is_data_folder(path: Path) -> bool:
    return os.path.isdir(path) and str(path) not in SHARED_FOLDERS


def _is_data(path: Path) -> bool:
    """Whether a file that a script's text names is one that comes from outside: no code, no device, not of a run."""
    weights = path.suffix.lower() in WEIGHTS and LOOKS_WRITTEN.search(path.stem)
    return (
        os.path.isfile(path) and path.suffix != ".py" and not weights and not str(path).startswith(("/proc/", "/sys/"))
    )


def by_convention(folder: Path, taken: Sequence[Input], written: Sequence[Path]) -> Iterator[Input]:
    """The usual data folders in `folder`, where the command names none of them."""
    paths = {entry.path for entry in taken}
    for name in DATA_FOLDERS:
        path = folder / name
        if path.is_dir() and path not in paths and path not in written and not (path / "__init__.py").exists():
            yield Input(role="data", label=name, path=path, limits=CONVENTION_LIMITS)


def data_beside(path: str) -> bool:
    """Whether a file beside the code is data by its name `path`, and not something a run writes or a person reads."""
    stem, suffix = os.path.splitext(os.path.basename(path))  # noqa: PTH119, PTH122
    return suffix.lower() in DATA_SUFFIXES and not LOOKS_WRITTEN.search(stem) and not IS_PROSE.search(stem)


def measure_input(entry: Input, walker: Walker) -> tuple[Tree, list[str]]:
    """The tree of one input, and notes. A declared path that is not there is a note."""
    name = f"{entry.role}:{entry.label}"
    if entry.path.is_dir():
        want = _not_code if entry.limits is CONVENTION_LIMITS else None
        found = walker.tree(entry.path, limits=entry.limits, skip_folder=_skip, want=want)
        return Tree(name=name, root=str(entry.path), files=found.files), found.notes
    if not entry.path.exists():
        return Tree(name=name, root=str(entry.path)), [f"{entry.path}: declared as data, but it is not there"]
    value = walker.file(entry.path, fresh=False)
    return Tree(name=name, root=str(entry.path.parent), files={escaped(entry.path.name): value}), []


def _skip(_path: str, name: str) -> bool:
    return name in ("__pycache__", ".git", ".trainguard", ".ipynb_checkpoints")


def _not_code(path: str) -> bool:
    return not path.endswith(".py")  # belongs to the code tree, where it lies in one


def valued(argv: Sequence[str]) -> Iterator[tuple[str, str]]:
    """(option without dashes or empty, word) for every word that could be a path."""
    option = ""
    for word in argv:
        name, equals, value = word.partition("=")
        if word.startswith("-"):
            option = name.lstrip("-").lower()
            if equals and value:
                yield option, value
            option = "" if equals else option
        elif equals and re.fullmatch(r"[\w.]+", name):
            yield name.lower(), value  # Hydra and OmegaConf: data.path=…
            option = ""
        else:
            yield option, word
            option = ""


def _holds_weights(path: Path, option: str) -> bool:
    if path.is_file():
        return path.suffix in WEIGHTS and (path.suffix not in (".bin", ".pkl") or bool(STARTS.search(option)))
    try:
        names = [entry.name for entry in os.scandir(path)][:5000]
    except OSError:
        return False
    return any(os.path.splitext(name)[1] in (WEIGHTS - {".bin", ".pkl"}) for name in names) or (  # noqa: PTH122
        "config.json" in names and bool(STARTS.search(option))
    )
