"""A registered version beside what it must not fall behind, all on the same examples: what the gate is shown.

Whatever a task predicts, the gate sees one number of each user: a metric of the task's leading evaluator.

Shape letters: ``S`` seeds, ``U`` users, ``C`` users of a slice.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from etl.settings import replaced
from trainer.config import EvaluateConfig, GateConfig, PretrainConfig, PromoteConfig
from trainer.data.held_out import FULL
from trainer.data.release import Release
from trainer.evaluation.class_metrics import signed
from trainer.evaluation.comparison import Results, in_order
from trainer.evaluation.evaluator import Evaluator, Question
from trainer.evaluation.evaluators import evaluator_of
from trainer.evaluation.gate import FROM_SCRATCH, Evidence, GateError, Slice, check_must_beat
from trainer.evaluation.item_prediction import ItemPrediction
from trainer.evaluation.ranking_metrics import FloatArray
from trainer.inference.model_folder import TrainedModel
from trainer.registry import CHAMPION

VERSION, SCRATCH = "candidate", FROM_SCRATCH  # labels, beside the registry's champion
SCRATCH_TRANSFER = "none"
Named = Sequence[tuple[str, TrainedModel]]  # labels and models; the version itself first


class GateEvidence:
    """A version, its replicas, from-scratch and the simple baselines, evaluated. `event_types`: those that the
    champion, who may be scored later, reads. Raises GraftrecError."""

    def __init__(self, models: Named, event_types: Sequence[str], config: PromoteConfig, release: Release) -> None:
        first, self.release, self.part = models[0][1], release, config.part
        self.transferred = was_transferred(first.config, first.parent)
        self.evaluator = _evaluator(models, event_types, config, release)
        self.split, self.domain, self.table = self.evaluator.split, self.evaluator.domain, first.config.task.needs.table
        self._across, self._models = config.across, models
        self.evaluator.check_cards([model for _, model in models], across=config.across)
        scorers = [self.evaluator.scorer(model, label=label) for label, model in models]
        if config.gate.must_beat:
            baselines = self.evaluator.baselines(config.baselines)
            check_must_beat(config.gate, [scorer.label for scorer in baselines])
            scorers += baselines
        self.results = self.evaluator.predict(scorers)
        self.num_users, self.faults = self.results.num_users, self.results.faults()

    def champion(self, model: TrainedModel) -> Results:
        """The champion on the same examples, whatever it was trained on. Raises GraftrecError, also where its protocol
        card is another one."""
        self.evaluator.check_cards([self._models[0][1], model], across=self._across)
        return self.evaluator.predict([self.evaluator.scorer(model, label=CHAMPION, must_know=False)])

    def evidence(self, champion: Results | None, gate: GateConfig) -> Evidence:
        """What the gate is shown: the first seed of the version's label is the version itself."""
        return evidence_of(self.results, champion, gate, transferred=self.transferred)

    @property
    def cards(self) -> list[dict[str, Any]]:
        """Under which the version was measured, one a protocol."""
        _, model = self._models[0]
        own = self.evaluator.card_of_model(model.config, model.lake, model.release)
        return self.evaluator.cards({VERSION: own}, self.results)

    def means(self) -> dict[str, dict[str, float]]:
        """The version's own numbers, by protocol, or by what is predicted."""
        return self.results.means(next(key for key in self.results.scorers if key[0] == VERSION))


def _evaluator(models: Named, event_types: Sequence[str], config: PromoteConfig, release: Release) -> Evaluator:
    """The one that has the gate's metric."""
    task, gate = models[0][1].config.task, config.gate
    protocols = (*config.evaluation.protocols, gate.protocol)
    settings = EvaluateConfig(
        split=config.split,
        domain=config.domain,
        part=config.part,
        evaluation=replaced(config.evaluation, protocols=tuple(dict.fromkeys(protocols))),
        baselines=config.baselines,
        runtime=config.runtime,
    )
    found = evaluator_of(task).read(Question(settings, [model for _, model in models], release, event_types))
    chosen = next((one for one in found if one.name == gate.metric.partition("/")[0]), found[-1])
    if isinstance(chosen, ItemPrediction) and gate.protocol not in chosen.examples.held_out.protocols:
        raise GateError(
            f"gate.protocol: expected {FULL} where what users have had is ranked too (evaluation.repeats), found "
            f"{gate.protocol!r}; set it to {FULL}"
        )
    return chosen


def was_transferred(config: PretrainConfig, parent: str | None) -> bool:
    """Whether a model started from a parent. If not, the gate doesn't require from-scratch models beside it."""
    return parent is not None or getattr(config, "transfer", SCRATCH_TRANSFER) != SCRATCH_TRANSFER


def evidence_of(results: Results, champion: Results | None, gate: GateConfig, *, transferred: bool = True) -> Evidence:
    """Of users of whom the metric says something; of others it says nothing whatever a model gives."""
    protocol, metric = results.place_of(gate.protocol, gate.metric)

    def matrix(found: Results, label: str, seeds: Sequence[int | None]) -> FloatArray:
        return signed(found.matrix(label, protocol, metric, seeds=seeds), metric)

    first = results.seeds(VERSION)[:1]
    seeds, scratch_seeds = in_order(results.seeds(VERSION)), in_order(results.seeds(SCRATCH))
    version_U = matrix(results, VERSION, first)[0]
    known = ~np.isnan(version_U)
    scratch_SU = matrix(results, SCRATCH, scratch_seeds) if scratch_seeds else None
    champion_U = matrix(champion, CHAMPION, champion.seeds(CHAMPION))[0] if champion else None
    beside, label = (champion, CHAMPION) if champion else (results, SCRATCH)
    slices = []
    if champion or scratch_seeds:
        cold_U = results.training_items <= gate.cold_user_items
        beside_U = matrix(beside, label, beside.seeds(label)).mean(0)
        slices.append(Slice("cold users", version_U[cold_U], beside_U[cold_U], label))
        slices += _few_events(results, beside, label, gate, "cold items", (0, 0))
        slices += _few_events(results, beside, label, gate, "rare items", (1, gate.rare_item_interactions))
    return Evidence(
        version_U=version_U[known],
        version_seed=first[0],
        recipe_SU=matrix(results, VERSION, seeds)[:, known],
        recipe_seeds=seeds,
        scratch_SU=None if scratch_SU is None else scratch_SU[:, known],
        scratch_seeds=scratch_seeds,
        champion_U=None if champion_U is None else champion_U[known],
        baselines={
            name: matrix(results, name, [None])[0][known] for name in results.labels if not results.is_model(name)
        },
        slices=slices,
        transferred=transferred,
    )


def _few_events(
    results: Results, beside: Results, label: str, gate: GateConfig, name: str, events: tuple[int, int]
) -> list[Slice]:
    """Held-out items with that many training interactions, where items are ranked: at least, at most."""

    def values(found: Results, key: tuple[str, int | None]) -> FloatArray | None:
        least, most = events
        return found.on_rare_items(key, gate.protocol, gate.metric, at_least=least, at_most=most)

    version_C = values(results, (VERSION, results.seeds(VERSION)[0]))
    others = [values_C for seed in beside.seeds(label) if (values_C := values(beside, (label, seed))) is not None]
    if version_C is None:
        return []
    known_C = ~np.isnan(version_C)  # the protocol may rank none of a user's
    return [Slice(name, version_C[known_C], np.stack(others).mean(0)[known_C], label)]
