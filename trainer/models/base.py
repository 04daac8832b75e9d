"""The seam of a model: what tasks, scoring, transfer and the optimiser ask of any network over item sequences.

Shape letters: ``B`` sequences, ``T`` positions, ``D`` width of a hidden state, ``V`` catalogue rows, ``S`` knowledge
slots of an item, ``N`` any number of positions, ``C`` candidates, ``Q`` width of what scores.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from etl.tables import FIRST_INDEX, UNK
from trainer.config import ModelConfig, PairHeadConfig, TaskHead, WeightsHeadConfig
from trainer.models.cpu.dropout import Dropout
from trainer.models.documents import DocumentTable
from trainer.models.feature_map import FeatureMap, fitted_rows
from trainer.models.features import Features, FeatureTable, kept_ids
from trainer.models.heads import LossWeights, PairHead, unit
from trainer.models.packed_places import PackedPlaces
from trainer.models.row_table import RowTable, RowTables
from trainer.models.time import ITEMS_ONLY, DomainAsked, EventInputs, Intervals

_EVERY = slice(None)
TABLE_STD = 0.02


@dataclass(frozen=True, kw_only=True)
class ModelSizes:
    """What the data give a model's tables: how many users, entities and kinds of event there are, and `knowledge_VS`,
    the entity index of each slot of each catalogue row, UNK where unknown (survey 4.3: director, actors)."""

    num_users: int
    num_entities: int
    knowledge_VS: Tensor
    num_event_types: int = 0  # kinds that are distinguished, for a model that reads them
    features: tuple[FeatureTable, ...] = ()  # of `config.features.encoders`, in their order
    documents: DocumentTable | None = None  # of `config.features.document`
    user_features: tuple[FeatureTable, ...] = ()  # of `config.user_features.encoders`, of rows of the user table

    @property
    def item_features_given(self) -> bool:
        return bool(self.features) or self.documents is not None

    @property
    def num_slots(self) -> int:
        return self.knowledge_VS.shape[1]


class SequenceModel(nn.Module):
    """items, lengths, users -> hidden states [N, D] of wanted positions, and scores [N, C] of items for them.

    A subclass gives `forward`, `head`, `item_vectors`, `scores_with_table`, `table_std`, `matched` and `crossed` where
    a score is no product of two vectors, the tensors `output_bias`, `user_embedding` (where `config.user_width`) and
    `entity_embedding` (where items have slots), `ROW_TABLES`, and
    `GROUPS`: parameter group (item, user, knowledge, position, body, head) to name prefixes, the one
    place that says which tensor is of which kind.
    """

    GROUPS: ClassVar[dict[str, tuple[str, ...]]]
    reads_sequence: ClassVar[bool] = True  # else the hidden states of a sequence are all the same: its user's
    ROW_TABLES: ClassVar[tuple[str, ...]]  # names of the tables that can be looked up by row

    knowledge_VS: Tensor
    predicted_V: Tensor | None  # bool: the catalogue rows that are predicted; None: all real ones
    untrained_V: (
        Tensor | None
    )  # bool: rows that nobody has had: no class of a loss, and with features nothing of their own
    classes_C: Tensor | None  # see `classes`
    asked_V: Tensor | None  # bool: the rows of the domain that is asked, where the model reads which one is
    content_VF: Tensor | None  # vectors of what items are, where the task reads them
    head: nn.Module
    user_embedding: nn.Embedding | RowTable
    entity_embedding: nn.Embedding | RowTable
    output_bias: nn.Parameter

    def __init__(self, config: ModelConfig, sizes: ModelSizes, tables: RowTables | None) -> None:
        super().__init__()
        self.config, self.num_items = config, len(sizes.knowledge_VS)
        self.tables = tables  # None: dense ones
        self.register_buffer("knowledge_VS", sizes.knowledge_VS.int(), persistent=False)
        self.register_buffer("predicted_V", None, persistent=False)
        self.register_buffer("untrained_V", None, persistent=False)
        self.register_buffer("classes_C", None, persistent=False)
        self.register_buffer("asked_V", None, persistent=False)
        self.register_buffer("content_VF", None, persistent=False)
        self.dropout = Dropout(config.dropout)
        self.task_heads = nn.ModuleDict()
        self.features = nn.ModuleDict()  # `scored`: of the vectors that score; `user`: of users
        self.time = nn.ModuleDict()  # what reads when events were
        self.asked = nn.ModuleDict()  # what reads which domain is asked

    def table(self, num_embeddings: int, width: int) -> nn.Embedding | RowTable:
        """A table of item, user or entity vectors, dense or row-wise."""
        if self.tables is None:
            return nn.Embedding(num_embeddings, width)
        return RowTable(num_embeddings, width, self.tables)

    @staticmethod
    def table_std(width: int) -> float:
        """The standard deviation that vectors of a new table have."""
        raise NotImplementedError

    def per_item(self) -> nn.Parameter:
        """A number of each item, or of those of this process's share: zero."""
        return nn.Parameter(torch.zeros(self.num_items if self.tables is None else self.tables.share(self.num_items)))

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
        """Hidden states [N, D] of the positions that are wanted (bool [B, T], real ones), row after row.

        items [B, T] catalogue rows, oldest first, padded behind `lengths`; users [B] rows of the user table (those
        beyond it are unknown). `causal`: a position looks at none behind it. `table_VD`: item_vectors(), where the
        caller has it already. `events`: what is read of events beside items."""
        raise NotImplementedError

    @property
    def packs(self) -> bool:
        """Whether `packed_states` is given: steps of static shapes."""
        return False

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
        """As `forward`, through the rows of a packing: hidden states [N, D] of `places`, with nothing that the host
        must wait for, nor a shape that depends on the batch's numbers."""
        raise NotImplementedError

    def item_vectors(self, rows: Tensor | None = None) -> Tensor:
        """The vectors of catalogue rows, [V, Q] or [*rows.shape, Q]; they score as `as_scored` makes them."""
        raise NotImplementedError

    @property
    def scores_cosines(self) -> bool:
        """Whether `as_scored` changes anything."""
        return False

    def as_scored(self, vectors: Tensor) -> Tensor:
        """Items' vectors as queries (`head`) are multiplied with them: themselves, or at length 1."""
        return unit(vectors) if self.scores_cosines else vectors

    def add_features(self, tables: tuple[FeatureTable, ...], documents: DocumentTable | None) -> None:
        """Vectors from outside the log beside items' own: `item_vectors` has them from now on. Drawn from the global
        random state, and at first without effect."""
        if self.config.features.aggregate == "ridge":
            self.features["scored"] = FeatureMap(self.item_width, tables)
        else:
            self.features["scored"] = Features(self.config.features, self.item_width, tables, documents)

    def add_time(self) -> None:
        """What reads when events were, as `config.time` says: at first without effect."""
        time = self.config.time
        if time.intervals:
            self.time["intervals"] = Intervals(self.config.width, until=time.request_time == "known")

    def add_domain_asked(self) -> None:
        """What reads which domain is asked, where `config.domain_asked`: at first without effect."""
        if self.config.domain_asked:
            self.asked["domain"] = DomainAsked(self.config.width)

    def with_event_inputs(self, vectors_BTD: Tensor, events: EventInputs) -> Tensor:
        """Items' vectors with the times between events and the domain asked added, where the network reads these."""
        if "intervals" in self.time:
            assert events.times is not None, "times are read"
            vectors_BTD = vectors_BTD + self.time["intervals"](events.times).to(vectors_BTD.dtype)
        if "domain" in self.asked:
            assert events.asked_BT is not None, "the domain asked is read"
            vectors_BTD = vectors_BTD + self.asked["domain"](events.asked_BT).to(vectors_BTD.dtype)
        return vectors_BTD

    def add_user_features(self, tables: tuple[FeatureTable, ...]) -> None:
        """As `add_features`, beside users' own vectors."""
        self.features["user"] = Features(self.config.user_features, self.config.user_width, tables)

    @property
    def feature_map(self) -> FeatureMap | None:
        """What gives vectors to items that nobody has had, fitted apart from training."""
        found = getattr(self.features, "scored", None)
        return found if isinstance(found, FeatureMap) else None

    def fit_features(self) -> None:
        """Fit the feature map, where there is one, to what trained items have now."""
        if self.feature_map is None:
            return
        assert self.untrained_V is not None
        unfit_V = self.untrained_V if self.predicted_V is None else self.untrained_V | ~self.predicted_V
        rows = fitted_rows(unfit_V)
        with torch.no_grad():
            self.feature_map.fit(rows, self.item_vectors(rows), self.bias(rows))

    @property
    def items_have_features(self) -> bool:
        """Whether they have a part in items' vectors: a map has none in training."""
        return "scored" in self.features and not (self.training and self.feature_map is not None)

    @property
    def features_of_items(self) -> list[str]:
        """Names of `features` that join items' vectors."""
        return [name for name in self.features if name != "user"]

    @property
    def item_width(self) -> int:
        """Width of the items' vectors that features are added to."""
        return self.config.width

    def own_vectors(self, table: Tensor, rows: Tensor | None) -> Tensor:
        """As `rows_of`; zero for rows of which features alone are known."""
        own, known = self.rows_of(table, rows), self._known(rows)
        return own if known is None else own * known[..., None]

    def _known(self, rows: Tensor | None) -> Tensor | None:
        """Of catalogue rows [N] of which more is known than features, bool [N]: not of untrained ones, and in a step of
        training not of those that `config.features.id_dropout` leaves out. None: of all."""
        share = self.config.features.id_dropout if self.training else 0.0
        if not self.items_have_features or (not share and self.untrained_V is None):
            return None
        rows = torch.arange(self.num_items, device=self.knowledge_VS.device) if rows is None else rows
        known = kept_ids(rows, share)
        return known if self.untrained_V is None else known & ~self.untrained_V[rows]

    def with_features(self, vectors: Tensor, rows: Tensor | None, place: str = "scored") -> Tensor:
        """Vectors of catalogue rows with what comes from outside the log; as they are where nothing does."""
        if not self.items_have_features:
            return vectors
        if self.feature_map is not None:
            return self._where_untrained(vectors, rows, self.feature_map.vectors)
        joined: Tensor = self.features[place](vectors, rows)
        return joined

    def _where_untrained(self, own: Tensor, rows: Tensor | None, mapped: Callable[[Tensor], Tensor]) -> Tensor:
        """Own vectors, or biases, with those of a map for rows that nobody has had."""
        assert self.untrained_V is not None
        wanted = self.untrained_V if rows is None else self.untrained_V[rows]
        if not wanted.any():
            return own
        found = own.clone()
        found[wanted] = mapped(wanted.nonzero()[:, 0] if rows is None else rows[wanted]).to(found.dtype)
        return found

    def restrict_targets(self, rows_V: Tensor) -> None:
        """Predict these catalogue rows only (bool [V], at least one real item): others are read, and never an
        answer."""
        self.predicted_V = rows_V.to(self.knowledge_VS.device)
        self.classes_C = self._classes()

    def ask_for(self, rows_V: Tensor) -> None:
        """Answer for the domain of these catalogue rows (bool [V]), where the model reads which one is asked."""
        self.asked_V = rows_V.to(self.knowledge_VS.device)

    def mark_untrained(self, rows_V: Tensor) -> None:
        """Train and score without anything of these catalogue rows' own (bool [V])."""
        self.untrained_V = rows_V.to(self.knowledge_VS.device)
        self.classes_C = self._classes()

    def classes(self) -> Tensor | None:
        """Catalogue rows, ascending, that a loss is taken among; None: all real ones."""
        return self.classes_C

    def _classes(self) -> Tensor:
        """Found once: their number is a shape, which a step has no time to wait for."""
        among_V = self.predicted_V
        if among_V is None:
            among_V = torch.arange(self.num_items, device=self.knowledge_VS.device) >= FIRST_INDEX
        return (among_V if self.untrained_V is None else among_V & ~self.untrained_V).nonzero()[:, 0]

    @property
    def scores_with_table(self) -> bool:
        """Whether `item_vectors` is a table as it stands, so that all of it costs nothing."""
        raise NotImplementedError

    def add_task_head(self, name: str, head: TaskHead) -> None:
        """What a task tells by a hidden state beside items: so many numbers, a score of an item's content, or weights
        of losses. Drawn from the global random state."""
        if isinstance(head, PairHeadConfig):
            self.task_heads[name] = PairHead(self.hidden_width, head.content, head.layers)
            return
        if isinstance(head, WeightsHeadConfig):
            self.task_heads[name] = LossWeights(head.losses)
            return
        layer = nn.Linear(self.hidden_width, head)
        nn.init.trunc_normal_(layer.weight, std=self.hidden_width**-0.5)
        nn.init.zeros_(layer.bias)
        self.task_heads[name] = layer

    def describe(self, content_VF: Tensor) -> None:
        """What items are (`trainer.data.item_features`), for a task that reads it."""
        self.content_VF = content_VF.to(self.knowledge_VS.device)

    @property
    def hidden_width(self) -> int:
        """Width of a hidden state, as `forward` gives it."""
        return self.config.width

    def bias(self, rows: Tensor | None = None) -> Tensor:
        """Output biases of catalogue rows, [V] or [*rows.shape]; zero where features alone are known, which so learn to
        say how popular an item is."""
        own, known = self.rows_of(self.output_bias, rows), self._known(rows)
        own = own if known is None else own * known
        if self.feature_map is None or not self.items_have_features:
            return own
        return self._where_untrained(own, rows, self.feature_map.biases)

    def scores(
        self,
        hidden_ND: Tensor,
        rows: Tensor | slice = _EVERY,
        table_VD: Tensor | None = None,
        bias_V: Tensor | None = None,
    ) -> Tensor:
        """Scores [N, C] of catalogue rows for hidden states; all of them, reserved ones included, where none are named.

        `table_VD`, `bias_V`: as_scored(item_vectors()) and bias(), where the caller has them already: a slice of rows
        copies nothing then."""
        if isinstance(rows, slice):
            table_CD = (self.as_scored(self.item_vectors()) if table_VD is None else table_VD)[rows]
            bias_C = (self.bias() if bias_V is None else bias_V)[rows]
        else:
            table_CD = self.as_scored(self.item_vectors(rows)) if table_VD is None else table_VD[rows]
            bias_C = self.bias(rows) if bias_V is None else bias_V[rows]
        return self.crossed(self.head(hidden_ND), table_CD, bias_C)

    @property
    def multiplies(self) -> bool:
        """Whether a score is the product of a query and an item's vector, and its bias."""
        return True

    def matched(self, query_NQ: Tensor, vectors_NQ: Tensor) -> Tensor:
        """Scores [N], without biases, of queries and an item's vector for each."""
        return (query_NQ * vectors_NQ).sum(-1)

    def crossed(self, query_NQ: Tensor, vectors_CQ: Tensor, bias_C: Tensor) -> Tensor:
        """Scores [N, C] of every query and every item's vector."""
        return F.linear(query_NQ, vectors_CQ, bias_C)

    def rows_of(self, table: Tensor, rows: Tensor | None) -> Tensor:
        """Rows of an item, user or entity table, however it is kept; `rows` None: all of an item table's."""
        if self.tables is not None:
            return self.tables.whole(table, self.num_items) if rows is None else self.tables.lookup(table, rows)
        if rows is None:
            return table
        return F.embedding(rows, table) if table.ndim == 2 else table[rows]

    def user_vectors(self, users_B: Tensor) -> Tensor:
        """[B, user width], with features where the model has any; that of the unknown user for those beyond the
        table. -1 - row: by that user's features alone (see `by_features`)."""
        alone_B = users_B < 0 if self.config.user_features.alone else None
        users_B = users_B if alone_B is None else torch.where(alone_B, -1 - users_B, users_B)
        known_B = torch.where(users_B < self.user_embedding.num_embeddings, users_B, UNK)
        own_BD = self.rows_of(self.user_embedding.weight, known_B)
        if "user" not in self.features:
            return own_BD
        if alone_B is not None:
            own_BD = own_BD * ~alone_B[..., None]
        if self.training and (share := self.config.user_features.id_dropout):
            own_BD = own_BD * kept_ids(known_B, share)[..., None]
        joined: Tensor = self.features["user"](own_BD, known_B)
        return joined

    def has_user_features(self, users_B: Tensor) -> Tensor:
        """[B] which users have a vector by any of the encoders."""
        if "user" not in self.features:
            return torch.zeros_like(users_B, dtype=torch.bool)
        features = self.features["user"]
        assert isinstance(features, Features)
        has_U = features.has_any()
        has_U[:FIRST_INDEX] = False
        users_B = users_B.to(has_U.device)
        is_known_B = (users_B >= 0) & (users_B < len(has_U))
        return is_known_B & has_U[torch.where(is_known_B, users_B, 0)]

    def entity_vectors(self, rows: Tensor | None) -> Tensor:
        """The vectors of catalogue rows' entities side by side, [V or *rows.shape, S x knowledge width]."""
        known = self.knowledge_VS if rows is None else self.knowledge_VS[rows]
        return self.rows_of(self.entity_embedding.weight, known).flatten(-2)

    def with_knowledge(self, own: Tensor, rows: Tensor | None, projection: nn.Linear | None) -> Tensor:
        """Vectors of catalogue rows with those of their entities added, projected; as they are without metadata."""
        if projection is None:
            return own
        vectors: Tensor = own + projection(self.entity_vectors(rows))
        return vectors

    def row_tables(self) -> dict[str, Tensor]:
        """Names of the tables that are looked up by row, and this process's part of each; none where all are dense."""
        given = dict(self.named_parameters()) if self.tables is not None else {}
        return {name: given[name] for name in self.ROW_TABLES if name in given}


def initialise(module: nn.Module) -> None:
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
