"""Sequences, hold-outs and baskets against hand-made ones, and against plain loops over a random log."""

import datetime as dt
import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable
from pyspark.sql import SparkSession

from etl.config import ColdItemsConfig, DomainConfig, EtlConfig, GeneratorSource, SplitConfig
from etl.histories import bucket_writer, incremental, reader, ties
from etl.histories.bucket_writer import BucketWork
from etl.jobs import baskets, cold_items, sequences
from etl.jobs.job import Outcome, Run, RunContext, plan_run
from etl.lake.commit import Commit, commit_files
from etl.lake.snapshots import snapshot_files
from etl.lake.spark_io import data_files
from etl.settings import ConfigError, GraftrecError, replaced
from etl.tables import (
    BASKETS,
    FIRST_INDEX,
    INTERACTIONS,
    SEQUENCES,
    TIME_ORDINAL,
    USERS,
    Table,
    bucket_of,
    cold_item_hash,
    cold_user_hash,
)
from etl.tables import DOMAINS as DOMAINS_TABLE
from etl.tables import ITEMS as ITEMS_TABLE
from tests.fixtures.written_lakes import BUCKETS, events, vocabulary, write_lake, write_table

LAST = SplitConfig(name="last-2", validation=1, test=1)
CAUSAL = SplitConfig(name="causal", validation=1, test=1, causal_target="target")
DOMAINS = {"all": ["a", "b", "c", "d", "x"], "source": ["a", "b", "x"], "target": ["c", "d"]}
ITEMS = {"a": True, "b": True, "c": True, "d": True, "x": False}
EPOCH, MICROSECOND = dt.datetime(1970, 1, 1), dt.timedelta(microseconds=1)
A, B, C, D, X = range(FIRST_INDEX, FIRST_INDEX + 5)
COLD_ITEMS = SplitConfig(name="cold-items", validation=1, test=2, cold_items=ColdItemsConfig(share=0.3, seed=6))
# Of COLD_ITEMS, by global index, decided by hand: a is a validation item, c a test item.
COLD_PARTS = {COLD_ITEMS.name: np.array([0] * FIRST_INDEX + [1, 0, 2, 0, 0], np.int8)}
_USERS = pa.schema([("bucket", pa.int32()), ("user", pa.string()), ("index", pa.int32()), ("degree", pa.int64())])
Rows = dict[tuple[str, str, int], list[dict[str, Any]]]


def _made(
    lake: Path,
    log: Sequence[tuple[Any, ...]],
    table: Table,
    splits: Sequence[SplitConfig],
    users: Mapping[str, bool],
    *,
    max_events: int = 1_000_000,
    gap: float | None = None,
    files: int = 1,
    shown: list[dict[str, Any]] | None = None,
) -> Rows:
    """(split, domain, user) -> the rows that one task writes for all buckets, in the order of the files."""
    versions = write_lake(lake, log, users=users, items=ITEMS, domains=DOMAINS, files=files)
    (lake / table.name).mkdir()
    job, columns = (sequences, ("event_type", "value")) if table is SEQUENCES else (baskets, ("basket",))
    read = reader.inputs(str(lake), versions, names=list(DOMAINS), columns=columns, max_events=max_events)
    if table is BASKETS and not read.columns and gap is None:
        return {}
    table = table.of(TIME_ORDINAL)
    rows = partial(job.rows, names=list(DOMAINS), splits=splits)
    if job is sequences:
        rows = partial(rows, cold_parts=COLD_PARTS)
    if gap is not None:
        rows = partial(rows, gap=gap)
    kept = [
        (bucket_of(user, BUCKETS), user, FIRST_INDEX + place, sum(row[0] == user for row in log))
        for place, (user, keep) in reversed(list(enumerate(users.items())))
        if keep
    ]
    batches = [
        pa.RecordBatch.from_pylist([dict(zip(_USERS.names, row, strict=True)) for row in part], schema=_USERS)
        for part in (kept[::2], [], kept[1::2])
    ]
    found: Rows = {}
    for batch in bucket_writer.write_task(iter(batches), BucketWork(rows, str(lake), table, read)):
        for entry in map(json.loads, batch["file"].to_pylist()):
            part = entry["partition"]
            written = pq.ParquetFile(lake / table.name / entry["path"]).read().to_pylist()
            assert written == sorted(written, key=lambda row: [row[name] for name in table.order])
            for row in written:
                assert int(part["bucket"]) == bucket_of(list(users)[row["user"] - FIRST_INDEX], BUCKETS)
                found.setdefault((part["split"], part["domain"], row["user"]), []).append(row)
            if shown is not None:
                shown.append(entry)
    return found


def _sequences(
    lake: Path, log: Sequence[tuple[Any, ...]], splits: Sequence[SplitConfig], users: dict[str, bool], **more: int
) -> dict[tuple[str, str, int], dict[str, Any]]:
    found = _made(lake, log, SEQUENCES, splits, users, **more)
    assert all(len(rows) == 1 for rows in found.values())
    return {key: row for key, (row,) in found.items()}


def _offsets(row: dict[str, Any]) -> tuple[int, int, int]:
    return row["valid_start"], row["test_start"], row["end"]


def test_sequences_are_in_time_order_and_ties_keep_source_order(tmp_path: Path) -> None:
    log = [("u", "b", 7), ("u", "a", 7), ("u", "c", 3), ("u", "x", 1), ("u", "a", 9), ("v", "d", 1), ("w", "a", 1)]
    found = _sequences(tmp_path, log, [LAST], {"u": True, "v": True, "w": False})
    assert set(found) == {("last-2", d, 5) for d in ("all", "source", "target")} | {
        ("last-2", d, 6) for d in ("all", "target")
    }
    row = found["last-2", "all", 5]
    assert (row["items"], row["times"]) == ([C, B, A, A], [3, 7, 7, 9])
    assert (row["event_types"], row["values"]) == (None, None)
    assert _offsets(row) == (2, 3, 4)
    source = found["last-2", "source", 5]
    assert (source["items"], source["valid_start"], source["end"]) == ([B, A, A], 1, 3)


