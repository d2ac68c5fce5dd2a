"""Kill ledger, inner half: keep `os.kill` whole while the ledger is asked about it.

The kernel lets a sender wait until the keeper has taken its question. A signal with a handler that comes in those
microseconds ends the wait, and `kill` fails with EINTR without having sent anything. That never happens without a
ledger, and Python does not retry it: a parent with a SIGCHLD handler that terminates its workers one after another
would meet an InterruptedError (measured: up to 4 in 10 signals on a loaded machine). So for the length of the call the
signals that have a Python handler are held back in the calling thread.

The audit event comes before the call; there is none after it. What ends the shield is the thread's next profile event
(a call or return of the job's own code) or the next line of the function that called. Not shielded: signals to oneself
(their handler must have run when the call returns) and threads that a profiler or a debugger follows already.
"""

from __future__ import annotations

import _signal as signal  # type: ignore[import-not-found]  # the public one would bring enum into every job
import os
import sys
from typing import Any, Tuple

from . import audit
from .client import Client

_OWN = os.path.dirname(os.path.abspath(__file__))


def install(client: Client) -> None:
    """Shield os.kill and os.killpg where the welcome says that a ledger is on."""
    if client.settings.get("ledger") is True and hasattr(signal, "pthread_sigmask"):
        audit.on("os.kill", _before_kill)
        audit.on("os.killpg", _before_killpg)


def _before_kill(args: Tuple[Any, ...]) -> None:
    if isinstance(args[0], int) and args[0] > 0 and args[0] != os.getpid():
        _raise_shield()


def _before_killpg(args: Tuple[Any, ...]) -> None:
    if isinstance(args[0], int) and args[0] > 0 and args[0] != os.getpgrp():
        _raise_shield()


def _raise_shield() -> None:
    frame: Any = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith(_OWN):
        frame = frame.f_back
    if frame is None or frame.f_trace is not None or sys.getprofile() is not None or sys.gettrace() is not None:
        return
    handled = [number for number in signal.valid_signals() if callable(signal.getsignal(number))]
    if not handled:
        return
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, handled)

    def lower(current: Any, event: str, argument: Any) -> None:
        if current.f_code.co_filename.startswith(_OWN):
            return
        sys.setprofile(None)
        sys.settrace(None)
        frame.f_trace = None
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    try:
        frame.f_trace = lower
        sys.settrace(lower)
        sys.setprofile(lower)
    except BaseException:
        lower(frame, "", None)
        raise
