"""Threads of this process: as many by default as cores that it may use, and none of them spins while it waits.

torch's own threads (OpenMP) share out each single operation and wait for each other at its end, by spinning: beside
other work they are slower than one thread alone. So torch has one thread here, and what is worth it is shared out in
pieces of many operations (`on_threads`): the calling thread takes pieces too, and only waits for those begun.
"""

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Generic, TypeVar

import torch

_Result = TypeVar("_Result")
_CGROUPS, _MOUNT = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
MANY_NUMBERS = 1 << 22  # milliseconds of work for an operation: time enough to wait for its slowest thread
_number = 0  # of threads; 0: not yet chosen
_choosing = threading.Lock()
_pool: ThreadPoolExecutor | None = None  # of all threads but the calling one


# --- how many ---------------------------------------------------------------------------------------------------------


def usable_cores() -> int:
    """Cores that this process may use: those it may run on, and no more than its control groups' quota, rounded up."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cgroup_quota(_CGROUPS, _MOUNT)
    return cores if quota is None else max(1, min(cores, -int(-quota // 1)))


def cgroup_quota(cgroups: Path, mount: Path) -> float | None:
    """Cores' worth of time that the least of the control groups above this process allows; None: no limit.

    `cgroups` is /proc/self/cgroup, `mount` where the control groups are mounted (versions 1 and 2). In a container a
    group's path may be the host's: a folder that isn't there is passed over."""
    try:
        lines = cgroups.read_text().splitlines()
    except OSError:
        return None
    quotas: list[float] = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        roots = [mount / controllers, mount / "cpu"] if controllers else [mount, mount / "unified"]
        group = Path(path.lstrip("/"))
        for folder in (root / above for root in roots for above in (group, *group.parents)):
            quota = _quota_v1(folder) if controllers else _quota_v2(folder)
            if quota is not None:
                quotas.append(quota)
    return min(quotas, default=None)


def _quota_v2(folder: Path) -> float | None:
    quota, _, period = _text(folder / "cpu.max").partition(" ")  # "150000 100000", or "max 100000"
    return int(quota) / int(period) if quota.isdigit() and period.isdigit() else None


def _quota_v1(folder: Path) -> float | None:
    quota, period = _text(folder / "cpu.cfs_quota_us"), _text(folder / "cpu.cfs_period_us")
    return int(quota) / int(period) if quota.isdigit() and period.isdigit() else None  # -1: no limit


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def default_threads() -> int:
    """Usable cores, shared among the processes that `torchrun` started on this machine; at most OMP_NUM_THREADS, unless
    it is the 1 that `torchrun` sets by itself."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    threads = max(1, usable_cores() // processes)
    wanted = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    if not wanted.isdigit() or int(wanted) < 1 or (processes > 1 and wanted == "1"):
        return threads
    return min(threads, int(wanted))


# --- work shared out --------------------------------------------------------------------------------------------------


def use_threads(number: int) -> None:
    """`number` threads for `on_threads`, and one for each of torch's own operations."""
    global _number, _pool
    with _choosing:
        torch.set_num_threads(1)
        if number != _number:
            if _pool is not None:
                _pool.shutdown()
            _number, _pool = number, ThreadPoolExecutor(number - 1, "graftrec") if number > 1 else None


def num_threads() -> int:
    """Of `use_threads`; by default where that wasn't called."""
    if _number == 0:
        use_threads(default_threads())
    return _number


def on_threads(work: Callable[[int], _Result], num: int) -> Iterator[_Result]:
    """``work(0), work(1), …`` in order, each done by whichever thread is free, under this thread's settings of torch.

    An error of a piece is raised in its place; pieces that nobody has begun by then are never done. Where `use_threads`
    was not called, it is now, with `default_threads`."""
    threads = num_threads()
    if _pool is None or num <= 1:
        yield from map(work, range(num))
        return
    pieces = _Pieces(_as_here(work), num)
    helpers = [_pool.submit(pieces.take_all) for _ in range(min(threads, num) - 1)]
    try:
        for number in range(num):
            while not pieces.results[number].done() and pieces.take():
                pass
            result = pieces.results[number].result()
            pieces.results[number] = Future()  # the memory is the caller's alone
            yield result
            del result
    finally:
        pieces.end()
        for helper in helpers:
            if not helper.cancel():  # one that no core was free for isn't waited for
                helper.result()


class _Pieces(Generic[_Result]):
    """Pieces of work, taken in order by any thread, each once."""

    def __init__(self, work: Callable[[int], _Result], num: int) -> None:
        self.work, self.results = work, [Future[_Result]() for _ in range(num)]
        self._next, self._lock = 0, threading.Lock()

    def take(self) -> bool:
        """Do one piece; False: there is none left."""
        with self._lock:
            number = self._next
            if number >= len(self.results):
                return False
            self._next += 1
        result = self.results[number]
        try:
            result.set_result(self.work(number))
        except BaseException as error:
            result.set_exception(error)
        return True

    def take_all(self) -> None:
        while self.take():
            pass

    def end(self) -> None:
        with self._lock:
            self._next = len(self.results)


def _as_here(work: Callable[[int], _Result]) -> Callable[[int], _Result]:
    """`work` under this thread's settings, whichever thread does it: torch has them by thread."""
    cast, dtype = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")
    inference, grad = torch.is_inference_mode_enabled(), torch.is_grad_enabled()

    def alike(number: int) -> _Result:
        with torch.inference_mode(inference), torch.set_grad_enabled(grad), torch.autocast("cpu", dtype, enabled=cast):
            return work(number)

    return alike


@contextmanager
def torchs_threads(numbers: int) -> Iterator[None]:
    """For a few operations on so many `numbers`: where these are many, torch shares each operation out itself. On the
    main thread only, as the setting is the process's."""
    if _number <= 1 or numbers < MANY_NUMBERS or threading.current_thread() is not threading.main_thread():
        yield
        return
    torch.set_num_threads(_number)
    try:
        yield
    finally:
        torch.set_num_threads(1)
