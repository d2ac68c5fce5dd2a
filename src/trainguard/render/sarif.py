"""Scan reports as SARIF 2.1.0 (OASIS standard), for code scanning dashboards.

One run; one rule for each rule name that occurs; one result for each reason. Levels: unsafe is error, unknown warning,
an error a note plus `invocations[0].executionSuccessful` false, so what could not be judged never reads as clean.
"""

from __future__ import annotations

import hashlib
import urllib.parse
from collections.abc import Sequence
from typing import Any

from trainguard import __version__
from trainguard.scan.verdict import FileReport, Reason, Report, Verdict

SCHEMA = "https://json.schemastore.org/sarif-2.1.0.json"
LEVELS = {Verdict.UNSAFE: "error", Verdict.UNKNOWN: "warning", Verdict.ERROR: "note", Verdict.SAFE: "none"}
RULES = {
    "archive": "An archive nobody unpacks here",
    "arguments": "Arguments a listed name does not take",
    "budget": "Over a limit of the scan",
    "build": "State written where none may be",
    "call": "A call that no rule allows",
    "code": "Machine code or bytecode",
    "compressed": "A broken or unreadable compressed stream",
    "config": "A config that names code",
    "empty": "An empty file",
    "extension": "A copyreg extension code",
    "file": "A path that could not be read",
    "folder": "A folder that could not be read whole",
    "format": "Content of no known format",
    "geometry": "A tensor that does not fit its storage",
    "global": "A name on no list",
    "hooks": "Backward hooks in a tensor",
    "instance": "A class that may not be instantiated",
    "items": "Items put where none may be",
    "key": "A dict key that hashes dangerously",
    "persistent-id": "A persistent id of an unknown shape",
    "polyglot": "Bytes that two loaders read differently",
    "second-opinion": "Two unpicklers disagree",
    "shadow": "A file that stands in for a module",
    "source": "Source code beside a model",
    "stream": "A malformed pickle stream",
    "template": "A template that reaches outside",
    "trailing": "Bytes behind the end",
    "zip": "An archive that readers read differently",
}


def sarif(reports: Sequence[Report]) -> dict[str, Any]:
    """The SARIF log of these reports, as a JSON-able dict."""
    results: list[dict[str, Any]] = []
    artifacts: list[dict[str, Any]] = []
    for report in reports:
        results += [_result(report, None, reason) for reason in report.reasons]
        for file in report.files:
            artifacts.append(_artifact(report, file))
            results += [_result(report, file, reason) for reason in file.reasons]
    used = sorted({result["ruleId"] for result in results})
    driver = {
        "name": "trainguard",
        "version": __version__,
        "semanticVersion": __version__,
        "rules": [_rule(rule.removeprefix("scan/")) for rule in used],
    }
    read = all(report.verdict is not Verdict.ERROR and not _errors(report) for report in reports)
    return {
        "$schema": SCHEMA,
        "version": "2.1.0",
        "runs": [
            {
                "tool": {"driver": driver},
                "invocations": [{"executionSuccessful": read}],
                "artifacts": artifacts,
                "results": results,
                "columnKind": "utf16CodeUnits",
            }
        ],
    }


def _errors(report: Report) -> bool:
    return any(file.verdict is Verdict.ERROR for file in report.files)


def _rule(rule: str) -> dict[str, Any]:
    return {
        "id": f"scan/{rule}",
        "shortDescription": {"text": RULES.get(rule, rule)},
        "properties": {"tags": ["security", "model-file"]},
    }


def _uri(report: Report, file: FileReport | None) -> str:
    path = report.path
    if file is not None and file.path != report.path:
        path = f"{path.rstrip('/')}/{file.path}"
    return urllib.parse.quote(path)


def _artifact(report: Report, file: FileReport) -> dict[str, Any]:
    made: dict[str, Any] = {"location": {"uri": _uri(report, file)}}
    if file.size is not None:
        made["length"] = file.size
    if file.sha256:
        made["hashes"] = {"sha-256": file.sha256}
    return made


def _result(report: Report, file: FileReport | None, reason: Reason) -> dict[str, Any]:
    uri = _uri(report, file)
    physical: dict[str, Any] = {"artifactLocation": {"uri": uri}}
    if reason.offset is not None and reason.member is None:
        physical["region"] = {"byteOffset": reason.offset, "byteLength": 1}
    location: dict[str, Any] = {"physicalLocation": physical}
    if reason.member:
        location["logicalLocations"] = [{"fullyQualifiedName": reason.member, "kind": "member"}]
    print_of = f"{reason.rule}\0{reason.member}\0{reason.global_name}\0{reason.what}"
    return {
        "ruleId": f"scan/{reason.rule}",
        "level": LEVELS[reason.verdict],
        "message": {"text": reason.what},
        "locations": [location],
        "partialFingerprints": {"trainguardReason/v1": hashlib.sha256(f"{uri}\0{print_of}".encode()).hexdigest()},
        "properties": {"verdict": reason.verdict.value, "technique": reason.technique, "global": reason.global_name},
    }
