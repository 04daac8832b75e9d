"""Filtered ranking of held-out triples, by relation and side (Bordes et al. 2013), ties realistic.

A triple (h, r, t) asks twice: which tail has (h, r, ?), which head (?, r, t). All entities are candidates but the other
known answers, of every part. Where others score the same, the rank is the mean of the best and the worst place
(Berrendorf et al. 2020, *On the Ambiguity of Rank-Based Evaluation of Entity Alignment or Link Prediction Methods*): a
model that scores all alike has the mean rank (n + 1) / 2, not 1. The answer's score comes from the same product as all
others.

Shape letters: ``N`` triples, ``C`` of them at once, ``V`` entities.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from etl.settings import GraftrecError
from trainer.arrays import IntArray
from trainer.knowledge_graph.base import ENTITIES, GraphModel, Rows
from trainer.knowledge_graph.triples import HEAD, RELATION, SIDES, TAIL, KnownTriples, Side

HITS = (1, 3, 10)
_BLOCK_SCORES = 1 << 24  # scores that are held at once
FloatArray64 = npt.NDArray[np.float64]


class NonFiniteScores(GraftrecError):
    """A model whose scores are no numbers ranks nothing."""

    exit_code = 4


@dataclass(frozen=True)
class Ranks:
    """Places of the answers, 1 is best: `best` [N] and `worst` [N] of each side, in the order of `triples`."""

    triples: IntArray
    best: Mapping[Side, IntArray]
    worst: Mapping[Side, IntArray]

    def realistic(self, side: Side) -> FloatArray64:
        return (self.best[side] + self.worst[side]) / 2

    def metrics(self) -> dict[str, float]:
        """MRR, Hits@k and the mean rank over both sides together."""
        return summary(np.concatenate([self.realistic(side) for side in SIDES]))

    def by_relation(self) -> list[tuple[int, Side, dict[str, float]]]:
        """(relation, side, metrics and the number of triples) of each relation that the triples have."""
        relations = self.triples[:, RELATION]
        found: list[tuple[int, Side, dict[str, float]]] = []
        for relation in np.unique(relations):
            of_it = relations == relation
            found += [
                (int(relation), side, summary(self.realistic(side)[of_it]) | {"triples": int(of_it.sum())})
                for side in SIDES
            ]
        return found


def summary(ranks: FloatArray64) -> dict[str, float]:
    """Metrics of realistic ranks; not a number where there are none."""
    if not len(ranks):
        return {"MRR": float("nan"), **{f"Hits@{k}": float("nan") for k in HITS}, "mean rank": float("nan")}
    hits = {f"Hits@{k}": float((ranks <= k).mean()) for k in HITS}
    return {"MRR": float((1 / ranks).mean()), **hits, "mean rank": float(ranks.mean())}


@torch.no_grad()
def filtered_ranks(model: GraphModel, tables: Mapping[str, Tensor], triples_N3: IntArray, known: KnownTriples) -> Ranks:
    """Ranks of `triples_N3` among all entities, without other answers in `known`. Raises NonFiniteScores."""
    best = {side: np.empty(len(triples_N3), dtype=np.int64) for side in SIDES}
    worst = {side: np.empty(len(triples_N3), dtype=np.int64) for side in SIDES}
    for places, relations in _chunks(model, tables, triples_N3):
        chunk = triples_N3[places]
        everything = model.candidates(tables[ENTITIES][None], relations)
        for side in SIDES:
            given = tables[ENTITIES][torch.from_numpy(chunk[:, HEAD if side == "tail" else TAIL])][None]
            queries = model.tail_queries(given, relations) if side == "tail" else model.head_queries(given, relations)
            scores_CV = model.similarity.of_all(queries, everything)[0]
            best[side][places], worst[side][places] = _places(scores_CV, chunk, side, known)
    return Ranks(triples_N3, best, worst)


def _places(scores_CV: Tensor, chunk: IntArray, side: Side, known: KnownTriples) -> tuple[IntArray, IntArray]:
    """Best and worst place of each answer."""
    answers = torch.from_numpy(chunk[:, HEAD if side == "head" else TAIL])
    own_C1 = scores_CV.gather(1, answers[:, None])
    better, equal = (scores_CV > own_C1).sum(1), (scores_CV == own_C1).sum(1)
    if not bool(torch.isfinite(scores_CV.sum())):
        raise NonFiniteScores("expected scores that are numbers, found some that are not; lower train.learning_rate")
    rows, others = (torch.from_numpy(found) for found in known.answers(chunk, side))
    elsewhere = others != answers[rows]
    rows, others = rows[elsewhere], others[elsewhere]
    theirs, own = scores_CV[rows, others], own_C1[rows, 0]
    better -= torch.bincount(rows[theirs > own], minlength=len(chunk))
    equal -= torch.bincount(rows[theirs == own], minlength=len(chunk))
    return (better + 1).numpy(), (better + equal).numpy()


def _chunks(model: GraphModel, tables: Mapping[str, Tensor], triples_N3: IntArray) -> Iterator[tuple[IntArray, Rows]]:
    """Places of triples that are ranked together, and the rows of their relations; of one relation where the model
    needs it."""
    size = max(1, _BLOCK_SCORES // len(tables[ENTITIES]))
    relations = triples_N3[:, RELATION]
    order = np.argsort(relations, kind="stable")
    runs = [order]
    if model.one_relation:
        runs = np.split(order, np.flatnonzero(np.diff(relations[order])) + 1)
    for run in runs:
        for first in range(0, len(run), size):
            places = run[first : first + size]
            rows = torch.from_numpy(relations[places[:1] if model.one_relation else places])
            yield places, {name: tables[name][rows][None] for name in model.widths if name != ENTITIES}
