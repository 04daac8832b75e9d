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
from enum import IntEnum
from pathlib import Path
from types import FrameType

import numpy as np
import torch
from pydantic import TypeAdapter
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from etl.settings import GraftrecError
from trainer.config import TrainConfig
from trainer.data.ahead import Ahead, Batches
from trainer.data.batch import Batch
from trainer.data.loader import Loader
from trainer.models import SequenceModel
from trainer.models.row_table import take_rows
from trainer.parallel.distributed import World
from trainer.tasks import Task
from trainer.training import checkpoint
from trainer.training.checkpoint import Checkpoint
from trainer.training.device_step import StepNumbers, Unread, step_on_device
from trainer.training.optimizer import Optimizer

WORTH_COMPILING = 2_000  # steps: a handful of graphs take a minute or two


class NonFiniteLoss(GraftrecError):
    """The loss, or its gradient, is not a number: the run stops before the weights are spoiled."""

    exit_code = 4


class Pruned(GraftrecError):
    """The run's judge stops it for good: it is not worth going on with. No failure."""

    exit_code = 0


class Stopped(GraftrecError):
    """SIGTERM or SIGINT came; the state is saved and the same command goes on from it."""

    exit_code = 143


class Wish(IntEnum):
    """What is to follow a step. Summed over the processes: the first alone wishes to save, any may wish to stop."""

    GO_ON = 0
    SAVE = 1
    STOP = 2  # and save


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

    def __init__(self, model: SequenceModel, task: Task) -> None:
        super().__init__()
        self.model, self.task = model, task

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        return self.task.loss(self.model, batch)


