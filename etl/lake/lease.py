"""One writer per lake: a lease that its holder renews, and without which nothing is committed.

On a disk it is a lock on the file `.writer`, which the kernel frees when its holder dies. On an object store it is the
object `.writer`, made with If-None-Match and renewed with If-Match: one that nobody has renewed for DEAD_SECONDS, by
the clock of whoever waits, is taken over, and its former holder's next commit is refused. A store that ignores either
header is refused too, since on it two writers could destroy each other's tables.
"""

import contextlib
import fcntl
import functools
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

from etl.lake.snapshots import LakeError, local_path, make_folder, open_table
from etl.lake.store_errors import store_problem
from etl.redaction import one_line
from etl.settings import RunAgain
from etl.tables import Table

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")

LEASE = ".writer"
RENEW_SECONDS = 10.0  # on an object store
DEAD_SECONDS = 40.0  # without a renewal, on an object store
WAIT_SECONDS = 120.0  # for another writer


class LakeBusy(RunAgain):
    """Another process kept writing to the lake for as long as this one waited."""


class LeaseLost(RunAgain):
    """Another process has become the lake's writer, or the lake was removed."""


class _Lease(Protocol):
    """The lease of one lake, by its kind of storage."""

    poll_seconds: float

    def take(self) -> str | None:
        """Try once to become the writer; None, or who is."""

    def lives(self) -> bool:
        """Whether the writer that `take` found is known to be at work."""

    def check(self) -> None:
        """Raise LeaseLost unless this process is the writer still."""

    def release(self) -> None:
        """Let others write."""


class _Held:
    """A lease that this process has, and how many of its calls are using it."""

    def __init__(self, lease: _Lease) -> None:
        self.lease = lease
        self.users = 0


_held: dict[str, _Held] = {}  # by lake
_taking = threading.RLock()


@contextlib.contextmanager
def writing(lake: str, table: Table, *, wait_seconds: float = WAIT_SECONDS) -> Iterator[None]:
    """Be the one process that writes to the lake, at first to `table`; the process may enter again within.

    Raises LakeBusy after `wait_seconds`; LakeError where the lake isn't one, or its storage can't keep others out.
    """
    name = _name(lake)
    with _taking:
        if name not in _held:
            _held[name] = _Held(_take(lake, table, wait_seconds))
        held = _held[name]
        held.users += 1
    try:
        yield
    finally:
        with _taking:
            held.users -= 1
            if held.users == 0 and _held.get(name) is held:
                del _held[name]
                held.lease.release()


def as_writer(
    function: Callable[Concatenate[str, Table, Parameters], Result],
) -> Callable[Concatenate[str, Table, Parameters], Result]:
    """`function(lake, table, …)` as the lake's writer; see `writing`."""

    @functools.wraps(function)
    def call(lake: str, table: Table, /, *arguments: Parameters.args, **named: Parameters.kwargs) -> Result:
        with writing(lake, table):
            return function(lake, table, *arguments, **named)

    return call


def check_lease(lake: str) -> None:
    """Raise LeaseLost unless this process is the lake's writer: called right before each commit."""
    held = _held.get(_name(lake))
    if held is None:
        raise LeaseLost(_lost(lake))
    held.lease.check()


def _take(lake: str, table: Table, wait_seconds: float) -> _Lease:
    folder = local_path(lake)
    if folder is not None:
        open_table(lake, table)  # refuses a folder that is something else, before there is a lease in it
    lease: _Lease = _StoreLease(lake) if folder is None else _FileLease(lake, folder)
    deadline = time.monotonic() + wait_seconds
    said = False
    while (other := lease.take()) is not None:
        if time.monotonic() >= deadline and lease.lives():
            raise LakeBusy(
                f"{lake}: expected to be its one writer, found {other}, still writing after {wait_seconds:g} s; run "
                "again when it has ended"
            )
        if not said:
            print(f"waiting: {lake} is being written by {other}", flush=True)
            said = True
        time.sleep(min(lease.poll_seconds, max(deadline - time.monotonic(), 0.01)))
    return lease


def _name(lake: str) -> str:
    folder = local_path(lake)
    return lake.rstrip("/") if folder is None else str(folder.resolve())


def _lost(lake: str) -> str:
    return f"{lake}: another process has become its writer, or it was removed; nothing more was committed: run again"


def holder() -> dict[str, str]:
    """This process, as the content of a lease names it."""
    since = datetime.now(UTC).isoformat(timespec="seconds")
    return {"host": socket.gethostname(), "process": str(os.getpid()), "since": since}


def _record(content: bytes) -> dict[str, Any]:
    """What a lease's content says; nothing where it isn't one's."""
    try:
        found = json.loads(content)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def who_holds(content: bytes) -> str:
    """The holder that a lease's content names."""
    found = _record(content)
    if "host" not in found:
        return "another process"
    return f"process {found.get('process')} of {found['host']} (since {found.get('since')})"


def _forget() -> None:
    """In a forked child: the lease is its parent's, and must not outlive it in the child's copy of the handle."""
    global _taking
    _taking = threading.RLock()
    for held in _held.values():
        if isinstance(held.lease, _FileLease):
            held.lease.close()
    _held.clear()


os.register_at_fork(after_in_child=_forget)


