"""A registered version beside what it must not fall behind, all asked the same questions: what the gate is shown.

Models that rank are compared by what users held out; models that tell something of users, or of pairs of a user and an
item, by what is told (`trainer.evaluation.predictions`). Either way the gate sees one number of each user.

Shape letters: ``S`` seeds, ``U`` users, ``R`` held-out items of a user.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Generic, TypeVar

import numpy as np

from etl.settings import replaced
from trainer.config import (
    ClickConfig,
    EvaluateConfig,
    EvaluatedModel,
    EvaluationConfig,
    GateConfig,
    MultiConfig,
    PretrainConfig,
    PromoteConfig,
    ranks_items,
    reads_baskets,
)
from trainer.data.release import Release
from trainer.evaluation import click_table, next_event_table, profile_table
from trainer.evaluation.baselines import next_basket
from trainer.evaluation.class_metrics import LOG_LOSS
from trainer.evaluation.comparison import Evaluation, evaluate_scorers, in_order
from trainer.evaluation.gate import FROM_SCRATCH, Evidence, Slice, check_must_beat
from trainer.evaluation.item_ranking import SINGLE, convention_of
from trainer.evaluation.predictions import Predictions
from trainer.evaluation.ranking_metrics import FloatArray, means
from trainer.evaluation.scorers import baseline_scorers, model_scorer, read_evaluation_set, repeats_of
from trainer.inference.model_folder import TrainedModel
from trainer.parallel.distributed import join
from trainer.registry import CHAMPION

VERSION, SCRATCH = "candidate", FROM_SCRATCH  # labels, beside the registry's champion
SCRATCH_TRANSFER = "none"
Named = Sequence[tuple[str, TrainedModel]]  # labels and models; the version itself first
Scored = TypeVar("Scored")  # what the champion said, asked the same


class GateEvidence(ABC, Generic[Scored]):
    """A version, its replicas, from-scratch and the simple baselines."""

    release: Release
    split: str
    domain: str
    part: str
    num_users: int
    faults: list[str]  # why numbers can't be trusted
    transferred: bool  # whether the version started from a parent

    @abstractmethod
    def champion(self, trained_model: TrainedModel) -> Scored:
        """The champion on the same questions, whatever it was trained on. Raises GraftrecError."""

    @abstractmethod
    def evidence(self, champion: Scored | None, gate: GateConfig) -> Evidence:
        """What the gate is shown: the first seed of the version's label is the version itself."""

    @abstractmethod
    def means(self) -> dict[str, dict[str, float]]:
        """The version's own numbers, by protocol, or by what is told."""


def judged(models: Named, kinds: Sequence[str], config: PromoteConfig, release: Release) -> GateEvidence[Any]:
    """Ask all of `models`. `kinds`: those of events that the champion, who may be asked later, reads. Raises
    GraftrecError."""
    if ranks_items(models[0][1].config.task):
        return Ranked(models, kinds, config, release)
    return EvidenceOfPredictions(models, config, release)


class Ranked(GateEvidence[Evaluation]):
    """Held-out items, or next baskets, ranked."""

    def __init__(self, models: Named, kinds: Sequence[str], config: PromoteConfig, release: Release) -> None:
        self.config, self.release, self.part = config, release, config.part
        first = models[0][1]
        self.transferred = was_transferred(first.config, first.parent)
        own, baskets = first.config.data, reads_baskets(first.config.task)
        self.split, self.domain = config.split or own.split, config.domain or own.answered
        self.examples = read_evaluation_set(
            release,
            self.split,
            self.domain,
            config.part,
            _evaluation(config, models),
            baskets=baskets,
            event_types=list(dict.fromkeys([*first.event_types, *kinds])),
        )
        self.num_users = len(self.examples.users)
        device = str(join(config.runtime).device)
        scorers = [model_scorer(model, self.examples, label=label, device=device) for label, model in models]
        if config.gate.must_beat:
            simple = next_basket.baseline_scorers if self.examples.baskets else baseline_scorers
            found = simple(self.examples, config.baselines)
            check_must_beat(config.gate, [scorer.label for scorer in found])
            scorers += found
        self.evaluation = evaluate_scorers(
            scorers, self.examples, batch_size=config.evaluation.batch_size, progress=config.runtime.progress
        )
        self.faults = [
            f"{count:,} scores of {label}, seed {seed}, are not numbers"
            for (label, seed), count in self.evaluation.broken.items()
            if count
        ]

    def champion(self, trained_model: TrainedModel) -> Evaluation:
        device = str(join(self.config.runtime).device)
        scorer = model_scorer(trained_model, self.examples, label=CHAMPION, device=device, must_know=False)
        return evaluate_scorers([scorer], self.examples, batch_size=self.config.evaluation.batch_size)

    def evidence(self, champion: Evaluation | None, gate: GateConfig) -> Evidence:
        return evidence_of(self.evaluation, champion, gate, transferred=self.transferred)

    def means(self) -> dict[str, dict[str, float]]:
        key = next(key for key in self.evaluation.scorers if key[0] == VERSION)
        return {
            protocol: means(self.evaluation.metrics(key, protocol)) for protocol in self.examples.held_out.protocols
        }


