"""The one training loop: an object whose state *is* the checkpoint, and short functions around it.

A step is a function of (weights, batch) alone: whatever is random in it (dropout, masks, negatives) is drawn from
(seed, epoch, step). So a run that was stopped anywhere goes on bit for bit, and two processes see what one would see.
The loss is normalised over the *global* batch: a sum over this rank's positions, divided by the number of all ranks'.
"""

import hashlib
import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from etl.config import GraftrecError
from trainer import checkpoint
from trainer.checkpoint import Checkpoint
from trainer.config import TrainConfig
from trainer.data.batch import Batch
from trainer.data.loader import Loader
from trainer.distributed import World
from trainer.models import Bert4Rec
from trainer.tasks import Task


class NonFiniteLoss(GraftrecError):
    """The loss, or its gradient, is not a number: the run stops before the weights are spoiled."""

    exit_code = 4


class Stopped(GraftrecError):
    """SIGTERM or SIGINT came; the state is saved and the same command goes on from it."""

    exit_code = 143


@dataclass
class Epoch:
    """One line of a run's history. `loss` in nats per predicted item; metrics of the validation part."""

    epoch: int
    loss: float
    metrics: dict[str, float]
    items_per_second: float
    seconds: float  # of training and validation


@dataclass
class Progress:
    """What has happened so far; JSON in a checkpoint."""

    step: int = 0  # optimiser steps
    history: list[Epoch] = field(default_factory=list)
    best_epoch: int = 0  # 1-based; 0: none yet
    best_score: float = -math.inf
    loss_sum: float = 0.0  # of the epoch under way
    positions: float = 0.0
    items: int = 0
    seconds: float = 0.0
    finished: bool = False


class Loss(nn.Module):
    """Model and task as one module, so that DistributedDataParallel sees a forward pass."""

    def __init__(self, model: Bert4Rec, task: Task) -> None:
        super().__init__()
        self.model, self.task = model, task

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        return self.task.loss(self.model, batch)


class Training:
    """A run under way. `state()` is a checkpoint, `restore()` takes one."""

    def __init__(self, model: Bert4Rec, task: Task, loader: Loader, config: TrainConfig, world: World) -> None:
        self.model, self.task, self.loader, self.config, self.world = model, task, loader, config, world
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.optimizer = _optimizer(self.parameters, config)
        self.progress = Progress()
        self.best: dict[str, Tensor] = {}
        self.loss: nn.Module = Loss(model, task)
        if world.size > 1:
            self.loss = DistributedDataParallel(self.loss)

    def state(self) -> Checkpoint:
        names = {id(parameter): name for name, parameter in self.parameters.items()}
        moments = {
            f"{names[id(parameter)]}:{key}": value
            for parameter, slots in self.optimizer.state.items()
            for key, value in slots.items()
        }
        tensors = {"model": self.model.state_dict(), "optimizer": moments, "best": self.best}
        return Checkpoint(tensors, {"loader": self.loader.state_dict(), "progress": asdict(self.progress)})

    def restore(self, saved: Checkpoint) -> None:
        self.model.load_state_dict(saved.tensors["model"])
        for key, value in saved.tensors["optimizer"].items():
            name, _, slot = key.rpartition(":")
            # The step count stays on the CPU, as the optimiser made it.
            at = value if slot == "step" else value.to(self.parameters[name].device)
            self.optimizer.state[self.parameters[name]][slot] = at
        self.best = saved.tensors["best"]
        self.loader.load_state_dict(saved.state["loader"])
        told = dict(saved.state["progress"])
        told["history"] = [Epoch(**line) for line in told["history"]]
        self.progress = Progress(**told)


def train(
    training: Training, *, validate: Callable[[], dict[str, float]], score: str, checkpoints: Path,
    on_epoch: Callable[[Epoch], None], show_progress: bool, say: Callable[[str], None],
) -> None:  # fmt: skip
    """Train until the epochs are used up, or `score` (a metric that `validate` returns) has stopped rising.

    Resumes from `checkpoints` where there are any. Afterwards `training.best` holds the best epoch's weights.
    Raises Stopped on SIGTERM and SIGINT, NonFiniteLoss.
    """
    config, progress = training.config, training.progress
    saved = checkpoint.newest(checkpoints, warn=say)
    if saved is not None:
        training.restore(saved)
        progress = training.progress
        say(f"resuming at epoch {training.loader.epoch + 1}, step {training.loader.step} ({progress.step} steps done)")
    last_saved = time.monotonic()
    with _stop_flag() as stopping:
        while not progress.finished:
            begun = time.monotonic()
            for batch in _shown(training, show_progress):
                stop = train_step(training, batch, stop=stopping[0])
                now = time.monotonic()
                progress.seconds += now - begun
                begun = now
                if stop or now - last_saved >= config.checkpoint_seconds:
                    _save(training, checkpoints)
                    last_saved = time.monotonic()
                if stop:
                    at = f"epoch {training.loader.epoch + 1}, step {training.loader.step}"
                    raise Stopped(f"stopped by a signal at {at}; the state is saved: run the same command to go on")
            _finish_epoch(training, validate(), score, time.monotonic() - begun)
            _save(training, checkpoints)
            last_saved = time.monotonic()
            on_epoch(progress.history[-1])


