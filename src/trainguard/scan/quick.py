"""The opcodes that make up nearly all of a checkpoint, each as a closure over one machine's stack, marks and memo.

A handler takes the window and the position behind its opcode and gives the position of the next one. 3 million of them
must pass in about a second, so what it needs lies in the closure and nothing is stored in the machine but what others
read there. Every other opcode is a method of the machine: `slow` makes a handler of it, which stores the position
before and gives ELSEWHERE, so that the loop takes up window, position and limit anew.

A handler that refuses stores the position first: reports name the byte.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import TYPE_CHECKING, NoReturn

from trainguard.scan.rules.interface import Malformed

if TYPE_CHECKING:
    from trainguard.scan.machine import Machine

Handler = Callable[[bytes, int], int]
"""(window, position behind the opcode) → position of the next opcode, or ELSEWHERE."""

ELSEWHERE = 1 << 62
"""Beyond every limit: the machine's own fields say where to go on."""

HOLE = object()
"""A memo slot nobody wrote."""

_U4 = struct.Struct("<I").unpack_from
_I4 = struct.Struct("<i").unpack_from
_U2 = struct.Struct("<H").unpack_from


def handlers(machine: Machine) -> dict[int, Handler]:
    """Opcode → handler, for the opcodes of this file."""
    return _memo(machine) | _constants(machine) | _texts(machine) | _tuples(machine) | _calls(machine)


def slow(machine: Machine, method: Callable[[Machine], None]) -> Handler:
    """A handler of one of the machine's methods, which may move the window."""

    def handler(data: bytes, pos: int) -> int:
        machine.pos = pos
        method(machine)
        return ELSEWHERE

    return handler


def unknown(machine: Machine, opcode: int) -> Handler:
    """A handler of a byte that is no opcode."""

    def handler(data: bytes, pos: int) -> int:
        _refuse(machine, pos, f"byte 0x{opcode:02x} is not an opcode")

    return handler


def _refuse(machine: Machine, pos: int, what: str) -> NoReturn:
    machine.pos = pos
    raise Malformed(what)


def _memo(machine: Machine) -> dict[int, Handler]:
    stack, memo = machine.stack, machine.memo
    remember, push = memo.append, stack.append

    def put(index: int, pos: int) -> int:
        """The rare ways: an empty stack, a slot that is written again or lies beyond the memo."""
        if len(stack) <= machine.fence:
            _refuse(machine, pos, "memoizes from an empty stack")
        machine.pos = pos
        machine.put(index, stack[-1])
        return pos

    def binput(data: bytes, pos: int) -> int:
        if data[pos] == len(memo) and len(stack) > machine.fence:
            remember(stack[-1])
            return pos + 1
        return put(data[pos], pos + 1)

    def long_binput(data: bytes, pos: int) -> int:
        index = _U4(data, pos)[0]
        if index == len(memo) and len(stack) > machine.fence:
            remember(stack[-1])
            return pos + 4
        return put(index, pos + 4)

    def memoize(data: bytes, pos: int) -> int:
        if not machine.holes and len(stack) > machine.fence:
            remember(stack[-1])
            return pos
        return put(len(memo) - machine.holes, pos)

    def get(index: int, pos: int) -> int:
        if index >= len(memo) or memo[index] is HOLE:
            _refuse(machine, pos, f"reads memo entry {index}, which was never written")
        push(memo[index])
        return pos

    def binget(data: bytes, pos: int) -> int:
        index = data[pos]
        if index < len(memo) and memo[index] is not HOLE:
            push(memo[index])
            return pos + 1
        return get(index, pos + 1)

    def long_binget(data: bytes, pos: int) -> int:
        return get(_U4(data, pos)[0], pos + 4)

    return {0x71: binput, 0x72: long_binput, 0x94: memoize, 0x68: binget, 0x6A: long_binget}


def _constants(machine: Machine) -> dict[int, Handler]:
    push = machine.stack.append

    def binint1(data: bytes, pos: int) -> int:
        push(data[pos])
        return pos + 1

    def binint2(data: bytes, pos: int) -> int:
        push(_U2(data, pos)[0])
        return pos + 2

    def binint(data: bytes, pos: int) -> int:
        push(_I4(data, pos)[0])
        return pos + 4

    def constant(value: object) -> Handler:
        def handler(data: bytes, pos: int) -> int:
            push(value)
            return pos

        return handler

    made: dict[int, Handler] = {0x4B: binint1, 0x4D: binint2, 0x4A: binint}
    return made | {0x29: constant(()), 0x89: constant(False), 0x88: constant(True), 0x4E: constant(None)}


def _texts(machine: Machine) -> dict[int, Handler]:
    push, keep = machine.stack.append, machine.keep

    def text(data: bytes, pos: int, length: int) -> int:
        end = pos + length
        if length <= keep and end <= len(data):
            push(data[pos:end].decode("utf-8", "surrogatepass"))
            machine.made += 1 + (length >> 6)
            return end
        machine.pos = pos
        push(machine.long_text(length))
        return ELSEWHERE

    def binunicode(data: bytes, pos: int) -> int:
        return text(data, pos + 4, _U4(data, pos)[0])

    def short_binunicode(data: bytes, pos: int) -> int:
        return text(data, pos + 1, data[pos])

    return {0x58: binunicode, 0x8C: short_binunicode}


def _tuples(machine: Machine) -> dict[int, Handler]:
    stack, marks = machine.stack, machine.marks
    push = stack.append

    def mark(data: bytes, pos: int) -> int:
        machine.fence = len(stack)
        marks.append(machine.fence)
        return pos

    def close(data: bytes, pos: int) -> int:
        if not marks:
            _refuse(machine, pos, "closes a tuple with no mark")
        begin = marks.pop()
        items = tuple(stack[begin:])
        del stack[begin:]
        if machine.guarded:
            machine.pos = pos
            machine.refuse_guarded(items)
        push(items)
        machine.fence = marks[-1] if marks else 0
        machine.made += 1 + (len(items) >> 3)
        return pos

    def short(count: int) -> Handler:
        def handler(data: bytes, pos: int) -> int:
            if len(stack) - count < machine.fence:
                _refuse(machine, pos, "makes a tuple from an empty stack")
            items = tuple(stack[-count:])
            if machine.guarded:
                machine.pos = pos
                machine.refuse_guarded(items)
            stack[-count:] = [items]
            machine.made += 1
            return pos

        return handler

    return {0x28: mark, 0x74: close, 0x85: short(1), 0x86: short(2), 0x87: short(3)}


def _calls(machine: Machine) -> dict[int, Handler]:
    """REDUCE and BINPERSID: no rule moves the window, so the loop can go on in it."""

    def reduce(data: bytes, pos: int) -> int:
        machine.pos = pos
        machine.reduce()
        return pos

    def binpersid(data: bytes, pos: int) -> int:
        machine.pos = pos
        machine.binpersid()
        return pos

    return {0x52: reduce, 0x51: binpersid}
