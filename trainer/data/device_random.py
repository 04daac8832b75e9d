"""Random numbers that are drawn where they are used: a hash of a key, a stream and a counter.

The same on every device, eager and compiled; no state, so nothing of it is read back or saved. The hash is that of
Wellons (2018, *Prospecting for hash functions*, multipliers found by TheIronBorn), once for each word of the key.
Numbers of 32 bits are held in int64, where products with multipliers below 2^31 can't overflow.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

WORD = (1 << 32) - 1
GOLDEN = 0x9E3779B9  # streams that follow each other begin far apart


class DeviceRandom:
    """Draws by a key (`key_of`), int64 [2]. Each call names a stream; `next_stream` gives those of dropout, in the
    order of layers."""

    def __init__(self, key_2: Tensor) -> None:
        self.key_2, self._streams = key_2, 1 << 16

    def next_stream(self) -> int:
        self._streams += 1
        return self._streams

    def bits(self, stream: int, counter: Tensor) -> Tensor:
        """32 bits, as int64, of each of `counter` (int64, below 2^32)."""
        found = _mixed(counter ^ self.key_2[0])
        return _mixed((found + self.key_2[1] + (stream * GOLDEN & WORD)) & WORD)

    def uniform(self, stream: int, counter: Tensor) -> Tensor:
        """float32 in [0, 1), multiples of 2^-24."""
        return (self.bits(stream, counter) >> 8).float() * 2.0**-24

    def integers(self, stream: int, counter: Tensor, below: int) -> Tensor:
        """int64 from 0 to `below` - 1 (below 2^31), each as often to one in 2^32 / `below`."""
        return (self.bits(stream, counter) * below) >> 32

    def kept(self, shape: Sequence[int], threshold: int) -> Tensor:
        """Bool of that shape, a new stream at each call: False with a probability of threshold / 256."""
        counter = torch.arange(int(np.prod(shape)), device=self.key_2.device)
        return (self.bits(self.next_stream(), counter) >= threshold << 24).view(tuple(shape))


def key_of(*parts: int) -> list[int]:
    """The two words of a key, from any integers."""
    digest = hashlib.blake2b(np.array(parts, dtype=np.int64).tobytes(), digest_size=8).digest()
    return [int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")]


def _mixed(word: Tensor) -> Tensor:
    word = ((word ^ (word >> 16)) * 0x21F0AAAD) & WORD
    word = ((word ^ (word >> 15)) * 0x735A2D97) & WORD
    return word ^ (word >> 15)
