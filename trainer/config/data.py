"""What a run reads: lake, release, split, domain."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, field_validator

from etl.settings import Place, Section

Widths = Annotated[tuple[Annotated[int, Field(ge=1, le=65_536)], ...], Field(max_length=100)]  # of layers

READS_ALL = "all-domains"  # label of a model that reads every domain, predicts one, and has no parent


def each_once(names: tuple[str, ...], what: str) -> tuple[str, ...]:
    if len(set(names)) < len(names):
        raise ValueError(f"expected each {what} once, found {', '.join(names)}")
    return names


class DataConfig(Section):
    """Which snapshot, and how it is read."""

    LATER: ClassVar = ("user_share",)

    lake: Place = "lake"
    release: int | None = None  # None: the newest complete one, pinned when the run starts
    split: str = "last-5"
    domain: str = "source"  # whose sequences are read; `all`: those of all domains together
    # Domain whose items are predicted: the loss is taken on them only, and among them only. None: all that are read.
    predicted: str | None = None
    ranked: str | None = None  # domain whose items validation ranks; None: those predicted
    block_rows: int = Field(65_536, ge=1)  # sequences decoded and shuffled together
    cache_bytes: int = Field(256 << 20, ge=0)  # decoded row groups are kept up to this size, others read each epoch
    unknown_users: float = Field(0.05, ge=0, lt=1)  # share of training sequences whose user is hidden
    window: Literal["last", "random"] = "random"  # which part of a sequence longer than the model is trained on
    # Kinds of event (view, purchase…) that are distinguished, for a model that reads or a task that predicts them; all
    # others are as one.
    event_types: tuple[str, ...] = Field((), max_length=100)
    # Share of users that training reads, the same ones for every seed, model and domain. The others are validated and
    # evaluated all the same.
    user_share: float = Field(1.0, gt=0, le=1)

    @field_validator("event_types")
    @classmethod
    def _event_types_differ(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        return each_once(names, "kind")

    @property
    def answered(self) -> str:
        """The domain whose items a model of this data predicts."""
        return self.ranked or self.predicted or self.domain


class TargetDataConfig(DataConfig):
    """As DataConfig, of the domain that is transferred to."""

    domain: str = "target"