def train_step(training: Training, batch: Batch, *, stop: bool) -> bool:
    """One optimiser step on a global batch. Returns whether any rank wants to stop (they must do so together)."""
    world, config, progress = training.world, training.config, training.progress
    batch = batch.to(world.device)
    torch.manual_seed(_seed(*batch.draw, world.rank))  # dropout's
    cast = torch.autocast(world.device.type, torch.bfloat16) if world.autocast else nullcontext()
    with cast:
        loss, positions = training.loss(batch)
    num_positions, total, wants_stop = world.sum(float(positions), loss.item(), float(stop))
    # DistributedDataParallel takes the mean over ranks, hence the world's size.
    (loss * (world.size / num_positions)).backward()
    norm = nn.utils.clip_grad_norm_(training.parameters.values(), config.clip_norm)
    if not (math.isfinite(total) and math.isfinite(norm.item())):
        raise NonFiniteLoss(_blame(batch, total, float(norm)))
    for group in training.optimizer.param_groups:
        group["lr"] = learning_rate(config, progress.step, training.loader.num_steps)
    training.optimizer.step()
    training.optimizer.zero_grad(set_to_none=True)
    progress.step += 1
    progress.loss_sum += total
    progress.positions += num_positions
    progress.items += int(batch.global_items)
    return wants_stop > 0


def learning_rate(config: TrainConfig, step: int, steps_per_epoch: int) -> float:
    """The rate of optimiser step `step` (from 0): linear warm-up, then the schedule, over all `epochs`."""
    warm = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    done = min(1.0, step / max(config.epochs * steps_per_epoch, 1))
    match config.schedule:
        case "constant":
            fall = 1.0
        case "linear":
            fall = 1 - done
        case "cosine":
            fall = 0.5 * (1 + math.cos(math.pi * done))
    return config.learning_rate * warm * max(fall, config.final_rate)


def _optimizer(parameters: dict[str, nn.Parameter], config: TrainConfig) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2019); weight decay on matrices of layers only, not on tables, biases, norms."""
    decayed = [p for name, p in parameters.items() if p.ndim == 2 and "embedding" not in name]
    others = [p for name, p in parameters.items() if not (p.ndim == 2 and "embedding" not in name)]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=config.learning_rate, fused=True)


def _finish_epoch(training: Training, metrics: dict[str, float], score: str, validation_seconds: float) -> None:
    progress, config = training.progress, training.config
    epoch = len(progress.history) + 1
    speed = progress.items / max(progress.seconds, 1e-9)
    loss = progress.loss_sum / max(progress.positions, 1)
    progress.history.append(Epoch(epoch, loss, metrics, speed, progress.seconds + validation_seconds))
    if metrics[score] > progress.best_score:
        progress.best_score, progress.best_epoch = metrics[score], epoch
        training.best = {name: tensor.detach().clone() for name, tensor in training.model.state_dict().items()}
    waited = epoch - max(progress.best_epoch, config.min_epochs)
    progress.finished = epoch >= config.epochs or waited >= config.patience
    progress.loss_sum = progress.positions = progress.seconds = 0.0
    progress.items = 0


def _save(training: Training, checkpoints: Path) -> None:
    if training.world.first:
        checkpoint.save(checkpoints, training.progress.step, training.state(), keep=training.config.keep_checkpoints)


def _shown(training: Training, show: bool) -> Iterator[Batch]:
    """The epoch's batches under a progress bar: loss, sequences per second, time left."""
    loader, progress = training.loader, training.progress
    label = f"epoch {loader.epoch + 1}/{training.config.epochs}"
    size = training.config.batch_size
    total, done = loader.num_steps * size, loader.step * size
    with tqdm(
        total=total, initial=done, desc=label, unit=" seq", disable=not (show and training.world.first), leave=False,
        mininterval=0.5,
    ) as bar:  # fmt: skip
        for batch in loader:
            yield batch
            bar.set_postfix_str(f"loss {progress.loss_sum / max(progress.positions, 1):.3f}", refresh=False)
            bar.update(batch.global_rows)


def _seed(*parts: int) -> int:
    """63 well-mixed bits of some numbers: near seeds must not give like streams."""
    digest = hashlib.blake2b(np.array(parts, dtype=np.int64).tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _blame(batch: Batch, loss: float, norm: float) -> str:
    _, epoch, step = batch.draw
    users = ", ".join(map(str, batch.users[:5].tolist()))
    return (
        f"loss {loss} (gradient norm {norm}) at epoch {epoch + 1}, step {step}: the batch of {batch.global_rows} users "
        f"that begins with user indices {users}; lower train.learning_rate or train.clip_norm, or look at these users"
    )


@contextmanager
def _stop_flag() -> Iterator[list[bool]]:
    """[False], which becomes [True] when SIGTERM or SIGINT asks for an orderly stop."""
    flag = [False]

    def ask(number: int, frame: FrameType | None) -> None:
        flag[0] = True

    try:
        before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
    except ValueError:  # not the main thread: signals are somebody else's
        yield flag
        return
    try:
        yield flag
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
