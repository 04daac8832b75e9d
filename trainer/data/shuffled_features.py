"""The control of an experiment on features: things that are as popular exchange what they are described by.

Features can help by more than what they say: by more parameters, by whether a thing has any, by the popularity that
goes with them. Shuffled ones do all that, and say nothing of the thing itself.

Shape letters: ``V`` catalogue rows.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from trainer.arrays import IntArray

GROUPS, LEAST = 10, 5  # deciles of popularity, of so many rows at least
_STREAM = 0x5F1E  # of random numbers, apart from the seed's other ones


@dataclass(frozen=True)
class Shuffle:
    """Of a catalogue's rows, by their interactions in the training part."""

    interactions_V: IntArray
    seed: int

    def rows(self, has_V: npt.NDArray[np.bool_]) -> IntArray:
        """[V] the row whose features each row gets: a permutation within groups of rows that have any, by decile of
        popularity; those without an interaction are a group. In a group of two or more none keeps its own (Sattolo
        1986); of fewer than fifty rows there are fewer groups, so that there is a choice."""
        rows_V = np.arange(len(has_V))
        random = np.random.default_rng([self.seed, _STREAM])
        trained = np.flatnonzero(has_V & (self.interactions_V > 0))
        by_popularity = trained[np.argsort(self.interactions_V[trained], kind="stable")]
        groups = np.array_split(by_popularity, max(1, min(GROUPS, len(trained) // LEAST)))
        for group in [np.flatnonzero(has_V & (self.interactions_V == 0)), *groups]:
            ring = random.permutation(group)
            rows_V[ring] = np.roll(ring, 1)
        return rows_V
