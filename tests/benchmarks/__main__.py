"""``python -m tests.benchmarks SUITE [--only NAME…] [--data FOLDER] [--work FOLDER]``.

Each benchmark is a module of this package with ``measure(report, options)``, which prints tables and holds bars.
"""

import argparse
import importlib
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from tests.benchmarks.harness import Report, machine

SUITES = {
    "bench": ("stream", "train_small", "train_survey", "threads", "catalogue", "score", "patches"),
    "gpu": ("train_gpu",),
    "features": ("encoders", "knowledge_graphs"),
    "peers": ("peers_stream", "peers_train", "peers_score", "peers_etl"),
    "demo": ("demo",),
    "planted": ("planted_features",),
    "growth": ("growth", "new_day", "heavy_user"),
    "times": ("train_time",),
    "serving": ("serving",),
}
_PACKAGES = ("torch", "pyspark", "pysail", "pyarrow", "deltalake", "polars", "duckdb", "numpy")


@dataclass(frozen=True)
class Options:
    """`data`: a folder of MovieLens-1M (ratings.dat), of the suite `features` one of FB15k-237
    (train2id.txt), or None: a generated log of its shape; `work`: where benchmarks
    put their lakes and peers' environments, kept between runs; `only`: of the suite `demo`, beginnings of runs' names
    (seed-0, null, statistics), all where empty."""

    data: Path | None
    work: Path
    only: tuple[str, ...] = ()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("suite", choices=SUITES)
    parser.add_argument("--only", nargs="*", help="some of the suite's benchmarks, or of the demo's runs")
    parser.add_argument("--data", type=Path, default=None, help="a folder of MovieLens-1M; of FB15k-237 for features")
    parser.add_argument("--work", type=Path, default=Path(".bench"), help="scratch space, kept between runs")
    given = parser.parse_args()
    only = tuple(given.only or ())
    chosen = [name for name in SUITES[given.suite] if not only or name in only or given.suite == "demo"]
    if not chosen:
        parser.error(f"--only: expected some of {', '.join(SUITES[given.suite])}")
    options = Options(given.data, given.work.absolute(), only)
    options.work.mkdir(parents=True, exist_ok=True)
    report = Report(given.suite)
    report.say(f"# {given.suite}\n\n{machine(_PACKAGES)}")
    begun = time.monotonic()
    for name in chosen:
        report.say(f"\n## {name}")
        importlib.import_module(f"tests.benchmarks.{name}").measure(report, options)
    report.say(f"\n{(time.monotonic() - begun) / 60:.1f} minutes")
    return report.end(options.work / "reports")


if __name__ == "__main__":
    sys.exit(main())
