"""The links of a step, in causal order. A visible tuple: nothing registers itself."""

from __future__ import annotations

from typing import Any, Tuple

LINKS: Tuple[Any, ...] = ()
