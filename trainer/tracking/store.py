"""The SQLite file of an embedded MLflow store: there whole, or not there.

MLflow makes its tables one migration after another, and can't go on where that was interrupted (a kill, a full disk).
So a store is made under another name and renamed. One that was left half made by others holds nothing: it is set aside.
"""

import re
import sqlite3
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, closing
from pathlib import Path
from uuid import uuid4

from etl.durable import sync
from trainer.tracking.queue import warn

LOCK_SECONDS = 120.0  # making a store takes some seconds
SETTLED_SECONDS = 3.0  # a file that another program is making changes within that time
_HELD = ("experiments", "runs", "registered_models")  # tables of which one has rows in any store that was used


class StoreBusy(OSError):
    """Another process has been making the store for too long."""


def sqlite_file(uri: str) -> Path | None:
    """The file of an SQLite store's URI; None for any other store."""
    found = re.match(r"sqlite(?:\+\w+)?:///([^?]+)", uri)
    return Path(found[1]).absolute() if found else None


def prepare(database: Path, make: Callable[[Path], None], lock: Callable[[], AbstractContextManager[bool]]) -> None:
    """Have `database` whole; `make` writes a new one. `lock` yields whether this process may. Raises OSError, what
    `make` raises, and sqlite3.DatabaseError for a file that is no database."""
    if _is_whole(database):
        return
    database.parent.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + LOCK_SECONDS
    while True:
        with lock() as mine:
            if mine:
                if not _is_whole(database):
                    _set_aside(database)
                    _make(database, make)
                return
        if time.monotonic() > deadline:
            raise StoreBusy(f"{database}: another process makes it since {LOCK_SECONDS:.0f} s; end it, then run again")
        time.sleep(0.1)


def has_running(database: Path) -> bool:
    """Whether a run says that it is at work. True where the store can't be read: MLflow says why."""
    if not database.exists():
        return False
    try:
        with closing(sqlite3.connect(f"{database.as_uri()}?mode=rw", uri=True)) as connection:
            found = connection.execute("SELECT EXISTS (SELECT * FROM runs WHERE status = 'RUNNING')").fetchone()
    except sqlite3.Error:
        return True
    return bool(found[0])


def _is_whole(database: Path) -> bool:
    """Whether a store can be used as it is. What can't be read, since another process writes, is in use."""
    if not database.exists() or not database.stat().st_size:
        return False
    # Not read-only: the journal of a writer that was killed has to be rolled back.
    with closing(sqlite3.connect(f"{database.as_uri()}?mode=rw", uri=True)) as connection:
        try:
            tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
            return any(
                connection.execute(f"SELECT EXISTS (SELECT * FROM {table})").fetchone()[0]
                for table in _HELD
                if table in tables
            )
        except sqlite3.OperationalError as error:
            if "locked" in str(error):
                return True
            raise


def _set_aside(database: Path) -> None:
    """Rename a half-made store, which holds nothing, once nobody is at work on it."""
    if not database.exists():
        return
    before = None
    while (now := database.stat().st_mtime_ns) != before:
        before = now
        time.sleep(SETTLED_SECONDS)
    if _is_whole(database):
        return
    if not database.stat().st_size:
        database.unlink()
        return
    number = 1 + len(list(database.parent.glob(f"{database.name}.broken-*")))
    aside = database.with_name(f"{database.name}.broken-{number}")
    warn(f"{database} was left half made, with nothing in it; it is set aside as {aside.name} and made again")
    for suffix in ("-journal", "-wal", "-shm", ""):
        if (part := database.with_name(database.name + suffix)).exists():
            part.rename(aside.with_name(aside.name + suffix))


def _make(database: Path, make: Callable[[Path], None]) -> None:
    if database.exists():  # became whole meanwhile
        return
    for leftover in database.parent.glob(f"{database.name}.new-*"):
        leftover.unlink()
    new = database.with_name(f"{database.name}.new-{uuid4().hex[:8]}")  # never an earlier name: connections are kept
    try:
        make(new)
        sync(new)
        new.rename(database)
    except BaseException:
        for leftover in database.parent.glob(f"{new.name}*"):
            leftover.unlink()
        raise
