"""The cards of an experiment on protocols: what is trained under each, and what others published under it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from etl.config import EtlConfig, SplitConfig
from etl.settings import FileName, Place, Section
from trainer.config import BaselinesConfig, EvaluationConfig, PretrainConfig, TrackingConfig


class PublishedFigure(Section):
    """A figure of others, as its source has it; nothing of it is checked here."""

    model: str
    ndcg: float | None = Field(None, ge=0, le=1)  # NDCG@10
    recall: float | None = Field(None, ge=0, le=1)  # Recall@10; of one held-out item: HR@10
    source: str


class CardPlan(Section):
    """One protocol card: what is held out, in which order, and whether the recipe reads the request's time."""

    heading: str
    split: str
    request_time: Literal["unknown", "known"] = "unknown"
    # Of a split without a validation part: as many epochs as this card's recipe took to its best one, mean over seeds.
    epochs_of: str | None = None
    published: tuple[PublishedFigure, ...] = ()


class ProtocolsConfig(Section):
    """The recipe, and the cards. Lake, split, seed, names and folders of the recipe are set here."""

    name: FileName = "protocols"
    runs: str = "runs"  # folder: <runs>/<name>
    etl: EtlConfig | None = None  # makes the tables; or, in its place:
    lake: Place | None = None  # … a lake that is there
    release: int | None = None  # of that lake; None: the newest
    label: str = "ours"  # of the recipe's rows
    recipe: PretrainConfig
    timed: PretrainConfig | None = None  # the recipe where the request's time is known; None: not available
    cards: dict[str, CardPlan] = Field(min_length=1)
    only: tuple[str, ...] = ()  # the cards to run; (): all
    seeds: tuple[int, ...] = Field((0, 1), min_length=1)
    evaluation: EvaluationConfig = EvaluationConfig(protocols=("full",))
    baselines: BaselinesConfig = BaselinesConfig()
    jobs: int | None = Field(None, ge=1, le=4_096)  # trainings side by side; None: one a core, on a GPU one
    tracking: TrackingConfig = TrackingConfig()

    @property
    def folder(self) -> Path:
        return Path(self.runs) / self.name

    @property
    def shown(self) -> dict[str, CardPlan]:
        """The cards that are run, by name."""
        return {name: card for name, card in self.cards.items() if not self.only or name in self.only}

    @model_validator(mode="after")
    def _cards_can_be_run(self) -> "ProtocolsConfig":
        if (self.etl is None) == (self.lake is None):
            raise ValueError("expected one of etl, which makes tables, and lake, where there are some")
        if unknown := set(self.only) - self.cards.keys():
            raise ValueError(f"only: expected some of {', '.join(self.cards)}, found {min(unknown)}; mend the name")
        if self.etl is not None and (mistake := self.mistake({split.name: split for split in self.etl.splits})):
            raise ValueError(mistake)
        return self

    def mistake(self, splits: Mapping[str, SplitConfig]) -> str:
        """Why these splits don't suffice for the cards; "" where they do."""
        for name, card in self.cards.items():
            if card.split not in splits:
                return (
                    f"cards.{name}.split: expected one of etl.splits ({', '.join(splits)}), found {card.split}; mend it"
                )
            if card.epochs_of is None:
                continue
            other = self.cards.get(card.epochs_of)
            if other is None or other.epochs_of is not None or not splits[other.split].has_validation:
                return (
                    f"cards.{name}.epochs_of: expected a card whose split has a validation part, found "
                    f"{card.epochs_of}; name another one"
                )
            if splits[card.split].has_validation:
                return (
                    f"cards.{name}.epochs_of: expected none, since split {card.split} has a validation part; leave it "
                    "out"
                )
        return ""
