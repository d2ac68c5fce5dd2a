"""Replay, inner half: run the job's own, unmodified script again up to a step, quickly where nothing is compared.

Runs only where the welcome carries a plan (`trainguard audit`): never in a real training. It does what a guard must
not: it replaces functions. Plan: {"from": k, "until": m, "points": {rank: folder}, "plant": step | null,
"roots": [folders that may be written], "window": [step, step] to be tried again (reenact.py) | null,
"began_ns": when the run began, "trusted": [folders that may be newer],
"turn": {"rank", "ranks", "folder"} where ranks are replayed one after another (turns.py)}.

From the start (k = 0) nothing of the computation is touched: the script runs, link *commits* says every step, and after
step m the process is over. With k > 0 the script is *warped* to step k:

    learn    the first steps run for real; of every call of an outermost module is noted what it returned, and how far
             it moved torch's random stream, by the shapes it was given. Two equal observations make a rule.
    forward  until step k calls with a rule return what they returned before, and the random stream is moved by as much;
             calls without one run for real. `backward` and the update do nothing. Everything else, loaders, schedulers,
             loggers and the script's own Python, really runs, and every step says its streams, modes and settings, so
             that a warp that has lost its way is seen.
    land     at the end of step k weights, buffers and optimizer state are overwritten by the sealed ones. Settings,
             modes and streams are not: those come from the script and are compared.
    live     steps k+1 … m run for real.

What the script saves while the warp goes forward is saved, since it may load it again before step k: streams, counters
and schedulers in it are right, weights and optimizer state are those of the learning steps and are overwritten at
landing. Nobody is told of these files, and what lies outside `roots` cannot be written. If the script reads one of them
after landing, that is said: where the comparison then fails, a warp to a state sealed before that save will do.

Frames: kind "save" as in a run (saves.py); every step as in a run, with less in it while the warp goes forward; kind
"replay", body one of

    {"learnt": rules, "real": calls without one}   {"landed": k}   {"unsound": reason}   {"stopped": m}
    {"outside": path}                              wanted to write there
    {"newer": path}                                read, and changed since the run began
    {"saving": steps made, "aside": bool}          before a frame "save"; aside: by another thread than the steps
    {"read": path}                                 a file that may be a model, or whatever else is no source
    {"written": path, "steps": made}               by safetensors
    {"carried": path, "steps": made}               read after landing, and saved `made` steps in, while going forward
"""

from __future__ import annotations

import functools
import json
import os
import stat
import sys
import tempfile
import threading
import time
from typing import Any, Callable, Dict, List, Optional, Set, Tuple

from . import bootstrap, commits, points, reenact, sample, saves, shares, turns
from .client import Client

LEARNING_STEPS = 3
OBSERVATIONS = 2
OTHERS_SECONDS = 600.0
BLOCK = 624
"""Numbers that a Mersenne twister makes at once."""

BLOCKS_LIMIT = 20_000
RULES_LIMIT = 256
NEWER_LIMIT = 4096
READ_LIMIT = 200
CARRIED_LIMIT = 4096
SOURCES = (".py", ".pyc", ".so", ".pyi", ".pth", ".tmp", ".h", ".cpp")
OWN = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
LIBRARIES = (
    os.path.realpath(sys.prefix) + os.sep,
    os.path.realpath(sys.base_prefix) + os.sep,
    "/proc/",
    "/sys/",
    "/dev/",
)
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

_warp: Optional["Warp"] = None


class Unsound(Exception):
    """The warp cannot be trusted; the outer half replays from the start instead."""


class Rule:
    """What is known of calls of one module with arguments of one shape."""

    __slots__ = ("moves", "result", "seen", "steady")

    def __init__(self) -> None:
        self.seen = 0
        self.steady = True
        self.moves: Any = None
        self.result: Any = None


