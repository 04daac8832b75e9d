"""Baskets: pre-training on pairs of them, and telling the next one (survey 3.2.2; Yang et al. 2019).

A sequence holds a user's baskets with a SEP behind each (`trainer.data.baskets`). What the network reads of it is
``CLS a a a SEP b b SEP``: the first side one basket or more, the second the one behind it, another user's, or a MASK in
its place, which is the query for the next basket.

Shape letters: ``B`` users of this rank, ``G`` of the global batch, ``K`` baskets or pairs of a user in a step, ``P``
pairs, ``W`` positions of a pair, ``S`` baskets.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from etl.tables import CLS, FIRST_INDEX, MASK, PAD, SEP
from trainer.config import BasketPairConfig, LossConfig, NextBasketConfig
from trainer.data.batch import Batch
from trainer.models import SequenceModel
from trainer.tasks.base import Task
from trainer.tasks.loss import summed_loss, wide

HEAD = "next_basket"  # of the CLS: is the second basket the next one?
FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Baskets:
    """Where baskets lie in padded sequences. Of row r they are first[r] to first[r] + count[r] - 1."""

    start_S: Tensor  # place of its first item
    stop_S: Tensor  # place of its SEP
    first_B: Tensor
    count_B: Tensor


def find_baskets(items_BT: Tensor) -> Baskets:
    """Whole ones that hold an item; what stands behind the last SEP is none."""
    row_S, stop_S = (items_BT == SEP).nonzero(as_tuple=True)
    begins_S = torch.ones_like(row_S, dtype=torch.bool)
    begins_S[1:] = row_S[1:] != row_S[:-1]
    start_S = torch.where(begins_S, 0, stop_S.roll(1) + 1)
    holds_S = stop_S > start_S
    row_S, start_S, stop_S = row_S[holds_S], start_S[holds_S], stop_S[holds_S]
    count_B = torch.bincount(row_S, minlength=len(items_BT))
    return Baskets(start_S, stop_S, count_B.cumsum(0) - count_B, count_B)


@dataclass(frozen=True)
class Pairs:
    """What the network reads: items [P, W], PAD behind; where the second side begins; whose first side it is."""

    items_PW: Tensor
    lengths_P: Tensor
    second_P: Tensor  # place of the second side's first item
    owner_P: Tensor  # row of the batch


@dataclass(frozen=True)
class Spans:
    """Places start to stop of rows of some sequences."""

    items_BT: Tensor
    row_P: Tensor
    start_P: Tensor
    stop_P: Tensor

    def take(self, flags_P: Tensor) -> "Spans":
        return Spans(self.items_BT, self.row_P[flags_P], self.start_P[flags_P], self.stop_P[flags_P])


def join_pairs(first: Spans, second: Spans, *, max_length: int) -> Pairs:
    """CLS, the first span, the second. The first loses its oldest items where not all fits, the second its last ones
    where it takes more than half of the room."""
    size_P = (second.stop_P - second.start_P).clamp(max=max_length // 2)
    start_P = torch.maximum(first.start_P, first.stop_P - (max_length - 1 - size_P))
    second_P = 1 + first.stop_P - start_P
    lengths_P = second_P + size_P
    place_W = torch.arange(int(lengths_P.amax()) if len(lengths_P) else 1, device=lengths_P.device)
    from_first = (place_W - 1 + start_P[:, None]).clamp(0, first.items_BT.shape[1] - 1)
    from_second = (place_W - second_P[:, None] + second.start_P[:, None]).clamp(0, second.items_BT.shape[1] - 1)
    items_PW = torch.where(
        place_W < second_P[:, None],
        first.items_BT[first.row_P[:, None], from_first],
        second.items_BT[second.row_P[:, None], from_second],
    )
    items_PW = torch.where(place_W == 0, CLS, items_PW)
    return Pairs(torch.where(place_W < lengths_P[:, None], items_PW, PAD), lengths_P, second_P, first.row_P)


class _BasketTask(Task):
    """The query for a next basket: ``CLS`` the newest baskets, SEP behind each, then ``MASK SEP``."""

    context: int  # baskets that are read
    items: LossConfig  # of a basket

    def query(self, model: SequenceModel, batch: Batch, table_VD: Tensor | None = None) -> Tensor:
        """Hidden states [B, D] of the MASK."""
        baskets = find_baskets(batch.items)
        count_B, none_B = baskets.count_B, torch.zeros_like(baskets.count_B)
        oldest_B = baskets.first_B + (count_B - self.context).clamp(min=0)
        last_B = baskets.first_B + (count_B - 1).clamp(min=0)
        # Padded, since a user without a basket may be the last one.
        start_B = torch.where(count_B > 0, F.pad(baskets.start_S, (0, 1))[oldest_B], none_B)
        stop_B = torch.where(count_B > 0, F.pad(baskets.stop_S, (0, 1))[last_B] + 1, none_B)
        return self._of_mask(model, batch, torch.arange(len(none_B), device=none_B.device), start_B, stop_B, table_VD)

    def _told(
        self,
        model: SequenceModel,
        batch: Batch,
        baskets: Baskets,
        owner_P: Tensor,
        told_P: Tensor,
        table_VD: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """(summed loss, number of items) of some baskets, each predicted by a MASK in its place."""
        if not len(owner_P):
            nothing = _nothing(model)
            return nothing, torch.zeros((), dtype=torch.long, device=nothing.device)
        oldest_P = torch.maximum(baskets.first_B[owner_P], told_P - self.context)
        start_P, stop_P = baskets.start_S[oldest_P], baskets.stop_S[told_P - 1] + 1
        hidden_PD = self._of_mask(model, batch, owner_P, start_P, stop_P, table_VD)
        begin_P = baskets.start_S[told_P]
        size_P = baskets.stop_S[told_P] - begin_P
        pair_N = torch.repeat_interleave(torch.arange(len(told_P), device=told_P.device), size_P)
        place_N = torch.arange(len(pair_N), device=told_P.device) - (size_P.cumsum(0) - size_P)[pair_N]
        targets_N = batch.items[owner_P[pair_N], begin_P[pair_N] + place_N]
        loss = summed_loss(model, hidden_PD[pair_N], targets_N, self.items, draw=batch.draw, table_VD=table_VD)
        return loss, torch.tensor(len(targets_N), device=loss.device)

    def _of_mask(
        self,
        model: SequenceModel,
        batch: Batch,
        owner_P: Tensor,
        start_P: Tensor,
        stop_P: Tensor,
        table_VD: Tensor | None,
    ) -> Tensor:
        """[P, D], of a MASK behind places `start` to `stop` of the owners' sequences."""
        none_P, items_BT = torch.zeros_like(owner_P), F.pad(batch.items, (0, 1))  # at least one place
        query = Spans(torch.tensor([[MASK, SEP]], device=owner_P.device), none_P, none_P, none_P + 2)
        pairs = join_pairs(Spans(items_BT, owner_P, start_P, stop_P), query, max_length=model.config.max_length)
        wanted_PW = torch.arange(pairs.items_PW.shape[1], device=owner_P.device) == pairs.second_P[:, None]
        hidden_PD: Tensor = model(
            pairs.items_PW, pairs.lengths_P, batch.users[owner_P], wanted_PW, causal=False, table_VD=table_VD
        )
        return hidden_PD


