"""What is told of a user's next event beside the item: its category, or its value as one of the levels that there are.

Shape letters: ``U`` users, ``V`` catalogue rows, ``L`` levels.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from etl import tables
from etl.settings import ConfigError
from etl.tables import FIRST_INDEX
from trainer.arrays import Int8Array, Int32Array
from trainer.config import MultiConfig
from trainer.data.catalogue import Catalogue
from trainer.data.release import Release
from trainer.data.sequences import SequenceDataset
from trainer.evaluation.item_ranking import HeldOut
from trainer.evaluation.profiles import LabelledUsers
from trainer.tasks.multi import NOTHING

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Classes:
    """Names of the classes of what is told, and which is whose."""

    names: dict[str, tuple[str, ...]]  # what is told -> its classes
    class_V: IntArray  # category of each row, NOTHING where it has none; empty where it isn't told
    levels_L: npt.NDArray[np.float32]  # ascending; empty where values aren't told

    def of(
        self, name: str, rows: IntArray | Int32Array, values: npt.NDArray[np.float32], event_types: Int8Array
    ) -> IntArray:
        """What `name` is of events, given side by side what is known of them (`values`, `event_types` where these are
        told); NOTHING where they have none."""
        if name == "category":
            return self.class_V[rows]
        return event_types.astype(np.int64) - 1 if name == "event_type" else self._level_of(values)  # 0: none of them

    def _level_of(self, values: npt.NDArray[np.float32]) -> IntArray:
        """Classes of values; NOTHING for none, and for one that is no level."""
        place = np.searchsorted(self.levels_L, np.nan_to_num(values, nan=np.inf))
        place = np.minimum(place, len(self.levels_L) - 1)
        return np.where(self.levels_L[place] == values, place, NOTHING)


def read_classes(release: Release, catalogue: Catalogue, config: MultiConfig, dataset: SequenceDataset) -> Classes:
    """What is told of a dataset's events; kinds of event are those that it tells apart. Raises ConfigError: no item has
    a category, no event has a value, or values are no levels."""
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


def examples_of(held_out: HeldOut, classes: Classes, name: str) -> LabelledUsers:
    """The users whose first held-out event has a class, and which. Raises ConfigError for one that training lacks."""
    given = held_out.first_value
    class_U = classes.of(name, held_out.targets[:, 0], given, held_out.event_types[:, :1].ravel())
    if name == "value" and (strange := given[~np.isnan(given) & (class_U == NOTHING)]).size:
        raise ConfigError(
            f"task.tells value: expected held-out values among those of the training parts, found {strange[0]:g}, "
            "which no training event has; leave such events out of the log, or values out of task.tells"
        )
    known = np.flatnonzero(class_U != NOTHING)
    return LabelledUsers(held_out.histories.take(known), class_U[known])
