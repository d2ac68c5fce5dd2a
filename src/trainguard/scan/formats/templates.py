"""Chat templates: Jinja programs that travel in configs and GGUF files and run at every prompt.

transformers renders them in a sandbox, other runtimes have not (CVE-2024-34359). No ordinary template reaches for an
underscore attribute, another template, or the names Jinja's escapes begin from; one that does is refused. What the text
does not show, the syntax tree does (template_keys.py).
"""

from __future__ import annotations

import re

from trainguard.scan.formats.template_keys import made_key

BLOCK = re.compile(r"\{\{(.*?)\}\}|\{%(.*?)%\}", re.DOTALL)
STRING = re.compile(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"", re.DOTALL)
TEMPLATE_BYTES = 1 << 20
RULES = (
    (re.compile(r"\.\s*_"), "reaches for an underscore attribute"),
    (re.compile(r"\|\s*attr\b"), "uses the attr filter"),
    (re.compile(r"\b(?:lipsum|cycler|joiner|self|request|__\w+|eval|exec|open|globals|getattr|popen)\b"), "names {}"),
    (re.compile(r"^[-+]?\s*(?:include|import|from|extends)\b"), "loads another template"),
)
BY_ATTRIBUTE = re.compile(r"\|\s*(?:map|selectattr|rejectattr|groupby|sum|sort|unique|min|max)\s*\(")
"""Filters that look an attribute up by text."""
MAPPED_ATTR = re.compile(r"\|\s*map\s*\(\s*(?:'attr'|\"attr\")")
BARE = r"(?:'_+'|\"_+\")"
MADE = re.compile(
    rf"{BARE}\s*(?:[~+*]|\|\s*join)|[~+]\s*{BARE}|,\s*{BARE}\s*\)|=\s*{BARE}|\[\s*{BARE}\s*,|,\s*{BARE}\s*\]|%c"
)
"""An underscore about to be put together with other text."""
COMPUTED = re.compile(r"\w\s*\[\s*(?![-\d:\]]|'[^']*'\s*\]|\"[^\"]*\"\s*\])")
"""A subscript that is neither a number, a slice nor one plain text."""
DUNDER = re.compile(r"__[A-Za-z]\w*__")
FORMATTED = re.compile(r"\{[^{}]{0,200}[.\[]\s*_")
"""A replacement field of str.format that reaches for an underscore name."""
DUNDER_TEXT = re.compile(r"__[a-z]+|\\x5f|\\137|\\u005f|_\s*'\s*[~+]|_\s*\"\s*[~+]", re.IGNORECASE)


def names_dunder(text: str) -> bool:
    """Whether an expression or statement in `text` holds a `__dunder__` name."""
    return any(DUNDER.search(match[0]) for match in BLOCK.finditer(text))


def problem(template: str) -> str | None:
    """Why this template is refused, or None."""
    if len(template) > TEMPLATE_BYTES:
        return f"template of {len(template)} characters, limit {TEMPLATE_BYTES}"
    for match in BLOCK.finditer(template):
        block = match[1] or match[2] or ""
        bare = STRING.sub(" '' ", block).strip()
        for rule, why in RULES:
            found = rule.search(bare)
            if found:
                return why.format(found[0].strip())
        if any(FORMATTED.search(text[0]) for text in STRING.finditer(block)):
            return "formats an underscore attribute"
        if MAPPED_ATTR.search(block):
            return "uses the attr filter"
        if ("[" in bare or BY_ATTRIBUTE.search(bare)) and any(
            DUNDER_TEXT.search(text[0]) for text in STRING.finditer(block)
        ):
            return "looks an underscore attribute up by text"
    if any(MADE.search(match[0]) for match in BLOCK.finditer(template)) and any(
        COMPUTED.search(match[0]) for match in BLOCK.finditer(template)
    ):
        return "puts an underscore name together and looks something up by text it made"
    return made_key(template) if "[" in template or "|" in template else None
