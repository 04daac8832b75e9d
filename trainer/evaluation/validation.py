"""How a training run is measured after each epoch, on users of the validation part."""

from trainer.config import PretrainConfig
from trainer.data.catalogue import Catalogue
from trainer.data.release import Release
from trainer.evaluation.evaluator import Validation
from trainer.evaluation.evaluators import evaluators_of
from trainer.inference.scorer import ModelScorer
from trainer.models import SequenceModel
from trainer.parallel.distributed import World
from trainer.tasks import Task


class Validator:
    """What the task's evaluators measure. Raises GraftrecError for data that can't be validated on."""

    def __init__(self, config: PretrainConfig, release: Release, catalogue: Catalogue, task: Task) -> None:
        validation = Validation(config, release, catalogue, task)
        self._task = task
        self._measures = [evaluator.measure(validation) for evaluator in evaluators_of(config.task)]

    @property
    def num_users(self) -> int:
        return self._measures[0].num_users

    def metrics(self, model: SequenceModel, world: World) -> dict[str, float]:
        """Mean metrics, `monitor` among them."""
        scorer = ModelScorer(model, self._task, device=world.device, among=self._measures[0].among)
        found: dict[str, float] = {}
        for measure in self._measures:
            found |= measure.metrics(scorer, world)
        return found
