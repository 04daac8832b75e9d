"""Chunks of a batch on a CPU's cores: each goes through the network on one thread, start to end, and back.

torch's own way, all cores at each operation, makes them wait for each other a few hundred times in a step; here twice.
What a chunk gives depends on nothing but the chunk, and gradients are summed in the order of chunks: the same bits come
out whichever thread was first, and however many there are. `tests/benchmarks/threads.py` measures what threads gain
(2 over 1: 1.3 to 1.9 times), `tests/benchmarks/train_small.py` the step beside one that is padded and not cut.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from trainer.parallel.cores import on_threads


def mapped(
    function: Callable[[int, Tensor], Tensor], inputs: Sequence[Tensor], weights: Sequence[Tensor]
) -> list[Tensor]:
    """``[function(0, inputs[0]), function(1, inputs[1]), …]``, differentiable by `inputs` and by `weights`, which are
    all that the function reads of what is trained. Random numbers have to be the function's own: threads share
    torch's."""
    if inputs[0].device.type != "cpu":
        return [function(number, x) for number, x in enumerate(inputs)]
    if torch.is_grad_enabled():
        trained = [weight for weight in weights if weight.requires_grad]
        return list(_Mapped.apply(function, len(inputs), *inputs, *trained))  # type: ignore[no-untyped-call]
    return list(on_threads(lambda number: function(number, inputs[number]), len(inputs)))


class _Mapped(torch.autograd.Function):
    """A graph of each chunk, made and walked back by some thread, as one node of the step's graph."""

    @staticmethod
    def forward(ctx: Any, function: Callable[[int, Tensor], Tensor], num: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        inputs = [x.detach().requires_grad_() for x in tensors[:num]]

        def through(number: int) -> Tensor:
            with torch.enable_grad():
                return function(number, inputs[number])

        outputs = list(on_threads(through, num))
        ctx.graphs, ctx.weights = list(zip(inputs, outputs, strict=True)), tensors[num:]
        return tuple(output.detach() for output in outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        def back(number: int) -> tuple[Tensor | None, ...]:
            x, output = ctx.graphs[number]
            ctx.graphs[number] = None  # its memory is the next chunk's
            return torch.autograd.grad(output, [x, *ctx.weights], gradients[number], allow_unused=True)

        of_inputs: list[Tensor | None] = []
        of_weights: list[Tensor | None] = [None] * len(ctx.weights)
        for of_input, *slopes in on_threads(back, len(gradients)):
            of_inputs.append(of_input)
            of_weights = [_sum(*pair) for pair in zip(of_weights, slopes, strict=True)]
        return None, None, *of_inputs, *of_weights


def _sum(total: Tensor | None, more: Tensor | None) -> Tensor | None:
    if total is None or more is None:
        return total if more is None else more
    return total.add_(more)


def sizes_by_length(lengths_B: Tensor, most: int) -> list[int]:
    """How many sequences, in ascending order of length, go through the network together: with padding about `most`
    positions on a CPU, elsewhere all."""
    if lengths_B.device.type != "cpu" or len(lengths_B) == 0:
        return [len(lengths_B)]
    sizes = [0]
    for length in lengths_B.tolist():
        if sizes[-1] and (sizes[-1] + 1) * length > most:
            sizes.append(0)
        sizes[-1] += 1
    return sizes


def order_of(wanted_BT: Tensor, order_B: Tensor) -> Tensor:
    """Where the wanted positions of rows put in an order stand, in the rows' order of old."""
    T = wanted_BT.shape[1]
    old_BT = order_B[:, None] * T + torch.arange(T, device=wanted_BT.device)
    return old_BT[wanted_BT].argsort()
