"""Models that predict a next basket: its items are ranked, and what a user has had may be had again."""

from collections.abc import Mapping, Sequence

import numpy as np

from trainer.config import BaselinesConfig, TaskSettings
from trainer.data.held_out import FULL
from trainer.evaluation.baselines import names, next_basket
from trainer.evaluation.evaluator import TaskMetrics
from trainer.evaluation.item_prediction import Evaluation, ItemPrediction
from trainer.evaluation.item_ranking import BASKET, SINGLE, metrics_of
from trainer.evaluation.scorers import EvaluateError, Scorer
from trainer.inference.model_folder import TrainedModel


class BasketEvaluation(Evaluation):
    """Ranks of the items of everyone's next basket."""

    prefixes = (SINGLE, BASKET)

    @property
    def conventions(self) -> Mapping[str, str]:
        return {"basket": BASKET}


class BasketPrediction(ItemPrediction):
    """The items of the next basket, ranked among all items: no negatives are drawn for baskets."""

    evaluation = BasketEvaluation
    protocols = (FULL,)

    @staticmethod
    def metrics_of(task: TaskSettings | None) -> TaskMetrics:
        per_user = tuple(metrics_of(np.ones((1, 1), np.int64), prefixes=BasketEvaluation.prefixes))
        table = tuple(f"{BASKET}{name}" for name in ("NDCG@10", "Recall@10", "F1@10", "HR@10"))
        return TaskMetrics("NDCG@10", per_user, table, names.OF_BASKETS)

    def scorer(
        self, model: TrainedModel, *, label: str | None = None, seed: int | None = None, must_know: bool = True
    ) -> Scorer:
        if (reads := model.config.data.domain) != self.domain:
            raise EvaluateError(
                f"expected a model that reads domain {self.domain!r}, whose next baskets are predicted, found "
                f"{model.folder}, which reads {reads!r}"
            )
        return super().scorer(model, label=label, seed=seed, must_know=must_know)

    def baselines(self, config: BaselinesConfig) -> Sequence[Scorer]:
        return next_basket.baseline_scorers(self.examples, config)
