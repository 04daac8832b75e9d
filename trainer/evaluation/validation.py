"""How a training run is measured after each epoch, on users of the validation part.

A split without a validation part (`validation: 0`: trained on all but what is tested) measures nothing: all epochs are
trained, and the last one's weights are kept.
"""

from trainer.config import PretrainConfig
from trainer.data.baskets import DATASETS
from trainer.data.catalogue import Catalogue
from trainer.data.release import Release
from trainer.evaluation.evaluator import Validation
from trainer.evaluation.evaluators import evaluators_of
from trainer.inference.scorer import ModelScorer
from trainer.models import SequenceModel
from trainer.parallel.distributed import World
from trainer.tasks import Task


def has_validation(config: PretrainConfig, release: Release) -> bool:
    """Whether a run has a validation part, as far as its split's rule says."""
    return not DATASETS[config.task.needs.table].by_number or release.has_validation(config.data.split)


class Validator:
    """What the task's evaluators measure. Raises GraftrecError for data that can't be validated on."""

    def __init__(self, config: PretrainConfig, release: Release, catalogue: Catalogue, task: Task) -> None:
        validation = Validation(config, release, catalogue, task)
        self._task = task
        self.measures_nothing = not has_validation(config, release)
        kinds = [] if self.measures_nothing else evaluators_of(config.task)
        self._measures = [evaluator.measure(validation) for evaluator in kinds]

    @property
    def num_users(self) -> int:
        return self._measures[0].num_users if self._measures else 0

    def metrics(self, model: SequenceModel, world: World) -> dict[str, float]:
        """Mean metrics, `monitor` among them; none where nothing is measured."""
        if self.measures_nothing:
            return {}
        scorer = ModelScorer(model, self._task, device=world.device, among=self._measures[0].among)
        found: dict[str, float] = {}
        for measure in self._measures:
            found |= measure.metrics(scorer, world)
        return found
