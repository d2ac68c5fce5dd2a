"""The check over a run's records: what it says of each measurement, with a lock, without one, and with bad evidence."""

from __future__ import annotations

import hashlib
from typing import Any

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from trainguard.appraise.environment import Environment, compare, intrinsic, variable_kind
from trainguard.appraise.interface import Context
from trainguard.errors import Unavailable
from trainguard.evidence import Evidence
from trainguard.finding import Finding, LinkState
from trainguard.lockfile import (
    Cache,
    Code,
    Distribution,
    Hook,
    Interpreter,
    Launch,
    Measurement,
    Numeric,
    Program,
    Shadow,
    Tree,
    make_lock,
)
from trainguard.policy import Approval, Policy

KEY = ec.generate_private_key(ec.SECP256R1())
A, B = "aa" * 32 + " 3", "bb" * 32 + " 3"
PYTHON = Interpreter(
    executable="/env/bin/python",
    version="3.11.7",
    implementation="cpython",
    cache_tag="cpython-311",
    prefix="/env",
    base_prefix="/usr",
    path=(),
    user_site=False,
)


def measurement(**changes: Any) -> Measurement:
    plain = Measurement(
        cwd="/job",
        launch=Launch(
            argv=("python", "train.py"),
            kind="script",
            script="train.py",
            chain=(Program(role="interpreter", path="/env/bin/python", name="python3.11", digest=A[:64]),),
        ),
        interpreter=PYTHON,
        code=Code(root="/job"),
        trees={
            "code": Tree(name="code", root="/job", files={"train.py": A}),
            "site-packages": Tree(name="site-packages", root="/site", bytecode={"__pycache__/t.pyc": A[:64] + " live"}),
        },
        distributions={"tiny": Distribution(name="tiny", version="1", tree="site-packages", files={"t.py": A})},
    )
    return msgspec.structs.replace(plain, **changes)


class Blobs(dict[str, bytes]):
    """Content by digest, as a run's state folder would give it."""

    def put(self, data: bytes) -> str:
        digest = hashlib.sha256(data).hexdigest()
        self[digest] = data
        return digest

    def get_blob(self, digest: str) -> bytes:
        if digest not in self:
            raise Unavailable(f"{digest}: not there")
        return self[digest]


def record(n: int, body: dict[str, Any], kind: str = "measurement") -> Evidence:
    return Evidence(n=n, at=n, source="supervisor", kind=kind, body=body, leaf=1, hash="cc" * 32)


def judged(*measurements: Measurement, approved: Measurement | None, policy: Policy | None = None) -> list[Any]:
    blobs = Blobs()
    check = Environment(Context(run="r", policy=policy or Policy(), blob=blobs.get_blob))
    lock = blobs.put(make_lock(approved, KEY, made="").data) if approved is not None else None
    outcomes: list[Any] = []
    for attempt, one in enumerate(measurements):
        body = {"blob": blobs.put(one.encode()), "lock": lock, "attempt": attempt}
        outcomes += check.see(record(attempt, body))
    return [*outcomes, *check.end()]


def test_a_run_that_is_as_approved_holds_and_says_how_much_was_compared() -> None:
    (state,) = judged(measurement(), approved=measurement())
    assert (state.link, state.state, state.broken) == ("environment", "held", 0)
    assert state.held == 4  # two files, one bytecode file, one program


def test_a_difference_cites_the_record_and_breaks_the_link() -> None:
    changed = measurement(trees=measurement().trees | {"code": Tree(name="code", root="/job", files={"train.py": B})})
    finding, state = judged(changed, approved=measurement())
    assert (finding.outcome, finding.techniques, finding.subject.run) == ("violated", ("B1",), "r")
    assert finding.evidence[0].hash == "cc" * 32
    assert (state.state, state.broken) == ("broken", 1)


def test_without_a_lock_the_link_is_blind_and_oddities_are_only_suspicious() -> None:
    stale = Distribution(name="tiny", version="1", tree="site-packages", files={"t.py": B}, mismatched=("t.py",))
    finding, state = judged(measurement(distributions={"tiny": stale}), approved=None)
    assert (finding.outcome, finding.techniques) == ("suspicious", ("A5",))
    assert state.state == "broken"
    assert "no lock" in state.blind[0]
    (quiet,) = judged(measurement(), approved=None)
    assert quiet.state == "blind"


