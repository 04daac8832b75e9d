"""Ranks and metrics against fractions made by hand, a literal list-building reference, and ranx."""

import itertools
import math

import numpy as np
import pytest
import torch

from tests.fixtures.dense import rank_targets, rank_targets_among
from trainer.evaluation import ranking_metrics as metrics_module
from trainer.evaluation.ranking_metrics import KS, MISSED, PADDED, means, metrics_from_ranks


def log2(x):
    return math.log2(x)


def ragged(rng, num_users, num_items, most):
    """Distinct targets per user, 1 to `most` of them, padded by -1 in random places."""
    targets = np.full((num_users, most), -1)
    for row in targets:
        count = rng.integers(1, most + 1)
        row[rng.permutation(most)[:count]] = rng.permutation(num_items)[:count]
    return torch.from_numpy(targets)


def listed(scores, targets, candidates):
    """One user's candidates as a list, best first, a target after everything that ties with it."""
    order = [v for v in range(len(scores)) if candidates[v]]
    return sorted(order, key=lambda v: (-scores[v], v in targets, targets.index(v) if v in targets else 0))


# --- ranks ---------------------------------------------------------------------------------------------------------


def test_rank_targets_counts_what_is_above():
    scores = torch.tensor([[0.1, 0.9, 0.5, 0.7, 0.3]])
    assert rank_targets(scores, torch.tensor([[1, 4, -1, 2]])).tolist() == [[1, 4, PADDED, 3]]


def test_rank_targets_of_a_constant_scorer_come_last():
    scores = torch.zeros(1, 100)
    assert rank_targets(scores, torch.tensor([[3, 60, 0]])).tolist() == [[98, 99, 100]]


def test_rank_targets_with_a_tie_puts_the_other_item_first():
    scores = torch.tensor([[0.5, 0.5, 0.2, 0.5]])
    assert rank_targets(scores, torch.tensor([[0], [1], [3]]).T[:, :1]).tolist() == [[3]]
    assert rank_targets(scores, torch.tensor([[1, 3]])).tolist() == [[2, 3]], "tied targets share places 2 and 3"


@pytest.mark.parametrize("broken", [float("nan"), float("-inf")])
def test_rank_targets_of_a_broken_score_are_last(broken):
    scores = torch.tensor([[broken, 0.3, 0.2, 0.1]])
    assert rank_targets(scores, torch.tensor([[0, 3]])).tolist() == [[4, 3]]


def test_rank_targets_puts_a_competitor_without_a_number_above():
    scores = torch.tensor([[float("nan"), 9.0, 1.0]])
    assert rank_targets(scores, torch.tensor([[1]])).tolist() == [[2]]


def test_rank_targets_among_all_nan_scores_never_hit():
    scores = torch.full((4, 50), float("nan"))
    metrics = metrics_from_ranks(rank_targets(scores, torch.arange(12).reshape(4, 3)))
    assert means(metrics)["Recall@10"] == 0


def test_rank_targets_leaves_non_candidates_out():
    scores = torch.tensor([[5.0, 4.0, 3.0, 2.0, 1.0]])
    candidates = torch.tensor([[False, True, False, True, True]])
    assert rank_targets(scores, torch.tensor([[3, 4]]), candidates).tolist() == [[2, 3]]
    assert rank_targets(scores, torch.tensor([[3, 4]]), candidates[0]).tolist() == [[2, 3]], "one mask for all users"


def test_rank_targets_that_are_no_candidates_are_missed():
    scores = torch.tensor([[5.0, 4.0, 3.0]])
    ranks = rank_targets(scores, torch.tensor([[0, 1]]), torch.tensor([[False, True, True]]))
    assert ranks.tolist() == [[MISSED, 1]]
    metrics = metrics_from_ranks(ranks)
    assert metrics["Recall@10"].tolist() == [1 / 2]
    assert metrics["MRR"].tolist() == [1.0]


