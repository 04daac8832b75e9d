"""Scores and ranks beside pykeen's, on the same weights, in float64."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from trainer.arrays import IntArray
from trainer.config.features import GraphModelConfig
from trainer.knowledge_graph.base import ENTITIES, RELATIONS, GraphModel
from trainer.knowledge_graph.models import build_graph_model
from trainer.knowledge_graph.ranking import filtered_ranks
from trainer.knowledge_graph.transh import NORMALS
from trainer.knowledge_graph.transr import PROJECTIONS
from trainer.knowledge_graph.triples import SIDES, KnownTriples

peer = pytest.importorskip("pykeen")
models = pytest.importorskip("pykeen.models")
Kind = tuple[str, int]
KINDS: list[Kind] = [
    ("transe", 1),
    ("transe", 2),
    ("transh", 2),
    ("transr", 2),
    ("distmult", 2),
    ("complex", 2),
    ("rotate", 2),
]
WIDTH = 12


class Pair(NamedTuple):
    """The same weights in both."""

    ours: GraphModel
    tables: Mapping[str, Tensor]
    theirs: Any


def pair_of(kind: Kind, factory: Any) -> Pair:
    name, norm = kind
    torch.manual_seed(3)
    options: dict[str, Any] = {"triples_factory": factory, "embedding_dim": WIDTH, "random_seed": 1}
    match name:
        case "transe":
            theirs = models.TransE(scoring_fct_norm=norm, **options)
        case "transh":
            theirs = models.TransH(scoring_fct_norm=norm, **options)
        case "transr":
            theirs = models.TransR(scoring_fct_norm=norm, relation_dim=WIDTH, **options)
        case "distmult":
            theirs = models.DistMult(**options)
        case "complex":
            theirs = models.ComplEx(**options)
        case _:
            theirs = models.RotatE(**options)
    theirs = theirs.double().eval()
    entities = theirs.entity_representations[0]._embeddings.weight
    with torch.no_grad():
        entities.copy_(torch.randn_like(entities))
        by_relation = [each._embeddings.weight for each in theirs.relation_representations]
        for weight in by_relation:
            weight.copy_(torch.randn_like(weight))
        if name == "transr":  # so that some projections are shortened and some are not
            by_relation[1].div_(10)
        tables = {ENTITIES: entities.clone()}
        if name == "transh":  # pykeen's interaction takes the normal first
            by_relation[0].copy_(torch.nn.functional.normalize(by_relation[0]))
            tables |= {NORMALS: by_relation[0].clone(), RELATIONS: by_relation[1].clone()}
        elif name == "transr":
            tables |= {RELATIONS: by_relation[0].clone(), PROJECTIONS: by_relation[1].clone()}
        elif name == "rotate":
            angles = torch.randn(factory.num_relations, WIDTH, dtype=torch.float64)
            by_relation[0].copy_(torch.view_as_real(torch.polar(torch.ones_like(angles), angles)).flatten(1))
            tables |= {RELATIONS: angles}
        else:
            tables |= {RELATIONS: by_relation[0].clone()}
    for table in {"complex": (ENTITIES, RELATIONS), "rotate": (ENTITIES,)}.get(name, ()):
        pairs = tables[table].view(-1, WIDTH, 2)  # pykeen's real and imaginary parts alternate
        tables[table] = torch.cat([pairs[..., 0], pairs[..., 1]], dim=-1)
    return Pair(build_graph_model(GraphModelConfig(kind=name, width=WIDTH, norm=norm)), tables, theirs)  # type: ignore


def our_scores(pair: Pair, triples: IntArray) -> Tensor:
    """One chunk a triple, so that every model has one relation in a chunk."""
    heads, relations, tails = torch.from_numpy(triples).T
    rows = {name: pair.tables[name][relations][:, None] for name in pair.ours.widths if name != ENTITIES}
    return pair.ours.scores(pair.tables[ENTITIES][heads][:, None], rows, pair.tables[ENTITIES][tails][:, None])[:, 0]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: f"{kind[0]}-{kind[1]}")
def test_scores_are_the_peers(kind: Kind) -> None:
    factory = pytest.importorskip("pykeen.datasets").Nations().training
    pair = pair_of(kind, factory)
    triples = factory.mapped_triples
    with torch.no_grad():
        theirs = pair.theirs.score_hrt(triples)[:, 0]
    torch.testing.assert_close(our_scores(pair, triples.numpy()), theirs, atol=1e-9, rtol=0)


@pytest.mark.parametrize("name", ["Nations", "Kinships", "UMLS"])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: f"{kind[0]}-{kind[1]}")
def test_filtered_ranks_are_the_peers(kind: Kind, name: str) -> None:
    data = getattr(pytest.importorskip("pykeen.datasets"), name)()
    evaluation = pytest.importorskip("pykeen.evaluation")
    pair = pair_of(kind, data.training)
    train, valid, test = (part.mapped_triples for part in (data.training, data.validation, data.testing))
    evaluator = evaluation.RankBasedEvaluator(filtered=True, clear_on_finalize=False)
    result = evaluator.evaluate(
        pair.theirs, test, batch_size=256, use_tqdm=False, additional_filter_triples=[train, valid]
    )
    known = KnownTriples(
        torch.cat([train, valid, test]).numpy(), num_entities=data.num_entities, num_relations=data.num_relations
    )
    ranks = filtered_ranks(pair.ours, pair.tables, test.numpy(), known)
    for side in SIDES:
        theirs = np.concatenate(evaluator.ranks[side, "realistic"]).astype(np.float64)
        np.testing.assert_array_equal(ranks.realistic(side), theirs)
        for relation, of_side, metrics in ranks.by_relation():
            if of_side == side:
                of_it = test[:, 1].numpy() == relation
                assert metrics["MRR"] == pytest.approx((1 / theirs[of_it]).mean(), abs=1e-12)
    metrics = ranks.metrics()
    assert metrics["MRR"] == pytest.approx(result.get_metric("both.realistic.inverse_harmonic_mean_rank"), abs=1e-6)
    assert metrics["Hits@10"] == pytest.approx(result.get_metric("both.realistic.hits_at_10"), abs=1e-6)
