"""Why a transfer would copy nothing: its fine-tuned model would be one of transfer `none` under another name.

Only `shallow` can be empty: `deep` and `patch` copy a network's layers, which every model has. Settings refuse
`patch` for a model without blocks.
"""

import numpy as np

from etl import tables
from etl.tables import FIRST_INDEX, UNK
from trainer.arrays import IntArray
from trainer.config import FinetuneConfig
from trainer.data.catalogue import read_catalogue, read_knowledge
from trainer.data.release import Release, domains_with_sequences

ADVICE = "transfer deep instead, or give the models embeddings of what both domains have (user_width, knowledge)"


def empty_by_settings(config: FinetuneConfig) -> str:
    """A reason that no data can change; "" where there is something to copy."""
    model = config.model
    if config.transfer != "shallow" or model.user_width or model.knowledge or config.shared_items:
        return ""
    return (
        "transfer shallow copies user and knowledge embeddings, of which this model has none (model.user_width 0, "
        "model.knowledge {}), so it would be transfer none"
    )


def empty_by_data(config: FinetuneConfig, release: Release, source: str) -> str:
    """A reason in the tables: domain `source`, of the parent, and the one that is fine-tuned on share neither users
    nor metadata, as far as the model has embeddings of them. "" where there is something to copy, or no such
    domain."""
    target, split = config.data.domain, config.data.split
    known = domains_with_sequences(release, split)
    if config.transfer != "shallow" or source == target or source not in known or target not in known:
        return ""
    lacking = []
    if config.model.user_width:
        if np.intersect1d(_users(release, split, source), _users(release, split, target)).size:
            return ""
        lacking.append("user")
    if config.model.knowledge:
        own, theirs = (_entities(release, domain, config.model.knowledge) for domain in (target, source))
        if np.intersect1d(own, theirs).size:
            return ""
        lacking.append("metadata")
    if config.shared_items:
        own, theirs = (read_catalogue(release, domain).global_index[FIRST_INDEX:] for domain in (target, source))
        if np.intersect1d(own, theirs).size:
            return ""
        lacking.append("item")
    return (
        f"domains {source!r} and {target!r} share no {' and no '.join(lacking)}, so transfer shallow would copy "
        "nothing and be transfer none"
    )


def _users(release: Release, split: str, domain: str) -> IntArray:
    """Indices of the users with a sequence in a domain."""
    found: IntArray = release.read(tables.SEQUENCES, ["user"], {"split": split, "domain": domain})["user"].to_numpy()
    return found


def _entities(release: Release, domain: str, slots: dict[str, int]) -> IntArray:
    """Indices of the entities that the kept items of a domain have."""
    found = np.unique(read_knowledge(release, read_catalogue(release, domain), slots))
    return found[found > UNK].astype(np.int64)
