"""BERT4Rec (Sun et al. 2019): a bidirectional Transformer over item sequences (survey 3.2.2), with the survey's user
and knowledge embeddings (4.3, 4.4). With `causal`, the same network reads left to right, for next item prediction.

Shape letters: ``B`` sequences, ``T`` positions, ``D`` width, ``H`` heads, ``V`` catalogue rows, ``S`` knowledge slots
of an item, ``N`` any number of positions, ``C`` candidates, ``Q`` positions of a sequence that ask, ``E`` width of a
head.

On a CPU a batch goes through the network in chunks of sequences of like length, small enough for the caches, each on a
core of its own: hardly any padding, and what one layer writes is still near when the next reads it. In the last layer
only the positions whose hidden states are wanted ask; the others are only looked at.

Where the survey leaves the network open: layers are normalised before each sub-layer (Xiong et al. 2020), which spares
the warm-up plateau; attention has no key bias (its gradient is zero). Positions count from the oldest item that is
read. Counting back from the newest was tried: the position that is asked is then hardly ever trained (NDCG@10 0.05 for
0.12).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from etl.tables import UNK
from trainer.config import Bert4RecConfig
from trainer.models.chunks import mapped
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
CHUNK_POSITIONS = 1_024  # padded positions that go through the network together on a CPU: 0.5 MB at width 128
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
        self.dropout = Dropout(config.dropout)

    def forward(
        self, x_BTD: Tensor, mask: Tensor | None, rotation_TE: Tensor | None, *, causal: bool,
        wanted: "Wanted | None" = None, random: torch.Generator | None = None,
    ) -> Tensor:  # fmt: skip
        """[B, T, D] to [B, T, D]; to [N, D], those `wanted`, where not all are. `mask` [B, 1, 1 or Q, T]: what a
        position may look at; None: everything, or with `causal` what doesn't stand behind it."""
        D = x_BTD.shape[2]
        normed_BTD = asking_BQD = self.attention_norm(x_BTD)
        if wanted is None:
            query, key, value = self._heads(self.qkv(normed_BTD), 3)
        else:
            asking_BQD = wanted.gathered(normed_BTD)
            (query,) = self._heads(F.linear(asking_BQD, self.qkv.weight[:D]), 1)
            key, value = self._heads(F.linear(normed_BTD, self.qkv.weight[D:]), 2)
        if rotation_TE is not None:
            query = _rotated(query, rotation_TE if wanted is None else rotation_TE[wanted.places_BQ][:, None])
            key = _rotated(key, rotation_TE)
        # No dropout of attention weights: it would rule out the fused kernels, and the residual branch has its own.
        attended = _attended(query, key, value, mask, causal=causal and mask is None)
        attended_BQD = attended.transpose(1, 2).flatten(2)
        x, attended = (x_BTD, attended_BQD) if wanted is None else (x_BTD[wanted.mask_BT], attended_BQD[wanted.mask_BQ])
        x = x + self.dropout(self.attention_out(attended), random)
        out: Tensor = x + self.dropout(self.feed_out(F.gelu(self.feed_in(self.feed_norm(x)))), random)
        return out

    def _heads(self, x_BTD: Tensor, parts: int) -> tuple[Tensor, ...]:
        """`parts` tensors [B, H, T, E] of one that holds them side by side."""
        B, T, width = x_BTD.shape
        return x_BTD.view(B, T, parts, self.heads, width // parts // self.heads).permute(2, 0, 3, 1, 4).unbind()


class Wanted:
    """The positions of a chunk whose hidden states are wanted, as padded rows of Q."""

    def __init__(self, mask_BT: Tensor) -> None:
        count_B = mask_BT.sum(1)
        num_asking = max(count_B.tolist(), default=1) or 1
        self.mask_BT = mask_BT
        self.mask_BQ = torch.arange(num_asking, device=mask_BT.device) < count_B[:, None]
        self.places_BQ = mask_BT.byte().argsort(dim=1, descending=True, stable=True)[:, :num_asking]

    def gathered(self, x_BTD: Tensor) -> Tensor:
        """[B, Q, D]; behind each row's own positions stand some that nobody wants."""
        return x_BTD.gather(1, self.places_BQ[:, :, None].expand(-1, -1, x_BTD.shape[2]))


class Bert4Rec(nn.Module):
    """items, lengths, users -> hidden states [N, D] of wanted positions; items are scored with the table they are
    embedded with.

    `knowledge_VS`: entity index of each slot of each catalogue row, UNK where unknown (survey 4.3: director, actors).
    """

    knowledge_VS: Tensor
    rotation_TE: Tensor

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
            self.register_buffer("rotation_TE", _rotation(config), persistent=False)
        self.input_norm = nn.LayerNorm(width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.blocks))
        self.output_norm = nn.LayerNorm(width)
        self.head = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.LayerNorm(width))
        self.output_bias = nn.Parameter(torch.zeros(num_items if tables is None else tables.share(num_items)))
        self.dropout = Dropout(config.dropout)
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
        self, items_BT: Tensor, lengths_B: Tensor, users_B: Tensor, wanted_BT: Tensor, *, causal: bool,
        table_VD: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Hidden states [N, D] of the positions that are wanted (bool [B, T], real ones), row after row.

        items [B, T] catalogue rows, oldest first, padded behind `lengths`; users [B] rows of the user table (those
        beyond it are unknown). `table_VD`: item_vectors(), where the caller has it already."""
        order_B = lengths_B.argsort(stable=True)
        items_BT, lengths_B, wanted_BT = items_BT[order_B], lengths_B[order_B], wanted_BT[order_B]
        # Tables are read once for the whole batch; what follows is done chunk by chunk.
        vectors_BTD = self.item_vectors(items_BT) if table_VD is None else F.embedding(items_BT, table_VD)
        x_BTD = vectors_BTD + self.position_embedding.weight[: items_BT.shape[1]]
        if self.config.user_width:
            known_B = torch.where(users_B < self.user_embedding.num_embeddings, users_B, UNK)[order_B]
            x_BTD = x_BTD + self.user_projection(self._rows_of(self.user_embedding.weight, known_B))[:, None]
        sizes = _chunks(lengths_B)
        lengths, wanted = torch.split(lengths_B, sizes), torch.split(wanted_BT, sizes)
        seeds = torch.randint(1 << 62, (len(sizes),)).tolist() if self.training else []

        def chunk(number: int, x_BTD: Tensor) -> Tensor:
            random = torch.Generator(x_BTD.device).manual_seed(seeds[number]) if self.training else None
            return self._chunk(x_BTD, lengths[number], wanted[number], random, causal=causal)

        weights = [*self.input_norm.parameters(), *self.blocks.parameters(), *self.output_norm.parameters()]
        return torch.cat(mapped(chunk, torch.split(x_BTD, sizes), weights))[_order_of(wanted_BT, order_B)]

    def _chunk(
        self, x_BTD: Tensor, lengths_B: Tensor, wanted_BT: Tensor, random: torch.Generator | None, *, causal: bool
    ) -> Tensor:
        """Hidden states [N, D] of the wanted positions of some sequences, from the vectors of their items."""
        T = int(lengths_B.amax()) if len(lengths_B) else x_BTD.shape[1]
        x_BTD, wanted_BT = self.dropout(self.input_norm(x_BTD[:, :T]), random), wanted_BT[:, :T]
        place_T = torch.arange(T, device=x_BTD.device)
        rotation_TE = self.rotation_TE[:T] if self.config.positions == "rotary" else None
        mask = None
        if not causal and bool((lengths_B < T).any()):  # a causal query never sees what stands behind it
            mask = (place_T < lengths_B[:, None])[:, None, None]
        for block in self.blocks[:-1]:
            x_BTD = block(x_BTD, mask, rotation_TE, causal=causal, random=random)
        wanted = Wanted(wanted_BT)
        if 2 * wanted.mask_BQ.shape[1] > T:  # most are wanted: no gain in leaving the others out
            x_ND = self.blocks[-1](x_BTD, mask, rotation_TE, causal=causal, random=random)[wanted_BT]
        else:
            if causal:
                mask = (place_T <= wanted.places_BQ[:, :, None])[:, None]
            x_ND = self.blocks[-1](x_BTD, mask, rotation_TE, causal=causal, wanted=wanted, random=random)
        hidden_ND: Tensor = self.output_norm(x_ND)
        return hidden_ND

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


def _chunks(lengths_B: Tensor) -> list[int]:
    """How many sequences, in ascending order of length, go through the network together."""
    if lengths_B.device.type != "cpu" or len(lengths_B) == 0:
        return [len(lengths_B)]
    sizes = [0]
    for length in lengths_B.tolist():
        if sizes[-1] and (sizes[-1] + 1) * length > CHUNK_POSITIONS:
            sizes.append(0)
        sizes[-1] += 1
    return sizes


def _order_of(wanted_BT: Tensor, order_B: Tensor) -> Tensor:
    """Where the wanted positions of rows put in an order stand, in the rows' order of old."""
    T = wanted_BT.shape[1]
    old_BT = order_B[:, None] * T + torch.arange(T, device=wanted_BT.device)
    return old_BT[wanted_BT].argsort()


