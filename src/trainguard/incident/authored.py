"""What people know about an incident and no log can: read from a file, and kept apart from what was measured.

    told = read_authored(Path("inc.toml"))
    told.notice.deadline_seconds, told.event, told.action

    [notice]
    found = 2026-11-20T09:00:00Z        # when people learned of it: the clock of a report runs from here
    by = "security operations"          # roles, not names
    why = "weights of a released model were modified without approval"
    internal_only = true
    imminent_danger = false

    [[event]]                           # a line of the timeline that the log does not have
    at = 2026-11-20T09:20:00Z
    by = "on-call of team-a"
    text = "the run was stopped"

    [[went]]
    how = "well"                        # well, badly or lucky
    by = "team-a"
    text = "the resumed run was compared with a reference"

    [[action]]
    what = "approve changes of the shared environment by two people"
    owner = "platform"
    due = "2026-12-15"

The file is at most 1 MiB; a field that is not known is refused.
"""

from __future__ import annotations

import datetime
import tomllib
from pathlib import Path
from typing import Literal

import msgspec

from trainguard.errors import Misuse, Unavailable

LIMIT_BYTES = 1 << 20
DAY_SECONDS = 86_400
REPORT_SECONDS, DANGER_SECONDS = 15 * DAY_SECONDS, DAY_SECONDS
"""California SB 53: 15 days; 24 hours where there is imminent danger of death or injury. For counsel to verify."""


class _Body(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What every table shares: strictness."""


class Notice(_Body, frozen=True, kw_only=True):
    """What a report to an authority needs beside the record."""

    found: datetime.datetime
    """When people learned of it."""
    by: str = ""
    """Role of who did."""
    organisation: str = ""
    contact: str = ""
    """Role and address that questions go to."""
    why: str = ""
    """Why it has to be reported, in the words of who decided that."""
    internal_only: bool | None = None
    """Whether the models concerned were in internal use alone."""
    imminent_danger: bool = False

    @property
    def due(self) -> datetime.datetime:
        """When a report is due at the latest, UTC."""
        seconds = DANGER_SECONDS if self.imminent_danger else REPORT_SECONDS
        return self.found.astimezone(datetime.UTC) + datetime.timedelta(seconds=seconds)


class Event(_Body, frozen=True, kw_only=True):
    """A line of the timeline."""

    at: datetime.datetime
    by: str
    text: str


class Went(_Body, frozen=True, kw_only=True):
    """What went well or badly, or where luck helped."""

    how: Literal["well", "badly", "lucky"]
    text: str
    by: str = ""


class Action(_Body, frozen=True, kw_only=True):
    """What somebody took on."""

    what: str
    owner: str
    due: str = ""


class Authored(_Body, frozen=True, kw_only=True):
    """See the module."""

    notice: Notice | None = None
    event: tuple[Event, ...] = ()
    went: tuple[Went, ...] = ()
    action: tuple[Action, ...] = ()


NOTHING = Authored()


def read_authored(path: Path) -> Authored:
    """The file at `path`. Raises Unavailable or Misuse, naming the field."""
    try:
        with path.open("rb") as file:
            data = file.read(LIMIT_BYTES + 1)
    except OSError as error:
        raise Unavailable(f"{path}: notes cannot be read: {error.strerror}") from error
    if len(data) > LIMIT_BYTES:
        raise Misuse(f"{path}: expected notes of at most {LIMIT_BYTES} bytes, found more")
    try:
        told = msgspec.convert(tomllib.loads(data.decode()), Authored)
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, msgspec.ValidationError, RecursionError) as error:
        raise Misuse(f"{path}: not a notes file: {error}", next_step="docs/recover.md has an example") from None
    moments = [event.at for event in told.event] + ([told.notice.found] if told.notice is not None else [])
    if any(moment.tzinfo is None for moment in moments):
        raise Misuse(f"{path}: expected times with their zone, such as 2026-11-20T09:00:00Z")
    return told
