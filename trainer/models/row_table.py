"""Tables of which a step reads few rows: looked up, trained and shared out row by row.

A dense table costs its whole size at every step: a gradient of its shape, two moments as large, a pass over all of it.
Here a lookup copies the distinct rows that are looked up into a *leaf*, where the backward pass ends, and
`RowTables.gradients` hands each row's summed gradient to whoever keeps the row. So a step costs what its batch costs,
however long the table (the design of TorchRec: Ivchenko et al. 2022; row-wise sharding as in Naumov et al. 2019).

Over W processes row r lives on process r mod W, at place r div W, and nowhere else: popular rows, which tend to stand
together in a catalogue, are spread evenly. One process is the case W = 1.

Every lookup and every `gradients` is a meeting of all processes: all make the same ones in the same order (the rows may
differ, or be none).

Shape letters: ``U`` distinct rows, ``D`` width.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from etl.settings import ConfigError
from trainer.parallel.distributed import World

BLOCK_ROWS = 1 << 16  # made, or copied, together
_WITHIN = math.erf(2 / math.sqrt(2))  # of a normal distribution, within two deviations


class RowTable(nn.Module):
    """This process's rows of a table of `num_embeddings`, not yet filled; read through `RowTables.lookup`."""

    def __init__(self, num_embeddings: int, width: int, tables: "RowTables") -> None:
        super().__init__()
        self.num_embeddings = num_embeddings
        self.weight = nn.Parameter(torch.empty(tables.share(num_embeddings), width))


