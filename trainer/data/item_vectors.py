"""Encoders' vectors of a catalogue's items, and of users, from the table `features`, as networks read them (survey 2,
Eq. 1).

Raw vectors of sentences have a large mean in common, and few directions with most of their variance: they are centred
and whitened (Su et al. 2021; Hou et al. 2022), by mean and covariance of the items, or users, that the training part of
this split has, and of no others.

Shape letters: ``V`` catalogue rows, or rows of the user table, ``F`` width of an encoder's vectors.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc

from etl import tables
from etl.lake.encodings import encodings
from etl.program import spelled
from etl.tables import FEATURES, FIRST_INDEX
from trainer.arrays import FloatArray, IntArray
from trainer.config import JoinedFeaturesConfig
from trainer.data.catalogue import Catalogue
from trainer.data.release import DataError, Release, vocabulary_size
from trainer.data.shuffled_features import Shuffle

BoolArray = npt.NDArray[np.bool_]
_OF_SPLITS = (tables.SEQUENCES.name, tables.BASKETS.name)  # what is trained on, and held out
SHRINKAGE = 1e-2  # of the mean variance, added to each direction's: those that hardly vary are noise


@dataclass(frozen=True)
class Whitening:
    """x -> (x - mean) @ transform."""

    mean_F: FloatArray
    transform_FF: FloatArray

    def __call__(self, vectors_NF: FloatArray) -> FloatArray:
        whitened: FloatArray = ((vectors_NF - self.mean_F) @ self.transform_FF).astype(np.float32)
        return whitened


@dataclass(frozen=True)
class EncodedVectors:
    """One encoder's, of items or users: `vectors` float16, so that a model folder keeps what was trained on; zero, or
    with `missing: mean` the mean, of rows that `has_V` says no to, reserved ones too."""

    vectors_VF: npt.NDArray[np.float16]
    has_V: BoolArray
    whitening: Whitening


@dataclass(frozen=True)
class Rows:
    """The rows that vectors are read for: `row_of` global indices, UNK where there is none, of `count`."""

    kind: Literal["item", "user"]
    row_of: Callable[[npt.NDArray[Any]], npt.NDArray[Any]]
    count: int

    @property
    def setting(self) -> str:
        return "model.features" if self.kind == "item" else "model.user_features"


def rows_of_items(catalogue: Catalogue) -> Rows:
    return Rows("item", catalogue.rows, len(catalogue))


def rows_of_users(release: Release) -> Rows:
    """Of the user table."""
    count = vocabulary_size(release, tables.USERS)

    def row_of(index: npt.NDArray[Any]) -> IntArray:
        return np.where(index < count, index, tables.UNK).astype(np.int64)

    return Rows("user", row_of, count)


def read_vectors(
    release: Release,
    rows: Rows,
    config: JoinedFeaturesConfig,
    *,
    split: str,
    trained_V: BoolArray,
    shuffle: Shuffle | None = None,
    fitted: Mapping[str, EncodedVectors] | None = None,
) -> dict[str, EncodedVectors]:
    """Encoder -> vectors of rows of a catalogue, or of the user table. `trained_V`: rows with an event in the training
    part, which whitening is fitted on; `shuffle`: rows exchange their vectors; `fitted`: encoders whose whitening a
    parent has, which its projections were trained behind.

    Raises DataError for an encoder of no vectors, or one that read another split than this.
    """
    found = {}
    for encoder in config.encoders:
        raw_VF, has_V = _read(release, rows, encoder, split)
        if shuffle is not None:
            raw_VF = raw_VF[shuffle.rows(has_V)]
        known = (fitted or {}).get(encoder)
        if known is not None and len(known.whitening.mean_F) != raw_VF.shape[1]:
            raise DataError(
                f"{rows.setting}: expected vectors by {encoder} as wide as the parent's, "
                f"{len(known.whitening.mean_F)}, found {raw_VF.shape[1]}; take the parent's encoder"
            )
        whitening = known.whitening if known else _fitted(raw_VF[trained_V & has_V], full=config.whitening)
        whole = np.zeros_like(raw_VF)
        whole[has_V] = whitening(raw_VF[has_V])
        if config.missing == "mean":
            seen = trained_V & has_V
            lacking = ~has_V
            lacking[:FIRST_INDEX] = False
            whole[lacking] = whole[seen].mean(0) if seen.any() else 0
        found[encoder] = EncodedVectors(whole.astype(np.float16), has_V, whitening)
    return found


def has_vectors(release: Release, encoder: str, split: str) -> bool:
    """Whether a release has vectors of items by an encoder, made of this split or of none."""
    wanted = [("item", encoder, None), ("item", encoder, split)]
    return any((part["kind"], part["encoder"], part["split"]) in wanted for part in release.partitions(FEATURES))


def encodings_of(release: Release, encoders: Sequence[str], split: str) -> dict[str, dict[str, str]]:
    """Encoder -> what decides on its vectors of items: its weights, and the template of their texts."""
    known = encodings(release.lake, release.versions[FEATURES.name]).values()
    found = {}
    for encoder in encoders:
        own = [one for one in known if one.kind == "item" and one.encoder == encoder and one.split in (split, "", None)]
        last = max(own, key=lambda one: one.split == split)  # as in `read_raw_vectors`
        found[encoder] = {"weights": last.weights, "template": last.template}
    return found


def read_raw_vectors(release: Release, catalogue: Catalogue, encoder: str, split: str) -> tuple[FloatArray, BoolArray]:
    """Vectors of items as the table has them: see _read."""
    return _read(release, rows_of_items(catalogue), encoder, split)


def _read(release: Release, rows: Rows, encoder: str, split: str) -> tuple[FloatArray, BoolArray]:
    """[V, F] as the table has them, zero where it has none; bool [V]. Vectors made of this split are preferred to those
    of none."""
    where, command = f"release {release.number} of {release.lake}", spelled("trainer", "features")
    if FEATURES.name not in release.versions:
        raise DataError(f"{rows.setting}: expected vectors of {rows.kind}s, {where} has none; run `{command}`")
    partitions = [part for part in release.partitions(FEATURES) if part["kind"] == rows.kind]
    splits = {part["split"] for part in partitions if part["encoder"] == encoder}
    if not splits & {None, split}:
        known = ", ".join(sorted({str(part["encoder"]) for part in partitions})) or "none"
        read = f", of it those that read the split {', '.join(sorted(map(str, splits)))}" if splits else ""
        raise DataError(
            f"{rows.setting}: expected vectors of {rows.kind}s by {encoder!r} for split {split!r}, found those by "
            f"{known} in {where}{read}; run `{command}`, or name another encoder"
        )
    scope = {"kind": rows.kind, "encoder": encoder, "split": split if split in splits else None}
    if split in splits:
        _check_inputs(release, encoder, split)
    table = release.read(FEATURES, ["index", "vector"], scope)
    places = rows.row_of(table["index"].to_numpy())
    inside = places >= FIRST_INDEX
    if not inside.any():
        raise DataError(
            f"{rows.setting}: expected vectors by {encoder!r} of {rows.kind}s that are read, found none of "
            f"{rows.count:,} in {where}; take an encoder that covers them"
        )
    widths = pc.unique(pc.list_value_length(table["vector"])).to_pylist()
    if len(widths) != 1:
        raise DataError(
            f"{rows.setting}: expected vectors by {encoder!r} of one width, found "
            f"{', '.join(map(str, sorted(widths)))} in {where}; run `{command}` into another lake"
        )
    flat = table["vector"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
    raw_VF = np.zeros((rows.count, widths[0]), dtype=np.float32)
    raw_VF[places[inside]] = flat.reshape(-1, widths[0])[inside]
    has_V = np.zeros(rows.count, dtype=bool)
    has_V[places[inside]] = True
    return raw_VF, has_V


def _check_inputs(release: Release, encoder: str, split: str) -> None:
    """Raises DataError where the vectors were made from other sequences than the release has: these may train on what
    was held out, or the other way round."""
    known = encodings(release.lake, release.versions[FEATURES.name])
    read = next((one.inputs for one in known.values() if (one.encoder, one.split) == (encoder, split)), {})
    for table, version in read.items():
        if table in _OF_SPLITS and release.versions.get(table) != version:
            raise DataError(
                f"model.features: expected vectors by {encoder!r} made from version {release.versions.get(table)} of "
                f"{table}, which release {release.number} of {release.lake} has, found version {version}; run "
                f"`{spelled('trainer', 'features')}` again"
            )


def _fitted(vectors_NF: FloatArray, *, full: bool) -> Whitening:
    """`full`: to a mean of zero, and variances of one without covariances, but for SHRINKAGE; else nothing changes."""
    width = vectors_NF.shape[1]
    if not full or len(vectors_NF) < 2:
        return Whitening(np.zeros(width, np.float32), np.eye(width, dtype=np.float32))
    mean_F = vectors_NF.mean(0, dtype=np.float64)
    centred_NF = vectors_NF - mean_F
    variances_F, directions_FF = np.linalg.eigh(centred_NF.T @ centred_NF / len(vectors_NF))
    variances_F = np.maximum(variances_F, 0)
    scale_F = 1 / np.sqrt(variances_F + SHRINKAGE * variances_F.mean() + 1e-12)
    return Whitening(mean_F.astype(np.float32), (directions_FF * scale_F).astype(np.float32))