def test_rank_targets_counts_a_repeated_item_once():
    scores = torch.tensor([[5.0, 4.0, 3.0]])
    ranks = rank_targets(scores, torch.tensor([[1, 1, 2]]))
    assert ranks.tolist() == [[2, PADDED, 3]]


def test_rank_targets_changes_none_of_its_arguments():
    scores, targets, candidates = torch.randn(3, 9), torch.tensor([[0, 2], [1, -1], [8, 0]]), torch.ones(3, 9).bool()
    before = scores.clone(), targets.clone(), candidates.clone()
    rank_targets(scores, targets, candidates)
    assert all(torch.equal(a, b) for a, b in zip(before, (scores, targets, candidates), strict=True))


def test_rank_targets_among_ranks_against_the_negatives_only():
    scores = torch.tensor([[9.0, 8.0, 7.0, 6.0, 5.0, 4.0]])
    ranks = rank_targets_among(scores, torch.tensor([[3, 5]]), torch.tensor([[1, 4, -1]]))
    assert ranks.tolist() == [[2, 4]]


def test_rank_targets_among_leaves_out_a_negative_that_is_held_out():
    scores = torch.tensor([[9.0, 8.0, 7.0]])
    assert rank_targets_among(scores, torch.tensor([[2, 0]]), torch.tensor([[0, 1, 2]])).tolist() == [[3, 1]]


@pytest.mark.parametrize("distinct_scores", [2, 7, 10_000])
@pytest.mark.parametrize(("num_items", "most"), [(4, 3), (30, 1), (101, 5)])
def test_ranks_equal_places_in_a_written_out_list(num_items, most, distinct_scores):
    rng = np.random.default_rng(num_items * distinct_scores)
    scores = torch.from_numpy(rng.integers(0, distinct_scores, (40, num_items)).astype(np.float32))
    targets = ragged(rng, 40, num_items, most)
    candidates = torch.from_numpy(rng.random((40, num_items)) < 0.7)
    candidates.scatter_(1, targets.clamp(min=0), True)  # also row 0 where padded: that must not matter
    ranks = rank_targets(scores, targets, candidates)
    for user in range(40):
        wanted = [t for t in targets[user].tolist() if t >= 0]
        order = listed(scores[user].tolist(), wanted, candidates[user].tolist())
        expected = [order.index(t) + 1 if t >= 0 else PADDED for t in targets[user].tolist()]
        assert ranks[user].tolist() == expected


@pytest.mark.parametrize("distinct_scores", [3, 10_000])
def test_sampled_ranks_equal_full_ranks_over_the_same_candidates(distinct_scores):
    rng = np.random.default_rng(distinct_scores)
    scores = torch.from_numpy(rng.integers(0, distinct_scores, (50, 300)).astype(np.float32))
    targets = ragged(rng, 50, 300, 3)
    negatives = torch.from_numpy(np.stack([rng.permutation(300)[:100] for _ in range(50)]))
    negatives[rng.random((50, 100)) < 0.1] = -1
    candidates = torch.zeros(50, 301, dtype=torch.bool)
    for chosen in (targets, negatives):
        candidates.scatter_(1, torch.where(chosen < 0, 300, chosen), True)
    assert torch.equal(
        rank_targets_among(scores, targets, negatives), rank_targets(scores, targets, candidates[:, :300])
    )


# --- metrics, by hand ----------------------------------------------------------------------------------------------


def test_metrics_of_several_held_out_items_in_one_list_by_hand():
    metrics = metrics_from_ranks(torch.tensor([[3, 1, 12], [7, PADDED, 2]]))
    ideal_3 = 1 + 1 / log2(3) + 1 / 2
    ideal_2 = 1 + 1 / log2(3)
    expected = {
        "NDCG@1": [1 / 1, 0],
        "NDCG@5": [(1 + 1 / 2) / ideal_3, (1 / log2(3)) / ideal_2],
        "NDCG@10": [(1 + 1 / 2) / ideal_3, (1 / log2(3) + 1 / 3) / ideal_2],
        "Recall@1": [1 / 1, 0],
        "Recall@5": [2 / 3, 1 / 2],
        "Recall@10": [2 / 3, 2 / 2],
        "MRR": [1 / 1, 1 / 2],
    }
    assert metrics.keys() == expected.keys()
    for name, values in expected.items():
        assert metrics[name].dtype == np.float64
        np.testing.assert_allclose(metrics[name], values, rtol=1e-12, err_msg=name)
    assert means(metrics)["Recall@5"] == pytest.approx(1 / 2 * (2 / 3 + 1 / 2))


