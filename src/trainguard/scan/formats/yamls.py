"""YAML beside a model: tags that name Python objects run code in `yaml.load`; hydra's `_target_` names a callable.

A tag is resolved as a YAML reader resolves it (YAML 1.2 section 6.8: handles, %TAG, verbatim tags, percent escapes)
before it is judged. Lightning writes `!!python/tuple` and, for paths and enums, `!!python/object/apply:` into its
hparams.yaml: tags of plain values are inert, and a name that the lists know as data may be made; any other is judged
like an unlisted name of a pickle. Nothing is parsed beyond tags and words: nothing can hide behind a parser's reading.
"""

from __future__ import annotations

import re
from urllib.parse import unquote

from trainguard.scan.formats.interface import Job
from trainguard.scan.values import Global

TAG = re.compile(r"!(?:<(?P<verbatim>[^>\s]*)>|(?P<handle>[\w-]*!)?(?P<suffix>[^\s,\[\]{}]*))")
DIRECTIVE = re.compile(r"^\ufeff?%TAG[ \t]+(\S+)[ \t]+(\S+)", re.MULTILINE)
CORE = "tag:yaml.org,2002:"
PYTHON = CORE + "python/"
PLAIN = frozenset(
    ("none", "bool", "str", "unicode", "bytes", "int", "long", "float", "complex", "list", "tuple", "dict")
)
HYPER = frozenset(("!new", "!name", "!apply", "!module", "!applyref"))
"""Tags of HyperPyYAML, which speech toolkits load with: what follows the colon is imported and called."""
MADE_OF_CONSTANTS = frozenset(("constants", "number", "enum", "date", "instance", "instance_called"))
"""Kinds whose names may be made from a YAML node: its values are plain, or tagged and judged themselves."""
ESCAPE = re.compile(r"\\(?:x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|\n[ \t]*)")
LOADED = re.compile(r"[\"']?\bloader_module[\"']?\s*:\s*[\"']?([\w.]+)")
"""What MLflow imports to load a model."""
FLAVOURS = ("mlflow.",)
CALLED = re.compile(r"\b(_target_|class_path)\b(?=[\"']?\s*:|[\"']?\s*\n\s*:)")


def judge(job: Job) -> None:
    """Judge the text of a YAML file."""
    if job.source.size > job.policy.json_bytes:
        job.unknown("config", f"{job.source.size} bytes of YAML, limit {job.policy.json_bytes}")
        return
    text = job.source.read(0, job.source.size).decode("utf-8", "replace")
    handles = {"!": "!", "!!": CORE} | {handle: unquote(prefix) for handle, prefix in DIRECTIVE.findall(text)}
    for match in TAG.finditer(text):
        _tag(job, _resolve(match, handles), match.start())
    plain = ESCAPE.sub(_unescape, text)
    for found in LOADED.finditer(plain):
        if not found[1].startswith(FLAVOURS):
            job.unlisted(Global(found[1][:1000], None), "call", found.start())
    for found in CALLED.finditer(plain):
        job.unknown("config", f"{found[1]}: names something to be called", found.start())
        return


def _unescape(match: re.Match[str]) -> str:
    digits = match[1] or match[2] or match[3]
    return chr(min(int(digits, 16), 0x10FFFF)) if digits else ""


def _resolve(match: re.Match[str], handles: dict[str, str]) -> str:
    """The tag in full; a handle nobody declared is an error to every reader, and gives its suffix."""
    if match["verbatim"] is not None:
        return unquote(match["verbatim"])
    return handles.get("!" + (match["handle"] or ""), "") + unquote(match["suffix"])


def _tag(job: Job, tag: str, offset: int) -> None:
    verb, _, hyper = tag.partition(":")
    if verb in HYPER and hyper:
        job.unlisted(Global(hyper[:1000], None), "value" if verb in ("!name", "!module") else "call", offset)
    if not tag.startswith(PYTHON):
        return
    kind, _, name = tag.removeprefix(PYTHON).partition(":")
    if not name and kind in PLAIN:
        return
    listed = job.trust.find(name)
    if listed is not None and (kind == "name" or listed.kind in MADE_OF_CONSTANTS or listed.tier == "user"):
        return
    if listed is not None:
        job.unsafe("config", f"!!python/{kind} tag: {name[:120]} may be named but not made by a YAML file", offset)
    elif name:
        job.unlisted(Global(name[:1000], None), "value" if kind in ("name", "module") else "call", offset)
    else:
        job.unsafe("config", f"!!python/{kind[:40]} tag: yaml.load would make any Python object", offset)
