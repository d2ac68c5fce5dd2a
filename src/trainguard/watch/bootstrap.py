"""Starts the guard inside one interpreter: connection, audit hook, code link, and the engine once torch is there.

Order matters: the code link is in place before any user module is imported; torch is never imported by us. Each part is
loaded and started by itself: one that cannot be does not silence the others, and is told:

    kind "boot", body {"failed": {part: "Error: text", …}}      only when a part failed (spec/evidence.md, "boot")
"""

from __future__ import annotations

import atexit
import importlib
import os
import sys
from typing import Any, Callable, Dict, Optional

from . import client

CHECKING = ("children", "code", "inputs", "loads")
"""Parts that are left out with --links none, in order; each has `install(client)`."""

_client: Optional[client.Client] = None


def start() -> None:
    """Called once per interpreter from boot/sitecustomize.py. Does nothing when no supervisor answers."""
    global _client
    path = os.environ.get("TRAINGUARD_SOCKET")
    if not path or _client is not None:
        return
    _client = client.Client(path)
    if not _client.open():
        return
    os.register_at_fork(after_in_child=_forked)
    atexit.register(_client.close)
    report = _client.fault
    _part("audit", lambda part: part.install(report))
    _part("shield", lambda part: part.install(_client))
    if _client.settings.get("links") == "none":
        if (_client.settings.get("gate") or {}).get("mode") == "stop":
            _part("loads", lambda part: part.install(_client))
        if _client.settings.get("commits") is True:
            if _client.settings.get("replay") is not None:
                _part("warp", lambda part: part.install(_client))
            _part("bootstrap", lambda _: after_import("torch", _attach_engine))
        return
    for name in CHECKING:
        _part(name, lambda part: part.install(_client))
    _part("bootstrap", lambda _: after_import("torch", _attach_engine))
    _part("probe", lambda part: part.install(_client))


def keeps_bytecode() -> bool:
    """Whether bytecode goes to the guard's private folder.

    It is then written also where the job's environment says to write none (images often do): what lies beside the
    sources is not read, so torch would be compiled at every start.
    """
    own = _client.settings.get("pycache") if _client is not None else None
    return bool(own) and sys.pycache_prefix == own


def _part(name: str, action: Callable[[Any], None]) -> None:
    """Load one part and act on it; report what fails, and go on."""
    try:
        action(importlib.import_module("." + name, __package__))
    except Exception as error:
        failed({name: "%s: %s" % (type(error).__name__, str(error)[:300])})


def failed(parts: Dict[str, str]) -> None:
    """Tell the supervisor which parts of the guard do not work in this process, and why."""
    if _client is not None and parts:
        _client.send("boot", {"failed": parts})


def current() -> Optional[client.Client]:
    """This process's connection to the supervisor; None in a process that is not guarded."""
    return _client


def _forked() -> None:
    if _client is None:
        return
    try:
        _client.after_fork()
    except Exception:
        return
    _part("probe", lambda part: part.forked())
    engine = sys.modules.get(__package__ + ".engine")
    if engine is not None:
        _part("engine", lambda part: part.forked(_client))
        _part("presence", lambda part: part.forked())


def _attach_engine() -> None:
    if _client is None:
        return
    _part("engine", lambda part: part.attach(_client))
    _part("links", lambda part: failed(part.FAILED))
    _part("presence", lambda part: part.install(_client))
    if _client.settings.get("probe") is not None:
        _part("probe", lambda part: part.attach(sys.modules["torch"]))
    if _client.settings.get("replay") is not None:
        _part("warp", lambda part: part.attach(sys.modules["torch"]))


def after_import(name: str, action: Callable[[], None]) -> None:
    """Run `action()` when the top-level import of `name` has completed, or now if it has."""
    if name in sys.modules:
        _guarded(action)
        return
    sys.meta_path.insert(0, _AfterImport(name, action))


def _guarded(action: Callable[[], None]) -> None:
    try:
        action()
    except Exception as error:
        if _client is not None:
            _client.fault("bootstrap", error)


class _AfterImport:
    """A meta path finder that finds nothing itself: it lets the others find `name` and wraps that one loader."""

    def __init__(self, name: str, action: Callable[[], None]) -> None:
        self.name = name
        self.action = action

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != self.name:
            return None
        sys.meta_path.remove(self)
        for finder in sys.meta_path:
            spec = finder.find_spec(name, path, target) if hasattr(finder, "find_spec") else None
            if spec is not None:
                _wrap_exec(spec, self.action)
                return spec
        return None


def _wrap_exec(spec: Any, action: Callable[[], None]) -> None:
    loader = spec.loader
    run = loader.exec_module

    def exec_module(module: Any) -> None:
        try:
            del loader.exec_module
        except AttributeError:
            pass
        run(module)
        _guarded(action)

    try:
        loader.exec_module = exec_module
    except AttributeError:
        pass
