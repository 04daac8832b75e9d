"""Batches with a state: ``{epoch, step}`` says all, so a run that was killed resumes on the very next batch.

README.md beside this file says what each step costs, and what was tried instead.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from etl.settings import ConfigError
from etl.tables import PAD, UNK
from trainer.arrays import Int32Array, IntArray
from trainer.config import DataConfig
from trainer.data import order
from trainer.data.batch import Batch
from trainer.data.blocks import Block, BlockReader
from trainer.data.catalogue import Catalogue
from trainer.data.release import DataError
from trainer.data.sequences import SequenceDataset

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Share:
    """A rank's share of global batches. `everyone`: its batches hold the items of the whole global batch too."""

    rank: int = 0
    world_size: int = 1
    everyone: bool = False


WHOLE = Share()


class Loader:
    """Training batches of one rank, epoch after epoch.

    The order is a pure function of (snapshot, seed, epoch): a *global* batch is cut first, then each rank takes its
    slice, so every world size sees the same samples in the same order. Memory: two blocks, plus the cache up to
    `cache_bytes`, whatever the table's size.

    Raises ConfigError for sizes that can't work, DataError for a table without rows, and, while iterating, for a file
    that can't be read.
    """

    def __init__(
        self,
        dataset: SequenceDataset,
        catalogue: Catalogue,
        config: DataConfig,
        *,
        batch_size: int,
        max_length: int,
        seed: int,
        share: Share = WHOLE,
    ) -> None:
        _check_sizes(dataset, config, batch_size, max_length, share)
        self.dataset, self.catalogue, self.config = dataset, catalogue, config
        self.batch_size, self.max_length, self.seed = batch_size, max_length, seed
        self.rank, self.world_size = share.rank, share.world_size
        self.everyone = share.everyone and share.world_size > 1
        self.epoch, self.step = 0, 0  # the next batch
        self._reader = BlockReader(dataset, catalogue, window=max_length, cache_bytes=config.cache_bytes)
        self._columns_T = np.arange(max_length, dtype=np.int32)
        self._planned: tuple[int, list[IntArray], list[int]] | None = None

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ValueError for a place that no run reaches."""
        epoch, step = int(state["epoch"]), int(state["step"])
        if epoch < 0 or step < 0:
            raise ValueError(f"expected an epoch and a step of 0 and more, found {epoch} and {step}")
        self.epoch, self.step = epoch, step

    @property
    def num_steps(self) -> int:
        """Batches of the current epoch."""
        return sum(self._plan()[1])

    def _plan(self) -> tuple[list[IntArray], list[int]]:
        """The epoch's blocks, and the number of batches in each."""
        if self._planned is None or self._planned[0] != self.epoch:
            groups = self.dataset.rows_per_group
            blocks = order.blocks_of(groups, block_rows=self.config.block_rows, seed=self.seed, epoch=self.epoch)
            self._planned = self.epoch, blocks, order.num_batches(groups, blocks, self.batch_size)
        return self._planned[1:]

    def __iter__(self) -> Iterator[Batch]:
        """The rest of the current epoch; afterwards the state is at the next epoch's start."""
        blocks, counts = self._plan()
        stops = np.cumsum(counts, dtype=np.int64)  # step number behind each block's last batch
        skipped = int(np.searchsorted(stops, self.step, side="right"))

        def order_of(number: int, num_rows: int) -> IntArray:
            return order.shuffled(num_rows, seed=self.seed, epoch=self.epoch, block=skipped + number)

        for number, block in self._reader.read(blocks[skipped:], order_of):
            done = self.step - (int(stops[skipped + number]) - counts[skipped + number])  # batches of this block
            draws = np.random.default_rng([self.seed, self.epoch, 2, skipped + number]).random((2, len(block.users)))
            for start in range(done * self.batch_size, len(block.users), self.batch_size):
                rows = slice(start, start + self.batch_size)
                batch = self._batch(block, rows, *draws[:, rows])
                self.step += 1  # before the yield: a state taken while the batch is used points behind it
                yield batch
        self.epoch, self.step = self.epoch + 1, 0

    def _batch(self, block: Block, batch: slice, window: FloatArray, hidden: FloatArray) -> Batch:
        """Those rows of the block. `window`, `hidden`: [U] numbers in [0, 1) drawn for the whole global batch, so that
        it does not depend on the world size."""
        full = block.trained[batch]
        lengths = np.minimum(full, self.max_length)
        starts = full - lengths
        if self.config.window == "random":  # half of the windows are the newest: that is what is predicted from
            starts = np.where(window < 0.5, starts, ((window - 0.5) * 2 * (starts + 1)).astype(np.int64))
        users = block.users[batch]
        if self.config.unknown_users:  # so that the unknown user's row is trained, and a cold user is served well
            users = np.where(hidden < self.config.unknown_users, UNK, users)
        mine = order.rank_slice(len(full), self.rank, self.world_size)
        width = max(int(lengths.max()), 1)
        begins = (block.firsts[batch] + starts)[mine]
        items_NT, names = block.windows["items"], block.windows.keys() - {"items"}
        more = {name: torch.from_numpy(block.windows[name][:, :width][begins]) for name in names}
        return Batch(
            self._padded(items_NT, begins, lengths[mine], width),
            torch.from_numpy(lengths[mine]),
            torch.from_numpy(users[mine]),
            len(full),
            mine,
            (self.seed, self.epoch, self.step),
            int(lengths.sum()),
            torch.from_numpy(block.users[batch][mine]),
            self._padded(items_NT, block.firsts[batch] + starts, lengths, width) if self.everyone else None,
            more.get("values"),
            more["event_types"].long() if "event_types" in more else None,
            more.get("times"),
        )

    def _padded(self, windows_NT: Int32Array, starts: IntArray, lengths: IntArray, width: int) -> torch.Tensor:
        """int64 [B, width]: `lengths` catalogue rows from place `starts` on, PAD behind. A copy of B short runs of
        memory, no gather of items."""
        padded = windows_NT[:, :width][starts]
        # Compared in 32 bits: in 64 a batch takes three times as long.
        np.copyto(padded, PAD, where=self._columns_T[:width] >= lengths.astype(np.int32)[:, None])
        return torch.from_numpy(padded).long()


def _check_sizes(dataset: SequenceDataset, config: DataConfig, batch_size: int, max_length: int, share: Share) -> None:
    rank, world_size = share.rank, share.world_size
    if not 0 <= rank < world_size:
        raise ConfigError(
            f"expected a rank from 0 to {world_size - 1}, for {world_size} processes, found {rank}; "
            "mend RANK and WORLD_SIZE"
        )
    if max_length < 1:
        raise ConfigError(f"model.max_length: expected at least 1, found {max_length}; raise it")
    if batch_size < world_size:
        raise ConfigError(
            f"train.batch_size is {batch_size}, less than the {world_size} processes; give each at least one row"
        )
    if batch_size > config.block_rows:
        raise ConfigError(
            f"train.batch_size is {batch_size:,}, more than the {config.block_rows:,} sequences that are shuffled "
            "together; lower it, or raise data.block_rows"
        )
    if dataset.num_rows < world_size:
        raise DataError(
            f"expected at least one sequence for each of {world_size} processes, found {dataset.num_rows:,} of split "
            f"{dataset.split!r} and domain {dataset.domain!r} in release {dataset.release.number} of "
            f"{dataset.release.lake}; run fewer processes, or give more users"
        )
