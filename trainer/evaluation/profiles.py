"""Which user has which class of an attribute, who of them is trained on and who is asked, and how a model answers.

Shape letters: ``U`` users by global index, ``N`` users examples, ``C`` classes, ``V`` rows of the catalogue.
"""

from collections import Counter
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import torch

from etl import tables
from etl.settings import ConfigError
from trainer.config import ProfileConfig
from trainer.data.catalogue import Catalogue
from trainer.data.histories import Histories
from trainer.data.release import DataError, Release
from trainer.data.sequences import SequenceDataset
from trainer.evaluation.class_metrics import metrics_of
from trainer.evaluation.item_ranking import read_users, sampled
from trainer.evaluation.ranking_metrics import FloatArray
from trainer.inference.scorer import ModelScorer
from trainer.models import SequenceModel
from trainer.parallel.distributed import World
from trainer.tasks.profile import HEAD

IntArray = npt.NDArray[np.int64]
Part = Literal["train", "validation", "test"]
_APART = 1 << 40  # so that users are not held out by the same hash that samples them elsewhere


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
    lists = users["attributes"].combine_chunks()
    owner = pc.list_parent_indices(lists).to_numpy(zero_copy_only=False)
    flat = lists.flatten()
    named, value = pc.struct_field(flat, "name"), pc.struct_field(flat, "value")
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


@dataclass(frozen=True)
class LabelledUsers:
    """Users of a part, what is read of each, and their classes. Users ascend."""

    histories: Histories  # in rows
    class_N: IntArray

    def __len__(self) -> int:
        return len(self.class_N)


def read_examples(
    release: Release, split: str, domain: str, catalogue: Catalogue, classes: Classes, part: Part
) -> LabelledUsers:
    """What is read is the training part of the split, as in training. Raises DataError where no such user has any."""
    class_U = classes.of(part)

    def wanted(users: IntArray) -> npt.NDArray[np.bool_]:
        inside = users < len(class_U)
        flags: npt.NDArray[np.bool_] = inside & (class_U[np.where(inside, users, 0)] >= 0)
        return flags

    found = read_users(SequenceDataset(release, split, domain), lambda s: wanted(s.users) & (s.valid_start > 0))
    if found is None:
        raise DataError(
            f"no user of domain {domain!r} and split {split!r} has {classes.attribute} in the {part} part; take a "
            "domain that users with that attribute have items of"
        )
    rows = catalogue.rows(found.items).astype(np.int64)
    histories = Histories(found.users, found.offsets, rows, found.times).until(found.valid_start)
    return LabelledUsers(histories, class_U[found.users])


def probabilities(
    scorer: ModelScorer, model: SequenceModel, histories: Histories, *, batch_size: int, head: str = HEAD
) -> FloatArray:
    """[N, C] that a model gives each class for each user, by one of its task's heads."""
    parts = []
    for start in range(0, len(histories), batch_size):
        users = np.arange(start, min(start + batch_size, len(histories)))
        with torch.inference_mode():
            scores_BC: torch.Tensor = model.task_heads[head](scorer.hidden(histories.take(users)))
            parts.append(scores_BC.double().softmax(1).cpu().numpy())
    return np.concatenate(parts)


def validate(
    scorer: ModelScorer,
    model: SequenceModel,
    examples: LabelledUsers,
    world: World,
    *,
    batch_size: int,
    head: str = HEAD,
) -> dict[str, float]:
    """Metrics of `trainer.evaluation.class_metrics`; each process asks about its share of the users."""
    share = world.share(len(examples))
    predictions = probabilities(scorer, model, examples.histories.take(share), batch_size=batch_size, head=head)
    probabilities_NC = world.gather(torch.from_numpy(predictions))[: len(examples)].numpy()
    return metrics_of(examples.class_N, probabilities_NC)