def _attended(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, causal: bool) -> Tensor:
    """Attention (Vaswani et al. 2017, equation 1), [B, H, Q, E]."""
    if query.dtype != torch.bfloat16 or query.device.type != "cpu":
        return F.scaled_dot_product_attention(query, key, value, mask, is_causal=causal)
    # The fused kernel's backward pass takes three times as long in bf16, on a CPU, as these three products.
    with torch.autocast("cpu", enabled=False):
        scores = query @ (key * key.shape[-1] ** -0.5).transpose(-1, -2)
        if causal:
            mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
        if mask is not None:
            scores = scores + torch.zeros(mask.shape, dtype=scores.dtype).masked_fill_(~mask, -torch.inf)
        attended: Tensor = scores.softmax(-1) @ value
        return attended


class Dropout(nn.Module):
    """Dropout at a rate rounded to 1/256: a random byte for each number, where torch's draws a float one by one.

    None drops nothing."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.threshold = round(256 * rate)

    def forward(self, x: Tensor, random: torch.Generator | None) -> Tensor:
        if random is None or self.threshold == 0:
            return x
        words = torch.empty(-(-x.numel() // 8), dtype=torch.int64, device=x.device)
        words.random_(-(2**63), None, generator=random)
        dropped: Tensor = _Dropped.apply(x, words, self.threshold)  # type: ignore[no-untyped-call]
        return dropped


class _Dropped(torch.autograd.Function):
    """x with a share of threshold / 256 of its numbers set to zero, the others scaled up; keeps a byte of each."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, words: Tensor, threshold: int) -> Tensor:
        ctx.save_for_backward(words)
        ctx.threshold = threshold
        return _Dropped._scaled(x, words, threshold)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (words,) = ctx.saved_tensors
        return _Dropped._scaled(gradients[0], words, ctx.threshold), None, None

    @staticmethod
    def _scaled(x: Tensor, words: Tensor, threshold: int) -> Tensor:
        bytes_ = words.view(torch.uint8)[: x.numel()].view(x.shape)
        # Compared as x's own type, which has vector instructions, where bytes have none; 0 to 255 are exact in bf16.
        return bytes_.to(x.dtype).ge_(threshold).mul_(256 / (256 - threshold)).mul_(x)


