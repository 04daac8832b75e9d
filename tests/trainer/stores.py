"""Embedded MLflow stores for tests: making the tables takes seconds, so it is done once and copied."""

import functools
import os
import shutil
import tempfile
from pathlib import Path

from trainer import tracking
from trainer.tracking import connection


@functools.cache
def _template() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="graftrec-store-"))
    tracking.connect(f"sqlite:///{folder}/mlflow.db")
    return folder / "mlflow.db"


def enter_store(folder, monkeypatch):
    """Work in `folder`, with an empty embedded store and none of the caller's MLflow settings."""
    for name in [name for name in os.environ if name.startswith("MLFLOW_") and name not in connection.ENVIRONMENT]:
        monkeypatch.delenv(name)
    for name in (tracking.PARENT_VARIABLE, "RANK"):
        monkeypatch.delenv(name, raising=False)
    folder.mkdir(parents=True, exist_ok=True)
    monkeypatch.chdir(folder)
    shutil.copy(_template(), folder / "mlflow.db")


def runs_of(folder, experiment="graftrec"):
    """Name -> run, of a store in `folder`."""
    client = tracking.connect(f"sqlite:///{folder}/mlflow.db")
    found = client.get_experiment_by_name(experiment)
    return {} if found is None else {run.info.run_name: run for run in client.search_runs([found.experiment_id])}
