"""One driver at a time in the folder that its trainings and results are written to."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from etl.lake.lease import holder, who_holds
from etl.settings import RunAgain
from trainer import tracking

LOCK = "lock"


@contextmanager
def alone(folder: Path, what: str) -> Iterator[None]:
    """Hold the folder; the kernel frees it when the process dies. `what` runs in it. Raises RunAgain."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = folder / LOCK
    with tracking.file_lock(lock, wait=False) as held:
        if not held:
            raise RunAgain(
                f"{folder}: expected no other {what} to run there, found {who_holds(lock.read_bytes())}; run again "
                "when it has ended, or set another folder"
            )
        lock.write_text(json.dumps(holder()))
        try:
            yield
        finally:
            lock.write_text("")
