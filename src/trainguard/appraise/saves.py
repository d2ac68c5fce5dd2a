"""Check *saves*: what lies in a saved file is what `torch.save` was given (E9).

Two independent digests of the same storages: the process takes one before anything is written (frame `save`), the
supervisor another when it seals the file (record `seal`, its `prints`). Which save a file holds is told by path, by
renaming, and else by content. A file is only judged once its process has said that it told of every save up to a time
after the file was written (`told_ns`). So a save that was never told of cannot make an honest file look altered.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from trainguard.appraise.interface import Context, finding_from
from trainguard.errors import TrainguardError
from trainguard.evidence import Evidence
from trainguard.finding import Finding, LinkState
from trainguard.seal.prints import Prints, parse_prints

SLACK_NS = 1_000_000_000
"""File systems keep times coarser than the clock: on some, a second."""
BUFFER_NS = 60_000_000_000
"""A save into memory is taken to be what a file holds that was written within a minute."""
SHOWN_LIMIT = 20
SAVES_LIMIT = 10_000
WEIGHTS_LIMIT = 16
MAJORITY = 3
"""Tensors that must be the weights themselves before others that are not are worth a word."""

Storage = tuple[int, str, str | None]
"""(bytes, digest of samples, digest of all)"""


@dataclass(slots=True)
class _Save:
    """One `torch.save` of one process, as it told of it."""

    process: int
    path: str | None
    began_ns: int
    ended_ns: int
    sure: bool
    record: Evidence
    storages: dict[str, Storage] = field(default_factory=dict)
    weights: dict[str, str] = field(default_factory=dict)
    """Storage → the weight whose own memory it is."""
    left: dict[str, Storage] = field(default_factory=dict)
    """Weights whose own memory was not given to be saved, where that of most was."""

    @property
    def layout(self) -> dict[str, int]:
        return {name: storage[0] for name, storage in self.storages.items()}


@dataclass(slots=True)
class _Version:
    """One file as it was sealed."""

    path: str
    prints: Prints
    record: Evidence
    storages: dict[str, Storage]


@dataclass(slots=True)
class _Weights:
    """A process's weights at the beginning of a step, and files that were written natively since the step before."""

    files: frozenset[str]
    since_ns: int
    at_ns: int
    record: Evidence
    weights: dict[str, Storage]


