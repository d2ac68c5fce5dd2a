"""What a scan says: a verdict per file with its reasons, bound to the bytes it was made from (spec/scan.md).

    safe < unknown < error < unsafe

The worst reason decides a file, the worst file decides a report. `safe` is never the absence of a look: it means that
every byte was accounted for by a format we read and that nothing outside the lists of the policy's tier is named.
Everything here is a frozen value that `msgspec.to_builtins` turns into the JSON of the spec.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum

import msgspec

from trainguard.finding import Finding, Outcome, Subject

SCHEMA = "trainguard/scan/v1"


class Verdict(StrEnum):
    """How a file or folder ended; ordered by `rank`, worse is higher."""

    SAFE = "safe"
    """Read to the last byte; nothing in it names code outside the lists of the tier."""
    UNKNOWN = "unknown"
    """Names something nobody has vetted; a person who knows it can trust it by name."""
    ERROR = "error"
    """Could not be judged: unreadable, over a budget, changed while read."""
    UNSAFE = "unsafe"
    """Runs code, hides something, or is broken in a way that loaders act on before they notice."""

    @property
    def rank(self) -> int:
        """0 for safe to 3 for unsafe."""
        return _ORDER[self.value]


_ORDER = {"safe": 0, "unknown": 1, "error": 2, "unsafe": 3}


def worst(verdicts: Iterable[Verdict]) -> Verdict:
    """The highest-ranked of `verdicts`; safe for none."""
    return max(verdicts, key=lambda verdict: verdict.rank, default=Verdict.SAFE)


class Reason(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that keeps a file from being safe."""

    verdict: Verdict
    """What this reason alone makes of the file; never safe."""
    rule: str
    """Short stable name of the rule, for machines: `global`, `call`, `build`, `stream`, `zip`, `budget` …"""
    what: str
    """One sentence: expected, found."""
    offset: int | None = None
    """Byte in the innermost member where it was seen; None where a place makes no sense."""
    member: str | None = None
    """Path inside containers, joined by `!`, such as `archive/data.pkl`; None for the file itself."""
    global_name: str | None = msgspec.field(default=None, name="global")
    """`module.qualname` it is about, after Python 2 names are mapped as `find_class` maps them."""
    use: str | None = None
    """How the file uses the global: `value`, `instance` or `call`; the last column of a trust line."""
    technique: str = "E1"
    """Catalogue id: E1 in the checkpoint itself, E2 in a side file."""


class FileReport(msgspec.Struct, frozen=True, kw_only=True):
    """The verdict on one file."""

    path: str
    """Relative to the report's path, or the path itself for a single file."""
    verdict: Verdict
    format: str
    """What the content is: `torch-zip`, `pickle`, `safetensors`, `json` …; `none` where it was not read."""
    loader: str
    """The loader this verdict is valid for: `torch`, `pickle`, `joblib`, `numpy`, `json` …; `none` for none."""
    size: int | None
    """Bytes, or None where the file could not be opened."""
    sha256: str | None = None
    """Of exactly the bytes that were judged; None when another digest was asked for or the file was not read."""
    blake3: str | None = None
    """As sha256, when the policy asks for BLAKE3."""
    reasons: tuple[Reason, ...] = ()
    globals: tuple[str, ...] = ()
    """Every `module.qualname` that loading resolves, and the classes of the dtypes it makes, sorted: the list for
    `torch.serialization.safe_globals`."""
    second_opinion: str = "not needed"
    """`agrees`, `not needed` (no pickle inside) or `not run: why`."""

    @property
    def safe_globals(self) -> str:
        """A snippet that hands torch exactly the globals this file needs, or "" when it names none."""
        return safe_globals_snippet(self.globals)

    @property
    def trust_lines(self) -> tuple[str, ...]:
        """Lines for a `--trust` file that would settle every unknown of this file, sorted."""
        return tuple(
            sorted(
                {
                    f"{reason.global_name} {reason.use}"
                    for reason in self.reasons
                    if reason.verdict is Verdict.UNKNOWN and reason.global_name and reason.use
                }
            )
        )


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """The verdict on a file or a whole folder."""

    schema: str = SCHEMA
    path: str
    """As given by the caller."""
    verdict: Verdict
    tier: str
    """weights, training or framework."""
    policy: str
    """Digest of the limits, lists and trust this was judged by (SHA-256, hex)."""
    version: str
    """Version of the lists and of the machine, `YYYY.N`."""
    files: tuple[FileReport, ...]
    reasons: tuple[Reason, ...] = ()
    """About the folder as a whole, such as a budget on the number of files."""
    seconds: float = 0.0
    """CPU seconds this took."""

    @property
    def trust_lines(self) -> tuple[str, ...]:
        """Trust lines of all files, sorted, each once."""
        return tuple(sorted({line for file in self.files for line in file.trust_lines}))

    @property
    def safe_globals(self) -> str:
        """The `safe_globals` snippet for all files together, or ""."""
        return safe_globals_snippet({name for file in self.files for name in file.globals})

    def to_findings(self, run: str | None = None) -> list[Finding]:
        """Findings of check `scan`: violated for unsafe, suspicious for unknown, not_checked for error."""
        findings = [_finding(self.path, reason, run) for reason in self.reasons]
        for file in self.files:
            findings += [_finding(file.path, reason, run) for reason in file.reasons]
        return findings


