"""Every engine performs the same tasks: outcomes come back, and an engine that fails says nothing about the run."""

from __future__ import annotations

import json
import os
import stat
import sys
from pathlib import Path
from typing import Any

import pytest

from trainguard.errors import Misuse
from trainguard.replay.committed import Point
from trainguard.replay.executors import NAMES, chosen
from trainguard.replay.executors.kubernetes import KubernetesExecutor, yaml
from trainguard.replay.tasks import NotPerformed, Task, outcome_path, parse_outcome

WORKER = """
import json, sys
given, wanted = sys.argv[-2:]
task = json.loads(sys.stdin.buffer.read() if given == "-" else open(given, "rb").read())
if task["until"] == 13:
    sys.exit("no room here")
from trainguard.replay.tasks import Task
import msgspec
told = {"task": msgspec.convert(task, Task).id, "place": {"host": "node", "python": "p"}}
text = json.dumps(told)
sys.stdout.write(text) if wanted == "-" else open(wanted, "w").write(text)
"""


@pytest.fixture
def worker(tmp_path: Path) -> tuple[str, ...]:
    """Words that start a worker which performs nothing and says so, and fails at step 13."""
    path = tmp_path / "worker.py"
    path.write_text(WORKER)
    return (sys.executable, str(path))


def task(until: int, **changed: Any) -> Task:
    told = {"run": "r", "command": ("python", "train.py"), "cwd": "/job", "state": "/state", "began": "1"}
    return Task(**(told | {"environment": {}, "key": "00", "until": until} | changed))  # type: ignore[arg-type]


def performed(executor: Any, folder: Path, *until: int) -> list[str]:
    """Hosts that the outcomes name."""
    import msgspec

    from trainguard.replay.tasks import task_path

    tasks = [task(each) for each in until]
    for each in tasks:
        task_path(folder, each).write_bytes(msgspec.json.encode(each))
    executor.perform(tasks, folder)
    return [parse_outcome(outcome_path(folder, each).read_bytes(), each.id).place.host for each in tasks]


@pytest.mark.parametrize("jobs", ["1", "3"])
def test_local_workers_bring_outcomes_back(tmp_path: Path, worker: tuple[str, ...], jobs: str) -> None:
    """One at a time, or some; by stdin and stdout, so that the words may lead to another machine."""
    executor = chosen("local", worker=worker, settings={"jobs": jobs})
    assert executor.ahead is (jobs != "1")
    assert performed(executor, tmp_path, 4, 5) == ["node", "node"]


def test_a_local_worker_that_fails_is_said_with_its_words(tmp_path: Path, worker: tuple[str, ...]) -> None:
    with pytest.raises(NotPerformed, match="no room here"):
        performed(chosen("local", worker=worker), tmp_path, 13)
    with pytest.raises(NotPerformed, match="cannot be started"):
        performed(chosen("local", worker=("/none/such",)), tmp_path, 5)


def test_a_container_sees_little_and_nothing_it_could_write_to(tmp_path: Path) -> None:
    """Working folder, points and lock, read only; no network, no keys."""
    executor = chosen("local", settings={"image": "job@sha256:00", "engine": "podman"})
    words = " ".join(executor.words(task(5, lock="ab")))  # type: ignore[attr-defined]
    assert words.startswith("podman run --rm --interactive --network none --read-only")
    assert words.endswith("job@sha256:00 python")
    assert [word for word in words.split() if word.endswith(":ro")] == [
        "/job:/job:ro", "/state/runs/r/points:/state/runs/r/points:ro", "/state/blobs/ab:/state/blobs/ab:ro",
    ]  # fmt: skip


def test_a_slurm_array_brings_outcomes_back(tmp_path: Path, worker: tuple[str, ...]) -> None:
    """Through submitit's own stand-in for a cluster: an array, files in the shared folder."""
    pytest.importorskip("submitit")
    executor = chosen("slurm", worker=worker, settings={"cluster": "local"})
    assert performed(executor, tmp_path, 4, 5) == ["node", "node"]


def test_a_slurm_job_that_fails_is_said(tmp_path: Path, worker: tuple[str, ...]) -> None:
    pytest.importorskip("submitit")
    with pytest.raises(NotPerformed, match=r"1 of 2 tasks left no outcome: job .* ended with status 1"):
        performed(chosen("slurm", worker=worker, settings={"cluster": "local"}), tmp_path, 4, 13)


