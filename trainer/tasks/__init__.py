"""One file per training objective: `loss`, and `query`, how the model is asked at evaluation and serving."""

from typing import Protocol

from torch import Tensor

from trainer.config import (
    BasketPairConfig,
    ClickConfig,
    MaskedItemConfig,
    MultiConfig,
    NextBasketConfig,
    NextItemConfig,
    ProfileConfig,
    TargetItemConfig,
    TaskConfig,
)
from trainer.data.batch import Batch
from trainer.models import SequenceModel
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
]


class Task(Protocol):
    """A training objective. Its draws are functions of `batch.draw`, so that a resumed run makes the same ones."""

    def loss(self, model: SequenceModel, batch: Batch) -> tuple[Tensor, Tensor]:
        """(loss summed over the positions where one is taken, their number), of this rank's slice of the batch."""
        ...

    def query(self, model: SequenceModel, batch: Batch, table_VD: Tensor | None = None) -> Tensor:
        """Hidden states [B, D] that the candidates are scored against. `table_VD`: as `SequenceModel.forward`'s."""
        ...


def build_task(config: TaskConfig) -> Task:
    match config:
        case MaskedItemConfig():
            return MaskedItem(config)
        case NextItemConfig():
            return NextItem(config)
        case TargetItemConfig():
            return TargetItem(config)
        case ProfileConfig():
            return Profile(config)
        case MultiConfig():
            return Multi(config)
        case ClickConfig():
            return Click(config)
        case NextBasketConfig():
            return NextBasket(config)
        case BasketPairConfig():
            return BasketPair(config)
