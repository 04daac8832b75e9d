"""Batches of static shapes, for devices that the host must not wait for: whole sequences packed into rows.

A batch keeps its padded tensors, at one shape [B, T] for all batches; what is computed on events alone (masks, targets,
times) stays there. The network, which costs hundreds of times as much, goes through R rows of T positions, each
filled with whole sequences, where attention sees its own sequence only. R is one of a few numbers, so that a step is
one of as many graphs. On MovieLens-1M, where padding takes half of the positions, rows are filled to about nine tenths.

Shape letters: ``B`` sequences, ``T`` positions, ``R`` packed rows, ``M`` their positions, R times T.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from trainer.arrays import IntArray
from trainer.data.device_random import DeviceRandom, key_of

SIZES = 16  # numbers of rows that there are, at most; of MovieLens-1M's batches, three or four


@dataclass
class Packing:
    """How the sequences of a batch [B, T] lie in rows [R, T].

    source [R, T] int64: a packed position's place in the flattened [B, T], -1 for one that holds nothing; keys [2, 2]
    int64: of draws that are the same on all processes, and of this process's own; first [] int64: the place of this
    process's first sequence in the global batch."""

    source_RT: Tensor
    keys_22: Tensor
    first: Tensor
    max_length: int  # T

    @classmethod
    def of(cls, lengths: IntArray, draw: Sequence[int], *, first: int, rows: int, max_length: int) -> "Packing":
        """Of a batch padded to [`rows`, `max_length`] that has sequences of these lengths; `draw`: (seed, epoch,
        step); `first`: of this process, in the global batch."""
        keys = [key_of(*draw), key_of(*draw, first)]
        source_RT = torch.from_numpy(_sources(lengths, rows, max_length))
        return cls(source_RT, torch.tensor(keys), torch.tensor(first), max_length)

    def changed(self, change: Callable[[Tensor], Tensor]) -> "Packing":
        """With each tensor changed."""
        return Packing(change(self.source_RT), change(self.keys_22), change(self.first), self.max_length)

    @property
    def shared(self) -> DeviceRandom:
        """Draws for the global batch."""
        return DeviceRandom(self.keys_22[0])

    @property
    def own(self) -> DeviceRandom:
        """Draws of this process."""
        return DeviceRandom(self.keys_22[1])

    def packed(self, values_BT: Tensor, fill: float = 0) -> Tensor:
        """[R, T] of what a batch has for each event; `fill` where there is none."""
        found_RT = values_BT.flatten()[self.source_RT.clamp(min=0)]
        return torch.where(self.source_RT >= 0, found_RT, fill)

    @property
    def places_RT(self) -> Tensor:
        """Each position's place in its own sequence; 0 where there is none."""
        return self.source_RT.clamp(min=0) % self.max_length

    @property
    def owners_RT(self) -> Tensor:
        """The place of each position's sequence in the batch; 0 where there is none."""
        return self.source_RT.clamp(min=0) // self.max_length

    def attends_RTT(self, lengths_B: Tensor, *, causal: bool) -> Tensor:
        """Bool [R, T, T]: which positions each one sees: those of its own sequence, up to `lengths`, with `causal` up
        to itself. Positions of no sequence see each other, so that no row of a softmax is empty."""
        owners_RT, places_RT = self.owners_RT, self.places_RT
        is_real_RT = (self.source_RT >= 0) & (places_RT < lengths_B[owners_RT])
        segment_RT = torch.where(is_real_RT, owners_RT, -1)
        sees_RTT = segment_RT[:, :, None] == segment_RT[:, None]
        if causal:
            place_T = torch.arange(self.max_length, device=segment_RT.device)
            sees_RTT = sees_RTT & (place_T <= place_T[:, None])
        return sees_RTT


def num_rows_of(needed: int, rows: int) -> int:
    """The number of packed rows of a batch that needs so many, of the `SIZES` that there are up to `rows`."""
    step = -(-rows // SIZES)
    return min(rows, -(-max(needed, 1) // step) * step)


def _sources(lengths: IntArray, rows: int, max_length: int) -> IntArray:
    """`Packing.source_RT` [R, T]."""
    row_B, begin_B, needed = best_fit(lengths, max_length)
    source_RT = np.full((num_rows_of(needed, rows), max_length), -1, dtype=np.int64)
    within = np.arange(max_length) < lengths[:, None]
    column_BT = np.arange(max_length)
    target_BT = (row_B * max_length + begin_B)[:, None] + column_BT
    source_BT = (np.arange(len(lengths)) * max_length)[:, None] + column_BT
    source_RT.reshape(-1)[target_BT[within]] = source_BT[within]
    return source_RT


def best_fit(lengths: IntArray, width: int) -> tuple[IntArray, IntArray, int]:
    """Row and first place of each sequence, and the number of rows of `width` that it takes: longest first, each where
    the least room is left (best fit decreasing: Johnson et al. 1974, at most 11/9 of the fewest rows, and one)."""
    row_B, begin_B = np.zeros(len(lengths), np.int64), np.zeros(len(lengths), np.int64)
    with_room: list[list[int]] = [[] for _ in range(width + 1)]  # rows that have so much room
    has_room = 0  # bit r: there is a row with room r
    num_rows = 0
    for sequence in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[sequence])
        if length == 0:
            break
        fitting = has_room >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = with_room[room].pop()
            if not with_room[room]:
                has_room &= ~(1 << room)
        else:
            room, row = width, num_rows
            num_rows += 1
        row_B[sequence], begin_B[sequence] = row, width - room
        if left := room - length:
            with_room[left].append(row)
            has_room |= 1 << left
    return row_B, begin_B, num_rows
