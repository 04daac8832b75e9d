"""MLflow: runs, and the connection that `registry.py` uses. The only module that imports mlflow.

Without MLFLOW_TRACKING_URI everything lies in the working directory: `mlflow.db` (SQLite) and `mlartifacts/`.
mlflow is imported by the thread that talks to it (about two seconds), so a command starts at once. Only rank 0 tracks.
"""

import contextlib
import fcntl
import getpass
import hashlib
import json
import logging
import math
import os
import re
import shutil
import signal
import socket
import sqlite3
import sys
import tempfile
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import quote

import psutil
import pyarrow as pa
import yaml

from etl.config import GraftrecError, Section
from etl.plain_path import plain_path
from etl.redaction import redact, without_secrets
from etl.tables import TABLES
from trainer.config import TrackingConfig
from trainer.outbox import METRICS_PER_BATCH, Entry, Outbox, Refused, keep, kept, one_line, warn
from trainer.provenance import code_version, cut, flatten
from trainer.store import has_running, prepare, sqlite_file

if TYPE_CHECKING:  # both are slow to import
    from matplotlib.figure import Figure

    from trainer.data.dataset import Release

URI_VARIABLE = "MLFLOW_TRACKING_URI"
JOINED_VARIABLE = "MLFLOW_RUN_ID"  # set by `mlflow run`
PARENT_VARIABLE = "GRAFTREC_PARENT_RUN"  # set for the processes a run starts
UNSENT = Path("mlflow-unsent")  # what a dead server did not take, until it does

PARAM_CHARACTERS, TAG_CHARACTERS = 500, 5_000  # the shortest limits of the servers in use
DESCRIPTION = "mlflow.note.content"  # the tag that MLflow's page shows as a description, in Markdown
ERROR = "graftrec.error"  # tag of a run that failed: the line that says why
MODEL_HASH = "graftrec.hash"  # tag of a logged model: the hash of its model folder
THUMBNAIL_PIXELS = 640  # width of a picture in a description, beside which a run's facts have room
REUSED_SHOWN = 30  # earlier runs that a description links
VERSIONS = "mlflow.modelVersions"  # tag of a logged model: the registered versions made of it, as JSON
PARAMS_PER_BATCH = 100
TERMINATED_EXIT = 128 + signal.SIGTERM


class TrackingError(GraftrecError):
    """MLflow can't do what was asked."""


class Untold(TrackingError):
    """What MLflow did not take could not be kept either."""


# --- the connection ---------------------------------------------

# MLflow's chatter stays off the terminal, and a dead server is noticed in seconds. Each can be overridden.
_ENVIRONMENT = {
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


def quieten() -> None:
    """Settings for mlflow, to be made before it is first imported."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    logging.getLogger("mlflow").setLevel(logging.ERROR)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module=r"mlflow(\..*)?")


def connect(uri: str | None = None) -> Any:
    """An MlflowClient of the store. The first to come to a new SQLite store makes it, others wait (`trainer.store`).
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
def file_lock(path: Path, *, wait: bool = True) -> Iterator[bool]:
    """Hold an exclusive lock on a file; the kernel frees it when its holder dies. Yields False where another has it."""
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        try:
            yield True
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)


