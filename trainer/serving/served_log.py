"""The table `served`: each list that was given, with its version, appended by a thread of its own.

A lake has one writer: while another job writes to it, rows wait, and so they do where it can't be reached. Give the log
a lake of its own, and one to each server.
"""

import datetime as dt
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any

import pyarrow as pa

from etl.lake.commit import Commit, commit_files
from etl.lake.lease import writing
from etl.lake.snapshots import local_path, make_folder, open_table, table_filesystem
from etl.lake.spark_io import FileWriter, data_files
from etl.plain_path import absolute
from etl.redaction import one_line
from etl.settings import GraftrecError
from etl.tables import SERVED
from trainer.config import ServedLogConfig
from trainer.inference.recommender import Answer, Request
from trainer.serving.metrics import Metrics

MICROSECONDS = 1_000_000
PATIENCE_SECONDS = 10.0  # with another writer, each time


class ServedLog:
    """Takes rows from the event loop and commits them now and then. Made, it has opened the table. Raises
    GraftrecError."""

    def __init__(self, config: ServedLogConfig, metrics: Metrics, say: Callable[[str], None]) -> None:
        self._config, self._metrics, self._say = config, metrics, say
        self._lake = None if config.lake is None else absolute(config.lake)
        if self._lake is not None:
            open_table(self._lake, SERVED)  # what is no lake is refused now
        self._rows: list[dict[str, Any]] = []
        self._pending: list[dict[str, Any]] = []  # of the transaction that is being tried
        self._lock = threading.Lock()
        self._app, self._number = f"served/{uuid.uuid4().hex}", 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._write_again, name="served", daemon=True)

    def start(self) -> None:
        if self._lake is not None:
            self._thread.start()

    def stop(self) -> None:
        """Commit what waits."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()

    def add(self, request_id: str, requests: Sequence[Request], answers: Sequence[Answer], domain: str) -> None:
        """Note the lists of one HTTP request."""
        if self._lake is None:
            return
        now = time.time()
        day = dt.datetime.fromtimestamp(now, dt.UTC).date().isoformat()
        rows = [
            {
                "day": day,
                "request": request_id,
                "place": place,
                "time": int(now * MICROSECONDS),
                "user": request.user if self._config.users else None,
                "domain": domain or None,
                "version": answer.version,
                "basis": answer.basis,
                "items": answer.items,
                "scores": answer.scores,
            }
            for place, (request, answer) in enumerate(zip(requests, answers, strict=True))
        ]
        with self._lock:
            self._rows += rows
            dropped = max(0, len(self._rows) - self._config.rows)
            del self._rows[:dropped]
        if dropped:
            self._metrics.lists.labels("dropped").inc(dropped)

    def _write_again(self) -> None:
        failed = ""
        while not self._ended.wait(self._config.seconds):
            failed = self._try(failed)
        self._try(failed)

    def _try(self, failed: str) -> str:
        """Commit what waits; returns why it could not, which is said once."""
        with self._lock:
            if not self._pending:
                self._pending, self._rows = self._rows, []
                self._number += 1
        if not self._pending:
            return failed
        try:
            self._commit(self._pending)
        except Exception as error:  # the same rows are tried again, as the same transaction: none lands twice
            told = one_line(error) if isinstance(error, GraftrecError) else type(error).__name__
            if told != failed:
                self._say(f"{len(self._pending)} lists of the served log wait: {told}")
            return told
        self._metrics.lists.labels("written").inc(len(self._pending))
        self._pending = []
        return ""

    def _commit(self, rows: Sequence[dict[str, Any]]) -> None:
        assert self._lake is not None
        if (folder := local_path(self._lake)) is not None:
            make_folder(folder / SERVED.name)
        filesystem, files = table_filesystem(self._lake, SERVED), []
        for day in sorted({row["day"] for row in rows}):
            writer = FileWriter(filesystem, SERVED, (day,))
            of_day = sorted((row for row in rows if row["day"] == day), key=lambda row: (row["time"], row["request"]))
            writer.add(pa.RecordBatch.from_pylist(of_day, SERVED.schema))
            files += data_files(writer.close().column("file").to_pylist())
        commit = Commit(mode="append", app=self._app, app_version=self._number, metadata={"job": "serve"})
        with writing(self._lake, SERVED, wait_seconds=PATIENCE_SECONDS):
            commit_files(self._lake, SERVED, files, commit)
