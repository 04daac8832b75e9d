"""Vectors of nodes for other models, and the folder of a trained embedding, from which another can begin.

Shape letters: ``V`` nodes, ``F`` width of a vector.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import save_file
from torch import Tensor

from etl.settings import ConfigError, GraftrecError
from trainer.arrays import FloatArray, IntArray
from trainer.data.release import Release
from trainer.inference.model_folder import MAX_INDEX, MEND, hash_of, verified_model
from trainer.knowledge_graph.base import ENTITIES, RELATIONS, GraphModel
from trainer.knowledge_graph.graph import KINDS, Graph
from trainer.knowledge_graph.triples import HEAD, RELATION, TAIL
from trainer.trust.verified_files import MANIFEST, ModelFolderError, Record, digest_of, record

TABLES, NODES, FEATURES, DESCRIPTION = "tables.safetensors", "nodes.parquet", "features.parquet", "embedding.json"
REQUIRED = (TABLES, NODES, FEATURES, DESCRIPTION)
_BLOCK = 1 << 14  # nodes that are projected together


@dataclass(frozen=True)
class Features:
    """Vectors of things: rows of the table `features`, less those of other encoders. What has none has no row."""

    encoder: str
    split: str  # whose training part was read; "" where no interaction was
    kinds: list[str]  # item | user | entity
    ids: list[str]  # raw
    indices: IntArray
    vectors: FloatArray  # [V, F]
    properties: Mapping[str, str]  # of the encoder: the hash of its weights, the snapshots that it read


def write_features(path: Path, features: Features) -> None:
    """Write vectors as rows (kind, id, index, encoder, split, vector) of a Parquet file, in order of kind and index.

    The one place where a features run hands its vectors on: for now a file in the run's folder, whose rows a writer of
    the table `features` can take as they are; the encoder's properties are the file's metadata. Raises GraftrecError
    for a vector that is zero or no number.
    """
    lengths = np.abs(features.vectors).sum(1)
    if len(bad := np.flatnonzero(~np.isfinite(lengths) | (lengths == 0))):
        first = f"{features.kinds[bad[0]]} {features.ids[bad[0]]}"
        raise GraftrecError(
            f"{features.encoder}: expected vectors of numbers, not all zero, found {len(bad)} that are not, the "
            f"first of {first}; lower train.learning_rate"
        )
    order = np.lexsort((features.indices, np.array(features.kinds)))
    width = features.vectors.shape[1]
    count = len(order)
    flat = pa.array(features.vectors[order].astype(np.float32).ravel())
    columns = {
        "kind": pa.array(np.array(features.kinds, dtype=object)[order], pa.string()),
        "id": pa.array(np.array(features.ids, dtype=object)[order], pa.string()),
        "index": pa.array(features.indices[order], pa.int32()),
        "encoder": pa.array([features.encoder] * count, pa.string()),
        "split": pa.array([features.split] * count, pa.string()),
        "vector": pa.ListArray.from_arrays(pa.array(np.arange(count + 1) * width, pa.int32()), flat),
    }
    pq.write_table(pa.table(columns).replace_schema_metadata(dict(features.properties)), path)


def features_of(
    model: GraphModel, tables: Mapping[str, Tensor], graph: Graph, train_N3: IntArray, raw_ids: Mapping[str, list[str]]
) -> tuple[list[str], list[str], IntArray, FloatArray]:
    """(kinds, raw ids, indices, vectors) of the nodes that some training triple has: of the others nothing is known.

    `raw_ids`: of each kind, in the order of its nodes.
    """
    known = np.zeros(graph.num_nodes, dtype=bool)
    known[train_N3[:, [HEAD, TAIL]]] = True
    names = list(KINDS)
    kinds = [names[kind] for kind in graph.kinds[known]]
    ids = np.concatenate([np.array(raw_ids[name], dtype=object) for name in names])  # nodes are sorted by kind
    vectors = node_vectors(model, tables, train_N3)[torch.from_numpy(known)]
    return kinds, ids[known].tolist(), graph.indices[known], vectors.float().numpy()


@torch.no_grad()
def node_vectors(model: GraphModel, tables: Mapping[str, Tensor], train_N3: IntArray) -> Tensor:
    """[V, F]. Where vectors mean something only after a relation's projection (TransR), the mean of a node's
    projections over its training triples; zeros of a node without any."""
    entities = tables[ENTITIES]
    if not model.one_relation:
        return entities
    total, counts = torch.zeros_like(entities), torch.zeros(len(entities), dtype=entities.dtype)
    for relation in np.unique(train_N3[:, RELATION]):
        ends = torch.from_numpy(train_N3[train_N3[:, RELATION] == relation][:, [HEAD, TAIL]].ravel())
        nodes, times = torch.unique(ends, return_counts=True)
        rows = {name: table[[int(relation)]][None] for name, table in tables.items() if name != ENTITIES}
        for some, often in zip(nodes.split(_BLOCK), times.split(_BLOCK), strict=True):
            total[some] += model.candidates(entities[some][None], rows)[0] * often[:, None]
            counts[some] += often
    return total / counts.clamp(min=1)[:, None]


def raw_ids_of(release: Release, graph: Graph) -> dict[str, list[str]]:
    """Raw ids of each kind, in the order of its nodes."""
    found: dict[str, list[str]] = {}
    for number, (kind, (table, column)) in enumerate(KINDS.items()):
        indices = graph.indices[graph.kinds == number]
        found[kind] = []
        if len(indices):
            read = release.read(table, [column, "index"], indices=indices).sort_by("index")
            found[kind] = read[column].to_pylist()
    return found


# --- the folder of an embedding ---------------------------------------------------------------------------------------


class _Description(Record):
    """What embedding.json holds."""

    kind: str
    relations: tuple[str, ...]
    encoder: str = ""


@dataclass(frozen=True)
class Embedding:
    """A trained embedding as its folder holds it; tables by name, nodes and relations in the order of their rows."""

    kind: str
    tables: dict[str, Tensor]
    nodes: pa.Table  # kind, id
    relations: list[str]
    hash: str


def save_embedding(
    folder: Path, *, kind: str, tables: Mapping[str, Tensor], nodes: pa.Table, relations: list[str], features: Features
) -> str:
    """Write the folder in the place of any old one, its manifest last; returns its hash."""
    new = folder.with_name(folder.name + ".new")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    save_file({name: table.detach().contiguous() for name, table in tables.items()}, new / TABLES)
    pq.write_table(nodes, new / NODES)
    write_features(new / FEATURES, features)
    (new / DESCRIPTION).write_text(json.dumps({"kind": kind, "relations": relations, "encoder": features.encoder}))
    digests = {path.name: digest_of(path) for path in sorted(new.iterdir())}
    (new / MANIFEST).write_text(json.dumps(digests, indent=1))
    shutil.rmtree(folder, ignore_errors=True)
    new.rename(folder)
    return hash_of(verified_model(folder, REQUIRED))


def load_embedding(folder: Path) -> Embedding:
    """Raises ModelFolderError for a folder that is not there, incomplete or damaged."""
    found = verified_model(folder, REQUIRED)
    described = record(_Description, found.json(DESCRIPTION), folder / DESCRIPTION, MEND)
    tables = found.tensors(TABLES)
    nodes = found.table(NODES, ["kind", "id"], max_rows=MAX_INDEX)
    shapes = {name: list(one.shape) for name, one in tables.items()}
    if described.kind == "transe":  # which others begin from
        entities, relations = tables.get(ENTITIES), tables.get(RELATIONS)
        if (
            entities is None
            or relations is None
            or any(one.ndim != 2 or not one.is_floating_point() for one in (entities, relations))
            or (len(entities), len(relations)) != (len(nodes), len(described.relations))
        ):
            raise ModelFolderError(
                f"{folder / TABLES}: expected vectors of {len(nodes)} nodes and {len(described.relations)} relations, "
                f"found {str(shapes)[:200]}; {MEND}"
            )
    return Embedding(described.kind, tables, nodes, list(described.relations), hash_of(found))


def weights_hash(tables: Mapping[str, Tensor]) -> str:
    """12 hex digits of the tables' bytes."""
    digest = hashlib.sha256()
    for name in sorted(tables):
        digest.update(name.encode() + tables[name].detach().contiguous().numpy().tobytes())
    return digest.hexdigest()[:12]


