"""Fixed evaluation negatives: what they never hold, how they are distributed, and that they stay."""

import numpy as np
import pytest
from pyspark.sql import SparkSession
from scipy import stats

from etl.config import NegativesConfig
from etl.jobs import negatives
from etl.jobs.negatives import Candidates
from etl.tables import FIRST_INDEX, NEGATIVES
from tests.etl.frames import frame

ALL = ("uniform-100", "popular-100", "top-100")


def _candidates(size: int, weight: np.ndarray | None = None, *, first: int = FIRST_INDEX) -> Candidates:
    index = np.arange(first, first + size)
    word = np.array([negatives._word(f"item-{i}".encode()) for i in index], np.uint64)
    return Candidates(index, word, np.arange(size, 0, -1.0) if weight is None else weight)


def _draw(
    candidates: Candidates, seen: np.ndarray, protocol: str, *, seed: int = 0, domain: str = "d", part: str = "test"
) -> list[np.ndarray]:
    words = np.arange(len(seen), dtype=np.uint64) * np.uint64(7919) + np.uint64(13)
    nothing = [np.zeros(0, np.int64)] * len(seen)
    return negatives.negatives(
        candidates, seen, protocol=protocol, part=part, seed_words=(seed, domain), user_word_B=words, kept=nothing
    )


@pytest.mark.parametrize("protocol", ALL)
def test_negatives_are_distinct_unseen_and_a_hundred(protocol: str) -> None:
    seen = np.random.default_rng(0).random((20, 300)) < 0.4
    for row, places in enumerate(_draw(_candidates(300), seen, protocol)):
        assert len(set(places.tolist())) == len(places) == 100
        assert not seen[row, places].any()


@pytest.mark.parametrize("protocol", ALL)
def test_negatives_are_all_unseen_items_where_fewer_than_a_hundred(protocol: str) -> None:
    seen = np.zeros((2, 50), bool)
    seen[0, :45] = True
    found = _draw(_candidates(50), seen, protocol)
    assert sorted(found[0].tolist()) == [45, 46, 47, 48, 49]
    assert sorted(found[1].tolist()) == list(range(50))


def test_top_takes_the_most_popular_and_breaks_ties_by_index() -> None:
    weight = np.array([1.0] * 150 + [5.0, 9.0])
    found = _draw(_candidates(152, weight), np.zeros((1, 152), bool), "top-100")[0]
    assert found[:4].tolist() == [151, 150, 0, 1]


def test_uniform_draws_each_item_equally_often() -> None:
    drawn = _draw(_candidates(250), np.zeros((4_000, 250), bool), "uniform-100")
    counts = np.bincount(np.concatenate(drawn), minlength=250)
    # Without replacement a count's variance is below the multinomial's, so the statistic is scaled.
    assert stats.chisquare(counts).statistic / (1 - 100 / 250) < stats.chi2(249).ppf(0.9999)


def test_popular_draws_in_proportion_to_popularity_without_replacement() -> None:
    weight = np.array([4.0, 3.0, 2.0, 1.0, 0.0])
    drawn = np.array(_draw(_candidates(5, weight), np.zeros((20_000, 5), bool), "popular-100"))
    assert drawn.shape == (20_000, 4)  # what nobody takes is never drawn
    first = np.bincount(drawn[:, 0], minlength=5) / len(drawn)
    assert np.abs(first - weight / 10).max() < 0.015
    after_0 = drawn[drawn[:, 0] == 0][:, 1]
    assert np.abs(np.bincount(after_0, minlength=5)[1:4] / len(after_0) - np.array([3, 2, 1]) / 6).max() < 0.02


def test_draws_differ_by_seed_domain_and_part_and_by_nothing_else() -> None:
    candidates, seen = _candidates(400), np.zeros((3, 400), bool)
    base = _draw(candidates, seen, "uniform-100")
    for other in (
        _draw(candidates, seen, "uniform-100", seed=1),
        _draw(candidates, seen, "uniform-100", domain="e"),
        _draw(candidates, seen, "uniform-100", part="validation"),
        _draw(candidates, seen, "popular-100"),
    ):
        assert all(len(set(a.tolist()) & set(b.tolist())) < 60 for a, b in zip(base, other, strict=True))
    shuffled = np.random.default_rng(1).permutation(400)
    moved = Candidates(candidates.index, candidates.word[shuffled], candidates.weight)
    again = _draw(moved, seen, "uniform-100")  # raw ids decide, whatever index they have
    assert all((candidates.word[a] == moved.word[b]).all() for a, b in zip(base, again, strict=True))


def test_negatives_stay_when_a_new_day_comes_less_what_was_taken(spark: SparkSession) -> None:
    config = NegativesConfig(protocols=("uniform-100", "popular-100"))
    users = frame(spark, [("u", 5), ("v", 6), ("w", 7)], "user string, index int")
    schema = (
        "split string, domain string, bucket int, user int, items array<int>, valid_start int, test_start int, end int"
    )

    def day(candidates: Candidates, histories: dict[int, list[int]], old: dict[tuple[str, str, int], list[int]] | None):
        rows = [("s", "d", 0, user, items, 1, 2, 3) for user, items in histories.items()]
        rows.append(("s", "d", 0, 7, [5], 1, 1, 1))  # no hold-out
        before = None
        if old is not None:
            told = [("s", "d", 0, protocol, part, user, items) for (protocol, part, user), items in old.items()]
            before = frame(
                spark,
                told,
                "split string, domain string, bucket int, protocol string, part string, user int, items array<int>",
            )
        found = negatives.transform(
            frame(spark, rows, schema), users, before, candidates={"d": candidates}, config=config
        )
        assert found.columns == NEGATIVES.schema.names
        return {(row["protocol"], row["part"], row["user"]): row["items"] for row in found.collect()}

    first = day(_candidates(300), {5: [5, 6, 7], 6: [8, 9, 10]}, None)
    assert set(first) == {
        (protocol, part, user) for protocol in config.protocols for part in ("validation", "test") for user in (5, 6)
    }
    taken = [items[10] for key, items in first.items() if key[2] == 6]
    grown = _candidates(330, np.random.default_rng(2).random(330))
    second = day(grown, {5: [5, 6, 7], 6: [8, 9, 10, *taken]}, first)
    for key, items in second.items():
        before = first[key]
        if key[2] == 5:
            assert items == before
        else:
            left = [item for item in before if item not in taken]
            assert items[: len(left)] == left
            assert len(set(items)) == 100
            assert not set(taken) & set(items)
