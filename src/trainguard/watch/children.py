"""Link *processes*, inner half: programs that guarded processes start, with the line that started them.

A child that will not load our boot file (`python -I`, `-E`, `-S`, an emptied environment) is known here before it
runs, however short it lives. Nothing is prevented.
"""

from __future__ import annotations

import os
import sys
from typing import Any, Dict, List, Optional, Tuple

from . import audit
from .client import Client

ARGUMENT_LIMIT = 64

FOREIGN = frozenset(
    (
        "kill",
        "killpg",
        "tgkill",
        "sigqueue",
        "pthread_kill",
        "pthread_sigqueue",
        "raise",
        "syscall",
        "ptrace",
        "process_vm_writev",
        "pidfd_send_signal",
        "prlimit",
        "prlimit64",
    )
)
"""Functions of the C library that signal or reach into another process; looking one up through ctypes is told."""


def install(client: Client) -> None:
    """Listen for programs being started. Python-level forks say hello themselves and are not reported here."""

    def report(how: str, program: Any, arguments: Any, env: Any) -> None:
        client.send("spawn", {"how": how, **describe(program, arguments, env)})

    audit.on("subprocess.Popen", lambda args: report("subprocess", args[0], args[1], args[3]))
    audit.on("os.posix_spawn", lambda args: report("posix_spawn", args[0], args[1], args[2]))
    audit.on("os.exec", lambda args: report("exec", args[0], args[1], args[2]))
    audit.on("os.system", lambda args: report("system", args[0], [args[0]], None))
    audit.on("os.kill", lambda args: _kill(client, args[0], args[1]))
    audit.on("os.killpg", lambda args: _kill(client, -args[0], args[1]))
    audit.on("ctypes.dlsym", lambda args: foreign(client, args[1]))


def _kill(client: Client, pid: int, number: int) -> None:
    client.send("kill", {"pid": pid, "signal": int(number), "place": place()})


def foreign(client: Client, name: Any) -> None:
    """Report that a function of FOREIGN is looked up through ctypes, and where: the call itself raises no event."""
    text = name.decode(errors="replace") if isinstance(name, bytes) else name
    if isinstance(text, str) and text in FOREIGN:
        client.send("foreign", {"name": text, "place": place()})


def describe(program: Any, arguments: Any, env: Any) -> Dict[str, Any]:
    """A JSON value: what is started, whether our boot file will run in it (as far as flags and env tell), where."""
    words: List[str] = (
        [_text(arguments)] if isinstance(arguments, (str, bytes)) else [_text(a) for a in arguments or ()]
    )
    guarded: Optional[bool] = None
    if env is not None:
        path = env.get("PYTHONPATH") or env.get(b"PYTHONPATH")
        guarded = path is not None and os.path.dirname(os.path.abspath(__file__)) in _text(path)
    return {"program": _text(program), "args": words[:ARGUMENT_LIMIT], "guarded_env": guarded, "place": place()}


def place() -> Optional[str]:
    """`file:line` of the innermost frame outside the standard library and the guard, or None."""
    frame = sys._getframe(1)
    own = os.path.dirname(os.path.abspath(__file__))
    library = os.path.dirname(os.__file__)
    chosen: Optional[Tuple[str, int]] = None
    while frame is not None:
        name = frame.f_code.co_filename
        if not name.startswith(own) and not name.startswith("<"):
            chosen = chosen or (name, frame.f_lineno)
            if not name.startswith(library) or "site-packages" in name:
                chosen = (name, frame.f_lineno)
                break
        frame = frame.f_back  # type: ignore[assignment]
    return "%s:%d" % chosen if chosen else None


def _text(value: Any) -> str:
    return os.fsdecode(value)[:4096] if isinstance(value, (str, bytes, os.PathLike)) else str(value)[:4096]
