"""The survey's Table 1, and what else one wants to know of a release, computed from its tables without Spark.

Data files are streamed through Arrow a batch at a time; users are compared bucket by bucket, since a user has the same
bucket in every domain. Memory grows with the catalogue and with one bucket's users.
"""

import json
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
from etl.lake.encodings import encodings
from etl.lake.file_reader import open_parquet
from etl.lake.snapshots import check_formats, within
from etl.pipeline.homophily import Homophily, homophily
from etl.pipeline.time_report import TimeSplit, by_time, time_split
from etl.settings import GraftrecError
from etl.tables import (
    DOMAIN_ALL,
    DOMAINS,
    ENTITIES,
    FEATURES,
    INTERACTIONS,
    ITEMS,
    KNOWLEDGE,
    QUARANTINE,
    RELEASES,
    SEQUENCES,
    SOCIAL,
    USERS,
    Table,
)

Ints = npt.NDArray[np.int64]
Pair = tuple[str, str]
Pairs = list[Pair]


@dataclass
class DomainReport:
    """One domain's line of Table 1. `covered`: source of knowledge -> kept items it says something about; `lengths`:
    items of a user's sequence -> users; `degrees` of kept items in the cleaned log, the largest first."""

    name: str
    users: int = 0
    held_out_users: int = 0
    items: int = 0
    described_items: int = 0
    interactions: int = 0
    covered: Counter[str] = field(default_factory=Counter)
    lengths: Counter[int] = field(default_factory=Counter)
    degrees: Ints = field(default_factory=lambda: np.zeros(0, np.int64))

    @property
    def density(self) -> float:
        """Interactions per pair of a user and an item."""
        return self.interactions / (self.users * self.items) if self.users and self.items else 0.0

    @property
    def average_length(self) -> float:
        """Interactions per user that has any."""
        return self.interactions / self.users if self.users else 0.0


@dataclass(frozen=True)
class Coverage:
    """Of one encoder's vectors: how many things of the vocabulary have one (`of` how many), and, of items, how many of
    each domain's kept ones."""

    name: str  # kind/encoder, and the split whose training part was read, if any
    width: int
    things: int
    of: int
    by_domain: dict[str, int]


