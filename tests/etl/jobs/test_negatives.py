"""Fixed evaluation negatives: what they never hold, how they are distributed, and that they stay."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from scipy import stats

from etl.config import NegativesConfig
from etl.histories import negative_sampling
from etl.histories.negative_sampling import Candidates, candidates, draw, taken
from etl.jobs import negatives
from etl.tables import FIRST_INDEX, NEGATIVES

ALL = ("uniform-100", "popular-100", "top-100")


def _candidates(size: int, weight: np.ndarray | None = None, *, first: int = FIRST_INDEX) -> Candidates:
    """Items first, first + 1… of falling popularity."""
    index = np.arange(first, first + size)
    word = np.array([negative_sampling.word_of(f"item-{i}") for i in index], np.uint64)
    return candidates(index, word, np.arange(size, 0, -1) if weight is None else np.asarray(weight))


def _draw(
    chosen: Candidates, seen: Sequence[Sequence[int]], protocol: str, *, stream: str = "0/d/test", wanted: int = 100
) -> list[list[int]]:
    """Global indices that are drawn for users who have taken those in `seen`."""
    user = np.repeat(np.arange(len(seen)), [len(items) for items in seen])
    gone = taken(user, chosen.places(np.array([i for items in seen for i in items], np.int64)), chosen)
    found = np.full((len(seen), wanted), -1, np.int64)
    word = np.arange(len(seen), dtype=np.uint64) * np.uint64(7919) + np.uint64(13)
    draw(chosen, gone, found, word, np.arange(len(seen)), protocol=protocol, stream=stream)
    return [chosen.index[row[row >= 0]].tolist() for row in found]


@pytest.mark.parametrize("protocol", ALL)
@pytest.mark.parametrize(("size", "share"), [(300, 0.4), (5_000, 0.02), (5_000, 0.95), (1_000, 0.0)])
def test_negatives_are_distinct_unseen_and_a_hundred(protocol: str, size: int, share: float) -> None:
    random = np.random.default_rng(0)
    # The popular ones, mostly: rejection has much to reject.
    seen = [np.flatnonzero(random.random(size) < share) + FIRST_INDEX for _ in range(30)]
    weight = (1e6 * np.arange(1, size + 1) ** -1.5).astype(np.int64) + 1
    for items, found in zip(seen, _draw(_candidates(size, weight), seen, protocol), strict=True):
        assert len(set(found)) == len(found) == 100
        assert not set(items.tolist()) & set(found)


@pytest.mark.parametrize("protocol", ALL)
@pytest.mark.parametrize("size", [50, 400])
def test_negatives_are_all_unseen_items_where_fewer_than_a_hundred(protocol: str, size: int) -> None:
    every = list(range(FIRST_INDEX, FIRST_INDEX + size))
    found = _draw(_candidates(size), [every[:-5], every[:-40], every], protocol)
    assert [sorted(items) for items in found] == [every[-5:], every[-40:], []]


def test_top_takes_the_most_popular_and_breaks_ties_by_index() -> None:
    weight = np.array([1] * 450 + [5, 9])
    found = _draw(_candidates(452, weight), [[], [455, *range(5, 300)]], "top-100")
    assert found[0] == [456, 455, *range(5, 103)]
    assert found[1] == [456, *range(300, 399)]


@pytest.mark.parametrize("size", [250, 700])  # by a race alone; by rejection
def test_uniform_draws_each_item_equally_often(size: int) -> None:
    found = _draw(_candidates(size), [[5, 6, 7]] * 4_000, "uniform-100")
    counts = np.bincount(np.concatenate(found) - FIRST_INDEX, minlength=size)
    assert counts[:3].sum() == 0
    # Without replacement a count's variance is below the multinomial's, so the statistic is scaled.
    scaled = stats.chisquare(counts[3:]).statistic / (1 - 100 / (size - 3))
    assert stats.chi2(size - 4).ppf(0.0001) < scaled < stats.chi2(size - 4).ppf(0.9999)


@pytest.mark.parametrize(
    "rounds", [0, 1, negative_sampling.ROUNDS]
)  # by a race alone; begun by rejection; by rejection
def test_popular_draws_in_proportion_to_popularity_without_replacement(
    rounds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(negative_sampling, "SMALL", 0)
    monkeypatch.setattr(negative_sampling, "ROUNDS", rounds)
    weight = np.array([400, 300, 200, 100, 1, 0, 0])
    found = _draw(_candidates(7, weight), [[FIRST_INDEX + 5]] * 20_000, "popular-100", wanted=4)
    drawn = np.array(found) - FIRST_INDEX
    assert drawn.shape == (20_000, 4)
    pairs = np.bincount(drawn[:, 0] * 7 + drawn[:, 1], minlength=49).reshape(7, 7)
    share = weight / weight.sum()
    with np.errstate(invalid="ignore"):
        expected = len(drawn) * share[:, None] * share / (1 - share)[:, None]
    np.fill_diagonal(expected, 0)
    often = expected > 5
    assert pairs[expected == 0].sum() == 0  # none twice, and none that nobody takes
    statistic = ((pairs[often] - expected[often]) ** 2 / expected[often]).sum()
    assert statistic < stats.chi2(often.sum() - 1).ppf(0.9999)


def test_popular_with_rejection_has_the_distribution_of_the_race(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = (1e5 * np.arange(1, 601) ** -1.1).astype(np.int64) + 1
    chosen, seen = _candidates(600, weight), [list(range(5, 25))] * 3_000
    counts = []
    for rounds in (0, negative_sampling.ROUNDS):
        monkeypatch.setattr(negative_sampling, "ROUNDS", rounds)
        found = _draw(chosen, seen, "popular-100", stream=f"{rounds}/d/test")
        counts.append(np.bincount(np.concatenate(found) - FIRST_INDEX, minlength=600)[20:])
    share = (counts[0] + counts[1]) / 6_000
    z = (counts[0] - counts[1]) / np.sqrt(6_000 * share * (1 - share))
    assert (z**2).sum() < stats.chi2(len(z) - 1).ppf(0.9999)


def test_draws_differ_by_seed_domain_and_part_and_by_nothing_else() -> None:
    chosen, seen = _candidates(800), [[], [], []]
    base = _draw(chosen, seen, "uniform-100")
    for other in (
        _draw(chosen, seen, "uniform-100", stream="1/d/test"),
        _draw(chosen, seen, "uniform-100", stream="0/e/test"),
        _draw(chosen, seen, "uniform-100", stream="0/d/validation"),
        _draw(chosen, seen, "popular-100"),
    ):
        assert all(len(set(a) & set(b)) < 40 for a, b in zip(base, other, strict=True))
    # Raw ids decide, whatever index they have and in whatever order they come.
    moved = np.random.default_rng(1).permutation(800)
    again = _draw(candidates(chosen.index[moved] + 7, chosen.word[moved], chosen.weight[moved]), seen, "uniform-100")
    assert again == [[item + 7 for item in items] for items in base]
    # And a user's draws don't depend on who is drawn for beside it, also where these are very many.
    assert _draw(chosen, [[]] * 2_000, "uniform-100")[:3] == base


CONFIG = NegativesConfig(protocols=ALL)
Drawn = dict[tuple[str, str, int], list[int]]


def _sequences(histories: Mapping[int, Sequence[int]], hold_out: Mapping[int, tuple[int, int, int]]) -> pa.Table:
    rows: list[dict[str, Any]] = []
    for user in sorted(histories):
        size = len(histories[user])
        valid_start, test_start, end = hold_out.get(user, (size - 2, size - 1, size))
        rows.append(
            {"user": user, "items": histories[user], "valid_start": valid_start, "test_start": test_start, "end": end}
        )
    kinds = {name: pa.int32() for name in ("user", "valid_start", "test_start", "end")} | {
        "items": pa.list_(pa.int32())
    }
    return pa.Table.from_pylist(rows, schema=pa.schema([(name, kinds[name]) for name in rows[0]]))


def _rows(sequences: pa.Table, chosen: Candidates, earlier: negatives.Earlier | None = None) -> pa.Table:
    word = sequences["user"].to_numpy().astype(np.uint64) * np.uint64(31)
    chosen_of = dict.fromkeys(("validation", "test"), chosen)
    return pa.Table.from_batches(negatives.rows(sequences, word, chosen_of, domain="d", config=CONFIG, earlier=earlier))


def _told(table: pa.Table) -> Drawn:
    return {(row["protocol"], row["part"], row["user"]): row["items"] for row in table.to_pylist()}


def test_rows_are_of_those_who_hold_out_in_the_tables_order() -> None:
    histories = {8: [5, 6, 7], 5: [6, 7, 8, 9], 7: [5, 6], 6: [9, 9, 9]}
    sequences = _sequences(histories, {7: (2, 2, 2), 6: (1, 1, 3)})  # no hold-out; no validation
    table = _rows(sequences, _candidates(400))
    assert table.column_names == [c for c in NEGATIVES.schema.names if c not in NEGATIVES.partition_by]
    keys = [(row["protocol"], row["part"], row["user"]) for row in table.to_pylist()]
    assert keys == [
        (protocol, part, user)
        for protocol in sorted(ALL)
        for part, users in (("test", [5, 6, 8]), ("validation", [5, 8]))
        for user in users
    ]
    assert all(len(items) == 100 for items in table["items"].to_pylist())


@pytest.mark.parametrize("know_before", [True, False])
def test_negatives_stay_when_a_new_day_comes_less_what_was_taken(know_before: bool) -> None:
    histories: dict[int, list[int]] = {user: [5 + user % 4, 9, 12] for user in range(5, 25)}
    first = _sequences(histories, {})
    table = _rows(first, _candidates(300))
    drawn = _told(table)
    # The new day: new items, other popularity, two candidates fewer, and users of whom some took what was drawn.
    size = 330
    grown = _candidates(size, np.random.default_rng(2).integers(1, 99, size))
    kept = ~np.isin(grown.index, [20, 31])
    grown = candidates(grown.index[kept], grown.word[kept], grown.weight[kept])
    took = {user: [items[10] for key, items in drawn.items() if key[2] == user] for user in (6, 7)}
    histories |= {user: histories[user] + items for user, items in took.items()} | {30: [5, 6, 7], 8: [9, 12, 8]}
    second = _sequences(histories, {})
    shuffled = table.take(pa.array(np.random.default_rng(3).permutation(len(table))))
    known = (first, pa.array([20, 31], pa.int32())) if know_before else ()
    now = _told(_rows(second, grown, negatives.Earlier(shuffled, *known)))
    assert set(now) == set(drawn) | {(protocol, part, 30) for protocol in ALL for part in ("validation", "test")}
    for key, items in now.items():
        left = [item for item in drawn.get(key, []) if item not in (20, 31, *histories[key[2]])]
        assert items[: len(left)] == left
        assert len(set(items)) == len(items) == 100
        assert not {20, 31, *histories[key[2]]} & set(items)


def test_negatives_of_a_user_with_a_million_items_are_drawn_beside_others() -> None:
    size = 1_200_000
    random = np.random.default_rng(0)
    index = np.arange(FIRST_INDEX, FIRST_INDEX + size)
    chosen = candidates(index, random.integers(0, 2**63, size).astype(np.uint64), random.integers(1, 100, size))
    seen = random.permutation(index)[:1_000_000]
    sequences = pa.table(
        {
            "user": pa.array([5, 6], pa.int32()),
            "items": pa.array([seen, seen[:3]], pa.list_(pa.int32())),
            "valid_start": pa.array([len(seen) - 2, 1], pa.int32()),
            "test_start": pa.array([len(seen) - 1, 2], pa.int32()),
            "end": pa.array([len(seen), 3], pa.int32()),
        }
    )
    for (_, _, user), items in _told(_rows(sequences, chosen)).items():
        assert len(set(items)) == 100
        assert not np.isin(items, seen if user == 5 else seen[:3]).any()
