"""Puts a measurement together: command, interpreter, code, packages, start-up hooks, variables, inputs, flags."""

from __future__ import annotations

import gc
import hashlib
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from trainguard.errors import Misuse, Unavailable
from trainguard.lockfile import (
    INSTALLER_FILES,
    Declared,
    Distribution,
    Hook,
    Interpreter,
    Launch,
    Measurement,
    Numeric,
    Program,
    Shadow,
    Tree,
)
from trainguard.measure import bytecode, caches, code, data, numeric, packages, startup, variables
from trainguard.measure.cache import StatCache
from trainguard.measure.command import SHELLS, Resolved, resolve
from trainguard.measure.files import read_small
from trainguard.measure.interpreter import Where, python_path, where
from trainguard.measure.literals import TEXT_LIMIT_BYTES, Literals, literals_of
from trainguard.measure.walk import Found, Walker, escaped

LIBRARY_SKIPPED = frozenset({"site-packages", "dist-packages", "__phello__"})
NESTED_SITES = ("site-packages", "dist-packages")
SEED = re.compile(r"(^|[-_.])seed$", re.IGNORECASE)
WORLD = frozenset({"nproc_per_node", "nproc-per-node", "nnodes", "num_processes", "num-processes", "world_size"})
SCRIPT_LIMIT_BYTES = 1 << 20
BYTECODE_MODES = ("new", "all", "inert")


@dataclass(slots=True)
class _Job:
    """What the parts of one measurement share while it is made."""

    argv: list[str]
    cwd: Path
    env: Mapping[str, str]
    resolved: Resolved
    walker: Walker
    where: Where | None
    trees: dict[str, Tree] = field(default_factory=dict)
    distributions: dict[str, Distribution] = field(default_factory=dict)
    native: dict[str, str] = field(default_factory=dict)
    hooks: list[Hook] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    path: list[tuple[str, Path]] = field(default_factory=list)
    """sys.path as the job would see it: (tree, folder)."""
    owners: dict[str, dict[str, Distribution]] = field(default_factory=dict)
    """Tree → path → distribution whose RECORD lists it."""

    def add(self, tree: Tree, found: Found) -> None:
        self.trees[tree.name] = tree
        self.native.update({f"{tree.name}/{path}": identity for path, identity in found.native.items()})
        self.notes += found.notes


def measure(
    command: Sequence[str],
    *,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    cache: Path | None = None,
    data_paths: Sequence[str] = (),
    outputs: Sequence[str] = (),
    against: Measurement | None = None,
    compare_bytecode: str = "new",
    read_flags: bool | None = None,
    trust_cache: bool = True,
) -> Measurement:
    """Everything that decides what `command` would do if it were started now, here, with `env`.

    cwd and env: those of the job; by default ours. cache: folder for the stat cache (private, created); None reads
    every file. data_paths and outputs: what the user declares beyond the command; where both are empty, what
    `against` declares. against: the approved measurement; bytecode that differs from it is compiled again, and
    installed code is only imported (for read_flags) when it is the approved code. read_flags: have torch say its
    numeric flags in a clean process, seconds once per environment; by default where `against` has them.
    compare_bytecode: new, all, or inert where the job gets a private bytecode folder. trust_cache: whether digests
    of unchanged files may come from the cache; a lock reads everything. Raises Misuse when the command names no
    program.
    """
    if compare_bytecode not in BYTECODE_MODES:
        raise Misuse(f"compare_bytecode: expected one of {', '.join(BYTECODE_MODES)}, found {compare_bytecode!r}")
    declared = Declared(data=tuple(data_paths), outputs=tuple(outputs))
    if read_flags is None:
        read_flags = against is not None and against.numeric is not None
    if declared == Declared() and against is not None:
        declared = against.declared
    with _without_collector():
        return _measured(command, cwd or Path.cwd(), os.environ if env is None else env, cache, declared, against,
                         compare_bytecode, read_flags, trust_cache)  # fmt: skip


