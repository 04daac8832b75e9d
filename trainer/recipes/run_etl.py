"""The ETL as an MLflow run with its tables and pictures; `etl` itself never imports MLflow.

graftrec run-etl all --config etl/demo [--section.key value …]
"""

from collections.abc import Sequence

import numpy as np

from etl import tables
from etl.command import CommandParser, configurations, run_command
from etl.config import EtlConfig, check_root
from etl.redaction import redact
from etl.settings import load
from trainer import tracking
from trainer.config import TrackingConfig
from trainer.data.release import Release, domains_with_sequences, pin
from trainer.data.sequences import SequenceDataset

PICTURED_USERS = 200_000  # about, of each domain; whole row groups are read


def run(config: EtlConfig, track: TrackingConfig, *, job: str = "all") -> int:
    """Run one job, or all of them; gives the number of the newest release. Raises GraftrecError."""
    from etl.jobs.job import RunContext
    from etl.pipeline.run import run_all, run_one

    check_root(config.source)
    with tracking.start_run(track, name="etl", resolved=config, tags={"graftrec.recipe": "etl"}) as tracked:
        context = RunContext(config)
        try:
            if job == "all":
                number = run_all(context)
            else:
                run_one(context, job)
        finally:
            for done in context.done:
                numbers = {"seconds": done.seconds, "rows": done.rows, "rejected": done.rejected}
                tracked.log_metrics({f"job/{done.job}/{name}": value for name, value in numbers.items()})
        if job != "all":
            return pin(config.lake, None).number
        release = pin(config.lake, number)
        tracked.log_release(release, context="output")
        written = ", ".join(f"{table}@{number}" for table, number in sorted(release.versions.items()))
        tracked.describe(f"Release {release.number} of `{redact(release.lake)}`, from the log.\n\nTables: {written}.")
        if track.enabled:
            _picture(release, config.splits[0].name, tracked)
    return release.number


def _picture(release: Release, split: str, tracked: tracking.Run) -> None:
    """Sequence lengths and popularity, one line per domain."""
    from trainer import figures

    lengths, counts = {}, {}
    for domain in domains_with_sequences(release, split):
        dataset = SequenceDataset(release, split, domain)
        enough = int(np.searchsorted(np.cumsum(dataset.rows_per_group), PICTURED_USERS)) + 1
        sequences = dataset.read(range(min(enough, len(dataset.groups))))
        lengths[domain] = np.diff(sequences.offsets)
        counts[domain] = np.bincount(sequences.items)[tables.FIRST_INDEX :]
    title = f"release {release.number}, split {split}"
    tracked.log_figure(figures.sequence_lengths(lengths, title=title), "pictures/sequence_lengths.png")
    tracked.log_figure(figures.popularity_long_tail(counts, title=title), "pictures/popularity.png")


def main(arguments: Sequence[str] | None = None, *, program: str = "graftrec run-etl") -> int:
    parser = CommandParser(program, description=f"Raw logs to tables.\n\n{configurations('etl')}", settings=EtlConfig)
    parser.add_argument("job", help="all, or a job's name, which is its table's")
    parser.add_argument("--config", required=True, help="a name under conf/ or a YAML file")
    known, overrides = parser.parse_known_args(arguments)

    def work() -> int:
        run(load(EtlConfig, known.config, overrides), TrackingConfig(), job=known.job)
        return 0

    return run_command("etl", work)
