"""Link *replicas*: what one rank of a job holds, in a form that can be compared with what the other ranks hold.

Once in every ROUND steps of an optimizer, at a step that only the supervisor's key tells, every rank reads the same
secret places of its weights, its optimizer's state and its buffers, just before the update, and sends their checksums.
Ranks of one host are compared by the judge, from their frames. Ranks of several hosts also leave what they hold in the
job's own store and note what the others left there (`_Exchange`), so that every host's log shows it.

Value of the link (spec/evidence.md "replicas"):

    {"rank", "world": what torch.distributed says, "job": checksum of where its ranks met,
     "round": number of the round, "weights": CRC-32 of the places of every tensor, 8 hex digits each,
     "whole": sums over whole tensors, in turns, "state": CRC-32 of all places of the state,
     "buffers": CRC-32 of every buffer, 8 hex digits each, "hyper": CRC-32 of every group's entries,
     "names": names of tensors, "buffer_names", "backend", "hooks": [[communication hook, place]], "identity": {…},
     "foreign": [[collective, place]] of those that are not torch's own
                                                     (in the first round, and again when one of them changed)
     "hosts": {"round", "own": text, "seen": {"<opt>.<round>.<rank>": text}}   left in the store, and found there}

A round is one step of every 5; where the budget binds, one of every 10, 20, … of them. Which ones is told by a tree of
draws, so that the rounds of a rank with less room are also rounds of one with more.

Nothing here is a collective, and nothing waits for another rank: the store is asked by a thread of its own, over a
connection of its own, and what is not there yet is left out.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import sys
import threading
import zlib
from typing import TYPE_CHECKING, Any, Callable, Dict, List, Optional, Tuple

from . import origin, roots, sample
from .client import Client
from .weights import _Snapshot, _Sums

if TYPE_CHECKING:
    from .engine import Step

ROUND = 5
"""Steps of which one is a round: two rounds are 9 steps apart at most while the budget has room."""
FREE_LEVEL = 2
"""Governor's level up to which every round is made."""
RARE_ROUNDS = 4
"""Of so many rounds one also looks at names, hooks and collectives."""
EPOCH = 32
"""Rounds that look at the same places."""
TENSORS_LIMIT = 128
BUFFERS_LIMIT = 64
ELEMENTS = 32
HOOKS_LIMIT = 16
COLLECTIVES = (
    "all_reduce",
    "all_gather",
    "all_gather_into_tensor",
    "all_gather_single",
    "all_to_all",
    "all_to_all_single",
    "barrier",
    "broadcast",
    "get_rank",
    "get_world_size",
    "new_group",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_single",
    "reduce_scatter_tensor",
)
HOSTS_ROUND = 8
"""Steps of which one is left in the store, where ranks run on several hosts."""
NEVER = 1 << 62
PEERS = 8
"""Other ranks looked up in a round of the store; they take turns."""
KEEP_ROUNDS = 4
VALUE_LIMIT_BYTES = 1024
QUEUE_LIMIT = 8

Draw = Callable[..., int]


