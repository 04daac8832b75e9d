"""Batches of triples: a function of (triples, seed, epoch), with the negatives that each chunk shares.

A batch is cut into chunks, and a chunk shares its negatives (PyTorch-BigGraph: Lerer et al. 2019; DGL-KE: Zheng et al.
2020). Over several processes the whole batch is cut, then each process takes some of its chunks: the number of
processes changes no triple and no negative.

Shape letters: ``S`` chunks, ``C`` triples of a chunk, ``K`` negatives of a side.
"""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from trainer.arrays import IntArray
from trainer.config.graph import GraphTrainConfig
from trainer.data.order import blocks_of, num_batches, rank_slice, shuffled
from trainer.knowledge_graph.negatives import known_places
from trainer.knowledge_graph.triples import HEAD, RELATION, SIDES, TAIL, KnownTriples, Side

_MOST_OF_ONE_RELATION = 32  # triples


@dataclass(frozen=True)
class TripleBatch:
    """One process's chunks of a global batch."""

    triples: IntArray  # [S, C, 3]; places from a chunk's `sizes` on repeat its first triple
    sizes: IntArray  # [S] triples of each chunk
    negatives: dict[Side, IntArray]  # [S, K] entities in place of heads, and of tails
    known: dict[Side, IntArray]  # places in [S, C, K] of triples that are true, so no negatives, ascending
    global_size: int  # triples of all processes' chunks

    def entities(self) -> IntArray:
        """Heads, tails, negatives in place of heads and of tails, one after the other."""
        parts = [self.triples[..., HEAD], self.triples[..., TAIL], *(self.negatives[side] for side in SIDES)]
        return np.concatenate([part.ravel() for part in parts])

    def parts(self) -> list[tuple[int, ...]]:
        """Shapes of the parts of `entities`."""
        return [self.triples.shape[:2]] * 2 + [self.negatives[side].shape for side in SIDES]

    def known_in(self, chunks: slice, side: Side) -> IntArray:
        """The places in `known` of some chunks, counted from the first of them."""
        size = self.triples.shape[1] * self.negatives[side].shape[1]
        first, last = np.searchsorted(self.known[side], [chunks.start * size, chunks.stop * size])
        places: IntArray = self.known[side][first:last] - chunks.start * size
        return places


@dataclass(frozen=True, kw_only=True)
class BatchSettings:
    """`negatives`: of a triple, half of them in place of its head. `one_relation`: of every chunk."""

    batch_size: int
    chunk: int
    negatives: int
    block_rows: int
    seed: int
    one_relation: bool = False

    @classmethod
    def of(cls, config: GraphTrainConfig, *, one_relation: bool) -> "BatchSettings":
        """Chunks of one relation are short, since most relations are rare and places that a chunk lacks are padded."""
        return cls(
            batch_size=config.batch_size,
            chunk=min(config.chunk, _MOST_OF_ONE_RELATION) if one_relation else config.chunk,
            negatives=config.negatives,
            block_rows=config.block_rows,
            seed=config.seed,
            one_relation=one_relation,
        )


class TripleBatches:
    """The batches of each epoch. `known` are the triples that are true: those of training, never of a held-out part."""

    def __init__(self, known: KnownTriples, settings: BatchSettings, *, rank: int = 0, world_size: int = 1) -> None:
        self.known, self.settings, self.rank, self.world_size = known, settings, rank, world_size
        rows = settings.block_rows
        self._rows = [min(rows, len(known.triples) - first) for first in range(0, len(known.triples), rows)]

    @property
    def num_steps(self) -> int:
        """Of an epoch: every one has as many, since each block's last batch may be short."""
        return sum(num_batches(self._rows, [np.array([block]) for block in range(len(self._rows))], self._size))

    def epoch(self, epoch: int, *, first_step: int = 0) -> Iterator[TripleBatch]:
        """From step `first_step` on; a thread makes each batch while the one before it is in use."""
        ahead: Future[TripleBatch] | None = None
        with ThreadPoolExecutor(1, thread_name_prefix="batches") as thread:
            for step, places in self._places(epoch, first_step):
                following = thread.submit(self._batch, places, epoch, step)
                if ahead is not None:
                    yield ahead.result()
                ahead = following
            if ahead is not None:
                yield ahead.result()

    def _places(self, epoch: int, first_step: int) -> Iterator[tuple[int, IntArray]]:
        """Steps, and the places of their triples."""
        step, seed, rows = 0, self.settings.seed, self.settings.block_rows
        for (block,) in blocks_of(self._rows, block_rows=1, seed=seed, epoch=epoch):
            steps = -(-self._rows[block] // self._size)
            if step + steps > first_step:
                order = shuffled(self._rows[block], seed=seed, epoch=epoch, block=int(block)) + block * rows
                for number in range(max(0, first_step - step), steps):
                    yield step + number, order[number * self._size : (number + 1) * self._size]
            step += steps

    @property
    def _size(self) -> int:
        return self.settings.batch_size

    def _batch(self, places: IntArray, epoch: int, step: int) -> TripleBatch:
        triples, settings = self.known.triples[places], self.settings
        firsts, sizes = chunk_bounds(triples, settings.chunk, one_relation=settings.one_relation)
        if settings.one_relation:
            triples = triples[np.argsort(triples[:, RELATION], kind="stable")]
        within = np.arange(min(settings.chunk, int(sizes.max())))
        laid_out = triples[firsts[:, None] + np.where(within < sizes[:, None], within, 0)]
        generator = np.random.default_rng([settings.seed, epoch, 2, step])
        shape = (len(SIDES), len(sizes), settings.negatives // 2)
        drawn = generator.integers(self.known.num_entities, size=shape)
        mine = rank_slice(len(sizes), self.rank, self.world_size)
        negatives = {side: drawn[number, mine] for number, side in enumerate(SIDES)}
        known = {side: known_places(self.known, laid_out[mine], negatives[side], side) for side in SIDES}
        return TripleBatch(laid_out[mine], sizes[mine], negatives, known, len(triples))


def chunk_bounds(triples_N3: IntArray, chunk: int, *, one_relation: bool) -> tuple[IntArray, IntArray]:
    """First place and number of triples of each chunk; with `one_relation`, of triples sorted by relation."""
    runs = np.array([len(triples_N3)])
    if one_relation:
        _, runs = np.unique(triples_N3[:, RELATION], return_counts=True)
    pieces = -(-runs // chunk)
    run_of = np.repeat(np.arange(len(runs)), pieces)
    number = np.arange(len(run_of)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    starts = np.cumsum(runs) - runs
    return starts[run_of] + number * chunk, np.minimum(chunk, runs[run_of] - number * chunk)
