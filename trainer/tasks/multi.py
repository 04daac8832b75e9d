"""Several things about what comes next, predicted together by one user vector (DUPN: Ni et al. 2018; survey 3.1).

At each position of a sequence: the item that follows, its category, the event's kind, the level of its value. The
losses are summed over positions and added up, each with a weight that is set, or learned.

Shape letters: ``B`` sequences, ``T`` positions, ``N`` real positions, ``V`` catalogue rows, ``L`` levels.
"""

from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from etl import tables
from etl.settings import ConfigError
from etl.tables import FIRST_INDEX
from trainer.arrays import Int8Array, Int32Array, IntArray
from trainer.config import MultiConfig, NextItemConfig, TaskHead, WeightsHeadConfig
from trainer.data.batch import Batch
from trainer.data.catalogue import Catalogue
from trainer.data.release import Release
from trainer.data.sequences import SequenceDataset
from trainer.models import SequenceModel
from trainer.tasks.base import Task
from trainer.tasks.loss import summed_loss, wide
from trainer.tasks.next_item import NextItem, begun

WEIGHTS = "loss_weights"  # the head that holds them, where they are learned
NOTHING = -1  # class of what has none


class Multi(Task):
    """The task. `class_V`: the category of each catalogue row; `levels_L`: the values that there are, ascending. None:
    it only predicts."""

    causal = True
    known: "Classes"  # of the data that it is trained on

    def __init__(self, config: MultiConfig, class_V: Tensor | None = None, levels_L: Tensor | None = None) -> None:
        self.config, self.class_V, self.levels_L = config, class_V, levels_L
        self._next = NextItem(NextItemConfig(loss=config.loss))

    @classmethod
    def prepared(cls, config: MultiConfig, release: Release, catalogue: Catalogue, dataset: SequenceDataset) -> Self:
        known = read_classes(release, catalogue, config, dataset)
        task = cls(config, torch.from_numpy(known.class_V), torch.from_numpy(known.levels_L))
        heads: dict[str, TaskHead] = {name: len(names) for name, names in known.names.items()}
        if config.weighting == "uncertainty":
            heads[WEIGHTS] = WeightsHeadConfig(losses=len(config.tells))
        task.class_names, task.heads, task.known = known.names, heads, known
        return task

    def loss(self, model: SequenceModel, batch: Batch) -> tuple[Tensor, Tensor]:
        """(weighed sum of the losses, number of positions) of this rank's slice."""
        whole = "next_item" in self.config.tells and self.config.loss.kind == "full"
        table_VD = model.item_vectors() if whole else None
        real_BT = batch.mask_BT
        inputs_BT, events = begun(model, batch)
        hidden_ND = model(inputs_BT, batch.lengths, batch.users, real_BT, causal=True, table_VD=table_VD, events=events)
        items_N = batch.items[real_BT]
        total = hidden_ND.new_zeros(())
        for place, name in enumerate(self.config.tells):
            if name == "next_item":
                loss = summed_loss(model, hidden_ND, items_N, self.config.loss, draw=batch.draw, table_VD=table_VD)
                count = torch.tensor(len(items_N), device=loss.device)
            else:
                class_N = self.classes(name, batch, real_BT)
                known_N = class_N != NOTHING
                scores_NC = wide(model.task_heads[name](hidden_ND[known_N]))
                loss, count = F.cross_entropy(scores_NC, class_N[known_N], reduction="sum"), known_N.sum()
            if self.config.weighting == "uncertainty":
                loss = model.task_heads[WEIGHTS](place, loss, count)
            total = total + self.config.weights.get(name, 1.0) * loss
        return total, real_BT.sum()

    def classes(self, name: str, batch: Batch, asked_BT: Tensor) -> Tensor:
        """What `name` is of the events at flagged positions [B, T]; NOTHING where they have none."""
        if name == "category":
            assert self.class_V is not None, "a task that is trained has classes"
            self.class_V = self.class_V.to(asked_BT.device)  # once
            return self.class_V[batch.items[asked_BT]]
        if name == "event_type":
            assert batch.event_types is not None, "kinds are read"
            return batch.event_types[asked_BT] - 1  # 0, none of the names, becomes NOTHING
        assert self.levels_L is not None, "a task that is trained has classes"
        assert batch.values is not None, "values are read"
        values_N = batch.values[asked_BT]
        levels_L = self.levels_L = self.levels_L.to(values_N.device)  # once
        place_N = torch.searchsorted(levels_L, values_N.nan_to_num(torch.inf)).clamp(max=len(levels_L) - 1)
        return torch.where(levels_L[place_N] == values_N, place_N, NOTHING)

    def query(self, model: SequenceModel, batch: Batch, table_VD: Tensor | None = None) -> Tensor:
        """Hidden states [B, D] of users after all that is read."""
        return self._next.query(model, batch, table_VD)