def was_transferred(config: PretrainConfig, parent: str | None) -> bool:
    """Whether a model started from a parent. If not, the gate doesn't require from-scratch models beside it."""
    return parent is not None or getattr(config, "transfer", SCRATCH_TRANSFER) != SCRATCH_TRANSFER


def _evaluation(config: PromoteConfig, models: Named) -> EvaluationConfig:
    """With the gate's protocol (next baskets are ranked in full only), and candidates as the models were trained."""
    baskets = reads_baskets(models[0][1].config.task)
    examples = [config.gate.protocol] if baskets else [*config.evaluation.protocols, config.gate.protocol]
    repeats = repeats_of(config.evaluation, [model for _, model in models])
    return replaced(config.evaluation, protocols=tuple(dict.fromkeys(examples)), repeats=repeats)


def evidence_of(
    evaluation: Evaluation, champion: Evaluation | None, gate: GateConfig, *, transferred: bool = True
) -> Evidence:
    """Of rankings."""
    first = evaluation.seeds(VERSION)[0]
    seeds, scratch_seeds = in_order(evaluation.seeds(VERSION)), in_order(evaluation.seeds(SCRATCH))

    def matrix(label: str, seeds: Sequence[int | None]) -> FloatArray:
        return evaluation.matrix(label, gate.protocol, gate.metric, seeds=seeds)

    return Evidence(
        version_U=matrix(VERSION, [first])[0],
        version_seed=first,
        recipe_SU=matrix(VERSION, seeds),
        recipe_seeds=seeds,
        scratch_SU=matrix(SCRATCH, scratch_seeds) if scratch_seeds else None,
        scratch_seeds=scratch_seeds,
        champion_U=champion.matrix(CHAMPION, gate.protocol, gate.metric)[0] if champion else None,
        baselines={label: matrix(label, [None])[0] for label in evaluation.labels if not evaluation.is_model(label)},
        slices=_slices(evaluation, champion, gate) if champion or scratch_seeds else (),
        transferred=transferred,
    )


def _slices(evaluation: Evaluation, champion: Evaluation | None, gate: GateConfig) -> list[Slice]:
    """Cold users: all that they hold out. Cold items: each ranked alone, in the convention `single`."""
    examples = evaluation.examples
    beside, label, name = (champion, CHAMPION, CHAMPION) if champion else (evaluation, SCRATCH, SCRATCH)
    cold_U = examples.held_out.training_items <= gate.cold_user_items
    targets_UR = examples.held_out.targets
    cold_UR = (targets_UR >= 0) & (examples.training_interactions[targets_UR] <= gate.cold_item_interactions)
    alone = SINGLE + convention_of(gate.metric)[1].replace("HR@", "Recall@").replace("F1@", "Recall@")
    first = evaluation.seeds(VERSION)[:1]
    with_cold_U = cold_UR.any(1)

    def pair(metric: str, users: Any, only: Any = None) -> tuple[FloatArray, FloatArray]:
        version = evaluation.matrix(VERSION, gate.protocol, metric, seeds=first, only_UR=only)[0]
        return version[users], beside.matrix(label, gate.protocol, metric, only_UR=only).mean(0)[users]

    return [
        Slice("cold users", *pair(gate.metric, cold_U), name),
        Slice("cold items", *pair(alone, with_cold_U, cold_UR), name),
    ]


