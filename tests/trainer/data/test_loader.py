"""Batches: what a plain loop over rows would make, resumed anywhere, whatever the ranks; and bad tables, by name."""

import gc
import itertools
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from etl.lake.commit import Commit, commit_files
from etl.lake.datafile import DataFile, file_schema
from etl.settings import ConfigError
from etl.tables import FIRST_INDEX, MASK, PAD, SEQUENCES, UNK
from tests.fixtures.lakes import build_tiny_lake
from tests.fixtures.places import ROOT
from trainer.config import Bert4RecConfig, DataConfig, LossConfig, MaskedItemConfig, NextItemConfig
from trainer.data import order
from trainer.data.catalogue import Catalogue, Texts, read_catalogue
from trainer.data.loader import Loader, Share
from trainer.data.release import DataError, Release, pin
from trainer.data.sequences import SequenceDataset, Sequences
from trainer.models import ModelSizes, build_model
from trainer.tasks import build_task

NUM_ITEMS = 40
SPLIT, DOMAIN = "leave-one-out", "all"
PLACE = f"split={SPLIT}/domain={DOMAIN}/bucket="


def sequences_of(random, num_users, longest):
    """Rows of SEQUENCES without the partition columns; some training parts are empty."""
    rows = []
    for user in range(FIRST_INDEX, FIRST_INDEX + num_users):
        end = int(random.integers(1, longest + 1))
        valid, test = sorted(random.integers(0, end + 1, 2).tolist())
        items = (FIRST_INDEX + random.integers(0, NUM_ITEMS + 10, end)).tolist()  # some beyond the catalogue
        rows.append({"user": user, "items": items, "valid_start": valid, "test_start": test, "end": end})
    return rows


def write(lake, bucket, rows, *, group_rows=7, schema=None):
    """One data file, as the ETL writes it."""
    schema = schema or file_schema(SEQUENCES)
    path = f"{PLACE}{bucket}/part-{bucket}.zstd.parquet"
    place = Path(lake) / SEQUENCES.name / path
    place.parent.mkdir(parents=True, exist_ok=True)
    times = [row | {"times": list(range(len(row["items"]))), "event_types": None, "values": None} for row in rows]
    table = pa.Table.from_pylist(times, schema=schema)
    pq.write_table(table, place, row_group_size=group_rows, compression="zstd", write_page_checksum=True)
    return DataFile(path, {"split": SPLIT, "domain": DOMAIN, "bucket": str(bucket)})


def commit(lake, files):
    done = commit_files(str(lake), SEQUENCES, files, Commit(mode="append", app="t", app_version=1, metadata={}))
    return Release(str(lake), 1, {SEQUENCES.name: done.version})


