"""Settings of networks."""

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from etl.settings import Section
from trainer.config.columns import known_columns, unknown_columns
from trainer.config.data import Widths, each_once

Slots = Annotated[dict[str, Annotated[int, Field(ge=0, le=1_000)]], Field(max_length=1_000)]  # by relation


class DocumentConfig(Section):
    """A text's vector by a convolution and attention over word vectors, trained with the recommender (survey 2.1)."""

    columns: tuple[str, ...] = Field(("title", "categories"), min_length=1)  # of `items`, or attributes.<name>
    placeholders: tuple[str, ...] = ()  # that stand for no text, besides "", "[]", "unknown" and the like
    max_words: int = Field(32, ge=1, le=100_000)  # of a text; what is behind them is not read
    window: int = Field(3, ge=1, le=1_000)  # words that the convolution sees at once

    @field_validator("columns")
    @classmethod
    def _columns_are_known(cls, columns: tuple[str, ...]) -> tuple[str, ...]:
        if unknown := unknown_columns("item", columns):
            raise ValueError(f"expected columns of items ({known_columns('item')}), found {unknown[0]!r}")
        return each_once(columns, "column")


class JoinedFeaturesConfig(Section):
    """Vectors of items or users from the table `features`, beside their own (survey 2, Eq. 1)."""

    encoders: tuple[str, ...] = ()  # names in the table; (): none
    width: int = Field(64, ge=1, le=65_536)  # that an encoder's vectors are projected to
    # How they join the own vector: see trainer/models/features.py. With each, a model begins as one without.
    # ridge, of items: no part in training; those that nobody has had get what ridge regression predicts of the others.
    aggregate: Literal["concat", "sum", "gate", "attention", "ridge"] = "gate"
    # What stands for the vector of one that has none: learned: one that is trained; zero; mean: of those that have.
    missing: Literal["learned", "zero", "mean"] = "learned"
    whitening: bool = True  # centred, and of equal variance in all directions, over those that are trained on
    dropout: float = Field(0.0, ge=0, lt=1)  # share of the encoders' numbers that a step sees as zero: regularisation
    id_dropout: float = Field(0.0, ge=0, lt=1)  # share that a step sees without their own vector (DropoutNet)
    # The control of experiments: those of like popularity exchange their features, by `train.seed`.
    shuffled: bool = False

    @field_validator("encoders")
    @classmethod
    def _encoders_differ(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        return each_once(names, "encoder")

    @model_validator(mode="after")
    def _ids_stand_beside_features(self) -> Self:
        if self.id_dropout and not self.given:
            raise ValueError("id_dropout: expected encoders whose vectors are left, found none; name them, or set 0")
        return self

    @model_validator(mode="after")
    def _something_is_shuffled(self) -> Self:
        if self.shuffled and not self.given:
            raise ValueError("shuffled: expected encoders whose vectors are exchanged, found none; name them")
        return self

    @property
    def given(self) -> bool:
        """Whether there are any features."""
        return bool(self.encoders)


class ItemFeaturesConfig(JoinedFeaturesConfig):
    """Of items."""

    document: DocumentConfig | None = None  # a trained encoder of texts, beside those or alone

    @property
    def given(self) -> bool:
        return bool(self.encoders) or self.document is not None

    @model_validator(mode="after")
    def _ridge_is_fitted_apart(self) -> Self:
        if self.aggregate != "ridge":
            return self
        trained = [name for name in ("document", "dropout", "id_dropout") if getattr(self, name)]
        if trained or not self.encoders:
            found = f"{trained[0]}, which trains with the network" if trained else "none"
            raise ValueError(f"aggregate ridge: expected encoders alone, found {found}; leave it out, or name some")
        return self


class UserFeaturesConfig(JoinedFeaturesConfig):
    """Of users."""

    LATER: ClassVar = ("alone",)

    # Whether a user without an item is scored by features alone, at evaluation, in `recommend` and served; else, and
    # where the user has none, by popularity.
    alone: bool = False

    @model_validator(mode="after")
    def _training_shows_features_alone(self) -> Self:
        if self.alone and not self.id_dropout:
            raise ValueError(
                "alone: expected an id_dropout above 0, found 0, so that training shows no user by features alone; set "
                "it, e.g. 0.5"
            )
        return self


class TimeConfig(Section):
    """What a network reads of when events were; nothing by default (see trainer/models/time.py)."""

    # The time from the event before to each event, and from it to the request where that is known, are added to the
    # item's vector, each by log-spaced buckets.
    intervals: bool = False
    # known: a position knows when the event is that it predicts; in an answer, when the request is made. last_event: it
    # knows the times of events only, as a model whose answers are computed long before requests.
    request_time: Literal["known", "last_event"] = "known"

    @property
    def given(self) -> bool:
        """Whether anything is read."""
        return self.intervals


class AttentionTimeConfig(TimeConfig):
    """As TimeConfig, of a network that attends."""

    # Attention adds a learned number for the time between query and key, and for how far they stand apart (HSTU: Zhai
    # et al. 2024).
    bias: bool = False

    @property
    def given(self) -> bool:
        return self.intervals or self.bias


class NetworkConfig(Section):
    """What every network has."""

    LATER: ClassVar[tuple[str, ...]] = ("time", "domain_asked")

    user_width: int  # 0: no user embedding
    time: TimeConfig = TimeConfig()
    # Whether a position knows if the item that it predicts is of `data.ranked`, the domain that is asked; in an answer
    # it is. For a joint model, which else has to guess from the history which domain comes next.
    domain_asked: bool = False
    features: ItemFeaturesConfig = ItemFeaturesConfig()
    user_features: UserFeaturesConfig = UserFeaturesConfig()  # beside the user's embedding

    @property
    def reads_times(self) -> bool:
        """Whether it reads when events were."""
        return self.time.given

    @property
    def reads_request_time(self) -> bool:
        """Whether it reads when the request is made: at evaluation, when the held-out event was. Figures of those that
        do have a protocol card of their own."""
        return self.time.given and self.time.request_time == "known"

    @model_validator(mode="after")
    def _features_join_users(self) -> Self:
        if self.user_features.given and not self.user_width:
            raise ValueError(
                "user_features: expected users' embeddings, which they join, found user_width 0; set a width"
            )
        if self.user_features.aggregate == "ridge":
            raise ValueError("user_features: expected aggregate concat, sum, gate or attention, found ridge, of items")
        return self


class TiedConfig(NetworkConfig):
    """Of networks that score items with the vectors that they read them by."""

    LATER: ClassVar = (*NetworkConfig.LATER, "score", "temperature")

    # dot: the product of the user's and the item's vector, and the item's bias. cosine: the cosine of both, divided by
    # the temperature, without a bias (as HSTU is trained: Zhai et al. 2024).
    score: Literal["dot", "cosine"] = "dot"
    temperature: float = Field(0.05, gt=0)  # of cosine

    @model_validator(mode="after")
    def _temperature_is_of_cosines(self) -> Self:
        default = type(self).model_fields["temperature"].default
        if self.score == "dot" and self.temperature != default:
            raise ValueError(
                f"temperature: expected score cosine, which it divides, found dot; set that, or leave {default}"
            )
        return self


class Bert4RecConfig(TiedConfig):
    """BERT4Rec (Sun et al. 2019) with the survey's user and knowledge embeddings (4.3, 4.4)."""

    LATER: ClassVar = (*TiedConfig.LATER, "block")

    kind: Literal["bert4rec"] = "bert4rec"
    time: AttentionTimeConfig = AttentionTimeConfig()
    blocks: int = Field(2, ge=1, le=1_000)
    # plain: what a layer gives is added (Vaswani et al. 2017). ligr: it is gated first, and the second layer is a
    # SwiGLU, as in LiGR and eSASRec (Borisyuk et al. 2025; Tikhonovich et al. 2025).
    block: Literal["plain", "ligr"] = "plain"
    width: int = Field(64, ge=1, le=65_536)
    heads: int = Field(2, ge=1, le=1_000)
    max_length: int = Field(200, ge=2, le=1_000_000)  # positions, the predicted one included
    # learned: an embedding of each position, as in the paper; rotary: the query and key of each head are turned by
    # their position too, so that attention knows distances (Su et al. 2021).
    positions: Literal["learned", "rotary"] = "rotary"
    dropout: float = Field(0.1, ge=0, lt=1)
    user_width: int = Field(32, ge=0, le=65_536)  # 0: no user embedding
    # relation -> slots; {}: metadata off
    knowledge: Slots = Field(default_factory=lambda: {"director": 1, "actor": 3})
    knowledge_width: int = Field(16, ge=1, le=65_536)  # of each slot

    @model_validator(mode="after")
    def _heads_fit(self) -> "Bert4RecConfig":
        unit = 2 * self.heads if self.positions == "rotary" else self.heads
        if self.width % unit:
            raise ValueError(f"expected a width that {unit} divides ({self.heads} heads), found {self.width}")
        return self


class CaserConfig(NetworkConfig):
    """Caser (Tang and Wang 2018) with the survey's knowledge embeddings (4.3, 4.4)."""

    kind: Literal["caser"] = "caser"
    window: int = Field(5, ge=1, le=1_000)  # L: items that the filters see
    width: int = Field(64, ge=1, le=65_536)  # of an item's vector, and of the window's
    horizontal: int = Field(16, ge=1, le=65_536)  # filters of each height from 1 to L
    vertical: int = Field(4, ge=1, le=65_536)  # filters
    max_length: int = Field(
        200, ge=2, le=1_000_000
    )  # positions of a sequence that windows slide over, the predicted one included
    dropout: float = Field(0.5, ge=0, lt=1)
    user_width: int = Field(64, ge=0, le=65_536)  # 0: no user embedding
    # relation -> slots; {}: metadata off
    knowledge: Slots = Field(default_factory=lambda: {"director": 1, "actor": 3})
    knowledge_width: int = Field(25, ge=1, le=65_536)  # of each slot


class PeterRecConfig(TiedConfig):
    """PeterRec (Yuan et al. 2020), with the survey's user and knowledge embeddings where requested."""

    kind: Literal["peterrec"] = "peterrec"
    width: int = Field(64, ge=1, le=65_536)
    dilations: tuple[int, ...] = Field(
        (1, 4) * 4, min_length=1, max_length=1_000
    )  # one a block; its second convolution's is twice that
    max_length: int = Field(200, ge=2, le=1_000_000)  # positions, the predicted one included
    dropout: float = Field(0.1, ge=0, lt=1)
    user_width: int = Field(0, ge=0, le=65_536)  # 0: no user embedding
    knowledge: Slots = Field(default_factory=dict)  # relation -> slots; {}: metadata off
    knowledge_width: int = Field(16, ge=1, le=65_536)  # of each slot

    @field_validator("dilations")
    @classmethod
    def _dilations_are_some(cls, dilations: tuple[int, ...]) -> tuple[int, ...]:
        if wrong := [one for one in dilations if not 1 <= one <= 1_000_000]:
            raise ValueError(f"expected dilations from 1 to 1,000,000, found {wrong[0]}; mend it")
        return dilations


class DupnConfig(NetworkConfig):
    """DUPN (Ni et al. 2018): an LSTM over the items, attention over its states by the user's embedding."""

    kind: Literal["dupn"] = "dupn"
    width: int = Field(64, ge=1, le=65_536)  # of items' vectors and of states
    max_length: int = Field(200, ge=2, le=1_000_000)  # positions, the predicted one included
    dropout: float = Field(0.1, ge=0, lt=1)
    user_width: int = Field(32, ge=0, le=65_536)  # 0: no user embedding, attention asks nothing of the user
    event_types: bool = False  # what kind of event each was is read too, of data.event_types
    knowledge: Slots = Field(default_factory=dict)  # relation -> slots; {}: metadata off
    knowledge_width: int = Field(16, ge=1, le=65_536)  # of each slot

    @model_validator(mode="after")
    def _users_weigh_items(self) -> Self:
        if self.user_features.alone:
            raise ValueError(
                "user_features.alone: expected a model whose scores need no item of the user, found dupn, whose users "
                "only weigh items; leave it out, or take another model"
            )
        return self


class MlpConfig(NetworkConfig):
    """User and item vectors and a score of both, without a sequence (survey 2, Eq. 2): Hu et al. 2018's baseline."""

    kind: Literal["mlp"] = "mlp"
    # mlp: layers over both (He et al. 2017); dot: their product (Koren et al. 2009); fm: the products of all pairs of
    # user, item and features (Rendle 2010).
    score: Literal["mlp", "dot", "fm"] = "mlp"
    width: int = Field(64, ge=1, le=65_536)  # of an item's embedding
    user_width: int = Field(64, ge=1, le=65_536)  # of dot and fm: as width
    layers: Widths = Field((64, 32), min_length=1)  # of mlp
    max_length: int = Field(200, ge=2, le=1_000_000)  # items of a user that a step trains
    dropout: Literal[0] = 0
    knowledge: Slots = Field(default_factory=dict, max_length=0)  # none
    knowledge_width: int = Field(16, ge=1, le=65_536)

    @model_validator(mode="after")
    def _no_sequence_is_read(self) -> "MlpConfig":
        if self.reads_times:
            raise ValueError("time: expected a model that reads a sequence, found mlp, which reads none; leave it out")
        if self.domain_asked:
            raise ValueError("domain_asked: expected a model that reads a sequence, found mlp; leave it out")
        return self

    @model_validator(mode="after")
    def _vectors_are_multiplied(self) -> "MlpConfig":
        if self.score != "mlp" and self.user_width != self.width:
            raise ValueError(f"score {self.score}: expected user_width as width, {self.width}, found {self.user_width}")
        for name, features in (("features", self.features), ("user_features", self.user_features)):
            if self.score == "fm" and features.given and features.aggregate != "sum":
                raise ValueError(f"score fm: expected {name}.aggregate sum, found {features.aggregate}; set that")
        if self.score == "mlp" and self.features.aggregate == "ridge":
            raise ValueError(
                "score mlp: expected features.aggregate without ridge, which predicts vectors that are "
                "multiplied; set score dot"
            )
        return self


def _kind_of(given: Any) -> str:
    """Where none is given: BERT4Rec."""
    return str(given.get("kind", "bert4rec") if isinstance(given, dict) else getattr(given, "kind", ""))


ModelConfig = Annotated[
    Annotated[Bert4RecConfig, Tag("bert4rec")]
    | Annotated[CaserConfig, Tag("caser")]
    | Annotated[PeterRecConfig, Tag("peterrec")]
    | Annotated[DupnConfig, Tag("dupn")]
    | Annotated[MlpConfig, Tag("mlp")],
    Discriminator(_kind_of),
]
