"""What links share that put hooks of ours on tensors or modules for one step and take them off again."""

from __future__ import annotations

from typing import Any, Dict, List


class Hooks:
    """Hooks that were put in place for one step of one optimizer."""

    def __init__(self) -> None:
        self.handles: List[Any] = []

    def remove(self) -> None:
        """Take the hooks off again."""
        for handle in self.handles:
            handle.remove()
        self.handles = []


class Arms:
    """A link that arms hooks for the next checked step. At most one set of hooks an optimizer is in place."""

    def __init__(self) -> None:
        self.watches: Dict[int, Any] = {}
        """Index of the optimizer → hooks (Hooks) armed for its next step."""

    def taken_off(self, opt: int) -> Any:
        """What was armed for this optimizer, with its hooks off; None where nothing was."""
        watch = self.watches.pop(opt, None)
        if watch is not None:
            watch.remove()
        return watch

    def forget(self, opt: int) -> None:
        """The optimizer is gone."""
        self.taken_off(opt)

    def forked(self) -> None:
        """Take the parent's hooks off this child's copies of tensors and modules."""
        for watch in self.watches.values():
            watch.remove()
        self.watches = {}
