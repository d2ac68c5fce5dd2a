"""Puts the example that `trainguard demo` trains into the wheel; everything else is in pyproject.toml.

The script has one home, examples/charlm/train.py: a source tree runs it from there, a wheel carries a copy.
"""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

EXAMPLE = Path(__file__).parent / "examples" / "charlm" / "train.py"


class BuildWithExample(build_py):
    def run(self):
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib) / "trainguard" / "testing" / "charlm" / "train.py"
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(EXAMPLE, target)


setup(cmdclass={"build_py": BuildWithExample})
