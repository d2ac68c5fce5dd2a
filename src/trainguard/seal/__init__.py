"""Sealed checkpoints: signed when they are saved, checked before the first byte is loaded (spec/seal.md).

    from trainguard.home import Home
    from trainguard.seal import seal_path, verify_seal

    seal_path(Home.find(), Path("checkpoints/step-900"), run="20261122-a1b2c3", step=900)
    report = verify_seal(Path("checkpoints/step-900"), home=Home.find())
    report.status            # "upheld", "violated" or "unknown"
    report.findings          # what changed, by file and tensor; which older checkpoint was put back

One file beside the checkpoint (`model.sig` in a folder, `x.pt.sig` beside `x.pt`) that model_signing, cosign and
sigstore-go read too. `hashing.TeeHash` digests a checkpoint while it is written; it stands alone, without this package.
"""

from trainguard.seal.report import SealReport
from trainguard.seal.verify import verify_seal
from trainguard.seal.write import seal_path

__all__ = ["SealReport", "seal_path", "verify_seal"]
