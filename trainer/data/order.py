"""Which rows, in which order: pure functions of (row counts, seed, epoch). No I/O, no state.

Rows are shuffled in two stages, so that memory stays bounded whatever the table's size: row groups are shuffled and
dealt into *blocks* (what is decoded at once), then rows are shuffled inside a block and cut into batches.
"""

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]


def blocks_of(rows_per_group: list[int], *, block_rows: int, seed: int, epoch: int) -> list[IntArray]:
    """Row groups dealt into blocks of about `block_rows` rows, in a new random order each epoch."""
    order = np.random.default_rng([seed, epoch, 0]).permutation(len(rows_per_group))
    blocks: list[list[int]] = []
    filled = block_rows
    for group in order:
        if filled >= block_rows:
            blocks.append([])
            filled = 0
        blocks[-1].append(int(group))
        filled += rows_per_group[group]
    # Sorted inside a block: the rows are shuffled next anyhow, and a block's content decides whether it is cached.
    return [np.array(sorted(block), dtype=np.int64) for block in blocks]


def num_batches(rows_per_group: list[int], blocks: list[IntArray], batch_size: int) -> list[int]:
    """Batches that each block yields; the last batch of a block may be short."""
    return [-(-sum(rows_per_group[group] for group in block) // batch_size) for block in blocks]


def shuffled(num_rows: int, *, seed: int, epoch: int, block: int) -> IntArray:
    """The row numbers of one block in a new random order each epoch; batches are cut from it one after the other.

    Not sorted by length, which would spare padding: a step that sees short histories only, then one of long ones only,
    pulls the weights to and fro (README.md has what that cost).
    """
    return np.random.default_rng([seed, epoch, 1, block]).permutation(num_rows)


def rank_slice(num_rows: int, rank: int, world_size: int) -> slice:
    """The part of a global batch that one rank takes: contiguous, sizes differing by one at most."""
    return slice(num_rows * rank // world_size, num_rows * (rank + 1) // world_size)
