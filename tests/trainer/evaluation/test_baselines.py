"""The simple baselines on logs small enough to check by hand, and against a brute-force cosine."""

import math
from collections import Counter, defaultdict

import numpy as np
import pytest
import torch

from trainer.data.events import Events, merge
from trainer.evaluation.baselines.sequences import item_to_item, popularity, transitions


def histories(sequences, *, users=None, times=None):
    """Lists of items (and of times) as flat arrays."""
    lengths = [len(items) for items in sequences]
    return Events.of(
        np.arange(len(sequences)) if users is None else np.array(users),
        np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        np.array([item for items in sequences for item in items], dtype=np.int64),
        np.array([time for row in times or [] for time in row], dtype=np.int64),
    )


def lists(given):
    return [given.items[start:end].tolist() for start, end in zip(given.offsets, given.offsets[1:], strict=False)]


def random_log(rng, num_users, num_items, most):
    return [rng.integers(0, num_items, rng.integers(0, most)).tolist() for _ in range(num_users)]


def cosine(sequences, a, b):
    """Users of both over the geometric mean of each one's users; 0 to itself."""
    users_a, users_b = ({u for u, items in enumerate(sequences) if item in items} for item in (a, b))
    return len(users_a & users_b) / math.sqrt(len(users_a) * len(users_b)) if a != b and users_a & users_b else 0.0


# --- histories -----------------------------------------------------------------------------------------------------


def test_histories_until_newest_before_take():
    given = histories([[7, 8, 9], [], [5, 6]], times=[[1, 4, 6], [], [2, 6]])
    assert lists(given.until(np.array([2, 0, 5]))) == [[7, 8], [], [5, 6]]
    assert lists(given.newest(1)) == [[9], [], [6]]
    assert lists(given.before(np.array([6, 6, 2]))) == [[7, 8], [], []], "strictly before"
    assert lists(given.take(np.array([2, 0, 2, 1]))) == [[5, 6], [7, 8, 9], [5, 6], []]
    assert given.take(np.array([2, 0])).times.tolist() == [2, 6, 1, 4, 6]


def test_histories_before_needs_times():
    with pytest.raises(ValueError, match="times"):
        histories([[1, 2]]).before(np.array([3]))


def test_merge_orders_two_domains_by_time():
    first = histories([[1, 2], [3]], users=[10, 20], times=[[5, 9], [1]])
    second = histories([[101, 102], [103]], users=[10, 30], times=[[5, 7], [2]])
    both = merge(first, second)
    assert both.users.tolist() == [10, 20, 30]
    assert lists(both) == [[1, 101, 102, 2], [3], [103]]
    assert both.times.tolist() == [5, 5, 7, 9, 1, 2]


def test_merge_with_an_empty_domain_is_the_other():
    first = histories([[1, 2], [3]], times=[[5, 9], [1]])
    assert lists(merge(first, histories([], times=[]))) == [[1, 2], [3]]


def test_merge_needs_times():
    with pytest.raises(ValueError, match="times"):
        merge(histories([[1, 2]]), histories([[3]], times=[[1]]))


# --- popularity ----------------------------------------------------------------------------------------------------


def test_popularity_counts_the_training_part_only():
    log = histories([[0, 1, 2], [0, 1], [3, 0]])
    train = log.until(np.array([2, 1, 1]))
    scores = popularity(train, 5).score(log, np.array([4, 3, 2, 1, 0]))
    assert scores.dtype == torch.float32
    assert scores.tolist() == [[0, 1, 0, 1, 2]] * 3


# --- item to item --------------------------------------------------------------------------------------------------


def test_item_to_item_by_hand():
    # Users of 0: a b c; of 1: a b; of 2: c. cos(0, 1) = 2/sqrt(3·2), cos(0, 2) = 1/sqrt(3), cos(1, 2) = 0.
    train = histories([[0, 1], [1, 0], [0, 2]])
    scores = item_to_item(train, 4).score(histories([[0], [1, 2], [3], []]), np.array([0, 1, 2, 3]))
    expected = [
        [0, 2 / math.sqrt(6), 1 / math.sqrt(3), 0],
        [2 / math.sqrt(6) + 1 / math.sqrt(3), 0, 0, 0],
        [0, 0, 0, 0],
        [0, 0, 0, 0],
    ]
    np.testing.assert_allclose(scores.numpy(), expected, atol=2e-6)


