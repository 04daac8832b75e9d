"""BERT4Rec (Sun et al. 2019): a bidirectional Transformer over item sequences (survey 3.2.2), with the survey's user
and knowledge embeddings (4.3, 4.4). With `causal`, the same network reads left to right, for next item prediction.

Shape letters: ``B`` sequences, ``T`` positions, ``D`` width, ``H`` heads, ``V`` catalogue rows, ``S`` knowledge slots
of an item, ``N`` any number of positions, ``C`` candidates.

Where the survey leaves the network open: layers are normalised before each sub-layer (Xiong et al. 2020), which spares
the warm-up plateau; attention has no key bias (its gradient is zero). Positions count from the oldest item that is
read. Counting back from the newest was tried: the position that is asked is then hardly ever trained (NDCG@10 0.05 for
0.12).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from etl.tables import UNK
from trainer.config import Bert4RecConfig
from trainer.models.table import RowTable, RowTables

# Parameter groups by name prefix (DESIGN section 6): the one place that says which tensor is of which kind.
GROUPS = {
    "item": ("item_embedding.", "output_bias"),
    "user": ("user_embedding.",),
    "knowledge": ("entity_embedding.",),
    "position": ("position_embedding.",),
    "body": ("item_projection.", "knowledge_projection.", "user_projection.", "input_norm.", "blocks.", "output_norm."),
    "head": ("head.",),
}
TABLE_STD = 0.02
_EVERY = slice(None)


class Block(nn.Module):
    """One Transformer layer (Vaswani et al. 2017; survey equations 3 and 4), normalised first."""

    def __init__(self, config: Bert4RecConfig) -> None:
        super().__init__()
        width = config.width
        self.heads = config.heads
        self.attention_norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.attention_out = nn.Linear(width, width)
        self.feed_norm = nn.LayerNorm(width)
        self.feed_in = nn.Linear(width, 4 * width)
        self.feed_out = nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x_BTD: Tensor, mask_B11T: Tensor | None, rotation_2TE: Tensor | None, *, causal: bool) -> Tensor:
        B, T, D = x_BTD.shape
        qkv = self.qkv(self.attention_norm(x_BTD)).view(B, T, 3, self.heads, D // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # each [B, H, T, D / H]
        if rotation_2TE is not None:
            query, key = _rotated(query, rotation_2TE), _rotated(key, rotation_2TE)
        # No dropout of attention weights: it would rule out the fused kernels, and the residual branch has its own.
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask_B11T, is_causal=causal)
        x_BTD = x_BTD + self.dropout(self.attention_out(attended.transpose(1, 2).reshape(B, T, D)))
        inner = F.gelu(self.feed_in(self.feed_norm(x_BTD)), approximate="tanh")
        out_BTD: Tensor = x_BTD + self.dropout(self.feed_out(inner))
        return out_BTD


class Bert4Rec(nn.Module):
    """items, lengths, users -> hidden states [B, T, D]; items are scored with the table they are embedded with.

    `knowledge_VS`: entity index of each slot of each catalogue row, UNK where unknown (survey 4.3: director, actors).
    """

    knowledge_VS: Tensor
    rotation_2TE: Tensor

    def __init__(
        self, config: Bert4RecConfig, *, num_users: int, num_entities: int, knowledge_VS: Tensor,
        tables: RowTables | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        num_items, num_slots = knowledge_VS.shape
        self.config, self.num_items = config, num_items
        self.tables = tables  # None: dense ones

        def embedding(num_embeddings: int, width: int) -> nn.Embedding | RowTable:
            return nn.Embedding(num_embeddings, width) if tables is None else RowTable(num_embeddings, width, tables)

        width = config.width
        self.item_embedding = embedding(num_items, width)
        self.item_projection = nn.Linear(width, width) if num_slots else None
        self.register_buffer("knowledge_VS", knowledge_VS.int(), persistent=False)
        if num_slots:
            self.entity_embedding = embedding(num_entities, config.knowledge_width)
            self.knowledge_projection = nn.Linear(num_slots * config.knowledge_width, width, bias=False)
        if config.user_width:
            self.user_embedding = embedding(num_users, config.user_width)
            self.user_projection = nn.Linear(config.user_width, width, bias=False)
        self.position_embedding = nn.Embedding(config.max_length, width)
        if config.positions == "rotary":
            self.register_buffer("rotation_2TE", _rotation(config), persistent=False)
        self.input_norm = nn.LayerNorm(width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.blocks))
        self.output_norm = nn.LayerNorm(width)
        self.head = nn.Sequential(nn.Linear(width, width), nn.GELU(approximate="tanh"), nn.LayerNorm(width))
        self.output_bias = nn.Parameter(torch.zeros(num_items if tables is None else tables.share(num_items)))
        self.dropout = nn.Dropout(config.dropout)
        self.apply(_initialise)

    def item_vectors(self, rows: Tensor | None = None) -> Tensor:
        """Knowledge-enhanced vectors of catalogue rows, [V, D] or [*rows.shape, D]: the projected concatenation of the
        item's embedding and those of its director and actors (survey 4.3), written as a sum of two projections."""
        own = self._rows_of(self.item_embedding.weight, rows)
        if self.item_projection is None:
            return own
        known = self.knowledge_VS if rows is None else self.knowledge_VS[rows]
        entities = self._rows_of(self.entity_embedding.weight, known).flatten(-2)
        vectors: Tensor = self.item_projection(own) + self.knowledge_projection(entities)
        return vectors

    def bias(self, rows: Tensor | None = None) -> Tensor:
        """Output biases of catalogue rows, [V] or [*rows.shape]."""
        return self._rows_of(self.output_bias, rows)

    def _rows_of(self, table: Tensor, rows: Tensor | None) -> Tensor:
        """Rows of an item, user or entity table, however it is kept; `rows` None: all of an item table's."""
        if self.tables is not None:
            return self.tables.whole(table, self.num_items) if rows is None else self.tables.lookup(table, rows)
        if rows is None:
            return table
        return F.embedding(rows, table) if table.ndim == 2 else table[rows]

    def row_tables(self) -> dict[str, Tensor]:
        """Names of the tables that are looked up by row, and this process's part of each; none where all are dense."""
        names = ("item_embedding.weight", "output_bias", "user_embedding.weight", "entity_embedding.weight")
        given = dict(self.named_parameters()) if self.tables is not None else {}
        return {name: given[name] for name in names if name in given}

    def forward(
        self, items_BT: Tensor, lengths_B: Tensor, users_B: Tensor, *, causal: bool, table_VD: Tensor | None = None
    ) -> Tensor:
        """Hidden states [B, T, D]; items [B, T] catalogue rows, oldest first, padded behind `lengths`; users [B] rows
        of the user table (those beyond it are unknown). `table_VD`: item_vectors(), where the caller has it already."""
        T = items_BT.shape[1]
        x_BTD = self.item_vectors(items_BT) if table_VD is None else F.embedding(items_BT, table_VD)
        x_BTD = x_BTD + self.position_embedding.weight[:T]
        if self.config.user_width:
            known = torch.where(users_B < self.user_embedding.num_embeddings, users_B, UNK)
            x_BTD = x_BTD + self.user_projection(self._rows_of(self.user_embedding.weight, known))[:, None]
        x_BTD = self.dropout(self.input_norm(x_BTD))
        mask_B11T = None
        if not causal and bool((lengths_B < T).any()):  # a causal query never sees what stands behind it
            mask_B11T = (torch.arange(T, device=items_BT.device) < lengths_B[:, None])[:, None, None]
        rotation_2TE = self.rotation_2TE[:, :T] if self.config.positions == "rotary" else None
        for block in self.blocks:
            x_BTD = block(x_BTD, mask_B11T, rotation_2TE, causal=causal)
        hidden: Tensor = self.output_norm(x_BTD)
        return hidden

    def scores(
        self, hidden_ND: Tensor, rows: Tensor | slice = _EVERY, table_VD: Tensor | None = None,
        bias_V: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Scores [N, C] of catalogue rows for hidden states; all of them, reserved ones included, where none are named.

        `table_VD`, `bias_V`: item_vectors() and bias(), where the caller has them already: a slice of rows copies
        nothing then."""
        if isinstance(rows, slice):
            table_CD = (self.item_vectors() if table_VD is None else table_VD)[rows]
            bias_C = (self.bias() if bias_V is None else bias_V)[rows]
        else:
            table_CD = self.item_vectors(rows) if table_VD is None else table_VD[rows]
            bias_C = self.bias(rows) if bias_V is None else bias_V[rows]
        return F.linear(self.head(hidden_ND), table_CD, bias_C)


def _rotation(config: Bert4RecConfig) -> Tensor:
    """Cosines and sines [2, T, E / 2] of each position's angles, for heads of width E (Su et al. 2021, equation 15)."""
    half = config.width // config.heads // 2
    angles_TE = torch.arange(config.max_length)[:, None] * 10_000.0 ** (-torch.arange(half) / half)
    return torch.stack([angles_TE.cos(), angles_TE.sin()])


def _rotated(x_BHTE: Tensor, rotation_2TE: Tensor) -> Tensor:
    """Each pair of coordinates turned by its position's angle, so that a product of two knows their distance only."""
    cos_TE, sin_TE = rotation_2TE.to(x_BHTE.dtype)
    left, right = x_BHTE.chunk(2, dim=-1)
    return torch.cat([left * cos_TE - right * sin_TE, right * cos_TE + left * sin_TE], dim=-1)


def _initialise(module: nn.Module) -> None:
    """Truncated normals: BERT's 0.02 for tables (Devlin et al. 2019), and for layers 1 / sqrt(inputs) (LeCun et al.
    1998).

    BERT's 0.02 for layers too would fit a width of 768: at 64 it makes attention a whisper beside the residual, and the
    loss stays at the popularity plateau for tens of epochs.
    """
    if isinstance(module, nn.Linear | nn.Embedding):
        std = TABLE_STD if isinstance(module, nn.Embedding) else module.in_features**-0.5
        nn.init.trunc_normal_(module.weight, std=std, a=-2 * std, b=2 * std)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
