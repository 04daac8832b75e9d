"""What a training objective is: data that it needs, `loss`, `query` and `scores`; its settings name its evaluators."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Self

from torch import Tensor

from trainer.config import TaskHead
from trainer.data.batch import Batch
from trainer.data.catalogue import Catalogue
from trainer.data.item_features import Content
from trainer.data.release import Release
from trainer.data.sequences import SequenceDataset
from trainer.models import SequenceModel

ITEM_TENSORS = ("head.", "output_bias", "item_weights.")  # that a task leaves alone which ranks no items


class Task(ABC):
    """A training objective. Its draws are functions of `batch.draw`, so that a resumed run makes the same ones."""

    class_names: Mapping[str, tuple[str, ...]] = {}  # head -> the classes that it predicts, in the order of its outputs
    heads: Mapping[str, TaskHead] = {}  # layers of its own
    content: Content | None = None  # what items are, where it reads that
    config: Any

    @classmethod
    def prepared(cls, config: Any, release: Release, catalogue: Catalogue, dataset: SequenceDataset) -> Self:
        """The task with what it must know of the data to be trained. Raises GraftrecError."""
        return cls(config)  # type: ignore[call-arg]

    @property
    def unused(self) -> tuple[str, ...]:
        """Name prefixes of tensors that no step reaches."""
        return () if self.config.ranks_items else ITEM_TENSORS

    @property
    def packs(self) -> bool:
        """Whether `loss` takes packed batches too, and then has static shapes and reads nothing back."""
        return bool(self.config.packs)

    @abstractmethod
    def loss(self, model: SequenceModel, batch: Batch) -> tuple[Tensor, Tensor]:
        """(loss summed over the positions where one is taken, their number), of this rank's slice of the batch."""

    @abstractmethod
    def query(self, model: SequenceModel, batch: Batch, table_VD: Tensor | None = None) -> Tensor:
        """Hidden states [B, D] that the candidates are scored against. `table_VD`: as `SequenceModel.forward`'s."""

    def scores(
        self,
        model: SequenceModel,
        hidden_BD: Tensor,
        rows: slice | Tensor,
        table_VD: Tensor | None,
        bias_V: Tensor | None,
    ) -> Tensor:
        """Scores [B, C] float32 of some catalogue rows."""
        return model.scores(hidden_BD, rows, table_VD, bias_V).float()
