"""Embed the knowledge graph of a release, and report its filtered ranks: the part `graph` of the recipe `features`.

Writes to <output>/<name>: `model` (the embedding and features.parquet: kind, id, index, encoder, split, vector) and
report.md (ranks of held-out triples by relation and side, coverage by domain). An unchanged rerun is skipped, a killed
one goes on.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa

from etl import tables
from etl.redaction import redact
from etl.settings import replaced
from trainer.arrays import IntArray
from trainer.config import GraphConfig
from trainer.data.release import Release, pin
from trainer.knowledge_graph.batches import BatchSettings, TripleBatches
from trainer.knowledge_graph.graph import KINDS, Graph, read_graph
from trainer.knowledge_graph.loop import GraphWatch, train_graph
from trainer.knowledge_graph.models import build_graph_model
from trainer.knowledge_graph.ranking import Ranks, filtered_ranks
from trainer.knowledge_graph.report import coverage_text, item_coverage, ranking_text
from trainer.knowledge_graph.training import GraphEpoch, GraphTraining
from trainer.knowledge_graph.triples import KnownTriples, Split, split_triples
from trainer.knowledge_graph.vectors import (
    FEATURES,
    Embedding,
    Features,
    begin_from,
    features_of,
    load_embedding,
    raw_ids_of,
    save_embedding,
    weights_hash,
)
from trainer.parallel.distributed import World, join
from trainer.recipes.recorded_once import note_done, recorded_once
from trainer.recipes.run_folder import alone
from trainer.recipes.run_result import Result, agreed, identity_of, reused
from trainer.tracking import Run

REPORT = "report.md"
_READ = (tables.KNOWLEDGE, tables.ENTITIES, tables.ITEMS, tables.USERS, tables.DOMAINS, tables.SEQUENCES)


@dataclass(frozen=True)
class _Inputs:
    """What a run reads. `known`: all parts' triples."""

    config: GraphConfig
    release: Release
    graph: Graph
    split: Split
    raw_ids: dict[str, list[str]]
    parent: Embedding | None

    @property
    def known(self) -> KnownTriples:
        return self._index(self.split.all)

    @property
    def trained(self) -> KnownTriples:
        return self._index(self.split.train)

    @property
    def nodes(self) -> pa.Table:
        """Kind and raw id of each node."""
        kinds = np.array(list(KINDS), dtype=object)[self.graph.kinds]
        ids = [raw for kind in KINDS for raw in self.raw_ids[kind]]  # nodes are sorted by kind
        return pa.table({"kind": pa.array(kinds, pa.string()), "id": pa.array(ids, pa.string())})

    def _index(self, triples_N3: IntArray) -> KnownTriples:
        num_relations = len(self.graph.relations)
        return KnownTriples(triples_N3, num_entities=self.graph.num_nodes, num_relations=num_relations)


def run(config: GraphConfig) -> Result:
    """Train, or find what was trained. Raises GraftrecError."""
    world = join(replaced(config.runtime, device="cpu"))  # a step is small, and its tables may be large
    with alone(Path(config.output) / config.name, world) as folder:
        return _run(config, world, folder)


def _run(config: GraphConfig, world: World, folder: Path) -> Result:
    say: Callable[[str], None] = print if world.first else lambda line: None
    release = pin(config.data.lake, world.of_first(pin(config.data.lake, config.data.release).number))
    parent = None if config.parent is None else load_embedding(Path(config.parent) / "model")
    parent_hash = parent.hash if parent else ""
    of_run = identity_of(config, release, "trainer.recipes.graph_features", _READ, parent_hash)
    identity = ":".join(agreed(of_run, world).values())
    if (finished := reused(config, folder, identity, world)) is not None:
        say(f"{config.name}: unchanged, the vectors in {folder / 'model'} stand")
        return finished

    inputs = _read(config, release, parent)
    training = _training(inputs, world)
    size = _size(inputs)
    say(f"{config.name}: {config.model.kind}, release {release.number} of {release.lake}, {size}")
    with recorded_once(config, folder, identity, world, release=release, read=_READ) as tracked:
        tracked.set_tags({"graftrec.recipe": "features"})
        about = f"Embeds the knowledge graph of release {release.number} of `{redact(release.lake)}` by "
        about += f"{config.model.kind}: {size}."
        tracked.describe(about)
        train_graph(
            training,
            validate=partial(_validate, training, inputs, world),
            checkpoints=folder / "checkpoints",
            watch=GraphWatch(
                on_epoch=lambda epoch: _log_epoch(epoch, tracked, say),
                on_resume=lambda epochs: tracked.log_history([(epoch.epoch, _curves(epoch)) for epoch in epochs]),
                show_progress=config.runtime.progress,
                say=say,
            ),
        )
        metrics = _finish(folder, inputs, training, identity, tracked, about)
    say(f"{config.name}: {_reached(metrics)}; vectors in {folder / 'model' / FEATURES}, report in {folder / REPORT}")
    return Result(folder, metrics, reused=False, run_id=tracked.id)


def _read(config: GraphConfig, release: Release, parent: Embedding | None) -> _Inputs:
    data = config.data
    graph = read_graph(release, data)
    split = split_triples(graph.triples, validation=data.validation, test=data.test, seed=config.train.seed)
    return _Inputs(config, release, graph, split, raw_ids_of(release, graph), parent)


