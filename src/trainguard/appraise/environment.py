"""Check *environment*: is what is about to run what was approved? (spec/lock.md, docs/checks/environment.md)

Pure functions of values: `compare` sets a measurement beside a lock, `intrinsic` says what is odd in a measurement that
has nothing to be compared with. Roots, time stamps and the order of installation are never compared, so an environment
that was rebuilt from the same versions is silent; neither are files a run writes beside its code.

A difference is *violated* where content, code or an approved setting is not the approved one, *suspicious* where it
only changes speed, place or ownership, and *not checked* where something could not be measured.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import msgspec

from trainguard.appraise.interface import Context, cite
from trainguard.errors import TrainguardError
from trainguard.evidence import Evidence
from trainguard.finding import Finding, LinkState, Outcome, Subject
from trainguard.lockfile import (
    INSTALLER_FILES,
    Distribution,
    Hook,
    Lock,
    Measurement,
    Program,
    Tree,
    parse_lock,
    parse_measurement,
)
from trainguard.policy import Policy

CHECK = "environment"
FILES_LISTED = 40
"""Files of one package or tree that are named one by one; the rest are counted in one more finding."""

IMPORTABLE = (".py", ".so", ".pyx")
VOCABULARY = re.compile(
    r"(^|/)(tokenizer[^/]*|vocab[^/]*|merges\.txt|added_tokens\.json|special_tokens_map\.json|meta\.pkl"
    r"|spiece\.model|sentencepiece[^/]*|[^/]*\.tiktoken|[^/]*tokenizer\.model)$"
)
CONFIGS = (".yaml", ".yml", ".toml", ".cfg", ".ini")
KINDS: Mapping[str, tuple[str, ...]] = {
    "pth": ("A2",),
    "start": ("A2",),
    "sitecustomize": ("A1",),
    "usercustomize": ("A1",),
    "entry_point": ("A9",),
    "preload": ("A3",),
}
LOADERS = re.compile(
    r"PYTHON(WARNINGS|BREAKPOINT|PATH|HOME|PLATLIBDIR|STARTUP|EXECUTABLE|INSPECT|USERBASE|NOUSERSITE|SAFEPATH|PERF\w*)"
    r"|\w+_INJECTION64_PATH|(NCCL|RCCL)_(NET|TUNER|PROFILER|ENV|CONF|MNNVL|COLLNET)\w*|BASH_ENV|ENV|GCONV_PATH|CUPTI\w*"
    r"|PJRT_\w+|XLA_FLAGS|TORCH_(LIBRARY|EXTENSION|SHOW_DISPATCH)\w*|HF_(ENDPOINT|HUB_ENDPOINT|MODULES_CACHE)"
)
NATIVE = re.compile(r"LD_\w+|GLIBC_\w+|MALLOC_\w+|FAKETIME\w*")
SPEED = re.compile(
    r"(OMP|MKL|OPENBLAS|KMP|GOMP|NUMEXPR|BLIS|VECLIB|TBB)_\w+|CUDA_LAUNCH_BLOCKING|NCCL_(P2P|IB|SHM|SOCKET|NSOCKS|BUFFSIZE"
    r"|NTHREADS|MIN|MAX|CROSS|DEBUG)\w*|GLOO_\w+|UCX_\w+|PYTORCH_(CUDA_)?ALLOC_CONF|TORCH_(NUM_THREADS|LOGS|TRACE)\w*"
)
CACHES = re.compile(r"\w*CACHE\w*|TRITON_\w*DIR|TORCH_EXTENSIONS_DIR|TORCH_HOME|HF_HOME|XDG_\w+|TORCHINDUCTOR_\w*DIR")
PLACES = re.compile(r"HF_DATASETS\w*|TZ|DEBUG_\w+|PL_\w+|ACCELERATE_LOG\w*|WORLD_SIZE")
OPTIONS: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"seed"), "D1"),
    (re.compile(r"^lr$|learning|sched|warmup|decay_lr"), "C3"),
    (re.compile(r"clip|max_grad_norm"), "C2"),
    (re.compile(r"beta|eps|optim|weight.?decay|momentum"), "C4"),
    (re.compile(r"fp16|bf16|amp|precision|dtype|tf32"), "C8"),
    (re.compile(r"accum"), "C7"),
    (re.compile(r"resume|init_from|checkpoint|ckpt|pretrained|model_name"), "E7"),
    (re.compile(r"data|corpus|dataset|mix|split"), "D7"),
    (re.compile(r"tokenizer|vocab"), "D6"),
)
WORTH_SHADOWING = frozenset(
    {"torch", "numpy", "transformers", "accelerate", "lightning", "pytorch_lightning", "deepspeed", "safetensors"}
)
REPACKAGERS = frozenset({"debian", "conda", "rpm"})
SYSTEM_FOLDERS = ("/usr/lib/python3/dist-packages", "/usr/lib64/python3/site-packages")
"""Packagers that strip or patch files after RECORD was written: theirs is stale from the start. Debian's name no
installer; they are known by their folder, which pip does not write to."""

NEVER_IMPORTED = frozenset({"test", "tests", "this", "antigravity", "idlelib", "turtledemo"})
"""Standard library names that nothing imports and that projects use for themselves."""


@dataclass(slots=True)
class _Difference:
    """Collects findings between an approved and a found measurement."""

    approved: Measurement
    found: Measurement
    told: set[str] = field(default_factory=set)
    """`<tree>/<path>` of files whose finding is given by a closer rule."""
    moved: set[str] = field(default_factory=set)
    """Packages that are gone, new or of another version: their files are not listed one by one."""
    entry_points_told: bool = False
    """Whether a changed entry point was reported, so that the file that declares it need not be."""


def compare(lock: Lock, measurement: Measurement, policy: Policy) -> Iterator[Finding]:
    """What is not as approved, worst kinds of code first. Approved differences (by lock or policy) are left out."""
    explained = _approved_by(lock, policy)
    for finding in differences(lock.measurement, measurement, policy):
        if explained(finding) is None:
            yield finding


def _approved_by(lock: Lock | None, policy: Policy) -> Callable[[Finding], str | None]:
    """The approved place that explains a finding, if any."""
    everything = msgspec.structs.replace(policy, approve=(*policy.approve, *(lock.approvals if lock else ())))

    def explained(finding: Finding) -> str | None:
        place = finding.subject.path
        return place if place is not None and everything.approves(CHECK, place) else None

    return explained


def differences(approved: Measurement, found: Measurement, policy: Policy) -> Iterator[Finding]:
    """Every difference between two measurements that matters, approved or not."""
    state = _Difference(approved, found)
    for name in approved.distributions.keys() | found.distributions.keys():
        old, new = approved.distributions.get(name), found.distributions.get(name)
        if old is None or new is None or old.version != new.version:
            state.moved.add(name)
    yield from _hooks(state)
    yield from _shadows(state)
    yield from _launch(state)
    same_python = _same_python(approved, found)
    if not same_python:
        yield _python_changed(approved, found)
    yield from _packages(state)
    for name, tree in approved.trees.items():
        if name != "stdlib" or same_python:
            yield from _tree(state, tree, found.trees.get(name))
    for name, tree in found.trees.items():
        if name not in approved.trees:
            yield from _new_tree(state, tree)
    if same_python:
        yield from _bytecode(state)
    yield from _variables(state, policy)
    yield from _numeric(state)
    yield from _caches(state)
    yield from _notes(found)


def _finding(
    outcome: Outcome,
    techniques: tuple[str, ...],
    message: str,
    *,
    path: str | None = None,
    expected: str | None = None,
    found: str | None = None,
) -> Finding:
    return Finding(
        check=CHECK,
        outcome=outcome,
        techniques=techniques,
        subject=Subject(path=path),
        message=message,
        expected=expected,
        found=found,
    )


def shown(tree: str, path: str) -> str:
    """How a finding names a file: below the code root as the user would, elsewhere with its tree."""
    return path if tree == "code" else f"{tree}/{path}"


# -- start-up code ---------------------------------------------------------------------------------------------------


def _hooks(state: _Difference) -> Iterator[Finding]:
    """Code that runs unasked: a new or changed hook is the difference, whatever RECORD says of it."""
    old = {(hook.kind, hook.place): hook for hook in state.approved.hooks}
    new = {(hook.kind, hook.place): hook for hook in state.found.hooks}
    for key in sorted(old.keys() | new.keys()):
        before, now = old.get(key), new.get(key)
        if before is not None and now is not None and before.digest == now.digest:
            continue
        hook = now or before
        if hook is None or _follows_its_package(state, hook):
            continue
        state.told.add(hook.place)
        state.entry_points_told |= hook.kind == "entry_point"
        yield _hook_finding(before, now, hook)


def _follows_its_package(state: _Difference, hook: Hook) -> bool:
    """Whether an entry point came or went with a package whose change is reported as such."""
    harmless = hook.kind == "entry_point" and not hook.place.startswith("torch.")
    return harmless and hook.distribution in state.moved


def _hook_finding(before: Hook | None, now: Hook | None, hook: Hook) -> Finding:
    what = {
        "pth": "start-up file",
        "start": "start-up file",
        "sitecustomize": "start-up module",
        "usercustomize": "start-up module",
        "entry_point": "entry point",
        "preload": "preloaded library",
    }.get(hook.kind, hook.kind)
    techniques = KINDS.get(hook.kind, ("A1",))
    if now is None:
        message = f"{what} {hook.place} was approved and is gone"
    elif before is None:
        message = f"{what} {hook.place} runs at every start and is not in the lock"
    else:
        message = f"{what} {hook.place} is not the approved one"
    if now is not None and now.distribution is not None and hook.kind != "entry_point":
        message += f"; RECORD of {now.distribution} lists it with this very hash, the lock does not"
    if now is not None and now.runs:
        message += f": {now.runs[0][:120]}"
    return _finding(
        "violated",
        techniques,
        message,
        path=hook.place if hook.kind != "entry_point" else None,
        expected=before.digest if before else "none",
        found=now.digest if now else "none",
    )


def _shadows(state: _Difference) -> Iterator[Finding]:
    known = {(shadow.module, shadow.place) for shadow in state.approved.shadows}
    for shadow in state.found.shadows:
        if (shadow.module, shadow.place) in known or shadow.module in NEVER_IMPORTED:
            continue
        state.told |= {shadow.place + end for end in (".py", ".so", "/__init__.py")}
        yield _finding(
            "violated",
            ("A7",),
            f"module {shadow.module!r} at {shadow.place} hides the one in {shadow.hides}; it is not in the lock",
            path=_module_file(state.found, shadow.place),
            expected=shadow.hides,
            found=shadow.place,
        )


def _module_file(found: Measurement, place: str) -> str:
    """The file behind `<tree>[/<folder>]/<module>`, as findings name files."""
    tree, _, below = place.partition("/")
    files = found.trees[tree].files if tree in found.trees else {}
    for end in (".py", "/__init__.py"):
        if below + end in files:
            return shown(tree, below + end)
    return shown(tree, below)


# -- command and interpreter -----------------------------------------------------------------------------------------


def _launch(state: _Difference) -> Iterator[Finding]:
    old, new = state.approved.launch, state.found.launch
    if (old.script, old.module) != (new.script, new.module):
        yield _finding(
            "violated",
            ("B1",),
            f"the command starts {new.script or new.module or new.kind}, the lock approves "
            f"{old.script or old.module or old.kind}",
            path=new.script,
            expected=old.script or old.module or old.kind,
            found=new.script or new.module or new.kind,
        )
    elif old.argv[1:] != new.argv[1:]:
        yield _argv_finding(old.argv, new.argv)
    before = {(program.role, program.name): program for program in old.chain}
    now = {(program.role, program.name): program for program in new.chain}
    python_changed = not _same_python(state.approved, state.found)
    for key in sorted(before.keys() | now.keys()):
        role, name = key
        if python_changed and role in ("interpreter", "libpython"):
            continue
        one, other = before.get(key), now.get(key)
        if one is None or other is None or one.digest != other.digest:
            state.told |= {program.path for program in (one, other) if program is not None}
            yield _finding(
                "violated",
                ("A3", "A12") if role == "libpython" else ("A12", "A3") if role == "interpreter" else ("A12",),
                _chain_change(role, name, one, other),
                path=next(program.path for program in (other, one) if program is not None),
                expected=one.digest if one else "none",
                found=other.digest if other else "none",
            )


def _chain_change(role: str, name: str, one: Program | None, other: Program | None) -> str:
    if one is None:
        return f"{role} {name} is started on the way to the script and is not in the lock"
    if other is None:
        return f"{role} {name} was approved and is not started"
    return f"{role} {name} is not the approved program"


def _argv_finding(old: tuple[str, ...], new: tuple[str, ...]) -> Finding:
    """One finding for changed words, with the technique their options suggest."""
    before, now = _options(old), _options(new)
    changed = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
    techniques = dict.fromkeys(
        technique for name in changed for pattern, technique in OPTIONS if pattern.search(name.lower())
    )
    return _finding(
        "violated",
        (*techniques, "B1"),
        "the command's arguments are not the approved ones: "
        + ", ".join(f"{name or 'words'}: {before.get(name, 'none')} → {now.get(name, 'none')}" for name in changed[:8]),
        expected=" ".join(old)[:1000],
        found=" ".join(new)[:1000],
    )


def _options(argv: tuple[str, ...]) -> dict[str, str]:
    """Option → values; words without an option under the empty name."""
    values: dict[str, list[str]] = {}
    option = ""
    for word in argv[1:]:
        if word.startswith("-") and not re.fullmatch(r"-\d.*", word):
            option, equals, value = word.lstrip("-").partition("=")
            values.setdefault(option, [])
            if equals:
                values[option].append(value)
                option = ""
        else:
            name, equals, value = word.partition("=")
            dotted = not option and equals and re.fullmatch(r"[\w.]+", name)
            values.setdefault(name if dotted else option, []).append(value if dotted else word)
            option = ""
    return {name: " ".join(words) or "set" for name, words in values.items()}


def _same_python(approved: Measurement, found: Measurement) -> bool:
    old, new = approved.interpreter, found.interpreter
    if old is None or new is None:
        return old is new
    return (old.version, old.implementation) == (new.version, new.implementation)


def _python_changed(approved: Measurement, found: Measurement) -> Finding:
    texts = [
        f"{place.implementation} {place.version}" if place is not None else "no Python interpreter"
        for place in (approved.interpreter, found.interpreter)
    ]
    return _finding(
        "violated",
        ("A13", "A12"),
        f"the command runs on {texts[1]}, the lock approves {texts[0]}",
        path=found.interpreter.executable if found.interpreter else None,
        expected=texts[0],
        found=texts[1],
    )


# -- packages and trees ----------------------------------------------------------------------------------------------


def _packages(state: _Difference) -> Iterator[Finding]:
    old, new = state.approved.distributions, state.found.distributions
    for name in sorted(state.moved):
        before, now = old.get(name), new.get(name)
        if before is None and now is not None:
            message = f"package {name} {now.version} is installed and not in the lock"
        elif now is None and before is not None:
            message = f"package {name} {before.version} is in the lock and not installed"
        else:
            message = f"package {name} is version {now.version if now else ''}, the lock approves " + (
                before.version if before else ""
            )
        yield _finding(
            "violated",
            ("A13",),
            message,
            path=name,
            expected=before.version if before else "not installed",
            found=now.version if now else "not installed",
        )
    scripts = {program.path.rsplit("/", 1)[-1] for program in state.found.launch.chain if program.role == "launcher"}
    for name in sorted(old.keys() & new.keys() - state.moved):
        yield from _package_files(state, old[name], new[name], scripts)


def _package_files(state: _Difference, old: Distribution, new: Distribution, scripts: set[str]) -> Iterator[Finding]:
    if old.files == new.files:
        return
    changed = []
    for path in old.files.keys() | new.files.keys():
        if old.files.get(path) == new.files.get(path) or path.endswith(INSTALLER_FILES) or _told(state, new.tree, path):
            continue
        if path.endswith(".pth") or (path.startswith("../") and path.rsplit("/", 1)[-1] in scripts):
            continue  # executable lines are hooks, folders they add are trees, started scripts are in the chain
        if path.endswith(".dist-info/entry_points.txt") and state.entry_points_told:
            continue
        changed.append(path)
    yield from _limited(
        (_package_file(old, new, path) for path in sorted(changed)), len(changed), f"package {old.name}", ("A5",)
    )


def _package_file(old: Distribution, new: Distribution, path: str) -> Finding:
    before, now = old.files.get(path), new.files.get(path)
    place = f"{new.tree}/{path}"
    techniques: tuple[str, ...] = ("A5",)
    if path.startswith("../"):
        techniques = ("A12", "A5")
    elif path.endswith(".so") or ".so." in path:
        techniques = ("A3", "A5")
    elif path.endswith("entry_points.txt"):
        techniques = ("A9", "A5")
    if now is None:
        message = f"{place} of {new.name} {new.version} is in the lock and is gone"
    elif before is None:
        message = f"{place} of {new.name} {new.version} is not in the lock"
    elif path in new.mismatched:
        message = f"{place} was edited: neither the lock nor the RECORD of {new.name} {new.version} has this content"
    elif path.startswith("../"):
        message = f"{place}, a script of {new.name} {new.version}, is not the approved one"
    else:
        message = (
            f"{place} was edited: RECORD of {new.name} {new.version} agrees with the edit, so it was written anew; "
            "the lock does not"
        )
    return _finding("violated", techniques, message, path=place, expected=before or "none", found=now or "none")


def _told(state: _Difference, tree: str, path: str) -> bool:
    return f"{tree}/{path}" in state.told


def _limited(findings: Iterable[Finding], total: int, whole: str, techniques: tuple[str, ...]) -> Iterator[Finding]:
    """The first findings one by one, and one more that counts the rest."""
    for index, finding in enumerate(findings):
        if index == FILES_LISTED:
            yield _finding(
                "violated", techniques, f"{whole}: {total - index} more files differ from the lock", path=None
            )
            return
        yield finding


def _tree(state: _Difference, old: Tree, new: Tree | None) -> Iterator[Finding]:
    if new is None:
        if old.files:
            yield _gone_tree(state, old)
        return
    if old.files == new.files:
        return
    changed = [
        path
        for path in sorted(old.files.keys() | new.files.keys())
        if old.files.get(path) != new.files.get(path)
        and not _told(state, old.name, path)
        and (path in old.files or _new_file_matters(state, old, path))
    ]
    findings = (_tree_file(state, old, new, path) for path in changed)
    yield from _limited(findings, len(changed), _role_of(old.name)[0], _role_of(old.name)[1])


def _gone_tree(state: _Difference, old: Tree) -> Finding:
    what, techniques = _role_of(old.name)
    return _finding(
        "violated",
        techniques,
        f"{what} {old.name.partition(':')[2] or old.root} was approved ({len(old.files)} files) and is gone or unused",
        path=old.root,
        expected=f"{len(old.files)} files",
        found="none",
    )


def _new_tree(state: _Difference, tree: Tree) -> Iterator[Finding]:
    """A folder on sys.path that was not there, or an input that the approved command does not name."""
    if tree.name.startswith(("data:", "weights:")):
        return  # the changed command, or data that has come since by convention, is reported as such
    importable = sorted(path for path in tree.files if path.endswith(IMPORTABLE))
    importable = [path for path in importable if not _told(state, tree.name, path)]
    if importable:
        yield _finding(
            "violated",
            ("A7", "A4"),
            f"folder {tree.root} is on the module search path and is not in the lock; it holds {len(importable)} "
            f"modules, such as {importable[0]}",
            path=tree.root,
            expected="none",
            found=f"{len(importable)} modules",
        )


def _role_of(tree: str) -> tuple[str, tuple[str, ...]]:
    role = tree.partition(":")[0]
    return {
        "code": ("code", ("B1",)),
        "script-folder": ("code", ("B1",)),
        "path": ("code on the module search path", ("B1", "A7")),
        "stdlib": ("standard library", ("A5",)),
        "site-packages": ("installed code", ("A5", "A13")),
        "user-site": ("installed code", ("A5", "A13")),
        "activation": ("activation script", ("A12",)),
        "data": ("data", ("D5",)),
        "weights": ("start weights", ("E3",)),
    }.get(role, (role, ("B1",)))


def _new_file_matters(state: _Difference, tree: Tree, path: str) -> bool:
    """Whether a file that the lock does not have is a difference: code is, what a run writes is not."""
    role = tree.name.partition(":")[0]
    if role == "activation":
        return True
    if role == "data":
        return tree.name != "data:beside the code"
    if role == "weights":
        return path.endswith(IMPORTABLE) or re.search(r"\d", path) is None
    return path.endswith(IMPORTABLE)


def _tree_file(state: _Difference, old: Tree, new: Tree, path: str) -> Finding:
    before, now = old.files.get(path), new.files.get(path)
    what, techniques = _role_of(old.name)
    role = old.name.partition(":")[0]
    place = shown(old.name, path)
    outcome: Outcome = "violated"
    if VOCABULARY.search(path) and role in ("code", "data", "weights"):
        what, techniques = "tokenizer or vocabulary", ("D6", *techniques)
    elif path.endswith(".so"):
        techniques = ("A3", *techniques)
    elif role == "data" and path.endswith(CONFIGS):
        what, techniques = "configuration", ("B1", "D5")
    if before is None:
        techniques = ("A13", "A7") if role in ("site-packages", "user-site") else techniques
        if role == "weights" or (role == "data" and not _named(state.found, old.name)):
            outcome = "suspicious"
        message = f"{what}: {place} is new; the lock does not have it"
    elif now is None:
        message = f"{what}: {place} was approved and is gone"
    else:
        message = f"{what}: {place} is not the approved content"
        if role == "code" and state.found.code.commit and state.approved.code.commit != state.found.code.commit:
            message += f" (commit {str(state.approved.code.commit)[:12]} → {state.found.code.commit[:12]})"
        elif role == "code" and path in state.found.code.changed:
            message += " and not committed"
    return _finding(outcome, techniques, message, path=place, expected=before or "none", found=now or "none")


def _named(found: Measurement, tree: str) -> bool:
    """Whether the user named this input, in the command or at lock time, and not only convention."""
    label = tree.partition(":")[2]
    return label in found.declared.data or any(label in word for word in found.launch.argv)


# -- bytecode --------------------------------------------------------------------------------------------------------


def _bytecode(state: _Difference) -> Iterator[Finding]:
    open_questions = 0
    for name, tree in state.found.trees.items():
        known = state.approved.trees[name].bytecode if name in state.approved.trees else {}
        for path, value in sorted(tree.bytecode.items()):
            if known.get(path) == value and tree.recompiled.get(path) != "differs":
                continue
            finding = bytecode_finding(tree, path)
            if finding is not None:
                yield finding
            elif path not in tree.recompiled and known.get(path) != value:
                open_questions += 1
    if open_questions and state.found.bytecode != "inert":
        yield _finding(
            "not_checked",
            (),
            f"{open_questions} bytecode files are new or differ from the lock and were not compared with their source",
        )


def bytecode_finding(tree: Tree, path: str) -> Finding | None:
    """What is wrong with one `.pyc`, apart from any lock."""
    place, value = shown(tree.name, path), tree.bytecode[path]
    digest, _, kind = value.partition(" ")
    answer = tree.recompiled.get(path)
    if answer == "differs":
        return _finding(
            "violated",
            ("A6",),
            f"{place} is not what its source compiles to; Python runs this bytecode and not the source, whose hash is "
            "unchanged by this",
            path=place,
            expected="the code its source compiles to",
            found=f"other code ({digest[:16]}…)",
        )
    if answer == "unreadable":
        return _finding("suspicious", ("A6",), f"{place} could not be read as bytecode of this Python", path=place)
    if kind == "sourceless":
        message = f"{place} is bytecode without source; it can be imported and nobody can read what it does"
        return _finding("suspicious", ("A6", "A7"), message, path=place, expected="a source file", found=digest)
    if kind == "unchecked":
        message = f"{place} is an unchecked-hash .pyc: Python runs it whatever its source says"
        return _finding("suspicious", ("A6",), message, path=place, expected="a timestamp or checked-hash .pyc")
    return None


# -- variables, flags, caches, notes ---------------------------------------------------------------------------------


def _variables(state: _Difference, policy: Policy) -> Iterator[Finding]:
    old, new = state.approved.environment, state.found.environment
    for name in sorted(old.keys() | new.keys()):
        before, now = old.get(name), new.get(name)
        if before == now or name in policy.allow_env:
            continue
        if name == "PYTHONPATH" and _relative(state.approved, before) == _relative(state.found, now):
            continue
        outcome, techniques = variable_kind(name)
        yield _finding(
            outcome,
            techniques,
            f"environment variable {name} is {_quoted(now)}, the lock approves {_quoted(before)}",
            path=name,
            expected=before if before is not None else "not set",
            found=now if now is not None else "not set",
        )


def variable_kind(name: str) -> tuple[Outcome, tuple[str, ...]]:
    """How bad a changed variable is, and the techniques it may be."""
    if name in ("PYTHONPYCACHEPREFIX", "PYTHONDONTWRITEBYTECODE"):
        return "violated", ("A6", "A4")
    if name == "PYTHONHASHSEED":
        return "violated", ("D1", "A10")
    if name == "TORCH_DEVICE_BACKEND_AUTOLOAD":
        return "violated", ("A9", "A4")
    if NATIVE.fullmatch(name):
        return "violated", ("A3", "A4")
    if CACHES.fullmatch(name):
        return "suspicious", ("A8",)
    if LOADERS.fullmatch(name):
        return "violated", ("A4",)
    if SPEED.fullmatch(name):
        return "suspicious", ("A11",)
    if PLACES.fullmatch(name):
        return "suspicious", ("A10",)
    return "violated", ("A10", "A4")


def _relative(measurement: Measurement, value: str | None) -> list[str]:
    """PYTHONPATH with this host's folders taken out, so that a checkout may lie elsewhere."""
    entries = []
    for entry in (value or "").split(":"):
        for name, root in (("code", measurement.code.root), ("cwd", measurement.cwd)):
            if entry == root or entry.startswith(root.rstrip("/") + "/"):
                entry = name + entry[len(root) :]
        if entry:
            entries.append(entry)
    return entries