def _measured(
    command: Sequence[str],
    cwd: Path,
    env: Mapping[str, str],
    cache: Path | None,
    declared: Declared,
    against: Measurement | None,
    compare_bytecode: str,
    read_flags: bool,
    trust_cache: bool,
) -> Measurement:
    resolved = resolve(command, cwd=cwd, env=env)
    stat_cache = StatCache(cache, trust=trust_cache)
    place = _ask_where(resolved, env)
    walker = Walker(stat_cache, tag=place.cache_tag if place else "", optimise=_optimise(resolved, env))
    job = _Job(list(command), cwd, env, resolved, walker, place)
    job.notes += resolved.notes
    root = code.find_root(resolved.script, cwd, env.get("HOME"))
    job.notes += root.notes
    inputs = data.inputs_of(
        command[1:],
        cwd=cwd,
        code_root=root.path,
        data=declared.data,
        outputs=declared.outputs,
        literals=_literals(resolved.script, against),
    )
    state = [cache.parent] if cache is not None else []
    _add_code(job, root, [*inputs.written, *state])
    _add_library(job)
    _add_path(job, root)
    _add_activation(job)
    _add_inputs(job, inputs, root)
    _add_hooks(job)
    if compare_bytecode != "inert":
        _compare_bytecode(job, against, everything=compare_bytecode == "all", cache=stat_cache)
    flags = _numeric(job, against, stat_cache) if read_flags else None
    measurement = Measurement(
        cwd=str(cwd),
        launch=_launch(job, root),
        interpreter=_interpreter(job),
        code=root.code,
        trees=job.trees,
        distributions=job.distributions,
        hooks=tuple(job.hooks),
        shadows=tuple(_shadows(job)),
        native=job.native,
        environment=variables.relevant(env),
        numeric=flags,
        caches=tuple(caches.measure_caches(env, walker)),
        declared=declared,
        bytecode=compare_bytecode,
        notes=tuple(dict.fromkeys(job.notes)),
    )
    stat_cache.save()
    return _encodable(measurement)


def _encodable(measurement: Measurement) -> Measurement:
    """`measurement` with every name that is not UTF-8 written with backslashes; nearly always itself."""
    small = msgspec.structs.replace(measurement, trees={}, distributions={}, native={})  # their paths are escaped
    try:
        msgspec.json.encode((small, [(tree.name, tree.root) for tree in measurement.trees.values()]))
    except UnicodeEncodeError:
        return msgspec.convert(_escaped(msgspec.to_builtins(measurement)), Measurement)
    return measurement


