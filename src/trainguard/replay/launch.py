"""How a recorded command is started again: by the auditor's Python, and all ranks of a job on this one host.

    with_python(["torchrun", "--nproc-per-node", "4", "train.py"], "/clean/bin/python")
        ["/clean/bin/python", "-m", "torch.distributed.run", "--nproc-per-node", "4", "train.py"]
    alone([… "torch.distributed.run", "--nnodes", "1", "--rdzv-endpoint", "node7:29500", …])
        without what says where ranks of several hosts meet, and with --standalone: a free port of this host
    of_one_rank([…, "-m", "torch.distributed.run", "--nproc-per-node", "4", "train.py", "--lr", "1"])
        [python, "train.py", "--lr", "1"]: one rank by itself; the variables that tell it which are the caller's

Ranks and their number are what they were in the run: the launcher counts them as it did.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from trainguard.errors import Unavailable

LAUNCHERS = {
    "torchrun": ("-m", "torch.distributed.run"),
    "accelerate": ("-m", "accelerate.commands.accelerate_cli"),
}
"""Console scripts that start ranks → the same as a module."""

TORCHRUN = frozenset({"torch.distributed.run", "torch.distributed.launch"})
PLACES = frozenset(
    {
        "nnodes",
        "node-rank",
        "rdzv-backend",
        "rdzv-endpoint",
        "rdzv-id",
        "rdzv-conf",
        "master-addr",
        "master-port",
        "local-addr",
        "max-restarts",
        "log-dir",
    }
)
"""Options of torchrun, each with a value, that say where its ranks meet and what is kept of them."""

FLAGS = frozenset({"standalone", "no-python", "no_python", "run-path", "run_path", "use-env", "module", "m"})


def with_python(words: Sequence[str], python: str | None) -> list[str]:
    """The command with the interpreter `python`, where one is given. Raises Unavailable for what is no Python job."""
    first = Path(words[0]).name
    if re.fullmatch(r"python[\d.]*t?", first) is not None:
        return [python or words[0], *words[1:]]
    if first in LAUNCHERS:
        return list(words) if python is None else [python, *LAUNCHERS[first], *words[1:]]
    raise Unavailable(
        f"its command begins with {words[0]!r}; expected `python …`, {' or '.join(f'`{name} …`' for name in LAUNCHERS)}"
    )


def alone(words: Sequence[str]) -> list[str]:
    """The command with all ranks on this host. Commands that are no torchrun are returned as they are."""
    start = _options_of_torchrun(words)
    if start is None:
        return list(words)
    kept = list(words[:start])
    place = start
    while place < len(words) and words[place].startswith("-"):
        name, sign, _ = words[place].lstrip("-").partition("=")
        takes_value = not sign and name not in FLAGS
        end = place + (2 if takes_value else 1)
        if name.replace("_", "-") not in PLACES and name != "standalone":
            kept.extend(words[place:end])
        if name in ("m", "module"):
            place = end
            break  # the next word is the module
        place = end
    return [*kept[:start], "--standalone", *kept[start:], *words[place:]]


def of_one_rank(words: Sequence[str]) -> list[str]:
    """What the launcher starts for each rank. Raises Unavailable where it is no torchrun."""
    start = _options_of_torchrun(words)
    if start is None:
        raise Unavailable(f"its ranks are started by {words[0]!r}; ranks in turn expect `torchrun …`")
    place, module = start, False
    while place < len(words) and words[place].startswith("-"):
        name, sign, _ = words[place].lstrip("-").partition("=")
        if name in ("no-python", "no_python", "run-path", "run_path"):
            raise Unavailable(f"torchrun {words[place]}: ranks in turn expect a script or a module")
        module = module or name in ("m", "module")
        place += 1 if sign or name in FLAGS else 2
    if place >= len(words):
        raise Unavailable("its command names no script behind torchrun")
    python = words[0] if Path(words[0]).name != "torchrun" else str(Path(words[0]).parent / "python")
    return [python, *(["-m"] if module else []), *words[place:]]


def _options_of_torchrun(words: Sequence[str]) -> int | None:
    """Where torchrun's own options begin; None where it is not torchrun that is started."""
    if Path(words[0]).name == "torchrun":
        return 1
    for place, word in enumerate(words[1:-1], 1):
        if word == "-m":
            return place + 2 if words[place + 1] in TORCHRUN else None
        if not word.startswith("-"):
            return None
    return None