def test_a_restart_under_other_conditions_is_found_even_without_a_lock() -> None:
    """F10: the second attempt is compared with the first."""
    second = measurement(environment={"NVIDIA_TF32_OVERRIDE": "1"})
    finding, _ = judged(measurement(), second, approved=None)
    assert finding.techniques[:2] == ("F10", "A10")
    assert "changed since the first attempt" in finding.message


def test_an_approval_of_the_policy_explains_and_is_counted() -> None:
    changed = measurement(environment={"OMP_NUM_THREADS": "1"})
    policy = Policy(approve=(Approval(check="environment", place="OMP_NUM_THREADS"),))
    (state,) = judged(changed, approved=measurement(), policy=policy)
    assert (state.state, state.explained) == ("explained", ("OMP_NUM_THREADS",))


def test_a_variable_the_policy_allows_is_silent_and_only_that_one() -> None:
    changed = measurement(environment={"OMP_NUM_THREADS": "1", "PYTHONOPTIMIZE": "1"})
    lock = make_lock(measurement(), KEY, made="")
    (finding,) = compare(lock, changed, Policy(allow_env=("OMP_NUM_THREADS",)))
    assert finding.subject.path == "PYTHONOPTIMIZE"


@pytest.mark.parametrize("body", [{}, {"blob": 3}, {"blob": "x" * 64, "lock": None}, {"blob": None, "lock": {}}])
def test_evidence_that_cannot_be_read_is_a_finding_and_never_an_exception(body: dict[str, Any]) -> None:
    check = Environment(Context(run="r", policy=Policy(), blob=Blobs().get_blob))
    (finding,) = check.see(record(0, body))
    assert (finding.outcome, finding.techniques) == ("violated", ("G1",))
    (state,) = check.end()
    assert isinstance(state, LinkState)
    assert state.state == "blind"


def test_a_run_that_could_not_be_measured_is_blind_with_its_reason() -> None:
    check = Environment(Context(run="r", policy=Policy(), blob=Blobs().get_blob))
    (finding,) = check.see(record(0, {"reason": "disk gone"}, kind="unmeasured"))
    assert finding.outcome == "not_checked"
    (state,) = check.end()
    assert "disk gone" in state.blind[0]
    (nothing,) = Environment(Context(run="r", policy=Policy(), blob=Blobs().get_blob)).end()
    assert isinstance(nothing, LinkState)
    assert "nothing was measured" in nothing.blind[0]


def found(**changes: Any) -> list[Finding]:
    return list(compare(make_lock(measurement(), KEY, made=""), measurement(**changes), Policy()))


def test_numeric_flags_and_the_dispatch_table_are_compared_and_the_processor_is_not() -> None:
    flags = {"cudnn.allow_tf32": "false", "cpu_capability": '"AVX2"'}
    old = measurement(numeric=Numeric(flags=flags, dispatcher="aa"))
    other = Numeric(
        flags={"cudnn.allow_tf32": "true", "cpu_capability": '"AVX512"'},
        dispatcher="bb",
        overrides=("aten::abs /job/x.py:3",),
    )
    lock = make_lock(old, KEY, made="")
    first, second = compare(lock, measurement(numeric=other), Policy())
    assert (first.techniques, second.techniques[0]) == (("A10",), "B6")
    assert "aten::abs /job/x.py:3" in second.message
    (unread,) = compare(lock, measurement(), Policy())
    assert unread.outcome == "not_checked"


def test_bytecode_that_differs_and_was_not_compared_is_not_checked_unless_it_is_inert() -> None:
    tree = Tree(name="site-packages", root="/site", bytecode={"__pycache__/t.pyc": B[:64] + " live"})
    trees = measurement().trees | {"site-packages": tree}
    (finding,) = found(trees=trees)
    assert finding.outcome == "not_checked"
    assert found(trees=trees, bytecode="inert") == []
    same = msgspec.structs.replace(tree, recompiled={"__pycache__/t.pyc": "same"})
    assert found(trees=trees | {"site-packages": same}) == []
    differs = msgspec.structs.replace(tree, recompiled={"__pycache__/t.pyc": "differs"})
    assert found(trees=trees | {"site-packages": differs})[0].techniques == ("A6",)


