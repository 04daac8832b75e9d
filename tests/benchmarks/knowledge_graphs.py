"""Knowledge graph embeddings beside pykeen: scores, filtered ranks, speed, cost at 10 M entities, FB15k-237 in minutes.

Speed is triples per CPU-second of one thread, with d = 50 (complex numbers where a model has them) and as many
negatives a triple here and there, on FB15k-237 (DATA=folder of its OpenKE files) or a generated graph of its shape.
Here negatives are shared by a chunk and Adagrad touches the rows of a batch; pykeen draws them for each triple, and its
Adam is dense, as its pipelines set it. Batches are equally large in both; beside them stands pykeen's better
size of two.
"""

import importlib.util
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.benchmarks.__main__ import Options
from tests.benchmarks.harness import Case, Numbers, Report, alternate, median, run
from tests.fixtures.peer_graphs import DATA_SETS, KINDS, Kind
from trainer.arrays import IntArray
from trainer.config.graph import GraphModelConfig, GraphTrainConfig
from trainer.knowledge_graph.batches import BatchSettings, TripleBatches
from trainer.knowledge_graph.models import build_graph_model
from trainer.knowledge_graph.ranking import filtered_ranks
from trainer.knowledge_graph.training import GraphTraining
from trainer.knowledge_graph.triples import HEAD, RELATION, TAIL, KnownTriples
from trainer.parallel.cores import use_threads
from trainer.parallel.distributed import ALONE

WIDTH, BATCH, NEGATIVES = 50, 4096, (64, 256)
PEER_BATCHES = (256, BATCH)
ENTITIES, RELATIONS, TRIPLES = 14_541, 237, 272_115  # of FB15k-237
SECONDS = 2.0  # of CPU, of each case and round
FAST = {("transe", 2): 15, ("distmult", 2): 15, ("complex", 2): 15}  # bars; of others 5
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
LARGE, SMALL = 10_000_000, 10_000
MINUTES, THREADS = 5, 2


def measure(report: Report, options: Options) -> None:
    if importlib.util.find_spec("pykeen") is None:
        report.skip("scores, ranks and speed beside pykeen", "pykeen is not installed")
    else:
        _agreement(report)
        _speed(report, options.data)
    _growth(report)
    if options.data is None:
        report.skip("FB15k-237 in five minutes", "no DATA=<folder with train2id.txt, valid2id.txt, test2id.txt>")
    else:
        _five_minutes(report, options.data)


# --- scores and ranks -------------------------------------------------------------------------------------------------


def _agreement(report: Report) -> None:
    found = run(Case("agreement", "tests.benchmarks.knowledge_graphs:agreement", environment=ONE_THREAD))
    rows = [
        [name, numbers["score"], numbers["ranks"], numbers["differing"]] for name, numbers in found["models"].items()
    ]
    report.table(
        f"The same weights in float64, on {', '.join(DATA_SETS)}",
        ["model", "largest difference of a score", "ranks", "of them other than pykeen's"],
        rows,
    )
    report.bar("largest difference of a score from pykeen's", max(float(row[1]) for row in rows), at_most=1e-6)
    report.bar("filtered ranks other than pykeen's", sum(int(row[3]) for row in rows), at_most=0)


def agreement() -> Numbers:
    from pykeen import datasets

    from tests.fixtures.peer_graphs import both_ranks, both_scores, pair_of

    models: dict[str, Numbers] = {}
    for kind in KINDS:
        score, count, differing = 0.0, 0, 0
        for name in DATA_SETS:
            data = getattr(datasets, name)()
            pair = pair_of(kind, data.training)
            ours, theirs = both_scores(pair, data.training.mapped_triples)
            score = max(score, float((ours - theirs).abs().max()))
            ranks, their_ranks, _ = both_ranks(pair, data)
            for side, expected in their_ranks.items():
                count += len(expected)
                differing += int((ranks.realistic(side) != expected).sum())
        models[f"{kind[0]} L{kind[1]}"] = {"score": score, "ranks": count, "differing": differing}
    return {"models": models}


# --- speed ------------------------------------------------------------------------------------------------------------


