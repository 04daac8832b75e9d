"""What a training run is judged by after each epoch: how it ranks what users held out, or tells what they are.

Shape letters: ``V`` catalogue rows.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Protocol

import numpy as np
import torch

from etl.settings import ConfigError
from etl.tables import DOMAIN_ALL
from trainer.config import (
    BasketPairConfig,
    ClickConfig,
    MultiConfig,
    PairHeadConfig,
    PretrainConfig,
    ProfileConfig,
    TaskConfig,
    TaskHead,
    WeightsHeadConfig,
    ranks_items,
    reads_baskets,
)
from trainer.data.catalogue import Catalogue, rows_of_domain
from trainer.data.item_features import Content, read_content
from trainer.data.release import Release
from trainer.data.sequences import SequenceDataset
from trainer.evaluation import clicks, next_events, profiles
from trainer.evaluation.class_metrics import AUC
from trainer.evaluation.item_ranking import FULL, SINGLE, HeldOut, rank, read_held_out
from trainer.evaluation.ranking_metrics import means
from trainer.inference.scorer import ModelScorer, has_items
from trainer.models import SequenceModel
from trainer.parallel.distributed import World
from trainer.tasks import Click, Multi, Profile, Task, build_task
from trainer.tasks.baskets import HEAD as NEXT_BASKET
from trainer.tasks.click import HEAD as CLICK
from trainer.tasks.multi import WEIGHTS
from trainer.tasks.profile import HEAD

SCORES_ITEMS = ("head.", "output_bias", "item_weights.")  # tensors that a task leaves alone which ranks no items


def score_of(task: TaskConfig) -> str:
    """The validation metric that early stopping and searches watch: larger is better."""
    if ranks_items(task):
        return "NDCG@10"
    return f"{task.tells[0]}/{AUC}" if isinstance(task, MultiConfig) else AUC


class Validation(Protocol):
    """Who is asked what, and the task that is trained for it."""

    classes: Mapping[str, tuple[str, ...]]  # head of the task -> the classes that it tells
    task_heads: Mapping[str, TaskHead]
    unused: tuple[str, ...]  # name prefixes of tensors that no step reaches
    content: Content | None  # what items are, where the task reads it

    @property
    def task(self) -> Task: ...

    def __len__(self) -> int:
        """Users that are asked."""
        ...

    def measure(self, model: SequenceModel, world: World) -> dict[str, float]:
        """Mean metrics, `score_of` among them."""
        ...


def read_validation(config: PretrainConfig, release: Release, catalogue: Catalogue) -> Validation:
    """Raises GraftrecError for data that can't be asked as configured."""
    if isinstance(config.task, ProfileConfig):
        return Telling(config, config.task, release, catalogue)
    if isinstance(config.task, MultiConfig):
        return TellingSeveral(config, config.task, release, catalogue)
    if isinstance(config.task, ClickConfig):
        return Clicking(config, config.task, release, catalogue)
    return Ranking(config, release, catalogue)


class Ranking:
    """Held-out items, or baskets, of the validation part, in full ranking."""

    classes: Mapping[str, tuple[str, ...]] = {}
    task_heads: Mapping[str, TaskHead] = {}
    unused: tuple[str, ...] = ()
    content: Content | None = None

    def __init__(self, config: PretrainConfig, release: Release, catalogue: Catalogue) -> None:
        self.task: Task = build_task(config.task)
        self._held_out, self._among = _asked(config, release, catalogue)
        self._batch_size = config.evaluation.batch_size
        if isinstance(config.task, BasketPairConfig):
            self.task_heads = {NEXT_BASKET: 1}

    def __len__(self) -> int:
        return len(self._held_out)

    def measure(self, model: SequenceModel, world: World) -> dict[str, float]:
        scorer = ModelScorer(model, self.task, device=world.device, among=self._among)
        return full_ranking(scorer, self._held_out, world, batch_size=self._batch_size)


def full_ranking(scorer: ModelScorer, held_out: HeldOut, world: World, *, batch_size: int) -> dict[str, float]:
    """Mean metrics; each process ranks its share of the users."""
    ranked = rank(scorer.scores, held_out.take(world.share(len(held_out))), batch_size=batch_size)[FULL]
    names = [name for name in ranked if not name.startswith(SINGLE)]
    table = world.gather(torch.from_numpy(np.stack([ranked[name] for name in names], axis=1)))[: len(held_out)]
    return means({name: table[:, place].numpy() for place, name in enumerate(names)})


class Telling:
    """Users whose class is held out for validation."""

    classes: Mapping[str, tuple[str, ...]]
    task_heads: Mapping[str, TaskHead]
    unused: tuple[str, ...] = SCORES_ITEMS
    content: Content | None = None

    def __init__(self, config: PretrainConfig, task: ProfileConfig, release: Release, catalogue: Catalogue) -> None:
        known = profiles.read_classes(release, task)
        self.task: Task = Profile(task, torch.from_numpy(known.of("train")))
        self.classes, self.task_heads = {HEAD: known.names}, {HEAD: len(known.names)}
        data = config.data
        self._asked = profiles.read_examples(release, data.split, data.domain, catalogue, known, "validation")
        self._batch_size = config.evaluation.batch_size

    def __len__(self) -> int:
        return len(self._asked)

    def measure(self, model: SequenceModel, world: World) -> dict[str, float]:
        scorer = ModelScorer(model, self.task, device=world.device)
        return profiles.validate(scorer, model, self._asked, world, batch_size=self._batch_size)


