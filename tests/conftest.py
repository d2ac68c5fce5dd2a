"""What every test leaves behind as it found it."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile("trainguard", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("trainguard")
"""No test is timed: a busy machine draws slowly."""


@pytest.fixture(autouse=True)
def _nothing_compiled() -> Iterator[None]:
    """Links are blind in a process in which torch compiled something, and its counters outlive a test."""
    yield
    compiled = sys.modules.get("torch._dynamo.utils")
    if compiled is not None:
        compiled.counters.clear()


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """Give long texts and bytes no id of their own: what is signed anew in each process would differ by worker."""
    return argname if isinstance(val, str | bytes) and len(val) > 60 else None


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep tests that share what is made once for their file on one worker (`--dist loadgroup`): it is a whole run."""
    for item in items:
        shared = getattr(item, "_fixtureinfo", None)
        made = shared.name2fixturedefs.values() if shared is not None else ()
        if any(definitions[-1].scope in ("module", "class") for definitions in made):
            item.add_marker(pytest.mark.xdist_group(item.nodeid.split("::", 1)[0]))