def test_sequences_of_users_too_short_train_only(tmp_path: Path) -> None:
    log = [("u", "a", 1), ("u", "b", 2), ("v", "a", 1), ("v", "b", 2), ("v", "a", 3)]
    strict = SplitConfig(name="strict", validation=1, test=1, min_train=2)
    found = _sequences(tmp_path, log, [LAST, strict], {"u": True, "v": True})
    assert _offsets(found["last-2", "all", 5]) == (2, 2, 2)
    assert _offsets(found["last-2", "all", 6]) == (1, 2, 3)
    assert _offsets(found["strict", "all", 6]) == (3, 3, 3)


def test_sequences_carry_types_and_values_of_users_that_have_them(tmp_path: Path) -> None:
    log = [("u", "a", 2, "view", 1.5), ("u", "b", 1), ("v", "a", 1, None, 2.0), ("w", "a", 1)]
    found = _sequences(tmp_path, log, [LAST], {"u": True, "v": True, "w": True})
    assert found["last-2", "all", 5]["event_types"] == [None, "view"]
    assert found["last-2", "all", 5]["values"] == [None, 1.5]
    assert (found["last-2", "all", 6]["event_types"], found["last-2", "all", 6]["values"]) == (None, [2.0])
    assert (found["last-2", "all", 7]["event_types"], found["last-2", "all", 7]["values"]) == (None, None)


def test_causal_split_cuts_other_domains_at_the_first_held_out_target_item(tmp_path: Path) -> None:
    log = [
        ("u", "c", 1),
        ("u", "a", 2),
        ("u", "b", 3),
        ("u", "a", 4),
        ("u", "b", 5),
        ("u", "d", 5),
        ("u", "a", 5),
        ("u", "c", 8),
        ("u", "b", 9),
        ("v", "a", 1),
        ("v", "b", 2),
        ("v", "a", 3),
        ("v", "c", 1),
    ]
    found = _sequences(tmp_path, log, [LAST, CAUSAL], {"u": True, "v": True})
    # u's target items are at 1, 5 and 8; the first held out is d at 5, after b at 5 and before a at 5.
    assert _offsets(found["causal", "target", 5]) == _offsets(found["last-2", "target", 5]) == (1, 2, 3)
    assert found["causal", "source", 5]["items"] == [A, B, A, B, A, B]
    assert _offsets(found["causal", "source", 5]) == (2, 3, 4)
    assert _offsets(found["last-2", "source", 5]) == (4, 5, 6)
    assert found["causal", "all", 5]["items"][:5] == [C, A, B, A, B]
    assert _offsets(found["causal", "all", 5]) == (3, 4, 5)
    # v has no hold-out in the target domain, so nothing is cut.
    assert _offsets(found["causal", "source", 6]) == _offsets(found["last-2", "source", 6]) == (1, 2, 3)


def test_joint_split_moves_what_the_target_holds_out_to_the_end_of_all(tmp_path: Path) -> None:
    log = [
        ("u", "c", 1),
        ("u", "a", 2),
        ("u", "d", 3),
        ("u", "b", 4),
        ("u", "c", 5),
        ("u", "a", 6),
        ("v", "a", 1),
        ("v", "b", 2),
        ("v", "a", 3),
        ("v", "c", 4),
    ]
    joint = SplitConfig(name="joint", validation=1, test=1, joint_target="target")
    causal = SplitConfig(name="both", validation=1, test=1, joint_target="target", causal_target="target")
    found = _sequences(tmp_path, log, [LAST, joint, causal], {"u": True, "v": True})
    row = found["joint", "all", 5]
    assert (row["items"], row["times"]) == ([C, A, B, A, D, C], [1, 2, 4, 6, 3, 5])
    assert _offsets(row) == (4, 5, 6)
    row = found["both", "all", 5]
    assert (row["items"], row["times"]) == ([C, A, D, C, B, A], [1, 2, 3, 5, 4, 6])
    assert _offsets(row) == (2, 3, 4)
    # v holds nothing out in the target domain, so trains on all; other domains are as without.
    assert _offsets(found["joint", "all", 6]) == (4, 4, 4)
    for domain, user in (("source", 5), ("source", 6), ("target", 5), ("target", 6)):
        assert found["joint", domain, user] == found["last-2", domain, user]


COLD_NAMES = ("u4", "u22", "u0")  # of which `cold_user_hash` gives 0.03, 0.15 and 0.36 in the domain `target`
COLD = SplitConfig(name="cold", validation=1, test=1, cold_users=0.1, joint_target="target", causal_target="target")


def test_cold_users_hold_out_their_whole_target_history(tmp_path: Path) -> None:
    tested, validated, trained = COLD_NAMES
    log = [
        (user, item, time)
        for user in COLD_NAMES
        for item, time in [("a", 1), ("b", 2), ("c", 3), ("a", 4), ("d", 5), ("b", 6), ("b", 7)]
    ]
    users = dict.fromkeys(COLD_NAMES, True)
    whole = COLD.model_copy(update={"name": "cold-whole", "causal_target": None})
    found = _sequences(tmp_path, log, [COLD, whole], users)
    index = {name: FIRST_INDEX + place for place, name in enumerate(users)}
    for split in ("cold", "cold-whole"):
        assert _offsets(found[split, "target", index[tested]]) == (0, 0, 2)
        assert _offsets(found[split, "target", index[validated]]) == (0, 2, 2)
        assert _offsets(found[split, "target", index[trained]]) == (2, 2, 2)
    row = found["cold", "all", index[tested]]
    assert (row["items"], row["times"], _offsets(row)) == ([A, B, C, D, A, B, B], [1, 2, 3, 5, 4, 6, 7], (2, 2, 4))
    row = found["cold", "all", index[validated]]
    assert (row["items"], _offsets(row)) == ([A, B, C, D, A, B, B], (2, 4, 4))
    row = found["cold", "all", index[trained]]
    assert (row["items"], _offsets(row)) == ([A, B, C, A, D, B, B], (7, 7, 7))
    row = found["cold-whole", "all", index[tested]]
    assert (row["items"], _offsets(row)) == ([A, B, A, B, B, C, D], (5, 5, 7))
    # The source holds out its last items, of cold users among those before the first target event.
    assert _offsets(found["cold", "source", index[tested]]) == (2, 2, 2)
    assert _offsets(found["cold", "source", index[trained]]) == (3, 4, 5)
    assert _offsets(found["cold-whole", "source", index[tested]]) == (3, 4, 5)


