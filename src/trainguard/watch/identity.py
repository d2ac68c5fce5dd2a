"""Scale probe, inner half: be somebody else for a few steps.

A trigger may ask for the host, the account, the time or the number of devices (F5). In a probed process these answer as
planned, at the level of Python: native code and programs that are started still see the real ones. Environment
variables (USER, SLURM_JOB_NAME, …) are set by `trainguard probe` before the process starts.
"""

from __future__ import annotations

import sys
import time
from typing import Any, Callable, Dict


def assume(identity: Dict[str, Any]) -> None:
    """Take on "host", "user" and "time" (offset in seconds) of `identity`; names that are missing stay real."""
    host, user, offset = identity.get("host"), identity.get("user"), identity.get("time")
    if isinstance(host, str):
        _host(host)
    if isinstance(user, str):
        _user(user)
    if isinstance(offset, (int, float)) and offset:
        _clock(float(offset))


def _host(name: str) -> None:
    import os
    import platform
    import socket

    real = os.uname()
    answer = os.uname_result((real.sysname, name, real.release, real.version, real.machine))
    os.uname = lambda: answer
    socket.gethostname = lambda: name
    setattr(socket, "getfqdn", lambda *_: name)  # noqa: B010  the stub names its parameter
    platform.node = lambda: name


def _user(name: str) -> None:
    import os

    try:
        import pwd
    except ImportError:
        return
    lookup, own = pwd.getpwuid, os.getuid()

    def getpwuid(uid: int) -> Any:
        entry = lookup(uid)
        return pwd.struct_passwd((name, *tuple(entry)[1:])) if uid == own else entry

    pwd.getpwuid = getpwuid
    os.getlogin = lambda: name


def _clock(offset: float) -> None:
    """Shift the calendar clock; monotonic clocks, and with them every duration, stay."""
    now, now_ns = time.time, time.time_ns
    time.time = lambda: now() + offset
    time.time_ns = lambda: now_ns() + int(offset * 1e9)
    for name in ("localtime", "gmtime", "ctime"):
        setattr(time, name, _with_default(getattr(time, name)))
    asctime, strftime = time.asctime, time.strftime
    time.asctime = lambda *args: asctime(*(args or (time.localtime(),)))
    time.strftime = lambda form, *args: strftime(form, *(args or (time.localtime(),)))
    _calendar(sys.modules.get("datetime") or __import__("datetime"))


def _with_default(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda seconds=None: function(time.time() if seconds is None else seconds)


def _calendar(module: Any) -> None:
    """datetime.now and its kin are methods of built-in types: subclasses that pass for them take their place."""
    moment: Any = module.datetime
    day: Any = module.date

    class _Moment(type):
        def __instancecheck__(cls, value: Any) -> bool:
            return isinstance(value, moment)

        def __subclasscheck__(cls, other: Any) -> bool:
            return issubclass(other, moment)

    class _Day(type):
        def __instancecheck__(cls, value: Any) -> bool:
            return isinstance(value, day)

        def __subclasscheck__(cls, other: Any) -> bool:
            return issubclass(other, day)

    class Datetime(moment, metaclass=_Moment):  # type: ignore[misc]
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return moment.fromtimestamp(time.time(), tz)

        @classmethod
        def today(cls) -> Any:
            return moment.fromtimestamp(time.time())

        @classmethod
        def utcnow(cls) -> Any:
            return moment(*time.gmtime()[:6])

    class Date(day, metaclass=_Day):  # type: ignore[misc]
        @classmethod
        def today(cls) -> Any:
            return day.fromtimestamp(time.time())

    Datetime.__name__ = Datetime.__qualname__ = "datetime"
    Date.__name__ = Date.__qualname__ = "date"
    module.datetime, module.date = Datetime, Date
