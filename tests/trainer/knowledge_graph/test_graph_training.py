"""Gradients, negatives, masks, order, resume: beside autograd, brute force and runs without an interruption."""

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from trainer.arrays import IntArray
from trainer.config.graph import GraphModelConfig, GraphTrainConfig
from trainer.knowledge_graph import loss
from trainer.knowledge_graph.base import ENTITIES
from trainer.knowledge_graph.batches import BatchSettings, TripleBatch, TripleBatches, chunk_bounds
from trainer.knowledge_graph.models import MODELS, build_graph_model
from trainer.knowledge_graph.negatives import known_places
from trainer.knowledge_graph.rows import distinct_rows
from trainer.knowledge_graph.similarity import DotProduct, Euclidean, Manhattan, Queries, Similarity
from trainer.knowledge_graph.training import GraphTraining
from trainer.knowledge_graph.triples import HEAD, RELATION, SIDES, TAIL, KnownTriples
from trainer.parallel.distributed import World

ENTITY_COUNT, RELATION_COUNT = 60, 4
WORLD = World(0, 1, torch.device("cpu"), torch.float64, autocast=False)
KINDS = [*MODELS]


def some_triples(count: int = 900, seed: int = 0) -> IntArray:
    generator = np.random.default_rng(seed)
    drawn = generator.integers(0, [ENTITY_COUNT, RELATION_COUNT, ENTITY_COUNT], size=(count, 3))
    return np.unique(drawn, axis=0)


def known_triples(seed: int = 0) -> KnownTriples:
    return KnownTriples(some_triples(seed=seed), num_entities=ENTITY_COUNT, num_relations=RELATION_COUNT)


def settings(**changes: int) -> BatchSettings:
    return BatchSettings(
        **{"batch_size": 100, "chunk": 16, "negatives": 24, "block_rows": 1 << 20, "seed": 5} | changes
    )


def training_of(kind: str, *, world: World = WORLD, **changes: float) -> GraphTraining:
    config = GraphTrainConfig(**{"epochs": 3, "batch_size": 100, "chunk": 16, "negatives": 24, "margin": 3} | changes)
    model = build_graph_model(GraphModelConfig(kind=kind, width=6))  # type: ignore[arg-type]
    batches = TripleBatches(known_triples(), settings(one_relation=model.one_relation))
    return GraphTraining(model, batches, config, world)


# --- scores and gradients ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normals", [False, True])
@pytest.mark.parametrize("similarity", [DotProduct(), Manhattan(), Euclidean()], ids=lambda one: type(one).__name__)
def test_gradients_by_hand_are_autograds(similarity: Similarity, normals: bool) -> None:
    if normals and not isinstance(similarity, Euclidean):
        pytest.skip("only distances have hyperplanes")
    torch.manual_seed(0)
    vectors = torch.randn(2, 5, 7, dtype=torch.float64, requires_grad=True)
    raw = torch.randn(2, 5, 7, dtype=torch.float64, requires_grad=True)
    candidates = torch.randn(2, 6, 7, dtype=torch.float64, requires_grad=True)
    slopes = torch.randn(2, 5, 6, dtype=torch.float64)
    queries = Queries(vectors, F.normalize(raw, dim=-1) if normals else None)

    def repeated(rows: Tensor) -> Tensor:  # every query with every candidate, as pairs
        return rows[:, :, None].expand(2, 5, 6, 7).reshape(2, 30, 7)

    pairs = Queries(repeated(vectors), repeated(queries.normals_SCD) if queries.normals_SCD is not None else None)
    scores = similarity.of_pairs(pairs, candidates[:, None].expand(2, 5, 6, 7).reshape(2, 30, 7)).view(2, 5, 6)
    torch.testing.assert_close(similarity.of_all(queries.detach(), candidates.detach()), scores.detach())

    inputs = [vectors, candidates, *([raw] if normals else [])]
    expected = torch.autograd.grad(scores, inputs, slopes)
    of_queries, of_candidates = similarity.gradients(queries.detach(), candidates.detach(), scores.detach(), slopes)
    found = [of_queries.vectors_SCD, of_candidates]
    if normals:
        found += torch.autograd.grad(F.normalize(raw, dim=-1), raw, of_queries.normals_SCD)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_the_losses_derivatives_are_autograds() -> None:
    torch.manual_seed(1)
    scores = torch.randn(2, 3, 8, dtype=torch.float64, requires_grad=True)
    known = torch.tensor([0, 5, 9, 40, 41, 42, 43, 44, 45, 46, 47])  # all of the last triple's are known
    margin, temperature = 2.0, 0.7
    counted = torch.ones(48, dtype=torch.bool)
    counted[known] = False
    counted = counted.view(2, 3, 8)
    weights = torch.softmax((temperature * scores.detach()).masked_fill(~counted, -torch.inf), -1).nan_to_num()
    (expected,) = torch.autograd.grad(-(weights * F.logsigmoid(-scores - margin)).sum(), scores)
    shares, slopes = loss.of_negatives(scores.detach(), known, margin, temperature)
    torch.testing.assert_close(shares, weights)
    torch.testing.assert_close(slopes, expected)
    sums = -(weights * F.logsigmoid(-scores.detach() - margin)).sum(-1)
    torch.testing.assert_close(loss.summed(scores.detach(), shares, margin), sums)
    assert expected[1, 2].abs().sum() == 0

    positives = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    losses = -F.logsigmoid(margin + positives)
    (slopes,) = torch.autograd.grad(losses.sum(), positives)
    for one, other in zip(loss.of_positives(positives.detach(), margin), (losses, slopes), strict=True):
        torch.testing.assert_close(one, other)