@contextlib.contextmanager
def translated(what: str) -> Iterator[None]:
    """Turn what MLflow raises into a TrackingError of one line: "<what>: <its reason>"."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (MlflowException, SQLAlchemyError, sqlite3.Error, OSError) as error:
        raise TrackingError(redact(f"{what}: {one_line(error)} (store: {tracking_uri()})")) from None


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


# --- runs ---------------------------------------------


class Run:
    """One MLflow run. This base class tracks nothing: it is what other ranks, and runs with tracking off, get.

    No method raises, and only `id` may wait, for the run to be made.
    """

    id: str = ""  # "" where there is none

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Settings; a value is kept as text, cut at 500 characters."""

    def log_metrics(self, metrics: Mapping[str, float], *, step: int | None = None) -> None:
        """Numbers by name, e.g. {"validation/full/NDCG@10": 0.18}. MLflow forbids "@": it becomes "_".

        Without a step a number stands for the whole run. Its name must not be that of a curve, which would begin with
        it, since MLflow puts it at step 0: such a number is dropped with a warning.
        """

    def log_history(self, lines: Sequence[tuple[int, Mapping[str, float]]]) -> None:
        """(step, metrics) of a run that is gone on with: what a killed process did not get sent is logged."""

    def set_tags(self, tags: Mapping[str, Any]) -> None:
        """Short texts by name."""

    def log_figure(self, figure: "Figure", path: str) -> None:
        """A picture as PNG at `path` ("curves/learning.png") among the run's artifacts."""

    def log_thumbnail(self, picture: Path, path: str) -> None:
        """A PNG file, scaled down to THUMBNAIL_PIXELS, at `path`. For descriptions, where pictures keep their size."""

    def log_text(self, text: str, path: str) -> None:
        """A text file at `path` among the run's artifacts."""

    def log_artifact(self, path: str | Path, folder: str = "") -> None:
        """A file or folder, put in `folder` among the run's artifacts. It must stay unchanged until the run ends."""

    def log_release(self, release: "Release", *, context: str = "training", tables: Sequence[str] = ()) -> None:
        """Snapshots of a release as parameters, and as dataset inputs those of `tables` (of all, where none is named).

        The dataset of a table is called <table>@<version>.
        """

    def describe(self, markdown: str) -> None:
        """The run's description, instead of an earlier one. Two kinds of addresses are resolved when it is sent:
        `model:<hash of a model folder>` (`model_link`) and `artifact:<path>`, a picture among the run's artifacts."""

    def note_reused(self, name: str, run_id: str) -> None:
        """List an earlier run in the description: this run uses its result instead of doing the work again."""

    def log_model(self, name: str, digest: str, *, kind: str = "", params: Mapping[str, Any] | None = None) -> None:
        """A logged model that this run trained, found by the hash of its model folder; its description is the run's.

        It holds no files until it is registered.
        """

    def log_model_metrics(
        self, digest: str, metrics: Mapping[str, float], release: "Release", table: str
    ) -> None:  # fmt: skip
        """Metrics of a logged model on a snapshot, shown on its page and on the page of the run that trained it.

        Nothing happens where the store has no logged model of that hash.
        """


_active: list[Run] = []


def note_reused(name: str, run_id: str) -> None:
    """Note in the active run, if any, that a step reused the result of an earlier run ("": unknown, not noted)."""
    if _active and run_id:
        _active[-1].note_reused(name, run_id)


def run_link(name: str, run_id: str) -> str:
    """A Markdown link to a run, for descriptions."""
    return f"[{name}](#/runs/{run_id})"


def model_link(name: str, digest: str) -> str:
    """A Markdown link to the logged model of a model folder, for descriptions; plain text where there is none."""
    return f"[{name}](model:{digest})"


@contextlib.contextmanager
def start_run(
    config: TrackingConfig,
    *,
    name: str,
    resolved: Section,
    release: "Release | None" = None,
    parent_run_id: str | None = None,
    resumed: str = "",
    uid: str = "",
    tags: Mapping[str, str] | None = None,
    description: str = "",
    tables: Sequence[str] = (),
    context: str = "training",
    told_again: bool = False,
) -> Iterator[Run]:
    """Track what happens inside: configuration, snapshots, code version, system metrics, and how it ended.

    Under `mlflow run` (MLFLOW_RUN_ID) the run that it made is joined, and otherwise `resumed`, the id of an earlier run
    of the same work, where the store still has it; or the run that was started with the same `uid` (32 hex digits),
    which is known before the server answers. A run started inside another, or in a process given
    `child_environment()`, is its child. `description` as in `Run.describe`, `tables` (that the run reads) and
    `context` as in `Run.log_release`. An exception ends the run as FAILED with the error's line as the tag
    `graftrec.error`; SIGTERM and Ctrl-C end it as KILLED. `told_again`: the same command tells all again unless this
    ends well, so it raises Untold where what MLflow did not take can't be kept.
    """
    if not config.enabled or int(os.environ.get("RANK", "0")) != 0:
        yield Run()
        return
    parent = parent_run_id or (_active[-1].id if _active else os.environ.get(PARENT_VARIABLE)) or None
    joined = os.environ.pop(JOINED_VARIABLE, None)
    run = _TrackedRun(config, _header(name, parent, joined, resumed, uid))
    settings = without_secrets(resolved.model_dump(mode="json"))
    run.log_params(flatten(settings))
    run.log_text(yaml.safe_dump(settings, sort_keys=False, allow_unicode=True), "config.yaml")
    run.set_tags({f"graftrec.code.{key}": value for key, value in code_version().items()} | dict(tags or {}))
    if release is not None:
        run.log_release(release, context=context, tables=tables)
    if description:
        run.describe(description)
    status, lost = "FINISHED", ""
    _active.append(run)
    try:
        with _terminable():
            yield run
    except BaseException as error:
        status = _status(error)
        if status != "FINISHED":
            run.set_tags({ERROR: one_line(error) or status})
        elif isinstance(error, GraftrecError):
            run.set_tags({"graftrec.ended": one_line(error)})
        raise
    finally:
        _active.remove(run)
        lost = run.close(status)
    if lost and told_again:
        raise Untold(
            f"expected room to keep what MLflow did not take, found none ({lost}); make room, and run the same command "
            "again: the work is done, and is told then"
        )


