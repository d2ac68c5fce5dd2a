"""`trainguard case …`: rooms for those who look for a cause, closed to everyone the evidence names (docs/cases.md)."""

from __future__ import annotations

import datetime
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec

from trainguard.digest import sha256_hex
from trainguard.errors import Misuse, TrainguardError, Unavailable
from trainguard.home import Home

if TYPE_CHECKING:
    from trainguard.cases.desk import Desk
    from trainguard.cases.identity import Card, Identity
    from trainguard.cases.records import Subject
    from trainguard.incident.correlate import Incident

DAYS = re.compile(r"(\d{1,4})d")
BUNDLE_LIMIT_BYTES = 1 << 30
ROLE = click.Choice(["lead", "investigator", "reader"])
_reason = click.option("--reason", required=True, help="Why, for the record.")
_until = click.option(
    "--until", required=True, metavar="DATE", help="Last day (2026-12-31, UTC) or time from now (30d)."
)
_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
_quiet = click.option("--quiet", is_flag=True, help="Print nothing; the exit status tells.")
_bundle = click.option(
    "--bundle",
    "bundles",
    multiple=True,
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="An incident exported from another state folder.",
)
_lift = click.option("--lift", "lifts", multiple=True, metavar="NAME", help="An exclusion that two people set aside.")


ORDER = (
    *(
        "identity",
        "card",
        "open",
        "list",
        "show",
        "sign",
        "note",
        "trace",
        "suppose",
        "weigh",
        "settle",
        "add",
        "move",
        "grant",
        "remove",
        "leave",
    ),
    *("turn", "mute", "hold", "export", "verify", "purge", "waive", "cover"),
)
"""As a case goes."""


