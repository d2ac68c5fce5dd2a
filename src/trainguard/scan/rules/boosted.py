"""Rules for boosted trees: a pickled booster carries its library's own model format, which native code reads.

That text or those bytes are judged like a file of that format (formats/ubjson.py, formats/lightgbm.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trainguard.scan.rules.interface import Kind, refuse
from trainguard.scan.rules.plain import bare, check_attributes
from trainguard.scan.values import Map, Object, Span, Value

if TYPE_CHECKING:
    from trainguard.scan.machine import Machine

LIGHTGBM_START = b"tree\n"


def xgboost_state(machine: Machine, target: Object, state: Value) -> Value:
    """State of xgboost.core.Booster: attributes, and `handle`: its model as bytes, or None."""
    facts = _attributes(target, state)
    handle = facts.get("handle")
    if isinstance(handle, Object) and handle.origin.name == "builtins.bytearray":
        handle = handle.facts
    if type(handle) is bytes or (type(handle) is Span and not handle.is_text):
        machine.nested(handle)
    elif handle is not None or "handle" not in facts:
        raise refuse("build", target.origin, "a handle made of bytes", handle)
    return target


def lightgbm_state(machine: Machine, target: Object, state: Value) -> Value:
    """State of lightgbm.basic.Booster: attributes, and `_handle` (once `handle`): its model as text, or None."""
    facts = _attributes(target, state)
    for name in ("_handle", "handle"):
        handle = facts.get(name)
        if type(handle) is str and handle.encode("utf-8", "replace").startswith(LIGHTGBM_START):
            machine.nested(handle.encode("utf-8", "replace"))
        elif type(handle) is Span and machine.source.read(handle.offset, len(LIGHTGBM_START)) == LIGHTGBM_START:
            machine.nested(handle)
        elif handle is not None:
            raise refuse("build", target.origin, "a model of LightGBM's as text", handle)
    return target


def _attributes(target: Object, state: Value) -> dict[str, Value]:
    check_attributes(target.origin, state)
    facts = state.text_keys() if type(state) is Map else None
    if facts is None:
        raise refuse("build", target.origin, "attributes as a dict", state)
    return facts


BOOSTED: dict[str, Kind] = {
    "xgboost_booster": Kind(new=bare, state=xgboost_state),
    "lightgbm_booster": Kind(new=bare, state=lightgbm_state),
}
"""Kinds for boosted trees."""
