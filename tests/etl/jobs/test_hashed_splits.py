"""Splits by chance against counts by hand; what a new event, another user or another order of users changes."""

import numpy as np
import pyarrow as pa
import pytest

from etl.config import EtlConfig, SplitConfig
from etl.histories.reader import Histories
from etl.jobs import baskets, sequences
from etl.settings import ConfigError

RANDOM = SplitConfig(name="random-8-1-1", random=(0.1, 0.1))
FOLDS = [SplitConfig(name=f"users-{fold}", user_folds=5, fold=fold) for fold in range(5)]


def histories(lengths: dict[str, int]) -> Histories:
    """Users with so many events each, of items 5, 6, 7… in time order, by turns of two domains."""
    size = list(lengths.values())
    item = np.concatenate([5 + np.arange(count) for count in size])
    user = np.repeat(np.arange(len(size)), size)
    bits = 1 | (1 << (1 + item % 2))
    users = 5 + np.arange(len(size))
    return Histories(users, user, item, bits, item * 10, {}, pa.array(list(lengths)))


def parts_of(
    found: Histories, split: SplitConfig, name: str = "all"
) -> dict[str, tuple[list[int], list[int], list[int]]]:
    """Raw id -> items of the training, validation and test part."""
    rows = {}
    for (_, domain), batch in sequences.rows(found, names=["all", "even", "odd"], splits=[split]):
        if domain == name:
            for row in batch.to_pylist():
                first, second, end = row["valid_start"], row["test_start"], row["end"]
                assert end == len(row["items"])
                assert [item * 10 for item in row["items"]] == row["times"]
                raw = found.raw[row["user"] - 5].as_py()
                rows[raw] = (row["items"][:first], row["items"][first:second], row["items"][second:end])
    return rows


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (1, (1, 0, 0)),
        (2, (1, 0, 1)),
        (3, (1, 1, 1)),
        (9, (7, 1, 1)),
        (10, (8, 1, 1)),
        (25, (21, 2, 2)),
        (50, (40, 5, 5)),
    ],
)
def test_a_tenth_each_rounded_down_but_one_at_least(size: int, expected: tuple[int, int, int]) -> None:
    (found,) = parts_of(histories({"a": size}), RANDOM).values()
    assert tuple(map(len, found)) == expected
    assert sorted(item for part in found for item in part) == [5 + place for place in range(size)]
    assert all(part == sorted(part) for part in found)  # in time order within a part


def test_a_random_split_is_drawn_for_each_user_by_the_raw_id_alone() -> None:
    both = parts_of(histories({"a": 60, "b": 60}), RANDOM)
    assert both["a"] != both["b"]
    assert parts_of(histories({"z": 7, "b": 60}), RANDOM)["b"] == both["b"]
    drawn = np.concatenate(
        [found[2] for found in parts_of(histories({str(n): 100 for n in range(300)}), RANDOM).values()]
    )
    places = np.bincount(drawn - 5, minlength=100)
    assert abs(places[:50].sum() / places.sum() - 0.5) < 0.03  # not the last ones


def test_a_new_event_redraws_no_older_one() -> None:
    before, after = (parts_of(histories({"a": size}), RANDOM)["a"][2] for size in (55, 56))
    assert len(set(before) - set(after)) == len(set(after) - set(before)) <= 1
    assert set(after) - set(before) <= {5 + 55}


def test_a_random_split_needs_enough_to_train_on() -> None:
    strict = SplitConfig(name="strict", random=(0.1, 0.1), min_train=8)
    found = parts_of(histories({"a": 9, "b": 10}), strict)
    assert [len(part) for part in found["a"]] == [9, 0, 0]
    assert [len(part) for part in found["b"]] == [8, 1, 1]


def test_folds_hold_out_each_user_once_and_whole() -> None:
    given = histories({str(number): 1 + number % 7 for number in range(500)})
    held = {}
    for split in FOLDS:
        for name in ("all", "odd"):
            for raw, (train, validation, test) in parts_of(given, split, name).items():
                assert not validation
                assert not train or not test
                if test and name == "all":
                    assert raw not in held
                    held[raw] = split.fold
    assert len(held) == 500
    sizes = np.bincount(list(held.values()))
    assert sizes.min() > 70


def test_baskets_have_no_split_by_chance() -> None:
    given = histories({"a": 9})
    assert list(baskets.rows(given, names=["all", "even", "odd"], splits=[RANDOM, FOLDS[0]], gap=1.0)) == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"random": (0.1, 0.1), "user_folds": 5}, "random or user_folds, found both"),
        ({"random": (0.5, 0.5)}, r"below 1 together, found 0\.5 and 0\.5"),
        ({"random": (-0.1, 0.2)}, "from 0 on"),
        ({"user_folds": 3, "fold": 3}, "a fold from 0 to 2, found 3"),
        ({"random": (0.1, 0.1), "train_until": "2020-01-01"}, "found train_until beside it"),
        ({"user_folds": 5, "cold_items": {"share": 0.1}}, "found cold_items beside it"),
    ],
)
def test_a_split_by_chance_that_cannot_be_made_is_refused(settings: dict[str, object], message: str) -> None:
    config = EtlConfig.model_validate({"source": {"kind": "generator"}, "splits": [{"name": "chance", **settings}]})
    with pytest.raises(ConfigError, match=message):
        sequences.check(config)
