"""Tasks as Kubernetes Jobs: a manifest with one Job a task, named by the task's content.

Without a client of ours: the manifest is written beside the tasks. With the setting `apply=kubectl` it is applied and
waited for; without, the audit ends saying what to apply, and the same audit called again goes on with what has come
back. Volumes bring the auditor's state folder and the run's working folder under their own paths.

Written to the batch/v1 schema and validated against it; not tried on a cluster (docs/audit.md says so).
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainguard.digest import sha256_hex, write_durably
from trainguard.errors import Misuse
from trainguard.replay.tasks import NotPerformed, Task, outcome_path, task_path

SETTINGS = frozenset({"image", "namespace", "claims", "cpu", "memory", "gpu", "apply", "service_account"})
NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
IMAGE = re.compile(r"[A-Za-z0-9][\w./:@-]{0,399}")
QUANTITY = re.compile(r"[0-9]+(\.[0-9]+)?(m|[kKMGT]i?)?")
DEADLINE_SPARE_SECONDS = 1200
RETRIES = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class KubernetesExecutor:
    """Jobs of one namespace."""

    image: str
    """Best by digest, `name@sha256:…`: what is in it is measured against the lock all the same."""
    claims: Mapping[str, str]
    """PersistentVolumeClaim → path it is mounted at: the same path as here."""
    worker: tuple[str, ...] = ("python",)
    namespace: str = "default"
    service_account: str | None = None
    resources: Mapping[str, str] = field(default_factory=dict)
    apply: bool = False
    name: str = "kubernetes"
    ahead: bool = True

    @classmethod
    def made(cls, worker: Sequence[str], settings: Mapping[str, str]) -> KubernetesExecutor:
        """Settings: `image`, `claims` (name:/path,…), and those in SETTINGS that may be left out."""
        unknown = set(settings) - SETTINGS
        if unknown or "image" not in settings or "claims" not in settings:
            raise Misuse(
                "executor kubernetes: expected the settings image=… and claims=NAME:/path, and no others than "
                f"{', '.join(sorted(SETTINGS))}; found {dict(settings)}"
            )
        _fits(IMAGE, settings["image"], "image")
        for setting in ("namespace", "service_account"):
            _fits(NAME, settings.get(setting, "default"), setting)
        amounts = {"cpu": "cpu", "memory": "memory", "gpu": "nvidia.com/gpu"}
        for setting in amounts:
            _fits(QUANTITY, settings.get(setting, "1"), setting)
        if settings.get("apply", "kubectl") != "kubectl":
            raise Misuse(f"executor kubernetes: expected apply=kubectl, found {settings['apply']!r}")
        return cls(
            image=settings["image"],
            claims=dict(_claim(word) for word in settings["claims"].split(",")),
            worker=tuple(worker) or ("python",),
            namespace=settings.get("namespace", "default"),
            service_account=settings.get("service_account"),
            resources={amounts[name]: settings[name] for name in amounts if name in settings},
            apply="apply" in settings,
        )

    def perform(self, tasks: Sequence[Task], folder: Path) -> None:
        """See `Executor`."""
        text = "".join(f"---\n{yaml(self.manifest(task, folder))}" for task in tasks)
        path = folder / f"kubernetes-{sha256_hex(text.encode())[:12]}.yaml"
        write_durably(path, text.encode(), mode=0o600)
        if not self.apply:
            raise NotPerformed(
                f"executor kubernetes: {len(tasks)} jobs are described in {path}, none has come back yet",
                next_step=f"kubectl apply -f {path}, wait for the jobs, then call the same audit again",
            )
        seconds = int(max(task.limit_seconds for task in tasks)) * 2 + DEADLINE_SPARE_SECONDS
        self._kubectl("apply", "-f", str(path), seconds=120)
        for task in tasks:
            self._kubectl("wait", "--for=condition=complete", f"job/{_job(task)}", f"--timeout={seconds}s",
                          seconds=seconds + 60)  # fmt: skip
        missing = [task.id for task in tasks if not outcome_path(folder, task).exists()]
        if missing:
            raise NotPerformed(f"executor kubernetes: {len(missing)} of {len(tasks)} jobs left no outcome in {folder}")

    def _kubectl(self, *words: str, seconds: float) -> None:
        try:
            done = subprocess.run(
                ["kubectl", "--namespace", self.namespace, *words], capture_output=True, text=True, timeout=seconds,
                check=False,
            )  # fmt: skip
        except (OSError, subprocess.TimeoutExpired) as error:
            raise NotPerformed(f"executor kubernetes: kubectl {words[0]}: {error}") from error
        if done.returncode:
            raise NotPerformed(f"executor kubernetes: kubectl {words[0]}: {done.stderr.strip()[-300:]}")

    def manifest(self, task: Task, folder: Path) -> dict[str, Any]:
        """The Job of one task (batch/v1)."""
        command = [*self.worker, "-m", "trainguard.replay.worker"]
        container: dict[str, Any] = {
            "name": "replay",
            "image": self.image,
            "command": [*command, str(task_path(folder, task)), str(outcome_path(folder, task))],
            "securityContext": {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            },
            "volumeMounts": [
                {"name": "tmp", "mountPath": "/tmp"},  # noqa: S108 - inside the container
                *({"name": name, "mountPath": path} for name, path in self.claims.items()),
            ],
        }
        if self.resources:
            container["resources"] = {"requests": dict(self.resources), "limits": dict(self.resources)}
        pod: dict[str, Any] = {
            "restartPolicy": "Never",
            "automountServiceAccountToken": False,
            "enableServiceLinks": False,
            "securityContext": {"runAsUser": os.getuid(), "runAsGroup": os.getgid()},
            "containers": [container],
            "volumes": [
                {"name": "tmp", "emptyDir": {}},
                *({"name": name, "persistentVolumeClaim": {"claimName": name}} for name in self.claims),
            ],
        }
        if self.service_account is not None:
            pod["serviceAccountName"] = self.service_account
        labels = {"app.kubernetes.io/name": "trainguard", "app.kubernetes.io/component": "replay"}
        return {
            "apiVersion": "batch/v1",
            "kind": "Job",
            "metadata": {"name": _job(task), "namespace": self.namespace, "labels": labels},
            "spec": {
                "backoffLimit": RETRIES,
                "completions": 1,
                "parallelism": 1,
                "activeDeadlineSeconds": int(task.limit_seconds) * 2 + DEADLINE_SPARE_SECONDS,
                "template": {"metadata": {"labels": labels}, "spec": pod},
            },
        }


def _job(task: Task) -> str:
    return f"trainguard-{task.id}"


def _claim(word: str) -> tuple[str, str]:
    name, _, path = word.partition(":")
    _fits(NAME, name, "claims")
    if not path.startswith("/") or ".." in path.split("/"):
        raise Misuse(f"executor kubernetes: expected claims=NAME:/absolute/path, found {word!r}")
    return name, path


def _fits(pattern: re.Pattern[str], value: str, setting: str) -> None:
    if pattern.fullmatch(value) is None:
        raise Misuse(f"executor kubernetes: {setting}={value!r} is not what Kubernetes would take")


def yaml(value: Mapping[str, Any]) -> str:
    """Plain YAML 1.2: blocks of mappings and lists, every other value as JSON, which is YAML."""
    return "\n".join(_lines(value, "")) + "\n"


def _lines(value: Any, indent: str) -> Iterator[str]:
    if isinstance(value, Mapping) and value:
        for name, item in value.items():
            yield from _entry(f"{indent}{json.dumps(name)}:", item, indent + "  ")
    elif isinstance(value, list) and value:
        for item in value:
            yield from _entry(f"{indent}-", item, indent + "  ")
    else:
        yield f"{indent}{json.dumps(value)}"


def _entry(head: str, item: Any, indent: str) -> Iterator[str]:
    if isinstance(item, Mapping | list) and item:
        yield head
        yield from _lines(item, indent)
    else:
        yield f"{head} {json.dumps(item)}"
