"""Which items negatives are drawn from in a split by time: those that the log has by the end of the part.

An item that comes out later is no candidate, and items are as popular as they are in the training part.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from etl.histories.negative_sampling import Candidates, candidates
from etl.tables import PARTS

_ENDS = dict(zip(PARTS, ("valid_start", "test_start", "end"), strict=True))


def counts(sequences: DataFrame, splits: Sequence[str]) -> dict[tuple[str, str], pa.Table]:
    """(split, domain) of the `splits` by time -> index of each item, and its events until each part ends (columns
    train, validation, test). It grows with the items alone."""
    if not splits:
        return {}
    events = sequences.where(F.col("split").isin(list(splits))).select(
        "split", "domain", *_ENDS.values(), F.posexplode("items").alias("place", "index")
    )
    sums = [F.sum((F.col("place") < F.col(end)).cast("long")).alias(part) for part, end in _ENDS.items()]
    table = events.groupBy("split", "domain", "index").agg(*sums).toArrow()
    found = {}
    for split, domain in {(row["split"], row["domain"]) for row in table.select(["split", "domain"]).to_pylist()}:
        own = pc.and_(pc.equal(table["split"], split), pc.equal(table["domain"], domain))
        found[split, domain] = table.filter(own).select(["index", *PARTS])
    return found


def of_parts(items: pa.Table, counted: pa.Table) -> Mapping[str, Candidates]:
    """The candidates of validation and test. `items`: index and word of a domain's; `counted`: see `counts`."""
    known = items.select(["index", "word"]).join(counted, "index", join_type="inner").sort_by("index")
    found = {}
    for part in PARTS[1:]:
        mine = known.filter(pc.greater(known[part], 0))
        weight = mine["train"].to_numpy()
        weight = weight if weight.any() else np.ones_like(weight)  # nothing is trained on: all alike
        index, word = mine["index"].to_numpy().astype(np.int64), mine["word"].to_numpy().view(np.uint64)
        found[part] = candidates(index, word, weight)
    return found