def test_rows_named_twice_are_summed() -> None:
    rows = np.array([7, 3, 7, 900_000_000_000, 3, 7])
    distinct = distinct_rows(rows)
    assert distinct.rows_U.tolist() == [3, 7, 900_000_000_000]
    assert distinct.rows_U[distinct.places_N].tolist() == rows.tolist()
    gradients = torch.arange(12.0).view(6, 2)
    expected = torch.zeros(3, 2).index_add_(0, distinct.places_N, gradients)
    torch.testing.assert_close(distinct.summed(gradients), expected)


def plain_loss(training: GraphTraining, batch: TripleBatch, tables: dict[str, Tensor]) -> Tensor:
    """The batch's loss, one triple and one negative at a time."""
    model, config = training.model, training.config
    total = torch.zeros((), dtype=torch.float64)
    for chunk, size in enumerate(batch.sizes):
        for head, relation, tail in batch.triples[chunk, :size].tolist():
            rows = {name: tables[name][relation][None, None] for name in model.widths if name != ENTITIES}

            def score(one: int, other: int) -> Tensor:
                return model.scores(tables[ENTITIES][one][None, None], rows, tables[ENTITIES][other][None, None])  # noqa: B023

            total = total - 2 * F.logsigmoid(config.margin + score(head, tail))[0, 0]
            for side in SIDES:
                pairs = [(other, tail) if side == "head" else (head, other) for other in batch.negatives[side][chunk]]
                true = {(h, t) for h, r, t in training.batches.known.triples.tolist() if r == relation}
                scores = torch.stack([score(*pair) for pair in pairs if pair not in true]).flatten()
                weights = torch.softmax(config.adversarial_temperature * scores.detach(), 0)
                total = total - (weights * F.logsigmoid(-scores - config.margin)).sum()
    return total


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_follows_the_gradient_of_the_loss(kind: str) -> None:
    training = training_of(kind, batch_size=100, negatives=6)
    batch = next(
        TripleBatches(
            known_triples(), settings(batch_size=20, chunk=8, negatives=6, one_relation=training.model.one_relation)
        ).epoch(0)
    )
    tables = {name: table.detach().clone().requires_grad_() for name, table in training.tables.items()}
    plain_loss(training, batch, tables).backward()
    read = training._read(batch)
    training._backward(batch, read)
    for name, rows in read.items():
        whole = torch.zeros_like(tables[name]).index_copy_(0, rows.distinct.rows_U, rows.gradient())
        torch.testing.assert_close(whole, tables[name].grad, atol=1e-7, rtol=1e-6)


# --- batches and masks ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("one_relation", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_known_positives_are_masked_and_nothing_else(seed: int, one_relation: bool) -> None:
    known = known_triples(seed)
    true = set(map(tuple, known.triples.tolist()))
    for batch in TripleBatches(known, settings(seed=seed, one_relation=one_relation)).epoch(1):
        num_chunks, size, _ = batch.triples.shape
        for side in SIDES:
            masked = np.zeros(num_chunks * size * batch.negatives[side].shape[1], dtype=bool)
            masked[batch.known[side]] = True
            masked = masked.reshape(num_chunks, size, -1)
            for chunk, place, number in np.ndindex(*masked.shape):
                triple = batch.triples[chunk, place].copy()
                triple[HEAD if side == "head" else TAIL] = batch.negatives[side][chunk, number]
                assert masked[chunk, place, number] == (tuple(triple.tolist()) in true)