class Saves:
    """See the module."""

    name = "saves"

    def __init__(self, context: Context) -> None:
        self._run = context.run
        self._policy = context.policy
        self._blob = context.blob
        self._saves: dict[tuple[int, int], _Save] = {}
        self._waiting: list[_Version] = []
        self._weights: list[_Weights] = []
        self._told: dict[int, int] = {}
        """Process → time (ns) up to which it has told of its saves."""
        self._held = 0
        self._broken = 0
        self._blind: dict[str, None] = {}

    def see(self, evidence: Evidence) -> Iterator[Finding]:
        if evidence.kind == "save" and evidence.source == "process":
            self._saved(evidence)
        elif evidence.kind == "seal" and evidence.source == "supervisor":
            self._sealed(evidence)
        else:
            return
        if self._waiting:
            yield from self._judge_waiting()

    def end(self) -> Iterator[Finding | LinkState]:
        yield from self._judge_waiting()
        for version in self._waiting:
            if version.prints.form == "safetensors":
                self._blind[f"{version.path}: written natively, and no process told of its weights then"] = None
                continue
            why = (
                "no process told of saving it"
                if self._save_of(version) is None
                else "its process did not tell to the end"
            )
            self._blind[f"{version.path}: {why}"] = None
        reasons = list(self._blind)
        more = len(reasons) - SHOWN_LIMIT
        yield LinkState(
            link=self.name,
            held=self._held,
            broken=self._broken,
            blind=(*reasons[:SHOWN_LIMIT], *([f"and {more} more"] if more > 0 else [])),
            required=False,  # a run that saves nothing, or not through torch.save, has nothing to compare
        )

    # -- records --------------------------------------------------------------------------------------------------

    def _saved(self, evidence: Evidence) -> None:
        body, process = evidence.body, evidence.process
        number, path, rows = body.get("save"), body.get("path"), body.get("storages")
        told = body.get("told_ns")
        if type(told) is int and process is not None:
            self._told[process] = told
        if isinstance(body.get("weights"), list):
            self._take_weights(evidence)
            return
        if type(number) is not int or process is None or len(self._saves) >= SAVES_LIMIT:
            return
        known = self._saves.get((process, number))
        renamed = body.get("renamed")
        if isinstance(renamed, str) and known is not None:
            known.path = renamed
            return
        left = body.get("left")
        if isinstance(left, list) and known is not None:
            known.left.update(_storages(left))
            return
        began, ended = body.get("began_ns"), body.get("ended_ns")
        if not isinstance(rows, list) or type(began) is not int or type(ended) is not int:
            return
        if known is None:
            known = self._saves[process, number] = _Save(
                process, path if isinstance(path, str) else None, began, ended, True, evidence
            )
        known.ended_ns = ended
        known.sure = known.sure and body.get("sure") is True
        known.storages.update(_storages(rows))
        for row in rows:
            if isinstance(row, list) and len(row) == 5 and isinstance(row[0], str) and isinstance(row[4], str):
                known.weights[row[0]] = row[4]

    def _take_weights(self, evidence: Evidence) -> None:
        body = evidence.body
        files, since, at = body.get("files"), body.get("since_ns"), body.get("at_ns")
        if not isinstance(files, list) or type(since) is not int or type(at) is not int:
            return
        told = frozenset(path for path in files if isinstance(path, str))
        known = self._weights[-1] if self._weights else None
        if known is not None and (known.record.process, known.at_ns) == (evidence.process, at):
            known.weights.update(_storages(body["weights"]))
            return
        self._weights = self._weights[-WEIGHTS_LIMIT:]
        self._weights.append(_Weights(told, since, at, evidence, _storages(body["weights"])))

    def _sealed(self, evidence: Evidence) -> None:
        path, blob = evidence.body.get("path"), evidence.body.get("prints")
        if not isinstance(path, str) or not isinstance(blob, str):
            return
        try:
            prints = parse_prints(self._blob(blob))
        except TrainguardError as error:
            self._blind[f"{path}: its digests cannot be read: {error}"] = None
            return
        storages = {name: (size, sampled, whole) for name, size, sampled, whole, _ in prints.storages}
        self._waiting.append(_Version(path, prints, evidence, storages))

    # -- judging --------------------------------------------------------------------------------------------------

    def _judge_waiting(self) -> Iterator[Finding]:
        waiting, self._waiting = self._waiting, []
        for version in waiting:
            if version.prints.form == "row":
                yield from self._judge_row(version)
                continue
            if version.prints.form != "torch":
                yield from self._judge_native(version)
                continue
            same = next((save for save in reversed(self._saves.values()) if _agree(save, version)), None)
            save = same or self._save_of(version)
            if save is None or self._told.get(save.process, 0) <= version.prints.mtime_ns + SLACK_NS:
                self._waiting.append(version)
            elif same is not None:
                yield from self._replaced(version, same)
            else:
                yield from self._differ(version, save)

    def _judge_native(self, version: _Version) -> Iterator[Finding]:
        """A file whose writer told nobody, against the weights as they were at the next step."""
        written = version.prints.mtime_ns
        told = next(
            (
                weights
                for weights in reversed(self._weights)
                if version.path in weights.files and weights.since_ns - SLACK_NS <= written <= weights.at_ns
            ),
            None,
        )
        if told is None:
            self._waiting.append(version)
            return
        own = {
            t: w for t, w in _by_suffix(version.storages, told.weights) if _equal(told.weights[w], version.storages[t])
        }
        prefixes = {tensor.removesuffix(weight) for tensor, weight in own.items()}
        others = [
            tensor
            for tensor, weight in _by_suffix(version.storages, told.weights)
            if tensor not in own
            and tensor.removesuffix(weight) in prefixes
            and version.storages[tensor][0] == told.weights[weight][0]
        ]
        if len(own) < MAJORITY or len(others) > len(own):
            self._blind[
                f"{version.path}: does not hold the weights as they were in memory: an average, say, or another step"
            ] = None
        elif not others or self._policy.approves(self.name, version.path):
            self._held += 1
        else:
            self._broken += 1
            yield self._others(version, told.record, others, len(own))

    def _judge_row(self, version: _Version) -> Iterator[Finding]:
        """A `.distcp`: one save for each archive of its row, in the order they were written.

        Archives no process told of hold objects, which are pickled into memory first; they are matched by content.
        """
        until = version.prints.mtime_ns + SLACK_NS
        saves = [save for save in self._saves.values() if save.path == version.path and save.began_ns <= until]
        if not saves or self._told.get(saves[-1].process, 0) <= until:
            self._waiting.append(version)
            return
        if len({save.process for save in saves}) > 1:
            self._blind[f"{version.path}: several processes saved to it"] = None
            return
        rows = _by_archive(version)
        mine = [save for save in saves if save.storages][-len(rows) :]
        others = [save for save in self._saves.values() if save.path is None]
        left = [row for row in rows if not _take_equal(row, mine) and not any(_holds(row, save) for save in others)]
        for row in left:
            save = next((save for save in mine if save.layout == _layout(row)), None)
            if save is None:
                self._blind[f"{version.path}: no process told of saving all that lies in it"] = None
                return
            mine.remove(save)
            if self._policy.approves(self.name, version.path):
                self._blind[f"{version.path}: differs from what was saved, which the policy approves"] = None
                return
        if not left:
            self._held += 1
            return
        self._broken += 1
        yield self._row_differs(version, saves[-1], left, certain=all(save.sure for save in saves))

    def _row_differs(self, version: _Version, save: _Save, rows: list[dict[str, Storage]], *, certain: bool) -> Finding:
        names = {record: tensors for record, _, _, _, tensors in version.prints.storages}
        tensors = [names[record] or record for row in rows for record in row]
        return finding_from(
            self.name,
            "violated" if certain else "suspicious",
            f"{version.path} does not hold what torch.save was given: {_listed(tensors)} differ"
            f"{'' if certain else _alternatives(save, same_shape=True)}",
            save.record,
            version.record,
            run=self._run,
            techniques=("E9",),
            tensor=tensors[0],
            path=version.path,
            step=save.record.step if save.record.step is not None else version.record.step,
            expected="the tensors as they were in memory",
            found=f"{len(rows)} of them otherwise in the file",
        )

    def _save_of(self, version: _Version) -> _Save | None:
        """The save that made the file: the last to its path before it was written, else the last like it in memory."""
        before = [s for s in self._saves.values() if s.began_ns <= version.prints.mtime_ns + SLACK_NS and s.storages]
        named = [save for save in before if save.path == version.path]
        if named:
            return max(named, key=lambda save: save.began_ns)
        layout = {name: storage[0] for name, storage in version.storages.items()}
        recent = version.prints.mtime_ns - BUFFER_NS
        unnamed = [save for save in before if save.path is None and save.began_ns >= recent and save.layout == layout]
        return max(unnamed, key=lambda save: save.began_ns, default=None)

    def _replaced(self, version: _Version, save: _Save) -> Iterator[Finding]:
        """The file holds what torch.save was given. Were all of these the weights, where most were?"""
        tensors = {name: record for record, _, _, _, names in version.prints.storages for name in names.split(", ")}
        own = {names: save.weights[record] for names, record in tensors.items() if record in save.weights}
        prefixes = {
            tensor.removesuffix(weight) for tensor, weight in own.items() if f".{tensor}".endswith(f".{weight}")
        }
        others = [
            prefix + weight
            for prefix in sorted(prefixes)
            for weight, storage in save.left.items()
            if (record := tensors.get(prefix + weight)) is not None
            and save.weights.get(record) != weight  # two models have a weight of that name
            and version.storages[record][0] == storage[0]
            and not _equal(storage, version.storages[record])
        ]
        others += _parted(version.storages, tensors, own, prefixes)
        if not others or self._policy.approves(self.name, version.path):
            self._held += 1
            return
        self._broken += 1
        yield self._others(version, save.record, others, len(own))

    def _others(self, version: _Version, told: Evidence, others: list[str], own: int) -> Finding:
        return finding_from(
            self.name,
            "suspicious",
            f"{version.path} holds other values for {_listed(others)} than the weights had, and the weights themselves"
            f" for {own} others; or the script replaces them on purpose",
            told,
            version.record,
            run=self._run,
            techniques=("E9",),
            tensor=others[0],
            path=version.path,
            step=told.step,
        )

    def _differ(self, version: _Version, save: _Save) -> Iterator[Finding]:
        writers = {other.process for other in self._saves.values() if other.path == version.path}
        if len(writers) > 1:
            self._blind[f"{version.path}: {len(writers)} processes saved to it"] = None
            return
        if self._policy.approves(self.name, version.path):
            self._blind[f"{version.path}: differs from what was saved, which the policy approves"] = None
            return
        self._broken += 1
        same_shape = save.layout == {
            name: version.storages[name][0] for name in save.storages if name in version.storages
        }
        certain = same_shape and save.sure and save.path is not None
        names = {name: tensors for name, _, _, _, tensors in version.prints.storages}
        changed = [name for name, storage in save.storages.items() if not _equal(storage, version.storages.get(name))]
        tensors = [names.get(name) or f"data/{name}" for name in changed]
        step = save.record.step if save.record.step is not None else version.record.step
        why = "" if certain else _alternatives(save, same_shape)
        yield finding_from(
            self.name,
            "violated" if certain else "suspicious",
            f"{version.path} does not hold what torch.save was given: {_listed(tensors)} differ{why}",
            save.record,
            version.record,
            run=self._run,
            techniques=("E9",),
            tensor=tensors[0] if tensors else None,
            path=version.path,
            step=step,
            expected=f"{len(save.storages)} storages as they were in memory",
            found=f"{len(changed)} of them otherwise in the file",
        )


