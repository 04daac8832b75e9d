"""One process or many: the same code. `torchrun` sets the variables; without them the world is this process alone."""

import os
import resource
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar, cast

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from etl.redaction import one_line
from etl.settings import GraftrecError
from trainer.config import Compile, RuntimeConfig
from trainer.parallel.cores import default_threads, use_threads
from trainer.parallel.rank_states import GRACE_SECONDS, RankLost, RankStates

_Object = TypeVar("_Object")
IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class World:
    """This process's place, and where it computes."""

    rank: int
    size: int
    device: torch.device
    dtype: torch.dtype  # of parameters
    autocast: bool  # bf16 arithmetic over fp32 parameters
    static_shapes: bool = False  # of steps, where model and task can: the host doesn't wait for them
    compile: Compile = "off"

    @property
    def first(self) -> bool:
        return self.rank == 0

    def sum(self, *values: float) -> list[float]:
        """Sums over the processes, in fp64."""
        if self.size == 1:
            return [float(value) for value in values]
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        with self.waiting("a sum"):
            dist.all_reduce(total)
            found: list[float] = total.tolist()
        return found

    def waiting(self, what: str) -> AbstractContextManager[None]:
        """Around what needs all processes: raises RankLost, with the state of each, where one doesn't come."""
        return nullcontext() if _states is None else _states.waiting(what)

    def doing(self, where: Callable[[], str]) -> None:
        """What this process is at from here on, for the message of one that waits for it."""
        if _states is not None:
            _states.where = where

    def share(self, count: int) -> IntArray:
        """Places of this process's share of `count` things; ``gather(…)[:count]`` puts the shares together.

        All shares are equally long (the last thing may be in several), so that processes which share a table out ask
        for its rows equally often."""
        length = -(-count // self.size)
        return np.minimum(np.arange(length * self.rank, length * (self.rank + 1)), count - 1)

    def gather(self, part: torch.Tensor) -> torch.Tensor:
        """The processes' parts (first dimension may differ) one after the other, the same on every process."""
        if self.size == 1:
            return part
        return torch.cat(self.objects(part))

    def exchange(self, values: torch.Tensor, counts: list[int]) -> tuple[torch.Tensor, list[int]]:
        """Send the first ``counts[0]`` rows of `values` to process 0, the next to process 1, and so on.

        Returns what the processes sent to this one, in their order, and how many rows each sent.
        """
        sizes = torch.tensor(counts, device=values.device)
        theirs = torch.empty_like(sizes)
        with self.waiting("an exchange of rows"):
            dist.all_to_all_single(theirs, sizes)
            received: list[int] = theirs.tolist()
            found = values.new_empty(sum(received), *values.shape[1:])
            dist.all_to_all_single(found, values.contiguous(), received, counts)
        return found, received

    def objects(self, mine: _Object) -> list[_Object]:
        """What each process gave, in their order; for small things."""
        if self.size == 1:
            return [mine]
        found: list[_Object | None] = [None] * self.size
        with self.waiting("what all processes gather"):
            dist.all_gather_object(found, mine)
        return cast(list[_Object], found)

    def of_first(self, mine: _Object) -> _Object:
        """What process 0 gave: so that all decide alike, whatever each of them sees."""
        return self.objects(mine)[0]

    def peak_gb(self) -> float:
        """The most memory that this process has held at once, in GB: the GPU's, where it computes on one."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 1e9
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9

    def wait(self) -> None:
        if self.size > 1:
            with self.waiting("all processes to come here"):
                dist.barrier()


ALONE = World(0, 1, torch.device("cpu"), torch.float32, autocast=False)
_states: RankStates | None = None  # of the process group, as that of the process itself


def join(config: RuntimeConfig) -> World:
    """This process's World; joins the process group that `torchrun` made, once. Raises GraftrecError."""
    use_threads(default_threads() if config.threads is None else config.threads)
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    device = _device(config.device, int(os.environ.get("LOCAL_RANK", "0")))
    if size > 1 and not dist.is_initialized():
        _meet(rank, size, "nccl" if device.type == "cuda" else "gloo", config.collective_seconds)
    dtype = torch.float64 if config.precision == "fp64" else torch.float32
    autocast = config.precision == "bf16" or (config.precision == "auto" and _bf16_pays(device))
    return World(rank, size, device, dtype, autocast, config.static_shapes, config.compile)


def _meet(rank: int, size: int, backend: str, seconds: float) -> None:
    global _states
    # NCCL kills a process by itself: not before its state is printed.
    limit = seconds + 2 * GRACE_SECONDS if backend == "nccl" else seconds
    try:
        dist.init_process_group(backend, timeout=timedelta(seconds=limit))
        _states = RankStates(rank, size, seconds)
    except (RuntimeError, ValueError) as error:
        raise RankLost(
            f"process {rank} of {size} did not meet the others within {seconds:g} s ({one_line(error)}); start all of "
            "them by torchrun, or raise runtime.collective_seconds"
        ) from None


def leave() -> None:
    """Leave the process group, where there is one: the end of a command, however it ends."""
    global _states
    if _states is not None:
        _states.close(sys.exc_info()[1])
        _states = None
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def _device(wanted: str, local_rank: int) -> torch.device:
    name = wanted if wanted != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda":
        if not torch.cuda.is_available():
            raise GraftrecError("runtime.device is cuda, but torch sees no GPU here; set runtime.device=cpu or auto")
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # else products' sums come in any order
        torch.cuda.set_device(local_rank)
        return torch.device("cuda", local_rank)
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):  # an unknown name; a device that this machine lacks
        raise GraftrecError(
            f"runtime.device: expected auto, cpu or cuda, found {wanted!r}, which this machine lacks; set another one"
        ) from None
    return device


def _bf16_pays(device: torch.device) -> bool:
    """GPUs from Ampere on multiply bf16 faster than fp32. CPUs do so at some widths only, with AMX tiles or without:
    a step of width 64 takes four times as long (trainer/training/README.md), so there it is a choice
    (`runtime.precision`)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