class Training:
    """A run under way. `state()` is a checkpoint, `restore()` takes one."""

    def __init__(self, model: SequenceModel, task: Task, loader: Loader, config: TrainConfig, world: World) -> None:
        self.model, self.task, self.loader, self.config, self.world = model, task, loader, config, world
        self.packs = world.static_shapes and model.packs and task.packs
        self.batches: Batches = loader
        self.unread: Unread | None = None  # the newest step, of static shapes
        if self.packs:
            rows = -(-config.batch_size // world.size)
            self.batches = Ahead(loader, rows=rows, max_length=loader.max_length, device=world.device)
        self.optimizer = Optimizer(model, config, world)
        self.progress = Progress()
        self.saved: Path | None = None  # the newest checkpoint; the best epoch's weights lie in it too
        self.loss: nn.Module = Loss(model, task)
        if self.packs and self._compiles():
            self.loss.compile(dynamic=False, fullgraph=True)
        if world.size > 1:
            # Row-wise tables differ from process to process, and have an exchange of their own; buffers never change.
            apart = [*model.row_tables(), *(name for name, _ in model.named_buffers())]
            ignore: Callable[[nn.Module, list[str]], None] = (
                DistributedDataParallel._set_params_and_buffers_to_ignore_for_model
            )
            ignore(self.loss, [f"model.{name}" for name in apart])
            with world.waiting("all processes to build the model"):
                self.loss = DistributedDataParallel(self.loss)

    def _compiles(self) -> bool:
        if self.world.compile != "auto":
            return self.world.compile == "on"
        return self.world.device.type == "cuda" and self.config.epochs * self.batches.num_steps >= WORTH_COMPILING

    def settle(self) -> StepNumbers | None:
        """Wait for the newest step, where it is not read yet: its numbers. Raises NonFiniteLoss."""
        if self.unread is None:
            return None
        unread, self.unread = self.unread, None
        numbers = unread.read()
        if not (math.isfinite(numbers.loss) and math.isfinite(numbers.norm)):
            raise NonFiniteLoss(_blame(unread.batch, numbers.loss, numbers.norm))
        self.progress.loss_sum += numbers.loss
        self.progress.positions += numbers.positions
        return numbers

    @property
    def best(self) -> dict[str, list[Tensor]]:
        """The best epoch's weights, mapped from disk: each tensor whole, or the processes' parts of it (row r is in
        part r mod their number)."""
        assert self.saved is not None
        return checkpoint.weights(self.saved, "best")

    def state(self) -> Checkpoint:
        moments, sums = self.optimizer.state()
        tables = self.model.row_tables()
        weights = {name: tensor for name, tensor in self.model.state_dict().items() if name not in tables}
        return Checkpoint(
            tensors={"model": weights, "optimizer": moments},
            parts={
                "model": {name: [part] for name, part in tables.items()},
                "optimizer": {n: [p] for n, p in sums.items()},
            },
            state={"loader": self.batches.state_dict(), "progress": asdict(self.progress)},
        )

    def restore(self, saved: Checkpoint) -> None:
        """Raises GraftrecError for a checkpoint of another run."""
        with checkpoint.fitting(saved), torch.no_grad():
            progress = TypeAdapter(Progress).validate_python(saved.state["progress"])
            tables = self.model.row_tables()
            self.model.load_state_dict(saved.tensors["model"], strict=not tables)
            self.optimizer.restore(saved.tensors["optimizer"])
            for name, table in tables.items():
                take_rows(table, saved.parts["model"][name], self.world)
            for name, part in self.optimizer.state()[1].items():
                take_rows(part, saved.parts["optimizer"][name], self.world)
            self.batches.load_state_dict(saved.state["loader"])
        self.saved, self.progress = saved.folder, progress


@dataclass(frozen=True, kw_only=True)
class Watch:
    """Who follows a run: `on_resume` sees the epochs that a resumed run had done, `on_epoch` each one at its end.
    `judge` sees each epoch's end too, that which a resumed run was stopped after again, and ends the run by raising."""

    on_epoch: Callable[[Epoch], None]
    on_resume: Callable[[list[Epoch]], None]
    judge: Callable[[Progress], None]
    show_progress: bool
    say: Callable[[str], None]


def train(
    training: Training,
    *,
    validate: Callable[[], dict[str, float]],
    score: str,
    checkpoints: Path,
    watch: Watch,
) -> None:
    """Train until the epochs are used up, or `score` (a metric that `validate` returns) has stopped rising. Where it
    returns none, all epochs are trained, and each is better than the one before.

    Resumes from `checkpoints` where there are any. Afterwards `training.best` holds the best epoch's weights.
    Raises Stopped on SIGTERM and SIGINT, NonFiniteLoss, and what `watch.judge` does.
    """
    config, progress = training.config, training.progress
    saved = newest_checkpoint(training.world, checkpoints, watch.say)
    if saved is not None:
        training.restore(saved)
        progress = training.progress
        watch.say(
            f"resuming at epoch {training.batches.epoch + 1}, step {training.batches.step} ({progress.step} steps done)"
        )
        if progress.history:
            watch.on_resume(progress.history)
            watch.judge(progress)
    training.world.doing(lambda: f"epoch {training.batches.epoch + 1}, step {training.batches.step}")
    last_saved = time.monotonic()
    with stop_signals() as signals:
        while not progress.finished:
            begun = time.monotonic()
            for batch in _shown(training, watch.show_progress):
                due = training.world.first and time.monotonic() - last_saved >= config.checkpoint_seconds
                wish = train_step(training, batch, stop=bool(signals), save=due)
                now = time.monotonic()
                progress.seconds += now - begun
                begun = now
                if wish >= Wish.SAVE:
                    training.settle()
                    _save(training, checkpoints)
                    last_saved = time.monotonic()
                if wish >= Wish.STOP:
                    at = f"epoch {training.batches.epoch + 1}, step {training.batches.step}"
                    raise Stopped(f"stopped by a signal at {at}; the state is saved: run the same command to go on")
            training.settle()
            training.model.fit_features()
            metrics = training.world.of_first(validate())  # another host's may differ in the last bits
            is_best = _finish_epoch(training, metrics, score, time.monotonic() - begun)
            _save(training, checkpoints, is_best=is_best)
            last_saved = time.monotonic()
            watch.on_epoch(progress.history[-1])
            watch.judge(progress)


def train_step(training: Training, batch: Batch, *, stop: bool, save: bool = False) -> Wish:
    """One optimiser step on a global batch. Returns what follows it, on all processes alike: each asks its own clock
    and its own signals, so the sum of the losses carries the answer. `save`: of the first process only."""
    world, config, progress = training.world, training.config, training.progress
    if training.packs:
        return _packed_step(training, batch, Wish.STOP if stop else Wish.SAVE if save else Wish.GO_ON)
    batch = batch.to(world.device)
    torch.manual_seed(_seed(*batch.draw, world.rank))  # dropout's
    cast = torch.autocast(world.device.type, torch.bfloat16) if world.autocast else nullcontext()
    with cast, world.waiting("the layout of the gradients"):  # which all settle on the way, in the second step
        loss, positions = training.loss(batch)
    wish = Wish.STOP if stop else Wish.SAVE if save else Wish.GO_ON
    num_positions, total, wishes = world.sum(float(positions), loss.item(), float(wish))
    # DistributedDataParallel takes the mean over ranks, hence the world's size.
    # A batch may hold nothing that is predicted.
    with world.waiting("the gradients"):
        (loss * (world.size / max(num_positions, 1))).backward()
    norm = training.optimizer.clip(config.clip_norm)
    if not (math.isfinite(total) and math.isfinite(norm)):
        raise NonFiniteLoss(_blame(batch, total, norm))
    training.optimizer.update(learning_rate(config, progress.step, training.batches.num_steps))
    progress.step += 1
    progress.loss_sum += total
    progress.positions += num_positions
    progress.items += int(batch.global_items)
    return Wish(min(int(wishes), Wish.STOP))


def _packed_step(training: Training, batch: Batch, wish: Wish) -> Wish:
    """As `train_step`, of static shapes: the device is given this step before the one before it is read. Many processes
    agree on what follows a step later."""
    progress = training.progress
    rate = learning_rate(training.config, progress.step, training.batches.num_steps)
    numbers_4 = step_on_device(training, batch, wish=wish, learning_rate=rate)
    before = training.settle()
    training.unread = Unread(batch, numbers_4)
    progress.step += 1
    progress.items += int(batch.global_items)
    if training.world.size == 1:
        return wish
    return Wish(min(int(before.wishes) if before is not None else 0, Wish.STOP))


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


def newest_checkpoint(world: World, checkpoints: Path, say: Callable[[str], None]) -> Checkpoint | None:
    """The checkpoint to go on from. Raises GraftrecError where the processes do not find the same one."""
    saved = checkpoint.newest(checkpoints, warn=say)
    found = world.objects(saved.folder.name if saved is not None and saved.folder is not None else "none")
    if len(set(found)) > 1:
        names = ", ".join(f"process {rank}: {name}" for rank, name in enumerate(found))
        raise GraftrecError(
            f"{checkpoints}: expected the same newest whole checkpoint for all processes, found {names}; set output to "
            "storage that all hosts share, or remove the newer ones"
        )
    return saved


def _finish_epoch(training: Training, metrics: dict[str, float], score: str, validation_seconds: float) -> bool:
    """Close the epoch's line of the history. Whether it is the best so far."""
    progress, config = training.progress, training.config
    epoch = len(progress.history) + 1
    speed = progress.items / max(progress.seconds, 1e-9)
    loss = progress.loss_sum / max(progress.positions, 1)
    progress.history.append(Epoch(epoch, loss, metrics, speed, progress.seconds + validation_seconds))
    is_best = not metrics or metrics[score] > progress.best_score
    if is_best:
        progress.best_score, progress.best_epoch = metrics.get(score, -math.inf), epoch
    waited = epoch - max(progress.best_epoch, config.min_epochs)
    progress.finished = epoch >= config.epochs or waited >= config.patience
    progress.loss_sum = progress.positions = progress.seconds = 0.0
    progress.items = 0
    return is_best


def _save(training: Training, checkpoints: Path, *, is_best: bool = False) -> None:
    """Write a checkpoint. The best epoch's weights are never held in memory: they are the `model` files of the
    checkpoint that ended it, which every later one links to."""
    training.saved = checkpoint.save(
        checkpoints,
        training.progress.step,
        training.state(),
        keep=training.config.keep_checkpoints,
        world=training.world,
        is_best=is_best,
        before=training.saved,
    )


def _shown(training: Training, show: bool) -> Iterator[Batch]:
    """The epoch's batches under a progress bar: loss, sequences per second, time left."""
    loader, progress = training.batches, training.progress
    label = f"epoch {loader.epoch + 1}/{training.config.epochs}"
    size = training.config.batch_size
    total, done = loader.num_steps * size, loader.step * size
    with tqdm(
        total=total,
        initial=done,
        desc=label,
        unit=" seq",
        leave=False,
        mininterval=0.5,
        disable=None if show and training.world.first else True,
    ) as bar:
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
    users_B = batch.users if batch.packing is None or batch.owners is None else batch.owners
    users = ", ".join(map(str, users_B[:5].tolist()))
    return (
        f"loss {loss} (gradient norm {norm}) at epoch {epoch + 1}, step {step}: the batch of {batch.global_rows} users "
        f"that begins with user indices {users}; lower train.learning_rate or train.clip_norm, or look at these users"
    )


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """The SIGTERM and SIGINT that came, asking for an orderly stop. One that nobody answered by Stopped, since it came
    after the last step, is passed on at the end: a command that trains many models must not miss it."""
    came: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        came.append(number)

    try:
        before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    except ValueError:  # not the main thread: signals are somebody else's
        yield came
        return
    answered = False
    try:
        yield came
    except Stopped:
        answered = True
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if came and not answered:
            signal.raise_signal(came[-1])
