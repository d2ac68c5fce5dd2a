"""Text: JSON goes to hf.py, YAML to yamls.py, LightGBM's models to lightgbm.py; templates are looked at.

Source is code that a loader may import, by its name. Prose is inert.
"""

from __future__ import annotations

import codecs
import re

from trainguard.scan.formats import hf, jsons, lightgbm, templates, yamls
from trainguard.scan.formats.interface import Job
from trainguard.scan.rules.plain import leads_out
from trainguard.scan.source import Source

STEP_BYTES = 1 << 20
CONTROLS = bytes(set(range(32)) - {7, 8, 9, 10, 12, 13, 27}) + b"\x7f"
"""Bytes no text has. Logs have bells, backspaces and escape sequences: reports escape what they print of them."""
IMPORTED = (".py", ".pth", ".pyw", ".pyi", ".start")
"""Names that make the import system or the start of an interpreter read a text file."""
SCRIPTS = (
    ".sh",
    ".bash",
    ".zsh",
    ".fish",
    ".bat",
    ".cmd",
    ".ps1",
    ".vbs",
    ".pl",
    ".rb",
    ".lua",
    ".js",
    ".mjs",
    ".r",
    ".jl",
)
SOURCES = (".c", ".cc", ".cpp", ".cu", ".cuh", ".pyx", ".ipy")
RUN = SCRIPTS + SOURCES
"""Names of scripts, and of sources that extensions are built from as they are imported."""
RUN_NAMES = frozenset(("makefile", "dockerfile", ".bashrc", ".profile", ".bash_profile", ".zshrc", ".envrc"))
TEMPLATES = (".jinja", ".jinja2", ".j2")
TEMPLATE_NAME = re.compile(r"template|prompt")
"""Servers take a template from a file of any name."""
POINTERS = frozenset(("latest", "latest_universal"))
"""DeepSpeed joins what they say to the folder."""
PAGES = (".md", ".rst", ".html", ".htm")
"""Read by people; nothing renders their braces."""
YAML = (".yaml", ".yml", "mlmodel")
"""MLflow's MLmodel is YAML without a suffix."""
JSON = (".json", ".jsonl", ".ndjson", ".ipynb", ".webmanifest", ".geojson")
"""Names whose readers expect JSON: text of another shape there is broken, elsewhere it is just text."""


def looks_like_text(head: bytes) -> bool:
    """Whether the first bytes are UTF-8 without control characters (a sequence cut at the end is fine)."""
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return False
    return head.translate(None, CONTROLS) == head


def is_text(source: Source) -> bool:
    """Whether everything is."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        for offset in range(0, source.size, STEP_BYTES):
            chunk = source.read(offset, STEP_BYTES)
            if len(chunk.translate(None, CONTROLS)) != len(chunk):
                return False
            decoder.decode(chunk, final=offset + STEP_BYTES >= source.size)
    except UnicodeDecodeError:
        return False
    return True


def judge(job: Job) -> tuple[str, str]:
    """Judge a text file. What is imported, run or rendered by its name is that, whatever it looks like."""
    start = job.source.read(0, 4096).removeprefix(b"\xef\xbb\xbf").lstrip()
    name = job.name.lower()
    if name.endswith(IMPORTED + RUN + TEMPLATES) or name in RUN_NAMES:
        return _prose(job)
    if lightgbm.looks_like_model(start) and not name.endswith(YAML):
        return lightgbm.judge(job)
    if start[:1] not in (b"{", b"[") or (start[:1] == b"{" and start[1:].lstrip()[:1] not in (b'"', b"}")):
        return _prose(job)
    data = job.source.read(0, job.source.size) if job.source.size <= job.policy.json_bytes else None
    if not name.endswith(YAML) and _is_lines(start, data):
        return _lines(job)
    if not name.endswith(JSON) and data is not None and not jsons.is_json(data, job.policy):
        return _prose(job)
    if name.endswith(YAML):
        yamls.judge(job)
    return hf.judge(job, data)


def _is_lines(start: bytes, data: bytes | None) -> bool:
    """JSON Lines: the first line is complete and something follows it."""
    first, newline, rest = start.partition(b"\n")
    closed = first.rstrip()[-1:] in (b"}", b"]") and first.count(b"{") == first.count(b"}")
    return bool(newline) and closed and first[:1] == b"{" and rest.lstrip()[:1] == b"{" and data is not None


def _lines(job: Job) -> tuple[str, str]:
    """JSON Lines are data; still, a line may hold a config."""
    hf.judge(job, None)
    return "jsonl", "json"


def _prose(job: Job) -> tuple[str, str]:
    name = job.name.lower()
    if name.endswith(IMPORTED):
        job.unknown("source", "Python source beside a model: a loader may import it; read it, or leave it out")
        return "python", "import"
    if name.endswith(RUN) or name in RUN_NAMES:
        job.unknown("source", "a script beside a model")
        return "script", "none"
    if name.endswith(TEMPLATES):
        why = templates.problem(job.source.read(0, templates.TEMPLATE_BYTES + 1).decode("utf-8", "replace"))
        if why:
            job.unsafe("template", why)
        return "template", "jinja"
    if name.endswith(YAML):
        yamls.judge(job)
        return "yaml", "yaml"
    if name in POINTERS and leads_out(job.source.read(0, 4096).decode("utf-8", "replace").strip()):
        job.unsafe("path", f"{name}: names a checkpoint outside the folder")
    if not name.endswith(PAGES) and job.source.size <= templates.TEMPLATE_BYTES:
        _perhaps_template(job, TEMPLATE_NAME.search(name) is not None)
    return "text", "none"


def _perhaps_template(job: Job, named: bool) -> None:
    """Text that a server could be given as a template: by its name, or because its braces hold a dunder name."""
    text = job.source.read(0, job.source.size).decode("utf-8", "replace")
    why = templates.problem(text) if named or templates.names_dunder(text) else None
    if why:
        job.unsafe("template", why)
