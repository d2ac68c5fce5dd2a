"""Replay of many ranks by one process at a time, inner half: a process group whose other ranks have been here before.

Runs only where a replay's plan carries a turn (`trainguard audit --ranks-in-turn`): never in a real training. The
script runs as one rank of its job. What it gives to a collective is left in a folder; what the others gave there is
taken from that folder, and gloo itself works out the result, with a thread for every rank, so that bits come out as
they did among processes. Where another rank has not been as far yet, this process ends: its turn is over, and it begins
anew when the others have moved on. What it gives then must be what it gave before, else the replay is unsound.

While a warp goes forward nobody is waited for (what is reduced then is overwritten at landing): the others are taken to
have given what this rank gave. Only what one rank sends to the others is really theirs.

    FOLDER/<group>-<n>.<rank>                    what `rank` of that group gave to its collective n, counted from where
                                                 the warp landed; before that from the beginning, as w<n>
    FOLDER/<group>-<from>-<to>-<tag>-<n>.p2p     a message

Each is one line of JSON and the bytes of its tensors.

Frame of kind "replay": {"waits": [paths of what is not there yet]}.
"""

from __future__ import annotations

import ctypes
import datetime
import functools
import hashlib
import json
import os
import threading
from typing import TYPE_CHECKING, Any, Callable, Dict, List, Optional, Tuple

from .probe import replace

if TYPE_CHECKING:
    from .warp import Warp

BACKEND = "turns"
HEADER_LIMIT_BYTES = 1 << 20
GLOO = (None, "gloo", "cpu:gloo")
"""Backends whose results can be worked out here."""

GIVEN: Dict[str, Tuple[int, ...]] = {
    "allreduce": (0,),
    "allreduce_coalesced": (0,),
    "broadcast": (0,),
    "reduce": (0,),
    "allgather": (1,),
    "allgather_coalesced": (1,),
    "allgather_into_tensor_coalesced": (1,),
    "all_gather_single": (1,),
    "all_gather_single_coalesced": (1,),
    "_allgather_base": (1,),
    "reduce_scatter": (1,),
    "reduce_scatter_single": (1,),
    "reduce_scatter_single_coalesced": (1,),
    "reduce_scatter_tensor_coalesced": (1,),
    "_reduce_scatter_base": (1,),
    "gather": (1,),
    "scatter": (1,),
    "alltoall": (1,),
    "alltoall_base": (1,),
    "all_to_all_single": (1,),
    "barrier": (),
}
"""Collective → arguments that a rank gives; of the others it only needs room."""

INIT = ("backend", "init_method", "timeout", "world_size", "rank")
NEW = ("ranks", "timeout", "backend", "pg_options", "use_local_synchronization", "group_desc", "device_id")
"""Names of what torch's functions take by place."""

PATIENCE = datetime.timedelta(seconds=120)
"""For gloo among the threads of one process."""

FROM_ROOT = ("broadcast", "scatter")
TO_ROOT = ("reduce", "gather")


class Waits(Exception):
    """What another rank gives is not there yet."""


