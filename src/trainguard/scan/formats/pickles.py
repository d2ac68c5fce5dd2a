"""Pickle streams: raw pickles, several in a row, joblib files; and the two engines that read them.

A stream is judged by the machine; when the machine lets it live, CPython's own unpickler reads it too, with every name
replaced by an inert stub, and any disagreement about names, persistent ids or the end is unsafe.
"""

from __future__ import annotations

import base64
import contextlib
from collections.abc import Iterator

from trainguard.scan import claims, second_opinion
from trainguard.scan.budget import OverBudget
from trainguard.scan.formats.interface import Format, Job
from trainguard.scan.machine import (
    JOBLIB,
    PICKLE,
    TORCH_LEGACY,
    Loader,
    Machine,
    Trace,
)
from trainguard.scan.rules.interface import Refused
from trainguard.scan.source import BytesSource, Source
from trainguard.scan.values import Global
from trainguard.scan.verdict import Verdict

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_VERSION = 1001
PICKLES_IN_A_ROW = 10_000
CARRIED_BYTES = 12
BROKEN_OPCODES = 3
"""Text that happens to begin like a protocol 0 pickle must get this far before it counts as a cut-off one."""


def run_machine(job: Job, start: int, loader: Loader, *, quiet: bool = False) -> tuple[Machine, Refused | None]:
    """Run one machine over the stream at `start`. Refusals come back as a value; OverBudget is raised.

    quiet: nothing is noted; for looking whether bytes that should not be a pickle act like one.
    """

    def note_unlisted(name: Global, use: str, offset: int) -> None:
        if not quiet:
            job.unlisted(name, use, offset)

    def judge_nested(source: Source, offset: int) -> None:
        if not quiet:
            job.judge_inside(f"(bytes at {offset})", source)

    machine = Machine(
        job.source,
        start,
        loader=loader,
        trust=job.trust,
        meter=job.meter.probe() if quiet else job.meter,
        on_unlisted=note_unlisted,
        on_nested=judge_nested,
    )
    try:
        machine.run()
    except Refused as refused:
        return machine, refused
    return machine, None


def judge_stream(job: Job, start: int, loader: Loader) -> Trace | None:
    """Judge one stream with both engines; its trace, or None when it is unsafe or over budget."""
    try:
        machine, refused = run_machine(job, start, loader)
    except OverBudget as error:
        job.note(Verdict.ERROR, "budget", f"pickle: {error}", offset=start)
        return None
    trace = machine.trace
    job.notes.globals.update(f"{module}.{name}" for module, name in trace.globals)
    job.notes.globals |= trace.implied
    if refused is not None:
        job.unsafe(refused.rule, str(refused), trace.end)
        return None
    _ask_again(job, start, loader, trace)
    if not loader.storage_parts:
        claims.check(job, trace.claims, lambda key: None)
    return trace


def _ask_again(job: Job, start: int, loader: Loader, trace: Trace) -> None:
    """The second opinion, where it can be had."""
    if job.notes.verdict is Verdict.UNSAFE:
        return
    length = trace.end - start
    if trace.inline_arrays:
        job.notes.opinions.add("not run: joblib arrays lie between the opcodes")
        return
    if length > job.policy.pickle_bytes:
        job.notes.opinions.add(f"not run: stream of {length} bytes, limit {job.policy.pickle_bytes}")
        return
    opinion = second_opinion.read(job.source.read(start, length), persistent=bool(loader.storage_parts))
    problem = second_opinion.disagreement(trace, start, opinion)
    if problem:
        job.unsafe("second-opinion", f"CPython's unpickler reads this stream differently: {problem}", start)
    else:
        job.notes.opinions.add("agrees")


def is_protocol_2(head: bytes, source: Source) -> bool:
    """A PROTO opcode at the start, with any version: what writes pickles begins them so since protocol 2."""
    return len(head) > 1 and head[0] == 0x80 and (head[1] <= 5 or head[2:3] in (b"\x95", b"c", b"]", b"}", b"("))


