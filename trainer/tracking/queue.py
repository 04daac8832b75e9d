"""What a run has to tell a tracking server, sent by a thread of its own: the training loop never waits for a server.

Entries are plain JSON, in order. A server that is dead or slow keeps them waiting: they are tried again, later and
later, and a single line says so. What is unsent when the process ends is kept in a folder, and the next run sends it.
Sending an entry twice (an answer got lost) changes nothing: a metric is keyed by name, step, time and value.
"""

import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from etl.redaction import one_line, redact

Entry = dict[str, Any]  # {"kind": …, …}; `files` name what has to be kept with it


LONGEST_PAUSE_SECONDS = 30.0
METRICS_PER_BATCH = 1_000  # MLflow's limit


class Refused(Exception):
    """The server answered, and will give the same answer next time."""


def warn(text: str) -> None:
    print(f"tracking: {redact(text)}", file=sys.stderr, flush=True)


class SendQueue:
    """Entries waiting for `send`, which raises Refused for an entry to drop and anything else for one to keep."""

    def __init__(self, send: Callable[[Entry], None], *, interval_seconds: float = 1.0) -> None:
        self._send, self._interval = send, interval_seconds
        self._entries: list[Entry] = []
        self._changed = threading.Condition()
        self._closing = self._silent = False
        self._progress = time.monotonic()
        self._refusals: set[str] = set()
        self._thread = threading.Thread(target=self._work, name="tracking", daemon=True)
        self._thread.start()

    def add(self, entry: Entry) -> None:
        """Queue one entry; metrics are gathered into batches. Never blocks on the server."""
        with self._changed:
            last = self._entries[-1] if len(self._entries) > 1 else None  # the first one may be under way
            if last and entry["kind"] == last["kind"] == "metrics" and len(last["values"]) < METRICS_PER_BATCH:
                room = METRICS_PER_BATCH - len(last["values"])
                last["values"] += entry["values"][:room]
                entry = entry | {"values": entry["values"][room:]}
                if not entry["values"]:
                    return
            self._entries.append(entry)
            self._changed.notify()

    def close(self, patience_seconds: float) -> list[Entry]:
        """Send what waits, as long as some entry gets through every `patience_seconds`. Returns what was not sent."""
        with self._changed:
            self._closing = True
            self._progress = time.monotonic()
            self._changed.notify()
        while self._thread.is_alive() and time.monotonic() - self._progress < patience_seconds:
            self._thread.join(0.1)
        with self._changed:
            left, self._entries = self._entries, []
        return left

    def _work(self) -> None:
        pause = 0.0
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closing, timeout=pause or self._interval)
                if not self._entries:
                    if self._closing:
                        return
                    continue
            failure = self._send_all()
            if failure is None:
                if pause:
                    warn("MLflow answers again; what was waiting is sent")
                pause = 0.0
                continue
            if not pause and not self._silent:
                self._silent = True
                warn(f"MLflow does not answer ({one_line(failure)}); training goes on, what it logs is sent later")
            pause = min(max(2 * pause, 0.5), 1.0 if self._closing else LONGEST_PAUSE_SECONDS)
            if self._closing:
                time.sleep(pause)

    def _send_all(self) -> Exception | None:
        while True:
            with self._changed:
                if not self._entries:
                    return None
                entry = self._entries[0]
            try:
                self._send(entry)
            except Refused as refusal:
                if (text := one_line(refusal)) not in self._refusals:
                    self._refusals.add(text)
                    warn(f"MLflow refused to take {entry['kind']}: {text}")
            except Exception as failure:
                return failure
            self._progress = time.monotonic()
            with self._changed:
                if not self._entries or self._entries[0] is not entry:  # closed meanwhile
                    return None
                del self._entries[0]
