"""Train on a target domain, initialised from a pre-trained model by `transfer` (survey 4.3)."""

import os
from collections.abc import Callable

from etl.plain_path import absolute
from trainer.config import FinetuneConfig
from trainer.data.release import pin
from trainer.inference.model_folder import TrainedModel, load_model
from trainer.recipes.pretrain import fit, unjudged
from trainer.recipes.run_result import Result
from trainer.training.empty_transfer import ADVICE, empty_by_data, empty_by_settings
from trainer.training.loop import Progress
from trainer.training.transfer import TransferError


def run(config: FinetuneConfig, *, judge: Callable[[Progress], None] = unjudged) -> Result:
    """The recipe `finetune`; `judge` as in `fit`. Raises GraftrecError."""
    if config.transfer == "none":
        return fit(config, parent=None, judge=judge)
    if config.parent is None:
        raise TransferError(f"transfer {config.transfer} needs a pre-trained model; set parent to its `model` folder")
    parent = load_model(config.parent)
    refuse_empty(config, parent)
    if os.environ.get("RANK", "0") == "0" and (note := seen_by_parent(config, parent)):
        print(note, flush=True)
    return fit(config, parent=parent, judge=judge)


def refuse_empty(config: FinetuneConfig, parent: TrainedModel) -> None:
    """Raises TransferError where the transfer would copy nothing. For a parent from another lake only settings are
    checked."""
    reason = empty_by_settings(config)
    if not reason and config.transfer == "shallow" and config.data.lake == parent.lake:
        reason = empty_by_data(config, pin(config.data.lake, config.data.release), parent.config.data.domain)
    if reason:
        raise TransferError(f"{reason}; {ADVICE}")


def seen_by_parent(config: FinetuneConfig, parent: TrainedModel) -> str:
    """A note if the parent was trained on the domain of the fine-tuning; "" if not."""
    own, seen = config.data, parent.config.data
    if absolute(own.lake) != parent.lake or own.domain != seen.domain:
        return ""
    note = (
        f"note: {config.name} fine-tunes on domain {own.domain}, on which its parent {parent.folder} was trained "
        f"already (release {parent.release}, split {seen.split})"
    )
    if own.split != seen.split:
        note += f"; what split {own.split} holds out may have been in its training, so scores may be too good"
    return note