class _InOrder(click.Group):
    """Lists its verbs as they are used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(self.commands, key=ORDER.index)


@click.group("case", cls=_InOrder)
def command() -> None:
    """Need-to-know rooms: members by name, reason and expiry; two people grant; the evidence excludes.

    Who is no member learns nothing here, not even whether there is a case. Every look is logged before anything is
    shown. Exit status: 0 done, 1 refused or does not hold, 2 usage error (or no such case), 3 could not tell.
    """


# -- who I am ----------------------------------------------------------------------------------------------------------


@command.command("identity")
@click.option("--name", required=True, help="What you are called in cases.")
@click.option("--account", "accounts", multiple=True, help="An account you work under; repeat for each.")
@click.option("--author", "authors", multiple=True, help="A mail address or name you commit under; repeat for each.")
@click.option("--passphrase", is_flag=True, help="Ask for a passphrase that the keys are encrypted with.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Write the card here, to hand on.")
def identity_command(
    name: str, accounts: tuple[str, ...], authors: tuple[str, ...], passphrase: bool, output: Path | None
) -> int:
    """Make your keys and your card.

    They lie in your own home folder, or at TRAINGUARD_IDENTITY: never in the state folder.
    """
    from trainguard.cases.identity import create_identity, identity_path
    from trainguard.digest import write_durably
    from trainguard.render.case import card_lines

    secret = click.prompt("Passphrase", hide_input=True, confirmation_prompt=True) if passphrase else None
    stated = accounts or (_account(),)
    made = create_identity(
        identity_path(), name=name, accounts=stated, authors=authors, passphrase=secret.encode() if secret else None
    )
    if output is not None:
        write_durably(output, made.card_bytes())
    click.echo("\n".join(card_lines(made.card, path=str(output) if output else None)))
    return 0


@command.command("card")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Write your card here, to hand on.")
@click.argument("card", type=click.Path(path_type=Path), required=False)
def card_command(output: Path | None, card: Path | None) -> int:
    """Show your card, or one that somebody gave you."""
    from trainguard.cases.identity import read_card
    from trainguard.digest import write_durably
    from trainguard.render.case import card_lines

    if card is not None:
        click.echo("\n".join(card_lines(read_card(card), path=str(card))))
        return 0
    mine = _identity()
    if mine is None:
        raise _nobody()
    if output is not None:
        write_durably(output, mine.card_bytes())
    click.echo("\n".join(card_lines(mine.card, path=str(output) if output else None)))
    return 0


# -- looking -----------------------------------------------------------------------------------------------------------


@command.command("list")
@_json
@_quiet
def list_command(as_json: bool, quiet: bool) -> int:
    """The cases that are open to you. Exit status: 0, or 1 where one of them does not hold."""
    lines = _desk().cases()
    if as_json:
        _print({"schema": "trainguard/cases/v1", "cases": lines})
    elif not quiet:
        from trainguard.render.case import list_view

        _show(lambda: list_view(lines))
    return 1 if any(line.broken for line in lines) else 0


@command.command("show")
@_json
@_quiet
@click.argument("case")
def show_command(as_json: bool, quiet: bool, case: str) -> int:
    """All of one case.

    What waits, incidents, who is kept out, members, notes, and its record.
    """
    from trainguard.render.case import case_view, document

    view = _desk().show(case)
    if as_json:
        _print(document(view))
    elif not quiet:
        _show(lambda: case_view(view))
    return 0


@command.command("trace")
@_json
@click.argument("case")
@click.argument("text", type=click.File("r", errors="replace"))
def trace_command(as_json: bool, case: str, text: Any) -> int:
    """Whose copy of a note a text carries.

    TEXT is a file, - for stdin; only notes you wrote are looked at. Exit status: 0 one copy, 3 none or several.
    """
    from trainguard.cases.canary import settled

    matches = _desk().trace(case, text.read(1 << 20))
    found = settled(matches)
    if as_json:
        _print({"schema": "trainguard/case-trace/v1", "copy": found, "matches": matches})
    else:
        from trainguard.render.case import trace_view

        _show(lambda: trace_view(matches))
    return 0 if found is not None else 3


@command.command("cover")
def cover_command() -> int:
    """Leave the trace of a call and do nothing.

    Put it on a schedule, so that calls cannot be counted.
    """
    from trainguard.cases.desk import Desk

    Desk(Home.find(), None).cover()
    return 0


# -- acting ------------------------------------------------------------------------------------------------------------


@command.command("open")
@click.option("--with", "second", type=click.Path(path_type=Path), required=True, metavar="CARD", help="Who signs too.")
@click.option("--member", "members", multiple=True, metavar="CARD[:ROLE]", help="A further member; repeat for each.")
@_reason
@_until
@_lift
@click.option("--overt", is_flag=True, help="Overt from the start; covert otherwise.")
@click.option("--code", help="A neutral code name; chosen for you otherwise.")
@_bundle
@click.argument("incident", nargs=-1)
def open_command(
    second: Path,
    members: tuple[str, ...],
    reason: str,
    until: str,
    lifts: tuple[str, ...],
    overt: bool,
    code: str | None,
    bundles: tuple[Path, ...],
    incident: tuple[str, ...],
) -> int:
    """Propose a case on INCIDENT…

    It is one when the owner of --with CARD has signed.
    Whoever the incidents name, and who approved what they rest on, cannot be in it.
    """
    from trainguard.cases.identity import read_card
    from trainguard.cases.records import Grant

    end = parse_until(until)
    named = [
        Grant(card=card, role=role, reason=reason, until=end, lifts=lifts) for card, role in map(_member_card, members)
    ]
    taken, subjects = _taken(incident, bundles)
    if bundles:
        _make_log()
    made = _desk().open(
        taken,
        subjects=subjects,
        second=read_card(second),
        reason=reason,
        until=end,
        members=named,
        posture="overt" if overt else "covert",
        lifts=lifts,
        code=code,
    )
    _told(f"case {made}: proposed", f"trainguard case sign {made} 0", "by the second person, as themselves")
    return 0


@command.command("sign")
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.argument("case")
@click.argument("act", type=click.IntRange(min=0))
def sign_command(yes: bool, case: str, act: int) -> int:
    """Give the second signature to an act.

    It takes effect at once.
    """
    desk = _desk()
    if not yes:
        _ask(desk, case, act)
    kind = desk.sign(case, act)
    click.echo(f"case {case}: {kind} (act {act}) has two signatures and is in effect", err=True)
    return 0


@command.command("grant")
@click.option("--role", type=ROLE, default="investigator", show_default=True)
@_reason
@_until
@_lift
@click.argument("case")
@click.argument("card", type=click.Path(path_type=Path))
def grant_command(role: Any, reason: str, until: str, lifts: tuple[str, ...], case: str, card: Path) -> int:
    """Propose a member."""
    from trainguard.cases.identity import read_card

    desk = _desk()
    _proposed(case, desk.grant(case, read_card(card), role=role, reason=reason, until=parse_until(until), lifts=lifts))
    return 0


@command.command("remove")
@_reason
@click.argument("case")
@click.argument("member")
def remove_command(reason: str, case: str, member: str) -> int:
    """Propose to remove a member.

    MEMBER is a name, or the beginning of a key. The room then gets a new key.
    """
    _proposed(case, _desk().remove(case, member, reason=reason))
    return 0


@command.command("leave")
@_reason
@click.argument("case")
def leave_command(reason: str, case: str) -> int:
    """Leave a case for good."""
    _desk().leave(case, reason=reason)
    click.echo("done: what is written from now on is not for you", err=True)
    return 0


@command.command("add")
@_bundle
@click.argument("case")
@click.argument("incident", nargs=-1)
def add_command(case: str, bundles: tuple[Path, ...], incident: tuple[str, ...]) -> int:
    """Take further incidents in. Members whom they name are members no longer."""
    taken, subjects = _taken(incident, bundles)
    _desk().add(case, taken, subjects=subjects)
    return 0


@command.command("note")
@click.argument("case")
@click.argument("text")
def note_command(case: str, text: str) -> int:
    """Write a note to all members.

    Alternatives in it make every copy another one:

    trainguard case note CASE "we replay {Monday|Tuesday} on {node-3|node-9}"
    """
    number = _desk().note(case, text)
    click.echo(f"case {case}: note {number}", err=True)
    return 0


@command.command("suppose")
@click.argument("case")
@click.argument("text")
def suppose_command(case: str, text: str) -> int:
    """Write down what could be the cause; who thought what, and when, stays in the record."""
    number = _desk().suppose(case, text)
    click.echo(f"case {case}: hypothesis {number}", err=True)
    return 0


@command.command("weigh")
@click.option("--cite", "cites", multiple=True, metavar="WHAT", help="inc-…, leaf:N or record:N it rests on; repeat.")
@click.argument("case")
@click.argument("hypothesis", type=int)
@click.argument("side", type=click.Choice(["for", "against"]))
@click.argument("text")
def weigh_command(cites: tuple[str, ...], case: str, hypothesis: int, side: Any, text: str) -> int:
    """Say what speaks for or against a hypothesis."""
    _desk().weigh(case, hypothesis, side, text, cites=cites)
    return 0


@command.command("settle")
@_reason
@click.argument("case")
@click.argument("hypothesis", type=int)
@click.argument("worth", type=click.Choice(["open", "supported", "refuted", "dropped"]))
def settle_command(reason: str, case: str, hypothesis: int, worth: Any) -> int:
    """Say how a hypothesis stands now; it is supported only beside another one."""
    _desk().settle(case, hypothesis, worth, reason=reason)
    return 0


@command.command("move")
@click.option("--severity", type=click.Choice(["critical", "high", "medium", "low"]))
@_reason
@click.argument("case")
@click.argument("stage", type=click.Choice(["open", "contained", "eradicated", "recovered", "closed"]))
def move_command(severity: Any, reason: str, case: str, stage: Any) -> int:
    """Say where the case stands.

    Closing it waits for a second lead.
    """
    number = _desk().move(case, stage, severity=severity, reason=reason)
    if stage == "closed":
        _proposed(case, number)
    return 0


@command.command("turn")
@_reason
@click.argument("case")
@click.argument("posture", type=click.Choice(["covert", "overt"]))
def turn_command(reason: str, case: str, posture: Any) -> int:
    """Propose another posture.

    Covert: nobody is told, and mutes may stand. Overt: access is cut, people are told.
    """
    _proposed(case, _desk().turn(case, posture, reason=reason))
    return 0


@command.command("hold")
@click.option("--release", is_flag=True, help="Propose to end it.")
@_reason
@click.argument("case")
def hold_command(release: bool, reason: str, case: str) -> int:
    """Put a case in legal hold.

    Nothing of it can be deleted, and no lead's membership runs out. Two people end it.
    """
    number = _desk().hold(case, reason=reason, release=release)
    if release:
        _proposed(case, number)
    return 0


@command.command("mute")
@click.option("--run", help="A run, by its id.")
@click.option("--path", help="A file, as findings write it, without a line number.")
@_reason
@click.option("--until", metavar="DATE", help="Last day (2026-12-31, UTC) or time from now (30d).")
@click.option("--end", "ends", is_flag=True, help="Propose to end a mute instead.")
@click.argument("case")
def mute_command(run: str | None, path: str | None, reason: str, until: str | None, ends: bool, case: str) -> int:
    """Propose to keep ordinary lists quiet.

    They say "under maintenance check" of a run or a file, never that it is well.
    Only machines that name both who sign among their approvers follow it.
    """
    if (run is None) == (path is None):
        raise Misuse("case mute: expected --run or --path, one of them")
    if (until is None) != ends:
        raise Misuse("case mute: expected --until or --end, one of them")
    desk, end = _desk(), parse_until(until) if until is not None else None
    if run is not None:
        _proposed(case, desk.mute(case, "run", run, until=end, reason=reason))
    elif path is not None:
        _proposed(case, desk.mute(case, "path", path, until=end, reason=reason))
    return 0


@command.command("waive")
@click.option("--runs", help="Name of the runs, with * and ?.")
@click.option("--reason", help="Why; it will be read in every verdict on such a run.")
@click.option("--until", metavar="DATE", help="Last day (2026-12-31, UTC) or time from now (30d).")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Write the waiver with your signature here.")
@click.option(
    "--sign", "given", type=click.Path(path_type=Path), help="Sign this one, as the second person, and log it."
)
def waive_command(
    runs: str | None, reason: str | None, until: str | None, output: Path | None, given: Path | None
) -> int:
    """Let runs off, openly.

    Two people, an end, and no such run is ever VERIFIED.
    The first writes it with --runs, --reason, --until and -o; the second logs it with --sign.
    """
    from trainguard.waiver import propose

    mine = _identity()
    if mine is None:
        raise _nobody()
    if given is not None and runs is None and output is None:
        return _waived(given, mine)
    if given is not None or runs is None or reason is None or until is None or output is None:
        raise Misuse("case waive: expected --runs, --reason, --until and -o together, or --sign alone")
    from trainguard.digest import write_durably

    data = propose(
        runs, since=int(time.time()), until=parse_until(until), reason=reason, name=mine.card.name, key=mine.signing
    )
    write_durably(output, data)
    _told(f"{output}: one signature", f"trainguard case waive --sign {output}", "by a second person")
    return 0


def _waived(given: Path, mine: Identity) -> int:
    """Sign a waiver as the second person and put it into the log."""
    from trainguard.envelope import load_or_create_key, sign_statement, statement
    from trainguard.log import Log
    from trainguard.veil import approver_keys
    from trainguard.waiver import LIMIT_BYTES, PREDICATE, approve, parse_waiver

    try:
        with given.open("rb") as file:
            data = file.read(LIMIT_BYTES + 1)
    except OSError as error:
        raise Unavailable(f"{given}: waiver cannot be read: {error.strerror}") from error
    waiver = parse_waiver(approve(data, name=mine.card.name, key=mine.signing), where=str(given))
    both = waiver.approved(approver_keys())
    home = Home.find()
    home.prepare()
    subject = [{"name": f"runs/{waiver.runs}", "digest": {"sha256": sha256_hex(waiver.terms)}}]
    entry = sign_statement(
        statement(PREDICATE, msgspec.to_builtins(waiver), subject), load_or_create_key(home.keys / "attestation.pem")
    )
    with Log.open(home.log, home.keys / "log.key") as log:
        (leaf,) = log.append([entry])
    click.echo(
        f"leaf {leaf}: runs {waiver.runs} are let off by {both[0]} and {both[1]}; none of them is VERIFIED", err=True
    )
    return 0


@command.command("export")
@click.option("--reason", help="Propose an export, for this reason.")
@click.option("--act", type=click.IntRange(min=0), help="Make the export that two people agreed to.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Write the bundle here.")
@click.argument("case")
def export_command(reason: str | None, act: int | None, output: Path | None, case: str) -> int:
    """Write the case as one zip.

    Its record with signatures and proofs, incidents with their evidence. Two people agree first.
    """
    desk = _desk()
    if reason is not None and act is None and output is None:
        _proposed(case, desk.propose_export(case, reason=reason))
        return 0
    if act is None or output is None or reason is not None:
        raise Misuse("case export: expected --reason to propose it, or --act and -o to make it")
    from trainguard.cases.export import make_bundle
    from trainguard.digest import write_durably

    home = Home.find()
    data = desk.exported(case, act, lambda view: make_bundle(home, view))
    write_durably(output, data)
    click.echo(f"{output}: {len(data):,} bytes; check it with: trainguard case verify {output}", err=True)
    return 0


@command.command("verify")
@_json
@click.argument("bundle", type=click.Path(path_type=Path))
def verify_command(as_json: bool, bundle: Path) -> int:
    """Check an exported case.

    Digests, signatures, two people, proofs. Exit status: 0 holds, 1 does not.
    """
    from trainguard.cases.export import read_bundle, verify_bundle

    checked = verify_bundle(read_bundle(bundle))
    if as_json:
        _print(checked)
    else:
        from trainguard.render.case import checked_lines

        click.echo("\n".join(checked_lines(checked)))
    return 0


@command.command("purge")
@_reason
@click.argument("case")
def purge_command(reason: str, case: str) -> int:
    """Propose to delete the contents of a closed case.

    Its record stays. Never in legal hold.
    """
    _proposed(case, _desk().propose_purge(case, reason=reason))
    return 0


# -- parts -------------------------------------------------------------------------------------------------------------


def parse_until(text: str, *, now: Callable[[], float] = time.time) -> int:
    """Seconds since the epoch at the end of a day (`2026-12-31`, UTC) or after some days (`30d`). Raises Misuse."""
    days = DAYS.fullmatch(text)
    if days is not None:
        return int(now()) + int(days[1]) * 86400
    try:
        moment = datetime.datetime.strptime(text, "%Y-%m-%d").replace(tzinfo=datetime.UTC)
    except ValueError:
        raise Misuse(f"--until: expected a date such as 2026-12-31, or 30d, found {text[:40]!r}") from None
    return int(moment.timestamp()) + 86400


def _account() -> str:
    import pwd

    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return f"uid {os.getuid()}"


def _identity() -> Identity | None:
    """The caller's identity; None where they have none. A passphrase is asked for on a terminal."""
    from trainguard.cases.identity import identity_path, load_identity

    path = identity_path()
    if not os.path.lexists(path):
        return None
    secret = os.environ.get("TRAINGUARD_PASSPHRASE")
    try:
        return load_identity(path, passphrase=secret.encode() if secret else None)
    except Misuse as error:
        if "needs its passphrase" not in str(error) or not sys.stdin.isatty():
            raise
    return load_identity(path, passphrase=click.prompt("Passphrase", hide_input=True, err=True).encode())