def _quoted(value: str | None) -> str:
    return "not set" if value is None else repr(value if len(value) <= 200 else value[:200] + "…")


def _numeric(state: _Difference) -> Iterator[Finding]:
    old, new = state.approved.numeric, state.found.numeric
    if old is None or "torch" in state.moved:
        return
    if new is None:
        if not any("numeric flags" in note for note in state.found.notes):
            yield _finding("not_checked", (), "torch's numeric flags are in the lock and were not read back")
        return
    for name in sorted(old.flags.keys() | new.flags.keys()):
        before, now = old.flags.get(name), new.flags.get(name)
        if before != now and name != "cpu_capability":
            yield _finding(
                "violated",
                ("A10",),
                f"torch states {name} = {now or 'nothing'}, the lock approves {before or 'nothing'}",
                path=f"torch: {name}",
                expected=before,
                found=now,
            )
    if old.dispatcher != new.dispatcher:
        added = sorted(set(new.overrides) - set(old.overrides))
        yield _finding(
            "violated",
            ("B6", "A10"),
            "torch's dispatch table is not the approved one" + (f": {added[0]}" if added else ""),
            path="torch: dispatch table",
            expected=old.dispatcher,
            found=new.dispatcher,
        )


def _caches(state: _Difference) -> Iterator[Finding]:
    old = {cache.name: cache for cache in state.approved.caches}
    for cache in state.found.caches:
        before = old.get(cache.name)
        if (cache.foreign or cache.mode & 0o002) and (before is None or before.mode != cache.mode):
            yield _open_cache(cache.name, cache.path, cache.mode, foreign=cache.foreign)
        known = before.files if before else {}
        for path, value in sorted(cache.files.items()):
            if path in known and known[path] != value:
                yield _finding(
                    "violated",
                    ("A8", "E2"),
                    f"{cache.name}: {cache.path}/{path} is not the approved code",
                    path=f"{cache.path}/{path}",
                    expected=known[path],
                    found=value,
                )