class Warp:
    """One replayed process."""

    def __init__(self, client: Client, plan: Dict[str, Any]) -> None:
        self.client = client
        self.begin = int(plan.get("from") or 0)
        self.until = int(plan["until"])
        self.points = {int(rank): str(folder) for rank, folder in (plan.get("points") or {}).items()}
        self.plant = int(plan.get("plant") or 0)
        """Step whose gradient we turn ourselves, to see that the verifier notices; 0 for none."""
        self.roots = [os.path.realpath(str(root)) for root in plan.get("roots") or ()]
        self.began_ns = int(plan.get("began_ns") or 0)
        self.trusted = [os.path.realpath(str(root)) for root in plan.get("trusted") or ()]
        self.newer: Set[str] = set()
        """Files it read that changed since the run began."""
        self.read: Set[str] = set()
        """Files it read that are no source."""
        self.pid = os.getpid()
        self.engine: Any = None
        self.torch: Any = None
        self.learning = self.begin > LEARNING_STEPS + 1
        self.forward = False
        self.depth = threading.local()
        self.rules: Dict[Any, Rule] = {}
        self.real = 0
        """Calls that had to run for real while going forward."""
        self.with_grad: Dict[int, List[int]] = {}
        """Optimizer → positions that had a gradient in the learning steps."""
        self.carried: Dict[str, int] = {}
        """Files written while going forward, and the steps made before."""
        self.zeros: Dict[int, Any] = {}
        self.restore: List[Callable[[], None]] = []
        self.thread = 0
        """The thread that made the last step; what another one saves may be changing meanwhile."""
        self.window: Optional[List[int]] = plan.get("window")
        self.explorer: Optional[reenact.Explorer] = None
        """Where steps are to be tried again with something done to them."""
        turn = plan.get("turn")
        self.turn = turns.Turn(self, turn) if isinstance(turn, dict) else None
        """Where ranks are replayed one after another."""

    @property
    def skipping(self) -> bool:
        """Whether the sealed state is not in place yet: what is computed until then counts for nothing."""
        return self.learning or self.forward

    # -- getting in -------------------------------------------------------------------------------------------------

    def attach(self, torch: Any, engine: Any) -> None:
        """torch has been imported and the engine listens."""
        self.torch, self.engine = torch, engine
        self._take_over_saves(torch)
        if self.turn is not None:
            self.turn.attach(torch)
        optimizer = sys.modules["torch.optim.optimizer"]
        if self.window:
            self.explorer = reenact.Explorer(self, int(self.window[0]), int(self.window[1]))
        if self.plant:
            optimizer.register_optimizer_step_pre_hook(self.planted)
        if self.begin:
            if not self.learning:
                return self.unsound("the point lies within the first steps")
            self._take_over(torch, optimizer)
        optimizer.register_optimizer_step_post_hook(self.stepped)
        return None

    def _take_over_saves(self, torch: Any) -> None:
        """Files are saved inside our roots only, and what they are given is told (saves.py); but while the warp goes
        forward they are not what the run had, so nothing is told of them.
        """
        saves.install(self.client, torch)
        real = torch.save

        def save(obj: Any, f: Any, *args: Any, **kwargs: Any) -> None:
            path = f if isinstance(f, (str, os.PathLike)) else None
            if path is not None:
                self._inside(path)  # torch's own writer raises no audit event
                self._carry(path)
            if self.forward:
                return self._untold(real, obj, f, *args, **kwargs)
            steps = self.engine.tally.steps if self.engine is not None else 0
            aside = self.thread not in (0, threading.get_ident())
            self.client.send("replay", {"saving": steps, "aside": aside})
            real(obj, f, *args, **kwargs)
            known = saves.current()
            if known is not None:
                known.flush()
            return None

        torch.save = save
        torch.serialization.save = save
        bootstrap.after_import("safetensors.torch", self._take_over_safetensors)

    def _untold(self, real: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        known = saves.current()
        if known is not None:
            known.muted = True
        try:
            real(*args, **kwargs)
        finally:
            if known is not None:
                known.muted = False

    def _take_over_safetensors(self) -> None:
        """The same for safetensors, which writes natively."""
        module: Any = sys.modules["safetensors.torch"]
        real = module.serialize_file

        def serialize_file(tensors: Any, filename: Any, *args: Any, **kwargs: Any) -> Any:
            self._inside(filename)
            self._carry(filename)
            if self.forward:
                return real(tensors, filename, *args, **kwargs)
            steps = self.engine.tally.steps if self.engine is not None else 0
            path = os.path.realpath(os.fsdecode(filename))
            self.client.send("replay", {"written": path, "steps": steps})
            return real(tensors, filename, *args, **kwargs)

        module.serialize_file = serialize_file

    def _take_over(self, torch: Any, optimizer: Any) -> None:
        """Stand in for module calls, backward and the update until step `begin`."""
        module, plain = torch.nn.Module, torch.nn.Module.__call__

        def called(this: Any, *args: Any, **kwargs: Any) -> Any:
            return self.call(plain, this, args, kwargs)

        module.__call__ = called
        self.restore.append(lambda: setattr(module, "__call__", plain))
        backward = torch.autograd.backward

        @functools.wraps(backward)
        def skipped(*args: Any, **kwargs: Any) -> Any:
            return self.fill() if self.forward else backward(*args, **kwargs)

        torch.autograd.backward = skipped
        self.restore.append(lambda: setattr(torch.autograd, "backward", backward))
        kind, wrap = optimizer.Optimizer, optimizer.Optimizer.profile_hook_step

        def profile_hook_step(function: Any) -> Any:
            real = wrap(function)

            @functools.wraps(real)
            def step(*args: Any, **kwargs: Any) -> Any:
                return self.skip(args, kwargs) if self.forward else real(*args, **kwargs)

            return step

        kind.profile_hook_step = staticmethod(profile_hook_step)

    # -- learn and go forward ---------------------------------------------------------------------------------------

    def call(self, plain: Any, module: Any, args: Tuple[Any, ...], kwargs: Dict[str, Any]) -> Any:
        """One call of a module: the outermost ones with parameters are learnt, then answered by rule."""
        if getattr(self.depth, "inside", False) or not (self.learning or self.forward) or os.getpid() != self.pid:
            return plain(module, *args, **kwargs)
        if next(module.parameters(), None) is None:
            return plain(module, *args, **kwargs)
        self.depth.inside = True
        try:
            return self._answer(plain, module, args, kwargs)
        finally:
            self.depth.inside = False

    def _answer(self, plain: Any, module: Any, args: Tuple[Any, ...], kwargs: Dict[str, Any]) -> Any:
        torch = self.torch
        key = (id(module), module.training, torch.is_grad_enabled(), _shape(torch, (args, kwargs)))
        rule = self.rules.get(key)
        if rule is None and len(self.rules) < RULES_LIMIT:
            rule = self.rules[key] = Rule()
        if self.forward and rule is not None and rule.steady and rule.seen >= OBSERVATIONS:
            self._move(rule.moves)
            return self._again(rule.result)
        self.real += self.forward
        before, others = self._stand(), commits.streams(torch)[1:3]
        result = plain(module, *args, **kwargs)
        if rule is not None and rule.steady:
            moves = self._moved(before)
            quiet = others == commits.streams(torch)[1:3]
            rule.steady = quiet and moves is not None and (not rule.seen or rule.moves == moves)
            rule.seen += 1
            rule.moves = moves
            if rule.steady and not self._keep(rule, result):
                rule.steady = False
        return result

    def _keep(self, rule: Rule, result: Any) -> bool:
        """Keep what came out, without its graph; False for what cannot be given out again."""
        pytree = self.torch.utils._pytree
        leaves, spec = pytree.tree_flatten(result)
        tensor = self.torch.Tensor
        if not all(isinstance(leaf, (tensor, bool, int, float, str, type(None))) for leaf in leaves):
            return False
        kept = [(x.detach().clone(), x.requires_grad) if isinstance(x, tensor) else (x, None) for x in leaves]
        rule.result = (kept, spec)
        return True

    def _again(self, result: Any) -> Any:
        torch = self.torch
        kept, spec = result
        one = torch.ones((), requires_grad=True)
        leaves = [
            x if graph is None else (x * one.to(x) if graph and torch.is_grad_enabled() else x.clone())
            for x, graph in kept
        ]
        return torch.utils._pytree.tree_unflatten(leaves, spec)

    def fill(self) -> None:
        """In place of backward: gradients of zeros where there were gradients."""
        for opt, _, track in points.optimizers(self.engine):
            wanted = self.with_grad.get(opt, ())
            for entry in track.entries:
                if entry.position in wanted and entry.param.grad is None:
                    zero = self.zeros.get(id(entry.param))
                    if zero is None:
                        zero = self.zeros[id(entry.param)] = self.torch.zeros_like(entry.param)
                    entry.param.grad = zero

    def skip(self, args: Tuple[Any, ...], kwargs: Dict[str, Any]) -> Any:
        """In place of an update."""
        optimizer = args[0]
        if getattr(self.depth, "stepping", False):
            return None
        self.depth.stepping = True
        try:
            closure = kwargs.get("closure") or (args[1] if len(args) > 1 else None)
            value = None
            if callable(closure):
                with self.torch.enable_grad():
                    value = closure()
            self._say(optimizer)
        finally:
            self.depth.stepping = False
        if self.engine.tally.steps >= self.begin:
            self.land()
        return value

    def _say(self, optimizer: Any) -> None:
        """The frame of a step that was skipped: streams, modes and settings."""
        engine = self.engine
        track = engine.track(optimizer)
        with engine.tally.lock:
            engine.tally.steps += 1
            track.count += 1
        engine._refresh(track, optimizer)
        step = _Skipped(engine, optimizer, track)
        link = next(link for link in engine.links if link.name == commits.Commits.name)
        link._look(step)
        value: Dict[str, Any] = {"rng": commits.streams(self.torch), "modes": link._modes(), "lean": True}
        link._groups(step, track, value)
        if engine._keep(engine.tally.steps, track, 0, 0, {commits.Commits.name: value}):
            engine.flush()

    # -- the random stream ------------------------------------------------------------------------------------------

    def _stand(self) -> Any:
        torch = self.torch
        devices = torch.cuda.default_generators if torch.cuda.is_initialized() else ()
        return torch.default_generator.get_state(), [each.get_offset() for each in devices]

    def _moved(self, before: Any) -> Any:
        """How far the streams moved since `before`: (numbers drawn on the CPU, offsets of devices); None if unclear."""
        state, offsets = self._stand()
        drawn = distance(self.torch, before[0], state)
        if drawn is None:
            return None
        return drawn, [now - was for was, now in zip(before[1], offsets)]

    def _move(self, moves: Any) -> None:
        drawn, offsets = moves
        draw(self.torch, self.torch.default_generator, drawn)
        for number, offset in enumerate(offsets):
            if offset:
                generator = self.torch.cuda.default_generators[number]
                generator.set_offset(generator.get_offset() + offset)

    # -- land and stop ----------------------------------------------------------------------------------------------

    def land(self) -> None:
        """Put the sealed state into the live objects and let the script go on for real."""
        self.learning = self.forward = False
        for undo in self.restore:
            undo()
        self.restore = []
        try:
            with self.torch.no_grad():
                restored(self.torch, self.engine, self.points[shares.world(self.torch)[0]])
        except (Unsound, OSError, ValueError, KeyError, TypeError, IndexError) as error:
            self.unsound("the sealed state does not fit the script: %s" % error)
            return
        self.zeros = {}
        sums = {"learnt": sum(rule.steady for rule in self.rules.values()), "real": self.real}
        self.client.send("replay", sums)
        self.client.send("replay", {"landed": self.begin}, self.begin)
        if self.explorer is not None:
            self.explorer.stepped(self.begin)

    def stepped(self, optimizer: Any, *_: Any) -> None:
        """A real update has been made, and its frame is out."""
        if os.getpid() != self.pid or self.engine is None:
            return
        self.thread = threading.get_ident()
        if not self.client.alive:
            os._exit(1)  # nobody listens: the audit was killed
        if self.learning and self.engine.tally.steps <= LEARNING_STEPS:
            for opt, _, track in points.optimizers(self.engine):
                held = [entry.position for entry in track.entries if entry.param.grad is not None]
                if track.ref() is optimizer:
                    self.with_grad[opt] = held
            if self.engine.tally.steps == LEARNING_STEPS:
                self.forward, self.learning = True, False
        if self.engine._stack():
            return
        if self.explorer is not None and not self.learning and not self.forward:
            self.explorer.stepped(self.engine.tally.steps)
            if self.explorer.trial is not None:
                return  # it ends when its own step is over
        if self.engine.tally.steps >= self.until:
            self.stop()

    def planted(self, optimizer: Any, args: Tuple[Any, ...], kwargs: Dict[str, Any]) -> Any:
        """The self-test's fault: comes after the engine's hook, so it is in the update and not in the gradient.

        Where the update computes its gradients itself, in a closure, they are turned when that has come back.
        """
        if self.engine.tally.steps != self.plant:
            return None
        _turn(optimizer)
        closure = kwargs.get("closure") or (args[1] if len(args) > 1 else None)
        if not callable(closure):
            return None

        def turned() -> Any:
            value = closure()
            _turn(optimizer)
            return value

        return (args[0], turned, *args[2:]) if len(args) > 1 else args, (
            {**kwargs, "closure": turned} if "closure" in kwargs else kwargs
        )

    def unsound(self, reason: str) -> None:
        """Say so and leave."""
        self.client.send("replay", {"unsound": reason[:1000]})
        self.stop()

    def stop(self) -> None:
        """Leave at once: nothing of the job's own clean-up runs, so nothing is saved over."""
        if self.engine is not None:
            self.engine.flush()
        self.client.send("replay", {"stopped": self.engine.tally.steps if self.engine is not None else 0})
        self._wait_for_others()
        self.leave()

    def leave(self) -> None:
        """End this process, with all that was said sent."""
        self.client.close()
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except Exception:
                pass
        os._exit(0)

    def _wait_for_others(self) -> None:
        """Where there are other ranks: keep our ends of their connections until all have come as far, or are over."""
        link = self.client.socket
        if self.turn is not None or link is None or self.torch is None or shares.world(self.torch)[1] == 1:
            return
        try:
            link.settimeout(OTHERS_SECONDS)
            link.recv(16)  # the host closes it
        except OSError:
            pass

    # -- outside ----------------------------------------------------------------------------------------------------

    def guard(self, event: str, args: Tuple[Any, ...]) -> None:
        """Audit hook: nothing outside our roots is written, so that the run's own files stay as they are."""
        if self.turn is not None and self.turn.owns(args[0] if args else None):
            return
        if event == "open":
            path, mode, flags = args
            writes = (isinstance(flags, int) and flags & WRITES) or (isinstance(mode, str) and set(mode) & set("wax+"))
            if not isinstance(path, int):
                if writes:
                    self._inside(path)
                    self._carry(path)
                else:
                    self._tell_carried(path)
                    self._note(path)
        elif event in ("os.remove", "os.mkdir", "os.rmdir", "os.truncate"):
            self._inside(args[0])
        elif event == "os.rename":
            self._inside(args[0])
            self._inside(args[1])
            self._rename(args[0], args[1])

    def _carry(self, path: Any) -> None:
        """A file is written: while the warp goes forward, weights in it are not those of its step."""
        if not isinstance(path, (str, bytes, os.PathLike)) or not (self.forward or self.carried):
            return
        real = os.path.realpath(os.fsdecode(path))
        if not self.forward:
            self.carried.pop(real, None)
        elif len(self.carried) < CARRIED_LIMIT:
            self.carried[real] = self.engine.tally.steps

    def _rename(self, old: Any, new: Any) -> None:
        """Files keep what is known of them, also those of a renamed folder."""
        if not self.carried or not all(isinstance(each, (str, bytes, os.PathLike)) for each in (old, new)):
            return
        was, now = (os.path.realpath(os.fsdecode(each)) for each in (old, new))
        for path in [each for each in self.carried if each == was or each.startswith(was + os.sep)]:
            self.carried[now + path[len(was) :]] = self.carried.pop(path)

    def _tell_carried(self, path: Any) -> None:
        """Such a file is read after landing."""
        if not self.carried or self.forward or not isinstance(path, (str, bytes, os.PathLike)):
            return
        real = os.path.realpath(os.fsdecode(path))
        steps = self.carried.pop(real, None)
        if steps is not None:
            self.client.send("replay", {"carried": real[:1000], "steps": steps})

    def _note(self, path: Any) -> None:
        """A file is read: say so if it is another one than the run can have read."""
        if not self.began_ns or not isinstance(path, (str, bytes, os.PathLike)) or len(self.newer) >= NEWER_LIMIT:
            return
        try:
            real = os.path.realpath(os.fsdecode(path))
            status = os.stat(real)
        except (OSError, ValueError):
            return
        self._tell_read(real, status)
        if max(status.st_mtime_ns, status.st_ctime_ns) < self.began_ns or not stat.S_ISREG(status.st_mode):
            return
        apart = (*self.roots, *self.trusted, "/proc", "/sys", "/dev", OWN)
        if real not in self.newer and not any(real == root or real.startswith(root + os.sep) for root in apart):
            self.newer.add(real)
            self.client.send("replay", {"newer": real[:1000]})

    def _tell_read(self, real: str, status: os.stat_result) -> None:
        if real in self.read or len(self.read) >= READ_LIMIT or not stat.S_ISREG(status.st_mode):
            return
        if not real.endswith(SOURCES) and not real.startswith(LIBRARIES):
            self.read.add(real)
            self.client.send("replay", {"read": real[:1000]})

    def _inside(self, path: Any) -> None:
        if not isinstance(path, (str, bytes, os.PathLike)):
            return
        real = os.path.realpath(os.fsdecode(path))
        if not any(real == root or real.startswith(root + os.sep) for root in self.roots):
            self.client.send("replay", {"outside": real[:1000]})
            raise PermissionError(13, "a replay does not write outside its own folder", real)


def _turn(optimizer: Any) -> None:
    """Turn the sign of every gradient."""
    for group in optimizer.param_groups:
        for param in group["params"]:
            if param.grad is not None:
                param.grad.neg_()


class _Skipped:
    """As much of engine.Step as link *commits* needs for a step that was not made."""

    def __init__(self, engine: Any, optimizer: Any, track: Any) -> None:
        self.engine = engine
        self.torch = engine.torch
        self.optimizer = optimizer
        self.track = track
        self.number = engine.tally.steps
        self.opt = track.opt


def _shape(torch: Any, value: Any) -> Any:
    """What decides how much a call computes: structure, shapes, types, and plain values."""
    leaves, spec = torch.utils._pytree.tree_flatten(value)
    told: List[Any] = [str(spec)]
    for leaf in leaves:
        if isinstance(leaf, torch.Tensor):
            told.append((tuple(leaf.shape), str(leaf.dtype), str(leaf.device)))
        elif isinstance(leaf, (bool, int, float, str, type(None))):
            told.append(leaf)
        else:
            told.append(type(leaf).__name__)
    return tuple(told)


def draw(torch: Any, generator: Any, count: int) -> None:
    """Move a CPU generator on by `count` numbers of 32 bits."""
    if count:
        torch.empty(count, dtype=torch.int32).random_(generator=generator)


def distance(torch: Any, before: Any, after: Any) -> Optional[int]:
    """How many numbers of 32 bits lie between two states of a CPU generator; None when it is not found soon."""
    if torch.equal(before, after):
        return 0
    scratch = torch.Generator()
    scratch.set_state(before)
    count = (_place(after) - _place(before)) % BLOCK
    draw(torch, scratch, count)
    for _ in range(BLOCKS_LIMIT):
        if torch.equal(scratch.get_state(), after):
            return count
        draw(torch, scratch, BLOCK)
        count += BLOCK
    return None


def _place(state: Any) -> int:
    """How many numbers of its block a generator has given out (`next` of at::mt19937_data_pod)."""
    return int.from_bytes(bytes(state[16:24].tolist()), "little") % BLOCK


def restored(torch: Any, engine: Any, folder: str) -> None:
    """Overwrite weights, buffers and optimizer state by a point's. Raises Unsound where the two do not fit."""
    with open(os.path.join(folder, "index.json"), "rb") as file:
        index = json.loads(file.read())
    path = os.path.join(folder, "data")
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        data = torch.frombuffer(bytearray(file.read()), dtype=torch.uint8) if size else torch.empty(0)
    sealed = {}
    for name, dtype, shape, offset, nbytes in index["tensors"]:
        flat = data[offset : offset + nbytes]
        kind = getattr(torch, dtype)
        sealed[name] = (flat.view(kind) if nbytes else torch.empty(0, dtype=kind)).reshape(shape)
    live = points.named(torch, engine)
    live += points.loose(torch, engine, live)
    expected = {name for name in sealed if name.split("/", 1)[0] in ("param", "buffer", "loose")}
    odd = sorted(name for name in expected ^ {name for name, _ in live} if name.split("/")[1][:1] != "x")
    if odd:
        raise Unsound("%d names of tensors differ, first %s" % (len(odd), odd[0]))
    for name, tensor in live:
        if name.split("/")[1][:1] == "x" and (name not in sealed or sealed[name].shape != tensor.shape):
            continue
        _put(name, sample.plain(tensor.detach()), sealed[name])
    for opt, optimizer, track in points.optimizers(engine):
        for entry in track.entries:
            _restore_state(torch, optimizer, entry, "state/%d/%d/" % (opt, entry.position), sealed, index["numbers"])


def _put(name: str, tensor: Any, sealed: Any) -> None:
    if tensor.shape != sealed.shape or tensor.dtype != sealed.dtype:
        raise Unsound("%s: expected %s %s, sealed is %s %s" % (
            name, tuple(tensor.shape), tensor.dtype, tuple(sealed.shape), sealed.dtype
        ))  # fmt: skip
    tensor.copy_(sealed)


def _restore_state(torch: Any, optimizer: Any, entry: Any, prefix: str, sealed: Any, numbers: Any) -> None:
    held = optimizer.state.get(entry.param) or {}
    keys = {name[len(prefix) :] for name in list(sealed) + list(numbers) if name.startswith(prefix)}
    if set(map(str, held)) != keys:
        raise Unsound("state of %s: expected %s, sealed are %s" % (entry.name, sorted(map(str, held)), sorted(keys)))
    for key, value in held.items():
        name = prefix + str(key)
        if isinstance(value, torch.Tensor):
            _put(name, sample.plain(value), sealed[name])
        else:
            held[key] = type(value)(numbers[name])


def _hasten(times: float) -> None:
    """From now on the job's clocks run so much faster: what it takes from them is other than in another replay."""

    def faster(plain: Callable[[], Any], unit: type) -> Callable[[], Any]:
        began = plain()
        return lambda: unit(began + (plain() - began) * times)

    for name in ("time", "monotonic", "perf_counter"):
        setattr(time, name, faster(getattr(time, name), float))
        setattr(time, name + "_ns", faster(getattr(time, name + "_ns"), int))


def install(client: Client) -> None:
    """Begin, where the welcome carries a plan."""
    global _warp
    plan = client.settings.get("replay")
    if not isinstance(plan, dict):
        return
    _warp = Warp(client, plan)
    if float(plan.get("clock") or 1.0) != 1.0:
        _hasten(float(plan["clock"]))
    tempfile.gettempdir()
    sys.addaudithook(_warp.guard)


def attach(torch: Any) -> None:
    """Called once torch has been imported, after the engine."""
    from . import engine

    if _warp is not None:
        _warp.attach(torch, engine.current())