def settle(config: TrackingConfig) -> None:
    """Send what earlier runs could not, and end those whose process is gone: for a command that finds its work done.
    Inside a run nothing is to be done, since that run does it."""
    if not config.enabled or _active or int(os.environ.get("RANK", "0")) != 0:
        return
    uri = tracking_uri()
    if (database := sqlite_file(uri)) is not None and not kept(UNSENT.absolute()) and not has_running(database):
        return  # without the seconds that importing MLflow takes
    quieten()
    sender = _Sender(uri, config, {"uid": ""})
    outbox = Outbox(lambda entry: sender.settle())
    outbox.add({"kind": "settle"})
    outbox.close(config.close_seconds)


def child_environment(run: Run) -> dict[str, str]:
    """The environment for a process whose run shall be a child of `run`."""
    environment = {key: value for key, value in os.environ.items() if key not in (JOINED_VARIABLE, PARENT_VARIABLE)}
    return environment | ({PARENT_VARIABLE: run.id} if run.id else {})


def _status(error: BaseException) -> str:
    if isinstance(error, KeyboardInterrupt):
        return "KILLED"
    if isinstance(error, GraftrecError):
        return {0: "FINISHED", TERMINATED_EXIT: "KILLED"}.get(error.exit_code, "FAILED")
    if isinstance(error, SystemExit):
        return {None: "FINISHED", 0: "FINISHED", TERMINATED_EXIT: "KILLED", 130: "KILLED"}.get(error.code, "FAILED")  # type: ignore[arg-type]
    return "FAILED"


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Let SIGTERM end the run properly, where nobody else (the training loop) handles it."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise SystemExit(TERMINATED_EXIT)

    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


