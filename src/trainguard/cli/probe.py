"""`trainguard probe -- CMD…`: the same command as rank 0 of a big job, on one CPU, compared with a small one."""

from __future__ import annotations

import contextlib
import datetime
import os
import shlex
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import msgspec

from trainguard.appraise.engine import Appraiser
from trainguard.appraise.interface import Context
from trainguard.appraise.scale import Observation, compare, observe
from trainguard.appraise.verdict import Verdict
from trainguard.errors import Misuse
from trainguard.evidence import Evidence
from trainguard.home import Home
from trainguard.policy import Policy, load_policy
from trainguard.watch.supervisor import Settings, Supervisor, blocked_signals

BASE_STEPS = 8
"""The small job runs this many times the steps, so that what comes at times (the end of an epoch) is known."""

BUSY = 8
"""A probe stops itself after its limit of processor time; it is killed after so many times that by the clock."""

WORLD_LIMIT = 1 << 20
IDENTITY = ("host", "user", "job", "time", "gpus")
LAUNCHERS = ("torch.distributed.run", "torch.distributed.launch", "accelerate.commands.launch")
FLAGS = frozenset(
    (
        "--standalone",
        "--no-python",
        "--no_python",
        "--module",
        "--run-path",
        "--run_path",
        "--use-env",
        "--use_env",
        "--help",
        "--version",
        "--multi_gpu",
        "--cpu",
        "--quiet",
        "--debug",
        "--use_fsdp",
        "--use_deepspeed",
        "--enable_cpu_affinity",
        "--tpu",
    )
)
"""Options of torchrun and accelerate launch that take no value; every other one takes one."""


@click.command("probe", context_settings={"allow_interspersed_args": False})
@click.option("--world-size", "worlds", default="256,4096", show_default=True, help="Sizes to probe, by commas.")
@click.option("--base", default=2, show_default=True, help="The small size they are compared with.")
@click.option("--steps", default=5, show_default=True, help="Optimizer steps a size.")
@click.option("--seconds", default=60.0, show_default=True, help="Limit a size, in seconds of processor time.")
@click.option("--as", "identity", help="Also as somebody else: host=…,user=…,job=…,time=ISO 8601,gpus=N.")
@click.option("--policy", "policy_path", type=click.Path(path_type=Path), help="Policy file (TOML).")
@click.option("--json", "as_json", is_flag=True, help="Print the verdict document.")
@click.option("--quiet", is_flag=True, help="Print nothing; the exit status tells.")
@click.argument("cmd", nargs=-1, required=True, type=click.UNPROCESSED)
def command(
    worlds: str,
    base: int,
    steps: int,
    seconds: float,
    identity: str | None,
    policy_path: Path | None,
    as_json: bool,
    quiet: bool,
    cmd: tuple[str, ...],
) -> int:
    """Run CMD for a few steps as rank 0 of a job of each size, and say what it does only there.

    It really runs, here, in the working folder, without other ranks, and is stopped without its own clean-up.

    Exit status: 0 nothing, 1 violated, 3 suspicious or could not tell.
    """
    sizes = _sizes(worlds)
    spoofed = _identity(identity)
    if base < 1 or base >= min(sizes):
        raise Misuse(f"--base {base}: expected at least 1 and less than the probed sizes")
    prober = Prober(Home.find(), unwrapped(cmd), load_policy(policy_path), steps=steps, seconds=seconds, share=base)
    tell = _teller(quiet=quiet or as_json)
    verdict = prober.probe(base, sizes, spoofed, tell)
    if as_json:
        sys.stdout.buffer.write(msgspec.json.encode(verdict) + b"\n")
    elif not quiet:
        from trainguard.cli._view import show
        from trainguard.render.terminal import verdict_view

        show(lambda ascii_only: verdict_view(verdict, ascii_only=ascii_only))
    return verdict.exit_status