@pytest.mark.parametrize("first", [("c", 1), ("c", 2)])
def test_a_user_without_earlier_events_elsewhere_is_not_held_out(tmp_path: Path, first: tuple[str, int]) -> None:
    """Also where the only event elsewhere has the very time of the first target event."""
    user = COLD_NAMES[0]
    log = [(user, "a", 2), (user, *first), (user, "d", 5)]
    found = _sequences(tmp_path, log, [COLD], {user: True})
    assert _offsets(found["cold", "target", FIRST_INDEX]) == (2, 2, 2)
    assert _offsets(found["cold", "all", FIRST_INDEX]) == (3, 3, 3)


def test_cold_user_hashs_are_fixed_uniform_and_independent_of_domain_and_bucket() -> None:
    names = [f"u{number}" for number in range(20_000)]
    draws = np.array([[cold_user_hash(name, domain) for domain in ("target", "books")] for name in names])
    # The held-out users of a lake may never change.
    assert cold_user_hash("u0", "target") == pytest.approx(0.36426415549212643, abs=1e-15)
    assert np.abs(np.histogram(draws[:, 0], 20, (0, 1))[0] / 1_000 - 1).max() < 0.15
    cold = draws < 0.1
    assert abs(cold.all(1).mean() - 0.01) < 0.003
    buckets = np.array([bucket_of(name, 4) for name in names])
    assert np.abs([cold[buckets == bucket, 0].mean() - 0.1 for bucket in range(4)]).max() < 0.02


def test_cold_items_leave_the_training_part_with_all_their_events(tmp_path: Path) -> None:
    """In every domain; each run is in time order, and so are warm items that are held out beside cold ones."""
    log = [("u", item, time) for time, item in enumerate("abcdbacdbb")]
    found = _sequences(tmp_path, [*log, ("v", "a", 1), ("v", "c", 2)], [COLD_ITEMS], {"u": True, "v": True})
    row = found["cold-items", "all", 5]
    assert row["items"] == [B, D, B, A, A, D, C, C, B, B]
    assert row["times"] == [1, 3, 4, 0, 5, 7, 2, 6, 8, 9]
    assert _offsets(row) == (3, 6, 10)
    target = found["cold-items", "target", 5]  # two warm items, of four that would be needed to hold out any
    assert (target["items"], _offsets(target)) == ([D, D, C, C], (2, 2, 4))
    unread = found["cold-items", "all", 6]  # nothing is left to read
    assert (unread["items"], _offsets(unread)) == ([A, C], (0, 0, 0))


@pytest.mark.parametrize(("domain", "expected"), [(None, {"a": 1, "c": 2}), ("target", {"c": 2}), ("source", {"a": 1})])
def test_cold_items_are_chosen_by_their_hash(domain: str | None, expected: dict[str, int]) -> None:
    bits = {"a": 3, "b": 3, "c": 5, "d": 5}  # of all, source, target
    catalogue = reader.Catalogue(pa.array(list(bits)), np.array([A, B, C, D]), np.array(list(bits.values())))
    split = replaced(COLD_ITEMS, cold_items=ColdItemsConfig(share=0.3, validation=0.2, seed=6, domain=domain))
    found = cold_items.parts(catalogue, split, list(DOMAINS))
    assert {item: part for item, part in zip(bits, found[[A, B, C, D]].tolist(), strict=True) if part} == expected
    digest = hashlib.blake2b(b"6/c", digest_size=8).hexdigest()
    assert cold_item_hash("c", 6) == int(digest[:14], 16) // 2**3 / 2**53  # about 0.29
    share = np.mean([cold_item_hash(str(item), 0) < 0.15 for item in range(20_000)])
    assert abs(share - 0.15) < 4 * (0.15 * 0.85 / 20_000) ** 0.5


def test_baskets_are_in_order_with_the_last_held_out(tmp_path: Path) -> None:
    log = [
        ("u", "a", 1, None, None, "k"),
        ("u", "c", 1, None, None, "k"),
        ("u", "b", 2, None, None, "k"),
        ("u", "d", 3, None, None, "m"),
        ("u", "x", 4, None, None, "gone"),
        ("u", "a", 5, None, None, "n"),
        ("u", "c", 6, None, None, "o"),
        ("u", "a", 7, None, None, "p"),
        ("v", "a", 1, None, None, "k"),
        ("v", "b", 1),
    ]
    made = _made(tmp_path, log, BASKETS, [LAST, CAUSAL], {"u": True, "v": True})
    found = {
        key: [tuple(row[name] for name in ("basket", "time", "part", "items")) for row in rows]
        for key, rows in made.items()
    }
    assert found["last-2", "source", 5] == [(0, 1, "train", [A, B]), (1, 5, "validation", [A]), (2, 7, "test", [A])]
    assert found["last-2", "target", 5] == [(0, 1, "train", [C]), (1, 3, "validation", [D]), (2, 6, "test", [C])]
    assert found["causal", "target", 5] == found["last-2", "target", 5]
    assert found["causal", "source", 5] == [(0, 1, "train", [A, B])]  # the first held-out target item is at 3
    assert found["last-2", "all", 6] == [(0, 1, "train", [A])]
    assert [row[3] for row in found["last-2", "all", 5]] == [[A, C, B], [D], [A], [C], [A]]


def test_a_pause_begins_a_basket(tmp_path: Path) -> None:
    """Of whichever domain: an event elsewhere keeps a session up. The log's own baskets don't count."""
    minute = 60_000_000
    log = [
        ("u", item, int(at * minute), None, None, "k")
        for item, at in (("a", 0), ("c", 25), ("b", 50), ("a", 80), ("b", 110.1), ("d", 111))
    ] + [("v", "a", 112 * minute)]
    made = _made(tmp_path, log, BASKETS, [LAST], {"u": True, "v": True}, gap=30)
    assert [row["items"] for row in made["last-2", "all", 5]] == [[A, C, B, A], [B, D]]
    assert [row["items"] for row in made["last-2", "source", 5]] == [[A, B, A], [B]]
    assert [row["time"] for row in made["last-2", "target", 5]] == [25 * minute, 111 * minute]
    assert [row["items"] for row in made["last-2", "all", 6]] == [[A]]


