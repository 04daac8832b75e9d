"""A user vector, an item vector and a score of both, f(u, v): the plain feature-based model of survey 2, Eq. 1 and 2.

By a small network it is the baseline of Hu et al. 2018, whose user embeddings warm up another domain's, without obvious
gain (survey 3.1); the network is NCF's (He et al. 2017, MLP). By a product it is matrix factorisation (Koren, Bell and
Volinsky 2009); by the products of all pairs of user, item and features a factorisation machine (Rendle 2010), in which
an encoder's vector is one variable.

It reads no sequence: whatever a user has done, the user's own embedding is all that it reads, so a user it does not
know is everybody. Fine-tuned by transfer `shallow`, it begins with the user embeddings of the source domain.

Shape letters: ``B`` users, ``T`` positions, ``N`` any number of positions, ``C`` candidates, ``V`` catalogue rows,
``Q`` and ``H`` width of the first layer, or of the vectors that are multiplied, ``K`` encoders of features.
"""

import itertools
from typing import ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.config import MlpConfig
from trainer.models.base import TABLE_STD, ModelSizes, SequenceModel, initialise
from trainer.models.features import Features
from trainer.models.row_table import RowTables

PAIRS = 1 << 18  # of user and item that go through the layers together


class WithOne(nn.Module):
    """[N, D] to [N, D + 1]: for the products among an item's own parts, which the last place of its vector has."""

    def forward(self, x_ND: Tensor) -> Tensor:
        return F.pad(x_ND, (0, 1), value=1.0)


class Mlp(SequenceModel):
    """By the network, a hidden state is the user's part of the first layer, an item's vector is the item's: the first
    layer reads both side by side, so its product with them is the sum of two."""

    GROUPS: ClassVar = {
        "item": ("item_embedding.", "output_bias"),
        "user": ("user_embedding.",),
        "knowledge": (),
        "position": (),
        "patch": (),
        "body": ("of_user.", "of_item.", "layers."),
        "head": (),
    }
    reads_sequence: ClassVar = False
    ROW_TABLES: ClassVar = ("item_embedding.weight", "output_bias", "user_embedding.weight")

    config: MlpConfig

    def __init__(self, config: MlpConfig, sizes: ModelSizes, tables: RowTables | None = None) -> None:
        super().__init__(config, sizes, tables)
        self.item_embedding = self.table(self.num_items, config.width)
        self.user_embedding = self.table(sizes.num_users, config.user_width)
        if config.score == "mlp":
            first, *others = config.layers
            self.of_user = nn.Linear(config.user_width, first)
            self.of_item = nn.Linear(config.width, first, bias=False)
            widths = [first, *others, 1]
            self.layers = nn.ModuleList(nn.Linear(i, o) for i, o in itertools.pairwise(widths))
        self.head = WithOne() if config.score == "fm" else nn.Identity()
        self.output_bias = self.per_item()
        self.apply(initialise)

    @staticmethod
    def table_std(width: int) -> float:
        return TABLE_STD

    def item_vectors(self, rows: Tensor | None = None) -> Tensor:
        own = self.own_vectors(self.item_embedding.weight, rows)
        if self.config.score == "fm":
            return self._with_products(own, rows)
        vectors = self.with_features(own, rows)
        if self.config.score == "dot":
            return vectors
        of_layer: Tensor = self.of_item(vectors)
        return of_layer

    def _with_products(self, own_ND: Tensor, rows: Tensor | None) -> Tensor:
        """[N, D + 1]: the sum of an item's vector and its features', and the products of all pairs of these."""
        if not self.items_have_features:
            return F.pad(own_ND, (0, 1))
        parts_NKD = cast(Features, self.features["scored"]).parts(rows)
        sum_ND = own_ND + parts_NKD.sum(-2)
        squares_N = own_ND.square().sum(-1) + parts_NKD.square().sum((-1, -2))
        products_N = (sum_ND.square().sum(-1) - squares_N) / 2
        return torch.cat([sum_ND, products_N[..., None]], dim=-1)

    @property
    def scores_with_table(self) -> bool:
        return self.config.score == "dot" and not self.items_have_features

    def forward(
        self,
        items_BT: Tensor,
        lengths_B: Tensor,
        users_B: Tensor,
        wanted_BT: Tensor,
        *,
        causal: bool,
        table_VD: Tensor | None = None,
        event_types_BT: Tensor | None = None,
    ) -> Tensor:
        user_BH = self.user_vectors(users_B)
        if self.config.score == "mlp":
            user_BH = self.of_user(user_BH)
        return user_BH[wanted_BT.nonzero()[:, 0]]

    @property
    def multiplies(self) -> bool:
        return self.config.score != "mlp"

    def matched(self, query_NQ: Tensor, vectors_NQ: Tensor) -> Tensor:
        if self.config.score != "mlp":
            return super().matched(query_NQ, vectors_NQ)
        x = query_NQ + vectors_NQ
        for layer in self.layers:
            x = layer(F.relu(x))
        return x.squeeze(-1)

    def crossed(self, query_NQ: Tensor, vectors_CQ: Tensor, bias_C: Tensor) -> Tensor:
        if self.config.score != "mlp":
            return super().crossed(query_NQ, vectors_CQ, bias_C)
        rows = max(1, PAIRS // max(1, len(vectors_CQ)))
        parts = [self.matched(part[:, None], vectors_CQ) + bias_C for part in torch.split(query_NQ, rows)]
        return torch.cat(parts) if parts else query_NQ.new_zeros(0, len(vectors_CQ))