class Prober:
    """Runs one command at several sizes. Nothing is logged: a probe is a test, not the record of a training."""

    def __init__(
        self, home: Home, command: Sequence[str], policy: Policy, *, steps: int, seconds: float, share: int
    ) -> None:
        self._home = home
        self._command = list(command)
        self._policy = msgspec.structs.replace(policy, links="all")
        self._steps = steps
        self._seconds = seconds
        self._share = share

    def probe(self, base: int, sizes: Sequence[int], identity: Mapping[str, str], tell: Any = None) -> Verdict:
        """Probe `base`, every size, and with an identity the base and the largest size as that; compare.

        What differs is probed a second time.
        """
        tell = tell or (lambda _text: None)
        self._home.prepare()
        small = self.once(base, {}, steps=self._steps * BASE_STEPS, tell=tell)
        variants: list[tuple[int, Mapping[str, str]]] = [(size, {}) for size in sizes]
        if identity:
            variants += [(base, identity), (max(sizes), identity)]
        others = [self.once(size, who, steps=self._steps, tell=tell) for size, who in variants]
        first = compare(small, others, self._policy)
        doubtful = [
            (other.world, other.identity)
            for other in others
            if any(f"only at {other.name}: " in finding.message for finding in first.findings)
        ]
        if not doubtful:
            return first
        again = [self.once(size, who, steps=self._steps, tell=tell) for size, who in doubtful]
        return compare(small, others, self._policy, again=again)

    def once(self, world: int, identity: Mapping[str, str], *, steps: int, tell: Any) -> Observation:
        """One probed run."""
        plan = {"world": world, "share": self._share, "steps": steps, "seconds": self._seconds}
        settings = Settings(
            links="all",
            always_steps=steps,
            credit_seconds=self._seconds,
            kills=self._policy.kills,
            pycache=str(_private(self._home.cache / "bytecode")),
            probe=plan | {"identity": _planned(identity)},
        )
        records = _Records()
        began = time.monotonic()
        supervisor = Supervisor(records, settings)
        with tempfile.TemporaryFile() as output:
            with (
                _output_to(output.fileno()),
                blocked_signals() as mask,
                _ended_after(supervisor, self._seconds * BUSY + 15),
            ):
                supervisor.run(self._command, _environment(world, identity), mask=mask)
            output.seek(max(0, output.seek(0, os.SEEK_END) - 4096))
            tail = _last_line(output.read())
        appraiser = Appraiser(Context(run="probe", policy=self._policy, blob=self._home.blob))
        for record in records.kept:
            appraiser.see(_alone(record))
        findings = [finding for finding in appraiser.verdict().findings if finding.outcome != "not_checked"]
        seen = observe(records.kept, findings, world=world, identity=identity, tail=tail)
        tell(f"{seen.name}: {seen.steps} steps in {time.monotonic() - began:.1f} s")
        return seen


class _Records:
    """A recorder in memory."""

    def __init__(self) -> None:
        self.kept: list[Evidence] = []

    def add(self, kind: str, body: dict[str, Any], *, source: str = "supervisor", **fields: Any) -> Evidence:
        record = Evidence(n=len(self.kept), at=time.time_ns(), source=source, kind=kind, body=body, **fields)
        self.kept.append(record)
        return record

    def seal(self, *, final: bool = False) -> int | None:
        return None


def _alone(record: Evidence) -> Evidence:
    """A step as of a job of one: the group is a stand-in and gives gradients back; no other rank has a part in them.

    Without this, what a rank does to its gradients would wait to be compared with those of ranks that are not there.
    """
    gradients, weights = record.body.get("gradients"), record.body.get("weights")
    if record.kind != "step" or not isinstance(gradients, dict) or gradients.get("sharded") is True:
        return record
    body = record.body | {"gradients": gradients | {"world": 1}}
    if isinstance(weights, dict):
        body["weights"] = {key: value for key, value in weights.items() if key != "ranks"}
    return msgspec.structs.replace(record, body=body)


def unwrapped(command: Sequence[str]) -> list[str]:
    """The command for one process: `torchrun … train.py x` becomes `python train.py x`.

    Raises Misuse where a launcher's script cannot be told.
    """
    words = list(command)
    if words and words[0] == "--":
        words = words[1:]
    if not words:
        raise Misuse("no command given", next_step="trainguard probe -- python train.py")
    name = Path(words[0]).name
    if name == "torchrun":
        return _script_of(words[1:], _python_beside(words[0]), words)
    if name == "accelerate" and words[1:2] == ["launch"]:
        return _script_of(words[2:], _python_beside(words[0]), words)
    if name.startswith("python") and words[1:2] == ["-m"] and words[2:3] and words[2] in LAUNCHERS:
        return _script_of(words[3:], words[0], words)
    return words


def _script_of(words: list[str], python: str, whole: Sequence[str]) -> list[str]:
    module = False
    while words and words[0].startswith("-"):
        module = module or words[0] in ("-m", "--module")
        takes_value = "=" not in words[0] and words[0] not in FLAGS and words[0] != "-m"
        words = words[2:] if takes_value else words[1:]
    if not words:
        raise Misuse(
            f"{shlex.join(whole)[:200]}: expected a script after the launcher's options, found none",
            next_step="give the script's own command: trainguard probe -- python train.py",
        )
    return [python, *(["-m"] if module else []), *words]