class Replicas:
    """Reads what this rank holds, at the steps of a round."""

    name = "replicas"
    every_step = True

    def __init__(self, client: Client) -> None:
        self.client = client
        self.world = 1
        self.group: Any = None
        """The default process group that `world` is the size of."""
        self.job = ""
        """Where its ranks met: tells two jobs of one run apart."""
        self.exchange: Optional[_Exchange] = None
        self.tried = False

    def before(self, step: Step) -> None:
        """Look, if this step is a round. Before the update, so that all ranks look at the same moment."""
        group = _group()
        if group is not self.group:
            self.group, self.tried, self.exchange = group, False, None
            self.world = _world(step.torch)
            self.job = _meeting() if self.world > 1 else ""
        if self.world < 2:
            return
        governor = step.engine.governor
        memory = step.track.memory.setdefault(self.name, {"sent": {}, "due": 1, "hosts_due": 0})
        if step.index < memory["due"] and step.index < memory["hosts_due"]:
            return
        value: Dict[str, Any] = {}
        if step.index == memory["due"]:
            number = (step.index - 1) // ROUND
            with step.torch.no_grad():
                value.update(_look(step, memory, "own", governor.draw, number))
            value["round"] = number
            if step.index == 1 or number % RARE_ROUNDS == 0:
                self._once(step, memory, value)
        if step.index >= memory["due"]:
            memory["due"] = next_round(governor.draw, step.opt, step.index, ROUND, _shift(governor))
        self._hosts(step, memory, value)
        if value:
            value["rank"], value["world"] = step.torch.distributed.get_rank(), self.world
            value["job"] = self.job
            step.scratch[self.name] = value

    def after(self, step: Step) -> Any:
        """What was read."""
        return step.scratch.get(self.name)

    def still(self, track: Any, optimizer: Any, still: Any) -> bool:
        """Nothing to say before the next round; the step before it ends the quiet, so that we are called in time."""
        module = sys.modules.get("torch.distributed.distributed_c10d")
        world = getattr(module, "_world", None)
        if "_default_pg" in getattr(world, "__dict__", ()):  # what GroupMember.WORLD gives, without three calls
            still.same.append((world, "_default_pg", self.group))
        elif module is not None:
            still.same.append((module.GroupMember, "WORLD", self.group))
        memory = track.memory.get(self.name)
        if self.world < 2 or memory is None:
            return self.world < 2
        still.until = min(still.until, max(track.count + 1, min(memory["due"], memory["hosts_due"]) - 1))
        return True

    def _once(self, step: Step, memory: Dict[str, Any], value: Dict[str, Any]) -> None:
        """What seldom changes: sent when it is another than the last sent."""
        rare: Dict[str, Any] = {
            "names": [entry.name for entry in step.track.entries[:TENSORS_LIMIT]],
            "buffer_names": [name for name, _ in _buffers(step, memory)],
            "backend": _backend(step.torch),
            "hooks": comm_hooks(),
            "foreign": foreign(step.torch),
        }
        if not self.tried:
            rare["identity"] = identity(step.torch)
        sent = memory["sent"]
        for key, now in rare.items():
            if sent.get(key) != now:
                sent[key] = value[key] = now

    # -- several hosts ----------------------------------------------------------------------------------------

    def _hosts(self, step: Step, memory: Dict[str, Any], value: Dict[str, Any]) -> None:
        if not self.tried:
            self.tried = True
            self.exchange = _Exchange.begin(step.torch, self.client)
        exchange = self.exchange
        draw = exchange.draw if exchange is not None else None
        if exchange is None or draw is None:
            memory["hosts_due"] = NEVER if exchange is None else step.index + HOSTS_ROUND
            return
        due, memory["hosts_due"] = memory["hosts_due"], next_round(draw, step.opt, step.index, HOSTS_ROUND, 0)
        if step.index != due or step.index == 1 or not is_round(draw, step.opt, step.index, HOSTS_ROUND, 0):
            return
        number = (step.index - 1) // HOSTS_ROUND
        with step.torch.no_grad():
            look = _look(step, memory, "hosts", draw, number)
        own = json.dumps(
            {
                "weights": _crc((look["weights"] + repr(look["whole"])).encode()),
                "state": look["state"],
                "hyper": look["hyper"],
                "world": self.world,
                "identity": exchange.identity,
            },
            separators=(",", ":"),
        )
        value["hosts"] = {"round": number, "own": own, "seen": exchange.turn(step.opt, number, own)}

    def forked(self) -> None:
        """A child has neither the ranks nor the thread."""
        self.exchange = None
        self.tried = True


def is_round(draw: Draw, opt: int, index: int, size: int, shift: int) -> bool:
    """Whether step `index` is its block's round: one secret step in `size`, and of 2**shift such blocks one.

    With a larger shift the rounds are a part of those with a smaller one. The first step is always one.
    """
    if index == 1:
        return True
    block = (index - 1) // size
    if (index - 1) % size != draw(b"round", opt, block, size) % size:
        return False
    return all(draw(b"half", opt, up, block >> up) % 2 == (block >> (up - 1)) & 1 for up in range(1, shift + 1))


