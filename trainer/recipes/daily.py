"""The nightly run of a pipeline (`--mode daily`): new files become tables, the champion recommends to users with new
events, and, when it is due, training goes on from the champion's weights.

What went on competes under the same gate as any candidate, on the newest release: with the champion, and with the
from-scratch models that the last full run left, beside the simple baselines. Recommendations come first: they take
minutes, and don't wait for a training.
"""

import datetime as dt
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from etl.settings import GraftrecError, replaced
from trainer.config import FinetuneConfig, PretrainConfig, patch_of
from trainer.recipes.pipeline_plan import (
    CONTINUED,
    SCRATCH,
    PipelineConfig,
    Plan,
    Trained,
    placed_section,
    promote_config,
    recommend_config,
    registered_model,
)

if TYPE_CHECKING:
    from trainer.data.release import Release
    from trainer.registry import Version


@dataclass(frozen=True)
class Night:
    """What a nightly run did for one target: `lines` for the reader; `refusal` of the gate, "" where none was asked or
    it passed."""

    target: str
    lines: list[str]
    refusal: str = ""


def run(config: PipelineConfig, planned: Plan) -> int:
    """Run the steps and print what came of them. Returns the exit code: 0, or 3 if the gate refuses a model."""
    from trainer import tracking
    from trainer.data.release import pin
    from trainer.recipes import training_jobs
    from trainer.recipes.pipeline import REFUSED, build_tables, page_command

    if not config.tracking.enabled:
        raise GraftrecError(
            "mode daily: expected MLflow, whose registry has the champion, found tracking.enabled false"
        )
    begun = time.monotonic()
    training_jobs.prepare()
    tags = {"graftrec.recipe": "daily"}
    with tracking.start_run(config.tracking, name=f"{config.name}-daily", resolved=config, tags=tags) as tracked:
        release = build_tables(config)
        pinned = pin(config.etl.lake, release)
        tracked.log_release(pinned, context="evaluation", tables=("sequences",))
        nights = []
        for target in planned.targets:
            night = _night(config, target, pinned, tracking.child_environment(tracked))
            nights.append(night)
            if night.refusal:
                tracked.set_tags({f"graftrec.gate.{target}": night.refusal})
        tracked.log_metrics({"seconds": time.monotonic() - begun})
    print(f"\n== {config.name}, daily, in {time.monotonic() - begun:.0f} s")
    for night in nights:
        print(f"\n{night.target}")
        for line in night.lines:
            print(line)
    print(f"MLflow page      {page_command()}", flush=True)
    return REFUSED if any(night.refusal for night in nights) else 0


def _night(config: PipelineConfig, target: str, release: "Release", environment: dict[str, str]) -> Night:
    from trainer.recipes.pipeline import step
    from trainer.registry import CHAMPION, Registry

    registry = Registry(registered_model(config, target), family=config.registered_model)
    champion = registry.find(CHAMPION)
    if champion is None:
        return Night(target, ["champion         none yet: run the pipeline without --mode daily first"])
    lines = [f"champion         {champion.label}"]
    if config.finetune.task.scores_items:
        with step(f"recommend {target}"):
            lines.append(_recommend(config, target, release))
    folder = registry.folder(champion)
    reason = not_due(config, champion, folder, release)
    if reason:
        return Night(target, [*lines, f"training          {reason}"])
    with step(f"continue {target}"):
        trained = _continue(config, target, release, folder, environment)
    with step(f"promote {target}"):
        refusal, steps = _promote(config, target, release, trained)
    lines.append(f"gate             {f'refused: {refusal}' if refusal else 'passed'}")
    lines += [f"{'what now' if not place else '':<17}{line}" for place, line in enumerate(steps)]
    if not refusal and config.finetune.task.scores_items:
        with step(f"recommend {target}"):
            lines.append(_recommend(config, target, release))
    return Night(target, lines, refusal)


def _recommend(config: PipelineConfig, target: str, release: "Release") -> str:
    from trainer.recipes import recommend

    written = recommend.run(replaced(recommend_config(config, target, release.number), changed_only=True))
    made = f"{written.rows:,} rows" if written.committed else "unchanged"
    return f"recommendations  version {written.version}: {made}"


