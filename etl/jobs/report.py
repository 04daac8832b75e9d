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
import pyarrow.parquet as pq

from etl import delta
from etl.config import GraftrecError
from etl.datafile import DataFile
from etl.tables import DOMAIN_ALL, DOMAINS, INTERACTIONS, ITEMS, KNOWLEDGE, QUARANTINE, RELEASES, SEQUENCES, Table

Ints = npt.NDArray[np.int64]


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

    `shared_users`: (domain, domain) -> users with items in both; `rejected`: (kind, reason) -> rows; `events`: of the
    cleaned log; `related`: relation -> kept items that have it.
    """

    lake: str
    release: int
    split: str
    domains: list[DomainReport]
    shared_users: dict[tuple[str, str], int]
    rejected: Counter[tuple[str, str]]
    duplicates: int
    events: int
    related: dict[str, int]


def make_report(lake: str, *, release: int | None = None, split: str | None = None) -> Report:
    """The report on a release (None: the newest) by one of its splits (None: the first by name).

    Raises GraftrecError where there is none.
    """
    versions, number = _versions(lake, release)
    files = _files(lake, versions, SEQUENCES)
    splits = sorted({str(file.partition["split"]) for file in files})
    chosen = split or (splits[0] if splits else "")
    domains, related = _items(lake, versions)
    shared = _users(lake, [file for file in files if file.partition["split"] == chosen], domains)
    rejected: Counter[tuple[str, str]] = Counter()
    for file in _files(lake, versions, QUARANTINE):
        for batch in _batches(lake, QUARANTINE, [file], ["reason"]):
            counts = batch.column(0).value_counts()
            for reason, count in zip(counts.field(0).to_pylist(), counts.field(1).to_pylist(), strict=True):
                rejected[str(file.partition["kind"]), reason] += count
    log = _files(lake, versions, INTERACTIONS)
    events = sum(batch.num_rows for batch in _batches(lake, INTERACTIONS, log, ["time"]))
    good = int(delta.last_commit(lake, INTERACTIONS, versions[INTERACTIONS.name])["good"])
    return Report(lake, number, chosen, list(domains.values()), shared, rejected, good - events, events, related)


def _versions(lake: str, release: int | None) -> tuple[dict[str, int], int]:
    if delta.current_version(lake, RELEASES) is None:
        raise GraftrecError(f"the lake {lake} holds no release; run `python -m etl all --lake {lake}` first")
    found: dict[int, list[dict[str, Any]]] = {}
    for batch in _batches(lake, RELEASES, delta.snapshot_files(lake, RELEASES), ["release", "tables"]):
        found |= {row["release"]: row["tables"] for row in batch.to_pylist()}
    number = max(found) if release is None else release
    if number not in found:
        raise GraftrecError(f"the lake {lake} holds the releases {min(found)} to {max(found)}, expected {release}")
    return {entry["table"]: entry["version"] for entry in found[number]}, number


def _items(lake: str, versions: dict[str, int]) -> tuple[dict[str, DomainReport], dict[str, int]]:
    """Domains with what is known of their kept items, and relation -> kept items that have it."""
    kept: list[Ints] = []
    for batch in _batches(lake, ITEMS, _files(lake, versions, ITEMS), ["index", "kept"]):
        kept.append(batch.filter(batch.column("kept")).column("index").to_numpy().astype(np.int64))
    told: dict[str, set[int]] = {}
    related: dict[str, set[int]] = {}
    for batch in _batches(lake, KNOWLEDGE, _files(lake, versions, KNOWLEDGE), ["source", "relation", "head_index"]):
        for column, found in (("source", told), ("relation", related)):
            for name in pc.unique(batch.column(column)).to_pylist():
                heads = batch.filter(pc.equal(batch.column(column), name)).column("head_index")
                found.setdefault(name, set()).update(heads.unique().to_pylist())
    is_kept = set(np.concatenate([np.zeros(0, np.int64), *kept]).tolist())
    domains: dict[str, DomainReport] = {}
    for file in _files(lake, versions, DOMAINS):
        report = domains.setdefault(str(file.partition["domain"]), DomainReport(str(file.partition["domain"])))
        for batch in _batches(lake, DOMAINS, [file], ["index"]):
            members = is_kept.intersection(batch.column(0).to_pylist())
            report.items += len(members)
            report.described_items += len(members.intersection(*[set().union(*told.values())]))
            for source, heads in told.items():
                report.covered[source] += len(members & heads)
    first = sorted(domains, key=lambda name: (name != DOMAIN_ALL, name))
    return {name: domains[name] for name in first}, {name: len(heads & is_kept) for name, heads in related.items()}


def _users(lake: str, files: Sequence[DataFile], domains: dict[str, DomainReport]) -> dict[tuple[str, str], int]:
    """Count users and interactions of each domain, and the users that two domains share."""
    shared: Counter[tuple[str, str]] = Counter()
    buckets = sorted({str(file.partition["bucket"]) for file in files}, key=int)
    pairs = [(a, b) for a in domains for b in domains if a < b and DOMAIN_ALL not in (a, b)]
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
    return delta.snapshot_files(lake, table, versions[table.name]) if table.name in versions else []


def _batches(lake: str, table: Table, files: Sequence[DataFile], columns: list[str]) -> Iterator[pa.RecordBatch]:
    filesystem = delta.table_filesystem(lake, table)
    for file in files:
        with filesystem.open_input_file(file.path) as opened:
            yield from pq.ParquetFile(opened).iter_batches(columns=columns)


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
    told = [f"Release {report.release} of {report.lake}, split {report.split}:"]
    for row in [titles, *rows]:
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        told.append("  ".join([row[0].ljust(widths[0]), *cells[1:]]))
    if report.related:
        known = ", ".join(f"{relation} of {count:,}" for relation, count in sorted(report.related.items()))
        told.append(f"known: {known} items")
    for (left, right), count in report.shared_users.items():
        told.append(f"users in both {left} and {right}: {count:,}")
    told.append(f"{report.events:,} events after cleaning; {report.duplicates:,} exact duplicates dropped")
    told.append(f"{sum(report.rejected.values()):,} rows in quarantine")
    for (kind, reason), count in report.rejected.most_common(10):
        told.append(f"  {count:,} of {kind}: {reason}")
    return told


def print_report(lake: str) -> None:
    """Print the report on the newest release. Raises GraftrecError."""
    for line in lines(make_report(lake)):
        print(line, flush=True)
