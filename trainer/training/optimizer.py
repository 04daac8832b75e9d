"""The optimiser: AdamW for layers and dense tables, row-wise Adagrad for tables that are looked up by row.

Row-wise Adagrad (Duchi et al. 2011; one accumulator a row, as in Naumov et al. 2019 and Mudigere et al. 2022): with g
the gradient of a row of width D, ``G += mean(g²)`` and ``row -= rate · g / (sqrt(G) + eps)``. Its state is one number a
row: 40 MB for 10 M rows, where AdamW's would be 10 GB at width 128.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from trainer.config import TrainConfig
from trainer.models import SequenceModel
from trainer.parallel.cores import torch_threads_for
from trainer.parallel.distributed import World

EPSILON = 1e-10
ACCUMULATOR = "sum_of_squares"


class Optimizer:
    """One step's `clip`, then `update`. `state()` is what a checkpoint holds of it, named ``<parameter>:<slot>``."""

    def __init__(self, model: SequenceModel, config: TrainConfig, world: World) -> None:
        self.config, self.world, self._rows = config, world, model.tables
        trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        tables = model.row_tables()
        self.tables = {name: table for name, table in tables.items() if name in trained}
        self.dense = {name: parameter for name, parameter in trained.items() if name not in tables}
        self.adamw = _adamw(self.dense, config)
        self._num_dense = sum(parameter.numel() for parameter in self.dense.values())
        self.sums = {
            name: torch.zeros(len(table), device=table.device, dtype=table.dtype) for name, table in self.tables.items()
        }
        self._gradients: list[tuple[Tensor, Tensor]] = []

    def clip(self, max_norm: float) -> float:
        """Scale the gradients of the step so that their norm, over all processes' rows, is at most `max_norm`.

        Returns the norm before. To be called once after each backward pass, by all processes.
        """
        if self._rows is None:
            return float(nn.utils.clip_grad_norm_(self.dense.values(), max_norm))
        self._gradients = self._rows.gradients(list(self.tables.values()))
        dense = [parameter.grad for parameter in self.dense.values() if parameter.grad is not None]
        (of_rows,) = self.world.sum(sum(float(gradient.square().sum()) for _, gradient in self._gradients))
        norm = math.sqrt(float(nn.utils.get_total_norm(dense)) ** 2 + of_rows)
        scale = max_norm / (norm + 1e-6)
        if scale < 1:  # not where the norm is no number: the caller stops there
            for gradient in [*dense, *(gradient for _, gradient in self._gradients)]:
                gradient.mul_(scale)
        return norm

    def clip_on_device(self, max_norm: float) -> Tensor:
        """As `clip`, of dense parameters, and nothing waits for it: the norm before, []."""
        assert self._rows is None
        return nn.utils.clip_grad_norm_(self.dense.values(), max_norm)

    @torch.no_grad()
    def update(self, learning_rate: float, *, skip: Tensor | None = None) -> None:
        """Change the weights by the gradients that `clip` left, and drop these. `skip` bool []: leave all as it is,
        decided on the device."""
        for group in self.adamw.param_groups:
            group["lr"] = learning_rate
        if skip is not None:
            self.adamw.found_inf = skip.float()  # type: ignore[attr-defined]  # as GradScaler tells a fused optimizer
        with torch_threads_for(self._num_dense):
            self.adamw.step()
        self.adamw.zero_grad(set_to_none=True)
        rate = self.config.table_learning_rate * learning_rate / self.config.learning_rate
        for (name, table), (rows, gradient) in zip(self.tables.items(), self._gradients, strict=True):
            row_wise_adagrad(table, self.sums[name], rows, gradient, rate)
        self._gradients = []

    def state(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """(AdamW's moments, the same on every process; this process's part of the tables' accumulators)."""
        names = {id(parameter): name for name, parameter in self.dense.items()}
        moments = {
            f"{names[id(parameter)]}:{slot}": value
            for parameter, slots in self.adamw.state.items()
            for slot, value in slots.items()
        }
        return moments, {f"{name}:{ACCUMULATOR}": total for name, total in self.sums.items()}

    def restore(self, moments: Mapping[str, Tensor]) -> None:
        """AdamW's moments; the accumulators are filled in place by whoever knows how they lie on disk. Raises
        ValueError for moments of other parameters."""
        for key, value in moments.items():
            name, _, slot = key.rpartition(":")
            parameter = self.dense[name]
            shape = parameter.shape if slot in ("exp_avg", "exp_avg_sq") else torch.Size()
            if slot not in ("exp_avg", "exp_avg_sq", "step") or value.shape != shape or not value.is_floating_point():
                raise ValueError(f"expected moments of {name}, found {slot} of shape {list(value.shape)}")
            self.adamw.state[parameter][slot] = value.to(parameter.device, copy=True)


@torch.no_grad()
def row_wise_adagrad(table: Tensor, sums: Tensor, rows_U: Tensor, gradient: Tensor, rate: float) -> None:
    """One step on distinct rows of a table [V, D] or [V], in place; `sums` [V] is each row's accumulator."""
    table[rows_U], sums[rows_U] = adagrad_rows(table[rows_U], sums[rows_U], gradient, rate)


def adagrad_rows(values: Tensor, sums_U: Tensor, gradient: Tensor, rate: float) -> tuple[Tensor, Tensor]:
    """Rows [U, D] or [U] and their accumulators [U] after one step."""
    total_U = sums_U + (gradient.square() if gradient.ndim == 1 else gradient.square().mean(1))
    scale_U = rate / (total_U.sqrt() + EPSILON)
    return values - gradient * (scale_U if gradient.ndim == 1 else scale_U[:, None]), total_U


def _adamw(parameters: dict[str, nn.Parameter], config: TrainConfig) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2019); weight decay on matrices of layers only, not on tables, biases, norms."""
    decayed = [p for name, p in parameters.items() if p.ndim == 2 and "embedding" not in name]
    others = [p for name, p in parameters.items() if not (p.ndim == 2 and "embedding" not in name)]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=config.learning_rate, fused=True)
