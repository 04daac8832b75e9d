"""What benchmarks say of a log, on logs small enough to count by hand."""

import numpy as np
import pytest

from tests.benchmarks.log_statistics import (
    DAY,
    SESSION_GAP,
    Log,
    calendar,
    gini,
    head_share,
    popularity_drift,
    repeat_distance,
    statistics,
)


def test_gini_is_0_where_all_are_alike_and_near_1_where_one_has_all():
    assert gini(np.array([3, 3, 3])) == pytest.approx(0)
    assert gini(np.array([0, 0, 0, 4])) == pytest.approx(3 / 4)
    # Mean absolute difference of all ordered pairs, over twice the mean: (4 * 2 * 1 + 2 * 2 * 2) / 9 / (2 * 2)
    assert gini(np.array([1, 2, 3])) == pytest.approx(((4 * 1 + 2 * 2) / 9) / (2 * 2))


def test_head_share_is_of_a_tenth_of_the_items():
    assert head_share(np.array([5, *[1] * 9])) == pytest.approx(5 / 14)
    assert head_share(np.array([2, 3])) == pytest.approx(3 / 5), "one item at least"


def test_repeat_distance_counts_a_users_own_events():
    user, category = np.array([0, 0, 0, 0, 1, 1]), np.array([7, 8, 7, 7, 7, 8])
    assert sorted(repeat_distance(user, category).tolist()) == [1, 2]


def test_sessions_end_where_an_hour_passes_or_the_user_changes():
    hour = SESSION_GAP
    log = Log(
        user=np.array([0, 0, 0, 0, 1, 1]),
        item=np.array([0, 1, 2, 3, 0, 1]),
        time=np.array([0, hour, 2 * hour + 1, 2 * hour + 2, 2 * hour + 2, 2 * hour + 3]),
        category=np.zeros(6, np.int64),
    )
    found = statistics(log)
    assert (found["users"], found["items"], found["events"]) == (2, 4, 6)
    assert found["session: events, mean"] == pytest.approx(6 / 3)
    assert found["sessions of a user, mean"] == pytest.approx(3 / 2)
    assert found["history: events, median"] == pytest.approx((4 + 2) / 2)


def test_the_calendar_of_a_log_counted_by_hand():
    """User 0 comes back twice, user 1 never; item 2 is new; day 0 is a Thursday, 2 and 3 are a weekend."""
    day = np.array([0, 35, 70, 0, 2, 3, 3, 100])
    log = Log(
        user=np.array([0, 0, 0, 1, 1, 1, 1, 2]),
        item=np.array([0, 1, 0, 0, 1, 0, 1, 2]),
        time=DAY * day + np.array([18, 1, 2, 3, 4, 5, 6, 7]) * SESSION_GAP,
        category=np.zeros(8, np.int64),
    )
    found = calendar(log)
    assert found["days"] == 101
    assert found["users who come back after 30 days, share"] == pytest.approx(1 / 3)
    assert found["breaks of 30 days, mean of a user"] == pytest.approx(2 / 3)
    assert found["items first taken after a tenth of the days, share"] == pytest.approx(1 / 3)
    saturdays, sundays = len(range(2, 101, 7)), len(range(3, 101, 7))
    at_weekends = 3 + 1  # days 2, 3, 3 and 100
    assert found["events of a weekend day over a weekday's"] == pytest.approx(
        (at_weekends / (saturdays + sundays)) / ((8 - at_weekends) / (101 - saturdays - sundays))
    )
    assert found["events of an evening hour over another's"] == pytest.approx((1 / 6) / (7 / 18))


def test_popularity_drifts_where_other_items_are_taken_later():
    item = np.array([0, 0, 0, 1, 2, 2, 2, 2, 0, 0, 0, 1])
    log = Log(np.zeros(12, np.int64), item, np.arange(12) * DAY, np.zeros(12, np.int64))
    assert popularity_drift(log) == pytest.approx(np.corrcoef(np.log1p([3, 0, 0]), np.log1p([2, 1, 0]))[0, 1])
