"""Settings of training objectives, and what follows from them."""

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from etl.settings import Section
from trainer.config.data import each_once


class LossConfig(Section):
    """full: softmax over the catalogue. sampled: over the targets and sampled negatives, with the logQ correction. bce:
    each target and each negative by itself, as yes or no. All positions of a batch share the negatives: scoring them is
    one product of matrices then, and costs a row of the table each, not one for each position.
    """

    kind: Literal["full", "sampled", "bce"] = "full"
    num_negatives: int = Field(1_024, ge=1)
    label_smoothing: float = Field(0.0, ge=0, lt=1)

    @model_validator(mode="after")
    def _smoothing_has_a_catalogue(self) -> "LossConfig":
        if self.kind != "full" and self.label_smoothing:
            raise ValueError("label_smoothing is of the whole catalogue's softmax; set it to 0, or kind to full")
        return self


class MaskedItemConfig(Section):
    """Masked item prediction (3.2.1), masked as in 4.4."""

    kind: Literal["masked_item"] = "masked_item"
    mask_probability: float = Field(0.2, gt=0, lt=1)
    last_only_probability: float = Field(0.15, ge=0, le=1)  # samples in which only the last position is masked
    loss: LossConfig = LossConfig()


class NextItemConfig(Section):
    """Next item prediction: each position predicts the item after it, or the next `targets`, from those before."""

    kind: Literal["next_item"] = "next_item"
    targets: int = Field(1, ge=1)  # Caser's T (Tang and Wang 2018)
    loss: LossConfig = LossConfig()


class PairHeadConfig(Section):
    """f(u, v) of content-based click prediction: a user's vector and an item's content to a score."""

    content: int = Field(ge=1)  # width
    layers: tuple[int, ...]


class WeightsHeadConfig(Section):
    """Weights of several losses, learned with the model (Kendall, Gal and Cipolla 2018)."""

    losses: int = Field(ge=1)


TaskHead = int | PairHeadConfig | WeightsHeadConfig  # so many outputs, a score of pairs, or weights


class TargetItemConfig(Section):
    """Items of another domain told by a user's vector (PeterRec's fine-tuning: Yuan et al. 2020): what is read is all
    but the items of `data.predicted`, with a CLS behind, and each of those is a target."""

    kind: Literal["target_item"] = "target_item"
    causal: bool = True  # as the parent was pre-trained: next item, causal; masked item, not (a CLS at both ends then)
    loss: LossConfig = LossConfig()


class ProfileConfig(Section):
    """What a user is told by the user's vector (PeterRec's user-profile prediction: Yuan et al. 2020; survey 3.3): an
    attribute of the table `users`, as one of the values that it has there."""

    kind: Literal["profile"] = "profile"
    attribute: str  # gender, age, occupation…
    causal: bool = True  # as of target_item
    # Shares of the users whose attribute is held out, chosen by a hash of their index, the same for every model.
    validation: float = Field(0.1, gt=0, lt=1)
    test: float = Field(0.2, gt=0, lt=1)
    min_users: int = Field(1, ge=1)  # who has a value that fewer have counts as having none

    @model_validator(mode="after")
    def _some_train(self) -> "ProfileConfig":
        if self.validation + self.test >= 1:
            raise ValueError(
                f"expected validation and test to leave users to train on, found {self.validation} and {self.test}; "
                "lower them"
            )
        return self


class NextBasketConfig(Section):
    """The items of a user's next basket (survey 3.2.2; Yang et al. 2019), told by a MASK behind the baskets before."""

    kind: Literal["next_basket"] = "next_basket"
    context: int = Field(10, ge=1)  # baskets that are read
    baskets: int = Field(4, ge=1)  # of a user, told in one step
    loss: LossConfig = LossConfig()


class BasketPairConfig(Section):
    """Pre-training on pairs of baskets (Yang et al. 2019; survey 3.2.2): masked items of both, and whether the second
    comes next after the first or is another user's."""

    kind: Literal["basket_pair"] = "basket_pair"
    context: int = Field(1, ge=1)  # baskets on the first side
    baskets: int = Field(4, ge=1)  # pairs of a user in one step
    adjacent: float = Field(0.5, gt=0, lt=1)  # share of pairs that are
    mask_probability: float = Field(0.2, gt=0, lt=1)  # of an item
    asked_probability: float = Field(0.15, ge=0, le=1)  # of adjacent pairs: the second is one MASK, as when asked
    weight: float = Field(1.0, ge=0)  # of a pair's answer, where a masked item weighs 1
    loss: LossConfig = LossConfig()


class MultiConfig(Section):
    """Several things about what comes next, told together (DUPN: Ni et al. 2018; survey 3.1): the item, its category
    (there: the shop), the event's kind (there: the click), its value as one of its levels (there: the price)."""

    kind: Literal["multi"] = "multi"
    tells: tuple[Literal["next_item", "category", "event_type", "value"], ...] = Field(
        ("next_item", "category"), min_length=1
    )
    weighting: Literal["fixed", "uncertainty"] = "fixed"  # uncertainty: learned (Kendall, Gal and Cipolla 2018)
    weights: dict[str, float] = Field(default_factory=dict)  # of fixed: by what is told; 1 where not named
    max_levels: int = Field(20, ge=2)  # different values that are still levels
    loss: LossConfig = LossConfig()  # of the item

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


class ClickConfig(Section):
    """Whether a user takes an item, told by the user's vector and by what the item is (Chen et al. 2019; survey 3.2.2,
    equation 2)."""

    kind: Literal["click"] = "click"
    content: tuple[Literal["text", "categories"], ...] = Field(("text", "categories"), min_length=1)
    layers: tuple[int, ...] = Field((64,), min_length=1)  # widths of f's hidden layers
    negatives: int = Field(4, ge=0, le=20)  # drawn for each item taken, in training and when asked
    # Kinds of event in the log that say an item was shown and not taken: noes too, and never read as taken.
    impressions: tuple[str, ...] = Field((), max_length=100)
    causal: bool = True  # as the parent was pre-trained: next item, causal; masked item, not
    cuts: int = Field(8, ge=1)  # of a sequence in a step, where not causal

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
RANKING_TASKS = ("masked_item", "next_item", "target_item")  # of items, for sequences


def ranks_items(task: TaskConfig) -> bool:
    """Whether a task's models score items: for sequences or baskets. Others tell something of a user, or of a pair."""
    if isinstance(task, MultiConfig):
        return "next_item" in task.tells
    return not isinstance(task, ProfileConfig | ClickConfig)


def looks_back_only(task: TaskConfig) -> bool:
    """Whether a position never reads what stands behind it."""
    return task.kind in ("next_item", "multi") or bool(getattr(task, "causal", False))


def reads_baskets(task: TaskConfig) -> bool:
    """Whether a task reads the table `baskets` in the place of `sequences`."""
    return task.kind in ("next_basket", "basket_pair")


def scores_all(task: TaskConfig) -> bool:
    """Whether a step scores the whole catalogue."""
    if isinstance(task, ProfileConfig | ClickConfig):
        return False
    return task.loss.kind == "full" and not (isinstance(task, MultiConfig) and "next_item" not in task.tells)
