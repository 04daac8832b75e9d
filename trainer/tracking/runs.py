"""MLflow: runs, and the connection that `trainer.registry` uses.

Without MLFLOW_TRACKING_URI everything lies in the working directory: `mlflow.db` (SQLite) and `mlartifacts/`.
mlflow is imported by the thread that talks to it (about two seconds), so a command starts at once. Only rank 0 tracks.
"""

import contextlib
import getpass
import os
import signal
import socket
import sys
import threading
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FrameType

import psutil
import yaml

from etl.redaction import one_line, redact, without_secrets
from etl.settings import GraftrecError, Section
from trainer.config import TrackingConfig
from trainer.tracking.connection import ERROR, TAG_CHARACTERS, Unrecorded, quieten, tracking_uri
from trainer.tracking.provenance import code_version, flatten
from trainer.tracking.queue import Entry, SendQueue
from trainer.tracking.run import Run
from trainer.tracking.sender import Sender, process
from trainer.tracking.spool import kept
from trainer.tracking.store import has_running, sqlite_file
from trainer.tracking.system_metrics import SystemMetrics
from trainer.tracking.tracked_run import TrackedRun, milliseconds

JOINED_VARIABLE = "MLFLOW_RUN_ID"  # set by `mlflow run`
PARENT_VARIABLE = "GRAFTREC_PARENT_RUN"  # set for the processes a run starts
TERMINATED_EXIT = 128 + signal.SIGTERM

_active: list[Run] = []


def note_reused(name: str, run_id: str) -> None:
    """Note in the active run, if any, that a step reused the result of an earlier run ("": unknown, not noted)."""
    if _active and run_id:
        _active[-1].note_reused(name, run_id)


@contextlib.contextmanager
def start_run(
    config: TrackingConfig,
    *,
    name: str,
    resolved: Section,
    resumed: str = "",
    uid: str = "",
    tags: Mapping[str, str] | None = None,
    must_record: bool = False,
) -> Iterator[Run]:
    """Track what happens inside: configuration, code version, system metrics, and how it ended.

    Under `mlflow run` (MLFLOW_RUN_ID) the run that it made is joined, and otherwise `resumed`, the id of an earlier run
    of the same work, where the store still has it; or the run that was started with the same `uid` (32 hex digits),
    which is known before the server answers. A run started inside another, or in a process given
    `child_environment()`, is its child. An exception ends the run as FAILED with the error's line as the tag
    `graftrec.error`; SIGTERM and Ctrl-C end it as KILLED. `must_record`: the same command logs all again unless this
    ends well, so it raises Unrecorded where what MLflow did not take can't be kept.
    """
    if not config.enabled:
        yield Run()
        return
    if int(os.environ.get("RANK", "0")) != 0:
        with _sampled(config):
            yield Run()
        return
    parent = (_active[-1].id if _active else os.environ.get(PARENT_VARIABLE)) or None
    joined = os.environ.pop(JOINED_VARIABLE, None)
    run = TrackedRun(config, _header(name, parent, joined, resumed, uid))
    settings = without_secrets(resolved.model_dump(mode="json"))
    run.log_params(flatten(settings))
    run.log_text(yaml.safe_dump(settings, sort_keys=False, allow_unicode=True), "config.yaml")
    run.set_tags({f"graftrec.code.{key}": value for key, value in code_version().items()} | dict(tags or {}))
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


@contextlib.contextmanager
def _sampled(config: TrackingConfig) -> Iterator[None]:
    """Sample this node for the process that tracks, if it is another node's."""
    metrics = SystemMetrics(config.system_metrics_seconds, None)
    if config.system_metrics:
        metrics.start()
    try:
        yield
    finally:
        metrics.end()


def settle(config: TrackingConfig) -> None:
    """Send what earlier runs could not, and end those whose process is gone: for a command that finds its work done.
    Inside a run nothing is to be done, since that run does it."""
    if not config.enabled or _active or int(os.environ.get("RANK", "0")) != 0:
        return
    uri = tracking_uri()
    if (
        (database := sqlite_file(uri)) is not None
        and not kept(Path(config.unsent).absolute())
        and not has_running(database)
    ):
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
    return {"uid": uid, "name": name, "tags": tags, "start": milliseconds(), "joined": joined, "resumed": resumed}
