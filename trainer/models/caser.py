"""Caser (Tang and Wang 2018): convolutions over a window of items, with the survey's knowledge embeddings (4.3, 4.4).

The window's L vectors are an image: horizontal filters see h neighbouring items at once (h from 1 to L), vertical ones
weigh the L places of each coordinate. What they find becomes a vector of `width`; the user's vector stands beside it,
and both are scored by weights that each item has of its own.

Shape letters: ``B`` sequences, ``T`` positions, ``N`` windows, ``L`` items of a window, ``D`` width of an item's vector
with its entities', ``V`` catalogue rows, ``S`` knowledge slots.

Where the paper leaves the survey's uses open. Left to right, a position's window ends with it. For masked items the
windows tile the sequence, counted from its end, and a window's masked items are predicted from its vector, so that they
have a context on both sides; the next item's position, behind the sequence, is the last of the last window. In
the training tiles are shifted by a random number of places, unless the last position alone is masked. Knowledge
stands beside the item's vector in the window (concatenated, as in the survey), and in the output it adds its
projection to the item's own weights. Items have two tables, one to be read by and one to be scored by, both new in a
new domain.
"""

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.config import CaserConfig
from trainer.models.base import ModelSizes, SequenceModel
from trainer.models.cpu.chunks import mapped, order_of, sizes_by_length
from trainer.models.documents import DocumentTable
from trainer.models.features import Features, FeatureTable
from trainer.models.row_table import RowTables
from trainer.models.time import ITEMS_ONLY, EventInputs

CHUNK_POSITIONS = 1_024  # windows that go through the filters together on a CPU, about