def _speed(report: Report, data: Path | None) -> None:
    rows: list[list[object]] = []
    folder = None if data is None else str(data)
    for negatives in NEGATIVES:
        for kind in KINDS:
            common = {"kind": kind[0], "norm": kind[1], "negatives": negatives, "folder": folder}
            cases = [Case("ours", "tests.benchmarks.knowledge_graphs:our_speed", common, environment=ONE_THREAD)]
            cases += [
                Case(
                    f"pykeen {batch}",
                    "tests.benchmarks.knowledge_graphs:peer_speed",
                    common | {"batch": batch},
                    None,
                    ONE_THREAD,
                )
                for batch in PEER_BATCHES
                if kind[0] != "transr" or batch < BATCH  # a projection a triple and negative: gigabytes
            ]
            found = alternate(cases, rounds=2)
            speed = {name: median(numbers, "triples_per_second") for name, numbers in found.items()}
            ours, peers = speed.pop("ours"), speed
            same = list(peers.values())[-1]  # the largest batch it can
            best = max(peers.values())
            rows.append([f"{kind[0]} L{kind[1]}", negatives, ours, same, ours / same, best, ours / best])
            report.bar(
                f"{kind[0]} L{kind[1]}, {negatives} negatives, triples per CPU-second over pykeen's",
                ours / same,
                at_least=FAST.get(kind, 5),
            )
    report.table(
        f"Triples per CPU-second, one thread, d = {WIDTH}, batches of {BATCH:,}",
        ["model", "negatives", "graftrec", "pykeen", "faster by", "pykeen at its best batch", "faster by"],
        rows,
    )


def our_speed(kind: str, norm: int, negatives: int, folder: str | None) -> Numbers:
    use_threads(1)
    train = read_triples(Path(folder), "train") if folder else generated_triples()
    training = training_of((kind, norm), train, width=WIDTH, settings=GraphTrainConfig(negatives=negatives))
    return {"triples_per_second": _measured(training)}


def _measured(training: GraphTraining) -> float:
    batches = training.batches.epoch(0)
    for _ in range(3):
        training.step(next(batches))
    begun, count, epoch = time.process_time(), 0, 0
    while time.process_time() - begun < SECONDS:
        batch = next(batches, None)
        if batch is None:
            epoch += 1
            batches = training.batches.epoch(epoch)
            continue
        training.step(batch)
        count += batch.global_size
    return count / (time.process_time() - begun)


