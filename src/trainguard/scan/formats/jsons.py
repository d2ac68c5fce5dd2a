"""JSON from strangers: size, nesting and node count bounded before parsing; duplicate keys refused."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from trainguard.scan.budget import OverBudget
from trainguard.scan.limits import ScanPolicy
from trainguard.scan.source import Source

KEY = re.compile(rb'"((?:[^"\\\x00-\x1f]|\\.){1,200})"\s*:')
STRING = re.compile(rb'"(?:[^"\\]|\\.)*"', re.DOTALL)
NOT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
DEPTH = 200
"""Objects in objects; Python's own parser gives up at about 1,000."""
STEP_BYTES = 1 << 20
OVERLAP_BYTES = 1024


class BadJson(Exception):
    """Not JSON, or JSON that two readers understand differently."""


class TooBig(Exception):
    """More nodes than are parsed to objects; look at the keys only."""


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise BadJson("an object with the same key twice")
    return made


def parse(data: bytes, policy: ScanPolicy) -> Any:
    """The value in `data`. Raises BadJson, or TooBig past the policy's limits."""
    if len(data) > policy.json_bytes or data.count(b",") + data.count(b"[") + data.count(b"{") > policy.json_nodes:
        raise TooBig
    try:
        return json.loads(data.decode("utf-8-sig"), object_pairs_hook=_pairs)
    except RecursionError as error:
        raise OverBudget("JSON nested too deeply") from error
    except (ValueError, UnicodeDecodeError) as error:
        raise BadJson(f"not JSON: {error}") from error


def is_json(data: bytes, policy: ScanPolicy) -> bool:
    """Whether a reader would take `data` for JSON at all, with or without what `parse` refuses."""
    if len(data) > policy.json_bytes or data.count(b",") + data.count(b"[") + data.count(b"{") > policy.json_nodes:
        return True
    try:
        json.loads(data.decode("utf-8-sig"))
    except RecursionError:
        return True
    except (ValueError, UnicodeDecodeError):
        return False
    return True


def keys(source: Source) -> Iterator[str]:
    """Every string that stands before a colon, without building objects; for files too big to parse."""
    carry = b""
    for offset in range(0, source.size, STEP_BYTES):
        chunk = carry + source.read(offset, STEP_BYTES)
        for match in KEY.finditer(chunk):
            text = match[1].decode("utf-8", "replace")
            yield json.loads(f'"{text}"') if "\\u" in text else text
        carry = chunk[-OVERLAP_BYTES:]


def check_brackets(source: Source) -> None:
    """Raise BadJson unless brackets outside strings match, and OverBudget when they nest deeper than DEPTH."""
    bare = STRING.sub(b"", source.read(0, source.size)).translate(None, NOT_BRACKETS)
    open_ones = bytearray()
    for byte in bare:
        if byte in b"[{":
            open_ones.append(byte + 2)
            if len(open_ones) > DEPTH:
                raise OverBudget(f"JSON nested more than {DEPTH} deep")
        elif not open_ones or open_ones.pop() != byte:
            raise BadJson("not JSON: a bracket that closes none")
    if open_ones:
        raise BadJson("not JSON: ends inside brackets")


def walk(value: Any) -> Iterator[tuple[str, Any]]:
    """(key, value) of every object at any depth."""
    pending = [value]
    while pending:
        item = pending.pop()
        if isinstance(item, dict):
            yield from item.items()
            pending.extend(item.values())
        elif isinstance(item, list):
            pending.extend(item)