class _TrackedRun(Run):
    """A run whose entries go through an outbox."""

    def __init__(self, config: TrackingConfig, header: Entry) -> None:
        quieten()
        self._config, self._uri = config, tracking_uri()
        self._header = header
        self._staging: Path | None = None
        self._sender = _Sender(self._uri, config, self._header)
        self._outbox = Outbox(self._sender.send)
        self._ended = threading.Event()
        self._curves: set[str] = set()
        self._description, self._reused = "", dict[str, str]()
        self._outbox.add({"kind": "tags", "values": {}})  # makes the run
        if config.system_metrics:
            threading.Thread(target=self._watch, name="system metrics", daemon=True).start()

    @property
    def id(self) -> str:  # type: ignore[override]
        """The run's id; waits for the run to be made, "" where the server does not answer."""
        self._sender.made.wait(self._config.close_seconds)
        return self._sender.run_id

    def log_params(self, params: Mapping[str, Any]) -> None:
        texts = [[metric_name(key), cut(redact(str(value)), PARAM_CHARACTERS)] for key, value in params.items()]
        for start in range(0, len(texts), PARAMS_PER_BATCH):
            self._outbox.add({"kind": "params", "values": dict(texts[start : start + PARAMS_PER_BATCH])})

    def log_metrics(self, metrics: Mapping[str, float], *, step: int | None = None) -> None:
        now = _now()
        named = {metric_name(key): float(value) for key, value in metrics.items()}
        if step is not None:
            self._curves |= named.keys()
        elif shared := sorted(self._curves & named.keys()):
            warn(f"dropped {', '.join(shared)}: a value without a step has the name of a curve; give it another one")
            named = {key: value for key, value in named.items() if key not in self._curves}
        if named:
            values = [[key, value, now, step or 0] for key, value in named.items()]
            self._outbox.add({"kind": "metrics", "values": values})

    def log_history(self, lines: Sequence[tuple[int, Mapping[str, float]]]) -> None:
        now = _now()
        values = [[metric_name(key), float(value), now, step] for step, line in lines for key, value in line.items()]
        self._curves |= {metric_name(key) for _, line in lines for key in line}
        for start in range(0, len(values), METRICS_PER_BATCH):
            self._outbox.add({"kind": "missing", "values": values[start : start + METRICS_PER_BATCH]})

    def set_tags(self, tags: Mapping[str, Any]) -> None:
        texts = {metric_name(key): cut(redact(str(value)), TAG_CHARACTERS) for key, value in tags.items()}
        self._outbox.add({"kind": "tags", "values": texts})

    def log_figure(self, figure: "Figure", path: str) -> None:
        with _harmless(f"can't log {path}"):
            file = self._staged(path)
            figure.savefig(file, dpi=130)
            self._artifact(file, path)

    def log_thumbnail(self, picture: Path, path: str) -> None:
        from PIL import Image

        with _harmless(f"can't log {path}"):
            file = self._staged(path)
            with Image.open(picture) as image:
                image.thumbnail((THUMBNAIL_PIXELS, 10 * THUMBNAIL_PIXELS))
                image.save(file)
            self._artifact(file, path)

    def log_text(self, text: str, path: str) -> None:
        with _harmless(f"can't log {path}"):
            file = self._staged(path)
            file.write_text(redact(text))
            self._artifact(file, path)

    def log_artifact(self, path: str | Path, folder: str = "") -> None:
        self._outbox.add({"kind": "artifact", "path": str(Path(path).absolute()), "folder": folder})

    def log_release(self, release: "Release", *, context: str = "training", tables: Sequence[str] = ()) -> None:
        self.log_params({"pinned.release": release.number} | {f"pinned.{k}": v for k, v in release.versions.items()})
        self.set_tags({"graftrec.release": release.number, "graftrec.lake": redact(release.lake)})
        read = [table for table in tables or release.versions if table in release.versions]
        values = [snapshot(release, table) for table in read]
        self._outbox.add({"kind": "datasets", "values": values, "context": context})

    def describe(self, markdown: str) -> None:
        self._description = markdown
        self._send_description()

    def note_reused(self, name: str, run_id: str) -> None:
        self._reused[name] = run_id
        self.set_tags({"graftrec.reused": json.dumps(self._reused)})
        self._send_description()

    def _send_description(self) -> None:
        links = ", ".join(run_link(name, run_id) for name, run_id in list(self._reused.items())[:REUSED_SHOWN])
        if len(self._reused) > REUSED_SHOWN:
            links += f" and {len(self._reused) - REUSED_SHOWN} others (tag `graftrec.reused`)"
        first, _, rest = self._description.partition("\n\n")
        parts = [first, f"Reused, since nothing they depend on has changed: {links}." if links else "", rest]
        self._outbox.add({"kind": "description", "text": redact("\n\n".join(filter(None, parts)))})

    def log_model(self, name: str, digest: str, *, kind: str = "", params: Mapping[str, Any] | None = None) -> None:
        texts = {metric_name(key): cut(redact(str(value)), PARAM_CHARACTERS) for key, value in (params or {}).items()}
        self._outbox.add({"kind": "model", "name": name, "hash": digest, "type": kind, "params": texts})
        self._send_description()  # of the model too

    def log_model_metrics(
        self, digest: str, metrics: Mapping[str, float], release: "Release", table: str
    ) -> None:  # fmt: skip
        now = _now()
        values = [[metric_name(k), float(v), now, 0] for k, v in metrics.items() if math.isfinite(v)]
        dataset = snapshot(release, table)
        self._outbox.add({"kind": "model_metrics", "hash": digest, "values": values, "dataset": dataset})

    def close(self, status: str) -> str:
        """End the run. Returns why what MLflow did not take is lost; "": it took all, or the rest is kept."""
        self._ended.set()
        self._outbox.add({"kind": "end", "status": status, "time": _now()})
        left, lost = self._outbox.close(self._config.close_seconds), ""
        if left:
            folder = UNSENT.absolute() / f"{self._header['uid']}-{self._header['start']}"
            try:
                keep(folder, self._header | {"run_id": self._sender.run_id, "uri": _fingerprint(self._uri)}, left)
                warn(f"kept what MLflow did not take in {folder}; the next run sends it")
            except Exception as error:
                lost = one_line(error)
                warn(f"can't keep what MLflow did not take: {lost}")
                shutil.rmtree(folder, ignore_errors=True)
        if self._staging is not None:
            shutil.rmtree(self._staging, ignore_errors=True)
        return lost

    def _staged(self, path: str) -> Path:
        self._staging = self._staging or Path(tempfile.mkdtemp(prefix="graftrec-tracking-"))
        file = self._staging / uuid.uuid4().hex / Path(path).name
        file.parent.mkdir()
        return file

    def _artifact(self, file: Path, path: str) -> None:
        folder = str(Path(path).parent)
        self.log_artifact(file, "" if folder == "." else folder)

    def _watch(self) -> None:
        """System metrics under the names that MLflow's page knows."""
        me, step = psutil.Process(), 0
        sent, received = _network()
        psutil.cpu_percent()
        while not self._ended.wait(self._config.system_metrics_seconds):
            with contextlib.suppress(psutil.Error):
                memory, (sent_now, received_now) = psutil.virtual_memory(), _network()
                values = {
                    "cpu_utilization_percentage": psutil.cpu_percent(),
                    "system_memory_usage_megabytes": memory.used / 1e6,
                    "system_memory_usage_percentage": memory.percent,
                    "process_memory_usage_megabytes": me.memory_info().rss / 1e6,
                    "disk_usage_percentage": psutil.disk_usage(".").percent,
                    "network_transmit_megabytes": (sent_now - sent) / 1e6,
                    "network_receive_megabytes": (received_now - received) / 1e6,
                }
                self.log_metrics({f"system/{key}": value for key, value in values.items()}, step=step)
            step += 1