def test_metrics_of_one_target_at_a_time_by_hand():
    # Places 1, 3, 12 in one list: alone, without the targets above, places 1, 2 and 10.
    metrics = metrics_from_ranks(torch.tensor([[3, 1, 12], [7, PADDED, 2]]), convention="single")
    expected = {
        "NDCG@1": [1 / 3 * 1, 0],
        "NDCG@5": [1 / 3 * (1 + 1 / log2(3)), 1 / 2 * (1 / log2(3))],
        "NDCG@10": [1 / 3 * (1 + 1 / log2(3) + 1 / log2(11)), 1 / 2 * (1 / log2(3) + 1 / log2(7))],
        "Recall@1": [1 / 3, 0],
        "Recall@5": [2 / 3, 1 / 2],
        "Recall@10": [3 / 3, 2 / 2],
        "MRR": [1 / 3 * (1 + 1 / 2 + 1 / 10), 1 / 2 * (1 / 6 + 1 / 2)],
    }
    for name, values in expected.items():
        np.testing.assert_allclose(metrics[name], values, rtol=1e-12, err_msg=name)


def test_metrics_with_more_held_out_items_than_k_can_reach_one():
    metrics = metrics_from_ranks(torch.arange(1, 13)[None])
    for name, values in metrics.items():
        np.testing.assert_allclose(values, 1, rtol=1e-12, err_msg=name)


def test_many_held_out_items_are_compared_some_users_at_a_time(monkeypatch):
    rng = np.random.default_rng(3)
    targets, scores = ragged(rng, 40, 60, 12), torch.from_numpy(rng.integers(0, 30, (40, 60)) / 30)

    def measured():
        ranks = rank_targets(scores, targets)
        return ranks, metrics_from_ranks(ranks, convention="single")

    whole, expected = measured()
    monkeypatch.setattr(metrics_module, "PAIRS_AT_ONCE", 1_000)  # six users
    ranks, found = measured()
    assert torch.equal(ranks, whole)
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values)


def test_metrics_of_a_user_without_held_out_items_are_left_out_of_the_mean():
    for convention in ("list", "single"):
        metrics = metrics_from_ranks(torch.tensor([[PADDED, PADDED], [1, 2]]), convention=convention)
        assert all(np.isnan(values[0]) for values in metrics.values())
        assert means(metrics)["MRR"] == 1.0
    assert np.isnan(means(metrics_from_ranks(torch.full((2, 2), PADDED)))["MRR"])


# --- metrics, properties -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("convention", ["list", "single"])
@pytest.mark.parametrize("most", [1, 2, 3, 6])
@pytest.mark.parametrize("distinct_scores", [2, 20, 10_000])
def test_metrics_keep_their_bounds_and_order(convention, most, distinct_scores):
    rng = np.random.default_rng(most)
    scores = torch.from_numpy(rng.integers(0, distinct_scores, (200, 40)).astype(np.float32))
    metrics = metrics_from_ranks(rank_targets(scores, ragged(rng, 200, 40, most)), convention=convention)
    for name, values in metrics.items():
        assert ((values >= 0) & (values <= 1 + 1e-12)).all(), name
    np.testing.assert_allclose(metrics["NDCG@1"], metrics["Recall@1"], rtol=1e-12)
    if convention == "single" or most == 1:
        for small, large in itertools.pairwise(KS):
            assert (metrics[f"Recall@{small}"] <= metrics[f"Recall@{large}"]).all()
            assert (metrics[f"NDCG@{small}"] <= metrics[f"NDCG@{large}"]).all()
            assert (metrics[f"NDCG@{large}"] <= metrics[f"Recall@{large}"] + 1e-12).all()


