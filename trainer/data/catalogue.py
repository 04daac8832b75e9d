"""The items, users and knowledge of a domain, as flat arrays."""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from etl import tables
from etl.tables import FIRST_INDEX
from trainer.arrays import Int32Array, IntArray
from trainer.data.release import DataError, Release


class Texts(Sequence[str]):
    """Strings that stay in Arrow's memory: ten million Python strings would be gigabytes. Arrow takes them as they are
    (``pa.array(texts, pa.string())`` copies nothing)."""

    def __init__(self, column: pa.StringArray | pa.ChunkedArray) -> None:
        self._array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column

    def __len__(self) -> int:
        return len(self._array)

    @overload
    def __getitem__(self, place: int) -> str: ...
    @overload
    def __getitem__(self, place: slice) -> "Texts": ...
    def __getitem__(self, place: int | slice) -> "str | Texts":
        if isinstance(place, slice):
            return Texts(self._array[place])
        text: str = self._array[int(place)].as_py()
        return text

    def __iter__(self) -> Iterator[str]:
        for start in range(0, len(self), 65_536):
            yield from self._array[start : start + 65_536].to_pylist()

    def __arrow_array__(self, type: pa.DataType | None = None) -> pa.Array:
        return self._array if type is None else self._array.cast(type)


@dataclass(frozen=True)
class Catalogue:
    """A domain's items as model rows: rows below FIRST_INDEX are reserved, then kept items by global index.

    global_index [V]; raw_ids and titles [V], empty for reserved rows.
    """

    global_index: IntArray
    raw_ids: Sequence[str]
    titles: Sequence[str]

    def __len__(self) -> int:
        return len(self.global_index)

    @functools.cached_property
    def _row_of(self) -> pa.Int32Array:
        """Global index -> row; UNK where the domain lacks the item, and at the end, for whatever lies beyond."""
        lookup = np.full(int(self.global_index.max(initial=FIRST_INDEX)) + 2, tables.UNK, dtype=np.int32)
        lookup[self.global_index] = np.arange(len(self), dtype=np.int32)
        return pa.array(lookup)

    def rows(self, index: npt.NDArray[Any]) -> Int32Array:
        """Rows of global indices, whatever is beyond the catalogue as UNK. The result is read-only."""
        beyond = len(self._row_of) - 1
        unsigned = index.view(f"u{index.dtype.itemsize}")  # so that what is negative lies beyond, too
        if unsigned.max(initial=0) > beyond:
            index = np.where(unsigned > beyond, beyond, index)
        # Arrow's gather: numpy's would first widen each index to 64 bits. Bounds are checked above, in a tenth of the
        # time that its own check takes.
        rows: Int32Array = pc.take(self._row_of, pa.array(index), boundscheck=False).to_numpy()
        return rows


def read_catalogue(release: Release, domain: str) -> Catalogue:
    """The kept items of a domain. Raises DataError where the domain is unknown or keeps none."""
    members = release.read(tables.DOMAINS, ["index"], {"domain": domain})
    if not len(members):
        known = sorted({str(part["domain"]) for part in release.partitions(tables.DOMAINS)})
        raise DataError(
            f"no domain {domain!r} in release {release.number} of {release.lake}; it has {', '.join(known)}"
        )
    items = release.read(tables.ITEMS, ["index", "item", "title", "kept"])
    items = items.filter(items["kept"])
    items = items.filter(pc.is_in(items["index"], value_set=members["index"])).sort_by("index")
    if not len(items):
        raise DataError(f"domain {domain!r} keeps no item after k-core; loosen kcore.min_item or the domain's rule")
    return Catalogue(
        np.concatenate([np.arange(FIRST_INDEX), items["index"].to_numpy()]).astype(np.int64),
        _texts(items["item"]),
        _texts(items["title"].fill_null("")),
    )


def rows_of_domain(release: Release, catalogue: Catalogue, domain: str) -> npt.NDArray[np.bool_]:
    """[V] which rows of a catalogue are kept items of `domain`. Raises DataError where none is."""
    kept = read_catalogue(release, domain).global_index[FIRST_INDEX:]
    rows = np.isin(catalogue.global_index, kept)
    rows[:FIRST_INDEX] = False
    if not rows.any():
        raise DataError(
            f"expected items of domain {domain!r} among those that are read, found none; set data.domain to one that "
            f"holds them, e.g. {tables.DOMAIN_ALL!r}"
        )
    return rows


def rows_by_raw_id(own: Catalogue, other: Catalogue) -> IntArray:
    """[rows of `other`] rows of `own` with the same raw id, UNK where it has none; reserved rows are themselves."""
    wanted, had = (pa.array(catalogue.raw_ids[FIRST_INDEX:], pa.string()) for catalogue in (other, own))
    found = pc.index_in(wanted, had)
    rows = found.fill_null(tables.UNK - FIRST_INDEX).to_numpy(zero_copy_only=False).astype(np.int64) + FIRST_INDEX
    return np.concatenate([np.arange(FIRST_INDEX), rows])


def _texts(column: pa.ChunkedArray) -> Texts:
    """With an empty text for each reserved row before."""
    return Texts(pa.concat_arrays([pa.array([""] * FIRST_INDEX, pa.string()), *column.chunks]))


def read_knowledge(release: Release, catalogue: Catalogue, slots: dict[str, int]) -> Int32Array:
    """Entity indices [V, slots] of a catalogue's rows: slots of one relation in order of rank; UNK where unknown.

    `slots` maps relation -> number of slots, e.g. {"director": 1, "actor": 3}. Raises DataError for a relation without
    triples.
    """
    filled = np.full((len(catalogue), sum(slots.values())), tables.UNK, dtype=np.int32)
    filled[: tables.UNK] = tables.PAD
    if not slots:
        return filled
    triples = release.read(tables.KNOWLEDGE, ["head_index", "relation", "rank", "tail_index", "head_kind", "tail_kind"])
    for kind, usual in (("head_kind", "item"), ("tail_kind", "entity")):
        triples = triples.filter(pc.fill_null(pc.equal(triples[kind], usual), True))
    start = 0
    for relation, width in slots.items():
        chosen = triples.filter(pc.equal(triples["relation"], relation)).sort_by(
            [("head_index", "ascending"), ("rank", "ascending")]
        )
        heads, tails = chosen["head_index"].to_numpy(), chosen["tail_index"].to_numpy()
        rows = catalogue.rows(heads)
        # Position among the triples of one head, so that a gap in ranks leaves no empty slot.
        position = np.arange(len(heads)) - np.searchsorted(heads, heads, side="left") if len(heads) else heads
        usable = (rows != tables.UNK) & (position < width)
        filled[rows[usable], start + position[usable]] = tails[usable]
        start += width
    return filled