@pytest.mark.parametrize("gap", [2.0, 500.0])
def test_sessions_equal_a_plain_loop(tmp_path: Path, gap: float) -> None:
    log = [
        (user, item, time * 1_000_000, *more)
        for user, item, time, *more in _random_log(5, size=300, times=200, full=True)
    ]
    users = {f"u{number}": True for number in range(40)}
    named = []
    for events_of in _histories(log, users, 1_000).values():
        session, before = 0, None
        for time, place, *_ in events_of:
            session += before is None or time - before > gap * 60_000_000
            named.append((place, f"s{session}"))
            before = time
    by_place = dict(named)
    told = [(*row[:5], by_place.get(place)) for place, row in enumerate(log)]
    assert _made(tmp_path, log, BASKETS, SPLITS, users, gap=gap) == _expected_baskets(told, users, SPLITS, 1_000)


def test_of_a_long_history_the_newest_events_are_kept(tmp_path: Path) -> None:
    log = [("u", "a", 5, None, None, "k"), ("u", "x", 9), ("u", "b", 3), ("u", "c", 5, None, None, "k"), ("u", "d", 5)]
    log += [("v", "a", 1)]
    found = _sequences(tmp_path / "s", log, [LAST], {"u": True, "v": True}, max_events=2)
    # x isn't kept, so it doesn't count; of three events at time 5 the last two of the log stay
    assert found["last-2", "all", 5]["items"] == [C, D]
    assert ("last-2", "source", 5) not in found
    assert found["last-2", "all", 6]["items"] == [A]
    made = _made(tmp_path / "b", log, BASKETS, [LAST], {"u": True, "v": True}, max_events=2)
    assert [row["items"] for row in made["last-2", "all", 5]] == [[C]]


# --- against plain loops ----------------------------------------------------------------------------------------------


def _random_log(seed: int, *, size: int, times: int, full: bool) -> list[tuple[Any, ...]]:
    """`times`: how many there are; few give many ties. `full`: with types, values and baskets."""
    draw = np.random.default_rng(seed)
    log = []
    for _ in range(size):
        user, item = int(draw.zipf(1.5)) % 40, "abcdx"[draw.integers(5)]
        more = (
            str(draw.choice(["view", "buy"])) if draw.random() < 0.3 else None,
            float(draw.integers(9)) if draw.random() < 0.2 else None,
            f"k{draw.integers(8)}" if draw.random() < 0.7 else None,
        )
        log.append((f"u{user}", item, int(draw.integers(times)) * 7 - 100, *(more if full else ())))
    return log


def _histories(log: Sequence[tuple[Any, ...]], users: Mapping[str, bool], most: int) -> dict[int, list[Any]]:
    """User index -> its kept events (time, place, item, event_type, value, basket), in order."""
    found: dict[int, list[Any]] = {}
    for place, row in enumerate(log):
        user, item, time, event_type, value, basket = (*row, None, None, None)[:6]
        if users.get(user) and ITEMS[item]:
            index = FIRST_INDEX + list(users).index(user)
            found.setdefault(index, []).append((time, place, item, event_type, value, basket))
    return {index: sorted(events, key=lambda event: event[:2])[-most:] for index, events in found.items()}


def _is_cold(events: Sequence[Any], split: SplitConfig, user: str) -> str:
    """The part that holds out the whole history of a user in the joint target; "" for none."""
    own = [event for event in events if event[2] in DOMAINS[split.joint_target or ""]]
    if split.cold_users is None or not own or sum(event[0] < own[0][0] for event in events) < split.min_train:
        return ""
    digest = hashlib.blake2b(f"{split.joint_target}/{user}".encode(), digest_size=8).hexdigest()
    share = int(digest, 16) / 16**16
    return "test" if share < split.cold_users else "validation" if share < 2 * split.cold_users else ""


def _first_held_out(events: Sequence[Any], split: SplitConfig, cold: str) -> Any:
    if split.cold_users is not None:
        own = [event for event in events if event[2] in DOMAINS[split.joint_target or ""]]
        return own[0] if cold else None
    own = [event for event in events if event[2] in DOMAINS[split.causal_target or split.joint_target or "all"]]
    held = split.validation + split.test
    return own[-held] if held and len(own) >= split.min_train + held else None


def _joint(history: list[Any], split: SplitConfig, cold: str) -> tuple[list[Any], int, int]:
    """A user's events as a joint split has them in the domain `all`, its end, and how many are held out."""
    first = _first_held_out(history, split, cold)
    late = [event for event in history if first is not None and event[:2] >= first[:2]]
    held = [event for event in late if event[2] in DOMAINS[split.joint_target or ""]]
    past = [event for event in late if event not in held] if split.causal_target else []
    trained = [event for event in history if event not in held and event not in past]
    return [*trained, *held, *past], len(trained) + len(held), len(held)


def _dates(split: SplitConfig) -> list[float]:
    """In microseconds since 1970."""
    ends = (split.train_until, split.validate_until, split.test_until)
    return [(dt.datetime.fromisoformat(end) - EPOCH) / MICROSECOND if end else float("inf") for end in ends]


def _joint_by_time(history: list[Any], split: SplitConfig) -> tuple[list[Any], list[int]]:
    """The same for a split by time, and where its parts begin and the last one ends."""
    first, second, third = _dates(split)
    inside = DOMAINS[split.joint_target or ""]
    trained = [event for event in history if event[0] < first]
    validated = [event for event in history if first <= event[0] < second and event[2] in inside]
    tested = [event for event in history if second <= event[0] < third and event[2] in inside]
    held = [*trained, *validated, *tested]
    ends = [len(trained), len(trained) + len(validated), len(held)]
    return held + [event for event in history if event not in held], ends