def test_conventions_agree_where_each_user_has_one_target():
    ranks = torch.tensor([[1], [4], [11], [MISSED]])
    lists, singles = metrics_from_ranks(ranks), metrics_from_ranks(ranks, convention="single")
    for name in lists:
        np.testing.assert_allclose(lists[name], singles[name], rtol=1e-12)


def test_metrics_do_not_depend_on_the_order_of_the_targets():
    rng = np.random.default_rng(5)
    scores = torch.from_numpy(rng.integers(0, 5, (100, 30)).astype(np.float32))  # many ties, between targets too
    targets = ragged(rng, 100, 30, 4)
    for convention in ("list", "single"):
        one = metrics_from_ranks(rank_targets(scores, targets), convention=convention)
        other = metrics_from_ranks(rank_targets(scores, targets.flip(1)), convention=convention)
        for name in one:
            np.testing.assert_allclose(one[name], other[name], rtol=1e-12, err_msg=name)


def test_a_higher_target_score_never_lowers_a_metric():
    rng = np.random.default_rng(6)
    scores = torch.from_numpy(rng.integers(0, 9, (100, 30)).astype(np.float32))
    targets = torch.from_numpy(rng.integers(0, 30, (100, 1)))
    raised = scores.scatter_add(1, targets, torch.ones(100, 1))
    before, after = (metrics_from_ranks(rank_targets(s, targets)) for s in (scores, raised))
    assert all((after[name] >= before[name]).all() for name in before)
    assert (after["MRR"] > before["MRR"]).any()


def test_random_scores_hit_as_often_as_chance():
    torch.manual_seed(0)
    scores, targets = torch.rand(20_000, 101), torch.randint(0, 101, (20_000, 1))
    found = means(metrics_from_ranks(rank_targets(scores, targets)))
    assert found["Recall@10"] == pytest.approx(10 / 101, abs=4 * math.sqrt(0.1 * 0.9 / 20_000))
    assert found["MRR"] == pytest.approx(sum(1 / rank for rank in range(1, 102)) / 101, abs=0.005)


# --- an independent implementation ---------------------------------------------------------------------------------


@pytest.mark.parametrize("most", [1, 4])
def test_metrics_agree_with_ranx(most):
    ranx = pytest.importorskip("ranx")
    rng = np.random.default_rng(most)
    num_users, num_items = 300, 60
    scores = np.stack([rng.permutation(num_items) for _ in range(num_users)]).astype(np.float32)  # no ties
    targets = ragged(rng, num_users, num_items, most)
    ours = metrics_from_ranks(rank_targets(torch.from_numpy(scores), targets))
    names = [f"u{user:04d}" for user in range(num_users)]
    relevant = [[int(t) for t in row if t >= 0] for row in targets]
    qrels = ranx.Qrels({name: {f"i{t}": 1 for t in row} for name, row in zip(names, relevant, strict=True)})
    run = ranx.Run(
        {name: {f"i{i}": float(s) for i, s in enumerate(row)} for name, row in zip(names, scores, strict=True)}
    )
    theirs = ranx.evaluate(
        qrels, run, [f"{metric}@{k}" for metric in ("ndcg", "recall") for k in KS] + ["mrr"], return_mean=False
    )
    counts = np.array([len(row) for row in relevant])
    for k in KS:
        np.testing.assert_allclose(ours[f"NDCG@{k}"], theirs[f"ndcg@{k}"], rtol=1e-9)
        # ranx divides the hits by all relevant items; the survey's convention divides by min(k, R).
        np.testing.assert_allclose(
            ours[f"Recall@{k}"] * np.minimum(counts, k) / counts, theirs[f"recall@{k}"], rtol=1e-9
        )
    np.testing.assert_allclose(ours["MRR"], theirs["mrr"], rtol=1e-9)
