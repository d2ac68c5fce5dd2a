"""Load forged files with the loaders they were made for, each in a process of its own, and report nothing.

    python detonate.py < lines of "loader<TAB>path"

Every payload only creates a marker; whoever called looks for it afterwards. The process imports the libraries once and
forks for each file, so 150 files take seconds.
"""

from __future__ import annotations

import importlib.util
import io
import os
import pickle
import sys
import warnings

import joblib
import numpy
import torch


def load(loader: str, path: str) -> None:
    """Open `path` as a victim would."""
    if loader == "pickle":
        with open(path, "rb") as file:
            pickle.load(file)
    elif loader == "pickle-all":
        with open(path, "rb") as file:
            while file.read(1):
                file.seek(-1, 1)
                pickle.load(file)
    elif loader == "torch":
        torch.load(path, weights_only=False)
    elif loader == "torch-first":
        with open(path, "rb") as file:
            data = file.read()
        torch.load(io.BytesIO(data[: data.index(b"PK\5\6") + 22]), weights_only=False)
    elif loader == "joblib":
        joblib.load(path)
    elif loader == "numpy":
        numpy.load(path, allow_pickle=True)
    elif loader == "npz":
        list(numpy.load(path, allow_pickle=True).values())
    elif loader == "yaml":
        import yaml

        with open(path) as file:
            yaml.unsafe_load(file)
    elif loader == "jinja":
        import jinja2

        with open(path) as file:
            jinja2.Template(file.read()).render()
    elif loader == "import":
        spec = importlib.util.spec_from_file_location("beside", path)
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


def main() -> None:
    """One forked child per line."""
    warnings.simplefilter("ignore")
    for line in sys.stdin.read().splitlines():
        loader, path = line.split("\t")
        child = os.fork()
        if not child:
            silent = os.open(os.devnull, os.O_RDWR)
            for descriptor in (0, 1, 2):
                os.dup2(silent, descriptor)
            try:
                load(loader, path)
            except BaseException:
                os._exit(1)
            os._exit(0)
        os.waitpid(child, 0)


if __name__ == "__main__":
    main()