@contextlib.contextmanager
def _harmless(what: str) -> Iterator[None]:
    """A full disk, or a picture that can't be drawn, is told and no more."""
    try:
        yield
    except Exception as error:
        warn(f"{what}: {one_line(error)}")


def snapshot(release: "Release", table: str) -> dict[str, Any]:
    """One table of a release: {table, version, lake}."""
    return {"table": table, "version": release.versions.get(table, 0), "lake": redact(release.lake)}


def _network() -> tuple[int, int]:
    counters = psutil.net_io_counters()
    return (counters.bytes_sent, counters.bytes_recv) if counters else (0, 0)


def _now() -> int:
    return int(time.time() * 1000)


def metric_name(text: str) -> str:
    """A name that MLflow takes: what it forbids becomes "_"."""
    return re.sub(r"[^\w\-. :/]", "_", text, flags=re.ASCII)


def _fingerprint(uri: str) -> str:
    if (database := sqlite_file(uri)) is not None and database.parent.is_symlink():  # plain_path's, of one process
        uri = f"sqlite:///{database.parent.readlink() / database.name}"
    return hashlib.sha256(uri.encode()).hexdigest()[:16]


def _header(name: str, parent: str | None, joined: str | None, resumed: str, uid: str) -> Entry:
    """Everything needed to make the run, whenever the server answers."""
    uid = uid or uuid.uuid4().hex
    tags = {
        "graftrec.uid": uid,
        "graftrec.host": socket.gethostname(),
        "graftrec.process": _process(psutil.Process()),
        "mlflow.source.name": redact(" ".join([Path(sys.argv[0]).name or "python", *sys.argv[1:]]))[:TAG_CHARACTERS],
        "mlflow.source.type": "LOCAL",
    }
    with contextlib.suppress(Exception):  # no name for this user id, as in some containers
        tags["mlflow.user"] = getpass.getuser()
    if commit := code_version().get("commit"):
        tags["mlflow.source.git.commit"] = commit.removesuffix("+")
    if parent:
        tags["mlflow.parentRunId"] = parent
    return {"uid": uid, "name": name, "tags": tags, "start": _now(), "joined": joined, "resumed": resumed}


def _process(process: psutil.Process) -> str:
    return f"{process.pid}@{process.create_time():.0f}"


