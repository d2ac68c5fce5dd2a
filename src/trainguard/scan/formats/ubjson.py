"""XGBoost's binary models: UBJSON as XGBoost 1.6 and later write it (`src/common/json.cc`).

    { key value … }         a key is a length and that many bytes of text, without a marker of its own
    [ value … ]             [# length value … without the bracket; [$ type # length: numbers back to back, big endian
    S length text · T F Z · i U I l L integers of 1 1 2 4 8 bytes · d D floats

A model holds numbers and names of objectives and boosters, which XGBoost looks up in its own tables: nothing in it is
code. It is read to its last byte, since XGBoost itself trusts the lengths.
"""

from __future__ import annotations

from trainguard.scan.budget import OverBudget
from trainguard.scan.formats.interface import Format, Job
from trainguard.scan.source import Source

LENGTHS = {ord("i"): 1, ord("U"): 1, ord("I"): 2, ord("l"): 4, ord("L"): 8}
"""Integer markers → bytes; only these may give a length."""
WIDTHS = LENGTHS | {ord("u"): 2, ord("m"): 4, ord("d"): 4, ord("D"): 8, ord("C"): 1}
CONSTANTS = b"TFZN"
OBJECT, ARRAY = -1, -2
"""What is open, on the parser's stack; a number from 0 is an array that still holds so many items."""
DEPTH = 64
WINDOW_BYTES = 4 << 20
CHARGE_EVERY = 4096
TOP_KEYS = frozenset((b"learner", b"version", b"Config", b"Model"))
"""Of a saved model, and of the state a pickled Booster carries."""


class Broken(Exception):
    """Not UBJSON as XGBoost writes it; the message says where."""


class _Reader:
    """Bytes of a source in order, through a window."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.base = 0
        self.window = source.read(0, WINDOW_BYTES)
        self.at = 0

    @property
    def position(self) -> int:
        return self.base + self.at

    def take(self, length: int) -> bytes:
        """The next `length` bytes; raises Broken past the end."""
        if length > self.source.size - self.position:
            raise Broken(f"{length} bytes at byte {self.position} run past the end")
        if self.at + length > len(self.window):
            self.base, self.at = self.position, 0
            self.window = self.source.read(self.base, max(WINDOW_BYTES, length))
        data = self.window[self.at : self.at + length]
        self.at += length
        return data

    def skip(self, length: int) -> None:
        """Step over `length` bytes."""
        if length > self.source.size - self.position:
            raise Broken(f"{length} bytes at byte {self.position} run past the end")
        self.at += length
        if self.at > len(self.window):
            self.base, self.at = self.position, 0
            self.window = self.source.read(self.base, WINDOW_BYTES)

    def length(self) -> int:
        """A length: an integer with its marker, not negative."""
        marker = self.take(1)[0]
        if marker not in LENGTHS:
            raise Broken(f"expected a length at byte {self.position - 1}, found {chr(marker)!a}")
        value = int.from_bytes(self.take(LENGTHS[marker]), "big", signed=marker != ord("U"))
        if value < 0:
            raise Broken(f"a negative length before byte {self.position}")
        return value


def check(job: Job) -> None:
    """Read the one object the source holds, to its last byte. Raises Broken; OverBudget past a limit."""
    reader = _Reader(job.source)
    if reader.take(1) != b"{":
        raise Broken("expected an object")
    open_ones, top, values = [OBJECT], set(), 0
    while open_ones:
        values += 1
        if not values % CHARGE_EVERY:
            job.meter.spend_operations(CHARGE_EVERY, 0)
        if _ends(reader, open_ones):
            continue
        if open_ones[-1] == OBJECT:
            key = reader.take(min(reader.length(), 1 << 16))
            if len(open_ones) == 1:
                top.add(key)
        _value(reader, open_ones)
        if len(open_ones) > DEPTH:
            raise OverBudget(f"nested more than {DEPTH} deep")
    if reader.position != job.source.size:
        raise Broken(f"{job.source.size - reader.position} bytes behind the object")
    if not top or not top <= TOP_KEYS:
        raise Broken("expected a model of XGBoost's, found another object")


def _ends(reader: _Reader, open_ones: list[int]) -> bool:
    """Whether the innermost object or array ends here; takes its bracket, or counts one of its items."""
    if open_ones[-1] >= 0:
        open_ones[-1] -= 1
        if open_ones[-1] < 0:
            open_ones.pop()
            return True
        return False
    if reader.take(1) == (b"}" if open_ones[-1] == OBJECT else b"]"):
        open_ones.pop()
        return True
    reader.at -= 1
    return False


def _value(reader: _Reader, open_ones: list[int]) -> None:
    marker = reader.take(1)[0]
    if marker == ord("{"):
        open_ones.append(OBJECT)
    elif marker == ord("["):
        _array(reader, open_ones)
    elif marker == ord("S"):
        reader.skip(reader.length())
    elif marker in WIDTHS:
        reader.skip(WIDTHS[marker])
    elif marker not in CONSTANTS:
        raise Broken(f"expected a value at byte {reader.position - 1}, found {chr(marker)!a}")


def _array(reader: _Reader, open_ones: list[int]) -> None:
    """An array: of numbers of one type, skipped whole; of so many items; or up to its bracket."""
    how = reader.take(1)
    if how == b"$":
        kind = reader.take(1)[0]
        if kind not in WIDTHS or reader.take(1) != b"#":
            raise Broken(f"expected an array of numbers before byte {reader.position}")
        reader.skip(reader.length() * WIDTHS[kind])
    elif how == b"#":
        open_ones.append(reader.length())
    else:
        reader.at -= 1
        open_ones.append(ARRAY)


def _sniff(head: bytes, source: Source) -> bool:
    """An object whose first key has an eight byte length, as XGBoost writes every one."""
    return head[:9] == b"{L\0\0\0\0\0\0\0" and head[10 : 10 + head[9]] in TOP_KEYS


def _judge(job: Job) -> None:
    try:
        check(job)
    except Broken as error:
        job.unsafe("ubjson", str(error))


UBJSON = Format(name="xgboost-ubjson", loader="xgboost", sniff=_sniff, judge=_judge)
