"""A small virtual environment with packages of our own making, for drills and tests of what measures environments.

    place = InstalledEnvironment(tmp_path)
    place.install("tinyoptim", "1.0", {"tinyoptim/__init__.py": "RATE = 0.1\\n"})
    place.run("train.py")                     # with the job's own folder as working folder
    place.edit("tinyoptim/__init__.py", "RATE = 0.2\\n")
    place.record_agrees()                     # what a check of RECORD alone would say

No package index, no pip and no `venv` take part: a link to this Python, a pyvenv.cfg and a site folder are all that
PEP 405 asks for, and RECORD is written as PEP 376 and PEP 627 say.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path


class InstalledEnvironment:
    """`root/env` is the environment, `root/job` the folder of the job."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.job = root / "job"
        self.home = root / "home"
        self.prefix = root / "env"
        self.python = self.prefix / "bin" / "python"
        base = Path(getattr(sys, "_base_executable", sys.executable))
        self.site = self.prefix / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"
        for folder in (self.job, self.home, self.site, self.prefix / "bin"):
            folder.mkdir(parents=True, exist_ok=True)
        self.python.symlink_to(base)
        (self.prefix / "pyvenv.cfg").write_text(f"home = {base.parent}\ninclude-system-site-packages = false\n")

    @property
    def environment(self) -> dict[str, str]:
        """The variables of a job in this environment: nothing of ours."""
        return {"PATH": f"{self.prefix / 'bin'}:/usr/bin:/bin", "HOME": str(self.home), "LC_ALL": "C.UTF-8"}

    def install(
        self,
        name: str,
        version: str,
        files: Mapping[str, str],
        *,
        entry_points: str = "",
        scripts: Mapping[str, str] | None = None,
    ) -> None:
        """Install a package as an installer would. files: path below the site folder → text. scripts: console
        scripts, name → text after the `#!` line. An older version of the same package is taken away first."""
        self.uninstall(name)
        info = f"{name.replace('-', '_')}-{version}.dist-info"
        texts = dict(files)
        texts[f"{info}/METADATA"] = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n\nA package.\n"
        texts[f"{info}/WHEEL"] = "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        texts[f"{info}/INSTALLER"] = "pip\n"
        if entry_points:
            texts[f"{info}/entry_points.txt"] = entry_points
        for script, text in (scripts or {}).items():
            texts[f"../../../bin/{script}"] = f"#!{self.python}\n{text}"
        for path, text in texts.items():
            place = Path(os.path.normpath(self.site / path))
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text(text)
            if path.startswith("../"):
                place.chmod(0o755)
        self._write_record(info, sorted(texts))

    def uninstall(self, name: str) -> None:
        """Remove every file RECORD lists for `name`, and its bytecode."""
        for info in self.site.glob(f"{name.replace('-', '_')}-*.dist-info"):
            for path, _, _ in self._rows(info.name):
                Path(os.path.normpath(self.site / path)).unlink(missing_ok=True)
            info.rmdir()

    def edit(self, path: str, text: str, *, keep_times: bool = False) -> None:
        """Replace one installed file; with keep_times its mtime is put back, as an intruder would."""
        place = self.site / path
        before = place.stat()
        place.write_text(text)
        if keep_times:
            os.utime(place, ns=(before.st_atime_ns, before.st_mtime_ns))

    def rewrite_records(self) -> None:
        """Recompute every RECORD from what lies there now, as an intruder would."""
        for info in self.site.glob("*.dist-info"):
            self._write_record(
                info.name, [path for path, _, _ in self._rows(info.name) if not path.endswith("/RECORD")]
            )

    def record_agrees(self) -> bool:
        """Whether every hash in every RECORD is that of its file: the naive control."""
        for info in self.site.glob("*.dist-info"):
            for path, digest, _ in self._rows(info.name):
                if digest and digest != _record_hash((self.site / path).read_bytes()):
                    return False
        return True

    def source_hashes(self) -> dict[str, str]:
        """SHA-256 of every installed and every own `.py`: another naive control."""
        sources = sorted([*self.site.rglob("*.py"), *self.job.rglob("*.py")])
        return {str(path.relative_to(self.root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in sources}

    def run(self, *arguments: str, variables: Mapping[str, str] | None = None, python: Path | None = None) -> str:
        """Standard output of `python <arguments>` in the job's folder. Raises CalledProcessError when it fails."""
        done = subprocess.run(
            [str(python or self.python), *arguments],
            cwd=self.job,
            env=self.environment | dict(variables or {}),
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        return done.stdout

    def _rows(self, info: str) -> list[list[str]]:
        text = (self.site / info / "RECORD").read_text()
        return [row for row in csv.reader(io.StringIO(text)) if row]

    def _write_record(self, info: str, paths: list[str]) -> None:
        output = io.StringIO()
        writer = csv.writer(output, lineterminator="\n")
        for path in paths:
            data = Path(os.path.normpath(self.site / path)).read_bytes()
            writer.writerow([path, _record_hash(data), len(data)])
        writer.writerow([f"{info}/RECORD", "", ""])
        (self.site / info / "RECORD").write_text(output.getvalue())


def _record_hash(data: bytes) -> str:
    return "sha256=" + base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
