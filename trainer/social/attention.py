"""Attention over friends: whose items matter to a user without a history, and how much.

Friends of a user are weighed by a softmax, as in Song et al. 2019, *Session-Based Social Recommendation via Dynamic
Graph Attention Networks* (DGRec), 4.3, over what is known of them without the user's own items. The weights sum to 1:
each friend's share of influence. A small network turns the share of friends who have an item, and the rest of the
circle's evidence, into the item's score. It learns from users who have a history, described as if they had none, by the
cross-entropy of their items among their candidates.

Shape letters: ``B`` users of a batch, ``C`` candidates, ``J`` kinds of evidence, ``E`` edges, ``K`` of what is known of
a friend.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainer.arrays import FloatArray, IntArray
from trainer.config.social import FriendModelConfig
from trainer.social.evidence import EVIDENCE, OF_FRIEND, Circle, Evidence
from trainer.training.loop import NonFiniteLoss

_FLOOR = 0.02  # added to a share before its logarithm


class FriendAttention(nn.Module):
    """Scores [B, C] of candidates, and each friend's share [E]."""

    evidence_mean: Tensor
    evidence_scale: Tensor
    friend_mean: Tensor
    friend_scale: Tensor

    def __init__(self, hidden: int) -> None:
        super().__init__()
        for name, width in (("evidence", len(EVIDENCE) + 1), ("friend", len(OF_FRIEND))):
            self.register_buffer(f"{name}_mean", torch.zeros(width))
            self.register_buffer(f"{name}_scale", torch.ones(width))
        self.attention = nn.Sequential(nn.Linear(len(OF_FRIEND), hidden // 2), nn.Tanh(), nn.Linear(hidden // 2, 1))
        self.score = nn.Sequential(
            nn.Linear(len(EVIDENCE) + 1, hidden),
            nn.GELU(),
            nn.Linear(hidden, hidden),
            nn.GELU(),
            nn.Linear(hidden, 1),
        )

    def shares(self, circle: Circle) -> Tensor:
        """[E] of each friend, 1 together for each user."""
        known_EK = (circle.friend_EK - self.friend_mean) / self.friend_scale
        logit_E: Tensor = self.attention(known_EK).squeeze(-1)
        if not len(logit_E):
            return logit_E
        raised_E = (logit_E - logit_E.max().detach()).exp()
        total_B = torch.zeros(len(circle.users_B)).index_add(0, circle.owner_E, raised_E)
        shares_E: Tensor = raised_E / total_B[circle.owner_E]
        return shares_E

    def evidence(self, circle: Circle) -> Tensor:
        """[B, C, J + 1]: with the share of influence of the friends who have each item."""
        shape = circle.candidates_BC.shape
        flat = torch.zeros(shape[0] * shape[1])
        attended = flat.index_add(0, circle.cell_M, self.shares(circle)[circle.edge_M]).view(shape)
        return torch.cat([circle.evidence_BCJ, (attended + _FLOOR).log()[..., None]], -1)

    def forward(self, circle: Circle) -> Tensor:
        given = (self.evidence(circle) - self.evidence_mean) / self.evidence_scale
        found: Tensor = self.score(given).squeeze(-1)
        return found

    @torch.no_grad()
    def standardise(self, circles: Sequence[Circle]) -> None:
        """Fit means and spreads to what it will be trained on."""
        given = torch.cat([self.evidence(circle).flatten(0, 1) for circle in circles])
        known = torch.cat([circle.friend_EK for circle in circles])
        for name, values in (("evidence", given), ("friend", known)):
            getattr(self, f"{name}_mean").copy_(values.mean(0))
            getattr(self, f"{name}_scale").copy_(values.std(0).clamp(min=1e-3))


@dataclass(frozen=True)
class TrainedFriends:
    """A trained attention with the circle it reads."""

    model: FriendAttention
    evidence: Evidence
    losses: list[float]  # of each epoch

    def scores(self, users_B: IntArray) -> FloatArray:
        """[B, V] for places of the network. What is no candidate is ranked by plain counts, below all candidates."""
        return self._scores(*self.evidence.of(users_B))

    def scores_of_friends(self, friends_F: IntArray, *, mutual: bool) -> FloatArray:
        """[1, V], as `scores`, for somebody outside the network with these friends (see `Evidence.of_friends`)."""
        return self._scores(*self.evidence.of_friends(friends_F, mutual=mutual))

    @torch.no_grad()
    def _scores(self, circle: Circle, found: FloatArray) -> FloatArray:
        scores_BC = self.model(circle)
        lowest = scores_BC.min(1, keepdim=True).values
        np.put_along_axis(found, circle.candidates_BC, (scores_BC - lowest).numpy(), 1)
        return found

    @torch.no_grad()
    def influence(self, users_B: IntArray) -> tuple[IntArray, IntArray, FloatArray]:
        """(User, friend, share) of each friendship with someone who has a history; places of the network."""
        circle, _ = self.evidence.of(users_B)
        return users_B[circle.owner_E.numpy()], circle.friend_E, self.model.shares(circle).numpy()


def train_friends(edges_UU: sp.csr_array, taken_UV: sp.csr_array, config: FriendModelConfig) -> TrainedFriends:
    """Learn from users who have a history and a circle. A function of the arguments alone. Raises NonFiniteLoss."""
    evidence = Evidence(edges_UU, taken_UV, num_candidates=config.candidates)
    random = np.random.default_rng(config.seed)
    users = np.flatnonzero((evidence.size > 0) & (evidence.degree > 0))
    users = random.permutation(users)[: config.max_users]
    size = min(config.batch_size, evidence.batch_users())
    circles = [evidence.of(users[start : start + size])[0] for start in range(0, len(users), size)]
    wanted = [_wanted(taken_UV, circle) for circle in circles]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = FriendAttention(config.hidden)
    model.standardise(circles)
    optimizer = torch.optim.Adam(model.parameters(), lr=config.learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, config.epochs * len(circles)))
    losses = []
    for _ in range(config.epochs):
        total = 0.0
        for number in random.permutation(len(circles)).tolist():
            log_BC = F.log_softmax(model(circles[number]), 1)
            loss = -(log_BC * wanted[number]).sum(1).mean()
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            total += float(loss.detach())
        losses.append(total / max(len(circles), 1))
        if not math.isfinite(losses[-1]) or not all(one.isfinite().all() for one in model.parameters()):
            raise NonFiniteLoss(
                f"expected a loss that is a number, found {losses[-1]} in epoch {len(losses)}; lower "
                "model.learning_rate"
            )
    return TrainedFriends(model, evidence, losses)


def _wanted(taken_UV: sp.csr_array, circle: Circle) -> Tensor:
    """[B, C] the user's own items among the candidates, each user's summing to 1 (or 0)."""
    own = np.take_along_axis(taken_UV[circle.users_B].toarray(), circle.candidates_BC, 1)
    return torch.from_numpy((own / np.maximum(own.sum(1, keepdims=True), 1)).astype(np.float32))
