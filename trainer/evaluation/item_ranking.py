"""How a scorer ranks what users held out (`trainer.data.held_out`), in rows of one catalogue.

Early stopping, `evaluate` and `promote` all go through `ranks`, so that a number means the same wherever it is printed.

Shape letters: ``U`` users, ``B`` users of a batch, ``V`` rows of the catalogue, ``R`` held-out items of a user (ragged,
padded by -1), ``N`` negatives of a user (ragged, padded by -1), ``P`` pairs of a user and a row.

Protocols: ``full`` ranks the held-out items among every item of the catalogue less those in the user's input;
of a split with cold items ``cold`` ranks cold items among cold ones and ``warm`` warm items among warm ones;
``uniform-100``, ``popular-100`` and ``top-100`` rank them among themselves and the user's fixed negatives. Metrics are
named as in `trainer.evaluation.ranking_metrics`: bare names are of the convention ``list``, those of
``single`` begin with ``single/``, those of ``basket`` with ``basket/``.
"""

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from tqdm import tqdm

from etl.tables import FIRST_INDEX
from trainer.arrays import IntArray
from trainer.data.events import Events
from trainer.data.held_out import FULL, HeldOut
from trainer.evaluation.ranking_metrics import KS, PADDED, Convention, FloatArray, metrics_from_ranks, place_targets
from trainer.inference.scorer import Scores

Score = Callable[[Events], Scores]  # histories in rows -> [B, V]

SINGLE, BASKET = "single/", "basket/"  # prefixes of metrics of the conventions `single` and `basket`
CONVENTIONS: dict[str, Convention] = {SINGLE: "single", BASKET: "basket"}


def rank(
    score: Score,
    held_out: HeldOut,
    *,
    batch_size: int = 256,
    ks: Sequence[int] = KS,
    progress: bool = False,
) -> dict[str, dict[str, FloatArray]]:
    """Per-user metrics: protocol -> metric -> float64 [U], in the order of `held_out.users`. See `ranks`."""
    found = ranks(score, held_out, batch_size=batch_size, progress=progress)
    return {protocol: metrics_of(ranks_UR, ks=ks) for protocol, ranks_UR in found.items()}


def ranks(score: Score, held_out: HeldOut, *, batch_size: int = 256, progress: bool = False) -> dict[str, IntArray]:
    """Protocol -> ranks int64 [U, R] of the held-out items (see `trainer.evaluation.ranking_metrics.place_targets`).

    Users are batched by length, to spare padding. Memory: that of a batch and a block of its scores, beside the result,
    whatever the catalogue. Where a batch's scores are more than one block they are made twice: once for those of the
    held-out items, once to count what is not below them. Ties count against the held-out item, and so does a score that
    is NaN.
    """
    order = np.argsort(held_out.histories.lengths, kind="stable")
    found = {protocol: np.empty_like(held_out.targets) for protocol in held_out.protocols}
    drawn = list(held_out.negatives)
    num_targets = held_out.targets.shape[1]
    bar = tqdm(total=len(held_out), unit=" users", desc="ranking", disable=None if progress else True, leave=False)
    for start in range(0, len(order), batch_size):
        users = order[start : start + batch_size]
        histories = held_out.histories.take(users)
        scores = score(histories)
        examples = [torch.from_numpy(held_out.negatives[protocol][users]) for protocol in drawn]
        targets_BR = torch.from_numpy(held_out.targets[users])
        widths = [num_targets, *(negatives_BN.shape[1] for negatives_BN in examples)]
        gathered = scores.gather(torch.cat([targets_BR, *examples], 1), FIRST_INDEX)
        parts = gathered.tensor_split(np.cumsum(widths)[:-1].tolist(), dim=1)
        for protocol, negatives_BN, scores_BN in zip(drawn, examples, parts[1:], strict=True):
            device = scores_BN.device
            ranks_BR = rank_among(parts[0], targets_BR.to(device), scores_BN, negatives_BN.to(device))
            found[protocol][users] = ranks_BR.cpu().numpy()
        left_out = histories.until(np.zeros(len(histories), np.int64)) if held_out.repeats else histories
        for protocol in found:
            if protocol == FULL:
                ranks_BR = rank_in_full(scores, parts[0], targets_BR, left_out, FIRST_INDEX, among=held_out.candidates)
            elif (among := held_out.sets.get(protocol)) is not None:
                ranks_BR = _rank_in_set(scores, parts[0], held_out.targets[users], left_out, among)
            else:
                continue
            found[protocol][users] = ranks_BR.cpu().numpy()
        bar.update(len(users))
    bar.close()
    return found


