"""The survey's Table 1, and what else one wants to know of a release, computed from its tables without Spark.

Data files are streamed through Arrow a batch at a time; users are compared bucket by bucket, since a user has the same
bucket in every domain. Memory grows with the catalogue and with one bucket's users.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from etl.config import etl_command
from etl.jobs import event_times
from etl.lake import spark_io
from etl.lake.datafile import DataFile
from etl.lake.file_reader import open_parquet
from etl.lake.snapshots import check_formats
from etl.settings import GraftrecError
from etl.tables import DOMAIN_ALL, DOMAINS, INTERACTIONS, ITEMS, KNOWLEDGE, QUARANTINE, RELEASES, SEQUENCES, Table

_BARS = 30  # of the histogram of times, at most
Ints = npt.NDArray[np.int64]
Pair = tuple[str, str]
Pairs = list[Pair]


@dataclass
class DomainReport:
    """One domain's line of Table 1. `covered`: source of knowledge -> kept items it says something about."""

    name: str
    users: int = 0
    held_out_users: int = 0
    items: int = 0
    described_items: int = 0
    interactions: int = 0
    covered: Counter[str] = field(default_factory=Counter)

    @property
    def average_length(self) -> float:
        """Interactions per user that has any."""
        return self.interactions / self.users if self.users else 0.0


@dataclass
class Report:
    """Of one release and split.

    `shared_users`: (domain, domain) -> users with items in both; `shared_items` -> kept items of both; `rejected`:
    (kind, reason) -> rows; `events`: of the cleaned log; `related`: relation -> kept items that have it; `days`: days
    since 1970 -> events of the cleaned log, none where times are mere order; `times`: of the first and the last event.
    """

    lake: str
    release: int
    split: str
    domains: list[DomainReport]
    shared_users: dict[Pair, int]
    shared_items: dict[Pair, int]
    rejected: Counter[Pair]
    duplicates: int
    events: int
    related: dict[str, int]
    days: Counter[int] = field(default_factory=Counter)
    times: tuple[int, int] | None = None


def make_report(lake: str, *, release: int | None = None, split: str | None = None) -> Report:
    """The report on a release (None: the newest) by one of its splits (None: the first by name).

    Raises GraftrecError where there is none.
    """
    check_formats(lake)
    versions, number = _versions(lake, release)
    files = _files(lake, versions, SEQUENCES)
    splits = sorted({str(file.partition["split"]) for file in files})
    chosen = split or (splits[0] if splits else "")
    known = _known(lake, versions)
    members = _items(lake, versions, known)
    domains = {name: _domain(name, items, known["source"]) for name, items in members.items()}
    pairs = [(a, b) for a in domains for b in domains if a < b and DOMAIN_ALL not in (a, b)]
    users = _users(lake, [file for file in files if file.partition["split"] == chosen], domains, pairs)
    log = _files(lake, versions, INTERACTIONS)
    last = spark_io.last_commit(lake, INTERACTIONS, versions[INTERACTIONS.name])
    events, days, times = _times(lake, log, ordered=last.get("time") == "ordinal")
    good = int(last["good"])
    return Report(
        lake=lake,
        release=number,
        split=chosen,
        domains=list(domains.values()),
        shared_users=users,
        shared_items={(a, b): len(members[a] & members[b]) for a, b in pairs},
        rejected=_rejected(lake, versions),
        duplicates=good - events,
        events=events,
        related={relation: len(heads) for relation, heads in known["relation"].items()},
        days=days,
        times=times,
    )


