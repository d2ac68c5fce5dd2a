"""A case for those who are in it, in the terminal."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from typing import Any

import msgspec
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from trainguard.cases.canary import Match, settled
from trainguard.cases.desk import Line, View
from trainguard.cases.export import Checked
from trainguard.cases.identity import Card, fingerprint
from trainguard.cases.records import (
    Add,
    Exported,
    Grant,
    Hypothesis,
    Move,
    Mute,
    Open,
    Read,
    Refused,
    Remove,
    Settle,
    Sign,
    Weigh,
)
from trainguard.cases.room import Seen
from trainguard.cases.state import SECOND, Act, Member, State
from trainguard.render.line import plain
from trainguard.render.terminal import commands, heading
from trainguard.render.words import plural

RECORDS_SHOWN = 30
SEVERITY_STYLE = {"critical": "bold red", "high": "red", "medium": "yellow", "low": ""}


def list_view(lines: Sequence[Line]) -> RenderableType:
    """One line a case."""
    if not lines:
        return Text("no case is open to you")
    table = Table.grid(padding=(0, 2))
    for _ in range(5):
        table.add_column(no_wrap=True)
    table.add_column(ratio=1, overflow="fold")
    for one in lines:
        severity = Text(one.severity, style=SEVERITY_STYLE[one.severity])
        if one.broken:
            table.add_row(one.code, "", "", "", "", plain(f"cannot be shown: {one.broken}", 300))
            continue
        waits = "" if not one.waits else f"waits for a second signature: {', '.join(map(str, one.waits))}"
        table.add_row(one.code, severity, one.stage, one.posture, f"{one.role} until {day(one.until)}", waits)
    return table


def card_lines(card: Card, *, path: str | None = None) -> list[str]:
    """A card, with what two people should compare."""
    return [
        f"{plain(card.name)}",
        f"  key       {fingerprint(card.key)}",
        f"  accounts  {plain(', '.join(card.accounts)) or 'none stated'}",
        f"  authors   {plain(', '.join(card.authors)) or 'none stated'}",
        *([f"  file      {plain(path)}"] if path else []),
        "Compare the key with its owner by another way before you sign with it.",
    ]


def case_view(view: View) -> RenderableType:
    """All of one case."""
    state = view.state
    me = state.members[view.me]
    first = Text(f"{state.code}  ", style="bold")
    first.append(state.severity, style=SEVERITY_STYLE[state.severity])
    first.append(f"  {state.stage}, {state.posture}{', in legal hold' if state.held else ''}")
    parts: list[RenderableType] = [first, Text(plain(state.reason, 600))]
    parts.append(Text(f"You are {plain(me.card.name)}, {me.role}, until {day(me.until)}. This look was logged."))
    if len(state.leads(view.now_ns)) < 2 and state.stage != "proposed":
        parts.append(Text("Fewer than two leads are left: nothing that needs two people can be done.", style="bold"))
    if state.pending:
        parts += [Text(), heading("Waits for a second signature"), commands(list(_waiting(state)))]
    if state.signed:
        rows = [
            (f"trainguard case export {state.code} --act {n} -o FILE", "agreed, not made yet") for n in state.signed
        ]
        parts += [Text(), heading("Agreed"), commands(rows)]
    parts += [Text(), heading(f"Incidents ({len(state.incidents)})", "as they were taken in"), _incidents(view)]
    parts += [Text(), heading("Kept out", "by the evidence; nobody is told"), _subjects(state)]
    parts += [Text(), heading("Members"), _members(view)]
    if view.notes:
        parts += [Text(), heading("Notes", "your copies"), _notes(view)]
    if state.thoughts:
        parts += [Text(), heading("Hypotheses", "what members hold possible, and why"), _thoughts(state)]
    parts += [Text(), heading("Record", _how_much(len(view.seen))), _record(view)]
    if view.strange:
        text = "\n".join(plain(line, 300) for line in view.strange[:20])
        parts += [Text(), heading("Does not belong", "entries that bear the case's mark, ignored"), Text(text)]
    return Group(*parts)


def checked_lines(checked: Checked) -> list[str]:
    """What an exported case was found to hold."""
    span = " to ".join(_moment(int(text)) for text in (checked.first_at, checked.last_at))
    return [
        f"case {plain(checked.code)}: holds: {plural(checked.records, 'record')}, {span}, {checked.stage}",
        *(f"  {plain(name)}  key {fingerprint(key)}" for key, name in checked.signers.items()),
        f"  incidents: {', '.join(map(plain, checked.incidents)) or 'none'}",
        f"  log {plain(checked.log_origin)}, {checked.log_size} entries, key {checked.log_key}",
        "Compare the keys with those you got another way.",
    ]


def trace_view(matches: Sequence[Match]) -> RenderableType:
    """Whose copy a text carries."""
    if not matches:
        return Text("the text carries no mark of a note that you wrote")
    found = settled(matches)
    table = Table.grid(padding=(0, 2))
    for _ in range(3):
        table.add_column(no_wrap=True)
    for one in matches[:20]:
        table.add_row(f"note {one.note}", plain(one.name), f"{one.fits} of {plural(one.of, 'mark')}")
    said = (
        f"This is the copy of {plain(found.name)} (note {found.note})."
        if found is not None
        else "No one copy fits alone: add marks to the next note."
    )
    rest = "It says whose copy it was, not who passed it on."
    return Group(table, Text(), Text(f"{said} {rest}" if found is not None else said))


def day(seconds: int) -> str:
    """UTC date, or date and time where it is not midnight."""
    try:
        moment = datetime.datetime.fromtimestamp(seconds, datetime.UTC)
    except (OverflowError, ValueError, OSError):
        return "the end of time"
    return moment.strftime("%Y-%m-%d" if not seconds % 86400 else "%Y-%m-%d %H:%M UTC")


def moment_of(seen: Seen) -> str:
    return _moment(seen.record.time_ns)


def _moment(time_ns: int) -> str:
    return datetime.datetime.fromtimestamp(time_ns // SECOND, datetime.UTC).strftime("%Y-%m-%d %H:%M:%S")


def _waiting(state: State) -> list[tuple[str, str]]:
    return [
        (
            f"trainguard case sign {state.code} {act.n}",
            f"{_act(act, state)}; proposed by {plain(state.called(act.author))}",
        )
        for act in state.pending.values()
    ]


def _act(act: Act, state: State) -> str:
    said = act.said
    if isinstance(said, Grant):
        lifted = f", although named as {', '.join(said.lifts)}" if said.lifts else ""
        key = fingerprint(said.card.key)
        return plain(
            f"admit {said.card.name} ({key}) as {said.role} until {day(said.until)}{lifted}: {said.reason}", 300
        )
    if isinstance(said, Remove):
        return plain(f"remove {state.called(said.key)}: {said.reason}", 300)
    return plain(_plainly(act.kind, said), 300)


def _plainly(kind: str, said: Any) -> str:
    """An act with what it is about and why: `turn overt: the account is disabled`."""
    about = [str(getattr(said, name)) for name in ("posture", "scope", "value") if getattr(said, name, "")]
    if isinstance(said, Mute):
        about.append(f"until {day(said.until)}" if said.until > said.since else "no longer")
    return f"{' '.join([kind, *about])}: {getattr(said, 'reason', '')}"


def _incidents(view: View) -> RenderableType:
    if view.state.purged:
        return Text("their contents were deleted; names and digests are left")
    table = Table.grid(padding=(0, 2))
    for _ in range(3):
        table.add_column(no_wrap=True)
    table.add_column(ratio=1, overflow="fold")
    for one in view.incidents:
        told = one.get("attribution")
        sentence = told.get("sentence") if isinstance(told, dict) else ""
        words = (one["id"], one["severity"], one["run"])
        table.add_row(*(plain(word, 60) for word in words), plain(str(sentence or ""), 300))
    return table


def _subjects(state: State) -> RenderableType:
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(ratio=1, overflow="fold")
    for one in state.subjects[:60]:
        table.add_row(plain(one.name, 60), "" if one.firm else "can be lifted", plain(one.why, 200))
    if not state.subjects:
        table.add_row("nobody: the evidence names no account, author or key", "", "")
    return table


def _members(view: View) -> RenderableType:
    table = Table.grid(padding=(0, 2))
    for _ in range(4):
        table.add_column(no_wrap=True)
    table.add_column(ratio=1, overflow="fold")
    for key, member in view.state.members.items():
        how = _standing(view, key, member)
        by = f"granted by {' and '.join(member.granted_by)}" if member.granted_by else "proposed"
        table.add_row(plain(member.card.name), member.role, fingerprint(key), how, plain(by, 160))
    return table


def _standing(view: View, key: str, member: Member) -> str:
    if member.gone:
        return member.gone
    if view.state.active(key, view.now_ns) is not None:
        return f"until {day(member.until)}"
    if view.state.named(member.card, member.lifts):
        return "kept out by the evidence"
    return f"ran out {day(member.until)}"


def _notes(view: View) -> RenderableType:
    table = Table.grid(padding=(0, 2))
    for _ in range(3):
        table.add_column(no_wrap=True)
    table.add_column(ratio=1, overflow="fold")
    for seen, text in view.notes:
        said = plain(text, 2000)
        table.add_row(str(seen.record.n), moment_of(seen), plain(view.state.called(seen.author)), said)
    return table


def _thoughts(state: State) -> RenderableType:
    """Each with what speaks for it and against it, in the same type."""
    text = Text()
    for thought in state.thoughts.values():
        by = f"{plain(state.called(thought.author))}, {_moment(thought.at_ns)}"
        text.append(f"{thought.n}  {plain(thought.text, 600)}\n", style="bold")
        text.append(f"   {thought.worth}{f': {plain(thought.reason, 300)}' if thought.reason else ''}  ({by})\n")
        for side in ("for", "against"):
            said = [(one, who, at) for one, who, at in thought.weighed if one.side == side]
            if not said:
                text.append(f"   {side}: nothing was written down\n")
            for one, who, at in said:
                rests = f" [{', '.join(map(plain, one.cites))}]" if one.cites else ""
                line = f"{plain(one.text, 600)}{rests}  ({plain(state.called(who))}, {_moment(at)})"
                text.append(f"   {side}: {line}\n")
    text.rstrip()
    return text


def _how_much(count: int) -> str:
    shown = f", the last {RECORDS_SHOWN} shown (--json has all)" if count > RECORDS_SHOWN else ""
    return f"{plural(count, 'record')}{shown}"


def _record(view: View) -> RenderableType:
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True, justify="right")
    for _ in range(3):
        table.add_column(no_wrap=True)
    table.add_column(ratio=1, overflow="fold")
    for seen in view.seen[-RECORDS_SHOWN:]:
        who = plain(view.state.called(seen.author))
        table.add_row(
            str(seen.record.n), moment_of(seen), who, f"leaf {seen.leaf}", plain(said_of(seen, view.state), 300)
        )
    return table


def said_of(seen: Seen, state: State) -> str:
    """One record in words."""
    said: Any = seen.record.said
    kind = seen.record.kind
    if isinstance(said, Read):
        return f"read ({said.what})"
    if isinstance(said, Open):
        return f"proposed the case: {said.reason}"
    if isinstance(said, Grant):
        return f"proposed to admit {said.card.name} as {said.role} until {day(said.until)}: {said.reason}"
    if isinstance(said, Remove):
        return f"proposed to remove {state.called(said.key)}: {said.reason}"
    if isinstance(said, Sign):
        return f"signed act {said.act}"
    if isinstance(said, Refused):
        return f"REFUSED: {said.what}: {said.why}"
    if isinstance(said, Hypothesis):
        return f"hypothesis {seen.record.n}: {said.text}"
    if isinstance(said, Weigh):
        rests = f" [{', '.join(said.cites)}]" if said.cites else ""
        return f"{said.side} hypothesis {said.hypothesis}: {said.text}{rests}"
    if isinstance(said, Settle):
        return f"hypothesis {said.hypothesis} is {said.worth}: {said.reason}"
    if isinstance(said, Move):
        return f"{'proposed to close' if kind == 'close' else f'moved to {said.stage}'}, {said.severity}: {said.reason}"
    if isinstance(said, Add):
        return f"took in {', '.join(ref.id for ref in said.incidents)}"
    if isinstance(said, Exported):
        return f"exported {said.bytes:,} bytes, SHA-256 {said.sha256}"
    if kind == "epoch":
        return "the room has a new key"
    if kind == "note":
        return "wrote a note"
    if kind in ("hold", "leave"):
        return f"{'put the case in legal hold' if kind == 'hold' else 'left'}: {said.reason}"
    return f"proposed to {_plainly(kind, said)}"


def document(view: View) -> dict[str, Any]:
    """The case as one JSON document."""
    state = view.state
    return {
        "schema": "trainguard/case/v1",
        "code": state.code,
        "reason": state.reason,
        "stage": state.stage,
        "severity": state.severity,
        "posture": state.posture,
        "held": state.held,
        "purged": state.purged,
        "incidents": list(view.incidents),
        "subjects": msgspec.to_builtins(state.subjects),
        "members": [
            {
                "name": member.card.name,
                "key": key,
                "role": member.role,
                "until": member.until,
                "standing": _standing(view, key, member),
                "granted_by": list(member.granted_by),
            }
            for key, member in state.members.items()
        ],
        "pending": [{"act": act.n, "kind": act.kind, "by": state.called(act.author)} for act in state.pending.values()],
        "notes": [
            {"record": seen.record.n, "by": state.called(seen.author), "text": text} for seen, text in view.notes
        ],
        "hypotheses": [
            {
                "n": thought.n,
                "text": thought.text,
                "by": state.called(thought.author),
                "at": str(thought.at_ns),
                "worth": thought.worth,
                "reason": thought.reason,
                "weighed": [
                    {
                        "side": one.side,
                        "text": one.text,
                        "cites": list(one.cites),
                        "by": state.called(who),
                        "at": str(at),
                    }
                    for one, who, at in thought.weighed
                ],
            }
            for thought in state.thoughts.values()
        ],
        "record": [
            {
                "n": seen.record.n,
                "leaf": seen.leaf,
                "at": seen.record.at,
                "by": state.called(seen.author),
                "kind": seen.record.kind,
                "said": said_of(seen, state),
            }
            for seen in view.seen
        ],
        "strange": list(view.strange),
    }
