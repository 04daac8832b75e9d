"""When events were, from the table to the batch: read where it is wanted, and by what the table has."""

import numpy as np
import pyarrow.parquet as pq
import pytest

from etl import tables
from etl.tables import PAD
from tests.fixtures.lakes import build_tiny_lake
from trainer.config import DataConfig
from trainer.data.catalogue import read_catalogue
from trainer.data.events import Events
from trainer.data.held_out import ReadOptions, read_held_out
from trainer.data.loader import Loader
from trainer.data.release import DataError, pin
from trainer.data.sequences import SequenceDataset


def loader_of(lake, *, times, max_length=6):
    release = pin(lake, None)
    dataset = SequenceDataset(release, "last-5", "source", times=times)
    catalogue = read_catalogue(release, "source")
    config = DataConfig(lake=lake, domain="source", unknown_users=0)
    return Loader(dataset, catalogue, config, batch_size=7, max_length=max_length, seed=3)


def test_a_batch_has_the_time_of_each_of_its_items(tiny_lake):
    release = pin(tiny_lake, None)
    whole = SequenceDataset(release, "last-5", "source").read_all(times=True)
    catalogue = read_catalogue(release, "source")
    rows = catalogue.rows(whole.items)
    time_of = {
        (int(user), int(rows[place])): int(whole.times[place])  # items are distinct within a user
        for user, start, stop in zip(whole.users, whole.offsets, whole.offsets[1:], strict=False)
        for place in range(start, stop)
    }
    seen = 0
    for batch in loader_of(tiny_lake, times=True):
        assert batch.times.shape == batch.items.shape
        assert batch.request_times is None
        for row, user in enumerate(batch.users.tolist()):
            for place in range(int(batch.lengths[row])):
                assert batch.times[row, place].item() == time_of[user, batch.items[row, place].item()]
                seen += 1
    assert seen > 250


def test_without_times_the_batches_are_the_same_and_have_none(tiny_lake):
    for with_times, without in zip(loader_of(tiny_lake, times=True), loader_of(tiny_lake, times=False), strict=True):
        assert without.times is None
        assert with_times.items.equal(without.items)
        assert with_times.draw == without.draw
        assert (with_times.items == PAD).any() or with_times.mask_BT.all()


def test_only_columns_that_are_wanted_are_read(tiny_lake, monkeypatch):
    read, whole = [], pq.ParquetFile.read_row_group

    def noted(self, number, columns=None, **more):
        read.append(columns)
        return whole(self, number, columns, **more)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", noted)
    next(iter(loader_of(tiny_lake, times=False)))
    assert read
    assert not any("times" in columns for columns in read)
    read.clear()
    next(iter(loader_of(tiny_lake, times=True)))
    assert all("times" in columns for columns in read)


def test_events_keep_the_times_of_requests():
    events = Events(
        np.array([3, 5, 9]),
        np.array([0, 2, 3, 3]),
        {"items": np.array([7, 8, 9]), "times": np.array([1, 2, 3])},
        request_times=np.array([10, 20, 30]),
    )
    assert events.take(np.array([2, 0])).request_times.tolist() == [30, 10]
    assert events.keep(np.array([True, False, True])).request_times.tolist() == [10, 20, 30]
    assert events.until(np.array([1, 1, 1])).newest(1).request_times.tolist() == [10, 20, 30]
    assert events.of_users(np.array([5, 6])).request_times.tolist()[0] == 20
    assert events.in_time_order().with_columns(items=np.array([1, 1, 1])).request_times.tolist() == [10, 20, 30]


@pytest.mark.parametrize("part", ["validation", "test"])
def test_users_who_hold_something_out_ask_when_they_had_it(tiny_lake, part):
    release = pin(tiny_lake, None)
    catalogue = read_catalogue(release, "target")
    held_out = read_held_out(release, "last-5", "target", catalogue, part, ReadOptions(times=True))
    sequences = SequenceDataset(release, "last-5", "target").read_all(times=True)
    start = sequences.valid_start if part == "validation" else sequences.test_start
    first = {
        int(u): int(sequences.times[o + s])
        for u, o, s, e in zip(sequences.users, sequences.offsets, start, sequences.end, strict=False)
        if s < e
    }
    assert dict(zip(held_out.users.tolist(), held_out.histories.request_times.tolist(), strict=True)) == first
    some = held_out.take(np.array([2, 4]))
    assert some.histories.request_times.tolist() == held_out.histories.request_times[[2, 4]].tolist()
    without = read_held_out(release, "last-5", "target", catalogue, part, ReadOptions())
    assert without.histories.request_times is None


def test_a_table_says_whether_it_has_times(tiny_lake, tmp_path, monkeypatch):
    assert pin(tiny_lake, None).has_times(tables.SEQUENCES)
    monkeypatch.setitem(tables.TABLES, "sequences", tables.SEQUENCES.of(tables.TIME_ORDINAL))
    release = pin(build_tiny_lake(tmp_path / "ordered"), None)
    assert not release.has_times(tables.SEQUENCES)
    with pytest.raises(DataError, match=r"expected a log with times, which m reads .*columns.time, time_unit"):
        release.require_times(tables.SEQUENCES, "m")


def test_a_row_without_times_is_damage_where_they_are_read(tmp_path, monkeypatch):
    from tests.fixtures import lakes

    whole = lakes._sequences

    def without(*given):
        return [{**row, "times": None} if row["user"] == 9 else row for row in whole(*given)]

    monkeypatch.setattr(lakes, "_sequences", without)
    lake = build_tiny_lake(tmp_path / "lake")
    assert list(loader_of(lake, times=False))
    with pytest.raises(DataError, match="expected a time of each of"):
        list(loader_of(lake, times=True))
