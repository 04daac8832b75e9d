"""Tasks of this process that write data files: on Sail they go on for a while after their query has failed."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

WAIT_SECONDS = 10.0

_changed = threading.Condition()
_running = 0
_abandoned = False


class WriteAbandoned(Exception):
    """The write that a task belongs to has failed."""


@contextmanager
def counted_task() -> Iterator[None]:
    global _running
    with _changed:
        _running += 1
    try:
        yield
    finally:
        with _changed:
            _running -= 1
            _changed.notify_all()


def check_wanted() -> None:
    """Raise WriteAbandoned where the task's files are not wanted any more."""
    if _abandoned:
        raise WriteAbandoned("expected a write that goes on, found one that has failed; its first error says why")


def abandon() -> None:
    """Let the running tasks end at their next file or row group, and wait for it."""
    global _abandoned
    _abandoned = True
    try:
        with _changed:
            _changed.wait_for(lambda: _running == 0, WAIT_SECONDS)
    finally:
        _abandoned = False