class _Sender:
    """Sends entries of one run; makes or joins the run first."""

    def __init__(self, uri: str, config: TrackingConfig, header: Entry, run_id: str = "") -> None:
        self._uri, self._config, self._header = uri, config, header
        self._client: Any = None
        self.run_id = run_id
        self.made = threading.Event()
        self._known_params: set[str] = set()
        self._models: list[str] = []  # ids of logged models that this run made

    def send(self, entry: Entry) -> None:
        """Send one entry. Raises Refused where the server says that it never will be taken."""
        from mlflow.exceptions import MlflowException

        try:
            if not self.made.is_set():
                self._open()
            self._send(entry)
        except MlflowException as error:
            if error.error_code in _FINAL:
                raise Refused(one_line(error)) from None
            raise
        except (TypeError, AttributeError, LookupError) as error:  # a mistake of ours, which waiting does not mend
            raise Refused(repr(error)) from None

    def _open(self) -> None:
        if self._client is None:
            self._client = connect(self._uri)
        header = self._header
        self._send_kept(own=True)
        old = header["joined"] or self._still_there(header.get("resumed", ""))
        if not old:
            experiment = experiment_id(self._client, self._config)
            # One that was made although the answer got lost, or by a process that was killed, is found by its uid.
            made = self._client.search_runs([experiment], f"tags.`graftrec.uid` = '{header['uid']}'", max_results=1)
            old = made[0].info.run_id if made else ""
        if old:
            joined = self._client.get_run(old)
            self.run_id, self._known_params = joined.info.run_id, set(joined.data.params)
            experiment = joined.info.experiment_id
            own = {k: v for k, v in header["tags"].items() if not k.startswith("mlflow.") or k == "mlflow.parentRunId"}
            self._send({"kind": "tags", "values": own})
            if ERROR in joined.data.tags:  # of an earlier process
                self._client.delete_tag(self.run_id, ERROR)
            self._client.update_run(self.run_id, status="RUNNING")
        else:
            run = self._client.create_run(
                experiment, start_time=header["start"], tags=header["tags"], run_name=header["name"]
            )
            self.run_id = run.info.run_id
        self.made.set()
        self._send_kept(own=False)
        end_abandoned(self._client, experiment)

    def settle(self) -> None:
        """Do what the next run would do for earlier ones."""
        self._client = self._client or connect(self._uri)
        self._send_kept(own=False)
        end_abandoned(self._client, experiment_id(self._client, self._config))

    def _still_there(self, run_id: str) -> str:
        """The id of an earlier run; "" where there was none, or the store has lost it."""
        from mlflow.exceptions import MlflowException

        if not run_id:
            return ""
        try:
            return run_id if self._client.get_run(run_id).info.lifecycle_stage == "active" else ""
        except MlflowException as error:
            if error.error_code in _FINAL:
                return ""
            raise

    def _send(self, entry: Entry) -> None:
        from mlflow.entities import Metric, Param, RunTag

        values: Any = entry.get("values")
        if entry["kind"] == "artifact" and not Path(entry["path"]).exists():
            raise Refused(f"{entry['path']} is not there")
        match entry["kind"]:
            case "metrics":
                self._client.log_batch(self.run_id, metrics=[Metric(*value) for value in values])
            case "missing":
                known = {name: self._client.get_metric_history(self.run_id, name) for name in {v[0] for v in values}}
                steps = {(name, metric.step) for name, metrics in known.items() for metric in metrics}
                if new := [Metric(*value) for value in values if (value[0], value[3]) not in steps]:
                    self._client.log_batch(self.run_id, metrics=new)
            case "params":
                # `mlflow run` has logged its own parameters to a joined run, and a parameter can't change.
                params = [Param(key, value) for key, value in values.items() if key not in self._known_params]
                self._client.log_batch(self.run_id, params=params)
            case "tags" if values:
                self._client.log_batch(self.run_id, tags=[RunTag(key, value) for key, value in values.items()])
            case "artifact" if Path(entry["path"]).is_dir():
                self._client.log_artifacts(self.run_id, entry["path"], entry["folder"] or None)
            case "artifact":
                self._client.log_artifact(self.run_id, entry["path"], entry["folder"] or None)
            case "datasets":
                self._client.log_inputs(self.run_id, datasets=[_dataset_input(v, entry["context"]) for v in values])
            case "description":
                text = cut(resolved(self._client, entry["text"], self.run_id), TAG_CHARACTERS)
                self._client.set_tag(self.run_id, DESCRIPTION, text)
                for model in self._models:
                    self._client.set_logged_model_tags(model, {DESCRIPTION: text})
            case "model":
                self._models.append(self._log_model(entry))
            case "model_metrics":
                log_model_metrics(self._client, entry["hash"], values, entry["dataset"])
            case "end":
                self._client.set_terminated(self.run_id, entry["status"], entry["time"])

    def _log_model(self, entry: Entry) -> str:
        """Make the logged model of this run, or find it where the answer got lost; gives its id."""
        from mlflow.entities import LoggedModelOutput

        made = next((m for m in models_of(self._client, entry["hash"]) if m.source_run_id == self.run_id), None)
        if made is None:
            made = self._client.create_logged_model(
                self._client.get_run(self.run_id).info.experiment_id, name=model_name(entry["name"]),
                source_run_id=self.run_id, tags={MODEL_HASH: entry["hash"]}, params=entry["params"],
                model_type=entry["type"] or None,
            )  # fmt: skip
        self._client.log_outputs(self.run_id, [LoggedModelOutput(made.model_id, 0)])
        self._client.finalize_logged_model(made.model_id, "READY")
        return str(made.model_id)

    def _send_kept(self, *, own: bool) -> None:
        """Send what earlier processes could not: of this very run (`own`), before it is gone on with, or of others.
        Nothing here may stop this run's own entries."""
        for folder, header, entries in kept(UNSENT.absolute()):
            if header.pop("uri") != _fingerprint(self._uri) or own != (header["uid"] == self._header["uid"]):
                continue
            with file_lock(folder / "lock", wait=False) as mine:
                if not mine or not (folder / "unsent.json").exists():
                    continue
                sender = _Sender(self._uri, self._config, header, header.pop("run_id"))
                if sender.run_id:
                    sender._client = self._client
                    sender.made.set()
                for entry in entries:
                    with contextlib.suppress(Refused):
                        sender.send(entry)
                shutil.rmtree(folder, ignore_errors=True)


