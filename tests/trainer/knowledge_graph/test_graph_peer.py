"""Scores and ranks beside pykeen's, on the same weights, in float64."""

import numpy as np
import pytest
import torch

from tests.fixtures.peer_graphs import DATA_SETS, KINDS, Kind, both_ranks, both_scores, pair_of
from trainer.knowledge_graph.triples import RELATION, SIDES

pytest.importorskip("pykeen")


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: f"{kind[0]}-{kind[1]}")
def test_scores_are_the_peers(kind: Kind) -> None:
    from pykeen.datasets import Nations

    factory = Nations().training
    ours, theirs = both_scores(pair_of(kind, factory), factory.mapped_triples)
    torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=0)


@pytest.mark.parametrize("name", DATA_SETS)
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: f"{kind[0]}-{kind[1]}")
def test_filtered_ranks_are_the_peers(kind: Kind, name: str) -> None:
    from pykeen import datasets

    data = getattr(datasets, name)()
    ranks, theirs, result = both_ranks(pair_of(kind, data.training), data)
    for side in SIDES:
        np.testing.assert_array_equal(ranks.realistic(side), theirs[side])
    for relation, side, metrics in ranks.by_relation():
        of_it = ranks.triples[:, RELATION] == relation
        assert metrics["MRR"] == pytest.approx((1 / theirs[side][of_it]).mean(), abs=1e-12)
    metrics = ranks.metrics()
    assert metrics["MRR"] == pytest.approx(result.get_metric("both.realistic.inverse_harmonic_mean_rank"), abs=1e-6)
    assert metrics["Hits@10"] == pytest.approx(result.get_metric("both.realistic.hits_at_10"), abs=1e-6)


@pytest.mark.parametrize("name", ["distmult", "complex"])
def test_ties_are_the_peers(name: str) -> None:
    """Half of the entities are copies of the others. Products of small integers, unlike distances, are exact."""
    from pykeen.datasets import Nations

    data = Nations()
    pair = pair_of((name, 2), data.training)
    half = data.num_entities // 2
    with torch.no_grad():
        for table in pair.tables.values():
            table.round_()
        for one in (pair.theirs.entity_representations[0], *pair.theirs.relation_representations):
            one._embeddings.weight.round_()
        pair.tables["entities"][half : 2 * half] = pair.tables["entities"][:half]
        entities = pair.theirs.entity_representations[0]._embeddings.weight
        entities[half : 2 * half] = entities[:half]
    ranks, theirs, _ = both_ranks(pair, data)
    for side in SIDES:
        assert (ranks.best[side] < ranks.worst[side]).any()
        np.testing.assert_array_equal(ranks.realistic(side), theirs[side])
