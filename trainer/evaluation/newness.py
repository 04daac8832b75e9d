"""In a split by time, or with cold items: metrics of users and items that are new, beside those of known users.

A user is new without a training event in the domain, an item without a training interaction of anyone. A model can have
learned nothing of either, so their numbers are shown apart.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from trainer.evaluation.comparison import Key, Results
from trainer.evaluation.ranking_metrics import FloatArray
from trainer.evaluation.scorers import EvaluationSet

KNOWN_USERS, NEW_USERS, NEW_ITEMS = "known users", "new users", "new items"


@dataclass(frozen=True)
class Newness:
    """What is new among the users who are evaluated and what they hold out."""

    is_new_U: npt.NDArray[np.bool_]
    num_items: int  # new ones among those held out
    num_held_out_items: int  # different ones

    def count(self, name: str) -> int:
        new = int(self.is_new_U.sum())
        return {KNOWN_USERS: len(self.is_new_U) - new, NEW_USERS: new, NEW_ITEMS: self.num_items}[name]

    @property
    def names(self) -> list[str]:
        """The slices that hold anything."""
        return [name for name in (KNOWN_USERS, NEW_USERS, NEW_ITEMS) if self.count(name)]


def newness(examples: EvaluationSet) -> Newness | None:
    """None for a split that is neither by time nor with cold items."""
    held_out = examples.held_out
    if held_out.candidates is None and not held_out.sets:
        return None
    items = np.unique(held_out.targets[held_out.targets >= 0])
    new = int((examples.training_interactions[items] == 0).sum())
    return Newness(held_out.training_items == 0, new, len(items))


def means_of(results: Results, new: Newness, key: Key, protocol: str, metric: str) -> dict[str, float]:
    """The mean metric of each slice; of new items each held-out one is ranked alone."""
    of_users = results.of_users(key, protocol, metric)
    values: dict[str, FloatArray | None] = {
        KNOWN_USERS: of_users[~new.is_new_U],
        NEW_USERS: of_users[new.is_new_U],
        NEW_ITEMS: results.on_rare_items(key, protocol, metric, at_most=0),
    }
    given = {name: values[name] for name in new.names}
    return {name: mean_of_known(value) for name, value in given.items() if value is not None}


def mean_of_known(values: FloatArray) -> float:
    """NaN where nothing is known: a protocol may rank nothing of a slice."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")


def table(results: Results, new: Newness, protocol: str, metric: str) -> str:
    """A line for each label, seeds averaged."""
    titles = [f"{name} ({new.count(name):,})" for name in new.names]
    width = max(len("model"), *map(len, results.labels))
    head = f"{'model':<{width}}" + "".join(f"{title:>{len(title) + 2}}" for title in titles)
    lines = [f"{metric} ({protocol}) by what is new since training", head, "─" * len(head)]
    for label in results.labels:
        rows = [means_of(results, new, (label, seed), protocol, metric) for seed in results.seeds(label)]
        cells = [f"{np.mean([row[name] for row in rows]):.4f}" for name in new.names]
        wide = [len(title) + 2 for title in titles]
        lines.append(f"{label:<{width}}" + "".join(f"{cell:>{size}}" for cell, size in zip(cells, wide, strict=True)))
    return "\n".join(lines)


def summary(results: Results, new: Newness, protocols: Sequence[str], metric: str) -> dict[str, Any]:
    """What summary.json says of it."""
    return {
        "metric": metric,
        "users": len(new.is_new_U),
        "new_users": new.count(NEW_USERS),
        "held_out_items": new.num_held_out_items,
        "new_items": new.num_items,
        "means": [
            {"label": label, "seed": seed, "protocol": protocol}
            | means_of(results, new, (label, seed), protocol, metric)
            for label, seed in results.scorers
            for protocol in protocols
        ],
    }
