"""Vet model files without loading them (spec/scan.md).

    from trainguard.scan import ScanPolicy, Verdict, vet

    report = vet("checkpoint/", ScanPolicy(tier="training"))
    if report.verdict is not Verdict.SAFE:
        for file in report.files:
            for reason in file.reasons:
                print(file.path, reason.verdict, reason.what)

Nothing of a file is ever imported or executed. `vet_file` takes an open descriptor, so that the caller can load the
very bytes that were vetted; `FileReport.safe_globals` is what to hand to `torch.load(weights_only=True)`.
"""

from trainguard.scan.limits import ScanPolicy
from trainguard.scan.trust import parse_trust
from trainguard.scan.verdict import FileReport, Reason, Report, Verdict, worst
from trainguard.scan.vet import vet, vet_file

__all__ = ["FileReport", "Reason", "Report", "ScanPolicy", "Verdict", "parse_trust", "vet", "vet_file", "worst"]
