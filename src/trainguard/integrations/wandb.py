"""The verdict as tags and summary of a Weights & Biases run. Runs on the judge's side."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

from trainguard.errors import Unavailable

RUN_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
PROJECT = re.compile(r"[A-Za-z0-9_.-]{1,128}")


def tag(run_id: str, project: str, tags: Mapping[str, str], *, word: str) -> str:
    """Resume run `run_id` and write `tags` to its summary and `trainguard:<word>` to its tags; returns the folder.

    Honours WANDB_MODE and WANDB_DIR: offline, this writes a further part of the run that `wandb sync` joins to the
    first. Raises Unavailable.
    """
    if RUN_ID.fullmatch(run_id) is None or PROJECT.fullmatch(project) is None:
        raise Unavailable(f"wandb: expected a run id and a project name, found {run_id[:40]!r} and {project[:40]!r}")
    try:
        import wandb
    except ImportError:
        raise Unavailable("wandb is not installed here", next_step="pip install wandb") from None
    os.environ.setdefault("WANDB_SILENT", "true")
    try:
        run = wandb.init(project=project, id=run_id, resume="allow")
        run.tags = (*(run.tags or ()), f"trainguard:{word}")
        for name, value in tags.items():
            run.summary[name] = value
        folder = str(run.dir)
        run.finish()
    except wandb.Error as error:
        reason = str(error).splitlines()[0][:200]
        raise Unavailable(f"wandb: run {run_id} could not be tagged: {reason}", next_step="wandb login") from None
    return folder
