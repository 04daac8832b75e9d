"""The evaluators by the names that tasks give them."""

from trainer.config import TaskSettings
from trainer.evaluation.attribute_prediction import AttributePrediction
from trainer.evaluation.basket_prediction import BasketPrediction
from trainer.evaluation.click_prediction import ClickPrediction
from trainer.evaluation.evaluator import Evaluator
from trainer.evaluation.event_prediction import EventPrediction
from trainer.evaluation.item_prediction import ItemPrediction

EVALUATORS: dict[str, type[Evaluator]] = {
    "items": ItemPrediction,
    "baskets": BasketPrediction,
    "attributes": AttributePrediction,
    "events": EventPrediction,
    "clicks": ClickPrediction,
}


def evaluators_of(task: TaskSettings) -> list[type[Evaluator]]:
    """The leading one first."""
    return [EVALUATORS[name] for name in task.evaluators]


def evaluator_of(task: TaskSettings) -> type[Evaluator]:
    """The leading one: validation, search and gate go by it."""
    return EVALUATORS[task.evaluators[0]]


def monitor(task: TaskSettings) -> str:
    """The validation metric that early stopping, searches and the pipeline go by: larger is better."""
    return evaluator_of(task).metrics_of(task).monitor
