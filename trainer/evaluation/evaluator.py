"""How models are evaluated: one class for each kind of prediction, used by every recipe in the same way."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from etl.settings import replaced
from trainer.config import BaselinesConfig, EvaluateConfig, NextItemConfig, PretrainConfig
from trainer.data.catalogue import Catalogue
from trainer.data.cold_items import COLD, WARM
from trainer.data.held_out import FULL, HeldOut, Part, ReadOptions, read_held_out
from trainer.data.release import DataError, Release, described
from trainer.evaluation.card import ProtocolCard, card_of, card_of_model, check_cards
from trainer.evaluation.comparison import Key, Results, by_key
from trainer.evaluation.outside import OutsideRanks
from trainer.evaluation.scorers import EvaluateError, Scorer
from trainer.inference.model_folder import TrainedModel
from trainer.inference.scorer import ModelScorer
from trainer.parallel.distributed import World

Output = Mapping[str, npt.NDArray[np.generic]]  # name -> array, so that it can be kept in a file


@dataclass(frozen=True)
class Validation:
    """The validation part of a training run."""

    config: PretrainConfig
    release: Release
    catalogue: Catalogue
    task: Any  # prepared

    @cached_property
    def held_out(self) -> HeldOut:
        """What the users who are validated hold out; times only where more is read than is predicted, or the model
        reads them."""
        data = self.config.data
        protocols: tuple[str, ...] = (FULL,)
        if (
            data.split in self.release.cold_items
        ):  # the first one is gone by: that of cold items, unless named otherwise
            protocols = tuple(p for p in self.config.evaluation.protocols if p in (COLD, WARM)) or (COLD, WARM)
        options = ReadOptions(
            protocols,
            table=self.config.task.needs.table,
            repeats=self.config.ranks_repeats,
            times=data.answered != data.domain or self.config.reads_times,
            values=self.config.task.reads_values,
            event_types=data.event_types,
            max_users=self.config.train.validation_users,
        )
        return read_held_out(self.release, data.split, data.domain, self.catalogue, "validation", options)


@dataclass(frozen=True)
class TaskMetrics:
    """Names of metrics and baselines, as settings and tables have them."""

    monitor: str  # of the validation part, that early stopping, searches and the pipeline go by: larger is better
    per_user: tuple[str, ...]  # that each user has, so that users can be paired: the gate's
    table: tuple[str, ...]  # that a table shows where no others are requested
    baselines: tuple[str, ...]  # all simple ones that can stand beside a model


@dataclass(frozen=True)
class Measure:
    """Measures a model while it is trained: mean metrics of `num_users` users. `among`: the only rows ranked, [V]."""

    num_users: int
    metrics: Callable[[ModelScorer, World], dict[str, float]]
    among: Tensor | None = None


@dataclass(frozen=True)
class Question:
    """What models are evaluated on: which release, and as configured. The first model decides what is left open."""

    config: EvaluateConfig
    models: Sequence[TrainedModel]
    release: Release
    event_types: Sequence[str] = ()  # that models evaluated later read

    @property
    def task(self) -> Any:
        return self.models[0].config.task if self.models else NextItemConfig()

    @property
    def split(self) -> str:
        return self.config.split or self.models[0].config.data.split

    @property
    def domain(self) -> str:
        """Whose items are ranked."""
        return self.config.domain or self.models[0].config.data.answered

    @property
    def read_domain(self) -> str:
        """Whose items are read."""
        return self.config.domain or self.models[0].config.data.domain


class Evaluator(ABC):
    """The same examples for every model, and what is measured on them."""

    config: EvaluateConfig
    release: Release
    split: str
    domain: str
    part: Part
    name = ""  # of what is predicted, where a task predicts several things
    protocols: tuple[str, ...] = ()  # the only ones that there are; (): any

    # --- what follows from a task

    @staticmethod
    @abstractmethod
    def metrics_of(task: Any) -> TaskMetrics:
        """What models of a task are measured by."""

    @staticmethod
    @abstractmethod
    def measure(validation: Validation) -> Measure:
        """Raises GraftrecError for data that can't be validated on."""

    # --- on examples

    @classmethod
    @abstractmethod
    def read(cls, question: Question) -> Sequence["Evaluator"]:
        """One for each thing that is predicted, the leading one last. Raises GraftrecError for models that can't be
        compared."""

    @abstractmethod
    def scorer(
        self, model: TrainedModel, *, label: str | None = None, seed: int | None = None, must_know: bool = True
    ) -> Scorer:
        """A model as a row of the table. Raises EvaluateError where it can't be scored. `must_know` False: it may know
        nothing of the examples."""

    @abstractmethod
    def baselines(self, config: BaselinesConfig) -> Sequence[Scorer]:
        """The simple baselines."""

    def outside(self, files: Sequence[OutsideRanks]) -> tuple[list[Scorer], list[str]]:
        """Other software's scores as rows of the table, and notes on them. Raises EvaluateError where no items are
        ranked."""
        raise EvaluateError(
            f"ranks: expected models that rank items beside {files[0].path}, found a task that predicts something "
            "else; evaluate them apart"
        )

    @abstractmethod
    def output(self, scorer: Scorer) -> Output:
        """What a scorer gives for the examples."""

    @abstractmethod
    def results(self, scorers: Mapping[Key, Scorer], outputs: Mapping[Key, Output]) -> Results:
        """Of scorers and their outputs."""

    # --- under which rules

    @property
    @abstractmethod
    def table(self) -> str:
        """The table of the users' events."""

    @property
    def ranks_repeats(self) -> bool | None:
        """Whether what a user has had is ranked too; None: nothing is ranked."""
        return None

    @cached_property
    def card(self) -> ProtocolCard:
        """Of models that are trained on this split, and of baselines; under the first protocol."""
        return card_of(
            self.release,
            split=self.split,
            domain=self.domain,
            part=self.part,
            table=self.table,
            max_users=self.config.evaluation.max_users,
            repeats=self.ranks_repeats,
        )

    def card_of_model(self, config: PretrainConfig, lake: str, release: int) -> ProtocolCard:
        """`release` of `lake` says what it was trained on; where that is gone, this one."""
        own = self.release
        if (lake, release) != (own.lake, own.number):
            with suppress(DataError):
                own = described(lake, release)
        return card_of_model(self.card, config, own)

    def check_cards(self, models: Sequence[TrainedModel], *, across: Sequence[str] = ()) -> None:
        """Raises EvaluateError where models have different protocol cards, but for the fields `across`."""
        cards = [(str(model.folder), self.card_of_model(model.config, model.lake, model.release)) for model in models]
        check_cards(cards, allowed=across)

    def cards(self, of_label: Mapping[str, ProtocolCard], results: Results) -> list[dict[str, Any]]:
        """The cards of a table, a protocol's beside each other, as they are stored. `of_label`: the models'. Baselines,
        which read no time, have that of the first model."""
        first = next(iter(of_label.values()), self.card)
        known = {card.hash: card for card in (first, *of_label.values())}
        rows: dict[str, list[str]] = {}
        for label in results.labels:
            rows.setdefault(of_label.get(label, first).hash, []).append(label)
        return [
            replaced(known[digest], candidates=protocol).entry(labels)
            for protocol in results.protocols
            for digest, labels in rows.items()
        ]

    def predict(self, scorers: Sequence[Scorer]) -> Results:
        """Score the examples by all scorers. Raises EvaluateError for two of one label and seed."""
        named = by_key(scorers)
        return self.results(named, {key: self.output(scorer) for key, scorer in named.items()})
