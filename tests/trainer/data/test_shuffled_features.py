"""Shuffled features: the same ones, of items that are as popular, and never an item's own."""

import itertools

import numpy as np
import pytest

from trainer.data.shuffled_features import GROUPS, Shuffle


def case(seed, size=400):
    """A third has none, an eighth of all is never taken."""
    random = np.random.default_rng(seed)
    has_V, interactions_V = random.random(size) < 2 / 3, random.zipf(1.5, size).clip(max=5_000)
    interactions_V[random.random(size) < 1 / 8] = 0
    return has_V, interactions_V


@pytest.mark.parametrize("seed", range(4))
def test_only_items_that_have_features_exchange_them_and_none_keeps_its_own(seed):
    has_V, interactions_V = case(seed)
    rows_V = Shuffle(interactions_V, seed).rows(has_V)
    assert sorted(rows_V.tolist()) == list(range(len(has_V)))
    assert (rows_V[~has_V] == np.flatnonzero(~has_V)).all()
    assert (rows_V[has_V] != np.flatnonzero(has_V)).all()
    assert has_V[rows_V[has_V]].all()


@pytest.mark.parametrize("seed", range(4))
def test_they_come_from_the_same_decile_of_popularity(seed):
    has_V, interactions_V = case(seed)
    rows_V = Shuffle(interactions_V, seed).rows(has_V)
    assert ((interactions_V == 0) == (interactions_V[rows_V] == 0))[has_V].all()
    taken = np.sort(interactions_V[has_V & (interactions_V > 0)])
    bounds = [part[0] for part in np.array_split(taken, GROUPS)] + [taken[-1]]
    ranges = list(itertools.pairwise(bounds))
    for own, given in zip(interactions_V[has_V], interactions_V[rows_V[has_V]], strict=True):
        assert own == given == 0 or any(low <= own <= high and low <= given <= high for low, high in ranges)


def test_a_seed_decides_and_other_seeds_exchange_otherwise():
    has_V, interactions_V = case(0)
    first, again, other = (Shuffle(interactions_V, seed).rows(has_V) for seed in (1, 1, 2))
    assert (first == again).all()
    assert np.mean(first[has_V] == other[has_V]) < 0.2


@pytest.mark.parametrize("count", [0, 1, 2, 3, 19])
def test_few_items_are_in_fewer_groups(count):
    has_V = np.arange(25) < count
    rows_V = Shuffle(np.arange(25) + 1, 0).rows(has_V)
    moved = rows_V != np.arange(25)
    assert moved.sum() == (count if count > 1 else 0)
