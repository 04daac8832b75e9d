"""The typed batch that models and tasks see."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from trainer.data.packing import Packing


@dataclass
class Batch:
    """Padded sequences of B users, T positions, oldest first, padded at the end.

    items [B, T] int64 catalogue rows (PAD past the end); lengths [B]; users [B] global user index, UNK where the user
    is hidden from the model; owners [B]: whose sequences they are (None: `users`);
    everyone [G, T]: items of the whole global batch, where the task looks at others' (None: `items` are all there are);
    values [B, T] float32: the events' values, where they are read; NaN where there is none, anything past the end;
    event_types [B, T] int64: the events' kinds, where they are read: places among `data.event_types` from 1 on, 0 for
    none of them, anything past the end;
    times [B, T] int64: when events were, where it is read: microseconds since 1970, anything past the end;
    request_times [B] int64: when the request is made, as `times`; None in training;
    rows: this rank's slice of the global batch of `global_rows` users and `global_items` items; draw: (seed, epoch,
    step), which whatever is random about this batch is a function of;
    packing: how its sequences lie in rows of static shapes (`trainer.data.packing`); None: ragged, and drawn on the
    host.
    """

    items: Tensor
    lengths: Tensor
    users: Tensor
    global_rows: int
    rows: slice
    draw: tuple[int, ...]
    global_items: int = 0
    owners: Tensor | None = None
    everyone: Tensor | None = None
    values: Tensor | None = None
    event_types: Tensor | None = None
    times: Tensor | None = None
    request_times: Tensor | None = None
    packing: Packing | None = None

    @property
    def mask_BT(self) -> Tensor:
        """True at real positions."""
        return torch.arange(self.items.shape[1], device=self.items.device) < self.lengths[:, None]

    def to(self, device: torch.device) -> "Batch":
        return self._with(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> "Batch":
        """In memory that a GPU copies from while the host goes on."""
        return self._with(torch.Tensor.pin_memory)

    def tensors(self) -> list[Tensor]:
        """All that a step reads."""
        found: list[Tensor] = []
        self._with(lambda tensor: found.append(tensor) or tensor)  # type: ignore[func-returns-value]
        return found

    def _with(self, changed: Callable[[Tensor], Tensor]) -> "Batch":
        """What a step reads, changed: not `owners`, which stay on the host."""

        def also(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else changed(tensor)

        return replace(
            self,
            items=changed(self.items),
            lengths=changed(self.lengths),
            users=changed(self.users),
            values=also(self.values),
            event_types=also(self.event_types),
            times=also(self.times),
            request_times=also(self.request_times),
            everyone=also(self.everyone),
            packing=None if self.packing is None else self.packing.changed(changed),
        )
