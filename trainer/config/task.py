"""Settings of training objectives. Each says what others must know of it, so that nobody asks which task it is."""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from etl.settings import Section
from etl.tables import BASKETS, SEQUENCES
from trainer.config.data import DataConfig, Widths, each_once

READ_ITEMS = ("bert4rec", "caser", "dupn", "peterrec")  # kinds of model that read the user's items


class LossConfig(Section):
    """full: softmax over the catalogue. sampled: over the targets and sampled negatives, with the logQ correction. bce:
    each target and each negative by itself, as yes or no. gbce: as bce, with the target's probability to a power that
    makes up for the sampling (Petrov and Macdonald 2023). All positions of a batch share the negatives: scoring them is
    one product of matrices then, and costs a row of the table each, not one for each position. squared: what a user has
    had is to score 1, and everything 0 with a small weight (implicit feedback: Hu, Koren, Volinsky 2008), for `mlp`.
    """

    LATER: ClassVar = ("calibration", "unobserved_weight", "l2")

    kind: Literal["full", "sampled", "bce", "gbce", "squared"] = "full"
    num_negatives: int = Field(1_024, ge=1, le=10_000_000)
    calibration: float = Field(0.75, ge=0, le=1)  # of gbce, the paper's t: 0 is bce, 1 calibrated probabilities
    unobserved_weight: float = Field(0.1, gt=0)  # of squared: of every item's 0, beside a taken one's 1
    l2: float = Field(0.01, ge=0)  # of squared: of the squares of both vectors, for each pair, by the pair's weight
    label_smoothing: float = Field(0.0, ge=0, lt=1)

    @property
    def scores_catalogue(self) -> bool:
        """Whether it scores every item."""
        return self.kind in ("full", "squared")

    @model_validator(mode="after")
    def _smoothing_has_a_catalogue(self) -> "LossConfig":
        if self.kind != "full" and self.label_smoothing:
            raise ValueError("label_smoothing is of the whole catalogue's softmax; set it to 0, or kind to full")
        return self


@dataclass(frozen=True)
class DataNeeds:
    """What a task reads; other rooms ask this, and never which task it is."""

    table: str = SEQUENCES.name
    request: Literal["items", "baskets"] = "items"  # what holds the history in a request
    separators: bool = False  # whether it reads a SEP behind each basket
    repeats: bool = False  # whether what a user has had may be predicted again


class TaskSettings(Section):
    """What every task says of itself; a task overrides what differs."""

    kind: str
    needs: ClassVar[DataNeeds] = DataNeeds()
    reads_event_types: ClassVar[bool] = False  # whether a model may read the events' types
    reads_times: ClassVar[bool] = False  # whether a model may read when events were
    reads_all_ranks: ClassVar[bool] = False  # whether a step reads the users of other ranks
    networks: ClassVar[tuple[str, ...]] = ()  # kinds of model that it can train; (): all

    @property
    def evaluators(self) -> tuple[str, ...]:
        """Names in `trainer.evaluation.evaluators`; validation, search and gate go by the first."""
        return ("items",)

    @property
    def scores_items(self) -> bool:
        """Whether its models give items a score, so that they can recommend."""
        return True

    @property
    def ranks_items(self) -> bool:
        """Whether its models are evaluated by how they rank items."""
        return self.scores_items

    @property
    def predicts_other_domains(self) -> bool:
        """Whether its models may read one domain and predict another's items."""
        return self.evaluators == ("items",)

    @property
    def predicts(self) -> str:
        """What its models predict of a user, in words."""
        return "items"

    @property
    def scores_catalogue(self) -> bool:
        """Whether a step scores every item."""
        loss = getattr(self, "loss", None)
        return isinstance(loss, LossConfig) and loss.scores_catalogue

    @property
    def is_next_item(self) -> bool:
        """Whether it predicts one next item and nothing else."""
        return False

    @property
    def packs(self) -> bool:
        """Whether its steps can have static shapes."""
        return False

    @property
    def reads_left_to_right(self) -> bool:
        """Whether a position never reads what stands behind it."""
        return bool(getattr(self, "causal", False))

    @property
    def reads_values(self) -> bool:
        """Whether it reads the events' values."""
        return False

    @property
    def predicts_event_types(self) -> bool:
        return False

    @property
    def negative_events(self) -> tuple[str, ...]:
        """Event types that mean "shown, not taken": used as negatives, never as positives."""
        return ()

    def check_data(self, data: DataConfig) -> None:
        """Raises ValueError for data that it can't be trained on."""


class MaskedItemConfig(TaskSettings):
    """Masked item prediction (3.2.1), masked as in 4.4."""

    kind: Literal["masked_item"] = "masked_item"
    mask_probability: float = Field(0.2, gt=0, lt=1)
    last_only_probability: float = Field(0.15, ge=0, le=1)  # samples in which only the last position is masked
    loss: LossConfig = LossConfig()
    reads_times: ClassVar[bool] = True

    @property
    def packs(self) -> bool:
        return True