class EvidenceOfPredictions(GateEvidence[Predictions]):
    """What users are, what they do next, what they click: told."""

    def __init__(self, models: Named, config: PromoteConfig, release: Release) -> None:
        self.config, self.release, self.part, self._models = config, release, config.part, models
        self.transferred = was_transferred(models[0][1].config, models[0][1].parent)
        self._told = self._ask(models, baselines=bool(config.gate.must_beat))
        self.split, self.domain = self._told.split, self._told.domain
        self.num_users = len(self._told.histories)
        self.faults = [
            f"{int((~np.isfinite(given)).sum()):,} probabilities of {label}, seed {seed}, are not numbers"
            for (label, seed), given in self._told.probabilities.items()
            if not np.isfinite(given).all()
        ]

    def champion(self, trained_model: TrainedModel) -> Predictions:
        return self._ask([self._models[0], (CHAMPION, trained_model)], baselines=False)

    def evidence(self, champion: Predictions | None, gate: GateConfig) -> Evidence:
        predictions, metric = self._told, gate.metric.rpartition("/")[2]

        def of_label(predictions: Predictions, label: str, seeds: Sequence[int | None]) -> FloatArray:
            found = np.stack([predictions.of_users((label, seed), metric) for seed in seeds])
            return -found if metric == LOG_LOSS else found

        first = predictions.seeds(VERSION)[0]
        seeds, scratch_seeds = in_order(predictions.seeds(VERSION)), in_order(predictions.seeds(SCRATCH))
        version_U = of_label(predictions, VERSION, [first])[0]
        scratch_SU = of_label(predictions, SCRATCH, scratch_seeds) if scratch_seeds else None
        champion_U = of_label(champion, CHAMPION, champion.seeds(CHAMPION))[0] if champion else None
        known = ~np.isnan(version_U)  # what can't be said of a user, it can't of any model's answer
        cold_U = predictions.histories.lengths <= gate.cold_user_items
        beside_U, name = (champion_U, CHAMPION) if champion_U is not None else (None, SCRATCH)
        if beside_U is None and scratch_SU is not None:
            beside_U = scratch_SU.mean(0)
        return Evidence(
            version_U=version_U[known],
            version_seed=first,
            recipe_SU=of_label(predictions, VERSION, seeds)[:, known],
            recipe_seeds=seeds,
            scratch_SU=None if scratch_SU is None else scratch_SU[:, known],
            scratch_seeds=scratch_seeds,
            champion_U=None if champion_U is None else champion_U[known],
            baselines={
                label: of_label(predictions, label, [None])[0][known]
                for label in predictions.labels
                if predictions.seeds(label) == [None]
            },
            slices=[] if beside_U is None else [Slice("cold users", version_U[cold_U], beside_U[cold_U], name)],
            transferred=self.transferred,
        )

    def means(self) -> dict[str, dict[str, float]]:
        key = next(key for key in self._told.probabilities if key[0] == VERSION)
        return {self._models[0][1].config.task.kind: self._told.metrics(key)}

    def _ask(self, models: Named, *, baselines: bool) -> Predictions:
        config, task = self.config, models[0][1].config.task
        examples = EvaluateConfig(
            split=config.split,
            domain=config.domain,
            part=config.part,
            evaluation=config.evaluation,
            baselines=replaced(config.baselines, enabled=baselines),
            runtime=config.runtime,
        )
        chosen = [EvaluatedModel(model=str(model.folder), label=label) for label, model in models]
        artifacts = [model for _, model in models]
        if isinstance(task, MultiConfig):
            several = next_event_table.tell(examples, chosen, artifacts, self.release)
            return next(
                predictions for predictions in several if predictions.name == config.gate.metric.partition("/")[0]
            )
        if isinstance(task, ClickConfig):
            return click_table.tell(examples, chosen, artifacts, self.release)
        return profile_table.tell(examples, chosen, artifacts, self.release)
