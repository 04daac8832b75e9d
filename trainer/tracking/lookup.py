"""What a store says of a run."""

import datetime as dt
from dataclasses import dataclass

from trainer.tracking.connection import connect, translated
from trainer.tracking.models import models_of


@dataclass(frozen=True)
class RunFacts:
    """A run by its id. `started`: ISO 8601 in UTC; `tags`: ours, without their prefix."""

    id: str
    name: str
    status: str
    started: str
    tags: dict[str, str]


def run_of_model(digest: str) -> str:
    """The id of the run that trained the model of a hash; "" where the store doesn't know. Raises TrackingError."""
    client = connect()
    with translated("can't search models"):
        return next((str(one.source_run_id) for one in models_of(client, digest) if one.source_run_id), "")


def run_facts(run_id: str) -> RunFacts | None:
    """None where the store has no such run. Raises TrackingError."""
    client = connect()
    from mlflow.exceptions import MlflowException

    with translated(f"can't read run {run_id}"):
        try:
            run = client.get_run(run_id)
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return None
            raise
    started = dt.datetime.fromtimestamp(run.info.start_time / 1000, dt.UTC).isoformat(timespec="seconds")
    ours = {
        name.removeprefix("graftrec."): value for name, value in run.data.tags.items() if name.startswith("graftrec.")
    }
    return RunFacts(run_id, run.info.run_name, run.info.status, started, ours)