class NextItemConfig(TaskSettings):
    """Next item prediction: each position predicts the item after it, or the next `targets`, from those before."""

    kind: Literal["next_item"] = "next_item"
    targets: int = Field(1, ge=1, le=10_000)  # Caser's T (Tang and Wang 2018)
    loss: LossConfig = LossConfig()
    reads_event_types: ClassVar[bool] = True
    reads_times: ClassVar[bool] = True

    @property
    def is_next_item(self) -> bool:
        return self.targets == 1

    @property
    def packs(self) -> bool:
        return self.targets == 1 and self.loss.kind != "squared"

    @property
    def reads_left_to_right(self) -> bool:
        return True


class PairHeadConfig(Section):
    """f(u, v) of content-based click prediction: a user's vector and an item's content to a score."""

    content: int = Field(ge=1, le=1_000_000)  # width
    layers: tuple[int, ...]


class WeightsHeadConfig(Section):
    """Weights of several losses, learned with the model (Kendall, Gal and Cipolla 2018)."""

    losses: int = Field(ge=1, le=1_000)


TaskHead = (
    Annotated[int, Field(ge=1, le=1_000_000_000)] | PairHeadConfig | WeightsHeadConfig
)  # so many outputs, a score of pairs, or weights


class TargetItemConfig(TaskSettings):
    """Items of another domain predicted by a user's vector (PeterRec's fine-tuning: Yuan et al. 2020): what is read is
    all but the items of `data.predicted`, with a CLS behind, and each of those is a target."""

    kind: Literal["target_item"] = "target_item"
    causal: bool = True  # as the parent was pre-trained: next item, causal; masked item, not (a CLS at both ends then)
    loss: LossConfig = LossConfig()

    def check_data(self, data: DataConfig) -> None:
        if data.predicted in (None, data.domain):
            raise ValueError(
                "task target_item tells one domain's items by what was done elsewhere, found no data.predicted beside "
                "data.domain; set data.domain=all and data.predicted to a domain"
            )


class ProfileConfig(TaskSettings):
    """What a user is, predicted by the user's vector (PeterRec's user-profile prediction: Yuan et al. 2020; survey
    3.3): an attribute of the table `users`, as one of the values that it has there."""

    kind: Literal["profile"] = "profile"
    attribute: str  # gender, age, occupation…
    causal: bool = True  # as of target_item
    # Shares of the users whose attribute is held out, chosen by a hash of their index, the same for every model.
    validation: float = Field(0.1, gt=0, lt=1)
    test: float = Field(0.2, gt=0, lt=1)
    min_users: int = Field(1, ge=1)  # who has a value that fewer have counts as having none
    networks: ClassVar[tuple[str, ...]] = READ_ITEMS

    @property
    def evaluators(self) -> tuple[str, ...]:
        return ("attributes",)

    @property
    def scores_items(self) -> bool:
        return False

    @property
    def predicts(self) -> str:
        return self.attribute

    @model_validator(mode="after")
    def _some_train(self) -> "ProfileConfig":
        if self.validation + self.test >= 1:
            raise ValueError(
                f"expected validation and test to leave users to train on, found {self.validation} and {self.test}; "
                "lower them"
            )
        return self


class BasketTaskSettings(TaskSettings):
    """A task that reads baskets."""

    needs: ClassVar[DataNeeds] = DataNeeds(BASKETS.name, "baskets", separators=True, repeats=True)
    networks: ClassVar[tuple[str, ...]] = ("bert4rec", "peterrec")  # that read whole sequences

    @property
    def evaluators(self) -> tuple[str, ...]:
        return ("baskets",)

    def check_data(self, data: DataConfig) -> None:
        _same_domain(self, data)


def _same_domain(task: TaskSettings, data: DataConfig) -> None:
    """Raises ValueError where other items are to be predicted or ranked than those that are read."""
    if data.predicted is not None or data.ranked is not None:
        raise ValueError(
            f"task {task.kind} predicts the domain that it reads, found data.predicted or data.ranked; leave them out"
        )


class NextBasketConfig(BasketTaskSettings):
    """The items of a user's next basket (survey 3.2.2; Yang et al. 2019), predicted by a MASK behind earlier ones."""

    kind: Literal["next_basket"] = "next_basket"
    context: int = Field(10, ge=1, le=100_000)  # baskets that are read
    baskets: int = Field(4, ge=1, le=100_000)  # of a user, predicted in one step
    loss: LossConfig = LossConfig()