def same_arrays(left: Sequences, right: Sequences) -> bool:
    """Whether all columns of two reads are equal."""

    def of(read: Sequences) -> dict[str, np.ndarray]:
        return {**vars(read), **read.columns, "columns": np.array(sorted(read.columns))}

    return all(np.array_equal(of(left)[name], of(right)[name]) for name in of(left))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(dataset, rows by user): three buckets, row groups of seven rows."""
    lake = tmp_path_factory.mktemp("sequences")
    rows = sequences_of(np.random.default_rng(0), 150, 30)
    release = commit(lake, [write(lake, bucket, rows[bucket::3]) for bucket in range(3)])
    return SequenceDataset(release, SPLIT, DOMAIN), {row["user"]: row for row in rows}


@pytest.fixture(scope="module")
def catalogue():
    """Every other item: global index 5, 7, 9… is row 5, 6, 7…"""
    index = np.concatenate([np.arange(FIRST_INDEX), FIRST_INDEX + np.arange(0, NUM_ITEMS, 2)])
    return Catalogue(index, [""] * len(index), [""] * len(index))


def loader_of(made, catalogue, *, batch_size=8, max_length=12, rank=0, world_size=1, seed=3, **settings):
    config = DataConfig(split=SPLIT, domain=DOMAIN, **({"block_rows": 30} | settings))
    return Loader(
        made[0],
        catalogue,
        config,
        batch_size=batch_size,
        max_length=max_length,
        seed=seed,
        share=Share(rank, world_size),
    )


def epoch_of(loader):
    return [(b.items, b.lengths, b.users, b.global_rows, b.rows, b.draw, b.global_items) for b in loader]


def same(left, right):
    return len(left) == len(right) and all(
        all(torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in zip(a, b, strict=True))
        for a, b in zip(left, right, strict=True)
    )


def plain_epoch(made, catalogue, loader):
    """The same epoch by a loop over rows: order from `order`'s blocks and a permutation, windows and hidden users from
    the documented draws."""
    dataset, rows = made
    known = {int(index): row for row, index in enumerate(catalogue.global_index)}
    config, epoch, seed, T = loader.config, loader.epoch, loader.seed, loader.max_length
    blocks = order.blocks_of(dataset.rows_per_group, block_rows=config.block_rows, seed=seed, epoch=epoch)
    for number, groups in enumerate(blocks):
        users = np.concatenate([dataset.read([int(group)]).users for group in groups])
        users = users[np.random.default_rng([seed, epoch, 1, number]).permutation(len(users))]
        draws = np.random.default_rng([seed, epoch, 2, number]).random((2, len(users)))
        for first in range(0, len(users), loader.batch_size):
            chosen = users[first : first + loader.batch_size]
            windows, hidden = draws[:, first : first + loader.batch_size]
            items = []
            for user, draw in zip(chosen, windows, strict=True):
                trained = rows[user]["items"][: rows[user]["valid_start"]]
                start = max(len(trained) - T, 0)
                if config.window == "random" and draw >= 0.5:
                    start = int((draw - 0.5) * 2 * (start + 1))
                items.append([known.get(item, UNK) for item in trained[start : start + T]])
            yield (
                items,
                [UNK if hide < config.unknown_users else int(user) for user, hide in zip(chosen, hidden, strict=True)],
            )


@pytest.mark.parametrize("window", ["last", "random"])
@pytest.mark.parametrize(("batch_size", "max_length", "block_rows"), [(8, 12, 30), (5, 100, 150), (30, 1, 31)])
@pytest.mark.parametrize("world_size", [1, 3])
def test_batches_are_those_of_a_plain_loop(window, batch_size, max_length, block_rows, world_size, made, catalogue):
    settings = {"batch_size": batch_size, "max_length": max_length, "block_rows": block_rows, "window": window}
    loaders = [
        loader_of(made, catalogue, **settings, rank=rank, world_size=world_size, unknown_users=0.3)
        for rank in range(world_size)
    ]
    for epoch in range(2):
        expected = list(plain_epoch(made, catalogue, loaders[0]))
        assert len(expected) == loaders[0].num_steps
        for step, (batches, (items, users)) in enumerate(zip(zip(*loaders, strict=True), expected, strict=True)):
            width = max(map(len, items))
            padded = [row + [PAD] * (max(width, 1) - len(row)) for row in items]
            assert torch.cat([batch.items for batch in batches]).tolist() == padded
            assert torch.cat([batch.lengths for batch in batches]).tolist() == [len(row) for row in items]
            assert torch.cat([batch.users for batch in batches]).tolist() == users
            assert {batch.items.dtype for batch in batches} == {torch.int64}
            for batch in batches:
                assert (batch.global_rows, batch.draw) == (len(items), (3, epoch, step))
                assert batch.global_items == sum(map(len, items))
        assert [loader.state_dict() for loader in loaders] == [{"epoch": epoch + 1, "step": 0}] * world_size


@pytest.mark.parametrize("cache_bytes", [0, 2_000, 1 << 30])
def test_every_user_once_an_epoch_in_another_order_each(cache_bytes, made, catalogue):
    loader = loader_of(made, catalogue, unknown_users=0.0, cache_bytes=cache_bytes)
    seen = [torch.cat([users for _, _, users, *_ in epoch_of(loader)]).tolist() for _ in range(3)]
    assert all(sorted(users) == sorted(made[1]) for users in seen)
    assert seen[0] != seen[1] != seen[2]
    fresh = loader_of(made, catalogue, unknown_users=0.0, cache_bytes=0)
    fresh.load_state_dict({"epoch": 2, "step": 0})
    assert torch.cat([users for _, _, users, *_ in epoch_of(fresh)]).tolist() == seen[2], "the cache changes nothing"


def test_batches_are_no_more_alike_in_length_than_chance_makes_them(made, catalogue):
    """Steps of short histories only and of long ones only cost a tenth of NDCG on MovieLens-1M (README.md of data/)."""
    loader = loader_of(made, catalogue, batch_size=10, max_length=100, block_rows=150)
    batches = [lengths.numpy() for _ in range(20) for _, lengths, *_ in epoch_of(loader) if len(lengths) == 10]
    between = np.var([lengths.mean() for lengths in batches])
    by_chance = np.var(np.concatenate(batches)) / 10
    assert 0.7 < between / by_chance < 1.3, "sorted by length it is about 10"


def test_resumed_at_any_step_the_rest_is_equal(made, catalogue):
    loader = loader_of(made, catalogue)
    whole = epoch_of(loader) + epoch_of(loader)
    first = len(whole) - len(epoch_of_at(made, catalogue, {"epoch": 1, "step": 0}))
    for stopped in range(first):
        running = loader_of(made, catalogue)
        for _ in itertools.islice(running, stopped):
            pass
        resumed = loader_of(made, catalogue)
        resumed.load_state_dict(running.state_dict())
        assert same(epoch_of(resumed) + epoch_of(resumed), whole[stopped:])


def epoch_of_at(made, catalogue, state):
    loader = loader_of(made, catalogue)
    loader.load_state_dict(state)
    return epoch_of(loader)


def test_leaving_in_mid_epoch_stops_what_is_under_way_and_the_threads_go_with_the_loader(made, catalogue):
    loader = loader_of(made, catalogue)
    for _ in loader:
        break
    assert loader._reader._pool._work_queue.empty()
    assert same(epoch_of(loader), epoch_of_at(made, catalogue, {"epoch": 0, "step": 1})), "and it goes on from there"
    assert any(thread.name.startswith("loader") for thread in threading.enumerate())
    threads = list(loader._reader._pool._threads)
    del loader
    gc.collect()
    for thread in threads:
        thread.join(timeout=5)
        assert not thread.is_alive()


def test_memory_of_the_cache_is_bounded(made, catalogue):
    for bound in (0, 1_500, 1 << 20):
        loader = loader_of(made, catalogue, cache_bytes=bound)
        epoch_of(loader)
        held = sum(group.nbytes for group in loader._reader._cache.values())
        assert held == loader._reader._cached_bytes <= bound
        assert bool(held) == bool(bound)
    assert len(loader._reader._cache) == len(made[0].groups)


@pytest.mark.parametrize("task", ["masked_item", "next_item"])
def test_a_rank_without_rows_in_a_short_batch_has_a_loss_of_nothing(task, made, catalogue):
    loader = loader_of(made, catalogue, batch_size=29, block_rows=30, rank=0, world_size=3, unknown_users=0.0)
    short = [batch for batch in loader if len(batch.items) == 0]
    assert short
    kind = {"masked_item": MaskedItemConfig, "next_item": NextItemConfig}[task]
    model = build_model(
        Bert4RecConfig(width=8, blocks=1, max_length=16, user_width=4, knowledge={}),
        ModelSizes(num_users=200, num_entities=0, knowledge_VS=torch.zeros(len(catalogue), 0, dtype=torch.int32)),
        seed=0,
    )
    for loss in (LossConfig(), LossConfig(kind="sampled", num_negatives=8)):
        total, positions = build_task(kind(loss=loss)).loss(model, short[0])
        total.backward()
        assert (total.item(), int(positions)) == (0.0, 0)


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "error", "said"),
    [
        ({"batch_size": 2, "world_size": 3}, ConfigError, r"train\.batch_size is 2, less than the 3 processes"),
        ({"batch_size": 0}, ConfigError, r"train\.batch_size is 0"),
        ({"batch_size": 64}, ConfigError, r"train\.batch_size is 64, more than the 30.*raise data\.block_rows"),
        ({"max_length": 0}, ConfigError, r"model\.max_length: expected at least 1, found 0"),
        ({"rank": 2, "world_size": 2}, ConfigError, r"rank from 0 to 1, for 2 processes, found 2; mend RANK"),
        ({"rank": -1}, ConfigError, r"found -1; mend RANK"),
        ({"world_size": 0}, ConfigError, "0 processes"),
        ({"batch_size": 200, "block_rows": 200, "world_size": 151}, DataError, "for each of 151 processes, found 150"),
    ],
)
def test_sizes_that_cannot_work_are_refused_by_name(settings, error, said, made, catalogue):
    with pytest.raises(error, match=said) as found:
        loader_of(made, catalogue, **settings)
    assert "\n" not in str(found.value)


@pytest.fixture
def one_file(tmp_path):
    """(lake's release, its one file, bytes of it)."""
    release = commit(tmp_path, [write(tmp_path, 0, sequences_of(np.random.default_rng(1), 60, 20), group_rows=20)])
    (file,) = (tmp_path / SEQUENCES.name).rglob("*.parquet")
    return release, file, file.read_bytes()


def read(release):
    dataset = SequenceDataset(release, SPLIT, DOMAIN)
    return dataset.read_all(times=True)


@pytest.mark.parametrize("kept", [0, 3, 100, 0.5, 0.99])
def test_a_truncated_file_is_refused_by_name(kept, one_file):
    release, file, data = one_file
    file.write_bytes(data[: int(kept * len(data)) if isinstance(kept, float) else kept])
    with pytest.raises(DataError, match=f"can't read .*{file.name}: .*; restore it") as error:
        read(release)
    assert "\n" not in str(error.value)


def test_a_missing_file_is_refused_by_name(one_file):
    release, file, _ = one_file
    dataset = SequenceDataset(release, SPLIT, DOMAIN)
    file.unlink()
    for open_or_read in (lambda: read(release), dataset.read_all):
        with pytest.raises(DataError, match=f"can't read .*{file.name}"):
            open_or_read()


def test_a_flipped_bit_in_what_is_read_is_found(one_file):
    """Everywhere before the footer: a page's checksum, or its header, doesn't fit."""
    release, file, data = one_file
    metadata = pq.read_metadata(file)
    dataset = SequenceDataset(release, SPLIT, DOMAIN)
    random = np.random.default_rng(0)
    found = 0
    for group in range(metadata.num_row_groups):
        for number in range(metadata.num_columns):
            column = metadata.row_group(group).column(number)
            start = column.dictionary_page_offset or column.data_page_offset
            for place in start + random.integers(0, column.total_compressed_size, 12):
                damaged = bytearray(data)
                damaged[place] ^= 1 << int(random.integers(8))
                file.write_bytes(damaged)
                try:
                    after = dataset.read_all()
                except DataError as error:
                    assert file.name in str(error)  # noqa: PT017
                    found += 1
                    continue
                file.write_bytes(data)
                before = dataset.read_all()
                equal = same_arrays(before, after)
                assert equal, f"{column.path_in_schema}, byte {place} of {start}"
    assert found > 100


def test_a_damaged_file_stops_the_epoch_with_its_name(one_file, catalogue):
    release, file, data = one_file
    loader = loader_of((SequenceDataset(release, SPLIT, DOMAIN), {}), catalogue, block_rows=20)
    column = pq.read_metadata(file).row_group(int(loader._plan()[0][1][0])).column(1)
    damaged = bytearray(data)
    damaged[column.data_page_offset + column.total_compressed_size // 2] ^= 4
    file.write_bytes(damaged)
    seen = []
    with pytest.raises(DataError, match=f"can't read .*{file.name}"):
        seen.extend(loader)
    assert len(seen) == 3, "the block before it is whole"
    file.write_bytes(data)
    assert len(epoch_of(loader)) == 6, "and the state stands before the first batch that could not be made"


@pytest.mark.parametrize(
    ("column", "kind", "said"),
    [
        ("items", pa.list_(pa.string()), r"expected a column items of list<item: int32>, found list<.*string>"),
        ("items", pa.string(), "expected a column items of list"),
        ("user", pa.float64(), "expected a column user of int32, found double"),
        ("valid_start", None, "expected a column valid_start of int32, found user, items"),
    ],
)
def test_a_file_of_another_schema_is_refused_by_name(column, kind, said, one_file):
    release, file, _ = one_file
    table = pq.read_table(file)
    number = table.column_names.index(column)
    if kind is None:
        table = table.drop_columns([column])
    else:
        values = [str(v) for v in table[column].to_pylist()] if kind == pa.string() else table[column].cast(kind)
        table = table.set_column(number, column, pa.array(values, kind) if kind == pa.string() else values)
    pq.write_table(table, file)
    with pytest.raises(DataError, match=f"can't read .*{file.name}: {said}"):
        SequenceDataset(release, SPLIT, DOMAIN)


@pytest.mark.parametrize("kind", [pa.large_list(pa.int64()), pa.list_(pa.int64()), pa.large_list(pa.int32())])
def test_integers_of_another_width_are_read_alike(kind, one_file):
    release, file, _ = one_file
    before = read(release)
    table = pq.read_table(file)
    pq.write_table(table.set_column(1, "items", table["items"].cast(kind)), file, row_group_size=20)
    after = read(release)
    assert same_arrays(before, after)
    assert after.items.dtype == np.int32


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"valid_start": -1}, "expected 0 <= valid_start <= test_start"),
        ({"end": 10_000}, "expected 0 <= valid_start <= test_start"),
        ({"items": [MASK] * 30}, "expected item indices from 5 on"),
        ({"items": [-7] * 30}, "expected item indices from 5 on"),
        ({"items": [2**31]}, "2147483648 not in range"),
        ({"items": None}, "column items may not be null"),
        ({"user": None}, "column user may not be null"),
    ],
)
def test_contents_that_the_contract_rules_out_are_refused_by_name(change, said, one_file):
    release, file, _ = one_file
    rows = pq.read_table(file).to_pylist()
    rows[17] |= change
    schema = pa.schema([field.with_nullable(True) for field in pq.read_schema(file)])
    schema = schema.set(1, pa.field("items", pa.list_(pa.int64())))
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), file)
    with pytest.raises(DataError, match=f"can't read .*{file.name}: .*{said}"):
        read(release)


