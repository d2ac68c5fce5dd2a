"""Write a document as HTML, as PDF, or both: shared by the verbs that hand documents on."""

from __future__ import annotations

from pathlib import Path

from trainguard.errors import Misuse


def write_document(page: str, html_path: Path | None, pdf_path: Path | None, *, identity: str, verb: str) -> None:
    """Write `page` where it is wanted. Raises Misuse where it is wanted nowhere, Unavailable where it cannot be."""
    from trainguard.render.documents import write_pdf
    from trainguard.render.html import write_page

    if html_path is None and pdf_path is None:
        raise Misuse(f"{verb}: expected --html FILE or --pdf FILE")
    if html_path is not None:
        write_page(html_path, page)
    if pdf_path is not None:
        write_pdf(pdf_path, page, identity=identity)
