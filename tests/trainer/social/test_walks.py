"""Walks against the paper's transition probabilities, and skip-gram against a loop of the paper's loss."""

import numpy as np
import pytest
import scipy.sparse as sp
import torch

from trainer.config import Node2VecConfig
from trainer.social.skip_gram import node2vec, pairs_of
from trainer.social.walks import walks

WEIGHTS = np.zeros((6, 6), np.float32)
for a, b, weight in ((0, 1, 1), (0, 2, 2), (1, 2, 1), (2, 3, 3), (3, 4, 1), (2, 4, 1)):  # node 5 has no neighbour
    WEIGHTS[a, b] = WEIGHTS[b, a] = weight


@pytest.mark.parametrize(("p", "q"), [(1.0, 1.0), (4.0, 0.25), (0.25, 4.0)])
def test_steps_have_the_probabilities_of_the_paper(p: float, q: float) -> None:
    starts = np.tile(np.arange(5), 40_000)
    walked = walks(sp.csr_array(WEIGHTS), starts, 3, np.random.default_rng(0), p=p, q=q)
    for before in range(5):
        first = walked[walked[:, 0] == before]
        found = np.bincount(first[:, 1], minlength=6) / len(first)
        np.testing.assert_allclose(found, WEIGHTS[before] / WEIGHTS[before].sum(), atol=0.01)
        for here in np.flatnonzero(WEIGHTS[before]):
            bias = np.array([1 / p if x == before else 1 if WEIGHTS[before, x] else 1 / q for x in range(6)])
            expected = WEIGHTS[here] * bias
            of_pair = first[first[:, 1] == here][:, 2]
            found = np.bincount(of_pair, minlength=6) / len(of_pair)
            np.testing.assert_allclose(found, expected / expected.sum(), atol=4 / np.sqrt(len(of_pair)))


def test_a_walk_ends_where_no_way_leads_on() -> None:
    one_way = sp.csr_array(np.array([[0, 1, 0], [0, 0, 1], [0, 0, 0]], np.float32))
    walked = walks(one_way, np.array([0, 2]), 4, np.random.default_rng(0), p=2.0)
    assert walked.tolist() == [[0, 1, 2, -1], [2, -1, -1, -1]]


def test_pairs_are_all_within_the_window_both_ways() -> None:
    pairs = pairs_of(np.array([[0, 1, 2, 3], [4, 0, -1, -1]]), 2, np.random.default_rng(0))
    expected = [(0, 1), (1, 2), (2, 3), (0, 2), (1, 3), (4, 0)]
    assert sorted(map(tuple, pairs.tolist())) == sorted(expected + [(b, a) for a, b in expected])


def test_two_circles_of_friends_lie_apart_and_a_seed_decides_all() -> None:
    size = 12
    circles = np.zeros((2 * size + 1, 2 * size + 1), np.float32)
    circles[:size, :size] = circles[size:-1, size:-1] = 1
    circles[0, size] = circles[size, 0] = 1
    np.fill_diagonal(circles, 0)
    config = Node2VecConfig(width=8, walks=5, length=10, window=2, epochs=20, batch_size=256)
    vectors, losses = node2vec(sp.csr_array(circles), config)
    assert losses[-1] < losses[0]
    assert not vectors[-1].any()  # the one who knows nobody
    cosine = torch.nn.functional.cosine_similarity(vectors[:-1, None], vectors[None, :-1], dim=2)
    inside, outside = cosine[:size, :size].mean(), cosine[:size, size:].mean()
    assert inside > outside + 0.5
    again, _ = node2vec(sp.csr_array(circles), config)
    assert torch.equal(vectors, again)
    other, _ = node2vec(sp.csr_array(circles), Node2VecConfig(**{**config.model_dump(), "seed": 1}))
    assert not torch.equal(vectors, other)