def test_item_to_item_without_a_history_is_popularity():
    train = histories([[0, 1], [1, 2], [1, 2], [3]])
    scores = item_to_item(train, 5).score(histories([[], [4]]), np.arange(5))
    assert scores.argsort(dim=1, descending=True, stable=True).tolist() == [[1, 2, 0, 3, 4]] * 2


@pytest.mark.parametrize(("last", "decay"), [(1, 1.0), (3, 1.0), (None, 1.0), (4, 0.5), (None, 0.7)])
def test_item_to_item_equals_the_sum_of_cosines(last, decay):
    rng = np.random.default_rng(1)
    log, examples = random_log(rng, 40, 12, 9), random_log(rng, 15, 12, 9)
    candidates = np.array([11, 3, 0, 7])
    scores = item_to_item(histories(log), 12, last=last, decay=decay).score(histories(examples), candidates)
    for user, items in enumerate(examples):
        newest_first = items[::-1][:last]
        for column, candidate in enumerate(candidates):
            expected = sum(decay**age * cosine(log, item, candidate) for age, item in enumerate(newest_first))
            assert scores[user, column] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("per_block", [1, 5 * 23, 1 << 23])
def test_item_to_item_is_the_same_in_any_blocks_and_towards_any_candidates(per_block, monkeypatch):
    rng = np.random.default_rng(2)
    log, examples = histories(random_log(rng, 60, 23, 12)), histories(random_log(rng, 9, 23, 12))
    candidates = np.array([1, 20, 4])
    expected = item_to_item(log, 23).score(examples, candidates)
    monkeypatch.setattr("trainer.evaluation.baselines.sequences.SIMILARITIES_PER_BLOCK", per_block)
    for towards in (None, candidates):
        found = item_to_item(log, 23, towards=towards).score(examples, candidates)
        torch.testing.assert_close(found, expected)


def test_item_to_item_keeps_the_most_similar_neighbours():
    rng = np.random.default_rng(3)
    log = random_log(rng, 80, 15, 10)
    kept = item_to_item(histories(log), 15, neighbours=4).similarity.toarray()
    for item in range(15):
        exact = sorted((cosine(log, item, other) for other in range(15)), reverse=True)
        np.testing.assert_allclose(sorted(kept[item], reverse=True)[:4], exact[:4], rtol=1e-5)
        assert np.count_nonzero(kept[item]) <= 4


def test_item_to_item_counts_the_newest_of_a_very_long_history():
    long = [0] * 50 + list(range(1, 8))
    found = item_to_item(histories([long, [0, 1], [6, 7]]), 8, max_history=3).similarity.toarray()
    assert found[0].nonzero()[0].tolist() == [1], "items of the long history's old part are not counted"
    assert found[5, 7] > 0


def test_item_to_item_never_learns_from_held_out_items():
    """Whatever is held out, the scores are the same."""
    rng = np.random.default_rng(4)
    log = random_log(rng, 30, 10, 8)
    ends = np.array([max(len(items) - 2, 0) for items in log])
    other = [items[:end] + rng.integers(0, 10, len(items) - end).tolist() for items, end in zip(log, ends, strict=True)]
    examples = histories([[0, 1, 2], [5]])
    scores = [item_to_item(histories(each).until(ends), 10).score(examples, np.arange(10)) for each in (log, other)]
    assert torch.equal(*scores)


def test_item_to_item_over_all_domains_carries_taste_to_a_new_user_of_the_target():
    """Target items 0-3, source items 10-13: fans of 10 and 11 like 0 and 1, the others 2 and 3."""
    fans = [([0, 1], [10, 11]), ([2, 3], [12, 13])] * 5
    target = histories([row[0] for row in fans], times=[[20, 21]] * 10)
    source = histories([row[1] for row in fans], times=[[1, 2]] * 10)
    candidates = np.arange(4)
    both = item_to_item(merge(target, source), 14, towards=candidates)
    newcomer = histories([[10], [13]], times=[[1], [1]])
    assert both.score(newcomer, candidates).topk(2).indices.sort().values.tolist() == [[0, 1], [2, 3]]


