"""Batches packed into rows of static shapes, fed ahead; random numbers by hash."""

import threading

import numpy as np
import pytest
import torch

from etl.tables import DOMAIN_ALL, PAD
from tests.benchmarks.movielens import SPLIT, movielens
from tests.fixtures.networks import batch_of
from tests.fixtures.places import ROOT
from trainer.config import DataConfig
from trainer.data.ahead import Ahead, packed
from trainer.data.catalogue import read_catalogue
from trainer.data.device_random import DeviceRandom, key_of
from trainer.data.loader import Loader
from trainer.data.packing import SIZES, best_fit, num_rows_of
from trainer.data.release import pin
from trainer.data.sequences import SequenceDataset

LENGTHS = [5, 12, 3, 8, 1, 0, 7]
CPU = torch.device("cpu")
DATA = ROOT.parent / "shared" / "data"


@pytest.mark.parametrize("seed", range(20))
def test_sequences_lie_in_rows_whole_and_apart(seed):
    random = np.random.default_rng(seed)
    width = int(random.integers(1, 40))
    lengths = random.integers(0, width + 1, int(random.integers(1, 60)))
    row_B, begin_B, num_rows = best_fit(lengths, width)
    taken = np.zeros((num_rows, width), dtype=int)
    for row, begin, length in zip(row_B, begin_B, lengths, strict=True):
        assert begin + length <= width
        taken[row if length else slice(0, 0), begin : begin + length] += 1
    assert taken.max(initial=0) <= 1
    assert taken.sum() == lengths.sum()
    assert num_rows <= 2 * lengths.sum() / width + 1  # no two rows have half a row each to spare


def test_a_batch_comes_out_of_its_rows_again():
    batch = batch_of(LENGTHS)
    found = packed(batch, rows=9, max_length=12)
    source_RT = found.packing.source_RT
    assert sorted(source_RT[source_RT >= 0].tolist()) == torch.nonzero(found.mask_BT.flatten())[:, 0].tolist()
    items_RT = found.packing.packed(found.items, PAD)
    assert torch.equal(items_RT != PAD, source_RT >= 0)
    for sequence, length in enumerate(LENGTHS):
        mine_RT = (source_RT >= 0) & (found.packing.owners_RT == sequence)
        assert torch.equal(items_RT[mine_RT], batch.items[sequence, :length])
        assert found.packing.places_RT[mine_RT].tolist() == list(range(length))


@pytest.mark.parametrize("causal", [True, False])
def test_a_position_sees_its_own_sequence_only(causal):
    found = packed(batch_of(LENGTHS), rows=9, max_length=12)
    lengths_B = found.lengths - (found.lengths > 4).long()  # some cut by one
    sees_RTT = found.packing.attends_RTT(lengths_B, causal=causal)
    assert sees_RTT.any(2).all(), "a softmax over nothing"
    owners, places, real = found.packing.owners_RT, found.packing.places_RT, found.packing.source_RT >= 0
    real = real & (places < lengths_B[owners])
    for row, asking in real.nonzero().tolist():
        expected = real[row] & (owners[row] == owners[row, asking])
        if causal:
            expected &= places[row] <= places[row, asking]
        assert torch.equal(sees_RTT[row, asking], expected)


def test_numbers_of_rows_are_few():
    for rows in (1, 5, 16, 100, 128, 1_024):
        sizes = {num_rows_of(needed, rows) for needed in range(rows + 1)}
        assert len(sizes) <= SIZES
        assert all(num_rows_of(needed, rows) >= needed for needed in range(rows + 1))
        assert max(sizes) == rows


