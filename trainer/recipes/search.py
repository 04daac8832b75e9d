"""Search settings on the validation part (survey 4.4): read top to bottom.

Trials are proposed by a tree-structured Parzen estimator (Bergstra, Bardenet, Bengio and Kégl 2011) in Optuna (Akiba,
Sano, Yanase, Ohta and Koyama 2019), and pruned by the median rule (Golovin et al. 2017) or Hyperband (Li et al.
2018). The first trial is the recipe as it is. From-scratch and each transfer are arms of one search: the same space,
the same budget, in turns, so that they are even whenever it stops.

A proposal is a function of (seed, number of the trial, earlier trials' scores), and a trial is a training run: the same
command continues a search that was killed at any moment, resumes its open trial from the checkpoint, and ends as
without the kill. Only the validation part is used; trials of one search share one seed, so the winner's score is a
little too good: train it again with others.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
import torch
from optuna.trial import Trial

from etl.redaction import one_line
from etl.settings import ConfigError, replaced
from trainer import figures, tracking
from trainer.config import FinetuneConfig, RangeConfig, SearchConfig
from trainer.evaluation.evaluators import monitor
from trainer.recipes import finetune, pretrain
from trainer.recipes.run_result import Result
from trainer.recipes.trials import Arm, Outcome, SearchBusy, SearchError, as_yaml, open_arms, recipes, score, write
from trainer.training.loop import NonFiniteLoss, Progress, Pruned
from trainer.training.transfer import TransferError

SENT = "sent"  # attribute of the first arm's study: whether MLflow has the search's end
BEST = "best.yaml"
TRIALS = "trials.json"
SHOWN = 5  # trials in the table at the end


@dataclass(frozen=True)
class Winner:
    """The best trial of one arm. `file` is a configuration of the recipe."""

    arm: str
    file: Path
    model: Path  # the folder of the trial's model
    score: float  # of the validation part (`monitor`)
    values: dict[str, Any]  # of the settings searched


def run(config: SearchConfig) -> list[Winner]:
    """The recipe `search`: the best of each arm. Raises GraftrecError."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise SearchError("expected one process for a search, found several; start it without torchrun")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    folder = Path(config.output) / config.name
    folder.mkdir(parents=True, exist_ok=True)
    with tracking.file_lock(folder / "lock", wait=False) as held:
        if not held:
            raise SearchBusy(f"another process is searching in {folder}; wait for it, or give this one another name")
        return _search(config, open_arms(config, folder))


def _search(config: SearchConfig, arms: Sequence[Arm]) -> list[Winner]:
    first = arms[0].study
    # An earlier process may have been killed before MLflow had its end.
    if all(arm.is_over(config) for arm in arms) and (first.user_attrs.get(SENT) or not config.tracking.enabled):
        print(f"{config.name}: unchanged, the budget is used up and the winners stand")
        tracking.settle(config.tracking)
        return _report(config, arms)
    begun = str(first.user_attrs.get("mlflow_run", ""))
    with tracking.start_run(
        config.tracking,
        name=config.name,
        resolved=config,
        resumed=begun,
        tags={"graftrec.recipe": "search"},
        must_record=True,
    ) as tracked:
        first.set_user_attr(SENT, False)
        if tracked.id:
            first.set_user_attr("mlflow_run", tracked.id)
        while waiting := [arm for arm in arms if not arm.is_over(config)]:
            arm = min(waiting, key=lambda arm: len(arm.ended))
            _try(config, arm)
            if (best := arm.best) is not None:
                tracked.log_metrics({f"{arm.name}/{monitor(arm.base.task)}": score(best)}, step=len(arm.ended))
        try:
            winners = _report(config, arms)
        finally:
            _log(tracked, config, arms)
    first.set_user_attr(SENT, True)
    return winners


# --- one trial ---------------------------------------------


