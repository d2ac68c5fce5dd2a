"""Ways for data to come in that no audit event tells of, and those that are known to be none.

Code that is not Python opens files by itself. Of the packages here that is known not to be training data: they read no
file by a path of their own, or only their own models and vocabularies. Every other package with native code is a reason
why an answer cannot be told (`--assume-native` takes it for granted and says so in the answer).
"""

from __future__ import annotations

OWN_FILES_ONLY = frozenset(
    {
        "_cffi_backend",
        "_yaml",
        "aiohttp",
        "blake3",
        "charset_normalizer",
        "contourpy",
        "cryptography",
        "frozenlist",
        "functorch",
        "google",
        "greenlet",
        "hypothesis",
        "kiwisolver",
        "lxml",
        "lz4",
        "markupsafe",
        "matplotlib",
        "msgspec",
        "multidict",
        "numpy",
        "orjson",
        "pandas",
        "PIL",
        "propcache",
        "psutil",
        "pydantic_core",
        "regex",
        "rpds",
        "scipy",
        "sentry_sdk",
        "setproctitle",
        "simplejson",
        "sklearn",
        "tokenizers",
        "torch",
        "torchgen",
        "triton",
        "ujson",
        "wrapt",
        "xxhash",
        "yaml",
        "yarl",
        "zstandard",
    }
)

STANDARD_READERS = frozenset({"_sqlite3", "_dbm", "_gdbm"})
"""Native modules of Python itself that open data files."""

HARMLESS_PROGRAMS = frozenset(
    {
        "as",
        "c++",
        "cc",
        "clang",
        "clang++",
        "g++",
        "gcc",
        "git",
        "hostname",
        "ld",
        "ldconfig",
        "lscpu",
        "nproc",
        "nvidia-smi",
        "rocm-smi",
        "true",
        "uname",
        "which",
    }
)
"""Programs that hand no training data to whoever starts them; the answer says that it takes this for granted."""