def _open_cache(name: str, path: str, mode: int, *, foreign: bool) -> Finding:
    who = "belongs to another account" if foreign else f"can be written by every account (mode {mode:o})"
    message = f"{name} cache {path} {who}; compiled code is taken from it unseen"
    return _finding("suspicious", ("A8",), message, path=path, expected="a private folder")


def _notes(found: Measurement) -> Iterator[Finding]:
    for note in found.notes[:50]:
        tampered = "clock or disk was tampered" in note
        yield _finding("suspicious" if tampered else "not_checked", ("A13", "G5") if tampered else (), note)


# -- without a lock --------------------------------------------------------------------------------------------------


def intrinsic(measurement: Measurement) -> Iterator[Finding]:
    """What is odd in a measurement by itself: nothing here is approved, so nothing is proved either."""
    for package in measurement.distributions.values():
        if _repackaged(measurement, package):
            continue
        findings = (_stale_record(package, path) for path in package.mismatched)
        yield from _limited(findings, len(package.mismatched), f"package {package.name}", ("A5",))
    for hook in measurement.hooks:
        if _odd_hook(hook):
            yield _unapproved_hook(hook)
    for tree in measurement.trees.values():
        if tree.name != "stdlib":
            yield from filter(None, (bytecode_finding(tree, path) for path in sorted(tree.bytecode)))
    for shadow in measurement.shadows:
        standard = shadow.hides == "the standard library" and shadow.module not in NEVER_IMPORTED
        if standard or shadow.module in WORTH_SHADOWING:
            yield _finding(
                "suspicious",
                ("A7",),
                f"module {shadow.module!r} at {shadow.place} hides the one in {shadow.hides}",
                path=_module_file(measurement, shadow.place),
                expected=shadow.hides,
                found=shadow.place,
            )
    yield from _odd_variables(measurement)
    if measurement.numeric is not None and measurement.numeric.overrides:
        first = measurement.numeric.overrides[0]
        message = (
            f"torch's dispatch table holds {len(measurement.numeric.overrides)} kernels from Python files: {first}"
        )
        yield _finding("suspicious", ("B6",), message, path="torch: dispatch table")
    for cache in measurement.caches:
        if cache.foreign or cache.mode & 0o002:
            yield _open_cache(cache.name, cache.path, cache.mode, foreign=cache.foreign)
    yield from _notes(measurement)