def _nobody() -> TrainguardError:
    return Unavailable("there is no identity here", next_step="make one with: trainguard case identity --name NAME")


def _desk() -> Desk:
    from trainguard.cases.desk import Desk
    from trainguard.cases.people import process_accounts

    return Desk(Home.find(), _identity(), also=process_accounts(), approvers=_approvers())


def _approvers() -> Sequence[Card]:
    from trainguard.cases.identity import read_approvers

    return read_approvers()


def _incidents(names: Sequence[str]) -> list[Incident]:
    from trainguard.incident.correlate import find, incidents

    mine = _identity()
    lifted = mine is not None and mine.key in {card.key for card in _approvers()}
    known = incidents(Home.find(), lifted=lifted)
    return [find(known, name) for name in dict.fromkeys(names)]


def _taken(names: Sequence[str], bundles: Sequence[Path]) -> tuple[list[Incident], list[Subject]]:
    """The incidents of this state folder and of bundles from another, with everyone they name."""
    from trainguard.cases.people import read_bundle, subjects_of

    if not names and not bundles:
        raise Misuse("case: expected an incident, or --bundle FILE", next_step="trainguard incident list")
    taken = _incidents(names) if names else []
    subjects = list(subjects_of(Home.find(), taken)) if taken else []
    for path in bundles:
        try:
            if path.stat().st_size > BUNDLE_LIMIT_BYTES:
                raise Misuse(f"{path}: more than {BUNDLE_LIMIT_BYTES} bytes, the limit")
            incident, named = read_bundle(path.read_bytes())
        except OSError as error:
            raise Unavailable(f"{path}: bundle cannot be read: {error.strerror}") from error
        taken.append(incident)
        subjects += [one for one in named if one.name not in {known.name for known in subjects if known.firm}]
    return taken, subjects


