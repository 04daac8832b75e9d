"""A run whose entries wait in a queue, and what becomes of them when it ends."""

import contextlib
import json
import math
import re
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from etl.redaction import one_line, redact
from trainer.config import TrackingConfig
from trainer.tracking.connection import PARAM_CHARACTERS, TAG_CHARACTERS, quieten, tracking_uri
from trainer.tracking.provenance import cut
from trainer.tracking.queue import METRICS_PER_BATCH, Entry, SendQueue, warn
from trainer.tracking.run import THUMBNAIL_PIXELS, Run, run_link
from trainer.tracking.sender import PARAMS_PER_BATCH, Sender
from trainer.tracking.spool import fingerprint, keep
from trainer.tracking.system_metrics import SystemMetrics

if TYPE_CHECKING:  # both are slow to import
    from matplotlib.figure import Figure

    from trainer.data.release import Release

REUSED_SHOWN = 30  # earlier runs that a description links


class TrackedRun(Run):
    """A run whose entries wait in a queue."""

    def __init__(self, config: TrackingConfig, header: Entry) -> None:
        quieten()
        self._config, self._uri = config, tracking_uri()
        self._header = header
        self._staging: Path | None = None
        self._sender = Sender(self._uri, config, self._header)
        self._system_metrics = SystemMetrics(config.system_metrics_seconds, self._log_sample)
        self._queue = SendQueue(self._send)
        self._curves: set[str] = set()
        self._description, self._reused = "", dict[str, str]()
        self._queue.add({"kind": "tags", "values": {}})  # makes the run

    def _send(self, entry: Entry) -> None:
        if self._config.system_metrics:
            self._system_metrics.start()  # in the thread that imports MLflow, whether or not a server answers
        self._sender.send(entry)

    def _log_sample(self, values: Mapping[str, float], step: int) -> None:
        self.log_metrics(values, step=step)

    @property
    def id(self) -> str:  # type: ignore[override]
        """The run's id; waits for the run to be made, "" where the server does not answer."""
        self._sender.made.wait(self._config.close_seconds)
        return self._sender.run_id

    def log_params(self, params: Mapping[str, Any]) -> None:
        texts = [[metric_name(key), cut(redact(str(value)), PARAM_CHARACTERS)] for key, value in params.items()]
        for start in range(0, len(texts), PARAMS_PER_BATCH):
            self._queue.add({"kind": "params", "values": dict(texts[start : start + PARAMS_PER_BATCH])})

    def log_metrics(self, metrics: Mapping[str, float], *, step: int | None = None) -> None:
        now = milliseconds()
        named = {metric_name(key): float(value) for key, value in metrics.items()}
        if step is not None:
            self._curves |= named.keys()
        elif shared := sorted(self._curves & named.keys()):
            warn(f"dropped {', '.join(shared)}: a value without a step has the name of a curve; give it another one")
            named = {key: value for key, value in named.items() if key not in self._curves}
        if named:
            values = [[key, value, now, step or 0] for key, value in named.items()]
            self._queue.add({"kind": "metrics", "values": values})

    def log_history(self, lines: Sequence[tuple[int, Mapping[str, float]]]) -> None:
        now = milliseconds()
        values = [[metric_name(key), float(value), now, step] for step, line in lines for key, value in line.items()]
        self._curves |= {metric_name(key) for _, line in lines for key in line}
        for start in range(0, len(values), METRICS_PER_BATCH):
            self._queue.add({"kind": "missing", "values": values[start : start + METRICS_PER_BATCH]})

    def set_tags(self, tags: Mapping[str, Any]) -> None:
        texts = {metric_name(key): cut(redact(str(value)), TAG_CHARACTERS) for key, value in tags.items()}
        self._queue.add({"kind": "tags", "values": texts})

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
            file.write_text(redact(text), encoding="utf-8", errors="replace")
            self._artifact(file, path)

    def log_artifact(self, path: str | Path, folder: str = "") -> None:
        self._queue.add({"kind": "artifact", "path": str(Path(path).absolute()), "folder": folder})

    def log_release(self, release: "Release", *, context: str = "training", tables: Sequence[str] = ()) -> None:
        self.log_params({"pinned.release": release.number} | {f"pinned.{k}": v for k, v in release.versions.items()})
        self.set_tags({"graftrec.release": release.number, "graftrec.lake": redact(release.lake)})
        read = [table for table in tables or release.versions if table in release.versions]
        values = [snapshot(release, table) for table in read]
        self._queue.add({"kind": "datasets", "values": values, "context": context})

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
        self._queue.add({"kind": "description", "text": redact("\n\n".join(filter(None, parts)))})

    def log_model(self, name: str, digest: str, *, kind: str = "", params: Mapping[str, Any] | None = None) -> None:
        texts = {metric_name(key): cut(redact(str(value)), PARAM_CHARACTERS) for key, value in (params or {}).items()}
        self._queue.add({"kind": "model", "name": name, "hash": digest, "type": kind, "params": texts})
        self._send_description()  # of the model too

    def log_model_metrics(self, digest: str, metrics: Mapping[str, float], release: "Release", table: str) -> None:
        now = milliseconds()
        values = [[metric_name(k), float(v), now, 0] for k, v in metrics.items() if math.isfinite(v)]
        dataset = snapshot(release, table)
        self._queue.add({"kind": "model_metrics", "hash": digest, "values": values, "dataset": dataset})

    def close(self, status: str) -> str:
        """End the run. Returns why what MLflow did not take is lost; "": it took all, or the rest is kept."""
        self._system_metrics.end()
        self._queue.add({"kind": "end", "status": status, "time": milliseconds()})
        left, lost = self._queue.close(self._config.close_seconds), ""
        if left:
            folder = Path(self._config.unsent).absolute() / f"{self._header['uid']}-{self._header['start']}"
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


def milliseconds() -> int:
    return int(time.time() * 1000)


def metric_name(text: str) -> str:
    """A name that MLflow takes: what it forbids becomes "_"."""
    return re.sub(r"[^\w\-. :/]", "_", text, flags=re.ASCII)
