"""Networks that score items with the vectors that they read them by, knowledge-enhanced (survey 4.3, 4.4): what
`Bert4Rec` and `PeterRec` share.

Shape letters: ``B`` sequences, ``T`` positions, ``D`` width, ``V`` catalogue rows, ``S`` knowledge slots of an item,
``N`` any number of positions.

On a CPU a batch goes through the network in chunks of sequences of like length, small enough for the caches, each on a
core of its own: hardly any padding, and what one layer writes is still near when the next reads it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.config import Bert4RecConfig, PatchConfig, PeterRecConfig
from trainer.models.adapters import Patches, new_patches
from trainer.models.base import TABLE_STD, ModelSizes, SequenceModel, initialise
from trainer.models.cpu.chunks import mapped, order_of, sizes_by_length
from trainer.models.heads import CosineQuery
from trainer.models.row_table import RowTables
from trainer.models.time import ITEMS_ONLY, EventInputs, EventTimes

CHUNK_POSITIONS = 1_024  # padded positions that go through the network together on a CPU: 0.5 MB at width 128


@dataclass(frozen=True)
class Chunk:
    """Sequences that go through the network together: which positions are wanted, when events were."""

    lengths_B: Tensor
    wanted_BT: Tensor
    times: EventTimes | None
    causal: bool


class TiedModel(SequenceModel):
    """A subclass makes its layers between `__init__` and `_add_head`, and gives `_placed`, `_chunk` and `_network`."""

    GROUPS: ClassVar = {
        "item": ("item_embedding.", "output_bias"),
        "user": ("user_embedding.",),
        "knowledge": ("entity_embedding.",),
        "position": ("position_embedding.",),
        "patch": ("patches.",),
        "body": (
            "item_projection.",
            "knowledge_projection.",
            "user_projection.",
            "input_norm.",
            "blocks.",
            "output_norm.",
        ),
        "head": ("head.",),
    }
    ROW_TABLES: ClassVar = (
        "item_embedding.weight",
        "output_bias",
        "user_embedding.weight",
        "entity_embedding.weight",
    )

    linears: tuple[str, ...]  # of a block: what LoRA changes

    config: Bert4RecConfig | PeterRecConfig
    blocks: nn.ModuleList
    patches: nn.ModuleList | None  # one a block, where there are any

    def __init__(
        self, config: Bert4RecConfig | PeterRecConfig, sizes: ModelSizes, tables: RowTables | None = None
    ) -> None:
        super().__init__(config, sizes, tables)
        num_slots = sizes.num_slots
        width = config.width
        self.patches = None
        self.item_embedding = self.table(self.num_items, width)
        self.item_projection = nn.Linear(width, width) if num_slots else None
        if num_slots:
            self.entity_embedding = self.table(sizes.num_entities, config.knowledge_width)
            self.knowledge_projection = nn.Linear(num_slots * config.knowledge_width, width, bias=False)
        if config.user_width:
            self.user_embedding = self.table(sizes.num_users, config.user_width)
            self.user_projection = nn.Linear(config.user_width, width, bias=False)

    def _add_head(self) -> None:
        width = self.config.width
        scale = [CosineQuery(self.config.temperature)] if self.scores_cosines else []
        self.head = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.LayerNorm(width), *scale)
        if not self.scores_cosines:
            self.output_bias = self.per_item()
        self.apply(initialise)

    @property
    def scores_cosines(self) -> bool:
        return self.config.score == "cosine"

    def bias(self, rows: Tensor | None = None) -> Tensor:
        """As of every model; cosines have none."""
        if not self.scores_cosines:
            return super().bias(rows)
        return self.item_embedding.weight.new_zeros(self.num_items if rows is None else rows.shape)

    @staticmethod
    def table_std(width: int) -> float:
        return TABLE_STD

    def item_vectors(self, rows: Tensor | None = None) -> Tensor:
        """Knowledge-enhanced vectors of catalogue rows, [V, D] or [*rows.shape, D]: the projected concatenation of the
        item's embedding and those of its director and actors (survey 4.3), written as a sum of two projections."""
        vectors: Tensor = self.own_vectors(self.item_embedding.weight, rows)
        if self.item_projection is not None:
            vectors = self.item_projection(vectors) + self.knowledge_projection(self.entity_vectors(rows))
        return self.with_features(vectors, rows)

    @property
    def scores_with_table(self) -> bool:
        return self.item_projection is None and not self.items_have_features

    def forward(
        self,
        items_BT: Tensor,
        lengths_B: Tensor,
        users_B: Tensor,
        wanted_BT: Tensor,
        *,
        causal: bool,
        table_VD: Tensor | None = None,
        events: EventInputs = ITEMS_ONLY,
    ) -> Tensor:
        order_B = lengths_B.argsort(stable=True)
        items_BT, lengths_B, wanted_BT = items_BT[order_B], lengths_B[order_B], wanted_BT[order_B]
        events = events.take(order_B)
        # Tables are read once for the whole batch; what follows is done chunk by chunk.
        vectors_BTD = self.item_vectors(items_BT) if table_VD is None else F.embedding(items_BT, table_VD)
        x_BTD = self._placed(self.with_event_inputs(vectors_BTD, events))
        if self.config.user_width:
            x_BTD = x_BTD + self.user_projection(self.user_vectors(users_B)[order_B])[:, None]
        sizes = sizes_by_length(lengths_B, CHUNK_POSITIONS)
        lengths, wanted = torch.split(lengths_B, sizes), torch.split(wanted_BT, sizes)
        times: Sequence[EventTimes | None] = [None] * len(sizes) if events.times is None else events.times.split(sizes)
        seeds = torch.randint(1 << 62, (len(sizes),)).tolist() if self.training else []

        def through(number: int, x_BTD: Tensor) -> Tensor:
            random = torch.Generator(x_BTD.device).manual_seed(seeds[number]) if self.training else None
            chunk = Chunk(lengths[number], wanted[number], times[number], causal)
            return self._chunk(x_BTD, chunk, random)

        weights = [*self._network(), *(self.patches.parameters() if self.patches is not None else ())]
        return torch.cat(mapped(through, torch.split(x_BTD, sizes), weights))[order_of(wanted_BT, order_B)]

    def _placed(self, vectors_BTD: Tensor) -> Tensor:
        """The items' vectors with what tells their places."""
        raise NotImplementedError

    def _chunk(self, x_BTD: Tensor, chunk: Chunk, random: torch.Generator | None) -> Tensor:
        """Hidden states [N, D] of the wanted positions of some sequences, from the vectors of their items."""
        raise NotImplementedError

    def _network(self) -> Sequence[nn.Parameter]:
        """All that `_chunk` reads of what is trained, but patches."""
        raise NotImplementedError

    def add_patches(self, config: PatchConfig) -> None:
        """New patches beside every block, drawn from the global random state."""
        self.patches = new_patches(config, self.config.width, self.blocks, self.linears)

    def patches_of_blocks(self) -> list[Patches]:
        """Of each block, in order."""
        if self.patches is None:
            return [None] * len(self.blocks)
        return [cast(nn.ModuleDict, patches) for patches in self.patches]