class NextBasket(_BasketTask):
    """The items of baskets that a MASK in their place tells, given those before."""

    def __init__(self, config: NextBasketConfig) -> None:
        self.config, self.context, self.items = config, config.context, config.loss

    def loss(self, model: SequenceModel, batch: Batch) -> tuple[Tensor, Tensor]:
        """(summed loss, number of items) of this rank's slice. Of each user, `baskets` that have one before them are
        predicted, drawn with replacement."""
        table_VD = model.item_vectors() if self.config.loss.kind == "full" else None
        baskets = find_baskets(batch.items)
        uniform_BK = _uniform(batch, 1, self.config.baskets)[0]
        owner_P, told_P = _second_baskets(baskets, uniform_BK)
        return self._told(model, batch, baskets, owner_P, told_P, table_VD)


class BasketPair(_BasketTask):
    """Masked items of both baskets of a pair, and whether the second is the one that came next."""

    def __init__(self, config: BasketPairConfig) -> None:
        self.config, self.context, self.items = config, config.context, config.loss
        self.heads = {HEAD: 1}

    def loss(self, model: SequenceModel, batch: Batch) -> tuple[Tensor, Tensor]:
        """(summed loss, number of items predicted) of this rank's slice; a pair's answer adds `weight` times its
        cross-entropy."""
        table_VD = model.item_vectors() if self.config.loss.kind == "full" else None
        drawn = self.draw(batch, max_length=model.config.max_length)
        loss, count = self._told(model, batch, drawn.baskets, drawn.asked_owner_A, drawn.asked_A, table_VD)
        pairs = drawn.pairs
        if not len(pairs.owner_P):
            return loss + _nothing(model), count
        corrupted_PW, chosen_PW = self.mask(batch, pairs, drawn.places_P, model)
        wanted_PW = chosen_PW.clone()
        wanted_PW[:, 0] = True  # the CLS
        hidden_ND = model(
            corrupted_PW, pairs.lengths_P, batch.users[pairs.owner_P], wanted_PW, causal=False, table_VD=table_VD
        )
        is_cls_N = wanted_PW.nonzero()[:, 1] == 0
        score_P = wide(model.task_heads[HEAD](hidden_ND[is_cls_N])[:, 0])
        answer = F.binary_cross_entropy_with_logits(score_P, drawn.adjacent_P.to(score_P), reduction="sum")
        masked = summed_loss(
            model,
            hidden_ND[~is_cls_N],
            pairs.items_PW[chosen_PW],
            self.config.loss,
            draw=batch.draw,
            table_VD=table_VD,
        )
        return loss + masked + self.config.weight * answer, count + chosen_PW.sum()

    def draw(self, batch: Batch, *, max_length: int) -> "Drawn":
        """What a step asks. Where no other user has a basket, every pair is adjacent."""
        everyone_GT = batch.items if batch.everyone is None else batch.everyone
        shift = 0 if batch.everyone is None else batch.rows.start or 0  # from own rows to everyone's
        mine, everyone = find_baskets(batch.items), find_baskets(everyone_GT)
        uniform_5BK = _uniform(batch, 5, self.config.baskets)
        drawn_BK = (mine.count_B > 1)[:, None].expand(-1, self.config.baskets)
        owner_P, next_P = _second_baskets(mine, uniform_5BK[0])
        adjacent_P, asked_P, which_P, any_P = (uniform_BK[drawn_BK] for uniform_BK in uniform_5BK[1:])
        is_adjacent_P = adjacent_P < self.config.adjacent
        is_asked_P = is_adjacent_P & (asked_P < self.config.asked_probability)

        some_O = everyone.count_B.nonzero()[:, 0]
        at_P = (which_P * len(some_O)).long()
        own_P = owner_P + shift
        at_P = torch.where(some_O[at_P] == own_P, (at_P + 1) % max(len(some_O), 1), at_P)
        other_P = some_O[at_P]
        is_adjacent_P = is_adjacent_P | (other_P == own_P)
        theirs_P = everyone.first_B[other_P] + (any_P * everyone.count_B[other_P]).long()
        second_P = torch.where(is_adjacent_P, next_P - mine.first_B[owner_P] + everyone.first_B[own_P], theirs_P)
        other_P = torch.where(is_adjacent_P, own_P, other_P)

        oldest_P = torch.maximum(mine.first_B[owner_P], next_P - self.context)
        row_B = torch.arange(len(batch.items), device=owner_P.device) + (batch.rows.start or 0)
        place_BK = row_B[:, None] * self.config.baskets + torch.arange(self.config.baskets, device=row_B.device)
        paired_P = ~is_asked_P
        first = Spans(batch.items, owner_P, mine.start_S[oldest_P], mine.stop_S[next_P - 1] + 1)
        second = Spans(everyone_GT, other_P, everyone.start_S[second_P], everyone.stop_S[second_P] + 1)
        pairs = join_pairs(first.take(paired_P), second.take(paired_P), max_length=max_length)
        return Drawn(
            mine,
            owner_P[is_asked_P],
            next_P[is_asked_P],
            pairs,
            is_adjacent_P[paired_P],
            place_BK[drawn_BK][paired_P],
        )

    def mask(self, batch: Batch, pairs: Pairs, places_P: Tensor, model: SequenceModel) -> tuple[Tensor, Tensor]:
        """(corrupted items, chosen places): a share of the items, and at least one of a pair; 80 % become MASK, 10 % a
        random item, 10 % stay (Devlin et al. 2019)."""
        W, num_items = pairs.items_PW.shape[1], model.num_items - FIRST_INDEX
        random = np.random.default_rng([*batch.draw, 6])
        shape = (3, batch.global_rows * self.config.baskets, model.config.max_length)
        drawn_3PW = torch.from_numpy(random.random(shape, dtype=np.float32)).to(places_P.device)[:, places_P, :W]
        choice_PW, kind_PW, item_PW = drawn_3PW
        choice_PW = choice_PW.masked_fill(pairs.items_PW < FIRST_INDEX, 2.0)
        chosen_PW = choice_PW < self.config.mask_probability
        chosen_PW |= (choice_PW == choice_PW.amin(1, keepdim=True)) & (choice_PW < 2)
        random_PW = FIRST_INDEX + (item_PW * num_items).long().clamp(max=num_items - 1)
        corrupted_PW = torch.where(kind_PW < 0.8, MASK, torch.where(kind_PW < 0.9, random_PW, pairs.items_PW))
        return torch.where(chosen_PW, corrupted_PW, pairs.items_PW), chosen_PW