def _cold_items(own: list[Any], split: SplitConfig) -> tuple[list[Any], int, int, int]:
    """A user's events in the order of parts, how many are held out, how many of them for test, and where these end."""
    parts: dict[str, list[Any]] = {"b": [], "a": [], "c": []}  # warm, validation, test
    for event in own:
        parts[event[2] if event[2] in "ac" else "b"].append(event)
    warm, late, cold = parts["b"], [parts["a"], parts["c"]], parts["a"] + parts["c"]
    if len(warm) < split.min_train:
        in_time = sorted(cold, key=own.index)
        return warm + in_time, 0, 0, len(warm)
    if len(warm) >= split.min_train + split.validation + split.test:
        first = len(warm) - split.test - split.validation
        late[0] += warm[first : len(warm) - split.test]
        late[1] += warm[len(warm) - split.test :] if split.test else []
        warm = warm[:first]
    late = [sorted(events, key=own.index) for events in late]
    return warm + late[0] + late[1], sum(map(len, late)), len(late[1]), len(own)


def _expected_sequences(log: Any, users: Any, splits: Sequence[SplitConfig], most: int) -> dict[Any, Any]:
    expected = {}
    for index, history in _histories(log, users, most).items():
        for split, (domain, inside) in itertools.product(splits, DOMAINS.items()):
            cold = _is_cold(history, split, list(users)[index - FIRST_INDEX]) if split.cold_users else ""
            own = [event for event in history if event[2] in inside]
            end = len(own)
            if split.causal_target not in (None, domain) and (first := _first_held_out(history, split, cold)):
                end = sum(event[:2] < first[:2] for event in own)
            num_held = split.validation + split.test if end >= split.min_train + split.validation + split.test else 0
            if split.joint_target and domain == "all":
                own, end, num_held = _joint(history, split, cold)
            num_test = split.test if num_held else 0
            if split.train_until:
                before = [sum(event[0] < date for event in own) for date in _dates(split)]
                if split.joint_target and domain == "all":
                    own, before = _joint_by_time(history, split)
                end, num_held, num_test = before[2], before[2] - before[0], before[2] - before[1]
            if split.cold_users and domain in ("all", split.joint_target):
                num_held = sum(event[2] in DOMAINS[split.joint_target or ""] for event in own) if cold else 0
                num_test = num_held if cold == "test" else 0
            if split.cold_items:
                own, num_held, num_test, end = _cold_items(own, split)
            if own:
                expected[split.name, domain, index] = {
                    "user": index,
                    "items": [FIRST_INDEX + list(ITEMS).index(event[2]) for event in own],
                    "times": [event[0] for event in own],
                    "event_types": [event[3] for event in own] if any(event[3] is not None for event in own) else None,
                    "values": [event[4] for event in own] if any(event[4] is not None for event in own) else None,
                    "valid_start": end - num_held,
                    "test_start": end - num_test,
                    "end": end,
                }
    return expected


def _expected_baskets(log: Any, users: Any, splits: Sequence[SplitConfig], most: int) -> dict[Any, Any]:
    expected: dict[Any, Any] = {}
    for index, history in _histories(log, users, most).items():
        for split, (domain, inside) in itertools.product(splits, DOMAINS.items()):
            if split.cold_users or split.cold_items or (split.joint_target and domain == "all"):
                continue
            own = [event for event in history if event[2] in inside and event[5] is not None]
            if split.causal_target not in (None, domain) and (first := _first_held_out(history, split, "")):
                own = [event for event in own if event[0] < first[0]]
            lists: dict[tuple[str, int], list[Any]] = {}
            for event in own:
                passed = sum(event[0] >= date for date in _dates(split)) if split.train_until else 0
                lists.setdefault((event[5], passed), []).append(event)
            for number, basket in enumerate(lists.values()):
                parts = ["train"] * (len(lists) - 2) + ["validation", "test"]
                if split.train_until:
                    passed = sum(basket[0][0] >= date for date in _dates(split))
                    if passed == 3:
                        continue
                    parts = [["train", "validation", "test"][passed]] * max(len(lists), 3)
                row = {
                    "user": index,
                    "basket": number,
                    "time": basket[0][0],
                    "part": parts[number] if len(lists) >= 3 or split.train_until else "train",
                    "items": [FIRST_INDEX + list(ITEMS).index(event[2]) for event in basket],
                }
                expected.setdefault((split.name, domain, index), []).append(row)
    return expected


def _mixed(z: int) -> int:
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
    return z ^ z >> 31


def _turn(row: Sequence[Any], split: SplitConfig) -> Any:
    """What orders an event among those of its user and time."""
    if split.ties == "item":
        return row[1]
    user, item = (
        int(hashlib.blake2b(f"{split.ties_seed}/{raw}".encode(), digest_size=8, person=b"ties").hexdigest(), 16)
        for raw in row[:2]
    )
    return _mixed(user ^ _mixed(item ^ _mixed(row[2] % 2**64)))


def _by_split(expect: Any, log: Sequence[Any], users: Any, splits: Sequence[SplitConfig], most: int) -> dict[Any, Any]:
    """What is expected of each split: that of a log whose lines have its order."""
    expected: dict[Any, Any] = {}
    for split in splits:
        lines = log
        if split.ties != "file":
            held = {event[1] for events in _histories(log, users, most).values() for event in events}
            kept = [row for place, row in enumerate(log) if place in held]
            lines = sorted(kept, key=lambda row, split=split: (row[2], _turn(row, split)))
        expected |= expect(lines, users, [replaced(split, ties="file", ties_seed=0)], most)
    return expected


def _at(microseconds: int) -> str:
    return (EPOCH + microseconds * MICROSECOND).isoformat()


