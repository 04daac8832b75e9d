"""The loop of a training on triples: epochs, checkpoints, signals."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from trainer.knowledge_graph.training import GraphEpoch, GraphTraining
from trainer.training import checkpoint
from trainer.training.loop import Stopped, Wish, newest_checkpoint, stop_signals


@dataclass(frozen=True, kw_only=True)
class GraphWatch:
    """Who follows a run: `on_resume` sees the epochs that a resumed run had done, `on_epoch` each one at its end."""

    on_epoch: Callable[[GraphEpoch], None]
    on_resume: Callable[[list[GraphEpoch]], None]
    show_progress: bool
    say: Callable[[str], None]


def train_graph(
    training: GraphTraining, *, validate: Callable[[], dict[str, float]], checkpoints: Path, watch: GraphWatch
) -> None:
    """Train until the epochs are used up, resuming from `checkpoints` where there are any. Raises Stopped on SIGTERM
    and SIGINT, and NonFiniteLoss."""
    saved = newest_checkpoint(training.world, checkpoints, watch.say)
    if saved is not None:
        training.restore(saved)
        progress = training.progress
        watch.say(f"resuming at epoch {progress.epoch + 1}, step {progress.step}")
        if progress.history:
            watch.on_resume(progress.history)
    training.world.doing(lambda: f"epoch {training.progress.epoch + 1}, step {training.progress.step}")
    with stop_signals() as signals:
        while training.progress.epoch < training.config.epochs:
            _train_epoch(training, checkpoints, watch, signals)
            begun = time.monotonic()
            metrics = validate()
            _finish_epoch(training, metrics, time.monotonic() - begun)
            _save(training, checkpoints)
            watch.on_epoch(training.progress.history[-1])


def _train_epoch(training: GraphTraining, checkpoints: Path, watch: GraphWatch, signals: list[int]) -> None:
    progress, config, world = training.progress, training.config, training.world
    begun = last_saved = time.monotonic()
    total = len(training.batches.known.triples)
    with tqdm(
        total=total,
        initial=progress.triples,
        desc=f"epoch {progress.epoch + 1}/{config.epochs}",
        unit=" triples",
        leave=False,
        mininterval=0.5,
        disable=None if watch.show_progress and world.first else True,
    ) as bar:
        for batch in training.batches.epoch(progress.epoch, first_step=progress.step):
            training.step(batch)
            bar.update(batch.global_size)
            now = time.monotonic()
            progress.seconds += now - begun
            begun = now
            wish = _wish(training, stop=bool(signals), save=now - last_saved >= config.checkpoint_seconds)
            if wish >= Wish.SAVE:
                _save(training, checkpoints)
                last_saved = begun = time.monotonic()
            if wish >= Wish.STOP:
                at = f"epoch {progress.epoch + 1}, step {progress.step}"
                raise Stopped(f"stopped by a signal at {at}; the state is saved: run the same command to go on")


def _wish(training: GraphTraining, *, stop: bool, save: bool) -> Wish:
    """What follows a step, on all processes alike: each looks at its own clock and its own signals."""
    wish = Wish.STOP if stop else Wish.SAVE if save and training.world.first else Wish.GO_ON
    return Wish(min(int(training.world.sum(float(wish))[0]), Wish.STOP))


def _finish_epoch(training: GraphTraining, metrics: dict[str, float], seconds: float) -> None:
    """Close the epoch's line of the history. `seconds`: of its validation."""
    progress = training.progress
    speed = progress.triples / max(progress.seconds, 1e-9)
    mean = progress.loss_sum / max(progress.triples, 1)
    progress.history.append(GraphEpoch(progress.epoch + 1, mean, speed, progress.seconds + seconds, metrics))
    progress.epoch += 1
    progress.step = progress.triples = 0
    progress.loss_sum = progress.seconds = 0.0


def _save(training: GraphTraining, checkpoints: Path) -> None:
    progress = training.progress
    checkpoint.save(
        checkpoints,
        progress.epoch * training.batches.num_steps + progress.step,
        training.state(),
        keep=training.config.keep_checkpoints,
        world=training.world,
    )