class TellingSeveral:
    """What a user's first held-out event is, in several ways."""

    classes: Mapping[str, tuple[str, ...]]
    task_heads: Mapping[str, TaskHead]
    unused: tuple[str, ...]
    content: Content | None = None

    def __init__(self, config: PretrainConfig, task: MultiConfig, release: Release, catalogue: Catalogue) -> None:
        data, values = config.data, "value" in task.tells
        dataset = SequenceDataset(release, data.split, data.domain, values=values, event_types=data.event_types)
        known = next_events.read_classes(release, catalogue, task, dataset)
        self.task: Task = Multi(task, torch.from_numpy(known.class_V), torch.from_numpy(known.levels_L))
        self.classes = known.names
        heads: dict[str, TaskHead] = {name: len(names) for name, names in known.names.items()}
        if task.weighting == "uncertainty":
            heads[WEIGHTS] = WeightsHeadConfig(losses=len(task.tells))
        self.task_heads = heads
        self.unused = () if ranks_items(task) else SCORES_ITEMS
        self._held_out = read_held_out(
            release,
            data.split,
            data.domain,
            catalogue,
            "validation",
            max_users=config.train.validation_users,
            values=values,
            event_types=data.event_types,
        )
        self._asked = {name: next_events.examples_of(self._held_out, known, name) for name in known.names}
        self._ranks, self._batch_size = ranks_items(task), config.evaluation.batch_size

    def __len__(self) -> int:
        return len(self._held_out)

    def measure(self, model: SequenceModel, world: World) -> dict[str, float]:
        """Of the item as bare names, of what else is told with its name before."""
        scorer, found = ModelScorer(model, self.task, device=world.device), {}
        if self._ranks:
            found = full_ranking(scorer, self._held_out, world, batch_size=self._batch_size)
        for name, examples in self._asked.items():
            predictions = profiles.validate(scorer, model, examples, world, batch_size=self._batch_size, head=name)
            found |= {f"{name}/{metric}": value for metric, value in predictions.items()}
        return found


class Clicking:
    """Held-out items, and others that the user did not take."""

    classes: Mapping[str, tuple[str, ...]] = {}
    task_heads: Mapping[str, TaskHead]
    unused: tuple[str, ...] = SCORES_ITEMS
    content: Content | None

    def __init__(self, config: PretrainConfig, task: ClickConfig, release: Release, catalogue: Catalogue) -> None:
        self.task = Click(task)
        self.content = read_content(release, catalogue, task.content)
        self.task_heads = {CLICK: PairHeadConfig(content=self.content.width, layers=task.layers)}
        data = config.data
        self._pairs = clicks.read_pairs(
            release,
            data.split,
            data.domain,
            catalogue,
            "validation",
            task,
            max_users=config.train.validation_users,
        )
        self._batch_size = config.evaluation.batch_size

    def __len__(self) -> int:
        return len(self._pairs)

    def measure(self, model: SequenceModel, world: World) -> dict[str, float]:
        scorer = ModelScorer(model, self.task, device=world.device)
        return clicks.validate(scorer, model, self.task, self._pairs, world, batch_size=self._batch_size)


def _asked(config: PretrainConfig, release: Release, catalogue: Catalogue) -> tuple[HeldOut, torch.Tensor | None]:
    """Who is validated, and the rows that are ranked, bool [V]; None: all.

    Where more is read than is asked for, what comes after a user's first held-out item is not: as in evaluation. A
    joint split has such events in the training part. Raises ConfigError where it would ask for items that are not
    ranked.
    """
    data = config.data
    reads_more = data.answered != data.domain
    held_out = read_held_out(
        release,
        config.data.split,
        config.data.domain,
        catalogue,
        "validation",
        times=reads_more,
        max_users=config.train.validation_users,
        baskets=reads_baskets(config.task),
        repeats=config.evaluation.ranks_repeats,
        event_types=config.data.event_types,
    )
    if not has_items(held_out.histories).any():
        raise ConfigError(
            f"expected users with something to read before what split {data.split!r} holds out, found none in domain "
            f"{data.domain!r}: its users are new there; read all domains (data.domain: {DOMAIN_ALL}, data.predicted: "
            f"{data.answered}), or take another split"
        )
    if not reads_more:
        return held_out, None
    among = rows_of_domain(release, catalogue, config.data.answered)
    examples = held_out.targets[held_out.targets >= 0]
    if strange := int((~among[examples]).sum()):
        raise ConfigError(
            f"expected split {config.data.split!r} to hold out items of domain {config.data.answered!r} from domain "
            f"{config.data.domain!r}, found {strange:,} of {len(examples):,} that are none; take a split with a "
            f"joint_target: {config.data.answered} (etl.splits)"
        )
    given = held_out.histories
    before = given.before(held_out.first_time, always=among[given.items])
    return replace(held_out, histories=before), torch.from_numpy(among)
