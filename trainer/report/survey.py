"""The survey's numbers (Zeng et al. 2021, "Knowledge Transfer via Pre-training for Recommendation: A Review and
Prospect", section 4), beside which an experiment's are shown.

`TABLE_2` is keyed by the row ids of experiments (`row_id`), in percent. The paper does not say how it counts three
held-out items; the five numbers of a BERT4Rec row can only be of the convention `list`, those of a Caser row only of
`single` (`ranking_metrics`). So the two blocks can't be compared with each other; and Caser's lie so near chance for
100 uniform negatives that other candidates must have been scored.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from trainer.evaluation.ranking_metrics import Convention

NAMES = {"bert4rec": "BERT4Rec", "caser": "Caser"}
METRICS = ("NDCG@1", "NDCG@5", "NDCG@10", "Recall@5", "Recall@10")
PROTOCOL = "uniform-100"
CONVENTIONS: Mapping[str, Convention] = {"caser": "single", "bert4rec": "list"}

# Table 1: users, items, items with metadata, interactions, average length.
TABLE_1: Mapping[str, tuple[int, int, int, int, float]] = {
    "all": (6_040, 3_416, 2_025, 999_000, 165.5),
    "source": (6_040, 2_349, 1_415, 725_000, 120.1),
    "target": (6_040, 1_067, 610, 274_000, 45.4),
}

TABLE_2: Mapping[str, tuple[float, float, float, float, float]] = {
    "caser/none/-/plain": (3.27, 6.09, 7.47, 8.83, 13.14),
    "caser/none/-/knowledge": (3.17, 6.14, 7.53, 9.00, 13.32),
    "caser/shallow/next_item/plain": (3.33, 6.24, 7.67, 9.06, 13.53),
    "caser/shallow/next_item/knowledge": (3.27, 6.25, 7.62, 9.21, 13.49),
    "caser/shallow/masked_item/plain": (3.18, 6.25, 7.62, 9.26, 13.54),
    "caser/shallow/masked_item/knowledge": (3.13, 6.09, 7.51, 8.88, 13.28),
    "caser/deep/next_item/plain": (2.87, 5.82, 7.34, 8.75, 13.47),
    "caser/deep/next_item/knowledge": (3.21, 6.08, 7.59, 8.89, 13.59),
    "caser/deep/masked_item/plain": (2.73, 5.76, 7.18, 8.78, 13.18),
    "caser/deep/masked_item/knowledge": (3.13, 6.06, 7.48, 8.90, 13.32),
    "bert4rec/none/-/plain": (30.07, 32.05, 39.44, 34.99, 51.35),
    "bert4rec/none/-/knowledge": (30.18, 32.75, 39.94, 35.83, 51.72),
    "bert4rec/shallow/next_item/plain": (30.92, 33.93, 41.37, 37.48, 53.92),
    "bert4rec/shallow/next_item/knowledge": (32.98, 35.58, 42.85, 38.98, 55.02),
    "bert4rec/shallow/masked_item/plain": (31.03, 34.00, 41.39, 37.40, 53.73),
    "bert4rec/shallow/masked_item/knowledge": (32.61, 35.19, 42.36, 38.51, 54.35),
    "bert4rec/deep/next_item/plain": (30.57, 33.69, 41.21, 37.28, 53.90),
    "bert4rec/deep/next_item/knowledge": (32.96, 35.31, 42.71, 38.55, 54.91),
    "bert4rec/deep/masked_item/plain": (32.47, 35.33, 42.60, 38.69, 54.73),
    "bert4rec/deep/masked_item/knowledge": (33.54, 35.84, 42.95, 39.04, 54.73),
}


def row_id(model: str, transfer: str, pretrain_task: str | None, knowledge: bool) -> str:
    """The id of a row of Table 2, e.g. bert4rec/deep/masked_item/knowledge."""
    return f"{model}/{transfer}/{pretrain_task or '-'}/{'knowledge' if knowledge else 'plain'}"


def is_of(domains: Iterable[Mapping[str, Any]]) -> bool:
    """Whether an experiment's domains are the survey's data (ML-1M), by the number of users: only then are its numbers
    shown."""
    return any(domain["users"] == TABLE_1["all"][0] for domain in domains)