def next_round(draw: Draw, opt: int, index: int, size: int, shift: int) -> int:
    """The first round after step `index`."""
    shift = max(0, shift)
    for block in range(index // size, index // size + (2 << shift) + 1):
        found = block * size + 1 + draw(b"round", opt, block, size) % size
        if found > index and is_round(draw, opt, found, size, shift):
            return found
    return index + 1


def _shift(governor: Any) -> int:
    return 0 if governor.everything else max(0, governor.level - FREE_LEVEL)


def _look(step: Step, memory: Dict[str, Any], which: str, draw: Draw, number: int) -> Dict[str, Any]:
    """Checksums of the secret places of this round."""
    torch = step.torch
    epoch = number // EPOCH
    state = step.optimizer.state
    kept = memory.get(which)
    signature = (step.track.signature, epoch, sum(map(len, state.values())))
    if kept is None or kept[0] != signature or kept[1].state is not state:
        entries = [e for e in step.track.entries[:TENSORS_LIMIT] if e.reason is None]
        chosen = [(e, sample.run(e.numel, ELEMENTS, draw(b"replica", step.opt, epoch, e.position))) for e in entries]
        kept = memory[which] = (signature, _Snapshot(torch, step.track, step.optimizer, chosen), _Sums(step.track))
    snapshot, sums = kept[1], kept[2]
    value: Dict[str, Any] = {"weights": "", "state": "", "whole": []}
    if snapshot.slots:
        kind, data = snapshot.read(torch)
        pieces = _pieces(snapshot, kind, data)
        weights = len(snapshot.chosen)
        value["weights"] = "".join(map(_crc, pieces[:weights]))
        value["state"] = _crc(b"".join(pieces[weights:]))
    if sums.pieces:
        sums.turn, sums.rest = number * 8, -1
        sums.take(torch)
        value["whole"] = sums.sums
    value["buffers"] = "".join(_crc(_some(torch, tensor)) for _, tensor in _buffers(step, memory))
    value["hyper"] = _crc(json.dumps(_hyper(step), sort_keys=True, default=str).encode())
    return value


def _pieces(snapshot: _Snapshot, kind: str, data: bytes) -> List[bytes]:
    out: List[bytes] = []
    position = 0
    for (_, _, where), tensor in zip(snapshot.slots, snapshot.tensors):
        end = position + where[2] * (tensor.element_size() if kind == "raw" else 4 if kind == "<f" else 8)
        out.append(data[position:end])
        position = end
    return out


def _hyper(step: Step) -> List[Dict[str, Any]]:
    known = step.track.memory.get("hyperparameters", {}).get("json") or []
    return [{key: value for key, value in group.items() if key not in ("n", "tensors")} for group in known]


def _buffers(step: Step, memory: Dict[str, Any]) -> List[Tuple[str, Any]]:
    """Persistent state of modules that no gradient moves, such as running means. Looked for once in 64 steps."""
    known: Optional[List[Tuple[str, Any]]] = memory.get("buffers")
    if known is None or step.index % 64 == 0:
        known = []
        for root in roots.roots():
            for name, tensor in root.named_buffers():
                if tensor is not None and tensor.device.type == "cpu" and tensor.numel() and not tensor.is_sparse:
                    known.append((name, tensor))
        memory["buffers"] = known = known[:BUFFERS_LIMIT]
    return known


def _some(torch: Any, tensor: Any) -> bytes:
    """Up to ELEMENTS elements from the start of a buffer, as bytes."""
    flat = sample.plain(tensor).detach().reshape(-1)[:ELEMENTS].contiguous()
    return bytes(flat.view(torch.uint8).tolist()) if flat.dtype != torch.bool else bytes(flat.tolist())


def _crc(data: bytes) -> str:
    return "%08x" % zlib.crc32(data)


def _group() -> Any:
    member = getattr(sys.modules.get("torch.distributed.distributed_c10d"), "GroupMember", None)
    return getattr(member, "WORLD", None)


def _meeting() -> str:
    """Checksum of where the ranks of this job met, the same on all of them; empty where that cannot be told."""
    try:
        from torch.distributed import distributed_c10d

        store = distributed_c10d._get_default_store()
        for _ in range(8):
            store = getattr(store, "underlying_store", store)
        where = getattr(store, "path", None) or "%s" % getattr(store, "port", "")
        return _crc(("%s %s" % (type(store).__name__, where)).encode())
    except Exception:
        return ""


def _world(torch: Any) -> int:
    distributed = getattr(torch, "distributed", None)
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return 1
    return int(distributed.get_world_size())


def _backend(torch: Any) -> str:
    return str(torch.distributed.get_backend())[:80]


def comm_hooks() -> List[List[str]]:
    """[qualified name, file:line] of every communication hook that was put on a DistributedDataParallel."""
    out: List[List[str]] = []
    for wrapper in roots.wrappers():
        for hook, _ in list(getattr(wrapper, "_comm_hooks", None) or []):
            code = getattr(getattr(hook, "__func__", hook), "__code__", None)
            place = "%s:%d" % (code.co_filename, code.co_firstlineno) if code is not None else ""
            name = "%s.%s" % (getattr(hook, "__module__", "?"), getattr(hook, "__qualname__", type(hook).__name__))
            out.append([name[:200], place[:1024]])
    return out[:HOOKS_LIMIT]


def foreign(torch: Any) -> List[List[str]]:
    """[name, place] of collectives, and the kind of group, that are not torch's own: who answers when ranks talk.

    Where a name of torch.distributed was bound to another function, its place is that function's `file:line`.
    """
    folder = str(torch.__file__).rsplit("/", 1)[0] + "/distributed/"
    found: List[List[str]] = []
    for module in (torch.distributed, sys.modules.get("torch.distributed.distributed_c10d")):
        for name in COLLECTIVES:
            function = getattr(module, name, None)
            code = getattr(function, "__code__", None)
            if (
                function is None
                or (code is not None and code.co_filename.startswith(folder))
                or origin.is_ours(function)
            ):
                continue
            where = "%s:%d" % (code.co_filename, code.co_firstlineno) if code is not None else type(function).__name__
            if ["torch.distributed." + name, where[:1024]] not in found:
                found.append(["torch.distributed." + name, where[:1024]])
    kind = type(_group())
    if _group() is not None and not str(kind.__module__).startswith("torch."):
        found.append(["process group", "%s.%s" % (kind.__module__, kind.__qualname__)])
    return found[:HOOKS_LIMIT]


def identity(torch: Any) -> Dict[str, Any]:
    """What makes two ranks the same: versions, the main script's bytes, precision settings, the code of collectives."""
    from . import modules

    flags: Dict[str, Any] = {}
    for name, read in modules.readers(torch):
        with contextlib.suppress(Exception):  # a flag that this torch does not have
            flags[name] = read()
    for own in ("num_threads", "anomaly_mode"):  # ranks may have different numbers of processors; one may be debugged
        flags.pop(own, None)
    return {
        "python": sys.version.split()[0],
        "torch": str(torch.__version__),
        "accelerator": str(torch.version.cuda or torch.version.hip or ""),
        "main": _main(),
        "flags": hashlib.sha256(json.dumps(flags, sort_keys=True, default=str).encode()).hexdigest()[:16],
        "restart": os.environ.get("TORCHELASTIC_RESTART_COUNT", "")[:20],
    }


def _main() -> str:
    path = getattr(sys.modules.get("__main__"), "__file__", None)
    try:
        with open(str(path), "rb") as file:
            return hashlib.sha256(file.read(1 << 22)).hexdigest()[:16]
    except OSError:
        return ""


class _Exchange:
    """Leaves texts in the job's store and finds those of others, from a thread that may wait as long as it likes."""

    def __init__(self, store: Any, torch: Any, client: Client) -> None:
        self.store = store
        self.client = client
        self.rank = int(torch.distributed.get_rank())
        self.world = int(torch.distributed.get_world_size())
        self.identity = _crc(json.dumps(identity(torch), sort_keys=True).encode())
        self.attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")[:20]
        self.draw: Optional[Draw] = None
        """Draws that are the same on all hosts; None until the store has told the number they come from."""
        self.waiting: List[Tuple[int, int, str]] = []
        self.found: Dict[str, str] = {}
        """`<opt>.<round>.<rank>` → what that rank left there."""
        self.wake = threading.Semaphore(0)
        self.lock = threading.Lock()

    @classmethod
    def begin(cls, torch: Any, client: Client) -> "Optional[_Exchange]":
        """An exchange over the job's TCPStore; None where all ranks run on this host, or there is no such store."""
        local = os.environ.get("LOCAL_WORLD_SIZE")
        if local is not None and local == str(_world(torch)):
            return None
        try:
            from torch.distributed import PrefixStore, distributed_c10d

            store = distributed_c10d._get_default_store()
            inner = store
            for _ in range(8):
                inner = getattr(inner, "underlying_store", inner)
            if type(inner).__name__ != "TCPStore":
                return None
            exchange = cls(PrefixStore("trainguard", inner.clone()), torch, client)
        except Exception as error:
            client.fault("replicas.store", error)
            return None
        threading.Thread(target=exchange._work, name="trainguard-replicas", daemon=True).start()
        return exchange

    def turn(self, opt: int, number: int, own: str) -> Dict[str, str]:
        """Hand over what this rank holds in a round; returns what was found since: `<opt>.<round>.<rank>` → text."""
        with self.lock:
            found, self.found = self.found, {}
            if len(self.waiting) < QUEUE_LIMIT:
                self.waiting.append((opt, number, own))
        self.wake.release()
        return found

    def _work(self) -> None:
        """The thread: agree on a number, then serve one round after the other. Ends at the first failure."""
        try:
            own = base64.b64encode(os.urandom(24)).decode()
            nonce = bytes(self.store.compare_set("%s/nonce" % self.attempt, "", own))[:64]
            self.draw = _draw_from(nonce)
            last: Dict[int, Tuple[int, str]] = {}
            while True:
                self.wake.acquire()
                with self.lock:
                    opt, number, text = self.waiting.pop(0)
                self.store.set(self._key(opt, number, self.rank), text)
                before = last.get(opt)
                last[opt] = (number, text)
                if before is not None:
                    self._find(opt, before[0])
                if number >= KEEP_ROUNDS:
                    self.store.delete_key(self._key(opt, number - KEEP_ROUNDS, self.rank))
        except Exception:
            self.draw = None  # the store is gone; training goes on, and the record shows that the exchange ended

    def _find(self, opt: int, number: int) -> None:
        """What some other ranks left in a round that is over."""
        draw = self.draw
        if draw is None:
            return
        others = min(PEERS, self.world - 1)
        first = draw(b"peers", opt, number) % self.world
        for turn in range(others):
            rank = (first + turn) % self.world if others < self.world - 1 else (self.rank + 1 + turn) % self.world
            key = self._key(opt, number, rank)
            if rank == self.rank or not self.store.check([key]):
                continue
            text = bytes(self.store.get(key))[:VALUE_LIMIT_BYTES].decode(errors="replace")
            with self.lock:
                self.found["%d.%d.%d" % (opt, number, rank)] = text

    def _key(self, opt: int, number: int, rank: int) -> str:
        return "%s/%d/%d/%d" % (self.attempt, opt, number, rank)


def _draw_from(key: bytes) -> Draw:
    def draw(label: bytes, *numbers: int) -> int:
        data = label + b"".join(number.to_bytes(8, "little", signed=True) for number in numbers)
        return int.from_bytes(hashlib.blake2b(data, key=key, digest_size=16).digest(), "little")

    return draw
