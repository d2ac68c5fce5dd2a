"""Sees what torch's data loaders fetch and deliver, without replacing a function of theirs.

Three attributes of a loader's own objects are read through descriptors that are added to their classes:

    _BaseDataLoaderIter._sampler_iter    set when a pass over the data begins: what it yields is noted, batch by batch
    _BaseDataLoaderIter._num_yielded     set when a batch is handed to the job: the batch itself is looked at
    _BaseDatasetFetcher.collate_fn       read when samples become a batch, in the process that fetches them

Each gives what was stored, or an iterator or function around it that does the same; nothing is drawn or kept alive.
Where a torch has other names, nothing is seen, and the links say so.

Frames (spec/evidence.md, "Loaders"): kind `loader` when a pass begins and when its sampler ends, kind `worker` when a
worker fetches its first batch, kind `batch` for batches whose making was looked at. Links *order* and *batches* read
`current()`.
"""

from __future__ import annotations

import base64
import collections
import hashlib
import struct
import sys
import threading
import time
import weakref
from typing import Any, Callable, Deque, Dict, List, Optional, Tuple

from . import datasets, origin, rng, silence
from .client import Client

INDICES_LIMIT = 4096
"""Chosen indices of a subset that are told whole."""
BLOCKS_LIMIT = 512
"""Passes whose generator states are told whole; after that one in 16."""
LOADERS_LIMIT = 1024
MARKS_LIMIT = 4 * 4096
ROWS_LIMIT = 64
ALWAYS = 12
"""First batches of a pass that are looked at,"""
ALWAYS_PASSES = 4
"""in the first passes of a process. A script may make one every few steps."""
ONE_IN = 16
SHARE = 0.001
"""Part of the time since the start that looking at other batches may take in a process, beyond 0.05 seconds."""
CREDIT_NS = 50_000_000
WHOLE_ELEMENTS = 4096
SAMPLE_ELEMENTS = 64
RING = 3
LABEL_KEYS = ("labels", "label", "target", "targets", "y", "label_ids")
TEXTS = (str, bytes)

clock = time.thread_time_ns


class Pass:
    """One pass of one loader over its data."""

    __slots__ = ("base", "chain", "chains", "delivered", "digests", "epoch", "fetched", "loader", "marks")

    def __init__(self, loader: int, epoch: int, base: int = 0) -> None:
        self.base = base
        """The base seed of its iterator, another one for every pass."""
        self.loader = loader
        self.epoch = epoch
        self.marks = ""
        """First four digits of the chain after each batch since the last line of link *order*."""
        self.fetched = 0
        """Batches of indices that the sampler has yielded."""
        self.delivered = 0
        """Batches that the job was given."""
        self.chain = b"\0" * 8
        self.chains: Dict[int, str] = {0: self.chain.hex()}
        """Batches → chain over all indices up to there; only those not yet delivered."""
        self.digests: Dict[int, str] = {}
        """Batch, from 0 → digest of its own indices."""

    def add(self, indices: Any, looked: bool) -> None:
        """Note one batch of indices. looked: the batch is looked at too, and goes by the digest of its indices."""
        data = packed(indices)
        self.chain = hashlib.blake2b(self.chain + data, digest_size=8).digest()
        if looked:
            self.digests[self.fetched] = hashlib.blake2b(data, digest_size=8).hexdigest()
        self.fetched += 1
        self.chains[self.fetched] = self.chain.hex()

    def deliver(self, count: int) -> None:
        """`count` batches have been given to the job."""
        for done in range(self.delivered, count):
            self.chains.pop(done, None)
            self.digests.pop(done - 1, None)
            if len(self.marks) < MARKS_LIMIT:
                self.marks += self.chains.get(done + 1, "")[:4]
        self.delivered = count


class Delivery:
    """One batch as the job was given it."""

    __slots__ = ("labels", "line", "sampled")

    def __init__(self, line: List[Any]) -> None:
        self.line = line
        """loader, epoch, batch from 0."""
        self.labels: List[Tuple[str, Any]] = []
        """Copies of small tensors that can be labels; only while somebody asks for them."""
        self.sampled: List[Tuple[str, int, Any, Any]] = []
        """Path, number of elements, places, and copies of the elements there."""


