"""Items that came after a model was trained: ranked, and read in histories, by their features, without retraining.

Their vectors come from a pinned release that has them, or from a request, and go through the whitening that the model
was trained behind. They stand behind the model's own rows, and are scored apart, so that the scores of its own items
stay as they are to the last bit. An item without a vector stays unknown.

Shape letters: ``N`` later items, ``F`` width of an encoder's vectors, ``V`` catalogue rows, ``Q`` width of what scores.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.func import functional_call

from etl.settings import GraftrecError
from etl.tables import FEATURES, FIRST_INDEX, UNK
from trainer.arrays import FloatArray, IntArray
from trainer.data.catalogue import Catalogue, rows_by_raw_id
from trainer.data.item_vectors import encodings_of, has_vectors, read_raw_vectors
from trainer.data.release import Release
from trainer.inference.model_folder import TrainedModel
from trainer.inference.scorer import LaterVectors
from trainer.models import SequenceModel


class LaterItemsError(GraftrecError):
    """Vectors that are none of the model's encoders'."""


@dataclass(frozen=True)
class LaterItems:
    """Items that a model has no row of, with a vector by one of its encoders at least."""

    global_index: IntArray  # [N]; -1 for those of a request
    raw_ids: Sequence[str]  # [N]
    titles: Sequence[str]  # [N]
    vectors: Mapping[str, npt.NDArray[np.float16]]  # encoder -> [N, F], whitened
    has: Mapping[str, npt.NDArray[np.bool_]]  # encoder -> [N]

    def __len__(self) -> int:
        return len(self.raw_ids)


def with_release(trained_model: TrainedModel, release: Release, catalogue: Catalogue) -> TrainedModel:
    """The model with those items of a release's `catalogue` that came later and have vectors there; itself where there
    are none. Raises LaterItemsError for vectors by an encoder that is not as it was."""
    own = trained_model.config.model.features
    encoders = own.encoders
    if not encoders or own.shuffled or own.document is not None or trained_model.model.content_VF is not None:
        return trained_model  # what else it reads of items, a release has not
    later = np.flatnonzero(rows_by_raw_id(trained_model.catalogue, catalogue) == UNK)
    later = later[later >= FIRST_INDEX]
    if not len(later) or FEATURES.name not in release.versions:
        return trained_model
    split = trained_model.config.data.split
    known = [encoder for encoder in encoders if has_vectors(release, encoder, split)]
    raw = {encoder: read_raw_vectors(release, catalogue, encoder, split) for encoder in known}
    made_by = encodings_of(release, known, split)
    for encoder in known:
        was = trained_model.encodings.get(encoder, made_by[encoder])
        if was != made_by[encoder]:
            raise LaterItemsError(
                f"model.features: expected vectors by {encoder!r} as {trained_model.folder} was trained on "
                f"({_shown(was)}), found others in release {release.number} of {release.lake} "
                f"({_shown(made_by[encoder])}); encode with the old one, or train again"
            )
    given = {encoder: (vectors[later], has[later]) for encoder, (vectors, has) in raw.items()}
    titles = [catalogue.titles[row] for row in later.tolist()]
    return with_vectors(
        trained_model, catalogue.global_index[later], [catalogue.raw_ids[row] for row in later.tolist()], titles, given
    )


def _shown(encoding: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {text[:60]}" for name, text in encoding.items() if text) or "no weights"


def with_vectors(
    trained_model: TrainedModel,
    global_index: IntArray,
    raw_ids: Sequence[str],
    titles: Sequence[str],
    given: Mapping[str, tuple[FloatArray, npt.NDArray[np.bool_]]],
) -> TrainedModel:
    """The model with later items, behind those it has. `given`: encoder -> (raw vectors [N, F], which have one)."""
    mean = trained_model.config.model.features.missing == "mean"
    vectors, has = {}, {}
    for encoder, own in trained_model.features.items():
        width = own.vectors_VF.shape[1]
        raw, has_N = given.get(encoder, (np.zeros((len(raw_ids), width), np.float32), np.zeros(len(raw_ids), bool)))
        if raw.shape[1] != width:
            raise LaterItemsError(
                f"model.features: expected vectors by {encoder!r} that are {width} wide, found {raw.shape[1]}; take "
                f"those of the encoder that {trained_model.folder} was trained on"
            )
        whole = np.zeros((len(raw_ids), width), np.float32)
        whole[has_N] = own.whitening(raw[has_N])
        seen = own.has_V & (trained_model.popularity[: len(own.has_V)] > 0)
        if mean and seen.any():
            whole[~has_N] = own.vectors_VF[seen].astype(np.float32).mean(0)
        vectors[encoder], has[encoder] = whole.astype(np.float16), has_N
    some = np.flatnonzero(np.any(list(has.values()), axis=0))
    if not len(some):
        return trained_model
    later = LaterItems(
        np.asarray(global_index)[some],
        [raw_ids[place] for place in some.tolist()],
        [titles[place] for place in some.tolist()],
        {encoder: part[some] for encoder, part in vectors.items()},
        {encoder: part[some] for encoder, part in has.items()},
    )
    return with_later(trained_model, later)


def with_later(trained_model: TrainedModel, later: LaterItems) -> TrainedModel:
    own = trained_model.catalogue
    catalogue = Catalogue(
        np.concatenate([own.global_index, later.global_index]),
        [*own.raw_ids, *later.raw_ids],
        [*own.titles, *later.titles],
    )
    popularity = np.concatenate([trained_model.popularity, np.zeros(len(later), np.int64)])
    vectors = later_vectors(trained_model.model, later)
    return replace(trained_model, catalogue=catalogue, popularity=popularity, later=vectors, later_items=later)


def save_later(path: Path, later: LaterItems) -> None:
    """As a file of arrays, no pickle."""
    arrays: dict[str, Any] = {
        "index": later.global_index,
        "ids": np.array(later.raw_ids),
        "titles": np.array(later.titles),
    }
    arrays |= {f"vectors/{encoder}": part for encoder, part in later.vectors.items()}
    arrays |= {f"has/{encoder}": part for encoder, part in later.has.items()}
    np.savez(path, **arrays)


def load_later(path: Path) -> LaterItems:
    """As `save_later` left them."""
    with np.load(path, allow_pickle=False) as found:
        parts = {
            kind: {name.removeprefix(kind): found[name] for name in found.files if name.startswith(kind)}
            for kind in ("vectors/", "has/")
        }
        ids, titles = found["ids"].tolist(), found["titles"].tolist()
        return LaterItems(found["index"], ids, titles, parts["vectors/"], parts["has/"])


class _Scored(nn.Module):
    """What scores items as a forward pass, whose tensors `functional_call` can replace."""

    def __init__(self, model: SequenceModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, rows: Tensor) -> LaterVectors:
        return LaterVectors(self.model.item_vectors(rows), self.model.bias(rows))


@torch.inference_mode()
def later_vectors(model: SequenceModel, later: LaterItems) -> LaterVectors:
    """The vectors and biases that score later items: those of the same network, had it a catalogue of these items
    alone, without anything of their own, or metadata."""
    num, device = FIRST_INDEX + len(later), model.knowledge_VS.device
    zeros = {name: torch.zeros(num, *table.shape[1:], dtype=table.dtype) for name, table in _item_tables(model).items()}
    replaced: dict[str, Tensor] = dict(zeros)
    replaced["knowledge_VS"] = torch.full((num, model.knowledge_VS.shape[1]), UNK, dtype=torch.int32)
    if model.untrained_V is not None:
        replaced["untrained_V"] = torch.ones(num, dtype=torch.bool)
    for name in model.features_of_items:
        for place, encoder in enumerate(later.vectors):
            vectors = torch.from_numpy(later.vectors[encoder]).float()
            replaced[f"features.{name}.vectors_{place}"] = torch.cat(
                [torch.zeros(FIRST_INDEX, vectors.shape[1]), vectors]
            )
            lacks = ~torch.from_numpy(later.has[encoder])
            replaced[f"features.{name}.lacks_{place}"] = torch.cat([torch.zeros(FIRST_INDEX, dtype=torch.bool), lacks])
    tensors = {f"model.{name}": tensor.to(device) for name, tensor in replaced.items()}
    rows = torch.arange(FIRST_INDEX, num, device=device)
    found: LaterVectors = functional_call(_Scored(model.eval()), tensors, (rows,))
    return found


def _item_tables(model: SequenceModel) -> dict[str, Tensor]:
    """What the model keeps of each item."""
    prefixes = model.GROUPS["item"]
    return {name: one for name, one in model.named_parameters() if name.startswith(prefixes)}
