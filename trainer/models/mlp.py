"""A user vector and an item vector through a small network: the baseline of Hu et al. 2018, whose user embeddings warm
up another domain's, without obvious gain (survey 3.1). The network is NCF's (He et al. 2017, MLP).

It reads no sequence: whatever a user has done, the user's own embedding is all that it reads, so a user it does not
know is everybody. Fine-tuned by transfer `shallow`, it begins with the user embeddings of the source domain.

Shape letters: ``B`` users, ``T`` positions, ``N`` any number of positions, ``C`` candidates, ``V`` catalogue rows,
``Q`` and ``H`` width of the first layer.
"""

import itertools
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.config import MlpConfig
from trainer.models.base import TABLE_STD, ModelSizes, SequenceModel, initialise
from trainer.models.row_table import RowTables

PAIRS = 1 << 18  # of user and item that go through the layers together


class Mlp(SequenceModel):
    """A hidden state is the user's part of the first layer, an item's vector is the item's: the first layer reads both
    side by side, so its product with them is the sum of two."""

    GROUPS: ClassVar = {
        "item": ("item_embedding.", "output_bias"),
        "user": ("user_embedding.",),
        "knowledge": (),
        "position": (),
        "patch": (),
        "body": ("of_user.", "of_item.", "layers."),
        "head": (),
    }
    ROW_TABLES: ClassVar = ("item_embedding.weight", "output_bias", "user_embedding.weight")

    config: MlpConfig

    def __init__(self, config: MlpConfig, sizes: ModelSizes, tables: RowTables | None = None) -> None:
        super().__init__(config, sizes, tables)
        first, *others = config.layers
        self.item_embedding = self.table(self.num_items, config.width)
        self.user_embedding = self.table(sizes.num_users, config.user_width)
        self.of_user = nn.Linear(config.user_width, first)
        self.of_item = nn.Linear(config.width, first, bias=False)
        widths = [first, *others, 1]
        self.layers = nn.ModuleList(nn.Linear(i, o) for i, o in itertools.pairwise(widths))
        self.head = nn.Identity()
        self.output_bias = self.per_item()
        self.apply(initialise)

    @staticmethod
    def table_std(width: int) -> float:
        return TABLE_STD

    def item_vectors(self, rows: Tensor | None = None) -> Tensor:
        own = self.own_vectors(self.item_embedding.weight, rows)
        vectors: Tensor = self.of_item(self.with_features(own, rows))
        return vectors

    @property
    def scores_with_table(self) -> bool:
        return False

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
        user_BH: Tensor = self.of_user(self.user_vectors(users_B))
        return user_BH[wanted_BT.nonzero()[:, 0]]

    def matched(self, query_NQ: Tensor, vectors_NQ: Tensor) -> Tensor:
        x = query_NQ + vectors_NQ
        for layer in self.layers:
            x = layer(F.relu(x))
        return x.squeeze(-1)

    def crossed(self, query_NQ: Tensor, vectors_CQ: Tensor, bias_C: Tensor) -> Tensor:
        rows = max(1, PAIRS // max(1, len(vectors_CQ)))
        parts = [self.matched(part[:, None], vectors_CQ) + bias_C for part in torch.split(query_NQ, rows)]
        return torch.cat(parts) if parts else query_NQ.new_zeros(0, len(vectors_CQ))
