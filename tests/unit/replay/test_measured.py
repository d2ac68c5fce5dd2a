"""Files with a new time: those that are what was measured when the run began spoil no audit."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from trainguard.lockfile import Distribution, Tree
from trainguard.replay.measured import NEWER_KEPT, really_newer


def told(path: Path) -> str:
    data = path.read_bytes()
    return f"{hashlib.sha256(data).hexdigest()} {len(data)}"


def measured(site: Path, **files: str) -> Any:
    """As much of a measurement as is looked at."""
    package = Distribution(name="torch", version="2", tree="site-packages", files=files)
    tree = Tree(name="site-packages", root=str(site), files={"own.py": told(site / "own.py")})
    return SimpleNamespace(trees={"site-packages": tree}, distributions={"torch": package})


def test_another_name_for_a_file_is_no_change_of_it(tmp_path: Path) -> None:
    """Its change time is new, its content is what the log has since before step 0; an edit of equal size is seen."""
    paths = [tmp_path / name for name in ("own.py", "a.py", "b.py", "c.py")]
    for path in paths:
        path.write_text("x = 1\n")
    known = measured(tmp_path, **{"a.py": told(paths[1]), "b.py": told(paths[2])})
    for path in paths:
        os.link(path, tmp_path / f"{path.name}.linked")
    paths[2].write_text("x = 2\n")
    names = [str(path) for path in paths]
    assert really_newer(names, known) == [names[2], names[3]]  # one altered, one that nobody measured
    assert really_newer(names, None) == names
    assert really_newer([*names, "/nowhere"], known)[-1] == "/nowhere"


def test_where_too_many_are_newer_none_is_believed(tmp_path: Path) -> None:
    """More may have been left untold."""
    (tmp_path / "own.py").write_text("x = 1\n")
    many = [str(tmp_path / "own.py"), *(f"/n/{number}" for number in range(NEWER_KEPT - 1))]
    assert really_newer(many, measured(tmp_path)) == many
