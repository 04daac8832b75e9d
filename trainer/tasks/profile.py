"""What a user is, predicted by the user's vector: user-profile prediction (PeterRec: Yuan et al. 2020; survey 3.3).

It ranks no items: `query` gives the vector, and the head `HEAD` a score of each class for it.
"""

from collections import Counter
from dataclasses import dataclass
from typing import Literal, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import torch
import torch.nn.functional as F
from torch import Tensor

from etl import tables
from etl.settings import ConfigError
from trainer.arrays import IntArray
from trainer.config import ProfileConfig
from trainer.data.batch import Batch
from trainer.data.catalogue import Catalogue
from trainer.data.events import sampled
from trainer.data.release import Release
from trainer.data.sequences import SequenceDataset
from trainer.models import SequenceModel
from trainer.tasks.base import Task
from trainer.tasks.loss import wide
from trainer.tasks.user_vector import user_vectors

HEAD = "profile"
Part = Literal["train", "validation", "test"]
_APART = 1 << 40  # so that users are not held out by the same hash that samples them elsewhere


class Profile(Task):
    """The task. `class_U`: the class of each user, by global index, whom it is trained on; -1 for others. None: it is
    only predicts."""

    known: "Classes"  # of the data that it is trained on

    def __init__(self, config: ProfileConfig, class_U: Tensor | None = None) -> None:
        self.config, self.class_U = config, class_U

    @classmethod
    def prepared(cls, config: ProfileConfig, release: Release, catalogue: Catalogue, dataset: SequenceDataset) -> Self:
        known = read_classes(release, config)
        task = cls(config, torch.from_numpy(known.of("train")))
        task.class_names, task.heads, task.known = {HEAD: known.names}, {HEAD: len(known.names)}, known
        return task

    def loss(self, model: SequenceModel, batch: Batch) -> tuple[Tensor, Tensor]:
        """(cross-entropy summed over the users who are trained on, their number) of this rank's slice."""
        assert self.class_U is not None, "a task that is trained has classes"
        owners = batch.users if batch.owners is None else batch.owners
        self.class_U = self.class_U.to(owners.device)  # once
        class_B = self.class_U[owners]
        known_B = class_B >= 0
        scores_NC = model.task_heads[HEAD](self.query(model, batch))[known_B]
        return F.cross_entropy(wide(scores_NC), class_B[known_B], reduction="sum"), known_B.sum()

    def query(self, model: SequenceModel, batch: Batch, table_VD: Tensor | None = None) -> Tensor:
        """User vectors [B, D]."""
        return user_vectors(
            model, batch.items, batch.mask_BT, batch.users, causal=self.config.causal, table_VD=table_VD
        )


# --- whose class is what ---------------------------------------------


@dataclass(frozen=True)
class Classes:
    """The values of one attribute, and who has which."""

    attribute: str
    names: tuple[str, ...]
    class_U: IntArray  # -1: none, or one that too few have
    part_U: npt.NDArray[np.int8]  # 0 train, 1 validation, 2 test

    def of(self, part: Part) -> IntArray:
        """[U] classes of that part's users, -1 for others."""
        return np.where(self.part_U == tables.PARTS.index(part), self.class_U, -1)


def read_classes(release: Release, config: ProfileConfig) -> Classes:
    """Raises ConfigError: nobody has the attribute, it has one value only, or a part lacks one of its values."""
    users = release.read(tables.USERS, ["index", "kept", "attributes"])
    maps = users["attributes"].combine_chunks()
    owner = np.repeat(np.arange(len(maps)), np.diff(maps.offsets.to_numpy()))
    named, value = maps.keys, maps.items
    wanted = pc.equal(named, config.attribute).fill_null(False).to_numpy(zero_copy_only=False)
    given = pa.array(value.filter(pa.array(wanted))).to_pylist()
    owner = owner[wanted]
    if not given:
        known = sorted(set(named.drop_null().unique().to_pylist()))
        has = f"it has {', '.join(known)}" if known else "it has no attribute at all"
        raise ConfigError(
            f"task.attribute: no user of release {release.number} of {release.lake} has an attribute "
            f"{config.attribute!r}; {has}; mend the name, or describe it in the source's `users` file"
        )
    index, kept = users["index"].to_numpy().astype(np.int64), users["kept"].to_numpy(zero_copy_only=False)
    count = Counter(text for text, row in zip(given, owner, strict=True) if text and kept[row])
    names = tuple(sorted((text for text, users in count.items() if users >= config.min_users), key=_in_order))
    if len(names) < 2:
        raise ConfigError(
            f"task.attribute {config.attribute}: expected two values at least that {config.min_users} users or more "
            f"have, found {', '.join(names) or 'none'}; lower task.min_users, or take another attribute"
        )
    place = {name: number for number, name in enumerate(names)}
    class_U = np.full(int(index.max()) + 1, -1, dtype=np.int64)
    class_U[index[owner]] = [place.get(text, -1) for text in given]
    class_U[index[~kept]] = -1
    found = Classes(config.attribute, names, class_U, _parts(len(class_U), config))
    _check_parts(found)
    return found


def _in_order(text: str) -> tuple[bool, float, str]:
    """Numbers by size, before texts."""
    try:
        return False, float(text), text
    except ValueError:
        return True, 0.0, text


def _parts(num_users: int, config: ProfileConfig) -> npt.NDArray[np.int8]:
    apart = np.arange(num_users) + _APART
    parts = np.zeros(num_users, dtype=np.int8)
    parts[sampled(apart, config.test + config.validation)] = 1
    parts[sampled(apart, config.test)] = 2
    return parts


def _check_parts(classes: Classes) -> None:
    for part in ("train", "test", "validation"):
        had = np.bincount(classes.of(part)[classes.of(part) >= 0], minlength=len(classes.names))  # type: ignore[arg-type]
        if lacking := [name for name, users in zip(classes.names, had, strict=True) if not users]:
            raise ConfigError(
                f"task.attribute {classes.attribute}: expected users of each of its {len(classes.names)} values in "
                f"each part, found none of {', '.join(lacking)} in the {part} part; raise task.min_users"
            )
