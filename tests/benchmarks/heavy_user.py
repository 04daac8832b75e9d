"""One user with 10 M events beside a million ordinary ones: sequences in the memory they take without."""

import shutil
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq

from etl.config import SequencesConfig
from etl.lake.spark_io import snapshot_files
from etl.tables import FIRST_INDEX, SEQUENCES, bucket_of
from tests.benchmarks.__main__ import Options
from tests.benchmarks.harness import Case, Numbers, Report, alternate, median
from tests.benchmarks.lakes import write_lake
from tests.benchmarks.peers_etl import BUCKETS

USERS = 1_000_000
EVENTS = 20_000_000
HEAVY = 10_000_000
ITEMS = 20_000
GB = 2**30


def measure(report: Report, options: Options, *, tenth: bool = False, rounds: int = 1) -> None:
    scale = 10 if tenth else 1
    events, users, heavy = EVENTS // scale, USERS // scale, HEAVY // scale
    lakes = {"without": options.work / f"lake-light-{events}", "with": options.work / f"lake-heavy-{events}"}
    for name, lake in lakes.items():
        more = heavy if name == "with" else 0
        write_lake(lake, events=events, users=users, items=ITEMS, buckets=BUCKETS, heavy=more)
    cases = [
        Case(f"{engine}, {name}", "tests.benchmarks.peers_etl:ours", {"lake": str(lake), "engine": engine})
        for engine in ("spark", "sail")
        for name, lake in lakes.items()
    ]
    found = alternate(cases, rounds=rounds)
    kept = min(heavy, SequencesConfig().max_events)
    report.table(
        f"{users:,} users with {events:,} events, without and with one of {heavy:,}, of which {kept:,} are kept",
        ["engine, heavy user", "seconds", "peak GB", "events in sequences"],
        [[name, median(n, "seconds"), median(n, "peak_bytes") / GB, n[0]["events"]] for name, n in found.items()],
    )
    for engine in ("spark", "sail"):
        with_heavy, without = found[f"{engine}, with"], found[f"{engine}, without"]
        ratio = median(with_heavy, "peak_bytes") / median(without, "peak_bytes")
        report.bar(f"peak memory with the heavy user over without, {engine}", ratio, at_most=1.1)
        report.bar(f"events missing, {engine}", abs(with_heavy[0]["events"] - events - kept), at_most=0)
    read = newest(lake=str(lakes["with"]), user=users)
    report.bar("events of the heavy user that aren't its newest", read["wrong"], at_most=0)
    for lake in lakes.values():
        shutil.rmtree(lake / SEQUENCES.name)


def newest(*, lake: str, user: int) -> Numbers:
    """How the heavy user's row differs from its newest events in the log, by time alone."""
    name, bucket = f"u{user}", bucket_of(f"u{user}", BUCKETS)
    times = []
    for path in sorted((Path(lake) / "interactions").glob(f"bucket={bucket}/*.parquet")):
        for batch in pq.ParquetFile(path).iter_batches(columns=["user", "time"], use_threads=False):
            times.append(batch.filter(pc.equal(batch["user"], name))["time"].to_numpy())
    for file in snapshot_files(lake, SEQUENCES, None, {"bucket": [bucket]}):
        rows = pq.read_table(Path(lake) / "sequences" / file.path, columns=["user", "times"])
        row = rows.filter(pc.equal(rows["user"], user + FIRST_INDEX))
        if len(row):
            found = row["times"][0].values.to_numpy()
            expected = np.sort(np.concatenate(times))[-len(found) :]
            return {"wrong": int((found != expected).sum())}
    raise AssertionError(f"{name} has no sequence")
