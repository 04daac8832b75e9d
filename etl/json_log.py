"""What a command prints as JSON, a line a record, for whoever collects logs: ``--log json``, or $GRAFTREC_LOG=json.

A record has `time` (ISO 8601, UTC), `level` (info, or error for what goes to stderr), `command`, `message`, and the
fields that `say` is given. Processes that a command starts inherit it.
"""

import datetime as dt
import json
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO

VARIABLE = "GRAFTREC_LOG"


def is_json() -> bool:
    """Whether output is JSON."""
    return os.environ.get(VARIABLE) == "json"


def say(message: str, **fields: Any) -> None:
    """Print a line; as JSON with `fields` beside the message."""
    if isinstance(sys.stdout, _Records):
        sys.stdout.record(message, fields)
    else:
        print(message, flush=True)


@contextmanager
def json_output(command: str) -> Iterator[None]:
    """Write what is printed meanwhile as records, where that is wanted."""
    if not is_json():
        yield
        return
    before = sys.stdout, sys.stderr
    sys.stdout = out = _Records(before[0], command, "info")  # type: ignore[assignment]
    sys.stderr = err = _Records(before[1], command, "error")  # type: ignore[assignment]
    try:
        yield
    finally:
        out.end()
        err.end()
        sys.stdout, sys.stderr = before


class _Records:
    """A text stream that writes each line as a record."""

    def __init__(self, stream: TextIO, command: str, level: str) -> None:
        self._stream, self._command, self._level, self._begun = stream, command, level, ""

    def write(self, text: str) -> int:
        *lines, self._begun = (self._begun + text).split("\n")
        for line in lines:
            self._line(line)
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def record(self, message: str, fields: dict[str, Any]) -> None:
        now = dt.datetime.now(dt.UTC).isoformat(timespec="milliseconds")
        known = {"time": now, "level": self._level, "command": self._command, "message": message}
        self._stream.write(json.dumps(known | fields, ensure_ascii=False, default=str) + "\n")
        self._stream.flush()

    def _line(self, line: str) -> None:
        line = line.rsplit("\r", 1)[-1].strip()  # of a line that is written over, what is left on it
        if line:
            self.record(line, {})

    def end(self) -> None:
        self._line(self._begun)
        self._begun = ""

    def flush(self) -> None:
        self._stream.flush()

    def isatty(self) -> bool:
        return False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
