"""The verdict as tags of an MLflow run. Runs on the judge's side, never in the training process."""

from __future__ import annotations

import re
from collections.abc import Mapping

from trainguard.errors import Unavailable

RUN_ID = re.compile(r"[0-9a-f]{32}")


def tag(run_id: str, tags: Mapping[str, str]) -> str:
    """Set `tags` on the run `run_id` of the tracking server that *our* environment names; returns where that was.

    The address is never taken from the training process: whoever owned the job could have our credentials sent to a
    server of theirs. Raises Unavailable, also where MLflow is not installed or does not answer.
    """
    if RUN_ID.fullmatch(run_id) is None:
        raise Unavailable(f"mlflow: expected a run id of 32 hexadecimal digits, found {run_id[:40]!r}")
    try:
        import mlflow
        from mlflow.exceptions import MlflowException
    except ImportError:
        raise Unavailable("mlflow is not installed here", next_step="pip install mlflow-skinny") from None
    address = str(mlflow.get_tracking_uri())
    client = mlflow.MlflowClient(tracking_uri=address)
    try:
        for name, value in tags.items():
            client.set_tag(run_id, name, value)
    except MlflowException as error:
        reason = str(error).splitlines()[0][:200]
        raise Unavailable(
            f"mlflow at {address}: run {run_id} could not be tagged: {reason}",
            next_step="set MLFLOW_TRACKING_URI to where the run is kept",
        ) from None
    return address