SPLITS = (
    SplitConfig(),
    CAUSAL,
    SplitConfig(name="strict", validation=0, test=1, min_train=4, causal_target="source"),
    SplitConfig(name="none", validation=0, test=0, causal_target="target"),
    SplitConfig(name="joint", validation=2, test=1, joint_target="target"),
    SplitConfig(name="joint-causal", validation=1, test=2, joint_target="source", causal_target="source"),
    SplitConfig(name="joint-none", validation=0, test=0, joint_target="target"),
    SplitConfig(name="cold-users", cold_users=0.3, joint_target="target", causal_target="target"),
    SplitConfig(name="cold-source", cold_users=0.4, joint_target="source", min_train=2, validation=1, test=1),
    COLD_ITEMS,
    SplitConfig(name="time-ties", train_until=_at(-93), validate_until=_at(-86), test_until=_at(-80)),
    SplitConfig(name="time", train_until=_at(9_000), validate_until=_at(30_000)),
    SplitConfig(
        name="time-joint", train_until=_at(-93), validate_until=_at(30), test_until=_at(9_000), joint_target="target"
    ),
)
EAGER = SplitConfig(name="cold", cold_users=0.3, joint_target="target", causal_target="target")
BY_TIME = SplitConfig(name="time", train_until=_at(-50), validate_until=_at(3), test_until=_at(30_000))
BY_ITEM = SplitConfig(name="a-by-item", validation=1, test=1, causal_target="target", ties="item")
SCRAMBLED = SplitConfig(name="scrambled", validation=1, test=1, ties="scrambled", ties_seed=3)
DAYS_SPLITS = (
    BY_ITEM,
    SplitConfig(name="a-joint", joint_target="target"),
    EAGER,
    COLD_ITEMS,
    LAST,
    CAUSAL,
    BY_TIME,
    SCRAMBLED,
)  # a joint row first


@pytest.mark.parametrize("most", [1_000, 9])
@pytest.mark.parametrize(("part", "chunk"), [(1 << 22, 1 << 20), (50, 16), (1, 1)])
@pytest.mark.parametrize(("times", "full"), [(3, True), (10_000, True), (30, False)])
def test_tables_equal_plain_loops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, times: int, full: bool, part: int, chunk: int, most: int
) -> None:
    """Whatever the parts a bucket is cut into, the files the log lies in, ties, and how long a history may be."""
    monkeypatch.setattr(reader, "PART_EVENTS", part)
    monkeypatch.setattr(reader, "CHUNK_EVENTS", chunk)
    log = _random_log(times, size=700, times=times, full=full)
    users = {f"u{number}": number % 7 != 3 for number in range(35)}  # the log has users that the vocabulary lacks
    shown: list[dict[str, Any]] = []
    made = _made(tmp_path / "s", log, SEQUENCES, SPLITS, users, max_events=most, files=3, shown=shown)
    expected = _expected_sequences(log, users, SPLITS, most)
    assert {key: row for key, (row,) in made.items()} == expected
    partitions = {json.dumps(entry["partition"]) for entry in shown}
    if most == 1_000:
        assert (len(shown) > len(partitions)) == (part < most)
    made = _made(tmp_path / "b", log, BASKETS, SPLITS, users, max_events=most, files=2)
    assert made == _expected_baskets(log, users, SPLITS, most)


@pytest.mark.parametrize(("ties", "seed"), [("item", 0), ("scrambled", 0), ("scrambled", 7)])
@pytest.mark.parametrize(("part", "most"), [(1 << 22, 1_000), (50, 9)])
def test_each_rule_for_ties_equals_files_in_that_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ties: Any, seed: int, part: int, most: int
) -> None:
    """For all kinds of splits, beside the same ones in the order of the files. Which events a long history keeps is
    decided by the files."""
    monkeypatch.setattr(reader, "PART_EVENTS", part)
    log = _random_log(8, size=700, times=6, full=True)
    users = {f"u{number}": number % 7 != 3 for number in range(35)}
    tied = [replaced(split, name=f"tied-{split.name}", ties=ties, ties_seed=seed) for split in SPLITS]
    tied = [split for split in tied if split.cold_items is None]  # whose parts are named by split
    both = [one for pair in zip(SPLITS, tied, strict=False) for one in pair]
    made = _made(tmp_path / "s", log, SEQUENCES, both, users, max_events=most, files=3)
    found = {key: row for key, (row,) in made.items()}
    assert found == _by_split(_expected_sequences, log, users, both, most)
    assert any(
        found[f"tied-{split}", *key]["items"] != row["items"]
        for (split, *key), row in found.items()
        if f"tied-{split}" in {one.name for one in tied}
    )
    made = _made(tmp_path / "b", log, BASKETS, both, users, max_events=most, files=2)
    assert made == _by_split(_expected_baskets, log, users, both, most)


def test_the_seed_scrambles_only_ties_and_each_differently(tmp_path: Path) -> None:
    log = [("u", item, 1) for item in "abcd"] + [("u", item, 2) for item in "dcba"]
    splits = [SplitConfig(name=f"s{seed}", ties="scrambled", ties_seed=seed) for seed in range(20)]
    found = _sequences(tmp_path, log, splits, {"u": True})
    orders = [tuple(found[split.name, "all", 5]["items"]) for split in splits]
    assert all(sorted(order[:4]) == sorted(order[4:]) == [A, B, C, D] for order in orders)
    assert len(set(orders)) == len(orders)
    assert any(order[:4] != order[4:] for order in orders)  # the time counts too


def test_items_are_ordered_as_numbers_where_they_are() -> None:
    raw = ["10", "9", "b", "a10", "a9", "٣", "007", "7", "1" * 30]
    catalogue = reader.Catalogue(pa.array(raw), np.arange(len(raw))[::-1].copy(), np.ones(len(raw), np.int64))
    one = np.zeros(len(raw), np.int64)
    given = reader.Histories(np.array([5]), one, catalogue.index, one + 1, one, {}, pa.array(["u"]), catalogue)
    found = ties.in_order(given, SplitConfig(ties="item"))
    order = [raw[len(raw) - 1 - index] for index in found.item.tolist()]
    assert order == ["007", "7", "9", "10", "1" * 30, "a10", "a9", "b", "٣"]