class Caser(SequenceModel):
    """Hidden states [N, width + user width]: the window's vector, then the user's."""

    GROUPS: ClassVar = {
        "item": ("item_embedding.", "item_weights.", "output_bias"),
        "user": ("user_embedding.",),
        "knowledge": ("entity_embedding.",),
        "body": ("horizontal.", "vertical.", "merged.", "knowledge_projection."),
    }
    ROW_TABLES: ClassVar = (
        "item_embedding.weight",
        "item_weights.weight",
        "output_bias",
        "user_embedding.weight",
        "entity_embedding.weight",
    )

    config: CaserConfig

    def __init__(self, config: CaserConfig, sizes: ModelSizes, tables: RowTables | None = None) -> None:
        super().__init__(config, sizes, tables)
        num_slots = sizes.num_slots
        L, D = config.window, config.width + num_slots * config.knowledge_width
        hidden = config.width + config.user_width
        self.item_embedding = self.table(self.num_items, config.width)
        self.item_weights = self.table(self.num_items, hidden)
        self.knowledge_projection = nn.Linear(D - config.width, hidden, bias=False) if num_slots else None
        if num_slots:
            self.entity_embedding = self.table(sizes.num_entities, config.knowledge_width)
        if config.user_width:
            self.user_embedding = self.table(sizes.num_users, config.user_width)
        self.horizontal = nn.ModuleList(nn.Linear(height * D, config.horizontal) for height in range(1, L + 1))
        self.vertical = nn.Linear(L, config.vertical)
        self.merged = nn.Linear(L * config.horizontal + D * config.vertical, config.width)
        self.head = nn.Identity()
        self.output_bias = self.per_item()
        self.apply(_initialise)

    @staticmethod
    def table_std(width: int) -> float:
        return 1 / width

    @property
    def hidden_width(self) -> int:
        return self.config.width + self.config.user_width

    def item_vectors(self, rows: Tensor | None = None) -> Tensor:
        own = self.own_vectors(self.item_weights.weight, rows)
        return self.with_features(self.with_knowledge(own, rows, self.knowledge_projection), rows)

    def add_features(self, tables: tuple[FeatureTable, ...], documents: DocumentTable | None) -> None:
        super().add_features(tables, documents)
        if self.feature_map is None:  # a map speaks of items that nobody has had: no history has them
            self.features["read"] = Features(self.config.features, self.config.width, tables, documents)

    @property
    def item_width(self) -> int:
        return self.hidden_width

    @property
    def scores_with_table(self) -> bool:
        return self.knowledge_projection is None and not self.items_have_features

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
        lengths, wanted = lengths_B[order_B], wanted_BT[order_B]
        ends_BT = self._ends(lengths, wanted, causal=causal)
        x_BTD = self._read(
            items_BT[order_B], lengths, events.take(order_B)
        )  # once for the whole batch; what follows is done chunk by chunk
        sizes = sizes_by_length(lengths, CHUNK_POSITIONS)
        wanted_of, ends_of = torch.split(wanted, sizes), torch.split(ends_BT, sizes)
        seeds = torch.randint(1 << 62, (len(sizes),)).tolist() if self.training else []

        def chunk(number: int, x_BTD: Tensor) -> Tensor:
            random = torch.Generator(x_BTD.device).manual_seed(seeds[number]) if self.training else None
            return self._chunk(x_BTD, wanted_of[number], ends_of[number], random)

        weights = [*self.horizontal.parameters(), *self.vertical.parameters(), *self.merged.parameters()]
        hidden = torch.cat(mapped(chunk, torch.split(x_BTD, sizes), weights))[order_of(wanted, order_B)]
        if not self.config.user_width:
            return hidden
        return torch.cat([hidden, self.user_vectors(users_B)[wanted_BT.nonzero()[:, 0]]], dim=1)

    def _read(self, items_BT: Tensor, lengths_B: Tensor, events: EventInputs) -> Tensor:
        """Vectors [B, T, D] of the items and their entities; zero behind a sequence's end."""
        x_BTD = self.with_features(self.own_vectors(self.item_embedding.weight, items_BT), items_BT, "read")
        x_BTD = self.with_event_inputs(x_BTD, events)
        if self.knowledge_projection is not None:
            x_BTD = torch.cat([x_BTD, self.entity_vectors(items_BT)], dim=2)
        real_BT = torch.arange(items_BT.shape[1], device=items_BT.device) < lengths_B[:, None]
        return x_BTD * real_BT[:, :, None]

    def _ends(self, lengths_B: Tensor, wanted_BT: Tensor, *, causal: bool) -> Tensor:
        """Where the window of each position ends, [B, T]; up to L - 1 places behind the sequence's end."""
        B, T = wanted_BT.shape
        place_T = torch.arange(T, device=lengths_B.device)
        if causal:
            return place_T.expand(B, T)
        end_B = lengths_B - 1
        if self.training:
            shift_B = torch.randint(self.config.window, (B,)).to(end_B.device)
            # A sequence of which the last position alone is wanted is read as it will be at evaluation.
            others_B = (wanted_BT & (place_T != end_B[:, None])).any(1)
            end_B = end_B + shift_B * others_B
        back_BT = (end_B[:, None] - place_T).clamp(min=0)
        return end_B[:, None] - back_BT // self.config.window * self.config.window

    def _chunk(self, x_BTD: Tensor, wanted_BT: Tensor, ends_BT: Tensor, random: torch.Generator | None) -> Tensor:
        """[N, width]: what the filters find in the windows of the wanted positions of some sequences."""
        L = self.config.window
        row_N, place_N = wanted_BT.nonzero(as_tuple=True)
        around_BTD = F.pad(x_BTD, (0, 0, L - 1, L - 1))
        window_NDL = around_BTD.unfold(1, L, 1)[row_N, ends_BT[row_N, place_N]]  # that which ends at e begins at e here
        D = window_NDL.shape[1]
        flat_NX = window_NDL.transpose(1, 2).flatten(1)  # place after place
        found = [
            torch.stack([filters(flat_NX[:, at * D : (at + height) * D]) for at in range(L - height + 1)])
            .amax(0)
            .relu()
            for height, filters in enumerate(self.horizontal, start=1)
        ]
        merged: Tensor = self.merged(self.dropout(torch.cat([self.vertical(window_NDL).flatten(1), *found], 1), random))
        return merged.relu()


def _initialise(module: nn.Module) -> None:
    """As the authors do: normals of 1 / width for tables; for filters 1 / sqrt(inputs) (LeCun et al. 1998)."""
    if isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=Caser.table_std(module.embedding_dim))
    if isinstance(module, nn.Linear):
        std = module.in_features**-0.5
        nn.init.trunc_normal_(module.weight, std=std, a=-2 * std, b=2 * std)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