def _try(config: SearchConfig, arm: Arm) -> None:
    """Propose settings, or resume the open trial, and train. Raises errors that are not the trial's fault."""
    trial = _next(config, arm)
    values = {key: _propose(trial, key, admitted) for key, admitted in config.space.items()}
    number = f"{arm.name}: trial {trial.number + 1}"
    print(f"\n{number}{'' if config.trials is None else f' of {config.trials}'}: {_text(values)}", flush=True)
    if (duplicate := arm.duplicate(values)) is not None:
        arm.end(trial, "done", score(duplicate), reason=f"as trial {duplicate.number + 1}", seconds=0, epochs=0)
        return print(f"{number} has the values of trial {duplicate.number + 1}, and so its score")
    judge = Judge(trial, monitor(arm.base.task))
    try:
        metrics = _train(config, arm, trial.number, values, judge).metrics
    except (Pruned, NonFiniteLoss, ConfigError, TransferError, MemoryError, torch.OutOfMemoryError) as error:
        outcome: Outcome = "pruned" if isinstance(error, Pruned) else "failed"
        reason = one_line(error)
        arm.end(trial, outcome, None, reason=reason, seconds=judge.seconds, epochs=judge.epochs)
        return print(f"{number} {outcome}: {reason}", flush=True)
    arm.end(
        trial,
        "done",
        metrics[f"validation/{monitor(arm.base.task)}"],
        reason="",
        seconds=metrics["seconds"],
        epochs=int(metrics["epochs"]),
    )


def _train(config: SearchConfig, arm: Arm, number: int, values: Mapping[str, Any], judge: "Judge") -> Result:
    folder = arm.run_folder(number)
    settings = replaced(arm.settings(values), name=folder.name, output=str(folder.parent), tracking=config.tracking)
    if (expected := monitor(arm.base.task)) != (found := monitor(settings.task)):
        raise ConfigError(
            f"task {settings.task.kind}: expected a task validated by {expected}, as the recipe's, found one by {found}"
        )
    if isinstance(settings, FinetuneConfig):
        return finetune.run(settings, judge=judge)
    return pretrain.run(settings, judge=judge)


class Judge:
    """Reports a trial's validation score to Optuna after each epoch. Raises Pruned where Optuna prunes the trial."""

    def __init__(self, trial: Trial, metric: str) -> None:
        self._trial, self._metric = trial, metric
        trials = trial.study.get_trials(deepcopy=False)
        self._known = set(next(one for one in trials if one.number == trial.number).intermediate_values)
        self.seconds, self.epochs = 0.0, 0

    def __call__(self, progress: Progress) -> None:
        self.seconds = sum(epoch.seconds for epoch in progress.history)
        self.epochs = len(progress.history)
        for step, epoch in enumerate(progress.history):
            if step not in self._known:  # of a resumed trial, earlier epochs are
                self._trial.report(epoch.metrics[self._metric], step)
                self._known.add(step)
        if not progress.finished and self._trial.should_prune():
            raise Pruned(
                f"pruned after epoch {self.epochs}: its best validation {self._metric}, {progress.best_score:.4f}, "
                "is below what earlier trials had there"
            )


def _next(config: SearchConfig, arm: Arm) -> Trial:
    """The trial that an earlier process left open, or a new one."""
    if arm.under_way:
        trial = arm.under_way[0]
        arm.study.sampler = _sampler(config, trial.number)
        return Trial(arm.study, trial._trial_id)
    arm.study.sampler = _sampler(config, len(arm.ended))
    return arm.study.ask()


def _sampler(config: SearchConfig, number: int) -> optuna.samplers.TPESampler:
    """The sampler of one trial, seeded by its number, so that it doesn't matter what a process did before. It is the
    same for all arms, whose random trials therefore have the same values."""
    digest = hashlib.blake2b(f"{config.seed}/{number}".encode(), digest_size=4).digest()
    return optuna.samplers.TPESampler(n_startup_trials=config.random_trials, seed=int.from_bytes(digest, "little"))


def _propose(trial: Trial, key: str, admitted: RangeConfig | Sequence[Any]) -> Any:
    if not isinstance(admitted, RangeConfig):
        return trial.suggest_categorical(key, admitted)
    if isinstance(admitted.low, int) and isinstance(admitted.high, int):
        return trial.suggest_int(key, admitted.low, admitted.high, log=admitted.log)
    return trial.suggest_float(key, admitted.low, admitted.high, log=admitted.log)


