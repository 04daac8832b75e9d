"""DUPN (Ni et al. 2018; survey 3.1): an LSTM over a user's items, and attention over its states with the user's own
embedding as the query; what comes out is the user, for whatever task.

What kind of event each was (a view, a purchase) may be read too: a vector of it is added to the item's, so that it
reaches each gate of the LSTM, as the paper's behaviour property does.

Shape letters: ``B`` sequences, ``T`` positions, ``D`` width, ``N`` any number of positions.

A position attends to itself and what is before it, so that every position of a sequence is a user at that time, and one
pass trains them all; the paper has one per sequence. Where we leave it, too: the state at the position stands beside
the attended one.
"""

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.config import DupnConfig
from trainer.models.base import TABLE_STD, ModelSizes, SequenceModel, initialise
from trainer.models.row_table import RowTables
from trainer.models.time import ITEMS_ONLY, EventInputs

MOST = 15.0  # of an attention score's size, so that exponentials of any two can be divided in fp32


class Dupn(SequenceModel):
    """Items are scored with the vectors that they are read by."""

    GROUPS: ClassVar = {
        "item": ("item_embedding.", "output_bias"),
        "user": ("user_embedding.",),
        "knowledge": ("entity_embedding.",),
        "position": (),
        "patch": (),
        "body": (
            "knowledge_projection.",
            "event_type_embedding.",
            "input_norm.",
            "lstm.",
            "attention_state.",
            "attention_user.",
            "attention.",
            "merged.",
        ),
        "head": ("head.",),
    }
    ROW_TABLES: ClassVar = (
        "item_embedding.weight",
        "output_bias",
        "user_embedding.weight",
        "entity_embedding.weight",
    )

    config: DupnConfig

    def __init__(self, config: DupnConfig, sizes: ModelSizes, tables: RowTables | None = None) -> None:
        super().__init__(config, sizes, tables)
        width, num_slots = config.width, sizes.num_slots
        self.item_embedding = self.table(self.num_items, width)
        self.knowledge_projection = None
        if num_slots:
            self.entity_embedding = self.table(sizes.num_entities, config.knowledge_width)
            self.knowledge_projection = nn.Linear(num_slots * config.knowledge_width, width, bias=False)
        if config.event_types:
            self.event_type_embedding = nn.Embedding(sizes.num_event_types + 1, width)
        self.input_norm = nn.LayerNorm(width)
        self.lstm = nn.LSTM(width, width, batch_first=True)
        self.attention_state = nn.Linear(width, width)
        if config.user_width:
            self.user_embedding = self.table(sizes.num_users, config.user_width)
            self.attention_user = nn.Linear(config.user_width, width, bias=False)
        self.attention = nn.Linear(width, 1, bias=False)
        self.merged = nn.Linear(2 * width, width)
        self.head = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.LayerNorm(width))
        self.output_bias = self.per_item()
        self.apply(_initialise)

    @staticmethod
    def table_std(width: int) -> float:
        return TABLE_STD

    def item_vectors(self, rows: Tensor | None = None) -> Tensor:
        own = self.own_vectors(self.item_embedding.weight, rows)
        return self.with_features(self.with_knowledge(own, rows, self.knowledge_projection), rows)

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
        assert causal, "settings refuse tasks that look ahead"
        vectors_BTD = self.item_vectors(items_BT) if table_VD is None else F.embedding(items_BT, table_VD)
        if self.config.event_types:
            kinds_BT = torch.zeros_like(items_BT) if events.event_types_BT is None else events.event_types_BT
            vectors_BTD = vectors_BTD + self.event_type_embedding(kinds_BT)
        vectors_BTD = self.with_event_inputs(vectors_BTD, events)
        random = None
        if self.training:
            random = torch.Generator(vectors_BTD.device).manual_seed(int(torch.randint(1 << 62, ())))
        # What stands behind a sequence's end changes nothing before it.
        states_BTD, _ = self.lstm(self.dropout(self.input_norm(vectors_BTD), random))
        asked_BTD = self.attention_state(states_BTD)
        if self.config.user_width:
            asked_BTD = asked_BTD + self.attention_user(self.user_vectors(users_B))[:, None]
        score_BT1 = MOST * torch.tanh(self.attention(torch.tanh(asked_BTD)).float() / MOST)
        attended_BTD = _attended(score_BT1, states_BTD)
        both_ND = torch.cat([attended_BTD[wanted_BT], states_BTD[wanted_BT]], dim=1)
        hidden_ND: Tensor = self.dropout(torch.tanh(self.merged(both_ND)), random)
        return hidden_ND


def _attended(score_BT1: Tensor, states_BTD: Tensor) -> Tensor:
    """[B, T, D]: at each position the mean of the states up to it, weighed by the softmax of their scores: two running
    sums."""
    weight_BT1 = score_BT1.exp()
    summed_BTD = (weight_BT1 * states_BTD).cumsum(1)
    return (summed_BTD / weight_BT1.cumsum(1)).to(states_BTD.dtype)


def _initialise(module: nn.Module) -> None:
    """As all networks of this kind; the LSTM like layers, its forget gates open (Jozefowicz et al. 2015)."""
    initialise(module)
    if isinstance(module, nn.LSTM):
        width = module.hidden_size
        for name, parameter in module.named_parameters():
            if name.startswith("weight"):
                nn.init.trunc_normal_(parameter, std=width**-0.5, a=-2 * width**-0.5, b=2 * width**-0.5)
            else:
                nn.init.zeros_(parameter)
            if name == "bias_ih_l0":  # gates: in, forget, new, out
                nn.init.ones_(parameter.data[width : 2 * width])