def not_due(config: PipelineConfig, champion: "Version", folder: Path, release: "Release") -> str:
    """Why training doesn't go on tonight; "" where it does."""
    from trainer.inference.model_folder import config_of, release_of
    from trainer.social.friends_folder import is_friends

    days = config.daily.retrain_days
    if days is None:
        return "not wanted (daily.retrain_days)"
    if is_friends(folder) or patch_of(config_of(folder)[0]) is not None:
        return f"{champion.label} is patched or reads friends: it is trained by the pipeline without --mode daily"
    trained_on = release_of(folder)
    if trained_on == release.number:
        return f"{champion.label} was trained on this release"
    age = _age(release, trained_on)
    if age is not None and age < days:
        return f"{champion.label} was trained on release {trained_on}, {age:.1f} days older: due after {days:g}"
    return ""


def _age(release: "Release", earlier: int) -> float | None:
    """Days between the making of an earlier release and of this one; None where the earlier one isn't known."""
    from trainer.data.release import created

    times = created(release.lake)
    if earlier not in times or release.number not in times:
        return None
    return (times[release.number] - times[earlier]) / dt.timedelta(days=1)


def continued_config(
    config: PipelineConfig, target: str, release: int, folder: Path, champion: PretrainConfig, seed: int
) -> FinetuneConfig:
    """Settings of a training that goes on from the champion in `folder`: its own, but for length and step size. All of
    its weights are copied: those of items by raw id, those of users and entities by index; new ones start anew."""
    own = {name: getattr(champion, name) for name in PretrainConfig.model_fields if name in FinetuneConfig.model_fields}
    where = placed_section(champion, config, release, f"{target}/{CONTINUED}-{release}-{seed}", seed, {})
    train = replaced(
        where.pop("train"),
        epochs=config.daily.epochs,
        min_epochs=min(champion.train.min_epochs, config.daily.epochs),
        learning_rate=champion.train.learning_rate * config.daily.learning_rate_factor,
    )
    own |= where | {"train": train, "transfer": "deep", "parent": str(folder), "shared_items": True, "freeze": ()}
    own["data"] = {**dict(own["data"])}
    return FinetuneConfig.model_validate(own)


def _continue(
    config: PipelineConfig, target: str, release: "Release", folder: Path, environment: dict[str, str]
) -> list[Trained]:
    """A model for each seed."""
    from trainer.evaluation.evaluators import monitor
    from trainer.inference.model_folder import config_of
    from trainer.recipes import training_jobs
    from trainer.recipes.pipeline import TrainingFailed, jobs_of

    champion, _ = config_of(folder)
    made = [continued_config(config, target, release.number, folder, champion, seed) for seed in config.seeds]
    jobs = [training_jobs.TrainingJob(one.name, "finetune", one) for one in made]
    num = jobs_of(config.jobs, config.finetune.runtime, len(jobs))
    training_jobs.run(jobs, folder=Path(config.runs), jobs=num, environment=environment)
    if failed := next((job for job in jobs if job.failure), None):
        raise TrainingFailed(f"{failed.name}: {failed.failure}", failed.exit_code)
    score = f"validation/{monitor(config.finetune.task)}"
    found = zip(jobs, config.seeds, strict=True)
    return [Trained(CONTINUED, seed, job.model, job.metrics[score]) for job, seed in found if job.metrics is not None]


def _promote(config: PipelineConfig, target: str, release: "Release", trained: list[Trained]) -> tuple[str, list[str]]:
    """The reason of a refusal, else "", and what to do. From-scratch are the models of the last full run."""
    from trainer.evaluation.gate import next_steps
    from trainer.inference.model_folder import MANIFEST
    from trainer.recipes import promote

    places = [Path(config.runs) / target / f"{SCRATCH}-{seed}" / "model" for seed in config.seeds]
    scratch = [
        Trained(SCRATCH, seed, place, 0.0)
        for seed, place in zip(config.seeds, places, strict=True)
        if (place / MANIFEST).is_file()
    ]
    settings = promote_config(config, target, release.number, [*trained, *scratch])
    settings = replaced(settings, name=f"{target}/promote-daily")
    try:
        promote.run(settings, recommend_config(config, target, release.number))
    except promote.GateRefused as refusal:
        steps = next_steps(refusal.decision, recommend=None, champion=refusal.champion)
        return str(refusal), list(steps)
    return "", []