def _rotated(x: Tensor, rotation: Tensor) -> Tensor:
    """Each pair of coordinates turned by its position's angle, so that a product of two knows their distance only.

    x [B, H, T, E], rotation [T, E] or [B, 1, T, E]: cosines, then sines (Su et al. 2021, equation 15)."""
    turned: Tensor = _Rotated.apply(x, rotation)  # type: ignore[no-untyped-call]
    return turned


class _Rotated(torch.autograd.Function):
    """`_rotated`, without what autograd would copy."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rotation: Tensor) -> Tensor:
        ctx.save_for_backward(rotation)
        cosines, sines = rotation.to(x.dtype).chunk(2, dim=-1)
        return _Rotated._turned(x, cosines, sines)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (rotation,) = ctx.saved_tensors
        cosines, sines = rotation.to(gradients[0].dtype).chunk(2, dim=-1)
        return _Rotated._turned(gradients[0], cosines, -sines), None

    @staticmethod
    def _turned(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
        left, right = x.chunk(2, dim=-1)
        turned = torch.empty_like(x)
        new_left, new_right = turned.chunk(2, dim=-1)
        torch.mul(left, cosines, out=new_left).addcmul_(right, sines, value=-1)
        torch.mul(right, cosines, out=new_right).addcmul_(left, sines)
        return turned


def _rotation(config: Bert4RecConfig) -> Tensor:
    """Cosines, then sines, [T, E] of each position's angles, for heads of width E."""
    half = config.width // config.heads // 2
    angles_TE = torch.arange(config.max_length)[:, None] * 10_000.0 ** (-torch.arange(half) / half)
    return torch.cat([angles_TE.cos(), angles_TE.sin()], dim=1)


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