def test_a_table_without_rows_is_refused_by_name(tmp_path, catalogue):
    release = commit(tmp_path, [write(tmp_path, 0, [])])
    with pytest.raises(DataError, match="found 0 of split 'leave-one-out' and domain 'all'"):
        loader_of((SequenceDataset(release, SPLIT, DOMAIN), {}), catalogue)


# --- catalogues -------------------------------------------------------------------------------------------------------


def test_rows_of_a_catalogue(catalogue):
    examples = np.array([0, PAD, MASK, 5, 6, 7, 43, 44, 45, 10_000, -1, 2**31 - 1])
    expected = [0, PAD, MASK, 5, UNK, 6, 24, UNK, UNK, UNK, UNK, UNK]
    for kind in (np.int64, np.int32):
        assert catalogue.rows(examples.astype(kind)).tolist() == expected
    assert catalogue.rows(np.empty(0, np.int32)).tolist() == []


def test_texts_are_a_sequence_of_strings():
    words = ["", "a", "é", "b"] * 40_000
    texts = Texts(pa.chunked_array([words[:7], words[7:]]))
    assert len(texts) == len(words)
    assert list(texts) == words
    assert [texts[0], texts[np.int64(2)], texts[-1]] == ["", "é", "b"]
    assert list(texts[2:5]) == words[2:5]
    assert pa.array(texts[3:], pa.string()).to_pylist() == words[3:]
    assert pa.table({"word": texts})["word"].to_pylist() == words


def test_a_command_that_ends_right_after_pinning_a_release_ends_cleanly(tiny_lake):
    """Through deltalake's own dataset, reading aborts about every other such process at its exit."""
    script = f"from trainer.data.release import pin\nassert pin({tiny_lake!r}, None).number == 1\nraise SystemExit(2)"
    assert [subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=False).returncode for _ in range(4)] == [
        2
    ] * 4


def test_the_catalogue_of_a_lake(tmp_path):
    lake = build_tiny_lake(tmp_path / "lake")
    read = read_catalogue(pin(lake, None), "source")
    shutil.rmtree(lake)  # nothing is read later
    assert all(
        raw == f"{raw[:1]}{raw[1:]}" and title == f"Title {raw}"
        for raw, title in list(zip(read.raw_ids, read.titles, strict=True))[FIRST_INDEX:]
    )
    assert list(read.raw_ids[:FIRST_INDEX]) == [""] * FIRST_INDEX
    assert len(set(read.raw_ids)) == len(read) - FIRST_INDEX + 1