def _by_archive(version: _Version) -> list[dict[str, Storage]]:
    """The storages of each archive of a row, by `archive/record`, in the order of the file."""
    rows: dict[str, dict[str, Storage]] = {}
    for record, storage in version.storages.items():
        rows.setdefault(record.partition("/")[0], {})[record] = storage
    return list(rows.values())


def _layout(row: dict[str, Storage]) -> dict[str, int]:
    return {record.partition("/")[2]: storage[0] for record, storage in row.items()}


def _holds(row: dict[str, Storage], save: _Save) -> bool:
    """Whether an archive of a row is what this save was given."""
    named = {record.partition("/")[2]: storage for record, storage in row.items()}
    return named.keys() == save.storages.keys() and all(_equal(save.storages[name], named[name]) for name in named)


def _take_equal(row: dict[str, Storage], saves: list[_Save]) -> bool:
    """Take the save out of `saves` that this archive holds, if there is one."""
    found = next((save for save in saves if _holds(row, save)), None)
    if found is not None:
        saves.remove(found)
    return found is not None


def _by_suffix(tensors: Iterable[str], weights: Iterable[str]) -> list[tuple[str, str]]:
    """(tensor of a file, weight) of one name, but for what a container puts before it; the longest such weight."""
    known = set(weights)
    found = []
    for tensor in tensors:
        parts = tensor.split(".")
        weight = next((w for i in range(len(parts)) if (w := ".".join(parts[i:])) in known), None)
        if weight is not None:
            found.append((tensor, weight))
    return found


