"""The objects a vetted file may name: resolved once, by exact name, from where their library is installed.

An allow list speaks of names; what a name leads to is decided by the machine that loads (ShadowPickle, arXiv
2607.17503). So before a module is imported its file must lie where libraries are installed, and what it yields must be
its own: a `torch` beside the training script, or a standard library module from a package folder, is refused.
"""

from __future__ import annotations

import _compat_pickle
import importlib
import importlib.machinery
import importlib.util
import os
import pickle
import site
import sys
import sysconfig
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from trainguard.loading.refusals import LoadRefused, ModuleShadowed, UnvettedCheckpoint


def resolve_all(names: Iterable[str], *, trusted: frozenset[str] = frozenset()) -> dict[str, Any]:
    """name (`module.qualname`) → the object it leads to. Imports their modules.

    trusted: names the user vouches for; these may lie anywhere. Raises ModuleShadowed, or UnvettedCheckpoint where a
    library is not installed or has no such name.
    """
    return {name: _resolve(name, anywhere=name in trusted) for name in sorted(set(names))}


def _resolve(name: str, *, anywhere: bool) -> Any:
    parts = name.replace(":", ".").split(".")
    for length in range(len(parts) - 1, 0, -1):
        module = _module(".".join(parts[:length]), anywhere=anywhere)
        if module is None:
            continue
        value = module
        for part in parts[length:]:
            value = getattr(value, part, None)
        if value is not None:
            return value
    raise UnvettedCheckpoint(
        f"{name}: the checkpoint needs it and this environment has none",
        next_step=f"install the library that has {name}, in the version that wrote the checkpoint",
    )


def _module(name: str, *, anywhere: bool) -> Any:
    """The module, imported from where it belongs; None where there is none of that name."""
    top = name.partition(".")[0]
    if not anywhere:
        check_place(top)
    try:
        module = importlib.import_module(name)
    except ImportError:
        return None
    if not anywhere:
        _check_imported(top, module)
    return module


def check_place(top: str) -> None:
    """Raise ModuleShadowed unless the top-level module `top` comes from where such modules are installed."""
    loaded = sys.modules.get(top)
    spec = getattr(loaded, "__spec__", None) if loaded is not None else _spec(top)
    if spec is None or spec.origin in ("built-in", "frozen"):
        return
    standard = top in sys.stdlib_module_names
    folders = _standard_folders() if standard else _package_folders()
    places = [place for place in (spec.origin, *(spec.submodule_search_locations or ())) if place]
    for place in places:
        if not _lies_in(place, folders, packages=not standard):
            expected = "the standard library" if standard else "installed packages"
            raise ModuleShadowed(
                f"{top}: the checkpoint needs it from {expected}, and here it is {place}",
                next_step=f"find out who put {place} there, and remove it",
            )


def _spec(top: str) -> importlib.machinery.ModuleSpec | None:
    try:
        return importlib.util.find_spec(top)
    except (ImportError, ValueError, AttributeError):
        return None


def _check_imported(top: str, module: Any) -> None:
    """A submodule must lie in its package's own folder (or be compiled in)."""
    origin = getattr(getattr(module, "__spec__", None), "origin", None)
    if origin is None or origin in ("built-in", "frozen"):
        return
    standard = top in sys.stdlib_module_names
    if not _lies_in(origin, _standard_folders() if standard else _package_folders(), packages=not standard):
        raise ModuleShadowed(f"{module.__name__}: the checkpoint needs it from {top}, and here it is {origin}")


def _standard_folders() -> tuple[str, ...]:
    paths = sysconfig.get_paths()
    return tuple(os.path.realpath(paths[name]) for name in ("stdlib", "platstdlib") if name in paths)


def _package_folders() -> tuple[str, ...]:
    paths = sysconfig.get_paths()
    named = [paths[name] for name in ("purelib", "platlib") if name in paths]
    if hasattr(site, "getsitepackages"):
        named += site.getsitepackages()
    if site.ENABLE_USER_SITE:
        named.append(site.getusersitepackages())
    named += [entry for entry in sys.path if Path(entry).name in ("site-packages", "dist-packages")]
    return tuple(os.path.realpath(name) for name in named)


def _lies_in(place: str, folders: tuple[str, ...], *, packages: bool) -> bool:
    real = os.path.realpath(place)
    inside = any(real == folder or real.startswith(folder + os.sep) for folder in folders)
    # site-packages lies inside the standard library's folder, and is not part of it.
    return inside and (packages or f"{os.sep}site-packages{os.sep}" not in real)


def unpickler_of(allowed: Mapping[str, Any]) -> type[pickle.Unpickler]:
    """CPython's own unpickler, for which nothing exists but `allowed`."""

    class Exact(pickle.Unpickler):
        """Resolves the names of one vetted file; any other is refused at the opcode that names it."""

        def find_class(self, module: str, name: str) -> Any:
            return find(allowed, module, name)

    return Exact


def find(allowed: Mapping[str, Any], module: str, name: str) -> Any:
    """The object for what a stream names, Python 2 names mapped. Raises LoadRefused for a name that was not vetted."""
    mapped_module, mapped_name = _compat_pickle.NAME_MAPPING.get((module, name), (module, name))
    mapped_module = _compat_pickle.IMPORT_MAPPING.get(mapped_module, mapped_module)
    for full in (f"{module}.{name}", f"{mapped_module}.{mapped_name}"):
        if full in allowed:
            return allowed[full]
    raise LoadRefused(f"the stream names {module}.{name}, which was not in it when it was vetted")


def unpickle(file: BinaryIO, allowed: Mapping[str, Any], *, encoding: str = "ASCII") -> Any:
    """One pickle from `file`."""
    return unpickler_of(allowed)(file, encoding=encoding).load()