_OUTCOMES: dict[Verdict, Outcome] = {
    Verdict.UNSAFE: "violated",
    Verdict.UNKNOWN: "suspicious",
    Verdict.ERROR: "not_checked",
}


def _finding(path: str, reason: Reason, run: str | None) -> Finding:
    place = f"{path}!{reason.member}" if reason.member else path
    at = f" at byte {reason.offset}" if reason.offset is not None else ""
    return Finding(
        check="scan",
        outcome=_OUTCOMES[reason.verdict],
        techniques=() if reason.verdict is Verdict.ERROR else (reason.technique,),
        subject=Subject(run=run, path=path),
        message=f"{place}{at}: {reason.what}",
        found=reason.global_name,
    )


def safe_globals_snippet(names: Iterable[str]) -> str:
    """Python that makes `torch.load(weights_only=True)` accept exactly `names` (`module.qualname`) on top of its own.

    Entries are (object, "module.qualname") pairs, because a pickle may know an object under another module's name.
    """
    wanted = sorted(set(names) - TORCH_OWN)
    if not wanted:
        return ""
    modules = sorted({name.rpartition(".")[0] for name in wanted})
    lines = ["import importlib, torch", "resolve = lambda m, n: getattr(importlib.import_module(m), n)", ""]
    lines += ["with torch.serialization.safe_globals(["]
    for name in wanted:
        module, _, last = name.rpartition(".")
        lines.append(f'    (resolve("{module}", "{last}"), "{name}"),')
    lines += ["]):", '    state = torch.load(PATH, weights_only=True, map_location="cpu")']
    return "\n".join(lines) if modules else ""


TORCH_OWN = frozenset(
    (
        "_codecs.encode",
        "builtins.bytearray",
        "builtins.complex",
        "builtins.set",
        "collections.Counter",
        "collections.OrderedDict",
        "torch._tensor._rebuild_from_type_v2",
        *(
            f"torch._utils._rebuild_{name}"
            for name in (
                "device_tensor_from_cpu_tensor",
                "device_tensor_from_numpy",
                "meta_tensor_no_storage",
                "nested_tensor",
                "parameter",
                "parameter_with_state",
                "qtensor",
                "sparse_tensor",
                "tensor",
                "tensor_v2",
                "tensor_v3",
                "wrapper_subclass",
            )
        ),
        *(
            f"torch.{prefix}{kind}Storage"
            for kind in (
                *("BFloat16", "Bool", "Byte", "Char", "ComplexDouble", "ComplexFloat"),
                *("Double", "Float", "Half", "Int", "Long", "Short"),
            )
            for prefix in ("", "cuda.")
        ),
        *(f"torch.{name}" for name in ("Size", "Tensor", "device", "bool", "bfloat16")),
        *(f"torch.{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)),
        *(f"torch.{name}" for name in ("float16", "float32", "float64", "complex64", "complex128")),
        *(f"torch.float8_{name}" for name in ("e4m3fn", "e4m3fnuz", "e5m2", "e5m2fnuz")),
        "torch.nn.parameter.Parameter",
        "torch.serialization._get_layout",
        "torch.storage.TypedStorage",
        "torch.storage.UntypedStorage",
    )
)
"""What torch's own `weights_only` unpickler accepts since 2.6, so the snippet stays short."""
