"""Settings of a search."""

import math
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from etl.settings import MAX_SECONDS, FileName, Section, Seed
from trainer.config.training import PretrainConfig, TrackingConfig
from trainer.config.transfer import FinetuneConfig, TransferName


class RangeConfig(Section):
    """Numbers from `low` to `high`, both included; whole numbers where both are written as such."""

    low: int | float
    high: int | float
    log: bool = False  # as many between 0.001 and 0.01 as between 0.01 and 0.1

    @model_validator(mode="after")
    def _is_a_range(self) -> "RangeConfig":
        if not self.low < self.high:
            raise ValueError(f"expected low < high, found {self.low} and {self.high}")
        if self.log and self.low <= 0:
            raise ValueError(f"expected low > 0 of a logarithmic range, found {self.low}")
        return self


Choice = bool | int | float | str


class PrunerConfig(Section):
    """When a trial is given up: where its best validation score so far is below the median of those that earlier trials
    had at the same epoch (`median`), or by Hyperband's brackets (Li et al. 2018)."""

    kind: Literal["median", "hyperband", "none"] = "median"
    full_trials: int = Field(4, ge=1)  # of median: so many are trained to their end before any is given up
    warmup_epochs: int = Field(10, ge=1)  # no trial is given up before; until the tenth all look alike
    reduction: int = Field(3, ge=2)  # of hyperband: one in so many goes on from each rung


# What decides what a score means, or where a run lies, and so is not for a search to choose.
_FIXED = (
    "name",
    "output",
    "parent",
    "transfer",
    "runtime",
    "tracking",
    "evaluation",
    "data.lake",
    "data.release",
    "data.split",
    "data.domain",
    "data.predicted",
    "data.ranked",
    "train.seed",
    "train.validation_users",
)


class SearchConfig(Section):
    """Search the settings of one recipe, `pretrain` or `finetune`, for the best validation score.

    Of `finetune` each of `transfers` is searched by itself, from-scratch and transfer alike: in the same space, with
    the same budget, in turns.
    """

    name: FileName = "search"
    output: str = "runs"  # the search's folder is <output>/<name>
    pretrain: PretrainConfig | None = None  # one of these two: the settings that are not searched, and the first trial
    finetune: FinetuneConfig | None = None
    transfers: tuple[TransferName, ...] = ()  # (): finetune's own
    # setting (train.learning_rate) -> a range, or a list of values; a section's are YAML files, or names in conf/
    space: dict[str, RangeConfig | tuple[Choice, ...]]
    trials: int | None = Field(20, ge=1, le=1_000_000)  # of each transfer, those given up or failed counted
    seconds: float | None = Field(
        None, gt=0, le=MAX_SECONDS
    )  # of each transfer's training; a trial under way is finished
    seed: Seed = 0
    random_trials: int = Field(6, ge=1)  # drawn at random, before earlier ones say where to look
    pruner: PrunerConfig = PrunerConfig()
    tracking: TrackingConfig = TrackingConfig()

    @field_validator("space")
    @classmethod
    def _space_is_sound(cls, space: dict[str, RangeConfig | tuple[Choice, ...]]) -> dict[str, Any]:
        if not space:
            raise ValueError("expected at least one setting to search, found none")
        for key, values in space.items():
            if fixed := next(
                (name for name in _FIXED if f"{key}.".startswith(f"{name}.") or name.startswith(f"{key}.")), None
            ):
                raise ValueError(f"{key}: {fixed} can't be searched, scores would not be comparable; remove it")
            if isinstance(values, tuple) and not values:
                raise ValueError(f"{key}: expected values to choose from, found an empty list")
        return {key: _numbers(values) for key, values in space.items()}

    @model_validator(mode="after")
    def _one_recipe_and_a_budget(self) -> "SearchConfig":
        if (self.pretrain is None) == (self.finetune is None):
            raise ValueError(
                "expected one of the sections pretrain and finetune: the recipe whose settings are searched"
            )
        if self.pretrain is not None and self.transfers:
            raise ValueError("transfers are of the recipe finetune; remove them, or search finetune")
        if len(set(self.transfers)) < len(self.transfers):
            raise ValueError(f"expected each of transfers once, found {', '.join(self.transfers)}")
        if self.trials is None and self.seconds is None:
            raise ValueError("expected a budget: set trials, seconds, or both")
        return self


def _numbers(values: RangeConfig | tuple[Choice, ...]) -> RangeConfig | tuple[Choice, ...]:
    """YAML takes 1e-3 for a text: numbers among the values, as numbers."""
    return values if isinstance(values, RangeConfig) else tuple(map(_number, values))


def _number(value: Choice) -> Choice:
    try:
        number = float(value) if isinstance(value, str) else value
    except ValueError:
        return value
    if isinstance(number, float) and not math.isfinite(number):
        raise ValueError(f"expected finite numbers, found {value}; remove it")
    return number
