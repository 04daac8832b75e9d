"""Training: a step reads and changes the rows of its batch only, whatever the length of the tables.

A step is a function of weights and batch alone, and batches are one of (triples, seed, epoch), so a run that was
killed goes on bit for bit. Tables are shared out over processes row by row (`RowTables`), and row-wise Adagrad keeps
one number a row.

Shape letters: ``S`` chunks, ``C`` triples of a chunk, ``K`` negatives of a side, ``E`` width of an entity's row.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field

import numpy as np
import torch
from pydantic import TypeAdapter
from torch import Tensor, nn

from trainer.config.graph import GraphTrainConfig
from trainer.knowledge_graph import loss
from trainer.knowledge_graph.base import ENTITIES, GraphModel
from trainer.knowledge_graph.batches import TripleBatch, TripleBatches
from trainer.knowledge_graph.rows import DistinctRows, distinct_rows
from trainer.knowledge_graph.similarity import Queries
from trainer.knowledge_graph.triples import RELATION, Side
from trainer.models.row_table import RowTable, RowTables, take_rows
from trainer.parallel.cores import on_threads
from trainer.parallel.distributed import World
from trainer.training.checkpoint import Checkpoint, fitting
from trainer.training.loop import NonFiniteLoss
from trainer.training.optimizer import adagrad_rows

_TABLES = "tables"  # of a checkpoint
_SUMS = "sums"
_CACHED_SCORES = 1 << 17


@dataclass
class GraphEpoch:
    """One line of a run's history. `loss` of a triple, both sides together."""

    epoch: int
    loss: float
    triples_per_second: float
    seconds: float
    metrics: dict[str, float] = field(default_factory=dict)  # of the validation part


@dataclass
class GraphProgress:
    """What has happened so far; JSON in a checkpoint."""

    epoch: int = 0  # under way, from 0
    step: int = 0  # of this epoch
    loss_sum: float = 0.0
    triples: int = 0
    seconds: float = 0.0
    history: list[GraphEpoch] = field(default_factory=list)


