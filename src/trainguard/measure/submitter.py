"""How a job came to this host: what its scheduler put into its environment.

    submitter(os.environ)      # {"slurm": {"SLURM_JOB_ID": "42", "SLURM_JOB_USER": "victim-a", …}}

All of it is a claim: whoever starts the job can set these variables. It says where to ask for the scheduler's own
records (`sacct`, the Kubernetes audit log), which are not on this host, and names nobody.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

VALUE_LIMIT = 200
SCHEDULERS: dict[str, tuple[str, ...]] = {
    "slurm": (
        "SLURM_JOB_ID",
        "SLURM_ARRAY_JOB_ID",
        "SLURM_JOB_USER",
        "SLURM_JOB_UID",
        "SLURM_JOB_ACCOUNT",
        "SLURM_SUBMIT_HOST",
        "SLURM_CLUSTER_NAME",
        "SLURM_RESTART_COUNT",
    ),
    "kubernetes": ("HOSTNAME", "POD_NAME", "POD_NAMESPACE", "POD_UID", "NODE_NAME", "JOB_COMPLETION_INDEX"),
    "torchrun": ("TORCHELASTIC_RUN_ID", "GROUP_RANK", "TORCHELASTIC_RESTART_COUNT", "MASTER_ADDR"),
    "ray": ("RAY_JOB_ID", "RAY_SUBMISSION_ID"),
}
"""Scheduler → its variables; the first of each tells whether it is there, but for Kubernetes."""

NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")


def submitter(environment: Mapping[str, str], *, namespace: Path = NAMESPACE) -> dict[str, dict[str, str]]:
    """Scheduler → what it says of the job, as text of at most VALUE_LIMIT characters; empty for a job without one."""
    found: dict[str, dict[str, str]] = {}
    for name, variables in SCHEDULERS.items():
        present = {key: environment[key][:VALUE_LIMIT] for key in variables if environment.get(key)}
        if name == "kubernetes":
            if "KUBERNETES_SERVICE_HOST" not in environment:
                continue
            present |= _namespace(namespace)
        if present and (name == "kubernetes" or variables[0] in present):
            found[name] = present
    return found


def _namespace(path: Path) -> dict[str, str]:
    try:
        with path.open("rb") as file:
            text = file.read(VALUE_LIMIT).decode("utf-8", "replace").strip()
    except OSError:
        return {}
    return {"namespace": text} if text else {}
