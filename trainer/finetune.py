"""Train on a target domain, grafted on a pre-trained model by `transfer` (survey 4.3)."""

from collections.abc import Callable

from trainer.artifact import load_artifact
from trainer.config import FinetuneConfig
from trainer.loop import Progress
from trainer.pretrain import Result, fit, unjudged
from trainer.transfer import TransferError


def run(config: FinetuneConfig, *, judge: Callable[[Progress], None] = unjudged) -> Result:
    """The recipe `finetune`; `judge` as in `fit`. Raises GraftrecError."""
    if config.transfer == "none":
        return fit(config, parent=None, judge=judge)
    if config.parent is None:
        raise TransferError(f"transfer {config.transfer} needs a pre-trained model; set parent to its `model` folder")
    return fit(config, parent=load_artifact(config.parent), judge=judge)