class Turn:
    """One rank's turn."""

    def __init__(self, warp: Warp, plan: Dict[str, Any]) -> None:
        self.warp = warp
        self.rank = int(plan["rank"])
        self.ranks = int(plan["ranks"])
        self.folder = str(plan["folder"])
        self.torch: Any = None
        self.kind: Any = None
        """The class of process groups."""

    def attach(self, torch: Any) -> None:
        """torch has been imported: put our process group in the place of torch's."""
        self.torch = torch
        distributed = torch.distributed
        if not distributed.is_available():
            return
        self.kind = _group_class(torch)
        distributed.Backend.register_backend(BACKEND, self._made, extended_api=True, devices=["cpu"])
        init, group = distributed.init_process_group, distributed.new_group
        replace(init, functools.wraps(init)(functools.partial(self._init, init)), "torch")
        replace(group, functools.wraps(group)(functools.partial(self._new, group)), "torch")
        barrier = distributed.monitored_barrier
        replace(barrier, lambda group=None, *_args, **_kwargs: distributed.barrier(group), "torch")

    def _init(self, plain: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        given = {**dict(zip(INIT, args)), **kwargs}
        self._only_gloo(given.get("backend"))
        rank = os.environ.get("RANK") if given.get("rank") in (None, -1) else given["rank"]
        ranks = os.environ.get("WORLD_SIZE") if given.get("world_size") in (None, -1) else given["world_size"]
        if (str(rank), str(ranks)) != (str(self.rank), str(self.ranks)):
            self.warp.unsound("expected rank %d of %d, the script says %s of %s" % (self.rank, self.ranks, rank, ranks))
        kept = {name: value for name, value in given.items() if name in ("timeout", "group_name")}
        plain(BACKEND, store=self.torch.distributed.HashStore(), rank=self.rank, world_size=self.ranks, **kept)
        self._as_gloo()

    def _new(self, plain: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip(NEW, args)), **kwargs}
        self._only_gloo(given.get("backend"))
        made = plain(**{**given, "backend": BACKEND, "pg_options": None})
        self._as_gloo()
        return made

    def _only_gloo(self, backend: Any) -> None:
        if backend is not None:
            backend = str(backend).lower()
        if backend not in GLOO and not (backend or "").startswith("cpu:gloo,"):
            self.warp.unsound("ranks in turn: expected gloo, found %s, whose order of adding is another" % backend)

    def only_here(self, args: Any) -> None:
        """Tensors of devices are reduced by other libraries, which may add in another order."""
        leaves = self.torch.utils._pytree.tree_leaves(args)
        odd = next((x.device for x in leaves if isinstance(x, self.torch.Tensor) and x.device.type != "cpu"), None)
        if odd is not None:
            self.warp.unsound("ranks in turn: expected tensors of the CPU in collectives, found %s" % odd)

    def _as_gloo(self) -> None:
        """Let the script read the name it asked for."""
        world = self.torch.distributed.distributed_c10d._world
        for group, (name, store) in list(world.pg_map.items()):
            if name == BACKEND:
                world.pg_map[group] = ("gloo", store)

    def _made(self, options: Any, _: Any) -> Any:
        return self.kind(self, options.group_rank, options.group_size, str(options.group_id))

    # -- what was given -----------------------------------------------------------------------------------------------

    def give(self, name: str, values: Any) -> None:
        """Leave what this rank gives. Another thing than in an earlier turn is told, and ends the replay."""
        path = os.path.join(self.folder, name)
        data = _packed(self.torch, values)
        try:
            with open(path, "rb") as file:
                known: Optional[bytes] = file.read()
        except FileNotFoundError:
            known = None
        if known is None:
            with open(path + ".part", "wb") as file:
                file.write(data)
            os.rename(path + ".part", path)
        elif known != data:
            self.warp.unsound("rank %d gives something else to %s than when it ran before" % (self.rank, name))

    def taken(self, name: str) -> Any:
        """What another rank gave. Raises Waits where it has not."""
        try:
            with open(os.path.join(self.folder, name), "rb") as file:
                return _unpacked(self.torch, file.read())
        except FileNotFoundError:
            raise Waits(name) from None

    def owns(self, path: Any) -> bool:
        """Whether a path is of what ranks leave for each other: the script has no part in it."""
        return isinstance(path, str) and path.startswith(self.folder + os.sep)

    def over(self, names: List[str]) -> None:
        """Others have to go on first: end this turn."""
        self.warp.engine.flush()
        self.warp.client.send("replay", {"waits": names[:1000]})
        self.warp.leave()


