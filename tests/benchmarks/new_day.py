"""ETL again after a new day: 1 % more events, from 1 % of the users, some new users and some new items.

On Sail the run after the new day against a full run, job by job, and on both engines its tables against those of a
fresh lake made from both files: equal up to the numbering of indices, which is mapped back to raw ids. Negatives keep
what was drawn, so of them it is checked that users, protocols and parts are the same, that they are valid, and that
what could stay stayed.

On Spark, whose smallest job takes seconds whatever it does, the time of a day counts where there is a log to speak of:
on the lake that `growth` leaves, against its full run.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from tests.benchmarks.__main__ import Options
from tests.benchmarks.growth import EVENTS_PER_USER, ITEMS, SPARK
from tests.benchmarks.harness import Case, Numbers, Report, run
from tests.benchmarks.logs import LOG_DAYS, START, ids, write_log

EVENTS = {"sail": 20_000_000, "spark": 2_000_000}
LARGE = 20_000_000  # events
MOST = 0.2  # of the full run's time
_ETL = "tests.benchmarks.growth:etl"
_NEGATIVES = ["split", "domain", "protocol", "part", "user"]


def measure(report: Report, options: Options) -> None:
    for engine, events in EVENTS.items():
        against_a_rebuild(report, options, events=events, engine=engine)
    after_growth(report, options)


def against_a_rebuild(report: Report, options: Options, *, events: int, engine: str) -> None:
    """A full run, a new day, and a full run of both files; the bar of time where the log is large enough."""
    spark = SPARK | {"engine": engine}
    users = events // EVENTS_PER_USER
    log = write_log(options.work / f"log-{events}", events=events, users=users, items=ITEMS)
    both = write_day(log, options.work / f"log-{events}-and-a-day", events=events, users=users)
    lakes = {name: options.work / f"lake-day-{engine}-{name}" for name in ("increment", "rebuild")}
    for lake in lakes.values():
        shutil.rmtree(lake, ignore_errors=True)
    found: dict[str, Numbers] = {}
    for name, root, lake in (
        ("full", log, lakes["increment"]),
        ("new day", both, lakes["increment"]),
        ("rebuild", both, lakes["rebuild"]),
    ):
        found[name] = run(Case(name, _ETL, {"log": str(root), "lake": str(lake), "spark": spark}), timeout=4 * 3_600)
    _table(report, f"{events:,} interactions and a new day of {events // 100:,}, {engine}: seconds", found)
    if events >= LARGE:
        full = min(found["full"]["seconds"], found["rebuild"]["seconds"])
        report.bar(f"after a new day, over a full run, {engine}", found["new day"]["seconds"] / full, at_most=MOST)
    arguments = {name: str(lake) for name, lake in lakes.items()}
    compared = run(Case("compare", "tests.benchmarks.new_day:compare", arguments))["tables"]
    columns = ["table", "rows", "rows that differ"]
    report.table("The new day's tables against the rebuild's", columns, [[t, *c] for t, c in compared.items()])
    report.bar(f"rows that differ from a rebuild's, {engine}", sum(c[1] for c in compared.values()), at_most=0)
    for lake in lakes.values():
        shutil.rmtree(lake)


def after_growth(report: Report, options: Options) -> None:
    """A new day on the largest lake of `growth`, which is used up."""
    try:
        full: Numbers = json.loads((options.work / "reports" / "growth.json").read_text())[-1]
    except OSError:
        full = {"events": 0}
    events, lake = full["events"], options.work / f"lake-growth-{full['events']}"
    if not lake.exists():
        report.skip("a new day on Spark", "run `growth` before, which leaves its largest lake")
        return
    users = events // EVENTS_PER_USER
    log = write_log(options.work / f"log-{events}", events=events, users=users, items=ITEMS)
    both = write_day(log, options.work / f"log-{events}-and-a-day", events=events, users=users)
    arguments = {"log": str(both), "lake": str(lake), "spark": SPARK}
    found = {"full": full, "new day": run(Case("new day", _ETL, arguments), timeout=4 * 3_600)}
    _table(report, f"{events:,} interactions and a new day of {events // 100:,}, spark: seconds", found)
    report.bar("after a new day, over a full run, spark", found["new day"]["seconds"] / full["seconds"], at_most=MOST)
    shutil.rmtree(lake)


def _table(report: Report, title: str, found: dict[str, Numbers]) -> None:
    jobs = list(found["full"]["jobs"])
    rows = [
        [name, n["seconds"], n["peak_bytes"] / 2**30, *(n["jobs"].get(j, 0.0) for j in jobs)]
        for name, n in found.items()
    ]
    report.table(title, ["run", "all", "peak GB", *jobs], rows)


def write_day(log: Path, folder: Path, *, events: int, users: int) -> Path:
    """`log` and one file more: a hundredth of its events, of a hundredth of its users and a few new ones, some of new
    items, all later than its own; the items file gains the new items."""
    (folder / "events").mkdir(parents=True, exist_ok=True)
    for file in (log / "events").glob("*.parquet"):
        if not (folder / "events" / file.name).exists():
            (folder / "events" / file.name).hardlink_to(file)
    random = np.random.default_rng(events)
    size, new_users, new_items = events // 100, max(users // 1_000, 1), max(ITEMS // 1_000, 1)
    active = np.concatenate([random.choice(users, users // 100, replace=False), np.arange(users, users + new_users)])
    user = random.choice(active, size)
    popular = (np.arange(ITEMS + new_items) + 10.0) ** -0.9
    item = random.choice(ITEMS + new_items, size, p=random.permutation(popular / popular.sum()))
    first = START + LOG_DAYS * 86_400_000_000
    time = np.sort(random.integers(first, first + 86_400_000_000, size))
    day = pa.table({"user": ids("u", user), "item": ids("i", item), "time": time})
    pq.write_table(day, folder / "events" / "99999.parquet", compression="zstd")
    number = np.arange(ITEMS, ITEMS + new_items)
    old = pq.read_table(log / "items.parquet")
    new = pa.table({"item": ids("i", number), "category": pa.array(np.where(number % 3 == 2, "target", "source"))})
    pq.write_table(pa.concat_tables([old, new]), folder / "items.parquet")
    return folder


def compare(*, increment: str, rebuild: str) -> dict[str, Any]:
    """Table -> (rows of the increment's, rows that only one of the two has)."""
    ours, theirs = _Lake(Path(increment)), _Lake(Path(rebuild))
    tables: dict[str, tuple[int, int]] = {}
    for name in ("items", "users", "domains", "knowledge", "quarantine"):
        tables[name] = _differing(ours.plain(name), theirs.plain(name))
    for name in ("interactions", "sequences", "baskets"):
        counts = [_differing(ours.bucket(name, b), theirs.bucket(name, b)) for b in ours.buckets(name)]
        tables[name] = (sum(c[0] for c in counts), sum(c[1] for c in counts))
    wrong = 0
    counts = []
    for b in ours.buckets("negatives"):
        mine, fresh = ours.bucket("negatives", b), theirs.bucket("negatives", b)
        counts.append(_differing(mine.select(_NEGATIVES), fresh.select(_NEGATIVES)))
        wrong += ours.invalid_negatives(b)
    tables["negatives"] = (sum(c[0] for c in counts), sum(c[1] for c in counts) + wrong)
    return {"tables": tables}


class _Lake:
    """Tables of a lake with indices as raw ids."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._ids = {}
        for kind in ("item", "user"):
            table = pl.read_delta(str(root / f"{kind}s")).sort("index")
            first = int(table["index"][0])
            assert table["index"].to_list() == list(range(first, first + len(table)))  # dense
            self._ids[kind] = (first, table[kind])

    def plain(self, name: str) -> pl.DataFrame:
        table = pl.read_delta(str(self.root / name))
        return table.drop([c for c in table.columns if c == "index" or c.endswith("_index")])

    def buckets(self, name: str) -> list[int]:
        return sorted(
            pl.scan_delta(str(self.root / name)).select(pl.col("bucket").unique()).collect()["bucket"].to_list()
        )

    def bucket(self, name: str, bucket: int, *, version: int | None = None) -> pl.DataFrame:
        table = pl.scan_delta(str(self.root / name), version=version).filter(bucket=bucket).collect()
        if table["user"].dtype != pl.String:
            table = table.with_columns(user=self._raw("user", table["user"]), items=self._lists(table["items"]))
        return table

    def invalid_negatives(self, bucket: int) -> int:
        """Rows that hold an item twice, a seen one, or other than a hundred of at least as many (there are more here);
        or that lack one of the version before which the user hasn't taken."""
        seen = self.bucket("sequences", bucket).select("split", "domain", "user", seen="items")
        now = self.bucket("negatives", bucket).join(seen, on=["split", "domain", "user"], how="left")
        twice = now["items"].list.n_unique() != 100
        short = now["items"].list.len() != 100
        taken = now.select(pl.col("items").list.set_intersection("seen").list.len())["items"] != 0
        invalid = (twice | short | taken).fill_null(True)
        before = self.bucket("negatives", bucket, version=self._first("negatives")).select(*_NEGATIVES, old="items")
        both = now.join(before, on=_NEGATIVES)
        lost = both.select(
            pl.col("old").list.set_difference("seen").list.set_difference("items").list.len().alias("lost")
        )["lost"]
        return int(invalid.sum()) + int((lost > 0).sum())

    def _first(self, name: str) -> int:
        """The version that the first full run left: the release says."""
        releases = pl.read_delta(str(self.root / "releases")).sort("release")
        return next(entry["version"] for entry in releases["tables"][0] if entry["table"] == name)

    def _raw(self, kind: str, indices: pl.Series) -> pl.Series:
        first, names = self._ids[kind]
        return names.gather(indices.cast(pl.Int64) - first)

    def _lists(self, lists: pl.Series) -> pl.Series:
        arrow = lists.to_arrow()
        values = self._raw("item", pl.from_arrow(arrow.values)).to_arrow()
        return pl.from_arrow(pa.LargeListArray.from_arrays(arrow.offsets, values))


def _differing(left: pl.DataFrame, right: pl.DataFrame) -> tuple[int, int]:
    """Rows of `left`; rows (as a multiset, by a hash of all columns) that one has and the other lacks."""
    columns = sorted(left.columns)
    if sorted(right.columns) != columns:
        return len(left), len(left) + len(right)
    hashes = [np.sort(_hash(table.select(columns))) for table in (left, right)]
    common = np.intersect1d(*hashes, assume_unique=False)
    counts = [np.searchsorted(h, common, "right") - np.searchsorted(h, common) for h in hashes]
    return len(left), len(left) + len(right) - 2 * int(np.minimum(*counts).sum())


def _hash(table: pl.DataFrame) -> np.ndarray:
    """Of each row; lists as their text, for Polars doesn't hash rows of lists alike in two frames."""
    flat = table.with_columns(
        pl.col(name).cast(pl.List(pl.String)).list.eval(pl.element().fill_null("∅")).list.join(",")
        if dtype.inner in (pl.String, pl.Int64, pl.Int32, pl.Float32)
        else pl.col(name).list.eval(pl.element().struct.json_encode()).list.join(",")
        for name, dtype in table.schema.items()
        if isinstance(dtype, pl.List)
    )
    return flat.hash_rows(seed=1).to_numpy()