@torch.no_grad()
def begin_from(
    parent: Embedding, tables: Mapping[str, Tensor], nodes: pa.Table, relations: list[str], *, max_norm: float | None
) -> int:
    """Copy the parent's entities and relations into `tables` (all rows of each), by raw ids and names; scaled so that
    the longest entity has length `max_norm`, where that is given. Returns the number of nodes found. Raises ConfigError
    for a parent of another kind or width."""
    width = tables[ENTITIES].shape[1]
    theirs = parent.tables[ENTITIES].shape[1] if ENTITIES in parent.tables else 0
    if parent.kind != "transe" or theirs != width:
        raise ConfigError(
            f"parent: expected an embedding by transe of width {width}, found {parent.kind} of width {theirs}; name "
            "another run, or set model.width"
        )
    rows = {key: row for row, key in enumerate(_keys(parent.nodes))}
    pairs = [(row, rows[key]) for row, key in enumerate(_keys(nodes)) if key in rows]
    named = {name: row for row, name in enumerate(parent.relations)}
    of_relations = [(row, named[name]) for row, name in enumerate(relations) if name in named]
    # One scale for both, so that distances keep their order.
    longest = float(torch.linalg.vector_norm(parent.tables[ENTITIES], dim=1).max())
    scale = 1.0 if max_norm is None else max_norm / longest
    for table, found in ((ENTITIES, pairs), (RELATIONS, of_relations)):
        if found:
            to, source = torch.tensor(found).T
            tables[table][to] = (parent.tables[table][source] * scale).to(tables[table].dtype)
    return len(pairs)


def _keys(nodes: pa.Table) -> list[tuple[str, str]]:
    return list(zip(nodes["kind"].to_pylist(), nodes["id"].to_pylist(), strict=True))