@pytest.mark.parametrize(
    ("times", "full", "part", "most"),
    [(3, True, 1 << 21, 1_000), (10_000, True, 60, 1_000), (30, False, 1 << 21, 9), (3, True, 60, 9)],
)
def test_rows_copied_or_renewed_equal_plain_loops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, times: int, full: bool, part: int, most: int
) -> None:
    """Day after day: late events and ties, types and values for the first time, new users and items, users who are kept
    from now on or no longer. The old log isn't even named where no old event counts that didn't before."""
    for module in (bucket_writer, reader, incremental):
        monkeypatch.setattr(module, "PART_EVENTS", part)
    names, rows = list(DOMAINS), partial(sequences.rows, names=list(DOMAINS), splits=DAYS_SPLITS)
    rows = partial(rows, cold_parts=COLD_PARTS)
    everyone = {f"u{number}": True for number in range(30)}
    first = [(user, "a", 5) for user in everyone]
    more = {f"u{number}": True for number in range(30, 40)}
    days = [  # events, kept users, items, whether the log so far is needed
        ([*first, *_random_log(1, size=150, times=times, full=False)], everyone, "abc", True),
        ([("u30", "a", 5), *_random_log(2, size=60, times=times, full=full)], everyone | {"u30": True}, "abcxd", False),
        (_random_log(3, size=60, times=times, full=full), everyone | {"u30": True, "u2": False}, "abcxd", False),
        ([], everyone | {"u30": True, "u2": False, "u1": False}, "abcxd", False),
        (_random_log(4, size=20, times=times, full=full), everyone | more, "abcxd", True),
    ]
    log: list[tuple[Any, ...]] = []
    before = None
    for number, (day, users, known, needed) in enumerate(days):
        if not number:  # nothing of u30 and d so far
            day = [row for row in day if row[0] != "u30" and row[1] != "d"]
            write_table(tmp_path, INTERACTIONS, events(day), files=2)
        held = {file.path for file in snapshot_files(str(tmp_path), INTERACTIONS)}
        if number and day:
            write_table(tmp_path, INTERACTIONS, events(day, first=len(log)), mode="append")
        log += day
        degree = {user: sum(row[0] == user for row in log) for user in users}
        items = {item: keep for item, keep in ITEMS.items() if item in known}
        members = [
            {"domain": name, "item": item, "index": FIRST_INDEX + list(ITEMS).index(item), "rule": name}
            for name, inside in DOMAINS.items()
            for item in inside
            if item in known
        ]
        versions = {INTERACTIONS.name: DeltaTable(tmp_path / INTERACTIONS.name).version()}
        for table, content in (
            (USERS, vocabulary("user", users, degree)),
            (ITEMS_TABLE, vocabulary("item", items, {})),
            (DOMAINS_TABLE, members),
        ):
            versions[table.name] = write_table(tmp_path, table, content).version
        read = reader.inputs(str(tmp_path), versions, names=names, columns=("event_type", "value"), max_events=most)
        if number:
            appended = [file for file in snapshot_files(str(tmp_path), INTERACTIONS) if file.path not in held]
            before = incremental.previous_state(str(tmp_path), None, appended, [LAST.name, CAUSAL.name])
            assert before is not None
            if not needed and most > len(log) and part > len(log):
                read = replace(read, log={})
        kept = [row | {"bucket": bucket_of(row["user"], BUCKETS)} for row in vocabulary("user", users, degree)]
        batch = pa.RecordBatch.from_pylist([row for row in kept if row["kept"]], schema=_USERS)
        (tmp_path / SEQUENCES.name).mkdir(exist_ok=True)
        ordinal = SEQUENCES.of(TIME_ORDINAL)
        written = bucket_writer.write_task([batch], BucketWork(rows, str(tmp_path), ordinal, read, before))
        files = data_files(entry for batch in written for entry in batch["file"].to_pylist())
        commit_files(
            str(tmp_path), ordinal, files, Commit(mode="overwrite", app=f"{number}", app_version=0, metadata={})
        )
        found: dict[Any, Any] = {}
        for file in snapshot_files(str(tmp_path), SEQUENCES):
            written = pq.ParquetFile(tmp_path / SEQUENCES.name / file.path).read().to_pylist()
            assert written == sorted(written, key=lambda row: row["user"])
            for row in written:
                key = (file.partition["split"], file.partition["domain"], row["user"])
                assert found.setdefault(key, row) is row
        assert found == _by_split(_expected_sequences, log, users, DAYS_SPLITS, most)


@pytest.mark.parametrize("scale", [1, 10**6, 10**15])
@pytest.mark.parametrize("users", [1, 50, 2**31 - 1])
def test_time_order_equals_polars(users: int, scale: int) -> None:
    """Also where user and time don't fit into one number, and where times differ by more than an int64 holds."""
    draw = np.random.default_rng(0)
    user = draw.integers(0, users, 3_000).astype(np.int32)
    time = draw.integers(-9_000, 9_000, 3_000) // 100 * 100 * scale + draw.integers(0, 2, 3_000)
    source_order = draw.permutation(3_000)
    rows = pl.DataFrame({"user": user, "time": time, "source_order": source_order}).with_row_index("row")
    expected = rows.sort("user", "time", "source_order")["row"].to_list()
    assert reader.time_order(user, time, source_order).tolist() == expected


def test_long_lists_make_small_row_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bucket_writer, "ROW_GROUP_BYTES", 1_000)
    monkeypatch.setattr("etl.lake.spark_io.ROW_GROUP_BYTES", 1_000)
    log = [(f"u{number % 9}", "a", number) for number in range(450)]
    shown: list[dict[str, Any]] = []
    _made(tmp_path, log, SEQUENCES, [LAST], {f"u{number}": True for number in range(9)}, shown=shown)
    for entry in shown:
        metadata = pq.read_metadata(tmp_path / "sequences" / entry["path"])
        # 50 events of 12 bytes each and offsets: one user's row is all that goes into a group
        assert [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)] == [1] * (
            metadata.num_rows
        )


def test_files_of_two_engines_are_read_as_one(tmp_path: Path) -> None:
    """What one engine calls nullable, the other doesn't."""
    log, bucket = [("u", "a", 1), ("u", "b", 2)], bucket_of("u", BUCKETS)
    versions = write_lake(tmp_path, log, users={"u": True}, items=ITEMS, domains=DOMAINS)
    read = reader.inputs(str(tmp_path), versions, names=list(DOMAINS), columns=(), max_events=9)
    (path,) = read.log[bucket]
    nullable = pa.schema([field.with_nullable(True) for field in INTERACTIONS.schema if field.name != "bucket"])
    pq.write_table(
        pa.Table.from_pylist(events([("u", "c", 3)], first=2), nullable), tmp_path / "interactions" / "other.parquet"
    )
    read = replace(read, log={bucket: (path, "other.parquet")})
    catalogue = reader.read_catalogue(read)
    (found,) = reader.events_of(pa.array(["u"]), bucket, catalogue, read)
    assert found["time"].to_pylist() == [1, 2, 3]