def _make_log() -> None:
    """A log for a state folder that is kept for cases alone."""
    from trainguard.envelope import load_or_create_key
    from trainguard.log import Log

    home = Home.find()
    home.prepare()
    load_or_create_key(home.keys / "attestation.pem")
    Log.open(home.log, home.keys / "log.key").close()


def _member_card(text: str) -> tuple[Card, Any]:
    from trainguard.cases.identity import read_card
    from trainguard.cases.records import ROLES

    name, _, role = text.rpartition(":")
    if name and role in ROLES:
        return read_card(Path(name)), role
    return read_card(Path(text)), "investigator"


def _ask(desk: Desk, case: str, act: int) -> None:
    """Show what is to be signed, and ask."""
    from trainguard.render.case import case_view

    view = desk.show(case, what=f"act {act} before signing")
    if act not in view.state.pending:
        return  # signing says so, and writes it down
    if not sys.stdin.isatty():
        raise Misuse("case sign: expected --yes where there is no terminal to ask on")
    _show(lambda: case_view(view))
    if not click.confirm(f"Sign act {act}?", err=True):
        raise click.Abort


def _proposed(case: str, act: int) -> None:
    _told(f"case {case}: act {act} proposed", f"trainguard case sign {case} {act}", "by a second lead")


def _told(what: str, line: str, who: str) -> None:
    click.echo(f"{what}\n  next: {line}   ({who})", err=True)


def _print(value: object) -> None:
    sys.stdout.buffer.write(msgspec.json.encode(value) + b"\n")


def _show(view: Callable[[], Any]) -> None:
    from trainguard.cli._view import show

    show(lambda ascii_only: view())