def _parted(
    storages: Mapping[str, Storage], tensors: Mapping[str, str], own: Mapping[str, str], prefixes: set[str]
) -> list[str]:
    """Tensors named as a weight that lies in the file under another name alone: one of two tied names was replaced.

    tensors: name in the file → record. own: name in the file → the weight whose storage the record was.
    """
    found = []
    for name, weight in own.items():
        for tensor in {prefix + weight for prefix in prefixes} & (tensors.keys() - own.keys()):
            mine, other = storages[tensors[name]], storages[tensors[tensor]]
            if mine[0] == other[0] and not _equal(mine, other):
                found.append(tensor)
    return found


def _alternatives(save: _Save, same_shape: bool) -> str:
    if save.path is None:
        return "; or the file was written from another buffer"
    if not same_shape:
        return "; or another program wrote the file"
    return "; or they changed while they were written, by another thread, process or device"


def _agree(save: _Save, version: _Version) -> bool:
    """Whether the file holds every storage of the save as it was in memory."""
    return bool(save.storages) and all(
        _equal(storage, version.storages.get(name)) for name, storage in save.storages.items()
    )


def _equal(memory: Storage, file: Storage | None) -> bool:
    if file is None or memory[:2] != file[:2]:
        return False
    return memory[2] is None or file[2] is None or memory[2] == file[2]


def _storages(rows: Iterable[object]) -> dict[str, Storage]:
    """Rows of a frame that are as specified."""
    found: dict[str, Storage] = {}
    for row in rows:
        if not isinstance(row, list) or len(row) not in (4, 5):
            continue
        name, size, sampled, whole = row[:4]
        fits = isinstance(name, str) and type(size) is int and isinstance(sampled, str)
        if fits and (whole is None or isinstance(whole, str)):
            found[name] = (size, sampled, whole)
    return found


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
