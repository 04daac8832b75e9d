"""ETL of 1, 10 and 100 million interactions to every table: time against the log's size, and peak memory."""

import itertools
import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml

from tests.benchmarks.__main__ import Options
from tests.benchmarks.harness import Case, Numbers, Report, run
from tests.benchmarks.logs import etl_config, write_log

EVENTS = (1_000_000, 10_000_000, 100_000_000)
EVENTS_PER_USER = 100
ITEMS = 20_000
GIGABYTE = 1 << 30
MEMORY_GB = 8
# The same at every size: memory is a matter of these settings, not of the log.
SPARK: dict[str, object] = {"engine": "spark", "driver_memory": "3g", "shuffle_partitions": 16}


def measure(report: Report, options: Options, *, sizes: tuple[int, ...] = EVENTS) -> None:
    found: list[Numbers] = []
    for events in sizes:
        log = write_log(options.work / f"log-{events}", events=events, users=events // EVENTS_PER_USER, items=ITEMS)
        lake = options.work / f"lake-growth-{events}"
        shutil.rmtree(lake, ignore_errors=True)
        arguments = {"log": str(log), "lake": str(lake), "spark": SPARK}
        numbers = run(Case(f"{events:,}", "tests.benchmarks.growth:etl", arguments), timeout=4 * 3_600)
        sizes_of = {
            table.name: sum(f.stat().st_size for f in table.rglob("*.parquet")) for table in sorted(lake.iterdir())
        }
        found.append({"events": events, "tables": sizes_of, **numbers})
        if events < max(sizes):  # the largest is left for a new day: see new_day.py
            shutil.rmtree(lake, ignore_errors=True)
    jobs = list(found[0]["jobs"])
    report.table(
        f"ETL to every table, engine spark, {SPARK['driver_memory']} heap: seconds",
        ["interactions", "seconds", "interactions/s", "peak GB", *jobs],
        [
            [
                n["events"],
                n["seconds"],
                n["events"] / n["seconds"],
                n["peak_bytes"] / GIGABYTE,
                *(n["jobs"].get(job, 0.0) for job in jobs),
            ]
            for n in found
        ],
    )
    tables = list(found[0]["tables"])
    report.table(
        "Bytes of each table per interaction, and written in all, scratch files too",
        ["interactions", "written", *tables],
        [[n["events"], *(size / n["events"] for size in (n["written_bytes"], *n["tables"].values()))] for n in found],
    )
    for small, large in itertools.pairwise(found):
        grown = (large["seconds"] / small["seconds"]) / (large["events"] / small["events"])
        report.bar(f"time from {small['events']:,} to {large['events']:,}, over linear", grown, at_most=1.15)
    report.bar(f"peak GB at {found[-1]['events']:,}", found[-1]["peak_bytes"] / GIGABYTE, at_most=MEMORY_GB)
    folder = options.work / "reports"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "growth.json").write_text(json.dumps(found))
    picture(found, folder / "growth.png")


def etl(*, log: str, lake: str, spark: dict[str, object]) -> Numbers:
    """``python -m etl all`` on a log; seconds of the command and of each job, as it prints them."""
    config = Path(lake + ".yaml")
    config.write_text(yaml.safe_dump(etl_config(Path(log), Path(lake), spark=spark)))
    begun = time.monotonic()
    output = command(config)
    return {"seconds": time.monotonic() - begun, "jobs": job_seconds(output)}


def command(config: Path) -> str:
    """Run ``python -m etl all``; what it printed. Raises RuntimeError where it fails."""
    done = subprocess.run([sys.executable, "-m", "etl", "all", "--config", str(config)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"etl: exit {done.returncode}: {(done.stderr or done.stdout)[-2_000:]}")
    return done.stdout


def job_seconds(output: str) -> dict[str, float]:
    """Job -> seconds, from the command's lines; a job that was skipped took none."""
    found: dict[str, float] = {}
    for line in output.splitlines():
        line_of_job = re.match(r"\[\d+/\d+\] (\w+)\s+(.*)", line)
        if line_of_job:
            seconds = re.search(r"rows\s+([\d.]+) s ", line_of_job[2])
            found[line_of_job[1]] = float(seconds[1]) if seconds else 0.0
    return found


def picture(found: list[dict[str, Any]], path: Path) -> None:
    """Time and peak memory over the log's size, both axes logarithmic, with a line of linear growth."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    events = [n["events"] for n in found]
    seconds = [n["seconds"] for n in found]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    left.loglog(events, seconds, "o-", color="#1f5fa8", label="measured")
    left.loglog(
        events, [seconds[0] * n / events[0] for n in events], ":", color="#888888", label="linear from the first"
    )
    left.set(xlabel="interactions", ylabel="seconds to every table")
    left.legend(frameon=False)
    right.semilogx(events, [n["peak_bytes"] / GIGABYTE for n in found], "o-", color="#1f5fa8")
    right.axhline(MEMORY_GB, color="#b03030", linestyle="--")
    right.annotate(f"{MEMORY_GB} GB", (events[0], MEMORY_GB), va="bottom", color="#b03030")
    right.set(xlabel="interactions", ylabel="peak memory, GB, all processes", ylim=(0, MEMORY_GB + 1.5))
    for axes in (left, right):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)
