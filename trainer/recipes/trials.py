"""The arms of a search, each with the recipe that it varies and its trials in an SQLite file of Optuna's.

A trial is `done` (trained to its end), `pruned` or `failed`. Optuna gets `pruned` for the last two: its sampler then
avoids such values, while it would ignore failed trials.
"""

import hashlib
import json
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import optuna
import yaml
from optuna.trial import FrozenTrial, Trial, TrialState

from etl.plain_path import plain_path
from etl.settings import GraftrecError, RunAgain, load, replaced
from trainer.config import FinetuneConfig, PretrainConfig, PrunerConfig, RangeConfig, SearchConfig, with_transfer
from trainer.data.release import pin
from trainer.evaluation.validation import has_validation
from trainer.inference.model_folder import load_model
from trainer.recipes.run_result import run_identity

STORE = "study.db"
IDLE_TRIALS = 20  # so many in a row that needed no training (tried before, or refused): a small space is exhausted

Outcome = Literal["done", "pruned", "failed"]


class SearchError(GraftrecError):
    """A search that can't continue in its folder, or that found nothing."""


class SearchBusy(RunAgain, SearchError):
    """Another process holds the search's folder."""


@dataclass(frozen=True)
class Arm:
    """One recipe that is searched, and its trials so far."""

    name: str  # a transfer, or `pretrain`
    base: PretrainConfig  # the recipe as it is, its release pinned
    folder: Path  # of the search
    study: optuna.Study

    @property
    def file(self) -> Path:
        """The base, as YAML that trials override."""
        return self.folder / self.name / "base.yaml"

    @property
    def ended(self) -> list[FrozenTrial]:
        return self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))

    @property
    def done(self) -> list[FrozenTrial]:
        return self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))

    @property
    def under_way(self) -> list[FrozenTrial]:
        """The trial that an earlier process left open, if there is one."""
        return self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))

    @property
    def best(self) -> FrozenTrial | None:
        """The first of the best trials; None: there is none yet."""
        return max(self.done, key=score, default=None)

    def run_folder(self, number: int) -> Path:
        return self.folder / "trials" / f"{self.name}-{number:04}"

    def settings(self, values: Mapping[str, Any]) -> PretrainConfig:
        """The base with other values: a section that is chosen by name first, then the settings in it. Raises
        ConfigError where they don't go together."""
        ordered = sorted(values, key=lambda key: key.count("."))
        return load(type(self.base), self.file, [f"{key}={json.dumps(values[key])}" for key in ordered])

    def duplicate(self, values: Mapping[str, Any]) -> FrozenTrial | None:
        """An earlier trial with the same values, which would give the same model."""
        return next((trial for trial in self.done if trial.params == values), None)

    def is_over(self, config: SearchConfig) -> bool:
        """Whether the budget is used up, or there is nothing new to try; and no trial is open."""
        seconds = [trial.user_attrs["seconds"] for trial in self.ended]
        return not self.under_way and (
            (config.trials is not None and len(seconds) >= config.trials)
            or (config.seconds is not None and sum(seconds) >= config.seconds)
            or (len(seconds) >= IDLE_TRIALS and not any(seconds[-IDLE_TRIALS:]))
        )

    def end(
        self, trial: Trial, outcome: Outcome, value: float | None, *, reason: str, seconds: float, epochs: int
    ) -> None:
        """Record how a trial ended. Optuna's state comes last: without it the trial is resumed."""
        for name, attribute in (("outcome", outcome), ("reason", reason), ("seconds", seconds), ("epochs", epochs)):
            trial.set_user_attr(name, attribute)
        self.study.tell(trial, value, state=TrialState.COMPLETE if outcome == "done" else TrialState.PRUNED)
        self.tidy()

    def tidy(self) -> None:
        """Of trials that ended, keep the best one's model and the others' curves."""
        best = self.best
        for trial in self.ended:
            if best is None or trial.number != best.number:
                folder = self.run_folder(trial.number)
                left = folder / "model" if trial.state == TrialState.COMPLETE else folder
                shutil.rmtree(left, ignore_errors=True)

    def rows(self) -> list[dict[str, Any]]:
        """The trials that ended, as plain data."""
        return [
            {
                "arm": self.name,
                "trial": trial.number + 1,
                "score": trial.value if trial.state == TrialState.COMPLETE else None,
                "values": trial.params,
                "scores": [value for _, value in sorted(trial.intermediate_values.items())],  # of each epoch
            }
            | {name: trial.user_attrs[name] for name in ("outcome", "reason", "epochs", "seconds")}
            for trial in self.ended
        ]


def score(trial: FrozenTrial) -> float:
    """Its best validation score."""
    return -math.inf if trial.value is None else trial.value


# --- opening a search ---------------------------------------------


def open_arms(config: SearchConfig, folder: Path) -> list[Arm]:
    """The arms of a search, new or as an earlier process left them. Raises SearchError if they belong to another
    search."""
    folder.mkdir(parents=True, exist_ok=True)
    return [_open(config, folder, name, base) for name, base in recipes(config)]


