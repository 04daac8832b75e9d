"""Vectors from the social network of a release: the part `social` of the recipe `features`.

Writes to <output>/<name>: `model` (tables, and features.parquet: kind, id, index, encoder, split, vector), report.md,
and, of a model that ranks, users.parquet (metrics of each user of the test part). An unchanged rerun is skipped; a
killed one begins anew and ends with the same bytes.
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import scipy.sparse as sp
import torch
from torch import Tensor

from etl import tables, text_table
from etl.redaction import redact
from etl.settings import ConfigError, replaced
from etl.tables import FIRST_INDEX
from trainer.arrays import IntArray
from trainer.config.social import LightGcnConfig, Node2VecConfig, SocialConfig
from trainer.data.catalogue import Catalogue, read_catalogue
from trainer.data.held_out import HeldOut
from trainer.data.release import Release, pin
from trainer.data.social import Network, read_network, read_training, rewired, widened
from trainer.evaluation.ranking_metrics import means
from trainer.evaluation.scorers import raw_users
from trainer.knowledge_graph.vectors import FEATURES, Features, save_embedding, weights_hash
from trainer.parallel.distributed import join
from trainer.recipes.recorded_once import note_done, recorded_once
from trainer.recipes.run_folder import alone
from trainer.recipes.run_result import Result, identity_of, reused
from trainer.social.lightgcn import train
from trainer.social.ranking import Metrics, VectorScore, examples, ranked
from trainer.social.skip_gram import node2vec
from trainer.tracking import Run

REPORT, USERS = "report.md", "users.parquet"
_READ = (tables.SOCIAL, tables.ITEMS, tables.USERS, tables.DOMAINS, tables.SEQUENCES)
_SHOWN = ("NDCG@10", "Recall@10", "MRR")


@dataclass(frozen=True)
class _Made:
    """Vectors of users, and of items where there are any; what a model that ranks reached."""

    users: IntArray  # [U] global indices
    users_UF: Tensor
    items: IntArray = field(default_factory=lambda: np.empty(0, np.int64))  # [V] global indices
    items_VF: Tensor = field(default_factory=lambda: torch.empty(0))
    item_ids: list[str] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)
    per_user: pa.Table | None = None
    lines: list[str] = field(default_factory=list)  # of the report


def run(config: SocialConfig) -> Result:
    """Train, or find what was trained. Raises GraftrecError."""
    world = join(replaced(config.runtime, device="cpu", precision="fp32"))
    if world.size > 1:
        raise ConfigError(f"social: expected one process, found {world.size}; start it without torchrun")
    with alone(Path(config.output) / config.name, world) as folder:
        release = pin(config.data.lake, config.data.release)
        of_run = identity_of(config, release, "trainer.recipes.social_features", _READ, "")
        identity = ":".join(of_run.values())
        if (finished := reused(config, folder, identity, world)) is not None:
            print(f"{config.name}: unchanged, the vectors in {folder / 'model'} stand")
            return finished
        make = _prepared(config, release)
        with recorded_once(config, folder, identity, world, release=release, read=_READ) as tracked:
            tracked.set_tags({"graftrec.recipe": "features"})
            begun = time.monotonic()
            made = make(tracked)
            made.metrics["seconds"] = time.monotonic() - begun
            _finish(folder, config, release, made, identity, tracked)
    return Result(folder, made.metrics, reused=False, run_id=tracked.id)


def _prepared(config: SocialConfig, release: Release) -> Callable[[Run], _Made]:
    """What trains, once all that it reads is read."""
    if isinstance(config.model, Node2VecConfig):
        return partial(_walked, config, config.model, _network(config, release))
    return partial(_propagated, config, config.model, release, _read_log(config, config.model, release))


def _network(config: SocialConfig, release: Release) -> Network:
    network = read_network(release, directed=config.data.directed)
    return network if config.data.rewired is None else rewired(network, seed=config.data.rewired)


def _walked(config: SocialConfig, model: Node2VecConfig, network: Network, tracked: Run) -> _Made:
    print(f"{config.name}: node2vec, {len(network.users):,} users, {network.edges.nnz:,} edges")
    vectors, losses = node2vec(network.edges, model)
    for epoch, loss in enumerate(losses, 1):
        tracked.log_metrics({"train/loss": loss}, step=epoch)
    lines = [f"{len(network.users):,} users, {network.edges.nnz:,} edges; loss of a pair by epoch: "]
    lines[0] += ", ".join(f"{loss:.4f}" for loss in losses) + "."
    return _Made(network.users, vectors, lines=lines, metrics={"train/last_loss": losses[-1]})


@dataclass(frozen=True)
class _Log:
    """What LightGCN reads: who took what, who knows whom (None: not read), and what is ranked."""

    catalogue: Catalogue
    users: IntArray  # [U] global indices
    taken: sp.csr_array  # [U, V], of the catalogue's rows from FIRST_INDEX on
    edges: sp.csr_array | None
    validation: HeldOut
    test: HeldOut


def _read_log(config: SocialConfig, model: LightGcnConfig, release: Release) -> _Log:
    data = config.data
    assert data.split is not None
    catalogue = read_catalogue(release, data.domain)
    users, taken = read_training(release, data.split, data.domain, catalogue)
    edges = None
    if model.friends:
        network = _network(config, release)
        everyone = np.union1d(users, network.users)
        taken, users, edges = widened(taken, users, everyone), everyone, network.of(everyone).edges
    validation, test = (examples(release, data.split, data.domain, catalogue, part) for part in ("validation", "test"))
    return _Log(catalogue, users, taken[:, FIRST_INDEX:].tocsr(), edges, validation, test)


def _propagated(config: SocialConfig, model: LightGcnConfig, release: Release, log: _Log, tracked: Run) -> _Made:
    users, taken, edges, catalogue = log.users, log.taken, log.edges, log.catalogue
    validation, test = log.validation, log.test
    popular = torch.from_numpy(np.asarray(taken.sum(0), dtype=np.float32).ravel())
    size = f"{taken.shape[0]:,} users, {taken.shape[1]:,} items, {taken.nnz:,} interactions"
    size += f", {edges.nnz:,} edges of friends" if edges is not None else ", no friends"
    print(f"{config.name}: lightgcn, {size}; {len(validation):,} users validated")

    def validate(users_UF: Tensor, items_VF: Tensor) -> float:
        found = ranked(VectorScore(users, users_UF, items_VF, popular), validation)
        return means(found)["NDCG@10"]

    def on_epoch(epoch: int, loss: float, metric: float) -> None:
        found = {"train/loss": loss} | ({} if np.isnan(metric) else {"validation/NDCG@10": metric})
        tracked.log_metrics(found, step=epoch)
        if not np.isnan(metric):
            print(f"epoch {epoch:>3}  loss {loss:.4f}  validation NDCG@10 {metric:.4f}", flush=True)

    trained = train(taken, model, edges_UU=edges, validate=validate, on_epoch=on_epoch)
    found = ranked(VectorScore(users, trained.users, trained.items, popular), test)
    flat = ranked(VectorScore(np.array([-1]), torch.zeros(1, 1), torch.ones(len(popular), 1), popular), test)
    reached = means(found)
    chosen = ", chosen by validation NDCG@10" if model.best_epoch else ""
    watched = dict((epoch, metric) for epoch, _, metric in trained.history)
    rows = [
        [label, *(f"{means(metrics)[name]:.4f}" for name in _SHOWN)]
        for label, metrics in ((config.name, found), ("popularity", flat))
    ]
    lines = [
        f"{size}; epoch {trained.epoch} of {len(trained.history)}{chosen}.",
        f"## Test part\n\n{len(test):,} users, ranked among all items but those of their input.",
        "\n".join(text_table.markdown(["", *_SHOWN], rows)),
    ]
    return _Made(
        users,
        trained.users,
        catalogue.global_index[FIRST_INDEX:],
        trained.items,
        list(catalogue.raw_ids)[FIRST_INDEX:],
        {f"test/{name}": reached[name] for name in _SHOWN}
        | {"final_validation/NDCG@10": watched[trained.epoch], "epochs": trained.epoch},
        _table_of(release, test.users, found),
        lines,
    )


def _table_of(release: Release, users: IntArray, found: Metrics) -> pa.Table:
    return pa.table({"user": raw_users(release, users)} | {name: pa.array(v) for name, v in found.items()})


def _finish(folder: Path, config: SocialConfig, release: Release, made: _Made, identity: str, tracked: Run) -> None:
    """Vectors and report, and the note that all is done (`noted` gives it its name)."""
    has_user, has_item = (
        vectors.any(1).numpy() if len(vectors) else np.empty(0, bool) for vectors in (made.users_UF, made.items_VF)
    )
    users = made.users[has_user]
    kinds = ["user"] * len(users) + ["item"] * int(has_item.sum())
    ids = raw_users(release, users) + [made.item_ids[place] for place in np.flatnonzero(has_item)]
    both = [made.users_UF[torch.from_numpy(has_user)]]
    if has_item.any():
        both.append(made.items_VF[torch.from_numpy(has_item)])
    vectors = torch.cat(both).detach().numpy()
    whole = {"users": made.users_UF} | ({"items": made.items_VF} if len(made.items_VF) else {})
    versions = {table.name: release.versions.get(table.name) for table in _READ}
    properties = {
        "graftrec.weights": weights_hash(whole),
        "graftrec.width": str(vectors.shape[1]),
        "graftrec.snapshots": json.dumps(versions, sort_keys=True),
    }
    indices = np.concatenate([users, made.items[has_item]])
    digest = save_embedding(
        folder / "model",
        kind=config.model.kind,
        tables=whole,
        nodes=pa.table({"kind": pa.array(kinds, pa.string()), "id": pa.array(ids, pa.string())}),
        relations=[],
        features=Features(config.name, config.data.split or "", kinds, ids, indices, vectors, properties),
    )
    about = f"Vectors of release {release.number} of `{redact(release.lake)}` by {config.model.kind}."
    covered = f"{len(users):,} users and {int(has_item.sum()):,} items have a vector."
    text = "\n\n".join([f"# {config.name}: {config.model.kind}, width {config.model.width}", covered, *made.lines])
    (folder / REPORT).write_text(text + "\n", encoding="utf-8")
    if made.per_user is not None:
        pq.write_table(made.per_user, folder / USERS)
    tracked.log_artifact(folder / REPORT)
    tracked.log_artifact(folder / "model")
    tracked.log_metrics(made.metrics)
    tracked.describe(f"{about} {covered}\n\n" + "\n\n".join(made.lines))
    note_done(folder, identity, digest, made.metrics, tracked)
    shown = ", ".join(f"{name} {made.metrics[f'test/{name}']:.4f}" for name in _SHOWN if f"test/{name}" in made.metrics)
    print(f"{config.name}: {shown + '; ' if shown else ''}{covered} Vectors in {folder / 'model' / FEATURES}")
