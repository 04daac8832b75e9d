"""System metrics of every node: MLflow's monitors of CPUs, memory, disk, network and GPUs, under the names of its page.

MLflow's own sampler asks the server before each sample, stops for good where no answer comes, and its end waits for
the server. So its monitors alone are used. What they measure goes through the run's queue, like all that is logged: a
dead server delays nothing, and what it did not take is kept.

Under torchrun one process of each node samples. Those of other nodes than the run's post their samples at torchrun's
store, where the process that tracks reads them: the others need no way to the server.
"""

import contextlib
import itertools
import json
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from typing import Any

import psutil

from etl.redaction import one_line
from trainer.tracking.queue import warn

STORE_SECONDS = 5.0  # that torchrun's store has for an answer
Log = Callable[[Mapping[str, float], int], None]
_runs = itertools.count()  # of this process; the processes of a world start the same runs


class SystemMetrics:
    """Samples this node every `seconds`, from `start` on until `end`, which waits for nothing.

    `log` takes the samples, and their step, of all nodes; None in a process that does not track.
    """

    def __init__(self, seconds: float, log: Log | None) -> None:
        self._seconds, self._log = seconds, log
        self._node, self._nodes = int(os.environ.get("GROUP_RANK", 0)), int(os.environ.get("GROUP_WORLD_SIZE", 1))
        self._prefix = f"graftrec/system/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}/{next(_runs)}"
        self._next_steps = dict.fromkeys(range(1, self._nodes), 0)  # of other nodes
        self._ended = threading.Event()
        self._started = False

    def start(self) -> None:
        """Sample in a thread. Called again, nothing happens.

        A process that tracks calls it in the thread that imports MLflow: two that import it get in each other's way.
        """
        wanted = self._log is not None or (self._node > 0 and os.environ.get("LOCAL_RANK") == "0")
        if self._started or not wanted:
            return
        self._started = True
        with _harmless():
            monitors = None if self._log is None else _monitors()
            threading.Thread(target=self._work, args=[monitors], name="system metrics", daemon=True).start()

    def end(self) -> None:
        self._ended.set()

    def _work(self, monitors: list[Any] | None) -> None:
        with _harmless():
            monitors = monitors or _monitors()
            store: Any = _store() if self._nodes > 1 else None
            for step in itertools.count():
                if self._ended.wait(self._seconds):
                    return
                values = _sample(monitors)
                if self._log is None:
                    store.set(self._key(self._node, step), json.dumps(values))
                    continue
                self._log(self._named(self._node, values), step)
                for node in self._next_steps:
                    self._log_posted(self._log, node, store)

    def _log_posted(self, log: Log, node: int, store: Any) -> None:
        """Log the samples that another node has posted since."""
        while store.check([key := self._key(node, self._next_steps[node])]):
            log(self._named(node, json.loads(store.get(key))), self._next_steps[node])
            store.delete_key(key)
            self._next_steps[node] += 1

    def _named(self, node: int, values: Mapping[str, float]) -> dict[str, float]:
        """As MLflow names them: by node, where there are several."""
        prefix = f"system/node_{node}/" if self._nodes > 1 else "system/"
        return {prefix + name: value for name, value in values.items()}

    def _key(self, node: int, step: int) -> str:
        return f"{self._prefix}/{node}/{step}"


def _monitors() -> list[Any]:
    """MLflow's monitors of what this node has; the GPUs' needs `nvidia-ml-py`, or `pyrsmi` for AMD's."""
    from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
    from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
    from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
    from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor
    from mlflow.system_metrics.metrics.rocm_monitor import ROCMMonitor

    monitors = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
    for gpus in (GPUMonitor, ROCMMonitor):
        with contextlib.suppress(Exception):  # no such GPU, or no package for it
            monitors.append(gpus())
            break
    psutil.cpu_percent()  # the first answer means nothing, the second is since the first
    return monitors


def _sample(monitors: list[Any]) -> dict[str, float]:
    values: dict[str, float] = {}
    for monitor in monitors:
        with contextlib.suppress(psutil.Error, OSError):
            monitor.collect_metrics()
            values |= {name: float(value) for name, value in monitor.aggregate_metrics().items()}
        monitor.clear_metrics()
    return values


def _store() -> Any:
    """A connection of its own to torchrun's store: the process group's blocks while it waits."""
    import torch.distributed as dist

    place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return dist.TCPStore(  # type: ignore[attr-defined]
        *place, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=STORE_SECONDS)
    )


@contextlib.contextmanager
def _harmless() -> Iterator[None]:
    try:
        yield
    except RuntimeError:  # torchrun's store is gone, with the run: whoever computes says so
        pass
    except Exception as error:
        warn(f"no more system metrics: {one_line(error)}")
