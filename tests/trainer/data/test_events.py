"""One container of users' events: whatever is taken of it, every column comes along."""

import numpy as np
import pytest

from trainer.data.events import Events, beside, merge

USERS = [4, 7, 9]


def events(seed=0, users=USERS, names=("items", "times", "event_types", "a column of tests")):
    random = np.random.default_rng(seed)
    lengths = random.integers(0, 6, len(users))
    columns = {name: random.integers(1, 9, lengths.sum()) for name in names}
    return Events(np.array(users), np.concatenate([[0], np.cumsum(lengths)]), columns)


def rows(given):
    """User -> its events, each with the values of all columns."""
    names = sorted(given.columns)
    return {
        int(user): [tuple(int(given.columns[name][place]) for name in names) for place in range(start, end)]
        for user, start, end in zip(given.users, given.offsets, given.offsets[1:], strict=False)
    }


@pytest.mark.parametrize("seed", range(5))
def test_what_is_taken_keeps_all_columns(seed):
    given = events(seed)
    of_user = rows(given)
    times = sorted(given.columns).index("times")
    assert rows(given.take(np.array([2, 0]))) == {9: of_user[9], 4: of_user[4]}
    assert rows(given.newest(2)) == {user: own[-2:] for user, own in of_user.items()}
    assert rows(given.until(np.array([1, 0, 3]))) == {4: of_user[4][:1], 7: [], 9: of_user[9][:3]}
    assert rows(given.before(np.array([5, 5, 1]))) == {
        user: [event for event in of_user[user] if event[times] < bar]
        for user, bar in zip(USERS, (5, 5, 1), strict=True)
    }
    assert rows(given.of_users(np.array([3, 7, 12]))) == {3: [], 7: of_user[7], 12: []}
    assert rows(given.in_time_order()) == {
        user: sorted(own, key=lambda event: event[times]) for user, own in of_user.items()
    }
    assert given.padded("items", -1).tolist() == [
        given.items[start:end].tolist() + [-1] * (int(given.lengths.max()) - end + start)
        for start, end in zip(given.offsets, given.offsets[1:], strict=False)
    ]


@pytest.mark.parametrize("seed", range(5))
def test_two_domains_become_one(seed):
    first, second = events(seed), events(seed + 50, users=[2, 7])
    of_first, of_second = rows(first), rows(second)
    both = {user: of_first.get(user, []) + of_second.get(user, []) for user in (2, 4, 7, 9)}
    times = sorted(first.columns).index("times")
    assert rows(beside(first, second)) == both
    assert rows(merge(first, second)) == {u: sorted(own, key=lambda e: e[times]) for u, own in both.items()}
    assert list(rows(merge(second, first))) == [2, 4, 7, 9]


def test_a_column_of_one_alone_is_left_out():
    plain = events(1, names=("items", "times"))
    assert plain.event_types.dtype == np.int8
    assert sorted(merge(events(), plain).columns) == ["items", "times"]
    with pytest.raises(ValueError, match=r"expected a time of each of \d+ interactions, found 0"):
        merge(events(), events(1, names=("items",)))