def test_many_changed_files_of_one_package_are_counted_and_not_listed_without_end() -> None:
    old = Distribution(name="big", version="1", tree="site-packages", files={f"f{i}.py": A for i in range(500)})
    new = msgspec.structs.replace(old, files=dict.fromkeys(old.files, B))
    lock = make_lock(measurement(distributions={"big": old}), KEY, made="")
    findings = list(compare(lock, measurement(distributions={"big": new}), Policy()))
    assert len(findings) == 41
    assert "460 more files" in findings[-1].message


def test_what_is_odd_by_itself_is_listed_without_a_lock() -> None:
    odd = measurement(
        hooks=(
            Hook(kind="pth", place="site-packages/x.pth", digest=A[:64], runs=("import os",)),
            Hook(kind="pth", place="site-packages/known.pth", digest=A[:64], distribution="tiny"),
            Hook(kind="sitecustomize", place="stdlib/sitecustomize.py", digest=A[:64]),
            Hook(kind="entry_point", place="pytest11: a = b", digest=A[:64]),
        ),
        shadows=(
            Shadow(module="random", place="code/random", hides="the standard library"),
            Shadow(module="test", place="code/test", hides="the standard library"),
            Shadow(module="utils", place="code/utils", hides="site-packages/utils"),
        ),
        environment={"PYTHONWARNINGS": "ignore::a.B", "CUDA_INJECTION64_PATH": "/x.so", "OMP_NUM_THREADS": "1"},
        caches=(Cache(name="triton", path="/t", mode=0o755, foreign=True),),
        numeric=Numeric(flags={}, dispatcher="", overrides=("aten::abs /x.py:1",)),
        notes=("something was not read",),
    )
    findings = list(intrinsic(odd))
    assert [finding.techniques[:1] for finding in findings] == [
        ("A2",), ("A7",), ("A4",), ("A4",), ("B6",), ("A8",), ()
    ]  # fmt: skip
    assert {finding.outcome for finding in findings[:-1]} == {"suspicious"}
    assert findings[-1].outcome == "not_checked"


@pytest.mark.parametrize(
    ("name", "technique"),
    [
        ("LD_AUDIT", "A3"),
        ("LD_LIBRARY_PATH", "A3"),
        ("NCCL_TUNER_PLUGIN", "A4"),
        ("NVTX_INJECTION64_PATH", "A4"),
        ("PYTHONBREAKPOINT", "A4"),
        ("PYTHONHOME", "A4"),
        ("TRITON_CACHE_DIR", "A8"),
        ("TORCH_EXTENSIONS_DIR", "A8"),
        ("TORCH_DEVICE_BACKEND_AUTOLOAD", "A9"),
        ("TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "A10"),
        ("NCCL_P2P_DISABLE", "A11"),
        ("MKL_NUM_THREADS", "A11"),
        ("NEVER_HEARD_OF", "A10"),
    ],
)
def test_each_variable_has_its_technique(name: str, technique: str) -> None:
    assert variable_kind(name)[1][0] == technique


def test_a_lock_by_an_unknown_key_is_compared_and_never_green() -> None:
    """G6: an insider who approves his own edit."""
    blobs = Blobs()
    check = Environment(Context(run="r", policy=Policy(), blob=blobs.get_blob))
    lock = blobs.put(make_lock(measurement(), KEY, made="").data)
    body = {"blob": blobs.put(measurement().encode()), "lock": lock, "signed": False, "attempt": 0}
    (finding,) = check.see(record(0, body))
    assert (finding.outcome, "does not know" in finding.message) == ("not_checked", True)
    (state,) = check.end()
    assert isinstance(state, LinkState)
    assert state.state == "blind"


def test_a_stale_record_of_a_distributions_own_packaging_is_no_finding_without_a_lock() -> None:
    """Debian strips libraries after RECORD was written; pip does not, and INSTALLER has a hash of its own."""
    stale = Distribution(
        name="tiny", version="1", tree="site-packages", installer="debian", files={"t.so": B}, mismatched=("t.so",)
    )
    assert list(intrinsic(measurement(distributions={"tiny": stale}))) == []
    files = {"t.so": B, "tiny-1.dist-info/INSTALLER": B}
    posing = msgspec.structs.replace(stale, files=files, mismatched=tuple(files))
    assert len(list(intrinsic(measurement(distributions={"tiny": posing})))) == 2