def recipes(config: SearchConfig) -> Iterator[tuple[str, PretrainConfig]]:
    """Name and recipe of each arm: from-scratch has no parent, so that it doesn't change with one."""
    if config.pretrain is not None:
        yield "pretrain", config.pretrain
    elif config.finetune is not None:
        for transfer in config.transfers or (config.finetune.transfer,):
            parent = config.finetune.parent if transfer != "none" else None
            yield transfer, with_transfer(config.finetune, transfer, parent)


def _open(config: SearchConfig, folder: Path, name: str, base: PretrainConfig) -> Arm:
    for key in config.space:
        _check(key, base, config.space)
    study = optuna.create_study(
        storage=_storage(folder),
        study_name=name,
        direction="maximize",
        load_if_exists=True,
        pruner=_pruner(config.pruner, base.train.epochs),
    )
    release = pin(base.data.lake, base.data.release or study.user_attrs.get("release"))
    if not has_validation(base, release):
        raise SearchError(
            f"data.split: expected a split with a validation part, by which trials are compared, found "
            f"{base.data.split!r}, which has none; search on another one"
        )
    before = study.user_attrs.get("identity", {})
    identity = _identity(config, base, release.number)
    if before and (changed := [part for part in identity if identity[part] != before.get(part)]):
        raise SearchError(
            f"{folder} holds a search of {name} with other {' and '.join(changed)}, whose trials don't compare; set "
            "another name, or remove that folder"
        )
    study.set_user_attr("release", release.number)
    study.set_user_attr("identity", identity)
    pinned = replaced(base, data=replaced(base.data, release=release.number))
    arm = Arm(name, pinned, folder, study)
    write(arm.file, as_yaml(pinned))
    if not study.get_trials(deepcopy=False):
        own = {key: _at(base, key) for key in config.space}
        study.enqueue_trial({key: value for key, value in own.items() if _admits(config.space[key], value)})
    arm.tidy()
    return arm


def _identity(config: SearchConfig, base: PretrainConfig, release: int) -> dict[str, str]:
    """Settings that must not change for trials to be comparable: all but the budget, and where and how the search
    runs."""
    parent = None
    if isinstance(base, FinetuneConfig) and base.transfer != "none":
        if base.parent is None:
            raise SearchError(
                f"transfer {base.transfer} needs a pre-trained model; set finetune.parent to its `model` folder"
            )
        parent = load_model(base.parent)
    # The release's number and the parent's folder may change while what is in them stays.
    bare = replaced(base, name="", output="", data=replaced(base.data, release=None))
    if isinstance(bare, FinetuneConfig):
        bare = replaced(bare, parent=None)
    searched = json.dumps(config.model_dump(mode="json", include=_PROPOSING), sort_keys=True)
    identity = run_identity(bare, pin(base.data.lake, release), parent)
    return identity | {"search": hashlib.sha256(searched.encode()).hexdigest()[:16]}


_PROPOSING = {"space", "seed", "random_trials", "pruner"}  # settings of a search that decide the next trial


def _storage(folder: Path) -> optuna.storages.RDBStorage:
    """The search's SQLite file. It gets its name when its tables are there: a kill must not leave half of them."""
    place, new = folder / STORE, folder / f"{STORE}.new"
    if not place.exists():
        for leftover in folder.glob(f"{new.name}*"):
            leftover.unlink()
        made = optuna.storages.RDBStorage(f"sqlite:///{plain_path(folder)}/{new.name}")
        made.remove_session()
        made.engine.dispose()
        new.rename(place)
    return optuna.storages.RDBStorage(f"sqlite:///{plain_path(folder)}/{place.name}")


def _pruner(config: PrunerConfig, epochs: int) -> optuna.pruners.BasePruner:
    """Steps are epochs, counted from 0."""
    warmup = min(config.warmup_epochs, epochs)
    match config.kind:
        case "median":
            return optuna.pruners.MedianPruner(n_startup_trials=config.full_trials, n_warmup_steps=warmup - 1)
        case "hyperband":
            return optuna.pruners.HyperbandPruner(warmup, epochs, config.reduction)
        case "none":
            return optuna.pruners.NopPruner()


def _check(key: str, base: PretrainConfig, space: Mapping[str, Any]) -> None:
    """Raises SearchError for a setting that the recipe doesn't have."""
    section: Any = base.model_dump()
    *parents, last = key.split(".")
    for depth, parent in enumerate(parents):
        if ".".join(parents[: depth + 1]) in space:  # a section chosen by name, which may have other settings
            return
        section = section.get(parent, {}) if isinstance(section, dict) else {}
    if not isinstance(section, dict) or last not in section:
        beside = ", ".join(section) if isinstance(section, dict) and section else "none"
        raise SearchError(f"space: no setting {key}; there are in {'.'.join(parents) or 'the recipe'}: {beside}")


def _at(base: PretrainConfig, key: str) -> Any:
    value: Any = base.model_dump(mode="json")
    for name in key.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return value


def _admits(values: RangeConfig | Sequence[Any], value: Any) -> bool:
    if isinstance(values, RangeConfig):
        return isinstance(value, int | float) and values.low <= value <= values.high
    return not isinstance(value, dict) and value in values


def as_yaml(config: PretrainConfig) -> str:
    """A configuration that `load` reads."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def write(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(path.name + ".new")
    new.write_text(text, encoding="utf-8")
    new.replace(path)