class Observer:
    """What one process saw of its loaders."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.key = bytes.fromhex(client.settings["key"])
        self.everything = client.settings.get("links") == "all"
        self.began_ns = time.perf_counter_ns()
        self.own_ns = 0
        self.numbers: Dict[int, Tuple[Any, List[int]]] = {}
        """id of an index sampler → weak reference to it, [number of the loader, passes so far]."""
        self.loaders = 0
        self.passes = 0
        self.layouts: Dict[int, Any] = {}
        """Number of a loader → how its data sets are put together, as told last."""
        self.held: Dict[int, List[Tuple[str, Any]]] = {}
        """Number of a loader → (what, weak reference) of the objects of the job that it uses."""
        self.moved: Dict[int, Pass] = {}
        """Passes that delivered a batch since the last step, by id."""
        self.sums: List[List[Any]] = []
        """loader, epoch, batch, digest of its indices, digests of labels and inputs, of delivered batches."""
        self.ring: Deque[Delivery] = collections.deque(maxlen=RING)
        self.silence = silence.Silence(client)
        self.wanted = False
        """Whether a step is coming up that compares the batch with what reaches the model and the loss."""
        self.worker_seed: Optional[int] = None
        self.before = _earlier
        """Passes of the parent before this process was forked off."""
        self.block = (-1, -1, -1)
        """Base seed of a pass, number of a block of its batches, and the one of it that is looked at."""

    # -- order ------------------------------------------------------------------------------------------------

    def begin(self, sampler: Any, owner: Any, made: Dict[str, Any]) -> Optional[Pass]:
        """A pass begins: its sampler is about to be asked for the first time. Sends kind `loader`."""
        start = clock()
        try:
            return self._begin(sampler, owner, made)
        finally:
            self.own_ns += clock() - start

    def _begin(self, sampler: Any, owner: Any, made: Dict[str, Any]) -> Pass:
        loader, epoch = self._number(sampler)
        body: Dict[str, Any] = {"loader": loader, "epoch": epoch}
        whole = self.passes < BLOCKS_LIMIT or self.passes % ONE_IN == 0
        self.passes += 1
        body["samplers"] = describe(sampler, whole)
        iterator = owner()
        if iterator is not None:
            held = vars(iterator)
            base = held.get("_base_seed")
            body["base_seed"] = base if isinstance(base, int) else None
            body["workers"] = held.get("_num_workers")
            body["kind"] = "iterable" if held.get("_dataset_kind") == 1 else "map"
            body["dataset"] = name_of(held.get("_dataset"))
            body["collate"] = list(origin.of(held.get("_collate_fn")))
            if len(self.held) < LOADERS_LIMIT:
                self.held[loader] = _weakly(made.get("_loader"), iterator, sampler)
        body.update((key, value) for key, value in made.items() if key != "_loader")
        if "data" in body and self.layouts.get(loader) == body["data"]:
            del body["data"]  # told with an earlier pass of this loader
        elif "data" in body and len(self.layouts) < LOADERS_LIMIT:
            self.layouts[loader] = body["data"]
        if threading.current_thread() is threading.main_thread():
            words, position = rng.torch_words(sys.modules["torch"].default_generator)
            body["state"] = rng.digest_of(words, position)
            if whole:
                body["block"] = base64.b64encode(words).decode("ascii")
        self.client.send("loader", body)
        return Pass(loader, epoch, body.get("base_seed") or 0)

    def _number(self, sampler: Any) -> Tuple[int, int]:
        """Number of the loader that has this index sampler, and how many passes it made."""
        entry = self.numbers.get(id(sampler))
        if entry is None or entry[0]() is not sampler:
            if len(self.numbers) >= LOADERS_LIMIT:
                self.numbers = {key: entry for key, entry in self.numbers.items() if entry[0]() is not None}
            try:
                reference: Any = weakref.ref(sampler)
            except TypeError:  # a list of batches
                reference = (lambda held: lambda: held)(sampler)
            entry = self.numbers[id(sampler)] = (reference, [self.loaders, 0])
            self.loaders += 1
        loader, epoch = entry[1]
        entry[1][1] += 1
        return loader, epoch

    def end(self, done: Pass) -> None:
        """The sampler has nothing more."""
        start = clock()
        body = {"loader": done.loader, "epoch": done.epoch, "end": done.fetched, "chain": done.chain.hex()}
        self.client.send("loader", body)
        self.own_ns += clock() - start

    # -- batches ----------------------------------------------------------------------------------------------

    def looks(self, task: int, base: int) -> bool:
        """Whether batch `task` of a pass is looked at: one answer in the process that makes it and where it is used."""
        if self.everything or (task < ALWAYS and max(self.before, self.passes - 1) < ALWAYS_PASSES):
            return True
        number = task // ONE_IN
        known = self.block
        if known[0] != base or known[1] != number:
            data = b"batch %d %d" % (base, number)
            turn = hashlib.blake2b(data, key=self.key, digest_size=4).digest()[0] % ONE_IN
            known = self.block = (base, number, number * ONE_IN + turn)
        if task != known[2]:
            return False
        spent = time.perf_counter_ns() - self.began_ns
        return self.own_ns < CREDIT_NS + SHARE * spent

    def delivered(self, done: Pass, count: int, frame: Any) -> None:
        """The job is given batch `count` (from 1) of a pass: `data` of the frame."""
        digest = done.digests.get(count - 1)
        done.deliver(count)
        self.moved[id(done)] = done
        delivery = Delivery([done.loader, done.epoch, count - 1])
        self.ring.append(delivery)
        self.silence.batch()
        if not self.wanted and digest is None:
            return
        start = clock()
        data = frame.f_locals.get("data")
        if self.wanted:
            self._keep(delivery, leaves(data))
        if digest is not None and len(self.sums) < 64:
            self.sums.append([*delivery.line, digest, *self.sums_of(data, count - 1)])
        self.own_ns += clock() - start

    def _keep(self, delivery: Delivery, found: List[Tuple[str, Any]]) -> None:
        torch = sys.modules["torch"]
        with torch.no_grad():
            for path, tensor in found:
                if tensor.numel() <= 1 << 16 and (not tensor.is_floating_point() or tensor.dim() <= 2):
                    delivery.labels.append((path, tensor.detach().clone()))
                places = self.places(tensor.numel(), len(self.ring) + delivery.line[2])
                at = torch.tensor(places, device=tensor.device)
                delivery.sampled.append((path, tensor.numel(), at, torch.take(tensor.detach(), at)))

    def places(self, numel: int, number: int) -> List[int]:
        """Secret places in a tensor, the same in every process of the run."""
        if numel <= SAMPLE_ELEMENTS:
            return list(range(numel))
        data = b"places" + struct.pack("<qq", numel, number)
        raw = hashlib.blake2b(data, key=self.key).digest()
        state = int.from_bytes(raw[:8], "little")
        stride = 1 + int.from_bytes(raw[8:16], "little") % (numel // SAMPLE_ELEMENTS)
        first = state % (numel - stride * (SAMPLE_ELEMENTS - 1))
        return [first + stride * i for i in range(SAMPLE_ELEMENTS)]

    def sums_of(self, data: Any, task: int) -> Tuple[Optional[str], Optional[str]]:
        """Digests of the labels and of the first other tensor of a batch; None where there is none to read."""
        key = label_key(data)
        labels = part(data, key) if key is not None else None
        others = [tensor for _, tensor in leaves(data) if tensor is not labels]
        return self._sum(labels, task), self._sum(others[0] if others else None, task)

    def _sum(self, tensor: Any, task: int) -> Optional[str]:
        torch = sys.modules["torch"]
        if not isinstance(tensor, torch.Tensor) or tensor.device.type != "cpu" or str(tensor.layout) != "torch.strided":
            return None
        with torch.no_grad():
            flat = tensor.detach()
            if flat.numel() > WHOLE_ELEMENTS:
                flat = torch.take(flat, torch.tensor(self.places(flat.numel(), task)))
            raw = bytes(flat.contiguous().reshape(-1).view(torch.uint8).tolist()) if flat.numel() else b""
        head = "%s %s" % (tensor.dtype, tuple(tensor.shape))
        return hashlib.blake2b(head.encode() + raw, digest_size=8).hexdigest()

    # -- making -----------------------------------------------------------------------------------------------

    def collating(self, function: Callable[[Any], Any], frame: Any) -> Any:
        """What reading `collate_fn` gives: the function, or one around it for a batch that is looked at."""
        if frame.f_code.co_name != "fetch":
            return function
        facts = _task(frame.f_back)
        if facts is None or not self.looks(facts["task"], facts["base_seed"]):
            return function
        indices = frame.f_locals.get("possibly_batched_index")
        samples = frame.f_locals.get("data")
        start = clock()
        if facts["worker"] is not None:
            self._greet(facts)
        before = labels_of(samples) if isinstance(samples, (list, tuple)) else None
        self.own_ns += clock() - start

        def collate(data: Any) -> Any:
            out = function(data)
            begun = clock()
            try:
                self._collated(function, facts, indices, before, out)
            except Exception as error:
                self.client.fault("loaders.collate", error)
            self.own_ns += clock() - begun
            return out

        return collate

    def _greet(self, facts: Dict[str, Any]) -> None:
        seed = sys.modules["torch"].initial_seed()
        if seed != self.worker_seed:
            self.worker_seed = seed
            self.client.send("worker", {"base_seed": facts["base_seed"], "worker": facts["worker"], "seed": seed})

    def _collated(
        self, function: Any, facts: Dict[str, Any], indices: Any, before: Optional[Tuple[List[Any], Any]], out: Any
    ) -> None:
        where, name = origin.of(function)
        body: Dict[str, Any] = dict(facts, collate=[where, name])
        known = isinstance(indices, (list, tuple)) and all(isinstance(i, int) for i in indices)
        if known:
            body["index"] = hashlib.blake2b(packed(indices), digest_size=8).hexdigest()
        if before is not None:
            labels, key = before
            rows = len(labels)
            body["rows"] = rows
            if known and len(indices) == rows:
                body["i"] = [int(i) for i in indices[:ROWS_LIMIT]]
                body["y"] = [short(label) for label in labels[:ROWS_LIMIT]]
            after = rows_of(part(out, key), rows)
            if after is not None and all(type(a) is type(b) or _both_numbers(a, b) for a, b in zip(labels, after)):
                differ = [row for row in range(rows) if not same(labels[row], after[row])]
                body["differ"] = len(differ)
                body["which"] = [
                    [indices[row] if known and row < len(indices) else None, short(labels[row]), short(after[row])]
                    for row in differ[:16]
                ]
        body["sums"] = list(self.sums_of(out, facts["task"]))
        self.client.send("batch", body)


def _task(frame: Any) -> Optional[Dict[str, Any]]:
    """Which batch of which pass is being fetched, from the function of torch that asked for it."""
    if frame is None:
        return None
    if frame.f_code.co_name == "_worker_loop":
        held = frame.f_locals
        task, worker, base = held.get("idx"), held.get("worker_id"), held.get("base_seed")
    elif frame.f_code.co_name == "_next_data":
        held = vars(frame.f_locals.get("self"))
        task, worker, base = held.get("_num_yielded"), None, held.get("_base_seed")
    else:
        return None
    if not isinstance(task, int) or not isinstance(base, int):
        return None
    return {"task": task, "worker": worker if isinstance(worker, int) else None, "base_seed": base}


# -- values ---------------------------------------------------------------------------------------------------------


def packed(indices: Any) -> bytes:
    """A batch of indices as bytes: 64-bit little-endian numbers, or text for indices that are something else."""
    many = indices if isinstance(indices, (list, tuple)) else (indices,)
    try:
        return struct.pack("<%dq" % len(many), *many)
    except (struct.error, TypeError, OverflowError):
        try:
            return struct.pack("<%dq" % len(many), *(int(i) for i in many))
        except (struct.error, TypeError, ValueError, OverflowError):
            return repr(many).encode("utf-8", "replace")[:65536]


def leaves(data: Any, path: str = "", depth: int = 0) -> List[Tuple[str, Any]]:
    """The tensors of a batch with their paths in it, 8 at most."""
    torch = sys.modules["torch"]
    if isinstance(data, torch.Tensor):
        return [(path, data)] if type(data) in (torch.Tensor, torch.nn.Parameter) and data.numel() else []
    out: List[Tuple[str, Any]] = []
    if depth < 3 and isinstance(data, collections.abc.Mapping):
        for key in list(data)[:16]:
            out += leaves(data[key], "%s.%s" % (path, key), depth + 1)
    elif depth < 3 and isinstance(data, (list, tuple)):
        for number, item in enumerate(data[:16]):
            out += leaves(item, "%s.%d" % (path, number), depth + 1)
    return out[:8]


def label_key(sample: Any) -> Any:
    """Where a sample or a batch has its label: a position or a key; None for none."""
    if isinstance(sample, collections.abc.Mapping):
        return next((key for key in LABEL_KEYS if key in sample), None)
    if isinstance(sample, (list, tuple)) and len(sample) >= 2:
        return len(sample) - 1
    return None


def part(data: Any, key: Any) -> Any:
    """The part of a sample or batch at `key`, or None."""
    if isinstance(data, collections.abc.Mapping):
        return data.get(key)
    if isinstance(data, (list, tuple)) and isinstance(key, int) and key < len(data):
        return data[key]
    return None


def labels_of(samples: Any) -> Optional[Tuple[List[Any], Any]]:
    """The label of every sample as a number or a digest, and where it stands; None where samples have none."""
    if not samples:
        return None
    key = label_key(samples[0])
    if key is None:
        return None
    values = [value_of(part(sample, key)) for sample in samples]
    return None if any(value is None for value in values) else (values, key)


def rows_of(tensor: Any, rows: int) -> Optional[List[Any]]:
    """The labels of a batch, one for each row, in the same form; None where it is not laid out so."""
    torch = sys.modules["torch"]
    if not isinstance(tensor, torch.Tensor) or tensor.dim() == 0 or tensor.shape[0] != rows:
        return None
    if tensor.device.type != "cpu" or tensor.numel() > 1 << 18:
        return None
    if tensor.dim() == 1:
        return list(tensor.detach().tolist())
    return [value_of(row) for row in tensor.detach()]


def value_of(label: Any) -> Any:
    """A label as a number, or as text that is equal for equal content; None for what cannot be compared."""
    torch = sys.modules["torch"]
    if isinstance(label, (bool, int, float)):
        return label
    if isinstance(label, TEXTS):
        return None
    if isinstance(label, torch.Tensor):
        if label.device.type != "cpu" or str(label.layout) != "torch.strided" or label.numel() > 1 << 16:
            return None
        if label.dim() == 0:
            return label.item()
        with torch.no_grad():
            raw = bytes(label.detach().contiguous().reshape(-1).view(torch.uint8).tolist()) if label.numel() else b""
        return "%s %s %s" % (label.dtype, tuple(label.shape), hashlib.blake2b(raw, digest_size=8).hexdigest())
    if hasattr(label, "dtype") and getattr(label, "shape", None) == () and hasattr(label, "item"):
        return label.item()
    return None


def short(label: Any) -> Any:
    """A label as it goes into a frame: small whole numbers as they are, all else as 4 bytes of digest."""
    if isinstance(label, int) and abs(label) < 1 << 31:
        return int(label)
    return hashlib.blake2b(repr(label).encode(), digest_size=4).hexdigest()


def _both_numbers(a: Any, b: Any) -> bool:
    return isinstance(a, (bool, int, float)) and isinstance(b, (bool, int, float))


def same(a: Any, b: Any) -> bool:
    """Whether two labels are equal, allowing for a number that was stored as float32."""
    if a == b or (a != a and b != b):
        return True
    if isinstance(a, float) and isinstance(b, float):
        try:
            return bool(struct.unpack("<f", struct.pack("<f", a))[0] == b)
        except OverflowError:
            return False
    return False


def name_of(thing: Any) -> str:
    """Module and qualified name of the class of an object."""
    kind = type(thing)
    return ("%s.%s" % (kind.__module__, kind.__qualname__))[:200]


def describe(sampler: Any, whole: bool, depth: int = 0) -> Dict[str, Any]:
    """What decides the order that a sampler yields, for the samplers of torch and accelerate; else its class."""
    out: Dict[str, Any] = {"class": name_of(sampler)}
    kind = out["class"].rsplit(".", 1)[-1]
    held = getattr(sampler, "__dict__", {})
    if kind == "BatchSampler":
        out.update(batch=held.get("batch_size"), drop_last=held.get("drop_last"))
    elif kind in ("RandomSampler", "SeedableRandomSampler"):
        length = len(held["data_source"])
        samples = held.get("_num_samples")
        out.update(length=length, replacement=held.get("replacement"), samples=length if samples is None else samples)
        out["generator"] = _generator(held.get("generator"), whole)
        out.update({name: held[name] for name in ("initial_seed", "epoch") if name in held})
    elif kind == "SequentialSampler":
        out["length"] = len(held["data_source"])
    elif kind == "SubsetRandomSampler":
        indices = held["indices"]
        out.update(length=len(indices), generator=_generator(held.get("generator"), whole))
        if len(indices) <= INDICES_LIMIT:
            out["indices"] = [int(i) for i in indices]
    elif kind == "DistributedSampler":
        names = ("num_replicas", "rank", "epoch", "seed", "shuffle", "drop_last")
        out.update({name: held.get(name) for name in names}, length=len(held["dataset"]))
    elif kind == "SkipBatchSampler":
        out["skip"] = held.get("skip_batches")
    elif kind == "WeightedRandomSampler":
        out.update(samples=held.get("num_samples"), replacement=held.get("replacement"))
    inner = held.get("sampler", held.get("batch_sampler"))
    if inner is not None and depth < 4:
        out["of"] = describe(inner, whole, depth + 1)
    return out


def _generator(generator: Any, whole: bool) -> Optional[Dict[str, Any]]:
    if generator is None:
        return None
    if generator.device.type != "cpu":
        return {"device": generator.device.type}
    words, position = rng.torch_words(generator)
    out: Dict[str, Any] = {"state": rng.digest_of(words, position), "seed": generator.initial_seed()}
    if whole:
        out["block"] = base64.b64encode(words).decode("ascii")
    return out


# -- descriptors ----------------------------------------------------------------------------------------------------


class _Indices:
    """A sampler's own iterator, which notes what it yields."""

    def __init__(self, inner: Any, sampler: Any, owner: Any, made: Dict[str, Any]) -> None:
        self._inner = inner
        self._sampler = sampler
        self._owner = owner
        self._made = made
        self._observer = _observer
        self.done: Optional[Pass] = None
        self._ended = False

    def __iter__(self) -> Any:
        return self

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def __next__(self) -> Any:
        observer = self._observer
        if observer is None or observer is not _observer:
            return next(self._inner)
        if self.done is None:
            try:
                self.done = observer.begin(self._sampler, self._owner, self._made)
            except Exception as error:
                observer.client.fault("loaders.begin", error)
                self._observer = None
        try:
            batch = next(self._inner)
        except StopIteration:
            if self.done is not None and not self._ended:
                self._ended = True
                observer.end(self.done)
            raise
        if self.done is not None:
            try:
                self.done.add(batch, observer.looks(self.done.fetched, self.done.base))
            except Exception as error:
                observer.client.fault("loaders.add", error)
        return batch


