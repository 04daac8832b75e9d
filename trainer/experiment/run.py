"""The survey's experiment (section 4): models × transfer × task of pre-training × metadata, over seeds, as one command.

    graftrec experiment --experiment table2 --preset cpu [--data FOLDER] [--section.key value …]

Every number of the table comes from *cells*: training runs, each a process and a child of one MLflow run. Finished
cells are not run again, and a killed run resumes from its checkpoints, so the same command continues an experiment that
was stopped anywhere. A cell that fails leaves its run missing, with the reason; the others continue. Then all models
and the simple baselines are scored on one pinned release, under every protocol, into <runs>/<name>/results.json and
report.html. Exit codes: 0; 1 where requested runs are missing; 2 for a mistake in settings or data.
"""

import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from etl.command import run_command
from etl.config import check_root
from etl.settings import ConfigError, Section, config_hash, load, replaced
from trainer.config import (
    FinetuneConfig,
    TrackingConfig,
)
from trainer.parallel.cores import usable_cores
from trainer.training.empty_transfer import empty_by_data

if TYPE_CHECKING:
    from trainer.data.release import Release
from trainer.experiment.command import build_tables, movielens_in, parser_of
from trainer.experiment.plan import NOT_REQUESTED, ExperimentConfig, Row, check_rows, planned, training_jobs

ROOT = Path(__file__).resolve().parent.parent.parent
KEPT = ROOT / "tests" / "reproduction" / "results"
RUNS_MISSING = 1


def run(config: ExperimentConfig) -> int:
    """The whole experiment. Gives the exit code: 0, or 1 where requested runs are missing."""
    from trainer import tracking
    from trainer.data.release import pin
    from trainer.evaluation import card
    from trainer.experiment import results
    from trainer.recipes import training_jobs as runner
    from trainer.recipes.alone import alone
    from trainer.report import report

    check_rows(planned(config, config.lake or "", 1))  # wrong settings are refused before tables are built
    if config.etl is not None:
        check_root(config.etl.source, "etl.source.root")
    folder = config.folder
    with alone(folder, "experiment"):
        started = started_with(config, folder)
        tags = {"graftrec.recipe": "experiment"}
        with tracking.start_run(
            config.tracking, name=config.name, resolved=config, resumed=started["run"], tags=tags
        ) as tracked:
            (folder / "started.json").write_text(json.dumps(started | {"run": tracked.id}))
            release = pin(*build_tables(config))
            tracked.log_release(release, context="evaluation")
            rows = planned(config, release.lake, release.number)
            facts = results.data_facts(release, config)
            for row in rows:
                row.reason = row.reason or results.why_not(row, facts, config) or _empty(row, release)
                row.trainings = {} if row.reason else row.trainings
            environment = tracking.child_environment(tracked)
            runner.run(training_jobs(rows), folder=folder, jobs=jobs_of(config), environment=environment)
            if not results.trained(rows):
                return _print_missing(rows)
            found = results.collect(config, release, rows, facts, started=started["started"])
            kept = folder / "results.json"
            kept.write_text(json.dumps(found, indent=1, allow_nan=False), encoding="utf-8")
            page = report.write(found, folder / "report")
            card.record(tracked, found["cards"])
            tracked.log_artifact(kept)
            tracked.log_artifact(page.parent, "report")
            tracked.log_metrics(dict(results.flat_metrics(found, config.logged_metrics)))
    print(f"\n{results.text_table(found, config.tested_metric)}\n\nresults  {kept}\nreport   {page}", flush=True)
    return _print_missing(rows)


def _empty(row: Row, release: "Release") -> str:
    """Why the row's transfer would copy nothing on this release; "" where it copies something."""
    training = next(iter(row.trainings.values()))
    if training.parent is None or not isinstance(training.config, FinetuneConfig):
        return ""
    return empty_by_data(training.config, release, training.parent.config.data.domain)


def _print_missing(rows: Sequence[Row]) -> int:
    """A line on each requested run that is missing; gives the exit code."""
    missing = list(_missing(rows))
    for line in missing:
        print(f"missing  {line}", file=sys.stderr)
    return RUNS_MISSING if missing else 0


def _missing(rows: Sequence[Row]) -> Iterator[str]:
    """Requested runs that are missing."""
    for row in rows:
        if row.reason and not row.reason.startswith(NOT_REQUESTED):
            yield f"{row.id}: {row.reason}"
        for seed, training in row.trainings.items():
            if training.failure:
                yield f"{row.id}, seed {seed}: {training.failure}"


def jobs_of(config: ExperimentConfig) -> int:
    return config.jobs or max(1, usable_cores() // config.threads)


def started_with(config: Section, folder: Path) -> dict[str, str]:
    """When this experiment began with these settings, and its MLflow run."""
    same = replaced(config, jobs=None, threads=1, tracking=TrackingConfig())
    new = {"settings": config_hash(same), "started": time.strftime("%Y-%m-%d %H:%M"), "run": ""}
    try:
        found: dict[str, str] = json.loads((folder / "started.json").read_text())
    except (OSError, ValueError):
        return new
    return found if found.get("settings") == new["settings"] else new


def load_experiment(name: str, preset: str | None, overrides: Sequence[str] = ()) -> ExperimentConfig:
    """conf/experiment/<name>_<preset>.yaml, or <name>.yaml where that is the preset it is of. Raises ConfigError."""
    plain = load(ExperimentConfig, name if name.endswith(".yaml") else f"experiment/{name}", overrides)
    if preset in (None, plain.preset):
        return plain
    if name.endswith(".yaml"):
        raise ConfigError(f"--preset: expected {plain.preset}, which {name} is of, found {preset}; leave it out")
    return load(ExperimentConfig, f"experiment/{name}_{preset}", overrides)


def keep(config: ExperimentConfig) -> Path:
    """Copy the results into the repository."""
    place = KEPT / f"{config.name}-{config.preset}.json"
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text((config.folder / "results.json").read_text(encoding="utf-8"), encoding="utf-8")
    return place


def main(arguments: Sequence[str] | None = None, *, program: str = "graftrec experiment") -> int:
    description = "The survey's experiment, and others of the same kind."
    parser = parser_of(ExperimentConfig, "experiment", program=program, description=description)
    parser.add_argument("--preset", help="cpu, paper…: conf/experiment/<experiment>_<preset>.yaml")
    parser.add_argument("--keep", action="store_true", help="copy the results to tests/reproduction/results/")
    known, overrides = parser.parse_known_args(arguments)

    def work() -> int:
        config = load_experiment(known.experiment, known.preset, overrides)
        code = run(movielens_in(config, known.data) if known.data else config)
        if known.keep:
            print(f"kept     {keep(config)}")
        return code

    return run_command("experiment", work)