# Errors that the same request will meet again; all others are tried again.
_FINAL = {
    "INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST", "PERMISSION_DENIED", "UNAUTHENTICATED", "INVALID_STATE",
    "BAD_REQUEST", "ENDPOINT_NOT_FOUND", "RESOURCE_ALREADY_EXISTS", "MALFORMED_REQUEST",
}  # fmt: skip


def _dataset_input(value: Mapping[str, Any], context: str) -> Any:
    from mlflow.entities import DatasetInput, InputTag

    return DatasetInput(_dataset(value), [InputTag("mlflow.data.context", context)])


def _dataset(value: Mapping[str, Any]) -> Any:
    """A dataset that is one version of one Delta table.

    Made by hand: MLflow's own DeltaDatasetSource drops version 0.
    """
    from mlflow.entities import Dataset

    path = f"{value['lake'].rstrip('/')}/{value['table']}"
    source = {"path": path, "delta_table_version": value["version"], "is_databricks_uc_table": False}
    digest = hashlib.sha256(f"{path}@{value['version']}".encode()).hexdigest()[:8]
    return Dataset(
        f"{value['table']}@{value['version']}",
        digest,
        "delta_table",
        json.dumps(source),
        schema=_schema(value["table"]),
    )


_TYPES = {
    "string": "string",
    "int32": "integer",
    "int64": "long",
    "float": "float",
    "double": "double",
    "bool": "boolean",
}


def _schema(name: str) -> str | None:
    """The columns of a table as MLflow's page shows them; None for a table that is not of the contract."""
    table = TABLES.get(name)
    if table is None:
        return None

    def described(kind: pa.DataType) -> dict[str, Any]:
        if pa.types.is_list(kind):
            return {"type": "array", "items": described(kind.value_type)}
        if pa.types.is_struct(kind):
            return {"type": "object", "properties": {f.name: described(f.type) | {"required": True} for f in kind}}
        return {"type": _TYPES.get(str(kind), "string")}

    columns = [described(f.type) | {"name": f.name, "required": not f.nullable} for f in table.schema]
    return json.dumps({"mlflow_colspec": columns})


def end_abandoned(client: Any, experiment: str) -> int:
    """End, as KILLED, runs of this machine that say RUNNING though their process is gone. Returns how many."""
    host = socket.gethostname().replace("'", "")
    stale = client.search_runs(
        [experiment], f"attributes.status = 'RUNNING' AND tags.`graftrec.host` = '{host}'", max_results=100
    )
    ended = 0
    for run in stale:
        number, _, _started = run.data.tags.get("graftrec.process", "").partition("@")
        try:
            alive = _process(psutil.Process(int(number))) == run.data.tags["graftrec.process"]
        except (psutil.Error, ValueError):
            alive = False
        if not alive:
            client.set_tag(run.info.run_id, ERROR, "the process ended without a word (killed?)")
            client.set_terminated(run.info.run_id, "KILLED")
            ended += 1
    return ended


# --- models ---------------------------------------------


def models_of(client: Any, digest: str) -> list[Any]:
    """Logged models of a model folder by its hash, newest first."""
    experiments = [found.experiment_id for found in client.search_experiments(max_results=1_000)]
    found = client.search_logged_models(experiments, filter_string=f"tags.`{MODEL_HASH}` = '{digest}'", max_results=50)
    return sorted(found, key=lambda model: -model.creation_timestamp)


def log_model_metrics(
    client: Any, digest: str, values: Sequence[Sequence[Any]], dataset: Mapping[str, Any]
) -> None:  # fmt: skip
    """Metrics [name, value, time, step] of the newest logged model of a hash, on a snapshot {table, version, lake}; of
    the run that trained it too. What it has already is not logged again. Nothing where there is no such model, or its
    run is unknown."""
    from mlflow.entities import Metric

    model = next((model for model in models_of(client, digest) if model.source_run_id), None)
    if model is None:
        return
    on = _dataset(dataset)
    known = {(metric.key, metric.dataset_digest, metric.value) for metric in model.metrics or ()}
    metrics = [
        Metric(*value, model_id=model.model_id, dataset_name=on.name, dataset_digest=on.digest)
        for value in values
        if (value[0], on.digest, value[1]) not in known
    ]
    if metrics:
        client.log_batch(model.source_run_id, metrics=metrics)