class Collectives:
    """Collectives of one group of ranks, by turns. Becomes a process group together with torch's class of them."""

    def __init__(self, turn: Turn, rank: int, size: int, name: str) -> None:
        super().__init__(rank, size)  # type: ignore[call-arg]
        self.turn = turn
        self.torch = turn.torch
        self.key = hashlib.sha256(name.encode()).hexdigest()[:8]
        self.members = size
        self.place = rank
        self.numbers = {True: 0, False: 0}
        """Collectives so far, before and after the warp landed."""
        self.messages: Dict[Tuple[int, int, int], int] = {}
        self.gloo: List[Any] = []

    @property
    def group_name(self) -> Any:
        """As torch registered it; the base class asks its backends, and there are none."""
        return self.torch.distributed.distributed_c10d._world.pg_names[self]

    def getBackendName(self) -> str:
        """As torch asks where it would look for details of gloo."""
        return BACKEND

    def send(self, tensors: Any, peer: int, tag: int = 0) -> Any:
        """Leave a message."""
        self.turn.give(self._message(self.place, peer, tag), [list(tensors)])
        return self._done(tensors)

    def recv(self, tensors: Any, peer: int, tag: int = 0) -> Any:
        """Take a message, or wait for it."""
        name = self._message(peer, self.place, tag)
        try:
            (found,) = self.turn.taken(name)
        except Waits:
            self.turn.over([name])
        for mine, theirs in zip(tensors, found):
            mine.copy_(theirs)
        return self._done(tensors)

    def _message(self, sender: int, receiver: int, tag: int) -> str:
        key = (sender, receiver, tag)
        self.messages[key] = number = self.messages.get(key, 0) + 1
        return "%s-%d-%d-%d-%d.p2p" % (self.key, *key, number)

    def _done(self, result: Any) -> Any:
        future = self.torch.futures.Future()
        future.set_result(result)
        return self.torch._C._distributed_c10d._create_work_from_future(future)

    def _collective(self, name: str, args: Tuple[Any, ...], opts: Any) -> Any:
        self.turn.only_here(args)
        given = [_kept(self.torch, value, place in GIVEN[name]) for place, value in enumerate(args)]
        root = int(getattr(opts, "rootRank", -1))
        skipping = self.turn.warp.skipping
        self.numbers[skipping] += 1
        if not skipping or (name in FROM_ROOT and root == self.place):
            self.turn.give(self._name(self.place, skipping), [name, given])
        needed = self._needed(name, root, skipping)
        others = self._others(name, [self._name(rank, skipping) for rank in needed])
        if name == "barrier" or (name in TO_ROOT and root != self.place):
            return self._done(list(args[:1]))
        every: List[Any] = []
        for rank in range(self.members):
            theirs = others.get(self._name(rank, skipping), given)
            every.append(args if rank == self.place else _filled(self.torch, theirs))
        self._work_out(name, every, opts)
        return self._done(args[0])

    def _name(self, rank: int, skipping: bool) -> str:
        return "%s-%s%d.%d" % (self.key, "w" if skipping else "", self.numbers[skipping], rank)

    def _needed(self, name: str, root: int, skipping: bool) -> List[int]:
        everyone = [rank for rank in range(self.members) if rank != self.place]
        if name in FROM_ROOT:
            return [] if root == self.place else [root]
        if skipping or (name in TO_ROOT and root != self.place):
            return []
        return everyone

    def _others(self, name: str, needed: List[str]) -> Dict[str, Any]:
        """What others gave to this collective, by its file's name."""
        found, missing = {}, []
        for path in needed:
            try:
                theirs, found[path] = self.turn.taken(path)
            except Waits:
                missing.append(path)
                continue
            if theirs != name:
                self.turn.warp.unsound("ranks part in what they reduce: %s here, %s in %s" % (name, theirs, path))
        if missing:
            self.turn.over(missing)
        return found

    def _work_out(self, name: str, every: List[Any], opts: Any) -> None:
        """gloo's own result, a thread for every rank."""
        if not self.gloo:
            self._connect()
        failed: List[BaseException] = []

        def one(rank: int) -> None:
            try:
                with self.torch.no_grad():
                    getattr(self.gloo[rank], name)(*every[rank], opts).wait()
            except BaseException as error:
                failed.append(error)

        _at_once(self.members, one)
        if failed:
            raise failed[0]

    def _connect(self) -> None:
        distributed = self.torch.distributed
        store = distributed.HashStore()
        made: Dict[int, Any] = {}

        def one(rank: int) -> None:
            gloo = distributed.ProcessGroupGloo
            given = gloo._Options()
            given._devices = [gloo.create_default_device(lazy_init=True)]  # else a socket for every pair of ranks
            given._timeout = PATIENCE
            group = distributed.ProcessGroup(store, rank, self.members)
            group._set_default_backend(distributed.ProcessGroup.BackendType.GLOO)
            backend = gloo(store, rank, self.members, given)
            group._register_backend(self.torch.device("cpu"), distributed.ProcessGroup.BackendType.GLOO, backend)
            made[rank] = group

        _at_once(self.members, one)
        self.gloo = [made[rank] for rank in range(self.members)]