@dataclass(frozen=True)
class Drawn:
    """What one step asks of this rank's users. Letter ``A``: next baskets that a MASK is to tell."""

    baskets: Baskets  # of this rank
    asked_owner_A: Tensor
    asked_A: Tensor
    pairs: Pairs
    adjacent_P: Tensor  # bool
    places_P: Tensor  # among the global batch's G x K, by which what is drawn for a pair is found


def _nothing(model: SequenceModel) -> Tensor:
    """Zero, that has a gradient for all: where a process has nothing to say, others wait for its gradients."""
    return sum((parameter.sum() * 0 for parameter in model.parameters() if parameter.requires_grad), torch.zeros(()))


def _second_baskets(baskets: Baskets, uniform_BK: Tensor) -> tuple[Tensor, Tensor]:
    """(row, basket) of drawn baskets that have one before them, of all rows that have such."""
    others_B = baskets.count_B - 1
    chosen_BK = baskets.first_B[:, None] + 1 + (uniform_BK * others_B[:, None]).long().clamp(min=0)
    chosen_BK = torch.minimum(chosen_BK, (baskets.first_B + others_B)[:, None])
    drawn_BK = (others_B > 0)[:, None].expand_as(chosen_BK)
    return drawn_BK.nonzero()[:, 0], chosen_BK[drawn_BK]


def _uniform(batch: Batch, number: int, baskets: int) -> Tensor:
    """[number, B, K] in [0, 1), drawn for the global batch, then cut to this rank's rows."""
    random = np.random.default_rng([*batch.draw, 5])
    return torch.from_numpy(random.random((number, batch.global_rows, baskets))[:, batch.rows]).to(batch.items.device)