def test_a_damaged_file_of_the_log_is_named(tmp_path: Path) -> None:
    log = [("u", "a", 1), ("u", "b", 2)]
    versions = write_lake(tmp_path, log, users={"u": True}, items=ITEMS, domains=DOMAINS)
    read = reader.inputs(str(tmp_path), versions, names=list(DOMAINS), columns=(), max_events=9)
    (path,) = (tmp_path / INTERACTIONS.name).rglob("*.parquet")
    path.write_bytes(path.read_bytes()[:-50] + b"\0" * 50)
    users = pa.RecordBatch.from_pylist([{"bucket": bucket_of("u", BUCKETS), "user": "u", "index": 5, "degree": 2}])
    rows = partial(sequences.rows, names=list(DOMAINS), splits=[LAST])
    with pytest.raises(GraftrecError, match=r"bucket=\d/part-[\w.]+: expected the bytes once written"):
        list(bucket_writer.write_task([users], BucketWork(rows, str(tmp_path), SEQUENCES, read)))
    assert not list((tmp_path / "sequences").rglob("*.parquet"))


def test_splits_that_cannot_be_made_are_refused() -> None:
    def config(*splits: SplitConfig) -> EtlConfig:
        return EtlConfig(source=GeneratorSource(), domains=(DomainConfig(name="target"),), splits=splits)

    sequences.check(config(LAST, SplitConfig(name="causal", causal_target="target")))
    for splits, message in [
        ((), "at least one"),
        ((LAST, LAST), "different names"),
        ((SplitConfig(causal_target="elsewhere"),), "'elsewhere'"),
        ((SplitConfig(joint_target="elsewhere"),), "joint_target.*'elsewhere'"),
        ((SplitConfig(joint_target="all"),), "joint_target.*'all'"),
        ((SplitConfig(joint_target="all", causal_target="target"),), "joint_target"),
        ((SplitConfig(joint_target="target", causal_target="all"),), "same domain"),
        ((SplitConfig(cold_users=0.1),), "cold_users: expected a joint_target"),
        ((SplitConfig(train_until="May"),), r"splits.last-5.train_until: expected a date .* found 'May'"),
        ((SplitConfig(validate_until="2024-01-01"),), "expected train_until beside"),
        ((SplitConfig(train_until="2024-01-02", validate_until="2024-01-01"),), "put the dates in order"),
        ((SplitConfig(train_until="2024-01-02", test_until="2024-01-02"),), "put the dates in order"),
        ((SplitConfig(train_until="2024-01-02", causal_target="target"),), "leave it out"),
        ((SplitConfig(train_until="2024-01-02", joint_target="target", cold_users=0.1),), "leave it out"),
        ((SplitConfig(train_until="2024-01-02", cold_items=ColdItemsConfig()),), "leave it out"),
        ((SplitConfig(ties="item", ties_seed=1),), "ties_seed: expected ties scrambled"),
        ((SplitConfig(cold_items=ColdItemsConfig(), joint_target="target"),), "make two splits"),
        ((SplitConfig(cold_items=ColdItemsConfig(domain="elsewhere")),), "cold_items.domain.*'elsewhere'"),
    ]:
        with pytest.raises(ConfigError, match=message):
            sequences.check(config(*splits))


def _run(spark: SparkSession, lake: Path) -> dict[str, Outcome]:
    """The two jobs on a lake, with splits that look across domains."""
    domains = (DomainConfig(name="source"), DomainConfig(name="target"))
    made = RunContext(
        EtlConfig(lake=str(lake), source=GeneratorSource(), domains=domains, splits=(LAST, CAUSAL, COLD_ITEMS))
    )
    made.spark = spark
    found = {}
    for job in (sequences.JOB, baskets.JOB):
        due_run = plan_run(job, made)
        found[job.name] = job.run(due_run) if isinstance(due_run, Run) else due_run
    return found


def _rows(lake: Path, table: Table) -> list[dict[str, Any]]:
    return pl.read_delta(str(lake / table.name)).sort(table.key).to_dicts()


@pytest.mark.slow
def test_a_new_day_makes_only_the_buckets_it_touches_anew(spark: SparkSession, tmp_path: Path) -> None:
    """And the tables equal those made of everything at once, whatever the day changes."""
    log = _random_log(1, size=300, times=50, full=True)
    users = {f"u{number}": number % 7 != 3 for number in range(40)}
    lake = tmp_path / "days"
    write_lake(lake, log, users=users, items=ITEMS, domains=DOMAINS)
    assert _run(spark, lake)["sequences"].committed
    assert not _run(spark, lake)["sequences"].committed
    one = bucket_of("u1", BUCKETS)
    late = next(user for user, keep in users.items() if not keep and bucket_of(user, BUCKETS) != one)
    days: list[tuple[list[Any], dict[str, bool], dict[str, bool], set[int]]] = [
        ([("u1", "a", 99, "buy", None, "k9")], users, ITEMS, {one}),
        ([("u1", "b", 100)], users | {late: True}, ITEMS, {one, bucket_of(late, BUCKETS)}),  # becomes kept
        ([("u1", "b", 101)], users | {late: True}, ITEMS | {"x": True}, set(range(BUCKETS))),  # old rows count now
    ]
    for number, (day, users_now, items_now, expected) in enumerate(days):
        before = {file.path for table in (SEQUENCES, BASKETS) for file in snapshot_files(str(lake), table)}
        write_table(lake, INTERACTIONS, events(day, first=len(log)), mode="append")
        log = [*log, *day]
        degree = {user: sum(row[0] == user for row in log) for user in users_now}
        write_table(lake, USERS, vocabulary("user", users_now, degree))
        write_table(lake, ITEMS_TABLE, vocabulary("item", items_now, {}))
        _run(spark, lake)
        after = [file for table in (SEQUENCES, BASKETS) for file in snapshot_files(str(lake), table)]
        assert {int(file.partition["bucket"] or 0) for file in after if file.path not in before} == expected
        rebuilt = tmp_path / f"rebuilt-{number}"
        write_lake(rebuilt, log, users=users_now, items=items_now, domains=DOMAINS)
        _run(spark, rebuilt)
        for table in (SEQUENCES, BASKETS):
            assert _rows(lake, table) == _rows(rebuilt, table)