def _training(inputs: _Inputs, world: World) -> GraphTraining:
    config, settings = inputs.config, inputs.config.train
    model = build_graph_model(config.model)
    batches = TripleBatches(
        inputs.trained,
        BatchSettings.of(settings, one_relation=model.one_relation),
        rank=world.rank,
        world_size=world.size,
    )
    training = GraphTraining(model, batches, settings, world)
    if inputs.parent is not None:
        whole = {name: table.clone() for name, table in training.whole().items()}
        begin_from(inputs.parent, whole, inputs.nodes, list(inputs.graph.relations), max_norm=config.model.max_norm)
        training.begin(whole)
    return training


def _size(inputs: _Inputs) -> str:
    graph, split = inputs.graph, inputs.split
    kinds = ", ".join(
        f"{int((graph.kinds == number).sum()):,} {table.name}" for number, (table, _) in enumerate(KINDS.values())
    )
    return (
        f"{len(split.train):,} triples of {len(graph.relations)} relations, {len(split.validation):,} and "
        f"{len(split.test):,} held out; nodes: {kinds}"
    )


def _validate(training: GraphTraining, inputs: _Inputs, world: World) -> dict[str, float]:
    """Metrics of some validation triples, the same ones each epoch."""
    triples = inputs.split.validation
    if len(triples) > inputs.config.validation_triples:
        chosen = np.random.default_rng([inputs.config.train.seed, 3]).permutation(len(triples))
        triples = triples[np.sort(chosen[: inputs.config.validation_triples])]
    if not len(triples):
        return {}
    whole = training.whole()
    ranks = filtered_ranks(training.model, whole, triples, inputs.known) if world.first else None
    return world.of_first(ranks.metrics() if ranks is not None else {})


def _curves(epoch: GraphEpoch) -> dict[str, float]:
    return {f"validation/{name}": value for name, value in epoch.metrics.items()} | {
        "train/loss": epoch.loss,
        "train/triples_per_second": epoch.triples_per_second,
        "train/epoch_seconds": epoch.seconds,
    }


def _log_epoch(epoch: GraphEpoch, tracked: Run, say: Callable[[str], None]) -> None:
    tracked.log_metrics(_curves(epoch), step=epoch.epoch)
    found = f"validation MRR {epoch.metrics['MRR']:.4f}  " if epoch.metrics else ""
    say(f"epoch {epoch.epoch:>3}  loss {epoch.loss:.4f}  {found}{epoch.triples_per_second:,.0f} triples/s")


def _finish(
    folder: Path, inputs: _Inputs, training: GraphTraining, identity: str, tracked: Run, about: str
) -> dict[str, float]:
    """Ranks, report and vectors, and the note that all is done (`noted` gives it its name). The metrics."""
    world, config, graph = training.world, inputs.config, inputs.graph
    whole = training.whole()
    metrics: dict[str, float] = {"seconds": sum(epoch.seconds for epoch in training.progress.history)}
    if world.first:
        ranks = filtered_ranks(training.model, whole, inputs.split.test, inputs.known)
        if len(inputs.split.test):
            metrics |= {f"test/{name}": value for name, value in ranks.metrics().items()}
        kinds, ids, indices, vectors = features_of(training.model, whole, graph, inputs.split.train, inputs.raw_ids)
        versions = {table.name: inputs.release.versions.get(table.name) for table in _READ}
        properties = {
            "graftrec.weights": weights_hash(whole),
            "graftrec.width": str(vectors.shape[1]),
            "graftrec.snapshots": json.dumps(versions, sort_keys=True),
        }
        features = Features(config.name, config.data.events or "", kinds, ids, indices, vectors, properties)
        digest = save_embedding(
            folder / "model",
            kind=config.model.kind,
            tables=whole,
            nodes=inputs.nodes,
            relations=list(graph.relations),
            features=features,
        )
        items = indices[np.array(kinds) == "item"]
        metrics |= {f"coverage/{d}": share for d, share in item_coverage(inputs.release, items).items()}
        text = _report(inputs, ranks, item_coverage(inputs.release, items), len(indices))
        (folder / REPORT).write_text(text, encoding="utf-8")
        tracked.log_artifact(folder / REPORT)
        tracked.log_artifact(folder / "model")
        tracked.log_metrics(metrics)
        reached = _reached(metrics)
        tracked.describe(f"{reached[0].upper()}{reached[1:]}.\n\n{about}")
        note_done(folder, identity, digest, metrics, tracked)
    world.wait()
    return world.of_first(metrics)


def _reached(metrics: Mapping[str, float]) -> str:
    """What it reached on held-out triples, in words."""
    if "test/MRR" not in metrics:
        return "no triple was held out for test"
    return "test " + ", ".join(f"{name} {metrics[f'test/{name}']:.3f}" for name in ("MRR", "Hits@10"))


def _report(inputs: _Inputs, ranks: Ranks, coverage: dict[str, float], num_vectors: int) -> str:
    model = inputs.config.model
    lacking = inputs.graph.num_nodes - num_vectors
    return "\n\n".join(
        [
            f"# {inputs.config.name}: {model.kind}, width {model.width}",
            f"{_size(inputs)}. {num_vectors:,} nodes have a vector, {lacking:,} have no training triple and none.",
            "## Held-out triples\n\nFiltered by the triples of all parts; ties count half. A scorer that scores all "
            f"alike has MRR {2 / (inputs.graph.num_nodes + 1):.4f} where no candidate is filtered.",
            ranking_text(ranks, inputs.graph.relations) if len(inputs.split.test) else "None was held out.",
            "## Coverage",
            coverage_text(coverage),
        ]
    )
