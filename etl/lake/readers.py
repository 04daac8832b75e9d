"""Who reads a release: a mark that maintenance heeds, so that the files of a release that is being read stay.

On a disk the mark is a locked file in `.readers`, which the kernel frees when the reader dies. In an object store it
is an object, written again every RENEW_SECONDS; one that is older than DEAD_SECONDS is a dead reader's. A
reader that may not write to the lake leaves no mark: what it reads is then protected only because maintenance removes
nothing younger than `older_than_hours`.
"""

import atexit
import contextlib
import fcntl
import json
import os
import threading
import uuid
from datetime import UTC, datetime
from pathlib import Path

import pyarrow.fs as pafs

from etl.lake.lease import holder, who_holds
from etl.lake.small_files import read_file, write_file
from etl.lake.snapshots import LakeError, lake_filesystem, local_path

READERS = ".readers"
RENEW_SECONDS = 60.0  # in an object store
DEAD_SECONDS = 600.0  # without a renewal, in an object store

_marks: dict[tuple[str, int], "int | threading.Event | None"] = {}  # (lake, release) -> what holds this process's mark
_marking = threading.Lock()


def mark_reading(lake: str, release: int) -> None:
    """Say that this process reads a release, until it ends. It may say so again."""
    folder = local_path(lake)
    key = (lake.rstrip("/") if folder is None else str(folder.resolve()), release)
    with _marking:
        if key in _marks:
            return
        name = f"{release}-{uuid.uuid4().hex[:12]}"
        try:
            _marks[key] = _renewed(lake, name) if folder is None else _locked(folder / READERS / name)
        except (OSError, LakeError):  # a lake that this process may only read
            _marks[key] = None


def stop_reading(lake: str) -> None:
    """Take back all marks of this process on a lake."""
    folder = local_path(lake)
    name = lake.rstrip("/") if folder is None else str(folder.resolve())
    with _marking:
        for key in [key for key in _marks if key[0] == name]:
            held = _marks.pop(key)
            if isinstance(held, int):
                os.close(held)
            elif held is not None:
                held.set()


def readers(lake: str) -> dict[int, list[str]]:
    """Release -> who reads it now. Marks of dead readers are removed."""
    found: dict[int, list[str]] = {}
    folder = local_path(lake)
    names = _names(lake)
    for name in sorted(names):
        number = name.partition("-")[0]
        if not number.isdigit():
            continue
        who = _reader_of_object(lake, name, names[name]) if folder is None else _reader_of(folder / READERS / name)
        if who:
            found.setdefault(int(number), []).append(who)
    return found


def _names(lake: str) -> dict[str, datetime | None]:
    """Marks, and when each was written."""
    listed = lake_filesystem(lake).get_file_info(pafs.FileSelector(READERS, allow_not_found=True))
    return {info.base_name: info.mtime for info in listed if info.type == pafs.FileType.File}


def _locked(path: Path) -> int:
    path.parent.mkdir(exist_ok=True)
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    fcntl.flock(handle, fcntl.LOCK_EX)
    os.pwrite(handle, json.dumps(holder()).encode(), 0)
    atexit.register(_unlink, path, os.getpid())
    return handle


def _reader_of(path: Path) -> str:
    """The process that holds a mark; "", and no mark any more, where it is dead."""
    try:
        handle = os.open(path, os.O_RDWR)
    except OSError:
        return ""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return who_holds(os.pread(handle, 1000, 0))
    else:
        # Not of a reader that has made the file and is about to lock it: its content comes after the lock.
        if os.fstat(handle).st_size or datetime.now().timestamp() - os.fstat(handle).st_mtime > DEAD_SECONDS:
            _unlink(path, os.getpid())
            return ""
        return "another process"
    finally:
        os.close(handle)


def _renewed(lake: str, name: str) -> threading.Event:
    path, content, ended = f"{READERS}/{name}", json.dumps(holder()).encode(), threading.Event()
    write_file(lake, path, content)

    def keep() -> None:
        while not ended.wait(RENEW_SECONDS):
            with contextlib.suppress(LakeError):
                write_file(lake, path, content)

    def end(process: int) -> None:
        if process == os.getpid():
            ended.set()
            with contextlib.suppress(OSError):
                lake_filesystem(lake).delete_file(path)

    threading.Thread(target=keep, name="lake reader", daemon=True).start()
    atexit.register(end, os.getpid())
    return ended


def _reader_of_object(lake: str, name: str, written: datetime | None) -> str:
    age = 0.0 if written is None else (datetime.now(UTC) - written.astimezone(UTC)).total_seconds()
    if age < DEAD_SECONDS:
        return who_holds(read_file(lake, f"{READERS}/{name}") or b"")
    with contextlib.suppress(OSError):
        lake_filesystem(lake).delete_file(f"{READERS}/{name}")
    return ""


def _unlink(path: Path, process: int) -> None:
    if process == os.getpid():  # not in a forked child
        with contextlib.suppress(OSError):
            path.unlink()
