"""A task that the product does not know: each user's newest item, predicted from those before. Importing admits it."""

from typing import Any, Literal

import torch
from torch import Tensor

import trainer.experiment.plan
import trainer.recipes.pipeline_plan  # noqa: F401  (so that every configuration with a task is there)
from etl.settings import Section
from trainer.config import LossConfig, NextItemConfig, TaskSettings
from trainer.data.batch import Batch
from trainer.models import SequenceModel
from trainer.tasks import TASKS, NextItem
from trainer.tasks.base import Task
from trainer.tasks.loss import summed_loss
from trainer.tasks.next_item import begun


class NewestItemConfig(TaskSettings):
    kind: Literal["newest_item"] = "newest_item"
    loss: LossConfig = LossConfig()


class NewestItem(Task):
    def __init__(self, config: NewestItemConfig) -> None:
        self.config, self._next = config, NextItem(NextItemConfig(loss=config.loss))

    def loss(self, model: SequenceModel, batch: Batch) -> tuple[Tensor, Tensor]:
        inputs_BT, _ = begun(batch)
        newest_BT = torch.arange(batch.items.shape[1], device=batch.items.device) == batch.lengths[:, None] - 1
        hidden_ND = model(inputs_BT, batch.lengths, batch.users, newest_BT, causal=True)
        targets_N = batch.items[newest_BT]
        loss = summed_loss(model, hidden_ND, targets_N, self.config.loss, draw=batch.draw, table_VD=None)
        return loss, newest_BT.sum()

    def query(self, model: SequenceModel, batch: Batch, table_VD: Tensor | None = None) -> Tensor:
        return self._next.query(model, batch, table_VD)


def admit() -> None:
    """Add it to the tasks, and to the choices of every configuration that has one."""
    TASKS[NewestItemConfig().kind] = NewestItem
    every = list(_below(Section))
    for section in every:
        if "task" in section.model_fields:
            field: Any = section.model_fields["task"]
            field.annotation = field.annotation | NewestItemConfig
    for section in 3 * every:  # sections hold copies of the schemas of those in them
        section.model_rebuild(force=True)


def _below(kind: type[Section]) -> list[type[Section]]:
    return [one for below in kind.__subclasses__() for one in (below, *_below(below))]


admit()
