"""The typed batch that models and tasks see."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor


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
    step), which whatever is random about this batch is a function of.
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

    @property
    def mask_BT(self) -> Tensor:
        """True at real positions."""
        return torch.arange(self.items.shape[1], device=self.items.device) < self.lengths[:, None]

    def to(self, device: torch.device) -> "Batch":
        return replace(
            self,
            items=self.items.to(device, non_blocking=True),
            lengths=self.lengths.to(device, non_blocking=True),
            users=self.users.to(device, non_blocking=True),
            values=None if self.values is None else self.values.to(device, non_blocking=True),
            event_types=None if self.event_types is None else self.event_types.to(device, non_blocking=True),
            times=None if self.times is None else self.times.to(device, non_blocking=True),
            request_times=None if self.request_times is None else self.request_times.to(device, non_blocking=True),
            everyone=None if self.everyone is None else self.everyone.to(device, non_blocking=True),
        )
