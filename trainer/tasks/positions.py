"""The positions of a batch at which a loss is taken, and random numbers, in the two ways that batches are laid out.

Ragged: as many positions as there are, found by the host: what is fastest on a CPU. Packed: always the same number,
each with a weight of 0 or 1, in the rows of the batch's packing (`trainer.data.packing`): what a GPU computes without
being waited for. This file alone knows which way it is; tasks ask it for hidden states, targets, counts and draws.

Shape letters: ``B`` sequences, ``T`` positions, ``N`` those at which a loss is taken, ``D`` width.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from trainer.data.batch import Batch
from trainer.data.device_random import DeviceRandom
from trainer.models import SequenceModel
from trainer.models.packed_places import PackedPlaces
from trainer.models.time import EventInputs

Draw = tuple[int, ...] | DeviceRandom  # what random numbers are a function of: drawn on the host, or on the device


@dataclass(frozen=True)
class Inputs:
    """What a network reads at each position of the padded batch; as `SequenceModel.forward` has them."""

    items_BT: Tensor
    lengths_B: Tensor
    users_B: Tensor
    events: EventInputs


@dataclass(frozen=True)
class Positions:
    """Those of `mask` [B, T] bool, or the packed `places` that hold them."""

    mask_BT: Tensor
    places: PackedPlaces | None

    def hidden(self, model: SequenceModel, inputs: Inputs, *, causal: bool, table_VD: Tensor | None) -> Tensor:
        """Hidden states [N, D]."""
        items_BT, lengths_B, users_B, events = inputs.items_BT, inputs.lengths_B, inputs.users_B, inputs.events
        if self.places is not None:
            return model.packed_states(
                items_BT, lengths_B, users_B, self.places, causal=causal, table_VD=table_VD, events=events
            )
        found: Tensor = model(
            items_BT, lengths_B, users_B, self.mask_BT, causal=causal, table_VD=table_VD, events=events
        )
        return found

    def of_events(self, values_BT: Tensor) -> Tensor:
        """[N] of what the padded batch has for each event."""
        return values_BT[self.mask_BT] if self.places is None else self.places.of_events(values_BT)

    @property
    def weight_N(self) -> Tensor | None:
        """0 or 1; None: 1 at each."""
        return None if self.places is None else self.places.is_wanted_N

    @property
    def count(self) -> Tensor:
        """How many have a weight of 1."""
        return self.mask_BT.sum() if self.places is None else self.places.is_wanted_N.sum()


def positions_of(batch: Batch, mask_BT: Tensor, share: float | None = None) -> Positions:
    """Those of `mask_BT`, which chance chooses one by one at a rate of `share`, and one a sequence; None: nearly all
    that there are."""
    if batch.packing is None:
        return Positions(mask_BT, None)
    if share is None:
        return Positions(mask_BT, PackedPlaces.every(batch.packing, mask_BT))
    return Positions(mask_BT, PackedPlaces.of_share(batch.packing, mask_BT, share))


def draw_of(batch: Batch) -> Draw:
    """For what is drawn for the global batch."""
    return batch.draw if batch.packing is None else batch.packing.shared


def uniform(batch: Batch, stream: int, of_positions: int, of_sequences: int) -> tuple[Tensor, Tensor]:
    """Numbers in [0, 1), float32: [of_positions, B, T] and [of_sequences, B]. Drawn for the global batch, then those of
    this process's sequences, so that they depend on no world size."""
    (B, T), device = batch.items.shape, batch.items.device
    if batch.packing is None:
        random, rows = np.random.default_rng([*batch.draw, stream]), batch.global_rows
        each_BT = torch.from_numpy(random.random((of_positions, rows, T), dtype=np.float32)[:, batch.rows])
        each_B = torch.from_numpy(random.random((of_sequences, rows), dtype=np.float32)[:, batch.rows])
        return each_BT.to(device), each_B.to(device)
    draws, streams = batch.packing.shared, 64 * stream
    row_B = batch.packing.first + torch.arange(B, device=device)
    event_BT = row_B[:, None] * T + torch.arange(T, device=device)
    each_BT = torch.stack([draws.uniform(streams + number, event_BT) for number in range(of_positions)])
    each_B = torch.stack([draws.uniform(streams + 32 + number, row_B) for number in range(of_sequences)])
    return each_BT, each_B


def integers(draw: Draw, stream: int, count: int, below: int, device: torch.device) -> Tensor:
    """int64 [count] from 0 to `below` - 1."""
    if isinstance(draw, DeviceRandom):
        return draw.integers(64 * stream, torch.arange(count, device=device), below)
    return torch.from_numpy(np.random.default_rng([*draw, stream]).integers(0, below, count)).to(device)