@dataclass
class Report:
    """Of one release and split.

    `shared_users`: (domain, domain) -> users with items in both; `shared_items` -> kept items of both; `rejected`:
    (kind, reason) -> rows; `examples`: the first row of each, as QUARANTINE has it; `events`: of the cleaned log;
    `related`: relation -> kept items that have it; `days`: days since 1970 -> events of the cleaned log, none where
    times are mere order; `times`: of the first and the last event.
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
    examples: dict[Pair, dict[str, Any]] = field(default_factory=dict)
    time_splits: list[TimeSplit] = field(default_factory=list)
    coverage: list[Coverage] = field(default_factory=list)
    homophily: Homophily | None = None

    @property
    def outside(self) -> int:
        """Rows that were rejected for their times."""
        found = ((kind, reason, count) for (kind, reason), count in self.rejected.items())
        return sum(count for kind, reason, count in found if kind == "interactions" and reason.startswith("time "))


def make_report(lake: str, *, release: int | None = None, split: str | None = None) -> Report:
    """The report on a release (None: the newest) by one of its splits (None: the first by name).

    Raises GraftrecError where there is none.
    """
    check_formats(lake)
    versions, number, settings = _versions(lake, release)
    files = _files(lake, versions, SEQUENCES)
    splits = sorted({str(file.partition["split"]) for file in files})
    chosen = split or (splits[0] if splits else "")
    known = _known(lake, versions)
    members, degrees = _items(lake, versions, known)
    domains = {name: _domain(name, items, known["source"], degrees) for name, items in members.items()}
    pairs = [(a, b) for a in domains for b in domains if a < b and DOMAIN_ALL not in (a, b)]
    users = _users(lake, [file for file in files if file.partition["split"] == chosen], domains, pairs)
    log = _files(lake, versions, INTERACTIONS)
    last = spark_io.last_commit(lake, INTERACTIONS, versions[INTERACTIONS.name])
    events, days, times = _times(lake, log, ordered=last.get("time") == "ordinal")
    good = int(last["good"])
    rejected, examples = rejected_rows(lake, versions)
    return Report(
        lake=lake,
        release=number,
        split=chosen,
        domains=list(domains.values()),
        shared_users=users,
        shared_items={(a, b): len(members[a] & members[b]) for a, b in pairs},
        rejected=rejected,
        duplicates=good - events,
        events=events,
        related={relation: len(heads) for relation, heads in known["relation"].items()},
        days=days,
        times=times,
        examples=examples,
        time_splits=[
            time_split(named, domain, _batches(lake, SEQUENCES, own, ["items", "valid_start", "test_start", "end"]))
            for named in by_time(settings)
            for domain in domains
            if (own := [f for f in files if _is_of(f, named["name"], domain)])
        ],
        coverage=_coverage(lake, versions, members),
        homophily=_homophily(lake, versions, [file for file in files if _is_of(file, chosen, DOMAIN_ALL)]),
    )


def _homophily(lake: str, versions: dict[str, int], sequences: Sequence[DataFile]) -> Homophily | None:
    social = _batches(lake, SOCIAL, _files(lake, versions, SOCIAL), ["user_index", "friend_index"])
    return homophily(social, _batches(lake, SEQUENCES, sequences, ["user", "items", "valid_start"]))


def _is_of(file: DataFile, split: str, domain: str) -> bool:
    return (file.partition["split"], file.partition["domain"]) == (split, domain)


_VOCABULARIES = {"item": ITEMS, "user": USERS, "entity": ENTITIES}


def _coverage(lake: str, versions: dict[str, int], members: dict[str, set[int]]) -> list[Coverage]:
    found = []
    for name, encoding in sorted(encodings(lake, versions.get(FEATURES.name, -1)).items()):
        scope = encoding.partition
        files = [file for file in _files(lake, versions, FEATURES) if within(file, scope)]
        index = {i for batch in _batches(lake, FEATURES, files, ["index"]) for i in batch.column(0).to_pylist()}
        by_domain = {domain: len(items & index) for domain, items in members.items()} if encoding.kind == "item" else {}
        vocabulary = _VOCABULARIES[encoding.kind]
        total = sum(
            batch.num_rows for batch in _batches(lake, vocabulary, _files(lake, versions, vocabulary), ["index"])
        )
        found.append(Coverage(name, encoding.width, len(index), total, by_domain))
    return found


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


def rejected_rows(lake: str, versions: dict[str, int]) -> tuple[Counter[Pair], dict[Pair, dict[str, Any]]]:
    """(kind, reason) -> rows, and the first of them."""
    rejected: Counter[Pair] = Counter()
    examples: dict[Pair, dict[str, Any]] = {}
    for file in _files(lake, versions, QUARANTINE):
        kind, name = str(file.partition["kind"]), str(file.partition["file"])
        for batch in _batches(lake, QUARANTINE, [file], None):
            counts = batch.column("reason").value_counts()
            for reason, count in zip(counts.field(0).to_pylist(), counts.field(1).to_pylist(), strict=True):
                rejected[kind, reason] += count
                if (kind, reason) not in examples:
                    row = batch.slice(pc.index(batch.column("reason"), reason).as_py(), 1).to_pylist()[0]
                    # Of a column that the table has gained since: None.
                    examples[kind, reason] = dict.fromkeys(QUARANTINE.schema.names) | row | {"kind": kind, "file": name}
    return rejected, examples


def _versions(lake: str, release: int | None) -> tuple[dict[str, int], int, dict[str, Any]]:
    """Tables' versions, the release's number, and the configuration that made it."""
    if spark_io.current_version(lake, RELEASES) is None:
        raise GraftrecError(f"the lake {lake} holds no release; run {etl_command(lake)} first")
    found: dict[int, dict[str, Any]] = {}
    for batch in _batches(lake, RELEASES, spark_io.snapshot_files(lake, RELEASES), ["release", "tables", "config"]):
        found |= {row["release"]: row for row in batch.to_pylist()}
    number = max(found) if release is None else release
    if number not in found:
        raise GraftrecError(f"the lake {lake} holds the releases {min(found)} to {max(found)}, expected {release}")
    row = found[number]
    return {entry["table"]: entry["version"] for entry in row["tables"]}, number, json.loads(row["config"])


def _items(
    lake: str, versions: dict[str, int], known: dict[str, dict[str, set[int]]]
) -> tuple[dict[str, set[int]], dict[int, int]]:
    """Domain, `all` first, -> its kept items; kept item -> degree; `known`'s items are cut down to the kept ones."""
    degrees: dict[int, int] = {}
    for batch in _batches(lake, ITEMS, _files(lake, versions, ITEMS), ["index", "kept", "degree"]):
        own = batch.filter(batch.column("kept"))
        degrees |= dict(zip(own.column("index").to_pylist(), own.column("degree").to_pylist(), strict=True))
    kept = degrees.keys()
    for heads in (heads for found in known.values() for heads in found.values()):
        heads.intersection_update(kept)  # `&=` with a view of a dict makes another set
    members: dict[str, set[int]] = {}
    for file in _files(lake, versions, DOMAINS):
        members.setdefault(str(file.partition["domain"]), set()).update(
            index
            for batch in _batches(lake, DOMAINS, [file], ["index"])
            for index in batch.column(0).to_pylist()
            if index in kept
        )
    ordered = sorted(members, key=lambda name: (name != DOMAIN_ALL, name))
    return {name: members[name] for name in ordered}, degrees