class RowTables:
    """Lookups of a model's row-wise tables, and the gradients that they leave."""

    def __init__(self, world: World) -> None:
        self.world = world
        self._reads: dict[Tensor, list[tuple[Tensor, Tensor]]] = {}

    def share(self, num_rows: int) -> int:
        """Rows of a table that this process keeps. Raises ConfigError where some process would keep none."""
        if num_rows < self.world.size:
            raise ConfigError(
                f"train.table_optimizer rowwise shares tables out over {self.world.size} processes, and one table has "
                f"only {num_rows} rows; start fewer processes, or set train.table_optimizer=adamw"
            )
        return len(range(self.world.rank, num_rows, self.world.size))

    def num_rows(self, table: Tensor) -> int:
        """Rows of all processes' parts together."""
        return int(self.world.sum(len(table))[0])

    def lookup(self, table: Tensor, rows: Tensor) -> Tensor:
        """Vectors [*rows.shape, D] (or numbers [*rows.shape], of a table without width) of rows of the whole table."""
        trained = torch.is_grad_enabled() and table.requires_grad
        if self.world.size == 1 and not trained:
            return table.detach()[rows]
        distinct_U, place = torch.unique(rows.long(), return_inverse=True)
        values = self.fetch(table.detach(), distinct_U)
        if trained:
            values.requires_grad_()
            self._reads.setdefault(table, []).append((distinct_U, values))
        return F.embedding(place, _flat(values)).view(*rows.shape, *table.shape[1:])

    def whole(self, table: Tensor, num_rows: int) -> Tensor:
        """All rows, to be read only: the table itself where one process has it, else a copy of the whole (not for large
        ones)."""
        if self.world.size == 1:
            return table.detach()
        with torch.no_grad():
            return self.lookup(table, torch.arange(num_rows, device=table.device))

    def gradients(self, tables: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """(places [U] in this process's part, ascending, and their gradients [U, D]) of each table since the last call.

        The mean over processes of each one's gradient, as DistributedDataParallel's: it is summed in the order of the
        lookups and of the processes, so that a resumed run finds the same bits.
        """
        found = [self._gradient(table, self._reads.get(table, [])) for table in tables]
        self._reads.clear()
        return found

    def _gradient(self, table: Tensor, reads: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        places = [rows for rows, _ in reads] or [torch.empty(0, dtype=torch.long, device=table.device)]
        slopes = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for _, leaf in reads] or [table[:0]]
        return self.at_owners(*_summed(torch.cat(places), torch.cat(slopes).detach()))

    def at_owners(self, rows_U: Tensor, gradient_UD: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of distinct rows, from the process that read them to those that keep them: (places in this
        process's part, ascending, the mean over processes of each one's gradient)."""
        size = self.world.size
        if size == 1:
            return rows_U, gradient_UD
        order, counts = self._by_owner(rows_U)
        rows, _ = self.world.exchange(rows_U[order], counts)
        parts, _ = self.world.exchange(gradient_UD[order], counts)
        return _summed(rows // size, parts / size)

    def fetch(self, table: Tensor, rows_U: Tensor) -> Tensor:
        """A copy [U, D] of distinct rows of the whole table."""
        size = self.world.size
        if size == 1:
            return table.index_select(0, rows_U)  # of a table in memory, not in cache, 4 times as fast as table[rows_U]
        order, counts = self._by_owner(rows_U)
        wanted, theirs = self.world.exchange(rows_U[order], counts)
        answers, _ = self.world.exchange(table[wanted // size], theirs)
        values = torch.empty_like(answers)
        values[order] = answers
        return values

    def _by_owner(self, rows: Tensor) -> tuple[Tensor, list[int]]:
        """The order in which rows lie owner by owner, and how many each has."""
        owner = rows % self.world.size
        counts: list[int] = torch.bincount(owner, minlength=self.world.size).tolist()
        return torch.argsort(owner, stable=True), counts

    @torch.no_grad()
    def initialise(self, table: RowTable, *, seed: Sequence[int], std: float) -> None:
        """Normals cut at two deviations, in place: a function of (seed, row), whatever the number of processes."""
        rank, size = self.world.rank, self.world.size
        for block, first in enumerate(range(0, table.num_embeddings, BLOCK_ROWS)):
            mixed = int(np.random.SeedSequence([*seed, block]).generate_state(1, np.uint64)[0] >> np.uint64(1))
            generator = torch.Generator().manual_seed(mixed)
            rows = min(BLOCK_ROWS, table.num_embeddings - first)
            mine = range(first + (rank - first) % size, first + rows, size)
            part = table.weight[mine.start // size : mine.start // size + len(mine)]
            whole = part if size == 1 else part.new_empty(rows, part.shape[1])
            # By the inverse of the distribution, as `nn.init.trunc_normal_` once did: 10 times as fast as it is now.
            whole.uniform_(-_WITHIN, _WITHIN, generator=generator).erfinv_().mul_(std * math.sqrt(2))
            if size > 1:
                part.copy_(whole[mine.start - first :: size])


def take_rows(to: Tensor, shards: Sequence[Tensor], world: World) -> None:
    """Fill this process's part of a table from the parts of another number of processes (or from one whole table).
    Raises ValueError for parts of another table."""
    same = len(shards) == world.size
    if any(shard.shape[1:] != to.shape[1:] for shard in shards) or (same and shards[world.rank].shape != to.shape):
        raise ValueError(f"expected rows as of {list(to.shape)}, found {[list(shard.shape) for shard in shards]}")
    if same:
        to.copy_(shards[world.rank])
        return
    for first in range(0, len(to), BLOCK_ROWS):
        part = to[first : first + BLOCK_ROWS]
        rows = world.rank + world.size * torch.arange(first, first + len(part))
        for number, shard in enumerate(shards):
            there = rows % len(shards) == number
            part[there.to(part.device)] = shard[rows[there] // len(shards)].to(device=part.device, dtype=part.dtype)


def interleave(to: Tensor, shards: Sequence[Tensor]) -> None:
    """The whole table from all its parts."""
    for number, shard in enumerate(shards):
        to[number :: len(shards)] = shard


def _summed(rows: Tensor, gradients: Tensor) -> tuple[Tensor, Tensor]:
    """Distinct rows, ascending, and the sums of their gradients: added in the order given, unlike `index_add_`'s on
    GPUs."""
    distinct_U, place = torch.unique(rows, return_inverse=True)
    total = torch.ops.aten.embedding_dense_backward(_flat(gradients), place, len(distinct_U), -1, False)
    return distinct_U, total.view(len(distinct_U), *gradients.shape[1:])


def _flat(values: Tensor) -> Tensor:
    """[U, D], of none too, and of a table without width."""
    return values.reshape(len(values), math.prod(values.shape[1:]))
