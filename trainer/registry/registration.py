"""The parts of a new version in MLflow: the registered model, the logged model with its files, the version."""

import contextlib
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from etl.redaction import redact
from trainer import tracking
from trainer.config import TrackingConfig
from trainer.inference.model_archive import archived
from trainer.registry import descriptions
from trainer.registry.version import TAG_HASH


def create_registered_model(client: Any, name: str, domain: str) -> None:
    description = descriptions.registered_model(name, domain)
    with contextlib.suppress(Exception):  # there is one already, or another process has just made it
        client.create_registered_model(name, description=description)


def logged_model(client: Any, name: str, digest: str, run_id: str) -> Any:
    """The logged model of the run that trained it; a new one if there is none, or if it holds a registered version,
    whose files must not change."""
    found = tracking.models_of(client, digest)
    for model in found:
        if tracking.VERSIONS not in model.tags and (not run_id or model.source_run_id == run_id):
            return model
    run_id = run_id or next((model.source_run_id for model in found if model.source_run_id), "")
    return client.create_logged_model(
        _experiment(client, run_id),
        name=tracking.model_name(name),
        source_run_id=run_id or None,
        tags={TAG_HASH: digest},
    )


def create_version(
    client: Any,
    name: str,
    logged: Any,
    folder: Path,
    *,
    example: Mapping[str, Any],
    tags: Mapping[str, str],
    description: str,
) -> Any:
    """A version of the registered model, of a logged model that gets the files of `folder`. `example`: a request."""
    run_id = logged.source_run_id or None
    with tempfile.TemporaryDirectory() as scratch:
        packed, archives = Path(scratch) / "packed", archived(folder, Path(scratch))
        tracking.pack(archives, packed, model_id=logged.model_id, run_id=run_id, example=example)
        client.log_model_artifacts(logged.model_id, str(packed))
    client.finalize_logged_model(logged.model_id, "READY")
    return client.create_model_version(
        name,
        f"models:/{logged.model_id}",
        run_id=run_id,
        tags=tags,
        model_id=logged.model_id,
        description=tracking.resolved(client, redact(description)),
    )


def _experiment(client: Any, run_id: str) -> str:
    if run_id:
        return str(client.get_run(run_id).info.experiment_id)
    return tracking.experiment_id(client, TrackingConfig())
