"""The connection to an MLflow store, and its errors."""

import contextlib
import logging
import os
import sqlite3
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from etl.plain_path import plain_path
from etl.redaction import one_line, redact
from etl.settings import GraftrecError
from trainer.config import TrackingConfig
from trainer.tracking.store import prepare, sqlite_file

if TYPE_CHECKING:  # both are slow to import
    pass
from trainer.tracking.locks import file_lock

URI_VARIABLE = "MLFLOW_TRACKING_URI"


PARAM_CHARACTERS, TAG_CHARACTERS = 500, 5_000  # the shortest limits of the servers in use
DESCRIPTION = "mlflow.note.content"  # the tag that MLflow's page shows as a description, in Markdown
ERROR = "graftrec.error"  # tag of a run that failed: the line that says why


class TrackingError(GraftrecError):
    """MLflow can't do what is needed."""


class Unrecorded(TrackingError):
    """What MLflow did not take could not be kept either."""


# MLflow's chatter stays off the terminal, and a dead server is noticed in seconds. Each can be overridden.
ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "15",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
}


def tracking_uri() -> str:
    """$MLFLOW_TRACKING_URI, else the SQLite store of the working directory."""
    return os.environ.get(URI_VARIABLE) or f"sqlite:///{plain_path(Path.cwd())}/mlflow.db"


def local_folder(uri: str) -> Path | None:
    """The folder of a store that is files on this machine; None for a server."""
    if (database := sqlite_file(uri)) is not None:
        return database.parent
    return Path(uri.removeprefix("file://")).absolute() if uri.startswith("file://") or "://" not in uri else None


def is_there() -> bool:
    """Whether the store in use was made before: a file that isn't there is no store; a server is taken to be one."""
    database = sqlite_file(tracking_uri())
    return database is None or database.exists()


def quieten() -> None:
    """Settings for mlflow, to be made before it is first imported."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    logging.getLogger("mlflow").setLevel(logging.ERROR)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module=r"mlflow(\..*)?")


def connect(uri: str | None = None) -> Any:
    """An MlflowClient of the store. The first to come to a new SQLite store makes it, others wait (`tracking.store`).
    Whatever opens a store comes this way."""
    quieten()
    from mlflow import MlflowClient

    logging.getLogger("mlflow").setLevel(logging.ERROR)  # mlflow has set its own level when it was imported
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)  # tracebacks of what is raised anyhow
    uri = uri or tracking_uri()
    if (database := sqlite_file(uri)) is not None:
        prepare(database, _make_store, lambda: file_lock(database.with_name(f"{database.name}.lock"), wait=False))
    client = MlflowClient(tracking_uri=uri, registry_uri=uri)
    if (folder := local_folder(uri)) is not None:
        folder.mkdir(parents=True, exist_ok=True)
        client.search_experiments(max_results=1)
    return client


def _make_store(database: Path) -> None:
    from mlflow.store.tracking import DEFAULT_LOCAL_FILE_AND_ARTIFACT_PATH
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    store = SqlAlchemyStore(f"sqlite:///{database}", DEFAULT_LOCAL_FILE_AND_ARTIFACT_PATH)
    store.engine.dispose()


@contextlib.contextmanager
def translated(what: str) -> Iterator[None]:
    """Turn what MLflow raises, or what its answers let us raise, into a TrackingError: "<what>: <its reason>"."""
    from google.protobuf.json_format import ParseError  # type: ignore[import-untyped]
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (MlflowException, SQLAlchemyError, sqlite3.Error, OSError) as error:
        raise TrackingError(redact(f"{what}: {one_line(error)} (store: {tracking_uri()})")) from None
    except (ParseError, ValueError, TypeError, AttributeError, LookupError, ArithmeticError, RecursionError) as error:
        raise TrackingError(
            redact(
                f"{what}: expected an answer of MLflow, found another ({type(error).__name__}: "
                f"{one_line(error, 150)}); see what answers there (store: {tracking_uri()})"
            )
        ) from None


def experiment_id(client: Any, config: TrackingConfig) -> str:
    """The experiment of $MLFLOW_EXPERIMENT_ID or $MLFLOW_EXPERIMENT_NAME, else the configured one, made if need be."""
    if chosen := os.environ.get("MLFLOW_EXPERIMENT_ID"):
        return chosen
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or config.experiment
    found = client.get_experiment_by_name(name)
    if found is None:
        location = None if os.environ.get(URI_VARIABLE) else (Path.cwd() / "mlartifacts").as_uri()
        tags = {_EXPERIMENT_KIND: _MODEL_TRAINING, DESCRIPTION: _EXPERIMENT_DESCRIPTION}
        try:
            return str(client.create_experiment(name, artifact_location=location, tags=tags))
        except Exception:  # made by another process meanwhile?
            found = client.get_experiment_by_name(name)
            if found is None:
                raise
    if found.lifecycle_stage == "deleted":
        client.restore_experiment(found.experiment_id)
    if _EXPERIMENT_KIND not in found.tags:
        with contextlib.suppress(Exception):  # an experiment that others may only read
            client.set_experiment_tag(found.experiment_id, _EXPERIMENT_KIND, _MODEL_TRAINING)
    return str(found.experiment_id)


# MLflow's page has two modes, for language models and for training. Versions that do not leave the choice to the
# browser (3.17 does) read it from this tag.
_EXPERIMENT_KIND, _MODEL_TRAINING = "mlflow.experimentKind", "custom_model_development"
_EXPERIMENT_DESCRIPTION = "Sort runs by `best/NDCG_10` (validation) or `test/full/NDCG_10`; a pipeline holds the table."


# Errors that the same request will meet again; all others are tried again.
FINAL = {
    "INVALID_PARAMETER_VALUE",
    "RESOURCE_DOES_NOT_EXIST",
    "PERMISSION_DENIED",
    "UNAUTHENTICATED",
    "INVALID_STATE",
    "BAD_REQUEST",
    "ENDPOINT_NOT_FOUND",
    "RESOURCE_ALREADY_EXISTS",
    "MALFORMED_REQUEST",
}
