"""BERT4Rec (Sun et al. 2019): a bidirectional Transformer over item sequences (survey 3.2.2), with the survey's user
and knowledge embeddings (4.3, 4.4). With `causal`, the same network reads left to right, for next item prediction.

Shape letters: ``B`` sequences, ``T`` positions, ``D`` width, ``H`` heads, ``V`` catalogue rows, ``S`` knowledge slots
of an item, ``N`` any number of positions, ``C`` candidates, ``Q`` positions of a sequence that ask, ``E`` width of a
head.

In the last layer only the positions whose hidden states are wanted ask; the others are only looked at.

Where the survey leaves the network open: layers are normalised before each sub-layer (Xiong et al. 2020), which spares
the warm-up plateau; attention has no key bias (its gradient is zero). Positions count from the oldest item that is
read. Counting back from the newest was tried: the predicted position is then hardly ever trained (NDCG@10 0.05 for
0.12).
"""

from collections.abc import Sequence
from typing import ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from etl.tables import PAD
from trainer.config import Bert4RecConfig
from trainer.data.device_random import DeviceRandom
from trainer.models.adapters import Patches, patched, weight_of
from trainer.models.base import ModelSizes
from trainer.models.cpu import attention
from trainer.models.cpu.dropout import Dropout
from trainer.models.cpu.rotary import rotated
from trainer.models.item_encoder import Chunk, TiedModel
from trainer.models.packed_places import PackedPlaces
from trainer.models.row_table import RowTables
from trainer.models.time import ITEMS_ONLY, EventInputs, Pairs, RelativeBias

# Without cuDNN, which makes a plan for each shape that it hasn't seen, a tenth of a second: here nearly every step's.
CUDA_KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