def _python_beside(launcher: str) -> str:
    """The interpreter of a launcher script: the one that its first line names, else `python`."""
    path = shutil.which(launcher)
    if path is None:
        raise Misuse(f"{launcher}: no such command", next_step="check its spelling and PATH")
    with contextlib.suppress(OSError, UnicodeDecodeError):
        first = Path(path).read_bytes()[:512].split(b"\n")[0].decode()
        if first.startswith("#!/") and "python" in first and " " not in first:
            return first[2:]
    return "python"


def _environment(world: int, identity: Mapping[str, str]) -> dict[str, str]:
    """What a launcher gives rank 0 of `world`, and what the assumed identity shows in variables."""
    local = min(world, 8)
    env = dict(os.environ) | {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "GROUP_RANK": "0",
        "ROLE_RANK": "0",
        "WORLD_SIZE": str(world),
        "ROLE_WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(local),
        "GROUP_WORLD_SIZE": str(max(1, world // local)),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29500",
        "TORCHELASTIC_RUN_ID": "none",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_MAX_RESTARTS": "0",
    }
    if "host" in identity:
        env["HOSTNAME"] = identity["host"]
    if "user" in identity:
        env |= {"USER": identity["user"], "LOGNAME": identity["user"]}
    if "job" in identity:
        env |= {"SLURM_JOB_NAME": identity["job"], "SLURM_JOB_ID": identity["job"], "JOB_NAME": identity["job"]}
    return env


def _planned(identity: Mapping[str, str]) -> dict[str, Any]:
    plan: dict[str, Any] = {name: identity[name] for name in ("host", "user") if name in identity}
    if "gpus" in identity:
        plan["gpus"] = int(identity["gpus"])
    if "time" in identity:
        plan["time"] = _moment(identity["time"]).timestamp() - time.time()
    return plan


def _sizes(text: str) -> list[int]:
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not words or not all(word.isdigit() and 2 <= int(word) <= WORLD_LIMIT for word in words) or len(words) > 16:
        raise Misuse(f"--world-size {text[:100]!r}: expected up to 16 whole numbers from 2 to {WORLD_LIMIT}, by commas")
    return sorted({int(word) for word in words})


def _identity(text: str | None) -> dict[str, str]:
    """The pairs of --as. Raises Misuse for an unknown name or a value that is not one."""
    pairs = [pair.partition("=") for pair in text.split(",")] if text else []
    found = {name.strip(): value for name, _, value in pairs}
    unknown = [name for name in found if name not in IDENTITY or not found[name]]
    if unknown:
        raise Misuse(f"--as {unknown[0]!r}: expected NAME=VALUE with NAME one of {', '.join(IDENTITY)}")
    if "gpus" in found and not (found["gpus"].isdigit() and len(found["gpus"]) < 5):
        raise Misuse(f"--as gpus={found['gpus'][:20]}: expected a whole number")
    if "time" in found:
        _moment(found["time"])
    return found


def _moment(text: str) -> datetime.datetime:
    try:
        return datetime.datetime.fromisoformat(text).astimezone()
    except ValueError as error:
        raise Misuse(f"--as time={text[:40]}: expected ISO 8601, such as 2026-01-31T03:00") from error


def _private(path: Path) -> Path:
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    return path


@contextlib.contextmanager
def _ended_after(supervisor: Supervisor, seconds: float) -> Iterator[None]:
    """Within, a probed process that does not stop by itself in time is ended: it may hang in native code."""

    def end() -> None:
        if supervisor.child is not None:
            supervisor.recorder.add("timed_out", {"seconds": seconds})
            with contextlib.suppress(OSError):
                os.kill(supervisor.child, signal.SIGKILL)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextlib.contextmanager
def _output_to(descriptor: int) -> Iterator[None]:
    """Within, our stdout and stderr, which the command inherits, lead to `descriptor`."""
    sys.stdout.flush()
    sys.stderr.flush()
    saved = [os.dup(1), os.dup(2)]
    try:
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        yield
    finally:
        for number, copy in zip((1, 2), saved, strict=True):
            os.dup2(copy, number)
            os.close(copy)


def _last_line(data: bytes) -> str:
    lines = [line for line in data.decode(errors="replace").splitlines() if line.strip()]
    return lines[-1].strip()[:300] if lines else ""


def _teller(*, quiet: bool) -> Any:
    return (lambda _text: None) if quiet else (lambda text: print(f"trainguard: {text}", file=sys.stderr))
