"""Ranks counted by hand, ties, filters, and splits."""

import numpy as np
import pytest
import torch

from trainer.config.graph import GraphModelConfig
from trainer.knowledge_graph.base import ENTITIES, RELATIONS
from trainer.knowledge_graph.models import build_graph_model
from trainer.knowledge_graph.ranking import NonFiniteScores, Ranks, filtered_ranks
from trainer.knowledge_graph.triples import KnownTriples, distinct, split_triples, with_inverses


def ranks_of(entities: list[list[float]], triples: list[list[int]], known: list[list[int]]) -> Ranks:
    """By DistMult with one relation that changes nothing: a triple's score is head · tail, exactly."""
    model = build_graph_model(GraphModelConfig(kind="distmult", width=len(entities[0])))
    tables = {ENTITIES: torch.tensor(entities).double(), RELATIONS: torch.ones(1, len(entities[0])).double()}
    index = KnownTriples(np.array(known), num_entities=len(entities), num_relations=1)
    return filtered_ranks(model, tables, np.array(triples), index)


def test_an_answer_ranks_behind_what_scores_higher() -> None:
    ranks = ranks_of([[1.0], [2.0], [3.0], [5.0]], [[0, 0, 1]], [[0, 0, 1]])
    assert ranks.realistic("tail").tolist() == [3.0]  # behind 3 and 5
    assert ranks.realistic("head").tolist() == [4.0]


def test_ties_count_half() -> None:
    ranks = ranks_of([[1.0], [2.0], [2.0], [2.0], [3.0]], [[0, 0, 1]], [[0, 0, 1]])
    assert (ranks.best["tail"].tolist(), ranks.worst["tail"].tolist()) == ([2], [4])
    assert ranks.realistic("tail").tolist() == [3.0]


def test_a_constant_scorer_has_the_mean_rank() -> None:
    """Its MRR is 2 / (n + 1); a scorer that counts ties in its favour would have 1."""
    count = 9
    ranks = ranks_of([[0.0]] * count, [[0, 0, 1], [3, 0, 4]], [[0, 0, 1], [3, 0, 4]])
    assert ranks.metrics()["MRR"] == pytest.approx(2 / (count + 1))


def test_other_known_answers_are_left_out_and_the_answer_itself_is_not() -> None:
    entities = [[1.0], [2.0], [3.0], [5.0]]
    known = [[0, 0, 1], [0, 0, 3], [2, 0, 1]]
    ranks = ranks_of(entities, [[0, 0, 1]], known)
    assert ranks.realistic("tail").tolist() == [2.0]  # 5 is another answer, 3 is not
    assert ranks.realistic("head").tolist() == [3.0]  # of (?, 0, 1): 3 is another answer; 5 and 2 are not


def test_scores_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(NonFiniteScores, match="expected scores that are numbers"):
        ranks_of([[float("nan")], [1.0]], [[0, 0, 1]], [[0, 0, 1]])


def test_ranks_by_relation_and_side() -> None:
    ranks = Ranks(
        np.array([[0, 7, 1], [1, 2, 0], [2, 7, 0]]),
        best={"head": np.array([1, 5, 3]), "tail": np.array([2, 2, 4])},
        worst={"head": np.array([1, 5, 3]), "tail": np.array([2, 4, 4])},
    )
    found = {(relation, side): metrics for relation, side, metrics in ranks.by_relation()}
    assert found.keys() == {(2, "head"), (2, "tail"), (7, "head"), (7, "tail")}
    assert found[7, "head"]["MRR"] == pytest.approx((1 + 1 / 3) / 2)
    assert found[7, "head"]["Hits@1"] == 0.5
    assert found[7, "tail"]["MRR"] == pytest.approx((1 / 2 + 1 / 4) / 2)
    assert found[2, "tail"]["mean rank"] == 3.0
    assert found[2, "tail"]["triples"] == 1


def random_triples(count: int, seed: int = 0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return generator.integers(0, [40, 3, 40], size=(count, 3))


def test_a_split_drops_repetitions_before_it_holds_anything_out() -> None:
    triples = np.concatenate([random_triples(800), random_triples(800)])
    split = split_triples(triples, validation=0.2, test=0.2, seed=1)
    parts = [set(map(tuple, part.tolist())) for part in (split.train, split.validation, split.test)]
    assert sum(map(len, parts)) == len(split.all) == len(set(map(tuple, triples.tolist())))
    assert not parts[0] & parts[2]
    assert 0.15 < len(split.test) / len(split.all) < 0.25


def test_no_held_out_triple_is_in_training_the_other_way_round() -> None:
    triples = random_triples(2_000)
    both = np.concatenate([triples, triples[:, [2, 1, 0]]])  # every triple's reverse is there too
    split = split_triples(both, validation=0.2, test=0.2, seed=1)
    reverse = {(tail, relation, head) for head, relation, tail in split.test.tolist()}
    assert len(split.test)
    assert not reverse & set(map(tuple, split.train.tolist()))


def test_inverses_are_added_after_the_split_and_to_training_only() -> None:
    split = split_triples(random_triples(500), validation=0.1, test=0.3, seed=2)
    added = with_inverses(split, num_relations=3)
    assert len(added.train) == 2 * len(split.train)
    inverse = added.train[len(split.train) :]
    np.testing.assert_array_equal(inverse[:, [2, 0]], split.train[:, [0, 2]])
    assert inverse[:, 1].min() >= 3
    inverted = {(tail, relation - 3, head) for head, relation, tail in inverse.tolist()}
    assert not inverted & set(map(tuple, split.test.tolist()))
    np.testing.assert_array_equal(added.test, split.test)


def test_repetitions_keep_the_first_place() -> None:
    triples = np.array([[2, 0, 1], [0, 0, 1], [2, 0, 1], [0, 1, 1]])
    assert distinct(triples).tolist() == [[2, 0, 1], [0, 0, 1], [0, 1, 1]]
