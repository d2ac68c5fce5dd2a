# ruff: noqa: PTH100, PTH118, PTH120, PTH123, UP031, S302, SIM905 - runs on any Python from 3.8 on and loads little
"""Runs in the interpreter that would run the job, whatever it is: any Python from 3.8 on, standard library only.

Never imported: its text is handed to `python -I -S -c`, so nothing but the interpreter and its own library takes part.
One JSON document on standard output. sys.argv[1] says which: where, bytecode or numeric.
"""

import json
import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


CODE_FIELDS = (
    "co_name co_qualname co_argcount co_posonlyargcount co_kwonlyargcount co_flags co_code co_names co_varnames "
    "co_freevars co_cellvars co_firstlineno co_stacksize co_linetable co_exceptiontable"
).split()


def where() -> "dict[str, Any]":
    """Version, prefixes, and the folders that `site` would add, without letting `site` add them."""
    import site

    executable = os.path.abspath(sys.executable)
    prefix, settings = _virtual(executable)
    system = settings.get("include-system-site-packages", "true").lower() == "true"
    base = getattr(sys, "base_prefix", sys.prefix)
    prefixes = [base] if prefix is None else ([prefix, base] if system else [prefix])
    sites = []
    for one in prefixes:
        sys.prefix = sys.exec_prefix = one
        sites += [path for path in site.getsitepackages([one]) if path not in sites]
    try:
        user = site.getusersitepackages()
    except Exception:
        user = None
    return {
        "executable": executable,
        "version": "%d.%d.%d" % sys.version_info[:3],
        "implementation": sys.implementation.name,
        "cache_tag": sys.implementation.cache_tag or "",
        "prefix": prefix or base,
        "base_prefix": base,
        "library": os.path.dirname(os.path.abspath(os.__file__)),
        "path": [entry for entry in sys.path if entry],
        "sites": sites,
        "user": user if prefix is None or system else None,
        "made_by": sorted(set(settings) & {"uv", "virtualenv"}),
        "libpython": _libpython(),
    }


def _virtual(executable: str) -> "tuple[str | None, dict[str, str]]":
    """PEP 405: the folder that holds pyvenv.cfg, beside the executable or one above, and its settings."""
    for folder in (os.path.dirname(executable), os.path.dirname(os.path.dirname(executable))):
        try:
            with open(os.path.join(folder, "pyvenv.cfg"), encoding="utf-8") as file:
                lines = [line.partition("=") for line in file if "=" in line]
        except OSError:
            continue
        return folder, {key.strip().lower(): value.strip() for key, _, value in lines}
    return None, {}


def _libpython() -> "str | None":
    try:
        with open("/proc/self/maps") as file:
            paths = {line.split(None, 5)[-1].strip() for line in file if "libpython" in line}
    except OSError:
        return None
    return min(paths) if paths else None


def bytecode() -> "list[str]":
    """Standard input: JSON [[source, pyc], …]. Is the code in the `.pyc` what its source compiles to?

    Code objects are compared, not bytes: file names and reference flags may differ between two honest compilations.
    """
    import marshal
    import warnings

    warnings.simplefilter("ignore")
    results = []
    for source, pyc in json.load(sys.stdin):
        try:
            with open(pyc, "rb") as file:
                kept = marshal.loads(file.read()[16:])
            with open(source, "rb") as file:
                text = file.read()
            level = 2 if ".opt-2." in pyc else 1 if ".opt-1." in pyc else 0
            made = compile(text, source, "exec", dont_inherit=True, optimize=level)
            results.append("same" if _same(kept, made) else "differs")
        except Exception:
            results.append("unreadable")
    return results


def _same(one: "Any", other: "Any") -> bool:
    """Equality of code objects that also looks where `==` does not: flags, line tables, nested constants."""
    code = type(_same.__code__)
    if type(one) is not type(other):
        return False
    if isinstance(one, code):
        alike = all(getattr(one, name, None) == getattr(other, name, None) for name in CODE_FIELDS)
        return alike and _same(one.co_consts, other.co_consts)
    if isinstance(one, tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, frozenset):
        return one == other and sorted(map(repr, one)) == sorted(map(repr, other))
    return one == other and repr(one) == repr(other)


def numeric() -> "dict[str, Any] | None":
    """Standard input: JSON list of folders for sys.path. Flags as torch states them, and its dispatch table."""
    import hashlib

    sys.path.extend(json.load(sys.stdin))
    try:
        import torch
    except ImportError:
        return None
    readers = (
        ("float32_matmul_precision", lambda: torch.get_float32_matmul_precision()),
        ("cuda.matmul.allow_tf32", lambda: torch.backends.cuda.matmul.allow_tf32),
        (
            "cuda.matmul.allow_fp16_reduced_precision_reduction",
            lambda: torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction,
        ),
        (
            "cuda.matmul.allow_bf16_reduced_precision_reduction",
            lambda: torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction,
        ),
        ("cudnn.enabled", lambda: torch.backends.cudnn.enabled),
        ("cudnn.allow_tf32", lambda: torch.backends.cudnn.allow_tf32),
        ("cudnn.benchmark", lambda: torch.backends.cudnn.benchmark),
        ("cudnn.deterministic", lambda: torch.backends.cudnn.deterministic),
        ("mkldnn.enabled", lambda: torch.backends.mkldnn.enabled),
        ("deterministic_algorithms", lambda: torch.are_deterministic_algorithms_enabled()),
        ("default_dtype", lambda: str(torch.get_default_dtype())),
        ("anomaly_mode", lambda: torch.is_anomaly_enabled()),
        ("version", lambda: str(torch.__version__)),
        ("git_version", lambda: torch.version.git_version),
        ("cuda", lambda: torch.version.cuda),
        ("cpu_capability", lambda: torch.backends.cpu.get_cpu_capability()),
    )
    flags = {}
    for name, read in readers:
        try:
            flags[name] = json.dumps(read())
        except Exception as error:
            flags[name] = json.dumps("not readable: " + type(error).__name__)
    here = os.path.dirname(os.path.dirname(os.path.abspath(torch.__file__)))
    table, overrides = hashlib.sha256(), []
    for name in sorted(torch._C._dispatch_get_all_op_names()):
        text = torch._C._dispatch_dump(name).replace(here, "")
        table.update(text.encode("utf-8", "replace"))
        for line in text.splitlines():
            place = line.partition("registered at ")[2].split(" ")[0]
            if ".py:" in place and not place.startswith("/torch/"):
                overrides.append(name + " " + place)
    return {"flags": flags, "dispatcher": table.hexdigest(), "overrides": overrides[:50]}


if __name__ == "__main__":
    questions = {"where": where, "bytecode": bytecode, "numeric": numeric}  # type: dict[str, Any]
    sys.stdout.write(json.dumps(questions[sys.argv[1]]()) + "\n")
