"""All artifacts of a store, to be searched and changed: of runs, deleted ones too, and of models."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

from trainer.tracking.connection import connect, translated

_PAGE = 1_000
LAKE = "graftrec.lake"  # tag of a run: the lake of the release that it read


@dataclass(frozen=True)
class ArtifactRoot:
    """A folder of artifacts. `what` it belongs to, as a reader names it; `lake`: of the run, "" where that is
    unknown."""

    what: str
    uri: str
    lake: str

    @property
    def folder(self) -> Path | None:
        """On this machine; None where a server has it."""
        place = urlparse(self.uri)
        return Path(unquote(place.path)) if place.scheme in ("", "file") else None


def artifact_roots() -> list[ArtifactRoot]:
    """Of every run and logged model of the store in use. Raises TrackingError."""
    client = connect()
    from mlflow.entities import ViewType

    found: dict[str, ArtifactRoot] = {}
    with translated("can't list runs and models"):
        experiments = [one.experiment_id for one in _pages(client.search_experiments, view_type=ViewType.ALL)]
        lakes: dict[str, str] = {}
        for run in _pages(client.search_runs, experiments, run_view_type=ViewType.ALL) if experiments else ():
            lakes[run.info.run_id] = run.data.tags.get(LAKE, "")
            what = f"run {run.info.run_name} ({run.info.run_id})"
            found[run.info.artifact_uri] = ArtifactRoot(what, run.info.artifact_uri, lakes[run.info.run_id])
        for model in _pages(client.search_logged_models, experiments) if experiments else ():
            what = f"model {model.name} ({model.model_id})"
            lake = lakes.get(model.source_run_id or "", "")
            found[model.artifact_location] = ArtifactRoot(what, model.artifact_location, lake)
    return list(found.values())


def _pages(search: Any, *given: Any, **named: Any) -> Iterator[Any]:
    token = None
    while True:
        page = search(*given, **named, page_token=token) if token else search(*given, **named)
        yield from page
        token = page.token
        if not token:
            return


@contextmanager
def editable(root: ArtifactRoot, suffixes: tuple[str, ...]) -> Iterator[Path]:
    """The root's files as a folder: in place on this machine; of a server a copy of the folders that hold files with
    these suffixes, whose changed files are sent back. Raises TrackingError."""
    if root.folder is not None:
        yield root.folder
        return
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    scratch = Path(tempfile.mkdtemp(prefix="graftrec-artifacts-"))
    try:
        with translated(f"can't fetch artifacts of {root.what}"):
            repository = get_artifact_repository(root.uri)
            folders = {str(Path(path).parent) for path in _listed(repository, "") if path.endswith(suffixes)}
            for folder in folders:
                for entry in repository.list_artifacts(None if folder == "." else folder):
                    if not entry.is_dir:
                        target = scratch / entry.path
                        target.parent.mkdir(parents=True, exist_ok=True)
                        shutil.copyfile(repository.download_artifacts(entry.path), target)
        before = {path: path.stat().st_mtime_ns for path in scratch.rglob("*") if path.is_file()}
        yield scratch
        with translated(f"can't change artifacts of {root.what}"):
            for path in scratch.rglob("*"):
                if path.is_file() and before.get(path) != path.stat().st_mtime_ns:
                    inside = str(path.parent.relative_to(scratch))
                    repository.log_artifact(str(path), None if inside == "." else inside)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _listed(repository: Any, folder: str) -> Iterator[str]:
    for entry in repository.list_artifacts(folder or None):
        if entry.is_dir:
            yield from _listed(repository, entry.path)
        else:
            yield entry.path
