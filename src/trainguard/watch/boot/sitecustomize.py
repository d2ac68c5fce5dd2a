"""First user-level code of every interpreter of a guarded job (its folder stands first on PYTHONPATH).

Valid on every Python 3. Starts the guard, then hands over to the `sitecustomize` that would have run without us.
Nothing here may raise, print or leave a trace in the names a script can see, beyond what README.md states.
"""

import os
import sys


def _start_guard():
    if not os.environ.get("TRAINGUARD_SOCKET") or sys.version_info < (3, 8):
        return
    import importlib.util

    package = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    spec = importlib.util.spec_from_file_location(
        "_trainguard", os.path.join(package, "__init__.py"), submodule_search_locations=[package]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules["_trainguard"] = module
    # Bytecode of what we import goes to the private cache even where the job writes none, never beside the source.
    write, sys.dont_write_bytecode = sys.dont_write_bytecode, not getattr(sys, "pycache_prefix", None)
    try:
        spec.loader.exec_module(module)
        from _trainguard import bootstrap

        bootstrap.start()
        write = write and not bootstrap.keeps_bytecode()
    finally:
        sys.dont_write_bytecode = write


def _say_why(error):
    """The inner half could not be loaded at all: say hello and why with what the standard library has, and leave."""
    import json
    import socket

    place = type(error).__name__ + ": " + str(error)[:300]
    frames = (("hello", {"executable": sys.executable, "env": {}, "forked_from": None}),)
    frames += (("boot", {"failed": {"guard": place}}), ("bye", {"dropped": 0, "faults": {}}))
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as link:
        link.settimeout(5.0)
        link.connect(os.environ["TRAINGUARD_SOCKET"])
        for number, (kind, body) in enumerate(frames):
            link.send(json.dumps({"k": kind, "q": number, "b": body}).encode())
            if kind == "hello":
                link.recv(65536)


def _chain():
    """Import the sitecustomize that our folder hides, as if we were not there.

    Our folder goes back to its place on sys.path: programs that hand sys.path on to a child as its PYTHONPATH (torch's
    compiler does) would otherwise start it unguarded.
    """
    here = os.path.dirname(os.path.abspath(__file__))
    places = [place for place, entry in enumerate(sys.path) if entry and os.path.abspath(entry) == here]
    sys.path[:] = [entry for place, entry in enumerate(sys.path) if place not in places]
    own = sys.modules.pop("sitecustomize", None)
    try:
        import sitecustomize  # noqa: F401
    except ImportError as error:
        if error.name != "sitecustomize":
            raise
        if own is not None:
            sys.modules["sitecustomize"] = own
    finally:
        if places:
            sys.path.insert(places[0], here)


try:
    _start_guard()
except Exception as reason:  # the guard fails open: a job must start with or without us
    try:
        _say_why(reason)
    except Exception:  # no supervisor either; the missing hello is the alarm
        pass
_chain()
