"""Batches with a state: ``{epoch, step}`` says all, so a run that was killed resumes on the very next batch."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from etl.tables import PAD, UNK
from trainer.config import ConfigError, DataConfig
from trainer.data import order
from trainer.data.batch import Batch
from trainer.data.dataset import Catalogue, IntArray, SequenceDataset, Sequences


def pad_windows(
    sequences: Sequences, catalogue: Catalogue, rows: IntArray, starts: IntArray, lengths: IntArray, width: int
) -> torch.Tensor:
    """Catalogue rows [len(rows), width] of ``items[start:start + length]`` of each row, PAD behind. One gather, no
    loop."""
    columns = np.arange(width)
    inside = columns < lengths[:, None]
    flat = np.where(inside, (sequences.offsets[rows] + starts)[:, None] + columns, 0)
    if len(sequences.items) == 0:
        return torch.full((len(rows), width), PAD)
    padded = np.where(inside, catalogue.rows(sequences.items[flat]), PAD)
    return torch.from_numpy(padded.astype(np.int64))


class Loader:
    """Training batches of one rank, epoch after epoch.

    The order is a pure function of (snapshot, seed, epoch): a *global* batch is cut first, then each rank takes its
    slice, so every world size sees the same samples in the same order. Memory: one block, plus the cache up to
    `cache_bytes`.
    """

    def __init__(
        self, dataset: SequenceDataset, catalogue: Catalogue, config: DataConfig, *,
        batch_size: int, max_length: int, seed: int, rank: int = 0, world_size: int = 1,
    ) -> None:  # fmt: skip
        if batch_size < world_size:
            raise ConfigError(
                f"train.batch_size is {batch_size}, less than the {world_size} processes; give each at least one row"
            )
        self.dataset, self.catalogue, self.config = dataset, catalogue, config
        self.batch_size, self.max_length, self.seed = batch_size, max_length, seed
        self.rank, self.world_size = rank, world_size
        self.epoch, self.step = 0, 0  # the next batch
        self._cache: dict[tuple[int, ...], Sequences] = {}
        self._cached_bytes = 0

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epoch, self.step = int(state["epoch"]), int(state["step"])

    @property
    def num_steps(self) -> int:
        """Batches per epoch."""
        groups = self.dataset.rows_per_group
        return sum(order.num_batches(groups, self._blocks(), self.batch_size))

    def _blocks(self) -> list[IntArray]:
        groups = self.dataset.rows_per_group
        return order.blocks_of(groups, block_rows=self.config.block_rows, seed=self.seed, epoch=self.epoch)

    def __iter__(self) -> Iterator[Batch]:
        """The rest of the current epoch; afterwards the state is at the next epoch's start."""
        blocks = self._blocks()
        counts = order.num_batches(self.dataset.rows_per_group, blocks, self.batch_size)
        first = 0  # step number of the block's first batch
        for number, (groups, count) in enumerate(zip(blocks, counts, strict=True)):
            if self.step < first + count:
                yield from self._block(groups, number, first)
            first += count
        self.epoch, self.step = self.epoch + 1, 0

    def _block(self, groups: IntArray, number: int, first: int) -> Iterator[Batch]:
        sequences = self._read(groups)
        batches = order.batches_of(
            np.minimum(sequences.valid_start, self.max_length),
            batch_size=self.batch_size, seed=self.seed, epoch=self.epoch, block=number,
        )  # fmt: skip
        for offset in range(self.step - first, len(batches)):
            batch = self._batch(sequences, batches[offset], first + offset)
            self.step = first + offset + 1  # before the yield: a state taken while the batch is used points behind it
            yield batch

    def _batch(self, sequences: Sequences, rows: IntArray, step: int) -> Batch:
        draw = (self.seed, self.epoch, step)
        full = sequences.valid_start[rows]
        lengths = np.minimum(full, self.max_length)
        starts = full - lengths
        if self.config.window == "random":  # of the whole global batch, so that it does not depend on the world size
            random = np.random.default_rng([*draw, 2]).random(len(rows))
            # Half the windows are the newest: the model is asked at the end of a history.
            starts = np.where(random < 0.5, starts, ((random - 0.5) * 2 * (starts + 1)).astype(np.int64))
        mine = order.rank_slice(len(rows), self.rank, self.world_size)
        items = pad_windows(
            sequences, self.catalogue, rows[mine], starts[mine], lengths[mine], max(int(lengths.max()), 1)
        )
        users = sequences.users[rows]
        if self.config.unknown_users:  # so that the unknown user's row is trained, and a cold user is served well
            hidden = np.random.default_rng([*draw, 3]).random(len(rows)) < self.config.unknown_users
            users = np.where(hidden, UNK, users)
        return Batch(
            items,
            torch.from_numpy(lengths[mine]),
            torch.from_numpy(users[mine]),
            len(rows),
            mine,
            draw,
            int(lengths.sum()),
        )

    def _read(self, groups: IntArray) -> Sequences:
        key = tuple(groups.tolist())
        if key in self._cache:
            return self._cache[key]
        sequences = self.dataset.read(key)
        if self._cached_bytes + sequences.nbytes <= self.config.cache_bytes:
            self._cache[key] = sequences
            self._cached_bytes += sequences.nbytes
        return sequences
