"""MLflow: runs, and the connection that `trainer.registry` uses.

Without MLFLOW_TRACKING_URI everything lies in the working directory: `mlflow.db` (SQLite) and `mlartifacts/`.
mlflow is imported by the thread that talks to it (about two seconds), so a command starts at once. Only rank 0 tracks.
"""

import contextlib
import getpass
import json
import math
import os
import re
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import psutil
import yaml

from etl.redaction import one_line, redact, without_secrets
from etl.settings import GraftrecError, Section
from trainer.config import TrackingConfig
from trainer.tracking.provenance import code_version, cut, flatten
from trainer.tracking.queue import METRICS_PER_BATCH, Entry, SendQueue, keep, kept, warn
from trainer.tracking.store import has_running, sqlite_file

if TYPE_CHECKING:  # both are slow to import
    from matplotlib.figure import Figure

    from trainer.data.release import Release
from trainer.tracking.connection import ERROR, PARAM_CHARACTERS, TAG_CHARACTERS, Unrecorded, quieten, tracking_uri
from trainer.tracking.sender import PARAMS_PER_BATCH, UNSENT, Sender, fingerprint, process

JOINED_VARIABLE = "MLFLOW_RUN_ID"  # set by `mlflow run`
PARENT_VARIABLE = "GRAFTREC_PARENT_RUN"  # set for the processes a run starts


THUMBNAIL_PIXELS = 640  # width of a picture in a description, beside which a run's facts have room
REUSED_SHOWN = 30  # earlier runs that a description links


TERMINATED_EXIT = 128 + signal.SIGTERM


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

    def log_model_metrics(self, digest: str, metrics: Mapping[str, float], release: "Release", table: str) -> None:
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
    must_record: bool = False,
) -> Iterator[Run]:
    """Track what happens inside: configuration, snapshots, code version, system metrics, and how it ended.

    Under `mlflow run` (MLFLOW_RUN_ID) the run that it made is joined, and otherwise `resumed`, the id of an earlier run
    of the same work, where the store still has it; or the run that was started with the same `uid` (32 hex digits),
    which is known before the server answers. A run started inside another, or in a process given
    `child_environment()`, is its child. `description` as in `Run.describe`, `tables` (that the run reads) and
    `context` as in `Run.log_release`. An exception ends the run as FAILED with the error's line as the tag
    `graftrec.error`; SIGTERM and Ctrl-C end it as KILLED. `must_record`: the same command tells all again unless this
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
    if lost and must_record:
        raise Unrecorded(
            f"expected room to keep what MLflow did not take, found none ({lost}); make room, and run the same command "
            "again: the work is done, and is sent then"
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
    sender = Sender(uri, config, {"uid": ""})
    send_queue = SendQueue(lambda entry: sender.settle())
    send_queue.add({"kind": "settle"})
    send_queue.close(config.close_seconds)


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
        self._sender = Sender(self._uri, config, self._header)
        self._outbox = SendQueue(self._sender.send)
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

    def log_model_metrics(self, digest: str, metrics: Mapping[str, float], release: "Release", table: str) -> None:
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
                keep(folder, self._header | {"run_id": self._sender.run_id, "uri": fingerprint(self._uri)}, left)
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
    """A full disk, or a picture that can't be drawn, is a warning and no more."""
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


def _header(name: str, parent: str | None, joined: str | None, resumed: str, uid: str) -> Entry:
    """Everything needed to make the run, whenever the server answers."""
    uid = uid or uuid.uuid4().hex
    tags = {
        "graftrec.uid": uid,
        "graftrec.host": socket.gethostname(),
        "graftrec.process": process(psutil.Process()),
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