def _repackaged(measurement: Measurement, package: Distribution) -> bool:
    if package.installer:
        honest = not any(path.endswith("/INSTALLER") for path in package.mismatched)
        return package.installer in REPACKAGERS and honest
    tree = measurement.trees.get(package.tree)
    return tree is not None and tree.root in SYSTEM_FOLDERS


def _stale_record(package: Distribution, path: str) -> Finding:
    place = f"{package.tree}/{path}"
    return _finding(
        "suspicious",
        ("A5",),
        f"{place} was edited after installation: RECORD of {package.name} {package.version} has another hash",
        path=place,
        expected="the content RECORD lists",
        found=package.files[path],
    )


def _odd_hook(hook: Hook) -> bool:
    """A hook no installer vouches for. Distributions of Linux put a sitecustomize into the standard library."""
    if hook.kind == "entry_point":
        return hook.distribution is None and hook.place.startswith("torch.")
    return hook.distribution is None and not hook.place.startswith("stdlib/")


def _unapproved_hook(hook: Hook) -> Finding:
    line = f": {hook.runs[0][:120]}" if hook.runs else ""
    return _finding(
        "suspicious",
        KINDS.get(hook.kind, ("A1",)),
        f"{hook.kind} {hook.place} runs at every start, and no installed package vouches for it{line}",
        path=hook.place if hook.kind != "entry_point" else None,
        found=hook.digest,
    )


