"""The meter of one file: what it has spent of its policy. One per file, shared by everything nested in it."""

from __future__ import annotations

import time

from trainguard.scan.limits import ScanPolicy


class OverBudget(Exception):
    """A limit of the policy was reached; the message names it with limit and actual."""


class Meter:
    """Counts operations, unfolded bytes and seconds of one file against its policy."""

    def __init__(self, policy: ScanPolicy) -> None:
        self.policy = policy
        self.operations = 0
        self.values = 0
        self.inflated = 0
        self._deadline = time.process_time() + policy.seconds

    def probe(self) -> Meter:
        """A meter for a look that decides nothing yet: its own counts, the same seconds."""
        other = Meter(self.policy)
        other._deadline = self._deadline
        return other

    def spend_operations(self, count: int, values: int) -> None:
        """Add `count` pickle opcodes and `values` containers; raises OverBudget past either limit or past the time."""
        self.operations += count
        self.values += values
        if self.operations > self.policy.operations:
            raise OverBudget(f"more than {self.policy.operations} pickle opcodes")
        if self.values > self.policy.values:
            raise OverBudget(f"more than {self.policy.values} values in one pickle machine")
        self.check_time()

    def spend_inflated(self, count: int) -> None:
        """Add `count` unfolded bytes; raises OverBudget past the limit."""
        self.inflated += count
        if self.inflated > self.policy.inflate_bytes:
            raise OverBudget(f"unfolds to more than {self.policy.inflate_bytes} bytes")
        self.check_time()

    def check_time(self) -> None:
        """Raises OverBudget once the file's CPU seconds are used up."""
        if time.process_time() > self._deadline:
            raise OverBudget(f"more than {self.policy.seconds:g} CPU seconds")

    def check_depth(self, depth: int) -> None:
        """Raises OverBudget when containers are nested deeper than the policy allows."""
        if depth > self.policy.depth:
            raise OverBudget(f"containers nested more than {self.policy.depth} deep")

    def check_members(self, count: int) -> None:
        """Raises OverBudget for an archive with more members than the policy allows."""
        if count > self.policy.members:
            raise OverBudget(f"{count} members in one archive, limit {self.policy.members}")