def resolved(client: Any, markdown: str, run_id: str = "") -> str:
    """Markdown with addresses that a browser knows: `model:<hash>` of a logged model (plain text where there is none),
    `artifact:<path>` of the run."""
    from mlflow.exceptions import MlflowException

    def link(match: re.Match[str]) -> str:
        name, digest = match.groups()
        found = []
        try:
            found = models_of(client, digest)
        except MlflowException as error:
            if error.error_code not in _FINAL:  # else a server that knows no logged models
                raise
        return f"[{name}](#/experiments/{found[0].experiment_id}/models/{found[0].model_id})" if found else name

    text = re.sub(r"\[([^\]]*)\]\(model:(\w+)\)", link, markdown)
    return re.sub(r"\]\(artifact:([^)]+)\)", lambda m: f"](get-artifact?path={quote(m[1])}&run_uuid={run_id})", text)


def model_name(text: str) -> str:
    """A name that a logged model may have."""
    return re.sub(r"[/:.%\"']", "_", text) or "model"


_REQUIREMENTS = (  # of scoring: what trainer.serving imports
    "mlflow", "torch", "numpy", "pandas", "pyarrow", "deltalake", "scipy", "safetensors", "pydantic", "pyyaml",
    "psutil",
)  # fmt: skip


def pack(
    folder: Path, target: Path, *, artifact: str, model_id: str, run_id: str | None, example: Mapping[str, Any]
) -> None:  # fmt: skip
    """Write an MLflow model around a model folder: a copy of the folder, of our sources, and no pickle. `example`: one
    request, by column.

    The sources travel with it (`code_paths`), so that a served version runs the code that it was made by, on a machine
    that has only the packages of its requirements.txt.
    """
    import pandas as pd
    from mlflow.models import Model, ModelSignature
    from mlflow.pyfunc import save_model
    from mlflow.types.schema import Array, ColSpec, DataType, ParamSchema, ParamSpec, Schema

    root = Path(__file__).parent
    texts, numbers = Array(DataType.string), Array(DataType.double)
    signature = ModelSignature(
        Schema(
            [
                ColSpec(DataType.string, "user", required=False),
                ColSpec(texts, "items", required=False),
                ColSpec(texts, "event_types", required=False),
                ColSpec(Array(texts), "baskets", required=False),
            ]
        ),
        Schema(
            [
                ColSpec(texts, "items"),
                ColSpec(numbers, "scores"),
                ColSpec(DataType.string, "basis"),
                ColSpec(texts, "unknown"),
                ColSpec(DataType.string, "version"),
            ]
        ),
        ParamSchema([ParamSpec("k", DataType.long, 10), ParamSpec("domain", DataType.string, "")]),
    )
    requirements = [f"{name}=={version(name).partition('+')[0]}" for name in _REQUIREMENTS]
    save_model(
        str(target), python_model=str(root / "served.py"), artifacts={artifact: str(folder)}, signature=signature,
        code_paths=[str(root.parent / "etl"), str(root)], pip_requirements=requirements,
        mlflow_model=Model(model_id=model_id, run_id=run_id), input_example=pd.DataFrame([dict(example)]),
    )  # fmt: skip


def offer(load: Callable[[Path, str], Any], answer: Callable[[Any, list[dict[str, Any]], dict[str, Any]], Any]) -> None:
    """Tell MLflow what the model being loaded is: `load(folder, version label)`, then `answer` for each request.

    A GraftrecError of `answer` becomes a 400.
    """
    import pandas as pd
    from mlflow.exceptions import MlflowException
    from mlflow.models import set_model
    from mlflow.pyfunc import PythonModel

    class Served(PythonModel):  # type: ignore[misc]
        def load_context(self, context: Any) -> None:
            folder = Path(next(iter(context.artifacts.values())))
            self._state = load(folder, _label(folder))

        def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> Any:
            try:
                return answer(self._state, cast(list[dict[str, Any]], model_input.to_dict("records")), params or {})
            except GraftrecError as error:
                raise MlflowException.invalid_parameter_value(str(error)) from None

    set_model(Served())


def _label(folder: Path) -> str:
    """Registered name and version, which MLflow writes beside a model that it fetches by models:/<name>."""
    for parent in folder.parents:
        file = parent / "registered_model_meta"
        if file.is_file():
            meta = yaml.safe_load(file.read_text())
            return f"{meta['model_name']}/{meta['model_version']}"
        if (parent / "MLmodel").is_file():
            break
    return "unregistered"


def download(uri: str, target: str, store: str) -> str:
    """Fetch an artifact folder into `target`; returns where it is."""
    from mlflow.artifacts import download_artifacts

    return str(download_artifacts(artifact_uri=uri, dst_path=target, tracking_uri=store, registry_uri=store))