def test_draws_are_uniform_and_differ_by_key_and_stream():
    counter = torch.arange(100_000)
    first = DeviceRandom(torch.tensor(key_of(0, 0, 1)))
    uniform = first.uniform(1, counter)
    assert uniform.min() >= 0
    assert uniform.max() < 1
    counts = torch.histc(uniform, 20, 0, 1)
    assert ((counts - 5_000).square() / 5_000).sum() < 45  # chi-squared of 19, p = 0.0007
    others = [DeviceRandom(torch.tensor(key_of(0, 0, 2))).uniform(1, counter), first.uniform(2, counter)]
    others += [uniform.roll(1)]  # neighbours
    for other in others:
        assert abs(torch.corrcoef(torch.stack([uniform, other]))[0, 1]) < 0.015
    whole = first.integers(3, counter, 7)
    assert torch.bincount(whole, minlength=7).tolist() == pytest.approx([100_000 / 7] * 7, rel=0.05)
    kept = first.kept((100, 1_000), 64)
    assert kept.float().mean() == pytest.approx(0.75, abs=0.01)
    assert not torch.equal(kept, first.kept((100, 1_000), 64)), "the next layer's"


class Numbered:
    """A loader of batches of one epoch after the other; says which thread took them."""

    def __init__(self, steps, *, broken_at=None):
        self.num_steps, self.broken_at, self.epoch, self.step = steps, broken_at, 0, 0
        self.threads = set()

    def state_dict(self):
        return {"epoch": self.epoch, "step": self.step}

    def load_state_dict(self, state):
        self.epoch, self.step = state["epoch"], state["step"]

    def __iter__(self):
        while self.step < self.num_steps:
            self.threads.add(threading.current_thread().name)
            if self.step == self.broken_at:
                raise OSError("a file is gone")
            batch = batch_of([3, 2], draw=(0, self.epoch, self.step))
            self.step += 1
            yield batch
        self.epoch, self.step = self.epoch + 1, 0


def test_the_state_is_that_of_the_batch_in_use():
    loader = Numbered(9)
    ahead = Ahead(loader, rows=2, max_length=4, device=CPU)
    for number, batch in enumerate(ahead):
        assert batch.draw == (0, 0, number)
        assert ahead.state_dict() == {"epoch": 0, "step": number + 1}
        if number == 4:
            break
    resumed = Ahead(Numbered(9), rows=2, max_length=4, device=CPU)
    resumed.load_state_dict(ahead.state_dict())
    assert [batch.draw[2] for batch in resumed] == [5, 6, 7, 8]
    assert resumed.state_dict() == {"epoch": 1, "step": 0}
    assert [batch.draw[1:] for batch in resumed] == [(1, step) for step in range(9)]
    assert loader.threads == {"ahead"}
    assert "ahead" not in {thread.name for thread in threading.enumerate()}, "a thread was left behind"


def test_what_the_loader_raises_reaches_the_trainer():
    ahead = Ahead(Numbered(5, broken_at=2), rows=2, max_length=4, device=CPU)
    seen = []
    with pytest.raises(OSError, match="a file is gone"):
        seen.extend(batch.draw[2] for batch in ahead)
    assert seen == [0, 1]


@pytest.mark.skipif(not (DATA / "ml-1m").is_dir(), reason="MovieLens-1M is not at ../shared/data/ml-1m")
@pytest.mark.parametrize("batch_size", [128, 1_024])
def test_an_epoch_of_movielens_has_few_shapes_and_full_rows(movielens_lake, batch_size):
    release = pin(str(movielens_lake), None)
    catalogue, dataset = read_catalogue(release, DOMAIN_ALL), SequenceDataset(release, SPLIT, DOMAIN_ALL)
    loader = Loader(dataset, catalogue, DataConfig(), batch_size=batch_size, max_length=200, seed=0)
    shapes, items, positions = set(), 0, 0
    for batch in Ahead(loader, rows=batch_size, max_length=200, device=CPU):
        shapes.add(tuple(tuple(tensor.shape) for tensor in batch.tensors()))
        items, positions = items + batch.global_items, positions + batch.packing.source_RT.numel()
    assert len(shapes) <= 8
    assert items / positions > 0.85


@pytest.fixture(scope="module")
def movielens_lake(tmp_path_factory):
    return movielens(DATA / "ml-1m", tmp_path_factory.mktemp("movielens")).lake
