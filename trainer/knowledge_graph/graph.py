"""The knowledge graph of a release: triples of the table `knowledge`, and events of the training part of a split.

Shape letters: ``N`` triples, ``V`` nodes, ``R`` relations.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from etl import tables
from etl.tables import Table
from trainer.arrays import IntArray
from trainer.config.graph import GraphDataConfig
from trainer.data.release import DataError, Release
from trainer.data.sequences import SequenceDataset

KINDS: dict[str, tuple[Table, str]] = {  # of nodes -> their vocabulary, and its column of raw ids
    "item": (tables.ITEMS, "item"),
    "user": (tables.USERS, "user"),
    "entity": (tables.ENTITIES, "entity"),
}
_SHIFT = 32  # of the kind's number, above a vocabulary's index
EVENT = "event"  # relation of events whose type is not distinguished; of others "event:<type>"


@dataclass(frozen=True)
class Graph:
    """Distinct triples [N, 3] of nodes and relations, sorted, so that they do not depend on the order of a table's
    files. `kinds` [V] are places in KINDS, `indices` [V] those of the vocabularies."""

    triples: IntArray
    kinds: IntArray
    indices: IntArray
    relations: Sequence[str]

    @property
    def num_nodes(self) -> int:
        return len(self.kinds)


def read_graph(release: Release, config: GraphDataConfig) -> Graph:
    """Raises DataError for a relation that is asked for and has no triples, and for a graph without any."""
    parts = [_knowledge(release, config.relations)]
    if config.events is not None:
        parts += list(_events(SequenceDataset(release, config.events, config.domain, event_types=config.event_types)))
    heads, relations, tails = (np.concatenate([part[column] for part in parts]) for column in range(3))
    if not len(heads):
        raise DataError(
            f"expected triples in the table knowledge of release {release.number} of {release.lake}, found none; give "
            "the source knowledge, or set data.events to a split"
        )
    nodes, places = np.unique(np.concatenate([heads, tails]), return_inverse=True)
    names, numbers = np.unique(relations, return_inverse=True)
    triples = np.column_stack([places[: len(heads)], numbers, places[len(heads) :]])
    return Graph(
        np.unique(triples, axis=0), nodes >> _SHIFT, nodes & ((1 << _SHIFT) - 1), [str(name) for name in names]
    )


_Part = tuple[IntArray, npt.NDArray[np.str_], IntArray]  # heads, names of relations, tails


def _knowledge(release: Release, relations: Sequence[str] | None) -> _Part:
    if relations == () or tables.KNOWLEDGE.name not in release.versions:
        found = tables.KNOWLEDGE.schema.empty_table()
    else:
        ends = ["head_index", "head_kind", "tail_index", "tail_kind"]
        found = release.read(tables.KNOWLEDGE, ["relation", *ends])
    if relations:
        known = pc.unique(found["relation"]).to_pylist()
        if lacking := [name for name in relations if name not in known]:
            raise DataError(
                f"data.relations: expected relations of the table knowledge of {release.lake}, found no triple of "
                f"{', '.join(lacking)}; it has {', '.join(sorted(known)) or 'none'}"
            )
        found = found.filter(pc.is_in(found["relation"], value_set=pa.array(relations)))
    heads, tails = (_ends(found, end, usual) for end, usual in (("head", "item"), ("tail", "entity")))
    return heads, found["relation"].to_numpy().astype(str), tails


def _ends(triples: pa.Table, end: str, usual: str) -> IntArray:
    """Nodes of the triples' heads or tails, which are of the `usual` kind where the table names none."""
    indices = triples[f"{end}_index"].to_numpy().astype(np.int64)
    kinds = pc.fill_null(triples[f"{end}_kind"], usual).to_numpy()
    nodes: IntArray = np.empty_like(indices)
    for kind in np.unique(kinds):
        nodes[kinds == kind] = _nodes(kind, indices[kinds == kind])
    return nodes


def _events(dataset: SequenceDataset) -> list[_Part]:
    """Edges from users to items of each row group: training parts only, whatever lies behind them."""
    names = np.array([EVENT, *(f"{EVENT}:{name}" for name in dataset.event_types)])
    parts: list[_Part] = []
    for group in range(len(dataset.groups)):
        sequences = dataset.read([group])
        trained = sequences.positions < sequences.valid_start[sequences.owners]
        users = sequences.users[sequences.owners[trained]].astype(np.int64)
        items = sequences.items[trained].astype(np.int64)
        types = sequences.event_types[trained] if dataset.event_types else np.zeros(len(items), dtype=np.int64)
        parts.append((_nodes("user", users), names[types], _nodes("item", items)))
    return parts


def _nodes(kind: str, indices: IntArray) -> IntArray:
    return indices | (list(KINDS).index(kind) << _SHIFT)