# --- transitions ---------------------------------------------------------------------------------------------------


def followers(sequences, steps, decay):
    """Pairs counted one by one: (i, j) -> how often j follows i."""
    counts = defaultdict(float)
    for items in sequences:
        for place, before in enumerate(items):
            for distance, after in enumerate(items[place + 1 : place + 1 + steps]):
                counts[before, after] += decay**distance
    return counts


def test_transitions_by_hand():
    # 0 → 1 twice; 0 → 2 once over one step and once over two; 1 → 2 once. Popularity 2, 2, 3: of 3 nobody knows.
    train = histories([[0, 1, 2], [0, 2], [2, 0, 1]])
    scores = transitions(train, 4, steps=2, decay=0.5).score(histories([[0], [0, 1], [3], []]), np.array([0, 1, 2, 3]))
    expected = [
        [0, 2 / math.sqrt(2), (1 + 1 / 2) / math.sqrt(3), 0],
        [0, 1 / 2 * 2 / math.sqrt(2), (1 + 1 / 2 * (1 + 1 / 2)) / math.sqrt(3), 0],
        [0, 0, 0, 0],
        [0, 0, 0, 0],
    ]
    np.testing.assert_allclose(scores.numpy(), expected, atol=2e-6)


def test_transitions_know_the_direction():
    train = histories([[0, 1]] * 5)
    scores = transitions(train, 2).score(histories([[0], [1]]), np.array([0, 1]))
    np.testing.assert_allclose(scores.numpy(), [[0, math.sqrt(5)], [0, 0]], atol=2e-6)


@pytest.mark.parametrize("per_block", [1, 40, 1 << 22])
@pytest.mark.parametrize(("steps", "decay"), [(1, 1.0), (3, 0.5), (8, 0.8), (8, 1.0)])
def test_transitions_equal_pairs_counted_one_by_one(steps, decay, per_block, monkeypatch):
    monkeypatch.setattr("trainer.evaluation.baselines.sequences.PAIRS_PER_BLOCK", per_block)
    rng = np.random.default_rng(1)
    log, examples = random_log(rng, 40, 12, 20), random_log(rng, 15, 12, 20)
    counts, popular = followers(log, steps, decay), Counter(item for items in log for item in items)
    candidates = np.array([11, 3, 0, 7])
    for towards in (None, candidates):
        model = transitions(histories(log), 12, steps=steps, decay=decay, towards=towards)
        scores = model.score(histories(examples), candidates)
        for user, items in enumerate(examples):
            newest_first = items[::-1][:steps]
            for column, candidate in enumerate(candidates.tolist()):
                total = sum(decay**age * counts[item, candidate] for age, item in enumerate(newest_first))
                expected = total / math.sqrt(popular[candidate])
                assert scores[user, column] == pytest.approx(expected, rel=1e-5, abs=2e-6)


def test_transitions_keep_the_largest_neighbours():
    rng = np.random.default_rng(3)
    log = random_log(rng, 80, 15, 20)
    every = transitions(histories(log), 15).similarity.toarray()
    kept = transitions(histories(log), 15, neighbours=4).similarity.toarray()
    for item in range(15):
        np.testing.assert_allclose(np.sort(kept[item])[-4:], np.sort(every[item])[-4:])
        assert np.count_nonzero(kept[item]) == 4


def test_transitions_of_nothing_score_nothing():
    scores = transitions(histories([]), 3).score(histories([[0], []]), np.arange(3))
    assert scores.tolist() == [[0, 0, 0]] * 2


def test_scoring_in_batches_changes_nothing():
    rng = np.random.default_rng(5)
    examples = histories(random_log(rng, 20, 30, 10))
    model = item_to_item(histories(random_log(rng, 50, 30, 10)), 30)
    parts = [model.score(examples.take(np.arange(start, start + 5)), np.arange(30)) for start in range(0, 20, 5)]
    torch.testing.assert_close(torch.cat(parts), model.score(examples, np.arange(30)))
