"""One file per training objective: `loss`, and `query`, what is scored at evaluation and serving."""

from trainer.config import TaskSettings
from trainer.data.catalogue import Catalogue
from trainer.data.release import Release
from trainer.data.sequences import SequenceDataset
from trainer.tasks.base import Task
from trainer.tasks.baskets import BasketPair, NextBasket
from trainer.tasks.click import Click
from trainer.tasks.masked_item import MaskedItem
from trainer.tasks.multi import Multi
from trainer.tasks.next_item import NextItem
from trainer.tasks.profile import Profile
from trainer.tasks.target_item import TargetItem

__all__ = [
    "BasketPair",
    "Click",
    "MaskedItem",
    "Multi",
    "NextBasket",
    "NextItem",
    "Profile",
    "TargetItem",
    "Task",
    "build_task",
    "prepare_task",
]


TASKS: dict[str, type[Task]] = {
    "masked_item": MaskedItem,
    "next_item": NextItem,
    "target_item": TargetItem,
    "profile": Profile,
    "multi": Multi,
    "click": Click,
    "next_basket": NextBasket,
    "basket_pair": BasketPair,
}


def build_task(config: TaskSettings) -> Task:
    """A task that answers queries."""
    return TASKS[config.kind](config)  # type: ignore[call-arg]


def prepare_task(config: TaskSettings, release: Release, catalogue: Catalogue, dataset: SequenceDataset) -> Task:
    """A task that can be trained on a dataset. Raises GraftrecError."""
    return TASKS[config.kind].prepared(config, release, catalogue, dataset)