@torch.inference_mode()
def rank_in_full(
    scores: Scores,
    scores_BR: Tensor,
    targets_BR: Tensor,
    left_out: Events,
    first: int,
    *,
    among: npt.NDArray[np.bool_] | None = None,
) -> Tensor:
    """Ranks int64 [B, R] of held-out items among all rows from `first` but those `left_out`.

    `among` [V]: only among these rows, which the held-out and the left-out ones belong to.

    `scores_BR`: the held-out items' (`scores.gather`). Competitors are counted block by block: all that are not below,
    less those of them that don't compete, which are few.
    """
    B, V, device = len(targets_BR), scores.num_rows, scores_BR.device
    # A pair of user and row is the number owner * V + row. Sorted: numpy's `unique` and `isin` take 10 times as long.
    left_N = np.sort(np.repeat(np.arange(B), left_out.lengths) * V + left_out.items)
    wanted_BR = np.arange(B)[:, None] * V + targets_BR.numpy()
    place_BR = np.minimum(np.searchsorted(left_N, wanted_BR), max(len(left_N) - 1, 0))
    is_candidate_BR = targets_BR.numpy() >= first
    if len(left_N):
        is_candidate_BR &= left_N[place_BR] != wanted_BR
    apart = np.sort(np.concatenate([left_N, wanted_BR[targets_BR.numpy() >= first]]))
    apart = apart[np.diff(apart, prepend=-1) > 0]  # each pair once, though it be left out twice
    owner_P, rows_P = (torch.from_numpy(part).to(device) for part in np.divmod(apart, V))
    above_BR = torch.zeros(targets_BR.shape, dtype=torch.long, device=device)
    for start, block in scores.blocks(first):
        here = (rows_P >= start) & (rows_P < start + block.shape[1])
        owner_N, scores_N = owner_P[here], block[owner_P[here], rows_P[here] - start]
        counted = block
        if among is not None:
            counted = block[:, torch.from_numpy(np.flatnonzero(among[start : start + block.shape[1]])).to(device)]
        for r in range(targets_BR.shape[1]):  # one target at a time, so that memory stays that of a block
            # "not below" rather than "above or equal": a NaN on either side counts against the target.
            apart_N = ~(scores_N < scores_BR[owner_N, r])
            above_BR[:, r] += counted.shape[1] - _count(counted < scores_BR[:, r, None])
            above_BR[:, r] -= torch.bincount(owner_N[apart_N], minlength=B)
    targets_BR = targets_BR.to(device)
    return place_targets(above_BR, scores_BR, targets_BR, torch.from_numpy(is_candidate_BR).to(device))


def _rank_in_set(
    scores: Scores, scores_BR: Tensor, targets_BR: IntArray, left_out: Events, among: npt.NDArray[np.bool_]
) -> Tensor:
    """Ranks int64 [B, R] of the held-out items that are `among` these rows [V], among them; PADDED for others."""
    own_BR = np.where(among[targets_BR], targets_BR, PADDED)
    own_BR[targets_BR < 0] = PADDED
    width = int((own_BR >= 0).sum(1).max(initial=0))
    place_BR = np.argsort(own_BR < 0, axis=1, kind="stable")[:, :width]  # those that count stand first, in their order
    narrow_BR = torch.from_numpy(np.take_along_axis(own_BR, place_BR, 1))
    places = torch.from_numpy(place_BR).to(scores_BR.device)
    left_out = left_out.keep(among[left_out.items])
    ranks_BR = rank_in_full(scores, scores_BR.gather(1, places), narrow_BR, left_out, FIRST_INDEX, among=among)
    return torch.full_like(scores_BR, PADDED, dtype=torch.long).scatter(1, places, ranks_BR)


def rank_among(scores_BR: Tensor, targets_BR: Tensor, scores_BN: Tensor, negatives_BN: Tensor) -> Tensor:
    """Ranks int64 [B, R] of held-out items among themselves and fixed negatives [B, N] (-1 where padded).

    The protocols `uniform-100`, `popular-100` and `top-100`. A negative that is a held-out item is left out.
    """
    competes_BN = (negatives_BN >= 0) & ~(negatives_BN[:, :, None] == targets_BR[:, None, :]).any(2)
    above_BR = (~(scores_BN[:, :, None] < scores_BR[:, None, :]) & competes_BN[:, :, None]).sum(1)
    return place_targets(above_BR, scores_BR, targets_BR, torch.ones_like(targets_BR, dtype=torch.bool))


def _count(flags_BV: Tensor) -> Tensor:
    """How many of each user are set, [B]; numpy counts bits 5 times as fast as torch."""
    if flags_BV.device.type != "cpu":
        return flags_BV.sum(1)
    return torch.from_numpy(np.count_nonzero(flags_BV.numpy(), axis=1))


def metrics_of(
    ranks_UR: IntArray, *, ks: Sequence[int] = KS, prefixes: Sequence[str] = (SINGLE,)
) -> dict[str, FloatArray]:
    """Per-user metrics of the convention `list`, and of those with a prefix, which their names have."""
    given = torch.from_numpy(ranks_UR)
    found = metrics_from_ranks(given, ks=ks)
    for prefix in prefixes:
        of_convention = metrics_from_ranks(given, convention=convention_of(prefix)[0], ks=ks)
        found |= {prefix + name: values for name, values in of_convention.items()}
    return found


def convention_of(metric: str) -> tuple[Convention, str]:
    """The convention that a metric's prefix says, and its name without."""
    for prefix, convention in CONVENTIONS.items():
        if metric.startswith(prefix):
            return convention, metric.removeprefix(prefix)
    return "list", metric