def peer_speed(kind: str, norm: int, negatives: int, folder: str | None, batch: int) -> Numbers:
    """A whole epoch of its training loop on some of the triples, after one that is not counted."""
    import logging

    from pykeen.training import SLCWATrainingLoop
    from pykeen.triples import CoreTriplesFactory

    from tests.fixtures.peer_graphs import peer_model

    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    train = read_triples(Path(folder), "train") if folder else generated_triples()
    count = min(len(train), max(2 * batch, (1 << 20) // negatives // (8 if kind == "transr" else 1)))
    some = np.random.default_rng(0).permutation(train)[:count]
    factory = CoreTriplesFactory(torch.from_numpy(some), num_entities=ENTITIES, num_relations=RELATIONS)
    model = peer_model((kind, norm), factory, WIDTH)
    loop = SLCWATrainingLoop(
        model=model,
        triples_factory=factory,
        optimizer="adam",
        negative_sampler_kwargs={"num_negs_per_pos": negatives},
    )
    quiet: dict[str, Any] = {"batch_size": batch, "use_tqdm": False, "use_tqdm_batch": False}
    loop.train(triples_factory=factory, num_epochs=1, **quiet)
    begun = time.process_time()
    loop.train(triples_factory=factory, num_epochs=1, **quiet)
    return {"triples_per_second": count / (time.process_time() - begun)}


# --- many entities ----------------------------------------------------------------------------------------------------


def _growth(report: Report) -> None:
    cases = [
        Case(
            f"{entities:,}", "tests.benchmarks.knowledge_graphs:step_seconds", {"entities": entities}, None, ONE_THREAD
        )
        for entities in (SMALL, LARGE)
    ]
    found = alternate(cases, rounds=3)
    seconds = {name: median(numbers, "seconds") for name, numbers in found.items()}
    report.table(
        f"A step of TransE, d = {WIDTH}, {NEGATIVES[-1]} negatives, batches of {BATCH:,}",
        ["entities", "CPU-milliseconds"],
        [[name, 1_000 * value] for name, value in seconds.items()],
    )
    report.bar(
        f"a step at {LARGE:,} entities over one at {SMALL:,}",
        seconds[f"{LARGE:,}"] / seconds[f"{SMALL:,}"],
        at_most=1.1,
    )


def step_seconds(entities: int) -> Numbers:
    use_threads(1)
    generator = np.random.default_rng(0)
    triples = generator.integers(0, [entities, RELATIONS, entities], size=(1_000_000, 3))
    settings = GraphTrainConfig(negatives=NEGATIVES[-1])
    training = training_of(("transe", 2), triples, width=WIDTH, settings=settings, entities=entities)
    return {"seconds": BATCH / _measured(training)}


# --- FB15k-237 --------------------------------------------------------------------------------------------------------


def _five_minutes(report: Report, data: Path) -> None:
    found = run(Case("FB15k-237", "tests.benchmarks.knowledge_graphs:fb15k237", {"folder": str(data)}), timeout=1_200)
    report.table(
        f"TransE on FB15k-237, full test, filtered, {THREADS} threads",
        ["seconds", "CPU-seconds", "MRR", "Hits@1", "Hits@3", "Hits@10"],
        [[found[name] for name in ("seconds", "cpu_seconds", "MRR", "Hits@1", "Hits@3", "Hits@10")]],
    )
    report.bar("FB15k-237, seconds of training and ranking", found["seconds"], at_most=60.0 * MINUTES)
    report.bar("FB15k-237, MRR of TransE", found["MRR"], at_least=0.28)
    report.bar("FB15k-237, Hits@10 of TransE", found["Hits@10"], at_least=0.45)


def fb15k237(folder: str) -> Numbers:
    use_threads(THREADS)
    train, valid, test = (read_triples(Path(folder), part) for part in ("train", "valid", "test"))
    begun, cpu = time.monotonic(), time.process_time()
    training = training_of(("transe", 2), train, width=FB_WIDTH, settings=FB_SETTINGS)
    for epoch in range(FB_SETTINGS.epochs):
        training.progress.epoch, training.progress.step = epoch, 0
        for batch in training.batches.epoch(epoch):
            training.step(batch)
    known = KnownTriples(np.concatenate([train, valid, test]), num_entities=ENTITIES, num_relations=RELATIONS)
    ranks = filtered_ranks(training.model, training.whole(), test, known)
    costs = {"seconds": time.monotonic() - begun, "cpu_seconds": time.process_time() - cpu}
    return costs | ranks.metrics()


FB_WIDTH = 200
FB_SETTINGS = GraphTrainConfig(epochs=20, batch_size=4096, chunk=256, negatives=256, margin=9.0, learning_rate=0.6)


# --- what they share --------------------------------------------------------------------------------------------------


def training_of(
    kind: Kind, train: IntArray, *, width: int, settings: GraphTrainConfig, entities: int = ENTITIES
) -> GraphTraining:
    config = GraphModelConfig.model_validate({"kind": kind[0], "width": width, "norm": kind[1]})
    model = build_graph_model(config)
    batches = TripleBatches(
        KnownTriples(train, num_entities=entities, num_relations=RELATIONS),
        BatchSettings.of(settings, one_relation=model.one_relation),
    )
    return GraphTraining(model, batches, settings, ALONE)


def read_triples(folder: Path, part: str) -> IntArray:
    """OpenKE's files: a count, then head, tail, relation."""
    found = np.loadtxt(folder / f"{part}2id.txt", skiprows=1, dtype=np.int64)
    return found[:, [HEAD, TAIL, RELATION]]


def generated_triples() -> IntArray:
    """As many entities, relations and triples as FB15k-237 has, some of them much more frequent than others."""
    generator = np.random.default_rng(0)
    ends = (ENTITIES * generator.random((2, 2 * TRIPLES)) ** 3).astype(np.int64)
    relations = (RELATIONS * generator.random(2 * TRIPLES) ** 3).astype(np.int64)
    return np.unique(np.column_stack([ends[0], relations, ends[1]]), axis=0)[:TRIPLES]
