"""Overlap of friends' items against sets by hand, and against strangers who are as active."""

import numpy as np
import pyarrow as pa
import pytest

from etl.pipeline.homophily import homophily


def edges(pairs: list[tuple[int, int]]) -> list[pa.RecordBatch]:
    user, friend = zip(*pairs, strict=True)
    both = {"user_index": pa.array(user, pa.int32()), "friend_index": pa.array(friend, pa.int32())}
    return [pa.RecordBatch.from_pydict(both)]


def rows(histories: dict[int, list[int]], held_out: int = 0) -> list[pa.RecordBatch]:
    return [
        pa.RecordBatch.from_pydict(
            {
                "user": pa.array(list(histories), pa.int32()),
                "items": pa.array(list(histories.values()), pa.list_(pa.int32())),
                "valid_start": pa.array([len(items) - held_out for items in histories.values()], pa.int32()),
            }
        )
    ]


def test_overlap_is_jaccard_of_the_training_part_and_an_edge_both_ways_counts_once() -> None:
    histories = {5: [10, 11, 12, 99], 6: [11, 12, 13, 14, 99], 7: [20, 20, 99], 8: [99]}
    found = homophily(edges([(5, 6), (6, 5), (7, 5), (7, 8), (7, 7)]), rows(histories, held_out=1))
    assert found is not None
    assert (found.friendships, found.users, found.pairs) == (3, 4, 2)  # user 8 has nothing but what is held out
    assert found.friends == pytest.approx((2 / 5 + 0 / 4) / 2)
    assert "social: 3 friendships of 4 users" in found.line()


def circles(num_circles: int, *, alike: bool) -> tuple[list[tuple[int, int]], dict[int, list[int]]]:
    """Circles of six friends; each user has 3 to 12 of 20 items: of the circle's own, or of the same 20 for all."""
    random = np.random.default_rng(0)
    pairs, histories = [], {}
    for circle in range(num_circles):
        members = [5 + 6 * circle + place for place in range(6)]
        pairs += [(a, b) for a in members for b in members if a != b]
        for user in members:
            own = random.choice(20, random.integers(3, 13), replace=False)
            histories[user] = (own + 20 * circle * alike).tolist()
    return pairs, histories


def test_friends_who_are_alike_overlap_more_than_strangers_and_others_do_not() -> None:
    pairs, histories = circles(60, alike=True)
    found = homophily(edges(pairs), rows(histories))
    assert found is not None
    assert found.friends > 0.2
    assert found.strangers == 0
    pairs, histories = circles(60, alike=False)
    found = homophily(edges(pairs), rows(histories))
    assert found is not None
    assert found.strangers == pytest.approx(found.friends, abs=0.02)


def test_activity_alone_is_no_homophily() -> None:
    """Busy users know busy users and share much by that alone: strangers as busy share as much."""
    random = np.random.default_rng(0)
    histories = {5 + user: random.choice(50, 40 if user < 100 else 4, replace=False).tolist() for user in range(200)}
    pairs = [(5 + a, 5 + b) for half in (0, 100) for a, b in half + random.integers(0, 100, (400, 2)) if a != b]
    found = homophily(edges(pairs), rows(histories))
    assert found is not None
    assert found.strangers == pytest.approx(found.friends, rel=0.06)
    everyone = [
        len(set(histories[a]) & set(histories[b])) / len(set(histories[a]) | set(histories[b]))
        for a, b in 5 + random.integers(0, 200, (2000, 2))
    ]
    assert np.mean(everyone) < 0.8 * found.friends


def test_without_friends_who_have_items_there_is_no_figure() -> None:
    assert homophily([], rows({5: [1]})) is None
    assert homophily(edges([(5, 6)]), rows({5: [1], 7: [1]})) is None
