"""Triples (head, relation, tail) as arrays, and the index of those that are known to be true.

Shape letters: ``N`` triples; columns are always head, relation, tail.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

from trainer.arrays import IntArray

Side = Literal["head", "tail"]  # of a triple: what is replaced, or predicted
SIDES: tuple[Side, ...] = ("head", "tail")
HEAD, RELATION, TAIL = range(3)


def distinct(triples_N3: IntArray) -> IntArray:
    """The triples without repetitions, each at the place where it is first."""
    _, first = np.unique(triples_N3, axis=0, return_index=True)
    return triples_N3[np.sort(first)]


@dataclass(frozen=True)
class Split:
    """Distinct triples in three parts without a triple in common."""

    train: IntArray
    validation: IntArray
    test: IntArray

    @property
    def all(self) -> IntArray:
        return np.concatenate([self.train, self.validation, self.test])


def split_triples(triples_N3: IntArray, *, validation: float, test: float, seed: int) -> Split:
    """Hold shares of the triples out, by chance. Repetitions are dropped first, so that none is in two parts, and a
    triple whose reverse (the same relation, tail and head exchanged) is held out is held out with it."""
    kept = distinct(triples_N3)
    ends = np.sort(kept[:, [HEAD, TAIL]], axis=1)
    _, edge_of = np.unique(np.column_stack([ends, kept[:, RELATION]]), axis=0, return_inverse=True)
    drawn = np.random.default_rng([seed, 0]).random(int(edge_of.max(initial=-1)) + 1)[edge_of]
    in_test = drawn < test
    in_validation = ~in_test & (drawn < test + validation)
    return Split(kept[~(in_test | in_validation)], kept[in_validation], kept[in_test])


def with_inverses(split: Split, num_relations: int) -> Split:
    """The training part with the inverse of each triple, of relation r + `num_relations`. Held-out parts have none: an
    inverse in training of a triple held out would give it away, hence a split comes first, and inverses are never
    stored."""
    inverse = split.train[:, [TAIL, RELATION, HEAD]] + np.array([0, num_relations, 0])
    return Split(np.concatenate([split.train, inverse]), split.validation, split.test)


class KnownTriples:
    """Which heads and tails make a true triple: looked up by the other two parts (filtered ranking), or by the
    candidate (masks of shared negatives)."""

    def __init__(self, triples_N3: IntArray, *, num_entities: int, num_relations: int) -> None:
        self.triples, self.num_entities, self.num_relations = triples_N3, num_entities, num_relations

    def query_keys(self, triples_N3: IntArray, side: Side) -> IntArray:
        """A number [N] for what remains of each triple without its `side`."""
        given = triples_N3[:, TAIL if side == "head" else HEAD]
        return given * self.num_relations + triples_N3[:, RELATION]

    def answers(self, triples_N3: IntArray, side: Side) -> tuple[IntArray, IntArray]:
        """All known answers to the queries that the triples are without their `side`: (row of the query, entity)."""
        keys, entities = self._by_query[side]
        wanted = self.query_keys(triples_N3, side)
        first, last = np.searchsorted(keys, wanted, "left"), np.searchsorted(keys, wanted, "right")
        rows, places = ranges(first, last)
        return rows, entities[places]

    def queries_of(self, entities: IntArray, side: Side) -> tuple[IntArray, IntArray]:
        """All queries that these entities answer as `side`: (place in `entities`, key of the query)."""
        offsets, keys = self._by_entity[side]
        rows, places = ranges(offsets[entities], offsets[entities + 1])
        return rows, keys[places]

    @cached_property
    def _by_query(self) -> dict[Side, tuple[IntArray, IntArray]]:
        found: dict[Side, tuple[IntArray, IntArray]] = {}
        for side in SIDES:
            entities = self.triples[:, HEAD if side == "head" else TAIL]
            keys = self.query_keys(self.triples, side)
            order = np.lexsort((entities, keys))
            found[side] = keys[order], entities[order]
        return found

    @cached_property
    def _by_entity(self) -> dict[Side, tuple[IntArray, IntArray]]:
        found: dict[Side, tuple[IntArray, IntArray]] = {}
        for side in SIDES:
            entities = self.triples[:, HEAD if side == "head" else TAIL]
            order = np.argsort(entities, kind="stable")
            offsets = np.zeros(self.num_entities + 1, dtype=np.int64)
            np.cumsum(np.bincount(entities, minlength=self.num_entities), out=offsets[1:])
            found[side] = offsets, self.query_keys(self.triples, side)[order]
        return found


def ranges(first: IntArray, last: IntArray) -> tuple[IntArray, IntArray]:
    """Every number of the ranges [first, last), and which range it is of."""
    lengths = last - first
    rows = np.repeat(np.arange(len(first)), lengths)
    starts = np.cumsum(lengths) - lengths
    return rows, np.arange(len(rows)) - starts[rows] + first[rows]
