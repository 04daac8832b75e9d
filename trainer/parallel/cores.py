"""The thread pool of this process: by default one thread for each usable core; waiting threads sleep.

torch's own threads (OpenMP) split every single operation and spin until the slowest is done: on cores that are busy
with other work they are slower than one thread. So torch gets one thread, and work is split into tasks of many
operations each (`on_threads`). The calling thread takes tasks too, and waits only for those that have begun.
"""

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Generic, TypeVar

import psutil
import torch

_Result = TypeVar("_Result")
_CGROUPS, _MOUNT = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
LARGE_OPERATION = 1 << 22  # elements: milliseconds of work, so that waiting for the slowest thread costs little
_number = 0  # of threads; 0: not yet chosen
_choosing = threading.Lock()
_pool: ThreadPoolExecutor | None = None  # all threads but the calling one


# --- how many ---------------------------------------------------------------------------------------------------------


def usable_cores() -> int:
    """Cores in this process's CPU affinity, at most the CPU quota of its control groups, rounded up."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cgroup_quota(_CGROUPS, _MOUNT)
    return cores if quota is None else max(1, min(cores, -int(-quota // 1)))


def cgroup_quota(cgroups: Path, mount: Path) -> float | None:
    """The smallest CPU quota of the control groups that hold this process, in cores; None: no limit.

    `cgroups` is /proc/self/cgroup, `mount` where the control groups are mounted (versions 1 and 2). In a container a
    group's path may be the host's: missing folders are skipped."""
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


def memory_bytes() -> int:
    """Of this machine, at most the limit of the container that this process is in."""
    limits = [_text(_MOUNT / "memory.max"), _text(_MOUNT / "memory" / "memory.limit_in_bytes")]
    return min([psutil.virtual_memory().total, *(int(limit) for limit in limits if limit.isdigit())])


def default_threads() -> int:
    """Usable cores divided by the processes that `torchrun` started on this machine; at most OMP_NUM_THREADS, unless
    that is the 1 which `torchrun` sets by itself."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    threads = max(1, usable_cores() // processes)
    wanted = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    if not wanted.isdigit() or int(wanted) < 1 or (processes > 1 and wanted == "1"):
        return threads
    return min(threads, int(wanted))


# --- parallel work ----------------------------------------------------------------------------------------------------


def use_threads(number: int) -> None:
    """Give `on_threads` that number of threads, and torch one for each of its own operations."""
    global _number, _pool
    with _choosing:
        torch.set_num_threads(1)
        if number != _number:
            if _pool is not None:
                _pool.shutdown()
            _number, _pool = number, ThreadPoolExecutor(number - 1, "graftrec") if number > 1 else None


def num_threads() -> int:
    """The number that `use_threads` set; if it wasn't called, `default_threads`."""
    if _number == 0:
        use_threads(default_threads())
    return _number


def on_threads(work: Callable[[int], _Result], num: int) -> Iterator[_Result]:
    """Yield ``work(0), work(1), …`` in order, each computed by any free thread, with this thread's torch settings.

    An exception is raised at its place in the order; tasks that have not begun by then are dropped. Sets the default
    number of threads if `use_threads` was not called."""
    threads = num_threads()
    if _pool is None or num <= 1:
        yield from map(work, range(num))
        return
    tasks = _Tasks(_with_torch_settings(work), num)
    helpers = [_pool.submit(tasks.run_all) for _ in range(min(threads, num) - 1)]
    try:
        for number in range(num):
            while not tasks.results[number].done() and tasks.run_next():
                pass
            result = tasks.results[number].result()
            tasks.results[number] = Future()  # only the caller keeps the result alive
            yield result
            del result
    finally:
        tasks.drop_rest()
        for helper in helpers:
            if not helper.cancel():  # a helper that never got a thread needs no waiting for
                helper.result()


class _Tasks(Generic[_Result]):
    """Numbered tasks, started in order by any thread, each once."""

    def __init__(self, work: Callable[[int], _Result], num: int) -> None:
        self.work, self.results = work, [Future[_Result]() for _ in range(num)]
        self._next, self._lock = 0, threading.Lock()

    def run_next(self) -> bool:
        """Run the next task; False: none is left."""
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

    def run_all(self) -> None:
        while self.run_next():
            pass

    def drop_rest(self) -> None:
        with self._lock:
            self._next = len(self.results)


def _with_torch_settings(work: Callable[[int], _Result]) -> Callable[[int], _Result]:
    """`work` with the calling thread's autocast and gradient modes, which torch keeps per thread."""
    cast, dtype = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")
    inference, grad = torch.is_inference_mode_enabled(), torch.is_grad_enabled()

    def run(number: int) -> _Result:
        with torch.inference_mode(inference), torch.set_grad_enabled(grad), torch.autocast("cpu", dtype, enabled=cast):
            return work(number)

    return run


@contextmanager
def torch_threads_for(num_elements: int) -> Iterator[None]:
    """Let torch split each operation inside over all threads if the tensors have LARGE_OPERATION elements or more.

    On the main thread only: the setting is the process's."""
    if _number <= 1 or num_elements < LARGE_OPERATION or threading.current_thread() is not threading.main_thread():
        yield
        return
    torch.set_num_threads(_number)
    try:
        yield
    finally:
        torch.set_num_threads(1)