def _odd_variables(measurement: Measurement) -> Iterator[Finding]:
    for name, value in measurement.environment.items():
        injected = name.endswith("_INJECTION64_PATH") or name == "PYTHONHOME"
        imports = name == "PYTHONWARNINGS" and any(
            "." in rule.split(":")[2] for rule in value.split(",") if rule.count(":") >= 2
        )
        if injected or imports:
            yield _finding(
                "suspicious",
                ("A4",),
                f"environment variable {name} makes the process load code of its own: {_quoted(value)}",
                path=name,
                found=value,
            )


# -- the check -------------------------------------------------------------------------------------------------------


class Environment:
    """Judges every measurement of a run: against the lock, or, without one, by itself and against the first."""

    name = CHECK

    def __init__(self, context: Context) -> None:
        self._context = context
        self._first: Measurement | None = None
        self._held = 0
        self._broken = 0
        self._blind: list[str] = []
        self._explained: list[str] = []

    def see(self, evidence: Evidence) -> Iterator[Finding]:
        if evidence.kind == "unmeasured":
            reason = str(evidence.body.get("reason"))[:500]
            self._blind.append(f"not measured: {reason}")
            yield self._about(_finding("not_checked", (), f"what runs was not measured: {reason}"), evidence)
        if evidence.kind != "measurement":
            return
        try:
            measurement, lock = self._load(evidence)
        except TrainguardError as error:
            self._blind.append(f"a measurement cannot be read: {error}")
            yield self._about(_finding("violated", ("G1",), f"a measurement cannot be read: {error}"), evidence)
            return
        if lock is not None and evidence.body.get("signed") is False:
            reason = f"the lock is signed by key {lock.signer[:16]}…, which the machine that ran this does not know"
            self._blind.append(reason)
            yield self._about(_finding("not_checked", (), reason), evidence)
        broken = 0
        for finding in self._findings(measurement, lock):
            broken += finding.outcome != "not_checked"
            yield self._about(finding, evidence)
        self._broken += broken
        if lock is not None:
            self._held += max(0, _size(measurement) - broken)
        self._first = self._first or measurement

    def _load(self, evidence: Evidence) -> tuple[Measurement, Lock | None]:
        body, blob = evidence.body, self._context.blob
        measurement = parse_measurement(blob(str(body.get("blob"))), where="measurement")
        digest = body.get("lock")
        return measurement, parse_lock(blob(str(digest)), where="lock") if digest is not None else None

    def _findings(self, measurement: Measurement, lock: Lock | None) -> Iterator[Finding]:
        explained = _approved_by(lock, self._context.policy)
        if lock is not None:
            found: Iterable[Finding] = differences(lock.measurement, measurement, self._context.policy)
        else:
            self._blind.append("no lock: what ran was compared with nothing approved")
            found = [*intrinsic(measurement), *self._restart(measurement)]
        for finding in found:
            place = explained(finding)
            if place is None:
                yield finding
            elif place not in self._explained:
                self._explained.append(place)

    def _restart(self, measurement: Measurement) -> Iterator[Finding]:
        """Without a lock, a later attempt is at least compared with the first one of the same run."""
        if self._first is None:
            return
        for finding in differences(self._first, measurement, self._context.policy):
            if finding.outcome != "not_checked":
                yield msgspec.structs.replace(
                    finding,
                    techniques=("F10", *finding.techniques),
                    message="changed since the first attempt: " + finding.message,
                )

    def _about(self, finding: Finding, evidence: Evidence) -> Finding:
        subject = msgspec.structs.replace(finding.subject, run=self._context.run)
        return msgspec.structs.replace(finding, subject=subject, evidence=cite(evidence))

    def end(self) -> Iterator[Finding | LinkState]:
        if self._first is None and not self._blind:
            self._blind.append("nothing was measured before the command started")
        yield LinkState(
            link=self.name,
            held=self._held,
            broken=self._broken,
            blind=tuple(dict.fromkeys(self._blind)),
            explained=tuple(self._explained),
        )


def _size(measurement: Measurement) -> int:
    """How many files, hooks, variables and programs a comparison looked at."""
    files = sum(len(tree.files) + len(tree.bytecode) for tree in measurement.trees.values())
    files += sum(len(package.files) for package in measurement.distributions.values())
    return files + len(measurement.hooks) + len(measurement.environment) + len(measurement.launch.chain)
