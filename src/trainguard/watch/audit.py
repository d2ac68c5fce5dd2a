"""One PEP 578 audit hook for the whole guard, with a table from event to handlers.

A hook cannot be removed again, so there is exactly one, it costs a dictionary look-up for events nobody asked
for, and it is never re-entered: what a handler itself does (open a file, import) is not handled. Exceptions of handlers
stay here, but for one: `Refused`, which ends what the job was about to do.
"""

from __future__ import annotations

import sys
import threading
from typing import Any, Callable, Dict, List, Optional, Tuple


class Refused(RuntimeError):
    """Raised through the hook into the job: what it was about to do is not allowed by its policy (watch/loads.py)."""


Handler = Callable[[Tuple[Any, ...]], None]
_handlers: Dict[str, List[Handler]] = {}
_inside = threading.local()
_report: Optional[Callable[[str, BaseException], None]] = None


def on(event: str, handler: Handler) -> None:
    """Call `handler(args)` at every audit event `event`. Handlers run in the thread that raised the event."""
    _handlers.setdefault(event, []).append(handler)


def install(report: Callable[[str, BaseException], None]) -> None:
    """Add the hook. report(place, error) is told of exceptions in handlers; they never reach the job."""
    global _report
    if _report is None:
        _report = report
        sys.addaudithook(_hook)


def entered() -> bool:
    """Begin work of our own in this thread: its audit events are not handled. Give the result to `left`."""
    before = getattr(_inside, "busy", False)
    _inside.busy = True
    return before


def left(before: bool) -> None:
    """End work begun with `entered`."""
    _inside.busy = before


def _hook(event: str, args: Tuple[Any, ...]) -> None:
    handlers = _handlers.get(event)
    if handlers is None or getattr(_inside, "busy", False):
        return
    _inside.busy = True
    try:
        for handler in handlers:
            try:
                handler(args)
            except Refused:
                raise
            except Exception as error:
                if _report is not None:
                    _report("audit." + event, error)
    finally:
        _inside.busy = False
