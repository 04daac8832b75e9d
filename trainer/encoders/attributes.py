"""Columns of items or users as vectors: a flag for each value of a categorical column, numbers standardised.

Only columns that are named are read: many that logs come with, such as counts of votes and mean ratings, are younger
than what a split holds out, and tell it.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from etl.identifiers import is_no_text
from trainer.arrays import FloatArray
from trainer.encoders import EncoderError
from trainer.encoders.text import Part


def attribute_vectors(
    categorical: Mapping[str, Sequence[Part]], numeric: Mapping[str, Sequence[Part]], *, min_things: int
) -> tuple[FloatArray, tuple[str, ...]]:
    """[N, F] of N things' columns, and the F names. A categorical column gives a flag to each value that `min_things`
    have at least, a numeric one a standardised number and a flag that it is known. What isn't known is zero.

    Raises EncoderError for a column that holds nothing.
    """
    blocks: list[FloatArray] = []
    names: list[str] = []
    for column, cells in categorical.items():
        values = [_values(cell) for cell in cells]
        counts = Counter(value for own in values for value in own)
        known = sorted(value for value, count in counts.items() if count >= min_things)
        if not known:
            raise EncoderError(
                f"{column}: expected a value that {min_things:,} have at least, found none of {len(counts):,}; leave "
                "the column out, or lower --attributes.min_things"
            )
        place = {value: number for number, value in enumerate(known)}
        flags = np.zeros((len(values), len(known)), dtype=np.float32)
        for row, own in enumerate(values):
            flags[row, [place[value] for value in own if value in place]] = 1
        blocks.append(flags)
        names += [f"{column}={value}" for value in known]
    for column, cells in numeric.items():
        numbers = np.array([_number(cell) for cell in cells])
        is_known = np.isfinite(numbers)
        if not is_known.any():
            raise EncoderError(f"{column}: expected numbers, found none; leave the column out, or call it categorical")
        mean, deviation = numbers[is_known].mean(), numbers[is_known].std()
        standard = np.where(is_known, (numbers - mean) / (deviation or 1.0), 0)
        blocks.append(np.stack([standard, is_known], axis=1).astype(np.float32))
        names += [column, f"{column} known"]
    return np.concatenate(blocks, axis=1), tuple(names)


def reduced(vectors_NF: FloatArray, components: int) -> FloatArray:
    """[N, components] the centred vectors along their directions of most variance (principal components: Pearson 1901),
    the largest first; in fewer directions if there are no more. Of things without any, zero."""
    has_any_N = vectors_NF.any(axis=1)
    centred = vectors_NF[has_any_N].astype(np.float64)
    centred -= centred.mean(0)
    if len(centred) < centred.shape[1]:  # the smaller of both matrices of products
        squares, left = np.linalg.eigh(centred @ centred.T)
        along = left * np.sqrt(np.maximum(squares, 0))
    else:
        squares, right = np.linalg.eigh(centred.T @ centred)
        along = centred @ right
    kept = squares[::-1][:components] > 1e-9 * squares[-1]
    along = along[:, ::-1][:, : len(kept)][:, kept]
    along *= np.where(along[np.abs(along).argmax(0), np.arange(along.shape[1])] < 0, -1, 1)  # one of both signs
    found = np.zeros((len(vectors_NF), along.shape[1]), np.float32)
    found[has_any_N] = along
    return found


def _values(cell: Part) -> list[str]:
    """Each once."""
    entries = [] if cell is None else [str(cell)] if isinstance(cell, str | int) else cell
    return sorted({entry.strip() for entry in entries if entry is not None and not is_no_text(entry)})


def _number(cell: Part) -> float:
    """NaN for what is no finite number."""
    try:
        number = float(cell) if isinstance(cell, str | int) else math.nan
    except ValueError:
        return math.nan
    return number if math.isfinite(number) else math.nan