class Block(nn.Module):
    """One Transformer layer (Vaswani et al. 2017; survey equations 3 and 4), normalised first."""

    LINEARS: ClassVar[tuple[str, ...]] = ("qkv", "attention_out", "feed_in", "feed_out")

    def __init__(self, config: Bert4RecConfig) -> None:
        super().__init__()
        width = config.width
        self.heads = config.heads
        self.attention_norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.attention_out = nn.Linear(width, width)
        self.feed_norm = nn.LayerNorm(width)
        self._add_feed_layers(width)
        self.dropout = Dropout(config.dropout)

    def _add_feed_layers(self, width: int) -> None:
        self.feed_in = nn.Linear(width, 4 * width)
        self.feed_out = nn.Linear(4 * width, width)

    def forward(
        self,
        x_BTD: Tensor,
        mask: Tensor | None,
        rotation_TE: Tensor | None,
        *,
        causal: bool,
        wanted: "Wanted | PackedPlaces | None" = None,
        random: torch.Generator | DeviceRandom | None = None,
        patches: Patches = None,
    ) -> Tensor:
        """[B, T, D] to [B, T, D]; to [N, D], those `wanted`, where not all are. `mask` [B, 1, 1 or Q, T]: what a
        position may look at, or [B, H, Q, T] what is added to its scores; None: everything, or with `causal` what
        doesn't stand behind it."""
        D = x_BTD.shape[2]
        normed_BTD = asking_BQD = self.attention_norm(x_BTD)
        qkv = weight_of(self.qkv, patches, "qkv")
        if not isinstance(wanted, Wanted):  # packed rows all ask: what they save is the layers behind attention
            query, key, value = self._heads(F.linear(normed_BTD, qkv), 3)
        else:
            asking_BQD = wanted.gathered(normed_BTD)
            (query,) = self._heads(F.linear(asking_BQD, qkv[:D]), 1)
            key, value = self._heads(F.linear(normed_BTD, qkv[D:]), 2)
        if rotation_TE is not None:
            asked = rotation_TE[wanted.places_BQ][:, None] if isinstance(wanted, Wanted) else rotation_TE
            query = rotated(query, asked)
            key = rotated(key, rotation_TE)
        # No dropout of attention weights: it would rule out the fused kernels, and the residual branch has its own.
        attended = _attended(query, key, value, mask, causal=causal and mask is None)
        attended_BQD = attended.transpose(1, 2).flatten(2)
        x, attended, asking = x_BTD, attended_BQD, asking_BQD
        if isinstance(wanted, PackedPlaces):
            x, attended, asking = (wanted.taken(each) for each in (x_BTD, attended_BQD, asking_BQD))
        elif wanted is not None:
            x, attended, asking = x_BTD[wanted.mask_BT], attended_BQD[wanted.mask_BQ], asking_BQD[wanted.mask_BQ]
        attended = F.linear(attended, weight_of(self.attention_out, patches, "attention_out"), self.attention_out.bias)
        x = self._added(x, self.dropout(patched(patches, "first", asking, attended), random), "first_gate", patches)
        normed = self.feed_norm(x)
        fed = patched(patches, "second", normed, self._fed(normed, patches))
        return self._added(x, self.dropout(fed, random), "second_gate", patches)

    def _fed(self, normed: Tensor, patches: Patches) -> Tensor:
        """What the second layer gives, [..., D] to [..., D]."""
        inner = F.gelu(F.linear(normed, weight_of(self.feed_in, patches, "feed_in"), self.feed_in.bias))
        return F.linear(inner, weight_of(self.feed_out, patches, "feed_out"), self.feed_out.bias)

    def _added(self, x: Tensor, given: Tensor, gate: str, patches: Patches) -> Tensor:
        """The residual stream with what a layer gave for it; `gate`: the name of its gate, where there are any."""
        return x + given

    def _heads(self, x_BTD: Tensor, parts: int) -> tuple[Tensor, ...]:
        """`parts` tensors [B, H, T, E] of one that holds them side by side."""
        B, T, width = x_BTD.shape
        return x_BTD.view(B, T, parts, self.heads, width // parts // self.heads).permute(2, 0, 3, 1, 4).unbind()


class GatedBlock(Block):
    """A layer of LiGR (Borisyuk et al. 2025) as eSASRec has it (Tikhonovich et al. 2025): x + sigmoid(W x) * attention,
    then x + sigmoid(W' x) * SwiGLU (Shazeer 2020), whose layers have no bias."""

    LINEARS: ClassVar = (*Block.LINEARS, "first_gate", "second_gate")

    def _add_feed_layers(self, width: int) -> None:
        self.feed_in = nn.Linear(width, 8 * width, bias=False)  # of 4: what goes through SiLU, and what it multiplies
        self.feed_out = nn.Linear(4 * width, width, bias=False)
        self.first_gate = nn.Linear(width, width)
        self.second_gate = nn.Linear(width, width)

    def _fed(self, normed: Tensor, patches: Patches) -> Tensor:
        gate, value = F.linear(normed, weight_of(self.feed_in, patches, "feed_in")).chunk(2, dim=-1)
        return F.linear(F.silu(gate) * value, weight_of(self.feed_out, patches, "feed_out"))

    def _added(self, x: Tensor, given: Tensor, gate: str, patches: Patches) -> Tensor:
        layer: nn.Linear = getattr(self, gate)
        return x + torch.sigmoid(F.linear(x, weight_of(layer, patches, gate), layer.bias)) * given


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


class Bert4Rec(TiedModel):
    """Items are scored with the same knowledge-enhanced vectors that they are embedded with."""

    config: Bert4RecConfig
    rotation_TE: Tensor

    def __init__(self, config: Bert4RecConfig, sizes: ModelSizes, tables: RowTables | None = None) -> None:
        super().__init__(config, sizes, tables)
        self.position_embedding = nn.Embedding(config.max_length, config.width)
        if config.positions == "rotary":
            self.register_buffer("rotation_TE", _rotation(config), persistent=False)
        self.input_norm = nn.LayerNorm(config.width)
        block = GatedBlock if config.block == "ligr" else Block
        self.linears = block.LINEARS
        self.blocks = nn.ModuleList(block(config) for _ in range(config.blocks))
        self.output_norm = nn.LayerNorm(config.width)
        self._add_head()

    def add_time(self) -> None:
        super().add_time()
        if self.config.time.bias:
            sizes = self.config.heads, self.config.max_length
            self.time["bias"] = nn.ModuleList(RelativeBias(*sizes) for _ in self.blocks)

    def _placed(self, vectors_BTD: Tensor) -> Tensor:
        return vectors_BTD + self.position_embedding.weight[: vectors_BTD.shape[1]]

    def _network(self) -> Sequence[nn.Parameter]:
        biases = [parameter for bias in self._biases() for parameter in bias.parameters()]
        return [*self.input_norm.parameters(), *self.blocks.parameters(), *biases, *self.output_norm.parameters()]

    def _biases(self) -> list[RelativeBias]:
        """One a block, or none."""
        return list(cast(nn.ModuleList, self.time["bias"])) if "bias" in self.time else []  # type: ignore[arg-type]

    def _chunk(self, x_BTD: Tensor, chunk: Chunk, random: torch.Generator | None) -> Tensor:
        """Hidden states [N, D] of the wanted positions of some sequences, from the vectors of their items."""
        lengths_B, wanted_BT, causal = chunk.lengths_B, chunk.wanted_BT, chunk.causal
        T = int(lengths_B.amax()) if len(lengths_B) else x_BTD.shape[1]
        x_BTD, wanted_BT = self.dropout(self.input_norm(x_BTD[:, :T]), random), wanted_BT[:, :T]
        place_T = torch.arange(T, device=x_BTD.device)
        rotation_TE = self.rotation_TE[:T] if self.config.positions == "rotary" else None
        biases = self._biases()
        mask, pairs = None, None
        if biases:
            assert chunk.times is not None, "times are read"
            pairs = Pairs.of(chunk.times, lengths_B, T, causal=causal)
        elif not causal and bool((lengths_B < T).any()):  # a causal query never sees what stands behind it
            mask = (place_T < lengths_B[:, None])[:, None, None]
        *blocks, (last, last_patches) = zip(self.blocks, self.patches_of_blocks(), strict=True)
        for place, (block, patches) in enumerate(blocks):
            mask = biases[place](pairs) if biases else mask
            x_BTD = block(x_BTD, mask, rotation_TE, causal=causal, random=random, patches=patches)
        wanted = Wanted(wanted_BT)
        how = {"causal": causal, "random": random, "patches": last_patches}
        if 2 * wanted.mask_BQ.shape[1] > T:  # most are wanted: no gain in leaving the others out
            mask = biases[-1](pairs) if biases else mask
            x_ND = last(x_BTD, mask, rotation_TE, **how)[wanted_BT]
        else:
            if pairs is not None:
                mask = biases[-1](pairs.of_places(wanted.places_BQ))
            elif causal:
                mask = (place_T <= wanted.places_BQ[:, :, None])[:, None]
            x_ND = last(x_BTD, mask, rotation_TE, wanted=wanted, **how)
        hidden_ND: Tensor = self.output_norm(x_ND)
        return hidden_ND

    @property
    def packs(self) -> bool:
        return self.tables is None and not self.features

    def packed_states(
        self,
        items_BT: Tensor,
        lengths_B: Tensor,
        users_B: Tensor,
        places: PackedPlaces,
        *,
        causal: bool,
        table_VD: Tensor | None = None,
        events: EventInputs = ITEMS_ONLY,
    ) -> Tensor:
        packing = places.packing
        items_RT, places_RT, events = packing.packed(items_BT, PAD), packing.places_RT, events.packed(packing)
        vectors_RTD = self.item_vectors(items_RT) if table_VD is None else F.embedding(items_RT, table_VD)
        x_RTD = self.with_event_inputs(vectors_RTD, events) + self.position_embedding(places_RT)
        if self.config.user_width:
            x_RTD = x_RTD + F.embedding(packing.owners_RT, self.user_projection(self.user_vectors(users_B)))
        random = packing.own if self.training else None
        x_RTD = self.dropout(self.input_norm(x_RTD), random)
        rotation_RTE = self.rotation_TE[places_RT][:, None] if self.config.positions == "rotary" else None
        mask = packing.attends_RTT(lengths_B, causal=causal)[:, None]
        biases, pairs = self._biases(), None
        if biases:
            assert events.times is not None, "times are read"
            pairs = Pairs.packed(events.times, mask[:, 0])
        for place, (block, patches) in enumerate(zip(self.blocks, self.patches_of_blocks(), strict=True)):
            mask = biases[place](pairs) if biases else mask
            wanted = places if place == len(self.blocks) - 1 else None
            x_RTD = block(x_RTD, mask, rotation_RTE, causal=False, wanted=wanted, random=random, patches=patches)
        hidden_ND: Tensor = self.output_norm(x_RTD)
        return hidden_ND


def _attended(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, causal: bool) -> Tensor:
    """Attention (Vaswani et al. 2017, equation 1), [B, H, Q, E]."""
    if mask is not None and mask.is_floating_point():
        mask = mask.to(query.dtype)
    if query.device.type == "cuda":
        with sdpa_kernel(CUDA_KERNELS):
            return F.scaled_dot_product_attention(query, key, value, mask, is_causal=causal)
    if query.device.type == "cpu":
        return attention.attended(query, key, value, mask, causal=causal)
    return F.scaled_dot_product_attention(query, key, value, mask, is_causal=causal)


def _rotation(config: Bert4RecConfig) -> Tensor:
    """Cosines, then sines, [T, E] of each position's angles, for heads of width E."""
    half = config.width // config.heads // 2
    place_T, pair_E = (torch.arange(number, device="cpu") for number in (config.max_length, half))
    angles_TE = place_T[:, None] * 10_000.0 ** (-pair_E / half)
    return torch.cat([angles_TE.cos(), angles_TE.sin()], dim=1)