class BasketPairConfig(BasketTaskSettings):
    """Pre-training on pairs of baskets (Yang et al. 2019; survey 3.2.2): masked items of both, and whether the second
    comes next after the first or is another user's."""

    kind: Literal["basket_pair"] = "basket_pair"
    context: int = Field(1, ge=1, le=100_000)  # baskets on the first side
    baskets: int = Field(4, ge=1, le=100_000)  # pairs of a user in one step
    adjacent: float = Field(0.5, gt=0, lt=1)  # share of pairs that are
    mask_probability: float = Field(0.2, gt=0, lt=1)  # of an item
    asked_probability: float = Field(0.15, ge=0, le=1)  # of adjacent pairs: the second is one MASK, as in evaluation
    weight: float = Field(1.0, ge=0)  # of a pair's answer, where a masked item weighs 1
    loss: LossConfig = LossConfig()
    reads_all_ranks: ClassVar[bool] = True


class MultiConfig(TaskSettings):
    """Several things about what comes next, predicted together (DUPN: Ni et al. 2018; survey 3.1): the item, its
    category (there: the shop), the event's kind (there: the click), its value as one of its levels (there: the
    price)."""

    kind: Literal["multi"] = "multi"
    tells: tuple[Literal["next_item", "category", "event_type", "value"], ...] = Field(
        ("next_item", "category"), min_length=1
    )
    weighting: Literal["fixed", "uncertainty"] = "fixed"  # uncertainty: learned (Kendall, Gal and Cipolla 2018)
    weights: dict[str, float] = Field(default_factory=dict)  # of fixed: by what is predicted; 1 where not named
    max_levels: int = Field(20, ge=2, le=1_000_000)  # different values that are still levels
    loss: LossConfig = LossConfig()  # of the item
    reads_event_types: ClassVar[bool] = True
    reads_times: ClassVar[bool] = True
    networks: ClassVar[tuple[str, ...]] = READ_ITEMS

    @property
    def evaluators(self) -> tuple[str, ...]:
        return ("items", "events") if self.scores_items else ("events",)

    @property
    def scores_items(self) -> bool:
        return "next_item" in self.tells

    @property
    def predicts(self) -> str:
        return "next events"

    @property
    def scores_catalogue(self) -> bool:
        return self.scores_items and self.loss.scores_catalogue

    @property
    def reads_left_to_right(self) -> bool:
        return True

    @property
    def reads_values(self) -> bool:
        return "value" in self.tells

    @property
    def predicts_event_types(self) -> bool:
        return "event_type" in self.tells

    def check_data(self, data: DataConfig) -> None:
        _same_domain(self, data)

    @model_validator(mode="after")
    def _is_sound(self) -> "MultiConfig":
        if len(set(self.tells)) < len(self.tells):
            raise ValueError(f"tells: expected each once, found {', '.join(self.tells)}")
        if unknown := set(self.weights) - set(self.tells):
            raise ValueError(
                f"weights: expected names among {', '.join(self.tells)}, found {', '.join(sorted(unknown))}"
            )
        if any(weight < 0 for weight in self.weights.values()):
            raise ValueError(f"weights: expected none below 0, found {self.weights}")
        if self.weights and self.weighting != "fixed":
            raise ValueError("weights are of weighting fixed; leave them out")
        return self


class ClickConfig(TaskSettings):
    """Whether a user takes an item, predicted by the user's vector and by what the item is (Chen et al. 2019; survey
    3.2.2, equation 2)."""

    kind: Literal["click"] = "click"
    content: tuple[Literal["text", "categories"], ...] = Field(("text", "categories"), min_length=1)
    layers: Widths = Field((64,), min_length=1)  # of f's hidden layers
    negatives: int = Field(4, ge=0, le=20)  # drawn for each item taken, in training and evaluation
    # Kinds of event in the log that say an item was shown and not taken: negatives too, and never read as taken.
    impressions: tuple[str, ...] = Field((), max_length=100)
    causal: bool = True  # as the parent was pre-trained: next item, causal; masked item, not
    cuts: int = Field(8, ge=1, le=100_000)  # of a sequence in a step, where not causal
    networks: ClassVar[tuple[str, ...]] = READ_ITEMS

    @property
    def evaluators(self) -> tuple[str, ...]:
        return ("clicks",)

    @property
    def ranks_items(self) -> bool:
        return False

    @property
    def predicts(self) -> str:
        return "clicks"

    @property
    def negative_events(self) -> tuple[str, ...]:
        return self.impressions

    def check_data(self, data: DataConfig) -> None:
        _same_domain(self, data)

    @model_validator(mode="after")
    def _there_are_noes(self) -> "ClickConfig":
        if not self.negatives and not self.impressions:
            raise ValueError("negatives 0 leaves no noes; raise it, or name the kinds of event that are impressions")
        return self

    @field_validator("content")
    @classmethod
    def _parts_differ(cls, content: tuple[str, ...]) -> tuple[str, ...]:
        return each_once(content, "part")


TaskConfig = Annotated[
    MaskedItemConfig
    | NextItemConfig
    | TargetItemConfig
    | ProfileConfig
    | NextBasketConfig
    | BasketPairConfig
    | MultiConfig
    | ClickConfig,
    Field(discriminator="kind"),
]
