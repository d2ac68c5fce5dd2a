"""PDFBox Preflight reads our PDF/A-3b documents: what it holds against them is what PDF/A-1b alone forbids.

`tools/readers.sh .venv-tools` gets it where java is; TRAINGUARD_PREFLIGHT names another folder of jars. No validator of
PDF/A-3b was to be had. Preflight knows PDF/A-1b (ISO 19005-1), which is stricter wherever the two overlap: it reads
syntax, fonts and their widths, colour, output intent, metadata, annotations and actions.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.unit.render.test_documents import DRAWN, made, pages

from trainguard.render.documents import pdf_of

pytestmark = pytest.mark.tool

JARS = Path(__file__).parents[2] / ".venv-tools" / "preflight"
ONLY_IN_1B = {
    "1.4": "cross-reference streams (ISO 19005-1, 6.1.4; allowed by 19005-3, 6.1.4)",
    "1.2.7": "a filter of the metadata stream (ISO 19005-1, 6.7.2; allowed by 19005-3, 6.6.2)",
    "3.1.11": "a subset of a CID font without CIDSet (ISO 19005-1, 6.3.5; not asked for by 19005-3, 6.2.11.4)",
}
"""Preflight's number of an error → what it is, and why it is none in PDF/A-3."""

Errors = dict[str, list[str]]


@pytest.fixture(scope="module")
def held_against() -> Callable[[bytes, Path], Errors]:
    """Errors that Preflight finds in a PDF, by their number; skips where there is none."""
    java, jars = shutil.which("java"), Path(os.environ.get("TRAINGUARD_PREFLIGHT") or JARS)
    if java is None or not (jars / "preflight.jar").exists():
        pytest.skip("PDFBox Preflight is not here (java, then tools/readers.sh .venv-tools)")
    pytest.importorskip("weasyprint")

    def read(pdf: bytes, folder: Path) -> Errors:
        (folder / "x.pdf").write_bytes(pdf)
        words = [java, "-cp", f"{jars}/*", "org.apache.pdfbox.preflight.Validator_A1b", str(folder / "x.pdf")]
        done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
        assert "valid PDF/A-1b" in done.stdout, done.stderr
        found: Errors = {}
        for line in done.stdout.splitlines():
            number, colon, text = line.partition(" : ")
            if colon and number.replace(".", "").isdigit():
                found.setdefault(number, []).append(text)
        return found

    return read


@pytest.mark.parametrize("name", ["plain", pytest.param("damage", marks=pytest.mark.nightly)])
def test_preflight_holds_against_a_document_only_what_pdfa_3_allows(
    held_against: Callable[[bytes, Path], Errors], name: str, tmp_path: Path
) -> None:
    page = DRAWN[name](made(3)) if name in DRAWN else pages(name)
    found = held_against(pdf_of(page, identity=name), tmp_path)
    assert set(found) == set(ONLY_IN_1B), found
    assert all("CIDSet" in text for text in found["3.1.11"])


@pytest.mark.nightly
def test_preflight_sees_what_a_document_lacks_that_is_no_pdfa(
    held_against: Callable[[bytes, Path], Errors], tmp_path: Path
) -> None:
    """So that its silence on ours means something."""
    import weasyprint

    document: Any = weasyprint.HTML(string="<p>x <a href='https://example.org'>y</a></p>")
    assert set(held_against(document.write_pdf(), tmp_path)) - set(ONLY_IN_1B)