def judge(job: Job) -> tuple[str, str]:
    """A file that begins with a pickle: torch legacy, joblib, or one or more pickles and nothing else."""
    # Up to its first array a joblib file is a pickle like any other, so the machine that knows both reads the first.
    trace = judge_stream(job, 0, JOBLIB)
    if trace is None:
        return "pickle", "pickle"
    if trace.value == LEGACY_MAGIC and type(trace.value) is int:
        from trainguard.scan.formats import torch_legacy

        return torch_legacy.judge(job, trace.end)
    if not trace.inline_arrays:
        return judge_pickles(job, trace.end)
    if trace.end != job.source.size:
        job.unsafe("trailing", f"{job.source.size - trace.end} bytes behind the joblib stream", trace.end)
    return "joblib", "joblib"


def judge_pickles(job: Job, start: int) -> tuple[str, str]:
    """Pickles one behind the other up to the end of the source; anything else there is unsafe."""
    position, count = start, 1 if start else 0
    while position < job.source.size:
        if count >= PICKLES_IN_A_ROW:
            raise OverBudget(f"more than {PICKLES_IN_A_ROW} pickles in a row")
        before = job.notes.verdict
        trace = judge_stream(job, position, PICKLE)
        if trace is None:
            _explain_tail(job, position, count, before)
            break
        position, count = trace.end, count + 1
    return "pickle", "pickle"


def _explain_tail(job: Job, position: int, count: int, before: Verdict) -> None:
    if count and before is not Verdict.UNSAFE:
        job.unsafe("trailing", f"{job.source.size - position} bytes behind the pickle that are no pickle", position)


def acts_like_pickle(job: Job) -> str | None:
    """Why these bytes, given to an unpickler, would do something before it fails; None when they would not.

    Asked about everything that is not a pickle by its looks: text, archives, images. Importing a module the lists or
    the standard library know, or calling anything, counts; a label file that reads `cat`, `dog` does not.
    """
    try:
        trace = run_machine(job, 0, PICKLE, quiet=True)[0].trace
    except OverBudget as error:
        return str(error)
    if trace.called:
        return f"calls {'.'.join(trace.globals[-1]) if trace.globals else 'something'}"
    for module, name in trace.globals:
        if job.trust.could_import(module, name):
            return f"imports {module}.{name}"
    return None


def note_carried(job: Job, name: str, text: str) -> None:
    """Note a metadata text that is a pickle which would do something, as it is or in base64 or hex.

    Nothing that reads the format unpickles it; whoever hid a payload there has a reader that does.
    """
    for raw in _spellings(text.strip()):
        why = acts_like_pickle(job.inside(name, BytesSource(raw)))
        if why:
            job.unsafe("metadata", f"{name[:80]!a} holds a pickle that acts: {why}")
            return


def _spellings(text: str) -> Iterator[bytes]:
    """The bytes that `text` may stand for. Opcodes that import something need at least CARRIED_BYTES."""
    if len(text) < CARRIED_BYTES:
        return
    yield text.encode("latin-1", "replace")
    with contextlib.suppress(ValueError):
        yield bytes.fromhex(text)
    with contextlib.suppress(ValueError):
        yield base64.b64decode(text.replace("-", "+").replace("_", "/") + "=" * (-len(text) % 4), validate=True)


def is_plain_pickle(job: Job) -> bool:
    """Whether bytes without any magic are a whole pickle (protocols 0 and 1 have none)."""
    try:
        machine, refused = run_machine(job, 0, PICKLE, quiet=True)
    except OverBudget:
        return False
    if refused is None:
        return True
    ran_out = machine.position >= job.source.size or "past the end" in str(refused) or "without" in str(refused)
    return ran_out and machine.steps > BROKEN_OPCODES


PICKLE_FORMAT = Format(name="pickle", loader="pickle", sniff=is_protocol_2, judge=judge)

__all__ = ["PICKLE_FORMAT", "TORCH_LEGACY", "acts_like_pickle", "is_plain_pickle", "judge_pickles", "judge_stream"]