# --- results -----------------------------------------------------


def _report(config: SearchConfig, arms: Sequence[Arm]) -> list[Winner]:
    """Write each arm's winner and trials, and print them. Raises SearchError for an arm without a winner."""
    winners, barren = [], []
    for arm in arms:
        write(arm.folder / arm.name / TRIALS, json.dumps(arm.rows(), indent=1))
        print(f"\n{_table(config, arm)}", flush=True)
        if (winner := _winner(config, arm)) is None:
            first = next((f"; the first: {trial.user_attrs['reason']}" for trial in arm.ended), "")
            barren.append(f"{arm.name}: none of {len(arm.ended)} trials gave a model{first}")
        else:
            winners.append(winner)
            print(f"the best as a configuration: {winner.file}", flush=True)
    if barren:
        raise SearchError("; ".join(barren))
    return winners


def _winner(config: SearchConfig, arm: Arm) -> Winner | None:
    """The best trial. Writes its configuration: the recipe with the best values."""
    best = arm.best
    if best is None:
        return None
    own = dict(recipes(config))[arm.name]
    won = arm.settings(best.params)
    data = replaced(won.data, release=own.data.release)
    won = replaced(won, name=own.name, output=own.output, data=data)
    count = Counter(row["outcome"] for row in arm.rows())
    comment = (
        f"# Found by the search {config.name}, {arm.name}: trial {best.number + 1} of {count.total()} "
        f"({count['pruned']} pruned, {count['failed']} failed).\n# Validation {monitor(own.task)} {score(best):.4f}"
        f", on release {arm.base.data.release}, seed {own.train.seed}.\n# Searched: {_text(best.params)}.\n"
    )
    file = arm.folder / arm.name / BEST
    write(file, comment + as_yaml(won))
    return Winner(arm.name, file, arm.run_folder(best.number) / "model", score(best), best.params)


def _table(config: SearchConfig, arm: Arm) -> str:
    rows = arm.rows()
    count = Counter(row["outcome"] for row in rows)
    lines = [
        f"{config.name}, {arm.name}: {len(rows)} trials ({count['pruned']} pruned, {count['failed']} failed), "
        f"{sum(row['seconds'] for row in rows):.0f} s of training"
    ]
    done = sorted((row for row in rows if row["outcome"] == "done"), key=lambda row: -row["score"])
    for row in done[:SHOWN]:
        lines.append(
            f"  {row['score']:.4f}  trial {row['trial']:>3}, {row['epochs']:>3} epochs: {_text(row['values'])}"
        )
    lines += [f"  failed  trial {row['trial']:>3}: {row['reason']}" for row in rows if row["outcome"] == "failed"]
    return "\n".join(lines)


def _log(tracked: tracking.Run, config: SearchConfig, arms: Sequence[Arm]) -> None:
    rows = [row for arm in arms for row in arm.rows()]
    for arm in arms:
        count = Counter(row["outcome"] for row in arm.rows())
        tracked.log_metrics({f"{arm.name}/{outcome}": count[outcome] for outcome in ("done", "pruned", "failed")})
        tracked.log_metrics({f"{arm.name}/seconds": sum(row["seconds"] for row in arm.rows())})
        for file in (arm.folder / arm.name / name for name in (BEST, TRIALS)):
            if file.is_file():
                tracked.log_text(file.read_text(), f"{arm.name}/{file.name}")
    tried = [figures.Tried(row["arm"], row["score"], row["scores"]) for row in rows]
    found = "\n\n".join(_table(config, arm) for arm in arms)
    tracked.describe(f"Hyper-parameter search {config.name}.\n\n```\n{found}\n```")
    tracked.log_figure(figures.search_progress(tried, title=config.name), "pictures/search.png")


def _text(values: Mapping[str, Any]) -> str:
    numbers = {key: f"{value:.3g}" if isinstance(value, float) else value for key, value in values.items()}
    return ", ".join(f"{key} {value}" for key, value in numbers.items())