class _Field:
    """A data descriptor over an instance attribute of the same name: `put` and `take` see it stored and read."""

    def __init__(self, name: str, put: Any = None, take: Any = None) -> None:
        self.name = name
        self.put = put
        self.take = take

    def __get__(self, instance: Any, kind: Any = None) -> Any:
        if instance is None:
            raise AttributeError(self.name)
        try:
            value = instance.__dict__[self.name]
        except KeyError:
            raise AttributeError(self.name) from None
        if self.take is None or _observer is None:
            return value
        try:
            return self.take(_observer, value, sys._getframe(1))
        except Exception as error:
            _observer.client.fault("loaders." + self.name, error)
            return value

    def __set__(self, instance: Any, value: Any) -> None:
        if self.put is not None and _observer is not None:
            try:
                value = self.put(_observer, instance, value, sys._getframe(1))
            except Exception as error:
                _observer.client.fault("loaders." + self.name, error)
        instance.__dict__[self.name] = value

    def __delete__(self, instance: Any) -> None:
        try:
            del instance.__dict__[self.name]
        except KeyError:
            raise AttributeError(self.name) from None


def _put_iterator(observer: Observer, instance: Any, value: Any, frame: Any) -> Any:
    """A pass is set up: note where torch's generator stands before the base seed is drawn."""
    if value is None or isinstance(value, _Indices):
        return value
    made: Dict[str, Any] = {}
    loader = frame.f_locals.get("loader")
    if frame.f_code.co_name == "__init__":
        made["own"] = getattr(loader, "generator", None) is not None
        made["_loader"] = loader if loader is None else weakref.ref(loader)
        # Before workers are forked off: what they open is then told under the same numbers.
        layout = datasets.layout(instance.__dict__.get("_dataset"))
        if layout is not None:
            made["data"] = layout
        if threading.current_thread() is threading.main_thread():
            made["made"] = rng.digest_of(*rng.torch_words(sys.modules["torch"].default_generator))
    before = instance.__dict__.get("_sampler_iter")
    if not made and isinstance(before, _Indices) and before.done is None:
        made = before._made  # a loader with workers sets it twice before it asks for the first batch
    sampler = instance.__dict__.get("_index_sampler")
    return _Indices(value, sampler, weakref.ref(instance), made)


