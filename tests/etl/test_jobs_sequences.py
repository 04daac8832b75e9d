"""Sequences, hold-outs and baskets against hand-made ones and against Polars."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import polars as pl
import pytest
from pyspark.sql import SparkSession

from etl.config import ConfigError, DomainConfig, EtlConfig, GeneratorSource, SplitConfig
from etl.jobs import baskets, sequences
from etl.tables import BASKETS, FIRST_INDEX, SEQUENCES, bucket_of
from tests.etl.frames import BUCKETS, interactions, members, vocabulary

LAST = SplitConfig(name="last-2", validation=1, test=1)
DOMAINS = {"all": ["a", "b", "c", "d", "x"], "source": ["a", "b", "x"], "target": ["c", "d"]}
ITEMS = {"a": True, "b": True, "c": True, "d": True, "x": False}
A, B, C, D, X = range(FIRST_INDEX, FIRST_INDEX + 5)


def _sequences(
    spark: SparkSession, rows: Sequence[tuple[Any, ...]], splits: Sequence[SplitConfig], kept: dict[str, bool]
) -> dict[tuple[str, str, int], dict[str, Any]]:
    frame = sequences.transform(
        interactions(spark, rows),
        vocabulary(spark, "user", kept),
        vocabulary(spark, "item", ITEMS),
        members(spark, DOMAINS),
        names=list(DOMAINS),
        splits=splits,
    )
    assert frame.columns == SEQUENCES.schema.names
    return {(row["split"], row["domain"], row["user"]): row.asDict(recursive=True) for row in frame.collect()}


def test_sequences_are_in_time_order_and_ties_keep_source_order(spark: SparkSession) -> None:
    rows = [("u", "b", 7), ("u", "a", 7), ("u", "c", 3), ("u", "x", 1), ("u", "a", 9), ("v", "d", 1), ("w", "a", 1)]
    found = _sequences(spark, rows, [LAST], {"u": True, "v": True, "w": False})
    assert set(found) == {("last-2", d, 5) for d in ("all", "source", "target")} | {
        ("last-2", d, 6) for d in ("all", "target")
    }
    row = found["last-2", "all", 5]
    assert (row["items"], row["times"]) == ([C, B, A, A], [3, 7, 7, 9])
    assert row["bucket"] == bucket_of("u", BUCKETS)
    assert (row["event_types"], row["values"]) == (None, None)
    assert (row["valid_start"], row["test_start"], row["end"]) == (2, 3, 4)
    source = found["last-2", "source", 5]
    assert (source["items"], source["valid_start"], source["end"]) == ([B, A, A], 1, 3)


def test_sequences_of_users_too_short_train_only(spark: SparkSession) -> None:
    rows = [("u", "a", 1), ("u", "b", 2), ("v", "a", 1), ("v", "b", 2), ("v", "a", 3)]
    strict = SplitConfig(name="strict", validation=1, test=1, min_train=2)
    found = _sequences(spark, rows, [LAST, strict], {"u": True, "v": True})
    offsets = {key: (row["valid_start"], row["test_start"], row["end"]) for key, row in found.items()}
    assert offsets["last-2", "all", 5] == (2, 2, 2)
    assert offsets["last-2", "all", 6] == (1, 2, 3)
    assert offsets["strict", "all", 6] == (3, 3, 3)


def test_sequences_carry_types_and_values_of_users_that_have_them(spark: SparkSession) -> None:
    rows = [("u", "a", 2, "view", 1.5), ("u", "b", 1), ("v", "a", 1, None, 2.0)]
    found = _sequences(spark, rows, [LAST], {"u": True, "v": True})
    assert found["last-2", "all", 5]["event_types"] == [None, "view"]
    assert found["last-2", "all", 5]["values"] == [None, 1.5]
    assert (found["last-2", "all", 6]["event_types"], found["last-2", "all", 6]["values"]) == (None, [2.0])


def test_causal_split_cuts_other_domains_at_the_first_held_out_target_item(spark: SparkSession) -> None:
    causal = SplitConfig(name="causal", validation=1, test=1, causal_target="target")
    rows = [
        ("u", "c", 1), ("u", "a", 2), ("u", "b", 3), ("u", "a", 4), ("u", "b", 5), ("u", "d", 5), ("u", "a", 5),
        ("u", "c", 8), ("u", "b", 9),
        ("v", "a", 1), ("v", "b", 2), ("v", "a", 3), ("v", "c", 1),
    ]  # fmt: skip
    found = _sequences(spark, rows, [LAST, causal], {"u": True, "v": True})
    offsets = {key: (row["valid_start"], row["test_start"], row["end"]) for key, row in found.items()}
    # u's target items are at 1, 5 and 8; the first held out is d at 5, after b at 5 and before a at 5.
    assert offsets["causal", "target", 5] == offsets["last-2", "target", 5] == (1, 2, 3)
    assert found["causal", "source", 5]["items"] == [A, B, A, B, A, B]
    assert offsets["causal", "source", 5] == (2, 3, 4)
    assert offsets["last-2", "source", 5] == (4, 5, 6)
    assert found["causal", "all", 5]["items"][:5] == [C, A, B, A, B]
    assert offsets["causal", "all", 5] == (3, 4, 5)
    # v has no hold-out in the target domain, so nothing is cut.
    assert offsets["causal", "source", 6] == offsets["last-2", "source", 6] == (1, 2, 3)


def test_sequences_equal_polars_on_a_random_log(spark: SparkSession) -> None:
    draw = np.random.default_rng(3)
    size = 600
    names = np.array(list(ITEMS))
    rows = [
        (f"u{u}", str(names[i]), int(t))
        for u, i, t in zip(
            draw.integers(0, 30, size), draw.integers(0, 5, size), draw.integers(0, 40, size), strict=True
        )
    ]
    kept = {f"u{u}": u % 7 != 0 for u in range(30)}
    split = SplitConfig(validation=2, test=3)
    found = _sequences(spark, rows, [split], kept)
    log = pl.DataFrame(rows, schema=["user", "item", "time"], orient="row").with_row_index("place")
    log = log.filter(pl.col("user").is_in([u for u, keep in kept.items() if keep])).sort("time", "place")
    index = {name: FIRST_INDEX + place for place, name in enumerate(ITEMS)}
    expected = {}
    for domain, inside in DOMAINS.items():
        own = log.filter(pl.col("item").is_in([i for i in inside if ITEMS[i]]))
        for (user,), events in own.group_by(["user"], maintain_order=True):
            size = len(events)
            cut = (size - 5, size - 3, size) if size >= 6 else (size, size, size)
            number = FIRST_INDEX + list(kept).index(str(user))
            expected["last-5", domain, number] = ([index[i] for i in events["item"]], events["time"].to_list(), cut)
    shown = {
        key: (row["items"], row["times"], (row["valid_start"], row["test_start"], row["end"]))
        for key, row in found.items()
    }
    assert shown == expected


def test_splits_that_cannot_be_made_are_refused() -> None:
    def config(*splits: SplitConfig) -> EtlConfig:
        return EtlConfig(source=GeneratorSource(), domains=(DomainConfig(name="target"),), splits=splits)

    sequences.check(config(LAST, SplitConfig(name="causal", causal_target="target")))
    for splits, message in [
        ((), "at least one"),
        ((LAST, LAST), "different names"),
        ((SplitConfig(causal_target="elsewhere"),), "'elsewhere'"),
    ]:
        with pytest.raises(ConfigError, match=message):
            sequences.check(config(*splits))


def test_baskets_are_in_order_with_the_last_held_out(spark: SparkSession) -> None:
    causal = SplitConfig(name="causal", validation=1, test=1, causal_target="target")
    rows = [
        ("u", "a", 1, None, None, "k"), ("u", "c", 1, None, None, "k"), ("u", "b", 2, None, None, "k"),
        ("u", "d", 3, None, None, "m"), ("u", "x", 4, None, None, "gone"), ("u", "a", 5, None, None, "n"),
        ("u", "c", 6, None, None, "o"), ("u", "a", 7, None, None, "p"),
        ("v", "a", 1, None, None, "k"), ("v", "b", 1),
    ]  # fmt: skip
    tables = (
        interactions(spark, rows),
        vocabulary(spark, "user", {"u": True, "v": True}),
        vocabulary(spark, "item", ITEMS),
        members(spark, DOMAINS),
    )
    splits = [LAST, causal]
    listed = sequences.transform(*tables, names=list(DOMAINS), splits=splits)
    frame = baskets.transform(*tables, listed, names=list(DOMAINS), splits=splits)
    assert set(frame.columns) == set(BASKETS.schema.names)
    found: dict[tuple[str, str, int], list[tuple[Any, ...]]] = {}
    for row in sorted(frame.collect(), key=lambda row: row["basket"]):
        told = (row["basket"], row["time"], row["part"], row["items"])
        found.setdefault((row["split"], row["domain"], row["user"]), []).append(told)
    assert found["last-2", "source", 5] == [(0, 1, "train", [A, B]), (1, 5, "validation", [A]), (2, 7, "test", [A])]
    assert found["last-2", "target", 5] == [(0, 1, "train", [C]), (1, 3, "validation", [D]), (2, 6, "test", [C])]
    assert found["causal", "target", 5] == found["last-2", "target", 5]
    assert found["causal", "source", 5] == [(0, 1, "train", [A, B])]  # the first held-out target item is at 3
    assert found["last-2", "all", 6] == [(0, 1, "train", [A])]
    assert [row[3] for row in found["last-2", "all", 5]] == [[A, C, B], [D], [A], [C], [A]]