def _group_class(torch: Any) -> Any:
    """A process group that torch's own code takes for one."""
    methods = {name: _method(name) for name in GIVEN}
    return type("Group", (Collectives, torch.distributed.ProcessGroup), methods)


def _method(name: str) -> Any:
    def collective(self: Any, *args: Any, **kwargs: Any) -> Any:
        opts = kwargs.get("opts")
        if opts is None and args and "Options" in type(args[-1]).__name__:
            args, opts = args[:-1], args[-1]
        return self._collective(name, args, opts)

    collective.__name__ = name
    return collective


def _at_once(count: int, work: Callable[[int], None]) -> None:
    threads = [threading.Thread(target=work, args=(number,), daemon=True) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


# -- tensors as bytes --------------------------------------------------------------------------------------------------


class _Room:
    """A tensor of which only the form counts."""

    def __init__(self, tensor: Any) -> None:
        self.form: List[Any] = [str(tensor.dtype).split(".")[-1], list(tensor.shape)]


def _kept(torch: Any, value: Any, whole: bool) -> Any:
    """An argument as it is left for others: its tensors, or the room they take."""
    if isinstance(value, (list, tuple)):
        return [_kept(torch, each, whole) for each in value]
    if isinstance(value, torch.Tensor):
        return value.detach() if whole else _Room(value)
    return value


def _filled(torch: Any, value: Any) -> Any:
    """Arguments as a collective takes them: for another rank what it gave, or what this one did."""
    if isinstance(value, list):
        return [_filled(torch, each) for each in value]
    if isinstance(value, _Room):
        return torch.zeros(value.form[1], dtype=getattr(torch, value.form[0]))
    return value.clone() if isinstance(value, torch.Tensor) else value


def _packed(torch: Any, values: Any) -> bytes:
    """One line of JSON, then the bytes of its tensors."""
    data: List[bytes] = []
    head = json.dumps(_told(torch, values, data)).encode()
    return b"".join([head, b"\n", *data])


def _told(torch: Any, value: Any, data: List[bytes]) -> Any:
    if isinstance(value, (list, tuple)):
        return [_told(torch, each, data) for each in value]
    if isinstance(value, torch.Tensor):
        plain = value.detach().cpu().contiguous()
        data.append(ctypes.string_at(plain.data_ptr(), plain.numel() * plain.element_size()))
        return {"tensor": [str(plain.dtype).split(".")[-1], list(plain.shape)]}
    if isinstance(value, _Room):
        return {"room": value.form}
    return value


def _unpacked(torch: Any, data: bytes) -> Any:
    """The reverse; what was given by a replayed process, in its own sandbox."""
    end = data.index(b"\n", 0, HEADER_LIMIT_BYTES)
    place = [end + 1]

    def made(value: Any) -> Any:
        if isinstance(value, list):
            return [made(each) for each in value]
        if isinstance(value, dict) and "tensor" in value:
            name, shape = value["tensor"]
            empty = torch.empty(shape, dtype=getattr(torch, str(name)))
            size = empty.numel() * empty.element_size()
            part = bytearray(data[place[0] : place[0] + size])
            place[0] += size
            return torch.frombuffer(part, dtype=empty.dtype).reshape(shape).clone() if size else empty
        if isinstance(value, dict):
            return torch.zeros(value["room"][1], dtype=getattr(torch, value["room"][0]))
        return value

    return made(json.loads(data[:end]))