def _put_count(observer: Observer, instance: Any, value: Any, frame: Any) -> Any:
    """A batch is handed over."""
    if isinstance(value, int) and value > 0 and frame.f_code.co_name == "__next__":
        indices = instance.__dict__.get("_sampler_iter")
        done = indices.done if isinstance(indices, _Indices) else None
        if done is not None:
            observer.delivered(done, value, frame)
    return value


def _weakly(loader: Any, iterator: Any, sampler: Any) -> List[Tuple[str, Any]]:
    """(what, weak reference) of the objects that one loader uses."""
    found: List[Tuple[str, Any]] = [("the loader", loader)] if loader is not None else []
    for what, thing in (("the data set", vars(iterator).get("_dataset")), ("the sampler", sampler)):
        try:
            found.append((what, weakref.ref(thing)))
        except TypeError:
            continue
    return found


_observer: Optional[Observer] = None
_earlier = 0
"""Passes that were seen before `remove`: a worker that is forked off later belongs to a later one."""
_installed = False


def current() -> Optional[Observer]:
    """What this process sees of its loaders; None where nothing is watched."""
    return _observer


def install(client: Client) -> Optional[Observer]:
    """Watch the loaders of this process from now on, for `client`."""
    global _observer, _installed
    iterators = sys.modules.get("torch.utils.data.dataloader")
    fetchers = sys.modules.get("torch.utils.data._utils.fetch")
    base = getattr(iterators, "_BaseDataLoaderIter", None)
    fetcher = getattr(fetchers, "_BaseDatasetFetcher", None)
    if base is None or fetcher is None:
        return None
    _observer = Observer(client)
    if not _installed:
        _installed = True
        base._sampler_iter = _Field("_sampler_iter", put=_put_iterator)
        base._num_yielded = _Field("_num_yielded", put=_put_count)
        fetcher.collate_fn = _Field("collate_fn", take=Observer.collating)
    return _observer


def remove() -> None:
    """See nothing any more; what is under way goes on."""
    global _observer, _earlier
    if _observer is not None:
        _earlier = max(_observer.before, _observer.passes)
    _observer = None