class _FileLease:
    """A lock on a file in the lake's folder."""

    poll_seconds = 0.02

    def __init__(self, lake: str, folder: Path) -> None:
        self._lake, self._path = lake, folder / LEASE
        self._handle: int | None = None

    def take(self) -> str | None:
        make_folder(self._path.parent)
        try:
            handle = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise LakeError(f"{self._path}: expected to make a file ({error.strerror}); mend that") from None
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            other = who_holds(os.pread(handle, 1000, 0))
            os.close(handle)
            return other
        except OSError as error:
            os.close(handle)
            raise LakeError(
                f"{self._path}: expected a disk that can lock files ({error.strerror}); give a --lake on another"
            ) from None
        self._handle = handle
        if not self._is_there():  # removed since it was opened: others would lock another file
            self.close()
            return "another process"
        with contextlib.suppress(OSError):  # a full disk: the lock is what counts
            os.ftruncate(handle, 0)
            os.pwrite(handle, json.dumps(holder()).encode(), 0)
        return None

    def lives(self) -> bool:
        return True

    def check(self) -> None:
        if not self._is_there():
            raise LeaseLost(_lost(self._lake))

    def release(self) -> None:
        self.close()

    def close(self) -> None:
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

    def _is_there(self) -> bool:
        if self._handle is None:
            return False
        try:
            return os.path.samestat(os.stat(self._path), os.fstat(self._handle))
        except OSError:
            return False


class _StoreLease:
    """An object that only conditional puts write: each names the state that it replaces."""

    poll_seconds = 1.0

    def __init__(self, lake: str) -> None:
        from obstore.store import from_url

        self._lake = lake
        self._id = uuid.uuid4().hex
        self._count = 0  # of writes: no two contents are alike, and so no two ETags
        self._state: Any = None  # the object as we last wrote it, as an `If-Match` names it
        self._seen: list[tuple[Any, float]] = []  # another's states, and when each was new
        self._me = holder()
        self._lost = False
        self._lock = threading.Lock()
        self._ended = threading.Event()
        retry = {"max_retries": 3, "retry_timeout": timedelta(seconds=RENEW_SECONDS)}
        with self._translated():
            self._store: Any = from_url(lake, retry_config=retry)  # client_options would undo AWS_ALLOW_HTTP and others

    def take(self) -> str | None:
        with self._translated():
            found = self._read()
            if found is None:
                taken = self._put("create")
            else:
                content, state = found
                if "host" in _record(content) and not self._is_dead(state):
                    return who_holds(content)
                taken = self._put(state)
            if not taken:
                return "another process"
            try:
                self._probe()
            except Exception:
                with contextlib.suppress(*_failures()):
                    self._store.delete(LEASE)
                raise
        threading.Thread(target=self._keep_renewing, name="lake lease", daemon=True).start()
        return None

    def lives(self) -> bool:
        """A dead one's state stays as it is, until it is taken over."""
        return len(self._seen) > 1

    def check(self) -> None:
        with self._translated():
            self._renew()

    def release(self) -> None:
        self._ended.set()
        with contextlib.suppress(*_failures(), LeaseLost), self._lock:
            if not self._lost:
                self._put(self._state, free=True)

    def _renew(self) -> None:
        with self._lock:
            self._lost = self._lost or not self._put(self._state)
            if self._lost:
                raise LeaseLost(_lost(self._lake))

    def _keep_renewing(self) -> None:
        while not self._ended.wait(RENEW_SECONDS):
            try:
                self._renew()
            except LeaseLost:
                return
            except _failures():
                continue  # the store may answer again before anybody takes over

    def _is_dead(self, state: Any) -> bool:
        now = time.monotonic()
        if not self._seen or state != self._seen[-1][0]:
            self._seen.append((state, now))
        return now - self._seen[-1][1] >= DEAD_SECONDS

    def _probe(self) -> None:
        """Raise LakeError unless the store refuses to write over the object against either header."""
        old = self._state
        ignored = "If-None-Match" if self._put("create") else None
        if ignored is None:
            self._renew()
            ignored = "If-Match" if self._put(old) else None
        if ignored is not None:
            raise LakeError(
                f"{self._lake}: expected a store that heeds {ignored} (conditional put), found one that ignores it, on "
                "which two writers destroy each other's tables; use another store, or none of the proxies before it "
                "that drop the header"
            )

    def _put(self, mode: Any, *, free: bool = False) -> bool:
        """Write the object in the way that `mode` names; whether that was done."""
        from obstore.exceptions import AlreadyExistsError, PreconditionError

        self._count += 1
        mine = {"id": self._id, "count": self._count}
        try:
            done = self._store.put(LEASE, json.dumps(mine if free else {**mine, **self._me}).encode(), mode=mode)
        except (AlreadyExistsError, PreconditionError):
            found = self._read()  # a retry is refused too where the first try had landed
            if found is None or {key: _record(found[0]).get(key) for key in mine} != mine:
                return False
            self._state = found[1]
        except FileNotFoundError:
            if mode == "create":  # there is no such bucket
                raise
            return False  # the lake was removed
        else:
            self._state = _state(done)
        return True

    def _read(self) -> tuple[bytes, Any] | None:
        try:
            found = self._store.get(LEASE)
        except FileNotFoundError:
            return None
        return bytes(found.bytes()), _state(found.meta)

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except _failures() as error:
            problem = store_problem(self._lake, error)
            reason = one_line(error)
            raise LakeError(problem or f"{self._lake}: the store failed ({reason}); try again") from None


def _state(written: Any) -> dict[str, str]:
    return {key: written[key] for key in ("e_tag", "version") if written.get(key) is not None}


def _failures() -> tuple[type[Exception], ...]:
    from obstore.exceptions import BaseError

    return BaseError, NotImplementedError, OSError