def test_no_mask_where_nothing_is_known() -> None:
    known = KnownTriples(np.array([[0, 0, 1]]), num_entities=4, num_relations=1)
    assert known_places(known, np.array([[[0, 0, 1]]]), np.array([[2, 3]]), "tail").tolist() == []
    assert known_places(known, np.array([[[0, 0, 1]]]), np.array([[2, 1, 1]]), "tail").tolist() == [1, 2]


@pytest.mark.parametrize("one_relation", [False, True])
@pytest.mark.parametrize("block_rows", [1 << 20, 130])
def test_an_epoch_has_every_triple_once_and_its_order_is_its_own(one_relation: bool, block_rows: int) -> None:
    known = known_triples()
    orders = []
    for epoch in (0, 1, 0):
        batches = TripleBatches(known, settings(one_relation=one_relation, block_rows=block_rows))
        read = list(batches.epoch(epoch))
        assert len(read) == batches.num_steps
        triples = np.concatenate([b.triples[n, :size] for b in read for n, size in enumerate(b.sizes)])
        np.testing.assert_array_equal(np.unique(triples, axis=0), known.triples)
        assert len(triples) == len(known.triples)
        orders.append(triples.tolist())
    assert orders[0] == orders[2]
    assert orders[0] != orders[1]


def test_chunks_of_one_relation() -> None:
    for batch in TripleBatches(known_triples(), settings(one_relation=True)).epoch(0):
        for chunk, size in zip(batch.triples, batch.sizes, strict=True):
            assert 1 <= size <= 16
            assert len(np.unique(chunk[:, RELATION])) == 1
    firsts, sizes = chunk_bounds(np.array([[0, 1, 0]] * 5 + [[0, 3, 0]] * 2), 2, one_relation=True)
    assert (firsts.tolist(), sizes.tolist()) == ([0, 2, 4, 5], [2, 2, 1, 2])


@pytest.mark.parametrize("world_size", [2, 3])
def test_processes_share_a_batch_out(world_size: int) -> None:
    whole = next(TripleBatches(known_triples(), settings()).epoch(4))
    parts = [
        next(TripleBatches(known_triples(), settings(), rank=rank, world_size=world_size).epoch(4))
        for rank in range(world_size)
    ]
    np.testing.assert_array_equal(np.concatenate([part.sizes for part in parts]), whole.sizes)
    np.testing.assert_array_equal(np.concatenate([part.triples for part in parts]), whole.triples)
    for side in SIDES:
        np.testing.assert_array_equal(np.concatenate([part.negatives[side] for part in parts]), whole.negatives[side])
    assert {part.global_size for part in parts} == {whole.global_size}


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_training_lowers_the_loss_and_keeps_what_the_paper_keeps(kind: str) -> None:
    training = training_of(kind, epochs=8)
    losses = []
    for epoch in range(8):
        training.progress.epoch, training.progress.step, training.progress.loss_sum = epoch, 0, 0.0
        for batch in training.batches.epoch(epoch):
            training.step(batch)
        losses.append(training.progress.loss_sum)
    assert losses[-1] < losses[0]
    if kind == "transh":
        torch.testing.assert_close(training.tables["normals"].norm(dim=1).detach(), torch.ones(4).double())
    if kind == "transr":
        assert training.tables[ENTITIES].norm(dim=1).max() <= 1 + 1e-9


def test_a_step_leaves_rows_outside_its_batch_alone() -> None:
    training = training_of("transe")
    before = {name: table.detach().clone() for name, table in training.tables.items()}
    batch = next(TripleBatches(known_triples(), settings(batch_size=4, negatives=4)).epoch(0))
    training.step(batch)
    touched = set(batch.entities().tolist())
    changed = (training.tables[ENTITIES] != before[ENTITIES]).any(1).nonzero().flatten().tolist()
    assert set(changed) <= touched
    assert changed
    assert training.sums[ENTITIES].count_nonzero() <= len(touched)


@pytest.mark.parametrize("kind", ["transe", "transr"])
def test_a_restored_run_goes_on_bit_for_bit(kind: str) -> None:
    whole, first = training_of(kind), training_of(kind)
    for batch in itertools.islice(whole.batches.epoch(0), 5):
        whole.step(batch)
    for batch in itertools.islice(first.batches.epoch(0), 2):
        first.step(batch)
    second = training_of(kind, seed=9)  # other weights, all replaced
    second.restore(first.state())
    for batch in itertools.islice(second.batches.epoch(0, first_step=2), 3):
        second.step(batch)
    for name, table in whole.tables.items():
        assert torch.equal(second.tables[name], table)
        assert torch.equal(second.sums[name], whole.sums[name])
