"""The marks of PDF/A-3b (ISO 19005-3) that can be read off a file: what a validator asks first, and no validator.

    against(data) == []

Checked: header and binary comment (6.1.2), no encryption and a file identifier (6.1.3), no LZW and no external streams
(6.1.7), one GTS_PDFA1 output intent with an ICC profile (6.2.3), device colours that it covers (6.2.4), every font
embedded (6.2.11.4), no scripts, launches or forms (6.4, 6.5), metadata that claim 3B (6.6), nothing after the end.
Not checked: glyph widths, the profile's own validity, XMP schemas, rendering of annotations.
"""

from __future__ import annotations

import io
import re
from typing import Any


def against(data: bytes) -> list[str]:
    """What speaks against it; empty where every mark is there."""
    import pypdf

    said = []
    if not re.match(rb"%PDF-1\.[2-7]\r?\n%[\x80-\xff]{4}", data):
        said.append("no header with a binary comment")
    if not re.search(rb"%%EOF\s*$", data):
        said.append("something follows the end")
    reader = pypdf.PdfReader(io.BytesIO(data))
    root = reader.trailer["/Root"]
    said += ["encrypted"] if reader.is_encrypted else []
    said += [] if "/ID" in reader.trailer else ["no file identifier"]
    said += _intent(root)
    metadata = root.get("/Metadata")
    text = metadata.get_object().get_data().decode("utf-8", "replace") if metadata is not None else ""
    claims = [re.search(rf"pdfaid:{name}[>=\"\']+([0-9A-Z])", text) for name in ("part", "conformance")]
    if [found.group(1) if found else None for found in claims] != ["3", "B"]:
        said.append("the metadata do not say PDF/A-3B")
    for name in ("/AA", "/AcroForm", "/NeedsRendering"):
        said += [f"the catalogue has {name}"] if name in root else []
    for number in range(1, len(reader.xref_objStm) + sum(len(one) for one in reader.xref.values()) + 1):
        said += _object(_resolved(reader, number))
    return list(dict.fromkeys(said))


def _resolved(reader: Any, number: int) -> Any:
    import pypdf.generic

    try:
        return reader.get_object(pypdf.generic.IndirectObject(number, 0, reader))
    except Exception:
        return None


def _intent(root: Any) -> list[str]:
    intents = [one.get_object() for one in root.get("/OutputIntents", [])]
    ours = [one for one in intents if one.get("/S") == "/GTS_PDFA1"]
    if len(ours) != 1:
        return ["no PDF/A output intent"]
    profile = ours[0].get("/DestOutputProfile")
    if profile is None or profile.get_object().get_data()[36:40] != b"acsp":
        return ["the output intent has no ICC profile"]
    return [] if profile.get_object().get("/N") == 3 else ["the output intent is not one of RGB"]


def _object(value: Any) -> list[str]:
    if not isinstance(value, dict):
        return []
    said = []
    filters = value.get("/Filter")
    if "/LZWDecode" in (filters if isinstance(filters, list) else [filters]):
        said.append("LZW")
    if hasattr(value, "get_data") and "/F" in value:
        said.append("a stream outside the file")
    if value.get("/S") in ("/JavaScript", "/Launch", "/ImportData", "/Movie", "/Sound"):
        said.append(f"an action {value['/S']}")
    if value.get("/Type") == "/FontDescriptor" and not {"/FontFile", "/FontFile2", "/FontFile3"} & set(value):
        said.append(f"font {value.get('/FontName')} is not embedded")
    if value.get("/Type") == "/Font" and value.get("/Subtype") == "/Type1" and "/FontDescriptor" not in value:
        said.append(f"font {value.get('/BaseFont')} is not embedded")
    if value.get("/ColorSpace") == "/DeviceCMYK":
        said.append("a colour that the output intent does not cover")
    if value.get("/Type") == "/Filespec" and "/AFRelationship" not in value:
        said.append("an attachment without its relation")
    return said
