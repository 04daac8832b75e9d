"""Whether features help (survey 2), in three arms: none, real, and shuffled among items of like popularity.

    graftrec arms --experiment demo [--data FOLDER] [--section.key value …]

Tables are made, encoders' vectors written, and each arm trained on each split that a slice names, over seeds: the same
model and budget. Finished trainings aren't repeated and a killed one resumes, so the same command continues what was
stopped anywhere. Then all models and the simple baselines are scored on each slice: a table for terminal and MLflow,
and results.json, results.md and features.png in <runs>/<name>. Exit codes: 0; 1 where trainings are missing; 2 for a
mistake in settings or data.
"""

import json
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from etl.config import check_root
from etl.redaction import redact
from etl.settings import ConfigError, GraftrecError
from etl.tables import FEATURES
from trainer.experiment import plan
from trainer.experiment.arms_plan import ArmsConfig, experiment_of, placed_vectors
from trainer.experiment.command import run_named
from trainer.experiment.run import RUNS_MISSING, jobs_of, started_with

if TYPE_CHECKING:
    from trainer.data.release import Release
    from trainer.experiment.arms_results import Found
    from trainer.experiment.results import Scored
    from trainer.tracking import Run

PICTURE = "features.png"


def run(config: ArmsConfig) -> int:
    """The whole experiment. Gives the exit code: 0, or 1 where trainings are missing."""
    from trainer import tracking
    from trainer.evaluation.card import lines
    from trainer.experiment import arms_report, arms_results
    from trainer.recipes.alone import alone

    for split in config.splits:  # wrong settings are refused before tables are built
        plan.check_rows(plan.planned(experiment_of(config, split, config.lake or "", 1), config.lake or "", 1))
    if config.etl is not None:
        check_root(config.etl.source, "etl.source.root")
    folder = config.folder
    with alone(folder, "experiment"):
        started, tags = started_with(config, folder), {"graftrec.recipe": "features"}
        with tracking.start_run(
            config.tracking, name=config.name, resolved=config, resumed=started["run"], tags=tags
        ) as tracked:
            (folder / "started.json").write_text(json.dumps(started | {"run": tracked.id}))
            release = _release(config)
            tracked.log_release(release, context="evaluation")
            missing: list[str] = []
            environment = tracking.child_environment(tracked)
            scored = {split: _of_split(config, split, release, environment, missing) for split in config.splits}
            found = arms_results.collect(config, {split: one.results[-1] for split, one in scored.items()})
            missing += found.missing
            cards = {split: one.cards for split, one in scored.items()}
            _keep(config, found, release, {"started": started["started"], "cards": cards}, tracked)
    under = "\n".join(f"split {split}: {line}" for split, entries in cards.items() for line in lines(entries))
    print(f"\n{arms_report.text(found, config)}\n\n{under}\n\nresults  {folder / 'results.json'}", flush=True)
    for line in missing:
        print(f"missing  {line}", file=sys.stderr)
    return RUNS_MISSING if missing else 0


def _keep(config: ArmsConfig, found: "Found", release: "Release", about: dict[str, Any], tracked: "Run") -> None:
    """results.json, results.md and the picture, in the folder and in MLflow."""
    from trainer.evaluation.card import record
    from trainer.experiment import arms_report, results
    from trainer.tracking import provenance

    about |= {
        "experiment": config.name,
        "code": provenance.code_version(),
        "machine": results.machine(),
        "finished": time.strftime("%Y-%m-%d %H:%M"),
        "lake": redact(release.lake),
        "release": release.number,
        "seeds": list(config.seeds),
        "metric": config.metric,
        "level": config.level,
    }
    plain = results.finite(about | arms_report.as_json(found, config.level))
    kept, table = config.folder / "results.json", arms_report.as_markdown(found, config)
    kept.write_text(json.dumps(plain, indent=1, allow_nan=False), encoding="utf-8")
    (config.folder / "results.md").write_text(table, encoding="utf-8")
    record(tracked, [entry for entries in about["cards"].values() for entry in entries])
    tracked.log_artifact(kept)
    tracked.log_text(table, "results.md")
    if found.entries:
        picture = arms_report.figure(found, config)
        picture.savefig(config.folder / PICTURE, dpi=130)
        tracked.log_figure(picture, f"pictures/{PICTURE}")
    tracked.log_metrics(arms_report.flat_metrics(found))
    tracked.describe(f"Features in three arms: none, real, shuffled.\n\n{table}")


def _release(config: ArmsConfig) -> "Release":
    """With the tables and the vectors. Raises GraftrecError."""
    from trainer.data.release import pin
    from trainer.recipes import features, run_etl

    if config.etl is not None:
        run_etl.run(config.etl, config.tracking)
    lake = config.etl.lake if config.etl is not None else config.lake
    assert lake is not None
    for given in placed_vectors(config, lake):
        features.run(given)
    release = pin(lake, config.release)
    of_users = tuple(name for given in config.user_features.values() for name in given.encoders)
    for kind, wanted in (("item", config.encoders), ("user", of_users)):
        known: set[str] = set()
        if FEATURES.name in release.versions:
            known = {str(part["encoder"]) for part in release.partitions(FEATURES) if part["kind"] == kind}
        if lacking := set(wanted) - known:
            raise ConfigError(
                f"features: expected encoders of {kind}s in release {release.number} of {lake} "
                f"({', '.join(sorted(known)) or 'none'}), found {min(lacking)!r}; add it to vectors"
            )
    return release


def _of_split(
    config: ArmsConfig, split: str, release: "Release", environment: dict[str, str], missing: list[str]
) -> "Scored":
    """Train and score all arms on a split; adds to `missing` what failed. Raises GraftrecError where all did."""
    from trainer.experiment.results import Scored, trained
    from trainer.recipes import training_jobs

    experiment = experiment_of(config, split, release.lake, release.number)
    rows = plan.planned(experiment, release.lake, release.number)
    print(f"split {split}: {len(rows)} arms, {len(config.seeds)} seeds", flush=True)
    experiment.folder.mkdir(parents=True, exist_ok=True)
    jobs = plan.training_jobs(rows)
    training_jobs.run(jobs, folder=experiment.folder, jobs=jobs_of(experiment), environment=environment)
    done, every = trained(rows), [training for row in rows for training in row.trainings.values()]
    if not done and every:
        raise GraftrecError(
            f"split {split}: expected a trained model, found none of {len(every)}: {every[0].name}: {every[0].failure}"
        )
    scored = Scored(experiment, release, done)
    for row in rows:
        for seed, training in row.trainings.items():
            try:
                if not training.failure:
                    scored.add_model(row, seed, training)
            except GraftrecError as error:
                training.failure = str(error)
            if training.failure:
                missing.append(f"{split}, {row.id}, seed {seed}: {training.failure}")
    if experiment.baselines.enabled:
        scored.add_baselines()
    return scored


def main(arguments: Sequence[str] | None = None, *, program: str = "graftrec arms") -> int:
    return run_named(
        ArmsConfig,
        "arms",
        run,
        program=program,
        description="Whether features help, in three arms.",
        arguments=arguments,
    )
