"""All jobs, in order of what they read, and the running of one of them or of all."""

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from pyspark.errors import PySparkException

from etl import lineage_events
from etl.config import EtlConfig, check_root
from etl.jobs import (
    baskets,
    delivered,
    domains,
    entities,
    interactions,
    items,
    knowledge,
    negatives,
    releases,
    sequences,
    social,
    users,
)
from etl.jobs.job import Job, JobReport, Outcome, Run, RunContext, digest, job_code_version, plan_run
from etl.json_log import say
from etl.lake import spark_io
from etl.lake.snapshots import check_formats
from etl.plain_path import absolute
from etl.session import user_errors
from etl.settings import ConfigError, GraftrecError
from etl.tables import DOMAIN_ALL, FEATURES, QUARANTINE, RELEASES, SEQUENCES

_MODULES = (interactions, delivered, items, users, domains, entities, knowledge, social, sequences, baskets, negatives)
JOBS: tuple[Job, ...] = tuple(module.JOB for module in _MODULES)


def in_order(jobs: Sequence[Job]) -> list[Job]:
    """The jobs, each after those whose tables it reads."""
    waiting, done, ordered = list(jobs), set[str](), list[Job]()
    names = {job.name for job in jobs}
    while waiting:
        ready = [job for job in waiting if all(t.name in done or t.name not in names for t in job.reads)]
        if not ready:
            raise AssertionError(f"jobs read each other's tables in a circle: {[job.name for job in waiting]}")
        ordered.append(ready[0])
        done.add(ready[0].name)
        waiting.remove(ready[0])
    return ordered


def run_all(engine: RunContext) -> int:
    """Run every job that is due, then release what they left. Gives the release's number. Raises LakeBusy."""
    config = engine.config
    check_root(config.source)
    lineage_events.check()
    domains.check(config.domains)
    sequences.check(config)
    with spark_io.writing(config.lake, RELEASES, wait_seconds=config.wait_seconds):
        check_formats(config.lake)
        if note := removed_sequences(config):
            print(note, file=sys.stderr, flush=True)
        return _run_and_release(engine)


def removed_sequences(config: EtlConfig) -> str:
    """A warning that names the lake's splits and domains that this configuration lacks; "" where it lacks none."""
    if spark_io.current_version(config.lake, SEQUENCES) is None:
        return ""
    kept = {
        "split": {split.name for split in config.splits},
        "domain": {DOMAIN_ALL, *(domain.name for domain in config.domains)},
    }
    files = spark_io.snapshot_files(config.lake, SEQUENCES)
    removed = [
        f"{name} {', '.join(gone)}"
        for name, wanted in kept.items()
        if (gone := sorted({str(file.partition[name]) for file in files} - wanted))
    ]
    if not removed:
        return ""
    return (
        f"warning: the next release of {config.lake} lacks what this configuration does not name: "
        f"{'; '.join(removed)}; models that read it need the release before. A pipeline adds splits of its own: run "
        "the pipeline's command again to have them"
    )


def _run_and_release(engine: RunContext) -> int:
    began = time.monotonic()
    ordered = in_order(JOBS)
    versions: dict[str, int] = {}
    total, skipped = 0, 0
    for number, job in enumerate(ordered, 1):
        outcome = run_job(job, engine, label=f"[{number}/{len(ordered)}] ")
        versions[job.table.name] = outcome.version
        total += outcome.rows if outcome.committed else 0
        skipped += not outcome.committed
    for table in (QUARANTINE, FEATURES):  # written by several jobs, by the recipe `features`; or not at all
        version = spark_io.current_version(engine.config.lake, table)
        if version is not None:
            versions[table.name] = version
    code = digest([job_code_version(job) for job in ordered])
    number, outcome = releases.release(engine, versions, code=code)
    seconds = time.monotonic() - began
    fate = "new" if outcome.committed else "unchanged"
    said = f"{total:,} rows written, {skipped} of {len(ordered)} jobs unchanged"
    text = f"release {number} ({fate}) in {engine.config.lake}: {said}, {seconds:.1f} s"
    say(text, release=number, new=outcome.committed, rows=total, seconds=round(seconds, 3))
    return number


def run_one(engine: RunContext, name: str) -> None:
    """Run the job `name` if it is due. Raises ConfigError where there is none of that name; LakeBusy, LeaseLost."""
    job = next((job for job in JOBS if job.name == name), None)
    if job is None:
        known = ", ".join(job.name for job in JOBS)
        raise ConfigError(f"expected all, report or a job ({known}), found {name!r}")
    if not job.reads:
        check_root(engine.config.source)
    with spark_io.writing(engine.config.lake, job.table, wait_seconds=engine.config.wait_seconds):
        check_formats(engine.config.lake)
        run_job(job, engine)


def run_job(job: Job, engine: RunContext, *, label: str = "") -> Outcome:
    """Run `job` if it is due, and print a line on what came of it."""
    began = time.monotonic()
    with user_errors(), _full_disk(engine):
        found = plan_run(job, engine)
        if isinstance(found, Outcome):
            engine.done.append(JobReport(job.name, found.version, 0, 0, time.monotonic() - began, False))
            text = f"{label}{job.name:<13}unchanged, skipped (version {found.version})"
            say(text, job=job.name, version=found.version, unchanged=True)
            return found
        if sys.stdout.isatty():
            print(f"{label}{job.name:<13}…", end="\r", flush=True)
        lake = engine.config.lake
        with (
            lineage_events.traced(f"etl.{job.name}", _inputs(engine, job, found)) as traced,
            spark_io.unfinished_removed(lake, job.table),
        ):
            outcome = job.run(found)
            traced.outputs.append((lineage_events.table_place(lake, job.name), outcome.version, outcome.rows))
    seconds = time.monotonic() - began
    rate = outcome.rows / seconds if seconds > 0 else 0.0
    notes = "".join(f"; {note}" for note in outcome.notes)
    if outcome.committed:
        summary = f"{outcome.rows:>12,} rows {seconds:>6.1f} s {rate:>10,.0f} rows/s (version {outcome.version})"
    else:
        summary = f"nothing new (version {outcome.version})"
    report = JobReport(job.name, outcome.version, outcome.rows, found.rejected, seconds, outcome.committed)
    engine.done.append(report)
    say(f"{label}{job.name:<13}{summary}{notes}", **report.as_fields())
    return outcome


def _inputs(engine: RunContext, job: Job, run: Run) -> dict[str, int | None]:
    """Place -> version of what a job reads; None: of raw files."""
    places: dict[str, int | None] = {
        lineage_events.table_place(engine.config.lake, name): version for name, version in run.inputs.items()
    }
    root = getattr(engine.config.source, "root", None)
    if job.needs_source and isinstance(root, str):
        places[absolute(root)] = None
    return places


@contextmanager
def _full_disk(engine: RunContext) -> Iterator[None]:
    try:
        yield
    except (PySparkException, OSError) as error:
        if "No space left on device" not in str(error):
            raise
        raise GraftrecError(
            f"no space left on the disk of the lake {engine.config.lake} or of Spark's temporary files; "
            f"make room and run again: tables are as they were"
        ) from None
