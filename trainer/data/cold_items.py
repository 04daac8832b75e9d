"""Which rows of a catalogue a split with cold items holds out."""

import numpy as np
import numpy.typing as npt

from etl.tables import FIRST_INDEX, cold_item_hash
from trainer.data.catalogue import Catalogue, rows_of_domain
from trainer.data.release import Release

BoolArray = npt.NDArray[np.bool_]
COLD, WARM = "cold", "warm"  # protocols of such a split: cold items among cold ones, warm items among warm ones


def cold_rows(release: Release, split: str, catalogue: Catalogue) -> dict[str, BoolArray]:
    """Part (validation, test) -> bool [V], the rows of items all of whose events are of that part. Empty for a split
    without cold items."""
    cold = release.cold_items.get(split)
    if cold is None:
        return {}
    share_V = np.ones(len(catalogue))
    share_V[FIRST_INDEX:] = [cold_item_hash(raw, cold.seed) for raw in catalogue.raw_ids[FIRST_INDEX:]]
    if cold.domain is not None:
        share_V[~rows_of_domain(release, catalogue, cold.domain)] = 1
    is_test_V = share_V < cold.share
    return {"validation": (share_V < cold.share + cold.validation) & ~is_test_V, "test": is_test_V}


def candidate_sets(release: Release, split: str, catalogue: Catalogue, part: str) -> dict[str, BoolArray]:
    """Protocol -> bool [V], the rows that are ranked by it: COLD, items that are cold for `part`; WARM, those trained
    on. Empty for a split without cold items."""
    parts = cold_rows(release, split, catalogue)
    if not parts:
        return {}
    is_warm_V = ~(parts["validation"] | parts["test"])
    is_warm_V[:FIRST_INDEX] = False
    return {COLD: parts[part], WARM: is_warm_V}