def _times(lake: str, log: Sequence[DataFile], *, ordered: bool) -> tuple[int, Counter[int], tuple[int, int] | None]:
    """Events, and, where times aren't mere order, events by day, and the first and the last time."""
    events, bounds = 0, []
    days: Counter[int] = Counter()
    for batch in _batches(lake, INTERACTIONS, log, ["time"]):
        events += batch.num_rows
        if batch.num_rows and not ordered:
            time = batch.column(0).to_numpy()
            bounds += [int(time.min()), int(time.max())]
            found, counts = np.unique(time // event_times.DAY, return_counts=True)
            days.update(dict(zip(found.tolist(), counts.tolist(), strict=True)))
    return events, days, (min(bounds), max(bounds)) if bounds else None


def _rejected(lake: str, versions: dict[str, int]) -> Counter[Pair]:
    rejected: Counter[Pair] = Counter()
    for file in _files(lake, versions, QUARANTINE):
        for batch in _batches(lake, QUARANTINE, [file], ["reason"]):
            counts = batch.column(0).value_counts()
            for reason, count in zip(counts.field(0).to_pylist(), counts.field(1).to_pylist(), strict=True):
                rejected[str(file.partition["kind"]), reason] += count
    return rejected


def _versions(lake: str, release: int | None) -> tuple[dict[str, int], int]:
    if spark_io.current_version(lake, RELEASES) is None:
        raise GraftrecError(f"the lake {lake} holds no release; run {etl_command(lake)} first")
    found: dict[int, list[dict[str, Any]]] = {}
    for batch in _batches(lake, RELEASES, spark_io.snapshot_files(lake, RELEASES), ["release", "tables"]):
        found |= {row["release"]: row["tables"] for row in batch.to_pylist()}
    number = max(found) if release is None else release
    if number not in found:
        raise GraftrecError(f"the lake {lake} holds the releases {min(found)} to {max(found)}, expected {release}")
    return {entry["table"]: entry["version"] for entry in found[number]}, number


def _items(lake: str, versions: dict[str, int], known: dict[str, dict[str, set[int]]]) -> dict[str, set[int]]:
    """Domain, `all` first, -> its kept items; `known`'s items are cut down to the kept ones."""
    kept: set[int] = set()
    for batch in _batches(lake, ITEMS, _files(lake, versions, ITEMS), ["index", "kept"]):
        kept.update(batch.filter(batch.column("kept")).column("index").to_pylist())
    for heads in (heads for found in known.values() for heads in found.values()):
        heads &= kept
    members: dict[str, set[int]] = {}
    for file in _files(lake, versions, DOMAINS):
        own = members.setdefault(str(file.partition["domain"]), set())
        for batch in _batches(lake, DOMAINS, [file], ["index"]):
            own |= kept.intersection(batch.column(0).to_pylist())
    return {name: members[name] for name in sorted(members, key=lambda name: (name != DOMAIN_ALL, name))}


def _known(lake: str, versions: dict[str, int]) -> dict[str, dict[str, set[int]]]:
    """``source`` and ``relation`` -> each value of it -> the items that have such knowledge."""
    known: dict[str, dict[str, set[int]]] = {"source": {}, "relation": {}}
    for batch in _batches(lake, KNOWLEDGE, _files(lake, versions, KNOWLEDGE), [*known, "head_index"]):
        for column, found in known.items():
            for name in pc.unique(batch.column(column)).to_pylist():
                heads = batch.filter(pc.equal(batch.column(column), name)).column("head_index")
                found.setdefault(name, set()).update(heads.unique().to_pylist())
    return known


def _domain(name: str, members: set[int], sources: dict[str, set[int]]) -> DomainReport:
    described = members.intersection(set().union(*sources.values()))
    covered = Counter({source: len(members & heads) for source, heads in sources.items()})
    return DomainReport(name, items=len(members), described_items=len(described), covered=covered)


def _users(lake: str, files: Sequence[DataFile], domains: dict[str, DomainReport], pairs: Pairs) -> dict[Pair, int]:
    """Count users and interactions of each domain, and the users that two domains share."""
    shared: Counter[Pair] = Counter()
    buckets = sorted({str(file.partition["bucket"]) for file in files}, key=int)
    for bucket in buckets:
        users: dict[str, Ints] = {}
        for name, report in domains.items():
            own = [f for f in files if f.partition["domain"] == name and f.partition["bucket"] == bucket]
            found = []
            for batch in _batches(lake, SEQUENCES, own, ["user", "items", "valid_start", "end"]):
                found.append(batch.column("user").to_numpy().astype(np.int64))
                report.users += batch.num_rows
                report.interactions += pc.sum(pc.list_value_length(batch.column("items"))).as_py() or 0
                report.held_out_users += pc.sum(pc.less(batch.column("valid_start"), batch.column("end"))).as_py() or 0
            users[name] = np.concatenate([np.zeros(0, np.int64), *found])
        for left, right in pairs:
            shared[left, right] += len(np.intersect1d(users[left], users[right], assume_unique=True))
    return dict(shared)


def _files(lake: str, versions: dict[str, int], table: Table) -> list[DataFile]:
    return spark_io.snapshot_files(lake, table, versions[table.name]) if table.name in versions else []


def _batches(lake: str, table: Table, files: Sequence[DataFile], columns: list[str]) -> Iterator[pa.RecordBatch]:
    for file in files:
        with open_parquet(lake, table, file.path) as opened:
            yield from opened.iter_batches(columns=columns)


def lines(report: Report) -> list[str]:
    """The report as text."""
    sources = sorted({source for domain in report.domains for source in domain.covered})
    titles = ["domain", "users", "with hold-out", "items", "with metadata", *(f"from {s}" for s in sources)]
    titles += ["interactions", "average length"]
    rows = [
        [
            domain.name,
            f"{domain.users:,}",
            f"{domain.held_out_users:,}",
            f"{domain.items:,}",
            f"{domain.described_items:,}",
            *(f"{domain.covered[source]:,}" for source in sources),
            f"{domain.interactions:,}",
            f"{domain.average_length:.1f}",
        ]
        for domain in report.domains
    ]
    widths = [max(len(row[column]) for row in [titles, *rows]) for column in range(len(titles))]
    lines = [f"Release {report.release} of {report.lake}, split {report.split}:"]
    for row in [titles, *rows]:
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        lines.append("  ".join([row[0].ljust(widths[0]), *cells[1:]]))
    if report.related:
        known = ", ".join(f"{relation} of {count:,}" for relation, count in sorted(report.related.items()))
        lines.append(f"known: {known} items")
    for (left, right), count in report.shared_users.items():
        items = report.shared_items[left, right]
        lines.append(f"in both {left} and {right}: {count:,} users, {items:,} items")
    lines.append(f"{report.events:,} events after cleaning; {report.duplicates:,} exact duplicates dropped")
    lines += _histogram(report)
    lines.append(f"{sum(report.rejected.values()):,} rows in quarantine")
    for (kind, reason), count in report.rejected.most_common(10):
        lines.append(f"  {count:,} of {kind}: {reason}")
    return lines


def _histogram(report: Report) -> list[str]:
    """First and last time, the share of rows rejected for their times, and events by day, or by several days."""
    if report.times is None:
        return []
    first, last = report.times
    outside = sum(
        count
        for (kind, reason), count in report.rejected.items()
        if kind == "interactions" and reason.startswith("time ")
    )
    share = outside / (report.events + report.duplicates + sum(report.rejected.values()))
    span = max(report.days) - min(report.days) + 1
    width = -(-span // _BARS)
    lines = [
        f"times {event_times.written(first)} to {event_times.written(last)} UTC; {outside:,} rows ({share:.2%}) "
        f"rejected for theirs; events by {'day' if width == 1 else f'{width} days'}:"
    ]
    bars: Counter[int] = Counter()
    for day, count in report.days.items():
        bars[(day - min(report.days)) // width] += count
    highest = max(bars.values())
    for place in range(-(-span // width)):
        start = event_times.written((min(report.days) + place * width) * event_times.DAY)[:10]
        lines.append(f"  {start} {bars[place]:>12,} {'#' * -(-bars[place] * 40 // highest)}")
    return lines


def print_report(lake: str) -> None:
    """Print the report on the newest release. Raises GraftrecError."""
    for line in lines(make_report(lake)):
        print(line, flush=True)
