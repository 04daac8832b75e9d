"""Blocks of sequences, read ahead: threads decode one block while batches are cut from the one before it.

A block is some row groups that are shuffled together. Decoding and the lookup of catalogue rows give up
the interpreter's lock, so that threads do what worker processes would, without copies between them.
"""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from etl.tables import PAD
from trainer.arrays import Int32Array, IntArray
from trainer.data.catalogue import Catalogue
from trainer.data.sequences import SequenceDataset, Sequences

READERS = 2  # threads: a core decodes some 100 M items a second, far more than a network trains on


@dataclass(frozen=True)
class Block:
    """Some row groups' sequences, in the order of the block's batches: each batch is a slice of `users` and the like.

    `windows` holds a view [N, T] of each column of all sequences one behind the other: row n is the T events from place
    n on, items as catalogue rows.
    """

    users: IntArray  # [U]
    trained: IntArray  # [U] of training parts
    firsts: IntArray  # [U] the place where each sequence begins
    windows: Mapping[str, Any]


class BlockReader:
    """Reads blocks ahead, and keeps decoded row groups up to `cache_bytes` for the epochs to come.

    Memory: two blocks, and the cache.
    """

    def __init__(self, dataset: SequenceDataset, catalogue: Catalogue, *, window: int, cache_bytes: int) -> None:
        self.dataset, self.catalogue, self.window, self.cache_bytes = dataset, catalogue, window, cache_bytes
        self._pool = ThreadPoolExecutor(READERS, thread_name_prefix="loader")
        self._cache: dict[int, Sequences] = {}
        self._cached_bytes, self._lock = 0, threading.Lock()

    def read(self, blocks: Sequence[IntArray], order_of: Callable[[int, int], IntArray]) -> Iterator[tuple[int, Block]]:
        """Number and block, for each of `blocks` (row groups) in turn. A block is good until the next one is read.

        `order_of` gives the order of a block's rows from its number and how many they are. Raises DataError for a file
        that can't be read. Whenever the iterator is left, nothing is under way any longer.
        """
        # Used in turn, so that no epoch asks the system for new memory, and touches every page of it, at each block.
        buffers = [np.empty(0, np.int32), np.empty(0, np.int32)]
        ahead: list[tuple[list[Future[Sequences]], Future[Block]]] = []

        def begin(number: int) -> None:
            groups = [self._pool.submit(self._group, int(group)) for group in blocks[number]]
            # Threads take tasks in turn, so that what this one waits for is under way, or done, when it begins.
            ahead.append((groups, self._pool.submit(self._block, groups, buffers, number, order_of)))

        try:
            for number in range(len(blocks)):
                if number == 0:
                    begin(0)
                if number + 1 < len(blocks):
                    begin(number + 1)
                block = ahead[0][1].result()
                ahead.pop(0)  # with the decoded row groups, of which the block is a copy
                yield number, block
        finally:
            for groups, whole in ahead:
                wait([group for group in groups if not group.cancel()])
                wait([whole] if not whole.cancel() else [])

    def _group(self, group: int) -> Sequences:
        if (cached := self._cache.get(group)) is not None:
            return cached
        read = self.dataset.read_group(group, held_out=False)
        found = read.with_columns(items=self.catalogue.rows(read.items))
        with self._lock:
            if self._cached_bytes + found.nbytes <= self.cache_bytes:
                self._cache[group] = found
                self._cached_bytes += found.nbytes
        return found

    def _block(
        self,
        waiting: Sequence[Future[Sequences]],
        buffers: list[Int32Array],
        number: int,
        order_of: Callable[[int, int], IntArray],
    ) -> Block:
        groups = [group.result() for group in waiting]
        users, lengths, trained = (
            np.concatenate([getattr(group, name) for group in groups]) for name in ("users", "lengths", "valid_start")
        )
        total = int(lengths.sum())
        needed = total + self.window  # behind the last sequence a window more, so that one may begin anywhere
        if len(buffers[number % 2]) < needed:
            buffers[number % 2] = np.empty(needed + needed // 8, np.int32)
        rows = buffers[number % 2][:needed]
        np.concatenate([group.items for group in groups], out=rows[:total])
        rows[total:] = PAD
        order = order_of(number, len(trained))

        def windows(name: str) -> Any:
            parts = [group.columns[name] for group in groups]
            return sliding_window_view(np.concatenate([*parts, np.zeros(self.window, parts[0].dtype)]), self.window)

        return Block(
            users[order],
            trained[order],
            (np.cumsum(lengths) - lengths)[order],
            {"items": sliding_window_view(rows, self.window)}
            | {name: windows(name) for name in groups[0].columns if name != "items"},
        )