def _escaped(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    if isinstance(value, dict):
        return {_escaped(key): _escaped(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_escaped(item) for item in value]
    return value


@contextmanager
def _without_collector() -> Iterator[None]:
    """Tens of thousands of small objects and no cycle among them: the collector would only look at them again."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def _ask_where(resolved: Resolved, env: Mapping[str, str]) -> Where | None:
    if resolved.interpreter is None:
        return None
    try:
        return where(resolved.interpreter, env)
    except Unavailable as error:
        resolved.notes.append(str(error))
        return None


def _literals(script: Path | None, against: Measurement | None) -> Literals:
    """What the script's text names; beside an approved measurement only what is in that.

    A file that lies there now and did not then is not measured before the run: if the job reads it, that is found.
    """
    source = read_small(script, TEXT_LIMIT_BYTES + 1) if script is not None else None
    named = literals_of(source or b"")
    if against is None:
        return named
    known = {tree.partition(":")[2] for tree in against.trees if tree.startswith(("data:", "weights:"))}
    return Literals(
        options=tuple(pair for pair in named.options if pair[1] in known or data.WRITTEN.search(pair[0])),
        read=tuple(word for word in named.read if word in known),
    )


def _optimise(resolved: Resolved, env: Mapping[str, str]) -> int:
    """Level of -O: which `.pyc` would be taken."""
    levels = [word.count("O") for word in resolved.options if re.fullmatch(r"-[A-Za-z]*O+[A-Za-z]*", word)]
    word = env.get("PYTHONOPTIMIZE", "")
    levels.append(int(word) if word.isdigit() else bool(word))
    return min(2, max(levels))


def _add_code(job: _Job, root: code.Root, outputs: Sequence[Path]) -> None:
    chosen = code.Selection(root.path, root.tracked, outputs, top_only=root.top_only)
    found = job.walker.tree(root.path, fresh=True, skip_folder=chosen.skip_folder, want=chosen.want, limits=code.LIMITS)
    job.add(Tree(name="code", root=str(root.path), files=found.files, bytecode=found.bytecode), found)


def _add_library(job: _Job) -> None:
    place = job.where
    if place is None:
        return
    library = Path(place.library)
    found = job.walker.tree(library, skip_folder=lambda path, _name: path in LIBRARY_SKIPPED)
    job.add(Tree(name="stdlib", root=place.library, files=found.files, bytecode=found.bytecode), found)
    sites = [*place.sites]
    if place.user and _user_site(job):
        sites.insert(0, place.user)
    number = 0
    for site in sites:
        folder = Path(site)
        if not folder.is_dir() or any(tree.root == site for tree in job.trees.values()):
            continue
        name = "user-site" if site == place.user else "site-packages" if not number else f"site-packages:{number}"
        number += site != place.user
        _add_site(job, folder, name)


def _user_site(job: _Job) -> bool:
    flags = "".join(word for word in job.resolved.options if re.fullmatch(r"-[A-Za-z]+", word))
    return not job.env.get("PYTHONNOUSERSITE") and not set("sI") & set(flags)


def _add_site(job: _Job, folder: Path, name: str) -> None:
    place = job.where
    if place is None:
        return
    found = job.walker.tree(folder, skip_folder=lambda path, _name: path in NESTED_SITES)
    owners: dict[str, Distribution] = {}
    for package in packages.distributions(
        folder, found, tree=name, prefix=Path(place.prefix), outside=lambda path: _script_value(job, path)
    ):
        key = package.name if package.name not in job.distributions else f"{package.name} ({name})"
        job.distributions[key] = package
        owners.update(dict.fromkeys(package.files, package))
    job.owners[name] = owners
    job.add(Tree(name=name, root=str(folder), files=found.files, bytecode=found.bytecode), found)
    job.hooks += startup.site_hooks(folder, name, owners, place.made_by)


def _script_value(job: _Job, path: Path) -> str:
    """`<sha256> <size>`; of a script for our interpreter, without its first line, which names where that lies."""
    interpreter = job.resolved.interpreter
    data_read = read_small(path, SCRIPT_LIMIT_BYTES)
    if interpreter is None or data_read is None or not data_read.startswith(b"#!"):
        return job.walker.file(path, fresh=False)
    first, _, text = data_read.partition(b"\n")
    runner = first[2:].strip().decode("utf-8", "replace")
    if not os.path.exists(runner) or not _same_file(Path(runner), interpreter):  # noqa: PTH110
        return job.walker.file(path, fresh=False)
    if len(data_read) == SCRIPT_LIMIT_BYTES:
        return job.walker.file(path, fresh=False)
    return f"{hashlib.sha256(text).hexdigest()} {len(text)}"


def _same_file(one: Path, other: Path) -> bool:
    try:
        return one.parent == other.parent or one.samefile(other)
    except OSError:
        return False


def _add_path(job: _Job, root: code.Root) -> None:
    """sys.path in the job's order; folders that are neither library nor site are read as code."""
    resolved, place = job.resolved, job.where
    flags = "".join(word for word in resolved.options if re.fullmatch(r"-[A-Za-z]+", word))
    first = resolved.script.parent if resolved.script is not None else job.cwd
    if not set("IP") & set(flags) and not job.env.get("PYTHONSAFEPATH"):
        _add_folder(job, root, "script-folder", Path(os.path.realpath(first)))
    if not set("IE") & set(flags):
        for index, folder in enumerate(python_path(job.env, job.cwd)):
            _add_folder(job, root, f"path:PYTHONPATH:{index}", folder)
    if place is None:
        return
    job.path.append(("stdlib", Path(place.library)))
    for name in [tree for tree in job.trees if tree.startswith(("user-site", "site-packages"))]:
        site = Path(job.trees[name].root)
        job.path.append((name, site))
        for index, folder in enumerate(startup.pth_folders(site)):
            _add_folder(job, root, f"path:pth:{index}" if name == "site-packages" else f"path:{name}:{index}", folder)
        for label, folder in startup.editable_folders(site):
            _add_folder(job, root, f"path:editable:{label}", folder)


def _add_folder(job: _Job, root: code.Root, name: str, folder: Path) -> None:
    """Put `folder` on the path; measure it unless a tree already holds it."""
    for tree in job.trees.values():
        if folder == Path(tree.root):
            job.path.append((tree.name, folder))
            return
    if folder.is_relative_to(root.path):
        below = str(folder.relative_to(root.path))
        job.path.append((f"code/{below}", folder))
        return
    if not folder.is_dir():
        return
    other = code.find_root(folder / "_", folder, job.env.get("HOME"))
    wide = code.Selection(folder, None, (), top_only=other.top_only)
    found = job.walker.tree(
        folder, fresh=True, skip_folder=wide.skip_folder,
        want=wide.want, limits=code.LIMITS,
    )  # fmt: skip
    job.notes += [note for note in other.notes if "read through" in note]
    job.add(Tree(name=name, root=str(folder), files=found.files, bytecode=found.bytecode), found)
    job.path.append((name, folder))


def _add_activation(job: _Job) -> None:
    """Scripts that `conda activate` runs before the job starts."""
    if job.where is None:
        return
    folder = Path(job.where.prefix) / "etc" / "conda" / "activate.d"
    if folder.is_dir():
        found = job.walker.tree(folder, fresh=True)
        job.add(Tree(name="activation", root=str(folder), files=found.files), found)


def _add_inputs(job: _Job, inputs: data.Inputs, root: code.Root) -> None:
    entries = list(inputs.read)
    for folder in dict.fromkeys([root.path, job.cwd, *([job.resolved.script.parent] if job.resolved.script else [])]):
        if not root.top_only:
            entries += data.by_convention(folder, entries, inputs.written)
    for entry in entries:
        if entry.path.is_relative_to(root.path) and str(entry.path.relative_to(root.path)) in job.trees["code"].files:
            continue
        try:
            tree, notes = data.measure_input(entry, job.walker)
        except Unavailable as error:
            job.notes.append(str(error))
            continue
        job.trees[tree.name] = tree
        job.notes += notes
    beside = _data_beside(job, root, inputs)
    if beside:
        job.trees["data:beside the code"] = Tree(name="data:beside the code", root=str(root.path), files=beside)


def _data_beside(job: _Job, root: code.Root, inputs: data.Inputs) -> dict[str, str]:
    """Data files directly in the code root: those that git tracks, or all that do not look written by a run."""
    taken = {entry.path for entry in inputs.read} | set(inputs.written)
    values: dict[str, str] = {}
    try:
        names = sorted(entry.name for entry in os.scandir(root.path) if entry.is_file(follow_symlinks=False))
    except OSError:
        return values
    known = job.trees["code"].files
    for name in names[:5000]:
        chosen = name in root.tracked if root.tracked is not None else True
        path = root.path / name
        if not chosen or not data.data_beside(name) or path in taken or name in known:
            continue
        try:
            if path.stat().st_size > data.CONVENTION_LIMITS.bytes:
                job.notes.append(f"{path}: larger than {data.CONVENTION_LIMITS.bytes} bytes; declare it with --data")
                continue
            values[escaped(name)] = job.walker.file(path, fresh=False)
        except (OSError, Unavailable) as error:
            job.notes.append(str(error))
    return values


def _add_hooks(job: _Job) -> None:
    value = job.walker.file
    job.hooks += startup.customize_hooks(job.path, value, job.owners)
    for tree, folder in job.path:
        owners = job.owners.get(tree, {})
        job.hooks += startup.entry_points(folder, tree, _owner_of(owners))
    job.hooks += startup.preloads(job.env, value)
    job.hooks.sort(key=lambda hook: (hook.kind, hook.place, hook.digest))


def _owner_of(owners: Mapping[str, Distribution]) -> Callable[[str], str | None]:
    def owner(info: str) -> str | None:
        path = f"{info}/entry_points.txt"
        found = owners.get(path)
        return found.name if found is not None and path not in found.mismatched else None

    return owner


def _compare_bytecode(job: _Job, against: Measurement | None, *, everything: bool, cache: StatCache) -> None:
    """Compile again what is new or different in `against`, or everything; without either, nothing."""
    if job.where is None or job.resolved.interpreter is None or (against is None and not everything):
        return
    for name, tree in list(job.trees.items()):
        known = against.trees[name].bytecode if against is not None and name in against.trees else {}
        doubtful = {
            path: value
            for path, value in tree.bytecode.items()
            if not value.endswith("sourceless") and (everything or known.get(path) != value)
        }
        if not doubtful:
            continue
        sources = dict(tree.files)
        for package in job.distributions.values():
            if package.tree == name:
                sources.update(package.files)
        answers = bytecode.compare(
            Path(tree.root), doubtful, sources, executable=job.resolved.interpreter, env=job.env, cache=cache
        )
        job.trees[name] = Tree(name=name, root=tree.root, files=tree.files, bytecode=tree.bytecode, recompiled=answers)


def _numeric(job: _Job, against: Measurement | None, cache: StatCache) -> Numeric | None:
    if job.where is None or job.resolved.interpreter is None:
        return None
    installed = _installed_digest(job.trees, job.distributions)
    if "torch" not in job.distributions:
        return None
    if against is not None and installed != _installed_digest(against.trees, against.distributions):
        job.notes.append("numeric flags were not read back: installed code is not what was approved, so it is not run")
        return None
    folders = [str(folder) for tree, folder in job.path if tree.startswith(("site-packages", "user-site"))]
    flags, note = numeric.read_back(job.resolved.interpreter, folders, job.env, installed=installed, cache=cache)
    job.notes += [note] if note else []
    return flags


def _installed_digest(trees: Mapping[str, Tree], distributions: Mapping[str, Distribution]) -> str:
    hasher = hashlib.sha256()
    for name in sorted(trees):
        if name.startswith(("stdlib", "site-packages", "user-site")):
            _hash_files(hasher, name, trees[name].files)
    for name in sorted(distributions):
        _hash_files(hasher, name, distributions[name].files)
    return hasher.hexdigest()


def _hash_files(hasher: hashlib._Hash, name: str, files: Mapping[str, str]) -> None:
    kept = [item for item in sorted(files.items()) if not item[0].endswith(INSTALLER_FILES)]
    hasher.update(repr((name, kept)).encode("utf-8", "backslashreplace"))


def _launch(job: _Job, root: code.Root) -> Launch:
    resolved = job.resolved
    script = None
    if resolved.script is not None:
        real = Path(os.path.realpath(resolved.script))
        script = str(real.relative_to(root.path)) if real.is_relative_to(root.path) else str(real)
    return Launch(
        argv=(Path(job.argv[0]).name, *_without_secrets(job.argv[1:])),
        kind=resolved.kind,
        script=script,
        module=resolved.module,
        chain=tuple(_chain(job)),
        world=_options(job, lambda name: name.replace("-", "_") in {word.replace("-", "_") for word in WORLD})
        | ({"WORLD_SIZE": job.env["WORLD_SIZE"]} if "WORLD_SIZE" in job.env else {}),
        seeds=_options(job, lambda name: SEED.search(name) is not None)
        | ({"PYTHONHASHSEED": job.env["PYTHONHASHSEED"]} if "PYTHONHASHSEED" in job.env else {}),
    )


def _without_secrets(words: Sequence[str]) -> Iterator[str]:
    """The words, with the values of options that look secret by digest."""
    hidden = False
    for word in words:
        name, equals, value = word.partition("=")
        if hidden and not word.startswith("-"):
            yield variables.hidden(word)
        elif equals and variables.SECRET.search(name):
            yield f"{name}={variables.hidden(value)}"
        else:
            yield word
        hidden = word.startswith("-") and not equals and variables.SECRET.search(word) is not None


def _options(job: _Job, chosen: Callable[[str], bool]) -> dict[str, str]:
    return {name: value for name, value in data.valued(job.argv[1:]) if name and chosen(name)}


def _chain(job: _Job) -> Iterator[Program]:
    for step in job.resolved.steps:
        try:
            if step.role == "launcher" and step.path.suffix != ".py":
                value = _script_value(job, step.path)
            else:
                value = job.walker.file(Path(os.path.realpath(step.path)), fresh=True)
        except (Unavailable, OSError) as error:
            job.notes.append(f"{step.path}: cannot be read: {error}")
            value = "unreadable 0"
        digest, _, size = value.partition(" ")
        name = "shell" if step.path.name in SHELLS else step.path.name
        if step.role == "interpreter":
            name = Path(os.path.realpath(step.path)).name
        yield Program(role=step.role, path=str(step.path), name=name, digest=digest, size=int(size))
    library = job.where.libpython if job.where else None
    if library:
        digest, _, size = job.walker.file(Path(library), fresh=True).partition(" ")
        yield Program(role="libpython", path=library, name=Path(library).name, digest=digest, size=int(size))


def _interpreter(job: _Job) -> Interpreter | None:
    place = job.where
    if place is None:
        return None
    return Interpreter(
        executable=place.executable,
        version=place.version,
        implementation=place.implementation,
        cache_tag=place.cache_tag,
        prefix=place.prefix,
        base_prefix=place.base_prefix,
        path=tuple(str(folder) for _, folder in job.path),
        user_site="user-site" in job.trees,
    )


def _shadows(job: _Job) -> Iterator[Shadow]:
    """Modules at the front of sys.path that hide one further back: of the standard library, or installed."""
    if job.where is None:
        return
    builtin = set(sys.stdlib_module_names) | _top_names(Path(job.where.library))
    installed = {name: tree for tree, folder in reversed(job.path) if tree in job.owners for name in _top_names(folder)}
    for tree, folder in job.path:
        if tree == "stdlib" or tree in job.owners:
            break
        for name in sorted(_top_names(folder)):
            if name in ("sitecustomize", "usercustomize"):
                continue
            if name in builtin:
                yield Shadow(module=name, place=f"{tree}/{name}", hides="the standard library")
            elif name in installed:
                yield Shadow(module=name, place=f"{tree}/{name}", hides=f"{installed[name]}/{name}")


def _top_names(folder: Path) -> set[str]:
    """Names that `import` would find directly in `folder`: modules and regular packages."""
    names: set[str] = set()
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)[:20_000]
    except OSError:
        return names
    for entry in entries:
        stem, _, rest = entry.name.partition(".")
        if entry.name.endswith((".py", ".pyc", ".so")) and rest.split(".")[-1] in ("py", "pyc", "so"):
            names.add(stem)
        elif "." not in entry.name and entry.is_dir() and os.path.exists(f"{entry.path}/__init__.py"):  # noqa: PTH110
            names.add(entry.name)
    return names
