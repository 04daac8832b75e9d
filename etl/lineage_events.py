"""OpenLineage events of jobs, by the official client: START, then COMPLETE or FAIL, with tables, versions and rows.

They are sent where the client's own variables say so (OPENLINEAGE_URL, OPENLINEAGE_CONFIG or OPENLINEAGE__TRANSPORT__…;
https://openlineage.io/docs/client/python), to jobs of the namespace $OPENLINEAGE_NAMESPACE (graftrec). A server that
does not answer is a warning: the tables don't depend on it. Needs ``pip install graftrec[lineage]``.
"""

import datetime as dt
import functools
import os
import sys
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlparse

from etl.plain_path import absolute
from etl.redaction import one_line, redact
from etl.settings import ConfigError

_VARIABLES = ("OPENLINEAGE_URL", "OPENLINEAGE_CONFIG")
_TRANSPORT = "OPENLINEAGE__TRANSPORT__"
NAMESPACE, DEFAULT_NAMESPACE = "OPENLINEAGE_NAMESPACE", "graftrec"
PRODUCER = "https://github.com/graftrec"


@dataclass
class JobRun:
    """What one run of a job has read and written: (place, version, rows) of each dataset."""

    inputs: list[tuple[str, int | None]] = field(default_factory=list)
    outputs: list[tuple[str, int | None, int]] = field(default_factory=list)


def wanted() -> bool:
    """Whether the environment asks for events."""
    if os.environ.get("OPENLINEAGE_DISABLED", "").lower() == "true":
        return False
    return any(os.environ.get(name) for name in _VARIABLES) or any(name.startswith(_TRANSPORT) for name in os.environ)


def check() -> None:
    """Raise ConfigError where events are wanted, and the client isn't installed."""
    if wanted():
        try:
            import openlineage.client  # noqa: F401
        except ImportError:
            raise ConfigError(
                "OPENLINEAGE_…: expected the package openlineage-python, which sends these events, found none; run "
                "`pip install graftrec[lineage]`, or unset the variables"
            ) from None


def table_place(lake: str, table: str) -> str:
    """A table of a lake, as events name it."""
    return f"{absolute(lake).rstrip('/')}/{table}"


@contextmanager
def traced(name: str, inputs: Mapping[str, int | None]) -> Iterator[JobRun]:
    """Send the events of a run of the job `name`. `inputs`: place -> version. What is written is added within."""
    run = JobRun(list(inputs.items()))
    if not wanted():
        yield run
        return
    run_id = str(uuid.uuid4())
    _send("START", name, run_id, run)
    try:
        yield run
    except BaseException as error:
        _send("FAIL", name, run_id, run, error)
        raise
    _send("COMPLETE", name, run_id, run)


def _send(state: str, name: str, run_id: str, run: JobRun, error: BaseException | None = None) -> None:
    try:
        client = _client()
        from openlineage.client.event_v2 import InputDataset, Job, OutputDataset, Run, RunEvent, RunState
        from openlineage.client.facet_v2 import (
            dataset_version_dataset,
            error_message_run,
            output_statistics_output_dataset,
        )

        def facets(version: int | None) -> dict[str, Any]:
            return (
                {} if version is None else {"version": dataset_version_dataset.DatasetVersionDatasetFacet(str(version))}
            )

        statistics = output_statistics_output_dataset.OutputStatisticsOutputDatasetFacet
        failure = (
            {} if error is None else {"errorMessage": error_message_run.ErrorMessageRunFacet(one_line(error), "python")}
        )
        client.emit(
            RunEvent(
                eventType=getattr(RunState, state),
                eventTime=dt.datetime.now(dt.UTC).isoformat(),
                run=Run(run_id, failure),
                job=Job(os.environ.get(NAMESPACE, DEFAULT_NAMESPACE), name),
                inputs=[InputDataset(*_named(place), facets=facets(version)) for place, version in run.inputs],
                outputs=[
                    OutputDataset(
                        *_named(place), {"outputStatistics": statistics(rowCount=rows)}, facets=facets(version)
                    )
                    for place, version, rows in run.outputs
                ],
                producer=PRODUCER,
            )
        )
    except Exception as problem:
        _warn(one_line(problem))


@functools.cache
def _client() -> Any:
    from openlineage.client import OpenLineageClient

    return OpenLineageClient()


@functools.cache  # each problem once
def _warn(problem: str) -> None:
    print(
        redact(f"lineage: OpenLineage did not take an event ({problem}); the job goes on"), file=sys.stderr, flush=True
    )


def _named(place: str) -> tuple[str, str]:
    """Namespace and name of a dataset, as OpenLineage names files and objects."""
    found = urlparse(redact(place))
    if not found.scheme or found.scheme == "file":
        return "file", found.path if found.scheme else place
    return f"{found.scheme}://{found.netloc}", found.path.lstrip("/")