class GraphTraining:
    """A run under way. `state()` is a checkpoint, `restore()` takes one."""

    def __init__(
        self,
        model: GraphModel,
        batches: TripleBatches,
        config: GraphTrainConfig,
        world: World,
    ) -> None:
        self.model, self.batches, self.config, self.world = model, batches, config, world
        self.rows = RowTables(world)
        known = batches.known
        lengths = {name: known.num_entities if name == ENTITIES else known.num_relations for name in model.widths}
        self.tables: dict[str, Tensor] = {}
        self.sums: dict[str, Tensor] = {}
        for number, (name, width) in enumerate(model.widths.items()):
            table = RowTable(lengths[name], width, self.rows)
            table.weight = nn.Parameter(_memory(table.weight.shape, world.dtype))
            scale = model.initial_scale(name, config.margin)
            self.rows.initialise(table, seed=[config.seed, number], std=scale)
            with torch.no_grad():
                model.initialise(name, table.weight)
                model.constrain(name, table.weight)
            self.tables[name] = table.weight
            self.sums[name] = _memory(table.weight.shape[:1], world.dtype).zero_()
        self.progress = GraphProgress()

    def learning_rate(self) -> float:
        """Of the step that comes: falls linearly to none at the end of the last epoch."""
        steps = self.batches.num_steps
        done = (self.progress.epoch * steps + self.progress.step) / (self.config.epochs * steps)
        return self.config.learning_rate * (1 - done)

    def step(self, batch: TripleBatch) -> None:
        """One step on a global batch, of which `batch` is this process's part. Raises NonFiniteLoss."""
        read = self._read(batch)
        total = self._backward(batch, read)
        if not math.isfinite(total):
            progress = self.progress
            raise NonFiniteLoss(
                f"expected a loss that is a number, found {total} at epoch {progress.epoch + 1}, step {progress.step}; "
                "lower train.learning_rate"
            )
        rate = self.learning_rate()
        for name, rows in read.items():
            self._update(name, rows, rate)
        self.progress.step += 1
        self.progress.loss_sum += total
        self.progress.triples += batch.global_size

    def _read(self, batch: TripleBatch) -> dict[str, "_Read"]:
        entities = _Read.of(self.rows, self.tables[ENTITIES], distinct_rows(batch.entities()), batch.parts())
        of_relation = batch.triples[:, :1, RELATION] if self.model.one_relation else batch.triples[..., RELATION]
        relations = distinct_rows(of_relation.ravel())
        return {
            name: entities if name == ENTITIES else _Read.of(self.rows, table, relations, [of_relation.shape])
            for name, table in self.tables.items()
        }

    def _backward(self, batch: TripleBatch, read: Mapping[str, "_Read"]) -> float:
        """Leave the gradients of the batch with the rows read. Returns the loss of all processes' triples."""
        if not len(batch.triples):  # fewer chunks than processes
            return self.world.sum(0.0)[0]
        heads, tails, other_heads, other_tails = read[ENTITIES].leaves
        relations = {name: rows.leaves[0] for name, rows in read.items() if name != ENTITIES}
        model = self.model
        to_tails, to_heads = model.tail_queries(heads, relations), model.head_queries(tails, relations)
        positives = model.similarity.of_pairs(to_tails, model.candidates(tails, relations))
        with torch.no_grad():
            filled = torch.arange(positives.shape[1]) < torch.from_numpy(batch.sizes)[:, None]
            losses, slopes = loss.of_positives(positives, self.config.margin)
            total = 2 * float((losses * filled).sum())
            slopes *= 2 * filled  # it stands against the negatives of either side
        outputs, gradients = [positives], [slopes]
        sides: list[tuple[Side, Queries, Tensor]] = [("head", to_heads, other_heads), ("tail", to_tails, other_tails)]
        for side, queries, others in sides:
            candidates = model.candidates(others, relations)
            outputs += [queries.vectors_SCD, candidates]
            if queries.normals_SCD is not None:
                outputs.append(queries.normals_SCD)
            found, of_side = self._negatives(queries.detach(), candidates.detach(), batch, side)
            gradients += found
            total += of_side
        torch.autograd.backward(outputs, gradients)
        return self.world.sum(total)[0]

    @torch.no_grad()
    def _negatives(
        self, queries: Queries, candidates_SKD: Tensor, batch: TripleBatch, side: Side
    ) -> tuple[list[Tensor], float]:
        """Gradients of the queries' vectors, of candidates, and of normals where there are some: on each core a few
        chunks at a time, so that what lies between stays in its cache. And the loss of the side, as in the batch's
        first chunk (to be looked at, while a logarithm of every score would cost a tenth of the step)."""
        size, count = queries.vectors_SCD.shape[1], candidates_SKD.shape[1]
        at_once = max(1, _CACHED_SCORES // (size * count))

        def work(number: int) -> tuple[Queries, Tensor, float]:
            chunks = slice(number * at_once, min((number + 1) * at_once, len(batch.sizes)))
            return self._some_negatives(queries[chunks], candidates_SKD[chunks], batch, side, chunks)

        parts = list(on_threads(work, -(-len(batch.sizes) // at_once)))
        found = [torch.cat([part.vectors_SCD for part, _, _ in parts]), torch.cat([part for _, part, _ in parts])]
        if queries.normals_SCD is not None:
            found.append(torch.cat([part.normals_SCD for part, _, _ in parts if part.normals_SCD is not None]))
        return found, parts[0][2] * int(batch.sizes.sum())

    def _some_negatives(
        self, queries: Queries, candidates_SKD: Tensor, batch: TripleBatch, side: Side, chunks: slice
    ) -> tuple[Queries, Tensor, float]:
        """Gradients of some chunks' queries and candidates, and the mean loss of the first of them."""
        similarity, config = self.model.similarity, self.config
        scores = similarity.of_all(queries, candidates_SKD)
        known = torch.from_numpy(batch.known_in(chunks, side))
        weights, slopes = loss.of_negatives(scores, known, config.margin, config.adversarial_temperature)
        mean = 0.0
        if chunks.start == 0:
            seen = int(batch.sizes[0])
            mean = float(loss.summed(scores[:1, :seen], weights[:1, :seen], config.margin).mean())
        sizes = batch.sizes[chunks]
        for chunk in np.flatnonzero(sizes < slopes.shape[1]):
            slopes[chunk, sizes[chunk] :] = 0.0
        return *similarity.gradients(queries, candidates_SKD, scores, slopes), mean

    @torch.no_grad()
    def _update(self, name: str, read: "_Read", rate: float) -> None:
        """Row-wise Adagrad on the rows that this process keeps, of all processes' gradients."""
        table, sums = self.tables[name].detach(), self.sums[name]
        rows_U, gradient_UE = self.rows.at_owners(read.distinct.rows_U, read.gradient())
        values_UE = read.values_UE if self.world.size == 1 else table.index_select(0, rows_U)
        values_UE, sums_U = adagrad_rows(values_UE, sums.index_select(0, rows_U), gradient_UE, rate)
        self.model.constrain(name, values_UE)
        table.index_copy_(0, rows_U, values_UE)
        sums.index_copy_(0, rows_U, sums_U)

    def state(self) -> Checkpoint:
        return Checkpoint(
            tensors={},
            parts={
                _TABLES: {name: [table.detach()] for name, table in self.tables.items()},
                _SUMS: {name: [sums] for name, sums in self.sums.items()},
            },
            state={"progress": asdict(self.progress)},
        )

    @torch.no_grad()
    def restore(self, saved: Checkpoint) -> None:
        """Raises GraftrecError for a checkpoint of another run."""
        with fitting(saved):
            progress = TypeAdapter(GraphProgress).validate_python(saved.state["progress"])
            for name, table in self.tables.items():
                take_rows(table, saved.parts[_TABLES][name], self.world)
                take_rows(self.sums[name], saved.parts[_SUMS][name], self.world)
            self.progress = progress

    @torch.no_grad()
    def begin(self, whole: Mapping[str, Tensor]) -> None:
        """Take these weights, of all rows of every table, instead of those by chance."""
        for name, table in self.tables.items():
            take_rows(table, [whole[name]], self.world)
            self.model.constrain(name, table)

    def whole(self) -> dict[str, Tensor]:
        """All rows of every table, on each process; to be read only."""
        return {name: self.rows.whole(table, self.rows.num_rows(table)) for name, table in self.tables.items()}


def _memory(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Memory of numpy's, which asks Linux for huge pages: rows of a table of gigabytes are found twice as fast."""
    return torch.from_numpy(np.empty(shape, dtype=str(dtype).removeprefix("torch.")))


@dataclass(frozen=True)
class _Read:
    """Rows of one table that a step reads."""

    distinct: DistinctRows
    values_UE: Tensor
    leaves: list[Tensor]  # the rows as the batch names them, where the backward pass ends

    @classmethod
    def of(cls, tables: RowTables, table: Tensor, distinct: DistinctRows, shapes: Sequence[tuple[int, ...]]) -> "_Read":
        """The batch names its rows in parts of these shapes."""
        values_UE = tables.fetch(table.detach(), distinct.rows_U)
        parts = torch.split(distinct.places_N, [math.prod(shape) for shape in shapes])
        leaves = [
            values_UE.index_select(0, part).view(*shape, values_UE.shape[1]).requires_grad_()
            for part, shape in zip(parts, shapes, strict=True)
        ]
        return cls(distinct, values_UE, leaves)

    def gradient(self) -> Tensor:
        """[U, E]."""
        width = self.values_UE.shape[1]
        parts = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in self.leaves]
        return self.distinct.summed(torch.cat([part.view(-1, width) for part in parts]))
