"""Which of a chunk's shared negatives are true triples: they are masked, or self-adversarial weights would raise them.

Shape letters: ``S`` chunks, ``C`` triples of a chunk, ``K`` candidates that the chunk shares.
"""

import numpy as np
import numpy.typing as npt

from trainer.arrays import IntArray
from trainer.knowledge_graph.triples import KnownTriples, Side, ranges

_FILTER_BITS = 17
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def known_places(known: KnownTriples, triples_SC3: IntArray, candidates_SK: IntArray, side: Side) -> IntArray:
    """Places in [S, C, K] where the candidate in place of the triple's `side` makes a known triple, ascending.

    A hash join: from candidates to the queries that they are known to answer, which are few, and from these to the
    chunk's triples. The cost grows with the candidates' degrees, not with S · C · K.
    """
    num_chunks, size, _ = triples_SC3.shape
    num_candidates = candidates_SK.shape[1]
    most = known.num_entities * known.num_relations  # more than any key, so that chunks stay apart
    asked = known.query_keys(triples_SC3.reshape(-1, 3), side) + np.repeat(np.arange(num_chunks) * most, size)
    answered, keys = known.queries_of(candidates_SK.reshape(-1), side)
    wanted = keys + (np.arange(num_chunks) * most).repeat(num_candidates)[answered]

    seen = np.zeros(1 << _FILTER_BITS, dtype=bool)  # most of the known queries are asked nowhere in their chunk
    seen[_hashed(asked)] = True
    maybe = np.flatnonzero(seen[_hashed(wanted)])
    wanted, answered = wanted[maybe], answered[maybe]

    order = np.argsort(asked, kind="stable")
    sorted_asked = asked[order]
    first = np.searchsorted(sorted_asked, wanted, "left")
    found = np.flatnonzero(sorted_asked[np.minimum(first, len(asked) - 1)] == wanted)
    last = np.searchsorted(sorted_asked, wanted[found], "right")
    which, places = ranges(first[found], last)
    return np.sort(order[places] * num_candidates + answered[found][which] % num_candidates)


def _hashed(keys: IntArray) -> npt.NDArray[np.uint64]:
    """By multiplication with 2^64 over the golden ratio (Knuth)."""
    mixed: npt.NDArray[np.uint64] = (keys.view(np.uint64) * _GOLDEN) >> np.uint64(64 - _FILTER_BITS)
    return mixed
