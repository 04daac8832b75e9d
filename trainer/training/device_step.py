"""A step that the host never waits for: it is read one step later, while the device is at the next.

What decides (whether the loss is a number, how many positions the gradient is divided by) is decided on the device: a
step whose loss or gradient is no number leaves weights and moments as they were. The host hears of it a step later and
stops; before a checkpoint and at an epoch's end it waits for the last step.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from trainer.data.batch import Batch
from trainer.parallel.distributed import World


@dataclass(frozen=True)
class StepNumbers:
    """Of one step, over all processes: positions, the summed loss, what is wished to follow, the gradient's norm."""

    positions: float
    loss: float
    wishes: float
    norm: float


class Unread:
    """The numbers [4] of a step on their way to the host."""

    def __init__(self, batch: Batch, numbers_4: Tensor) -> None:
        self.batch = batch
        self._on_host, self._arrived = numbers_4, None
        if numbers_4.device.type == "cuda":
            self._on_host = torch.empty(4, dtype=numbers_4.dtype, pin_memory=True)
            self._on_host.copy_(numbers_4, non_blocking=True)
            self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._arrived.record()

    def read(self) -> StepNumbers:
        if self._arrived is not None:
            self._arrived.synchronize()
        return StepNumbers(*self._on_host.tolist())


def step_on_device(training: Any, batch: Batch, *, wish: int, learning_rate: float) -> Tensor:
    """One optimiser step on a packed batch: [4] float64 on the device, as `StepNumbers`."""
    with _same_bits_each_time(training.world.device):
        return _step(training, batch, wish, learning_rate)


def _step(training: Any, batch: Batch, wish: int, learning_rate: float) -> Tensor:
    world: World = training.world
    cast = torch.autocast(world.device.type, torch.bfloat16) if world.autocast else nullcontext()
    with cast, world.waiting("the layout of the gradients"):
        loss, positions = training.loss(tensors_only(batch))
    wished = torch.full((), float(wish), dtype=torch.float64, device=loss.device)
    numbers_3 = torch.stack([positions.double(), loss.detach().double(), wished])
    if world.size > 1:
        with world.waiting("a sum"):
            dist.all_reduce(numbers_3)
    # DistributedDataParallel takes the mean over ranks, hence the world's size.
    with world.waiting("the gradients"):
        (loss * (world.size / numbers_3[0].clamp(min=1)).to(loss.dtype)).backward()
    norm = training.optimizer.clip_on_device(training.config.clip_norm)
    is_finite = torch.isfinite(numbers_3[1]) & torch.isfinite(norm)
    training.optimizer.update(learning_rate, skip=~is_finite)
    return torch.cat([numbers_3, norm.double()[None]])


@contextmanager
def _same_bits_each_time(device: torch.device) -> Iterator[None]:
    """On a GPU, without kernels whose sums come in any order, eager or compiled: a run resumes bit for bit."""
    if device.type != "cuda":
        yield
        return
    settings: Any = torch.utils.deterministic
    fills, settings.fill_uninitialized_memory = settings.fill_uninitialized_memory, False
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        settings.fill_uninitialized_memory = fills


def tensors_only(batch: Batch) -> Batch:
    """What a compiled step is a function of: numbers of the host would make it another graph."""
    return replace(batch, draw=(), global_rows=0, global_items=0, rows=slice(0, 0), owners=None)