def _known(lake: str, versions: dict[str, int]) -> dict[str, dict[str, set[int]]]:
    """``source`` and ``relation`` -> each value of it -> the items that have such knowledge."""
    known: dict[str, dict[str, set[int]]] = {"source": {}, "relation": {}}
    for batch in _batches(lake, KNOWLEDGE, _files(lake, versions, KNOWLEDGE), [*known, "head_index", "head_kind"]):
        if "head_kind" in batch.schema.names:  # of a lake that has gained it
            batch = batch.filter(pc.fill_null(pc.equal(batch.column("head_kind"), "item"), True))
        for column, found in known.items():
            for name in pc.unique(batch.column(column)).to_pylist():
                heads = batch.filter(pc.equal(batch.column(column), name)).column("head_index")
                found.setdefault(name, set()).update(heads.unique().to_pylist())
    return known


def _domain(name: str, members: set[int], sources: dict[str, set[int]], degrees: dict[int, int]) -> DomainReport:
    described = members.intersection(set().union(*sources.values()))
    covered = Counter({source: len(members & heads) for source, heads in sources.items()})
    ranked = np.sort(np.fromiter((degrees[item] for item in members), np.int64, len(members)))[::-1]
    return DomainReport(name, items=len(members), described_items=len(described), covered=covered, degrees=ranked)


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
                lengths = pc.list_value_length(batch.column("items"))
                report.interactions += pc.sum(lengths).as_py() or 0
                each, counts = np.unique(lengths.to_numpy(), return_counts=True)
                report.lengths.update(dict(zip(each.tolist(), counts.tolist(), strict=True)))
                report.held_out_users += pc.sum(pc.less(batch.column("valid_start"), batch.column("end"))).as_py() or 0
            users[name] = np.concatenate([np.zeros(0, np.int64), *found])
        for left, right in pairs:
            shared[left, right] += len(np.intersect1d(users[left], users[right], assume_unique=True))
    return dict(shared)


def _files(lake: str, versions: dict[str, int], table: Table) -> list[DataFile]:
    return spark_io.snapshot_files(lake, table, versions[table.name]) if table.name in versions else []


def _batches(lake: str, table: Table, files: Sequence[DataFile], columns: list[str] | None) -> Iterator[pa.RecordBatch]:
    for file in files:
        with open_parquet(lake, table, file.path) as opened:
            yield from opened.iter_batches(columns=columns)