def test_without_slurm_it_is_said_that_nothing_took_the_tasks(
    tmp_path: Path, worker: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("submitit")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(NotPerformed, match="slurm"):
        performed(chosen("slurm", worker=worker), tmp_path, 4)


@pytest.mark.parametrize(("name", "package"), [("slurm", "submitit"), ("ray", "ray")])
def test_an_engine_that_is_not_installed_names_what_to_install(
    tmp_path: Path, name: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(NotPerformed, match=f"{package} is not installed") as caught:
        performed(chosen(name), tmp_path, 4)
    assert caught.value.next_step == f"pip install 'trainguard[{name}]'"


CLUSTER = {"image": "job@sha256:00", "claims": "shared:/job,state:/state", "gpu": "1", "memory": "8Gi"}


def manifest(folder: Path, **changed: Any) -> dict[str, Any]:
    executor = KubernetesExecutor.made(("python3",), CLUSTER | changed)
    point = Point(step=4, name="p0-step-00000004", index_sha256="a", data_blake3="b", bytes=1)
    return executor.manifest(task(5, points=(point,)), folder)


def test_a_kubernetes_job_is_valid_by_the_official_schema(tmp_path: Path) -> None:
    """batch/v1, strict: no field that the schema does not know."""
    validate = pytest.importorskip("kubernetes_validate")
    for changed in ({}, {"service_account": "replays"}, {"namespace": "audit"}):
        validate.validate(manifest(tmp_path, **changed), "1.31", strict=True)


def test_a_kubernetes_job_is_named_by_content_and_may_little(tmp_path: Path) -> None:
    """Applying it twice is one job; it has no token, no capability, and no way to write but the claims and /tmp."""
    job = manifest(tmp_path)
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert job["metadata"]["name"] == manifest(tmp_path)["metadata"]["name"]
    assert pod["automountServiceAccountToken"] is False
    assert pod["securityContext"]["runAsUser"] == os.getuid()
    assert container["securityContext"]["readOnlyRootFilesystem"] is True
    assert container["resources"]["limits"] == {"nvidia.com/gpu": "1", "memory": "8Gi"}
    assert [mount["mountPath"] for mount in container["volumeMounts"]] == ["/tmp", "/job", "/state"]
    assert container["command"][:3] == ["python3", "-m", "trainguard.replay.worker"]


def test_what_is_written_is_yaml_of_the_same_value(tmp_path: Path) -> None:
    """Any reader of YAML gets the manifest back, whatever is in the names."""
    reader = pytest.importorskip("yaml")
    odd = {"a b": ["x: y", "- z", "", {"#": None}, [], {}], "true": "no", "n": 1.5, "u": "ü\n\t'\""}
    assert reader.safe_load(yaml(odd)) == odd
    assert reader.safe_load(yaml(manifest(tmp_path))) == manifest(tmp_path)


def test_without_a_cluster_the_manifest_is_written_and_said(tmp_path: Path) -> None:
    """The audit ends there; called again it goes on with what came back."""
    with pytest.raises(NotPerformed, match="2 jobs are described in") as caught:
        performed(chosen("kubernetes", settings=CLUSTER), tmp_path, 4, 5)
    (path,) = tmp_path.glob("kubernetes-*.yaml")
    assert path.read_text().count("kind") == 2
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert caught.value.next_step is not None
    assert str(path) in caught.value.next_step


def test_kubectl_is_called_and_its_refusal_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With apply=kubectl: apply, wait for every job, then the outcomes have to be there."""
    said = tmp_path / "said"
    kubectl = tmp_path / "kubectl"
    kubectl.write_text(f'#!/bin/sh\necho "$@" >> {said}\n')
    kubectl.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(NotPerformed, match="1 of 1 jobs left no outcome"):
        performed(chosen("kubernetes", settings=CLUSTER | {"apply": "kubectl"}), tmp_path, 4)
    lines = said.read_text().splitlines()
    assert [line.split()[2] for line in lines] == ["apply", "wait"]
    kubectl.write_text("#!/bin/sh\necho forbidden >&2\nexit 1\n")
    with pytest.raises(NotPerformed, match="kubectl apply: forbidden"):
        performed(chosen("kubernetes", settings=CLUSTER | {"apply": "kubectl"}), tmp_path, 4)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("local", {"jobs": "0"}),
        ("local", {"gpus": "1"}),
        ("local", {"engine": "lxc", "image": "x"}),
        ("slurm", {"cluster": "moon"}),
        ("ray", {"num_cpus": "many"}),
        ("ray", {"shell": "x"}),
        ("kubernetes", {}),
        ("kubernetes", {"image": "x"}),
        ("kubernetes", CLUSTER | {"claims": "shared:../x"}),
        ("kubernetes", CLUSTER | {"claims": "Shared_:/x"}),
        ("kubernetes", CLUSTER | {"image": "-v"}),
        ("kubernetes", CLUSTER | {"namespace": "a b"}),
        ("kubernetes", CLUSTER | {"cpu": "lots"}),
        ("kubernetes", CLUSTER | {"apply": "rm"}),
        ("mainframe", {}),
    ],
)
def test_a_setting_that_cannot_be_meant_is_misuse(name: str, settings: dict[str, str]) -> None:
    """Nothing is handed to an engine that was not meant for it."""
    with pytest.raises(Misuse, match="executor"):
        chosen(name, settings=settings)


def test_the_command_line_offers_every_engine() -> None:
    from trainguard.cli.audit import NAMES as OFFERED

    assert OFFERED == NAMES
    assert json.dumps(NAMES)