# --- classes of events ---------------------------------------------


@dataclass(frozen=True)
class Classes:
    """Names of the classes of what is predicted, and which is whose."""

    names: dict[str, tuple[str, ...]]  # what is predicted -> its classes
    class_V: IntArray  # category of each row, NOTHING where it has none; empty where it isn't predicted
    levels_L: npt.NDArray[np.float32]  # ascending; empty where values aren't predicted

    def of(
        self, name: str, rows: IntArray | Int32Array, values: npt.NDArray[np.float32], event_types: Int8Array
    ) -> IntArray:
        """What `name` is of events, given side by side what is known of them (`values`, `event_types` where these are
        predicted); NOTHING where they have none."""
        if name == "category":
            return self.class_V[rows]
        return event_types.astype(np.int64) - 1 if name == "event_type" else self._level_of(values)  # 0: none of them

    def _level_of(self, values: npt.NDArray[np.float32]) -> IntArray:
        """Classes of values; NOTHING for none, and for one that is no level."""
        place = np.searchsorted(self.levels_L, np.nan_to_num(values, nan=np.inf))
        place = np.minimum(place, len(self.levels_L) - 1)
        return np.where(self.levels_L[place] == values, place, NOTHING)


def read_classes(release: Release, catalogue: Catalogue, config: MultiConfig, dataset: SequenceDataset) -> Classes:
    """What is predicted of a dataset's events; kinds of event are those that it distinguishes. Raises ConfigError: no
    item has a category, no event has a value, or values are no levels."""
    names: dict[str, tuple[str, ...]] = {}
    class_V, levels_L = np.empty(0, np.int64), np.empty(0, np.float32)
    if "category" in config.tells:
        class_V, names["category"] = _categories(release, catalogue)
    if "event_type" in config.tells:
        names["event_type"] = tuple(dataset.event_types)
    if "value" in config.tells:
        levels_L = _levels(dataset, config.max_levels)
        names["value"] = tuple(f"{level:g}" for level in levels_L)
    return Classes(names, class_V, levels_L)


def _categories(release: Release, catalogue: Catalogue) -> tuple[IntArray, tuple[str, ...]]:
    """The first category of each item."""
    items = release.read(tables.ITEMS, ["index", "categories"])
    rows = catalogue.rows(items["index"].to_numpy())
    own = [
        (row, one[0])
        for row, one in zip(rows, items["categories"].to_pylist(), strict=True)
        if row >= FIRST_INDEX and one
    ]
    names = tuple(sorted({name for _, name in own}))
    if len(names) < 2:
        raise ConfigError(
            f"task.tells category: expected items of two categories at least in release {release.number} of "
            f"{release.lake}, found {', '.join(names) or 'none'}; leave it out, or describe it in the source's "
            "`items` file"
        )
    place = {name: number for number, name in enumerate(names)}
    class_V = np.full(len(catalogue), NOTHING, dtype=np.int64)
    for row, name in own:
        class_V[row] = place[name]
    return class_V, names


def _levels(dataset: SequenceDataset, most: int) -> npt.NDArray[np.float32]:
    """The different values of all training parts."""
    found = np.empty(0, np.float32)
    for group in range(len(dataset.groups)):
        sequences = dataset.read([group])
        trained = sequences.values[sequences.positions < sequences.valid_start[sequences.owners]]
        found = np.unique(np.concatenate([found, trained[~np.isnan(trained)]]))
        if len(found) > most:
            raise ConfigError(
                f"task.tells value: expected at most {most} different values (task.max_levels), found more in split "
                f"{dataset.split!r}, domain {dataset.domain!r}; a price is no level: round it in the log, or leave it "
                "out"
            )
    if len(found) < 2:
        raise ConfigError(
            f"task.tells value: expected events with two different values at least in split {dataset.split!r}, domain "
            f"{dataset.domain!r}, found {len(found)}; name the log's value column, or leave it out"
        )
    return found
