"""What a round's folder holds: rows of its tables, weights, registry and MLflow runs, read without graftrec."""

import hashlib
import json
import sqlite3
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from deltalake import DeltaTable

_VOLATILE = {
    "releases": {"created", "config", "config_hash", "code_version", "tables", "release"},
    "deliveries": {"delivered"},  # when
}
EMPTY = "no rows"


@dataclass(frozen=True)
class Contents:
    """Digests, so that two of them can be compared.

    `tables`: table -> its newest rows; `released`: table -> rows of the newest release's version; `weights`: file ->
    bytes; `registry`: model -> hashes of its versions, and of its champion; `trials`: file of a search -> what each of
    its trials proposed and gave.
    """

    tables: dict[str, str] = field(default_factory=dict)
    released: dict[str, str] = field(default_factory=dict)
    weights: dict[str, str] = field(default_factory=dict)
    registry: dict[str, Any] = field(default_factory=dict)
    trials: dict[str, str] = field(default_factory=dict)

    def as_json(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)

    def differences(self, other: "Contents") -> list[str]:
        """The parts, and the names in them, that differ."""
        found = []
        for part, mine in asdict(self).items():
            theirs = getattr(other, part)
            names = sorted(mine.keys() | theirs.keys())
            found += [f"{part}: {name}" for name in names if mine.get(name) != theirs.get(name)]
        return found


def read_contents(folder: Path, store: Path | None = None, models: str = "") -> Contents:
    """`store`: MLflow's database, the folder's own where None; `models`: beginning of the registered models' names."""
    lake = folder / "lake"
    tables = {path.name: rows(DeltaTable(path)) for path in sorted(lake.glob("*/")) if has_version(path)}
    weights = {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.glob("runs/**/model/*.safetensors"))
    }
    trials = {str(path.relative_to(folder)): _trials(path) for path in sorted(folder.glob("runs/*/*/trials.json"))}
    return Contents(tables, released(lake), weights, registry(store or folder / "mlflow.db", models), trials)


def has_version(table: Path) -> bool:
    """Whether a commit has landed. One that was killed leaves a log without an entry, which is no table yet."""
    return any((table / "_delta_log").glob("*.json"))


def _trials(file: Path) -> str:
    """A digest of a search's trials but for the time they took."""
    trials = [{name: value for name, value in row.items() if name != "seconds"} for row in json.loads(file.read_text())]
    return hashlib.sha256(json.dumps(trials, sort_keys=True).encode()).hexdigest()[:16]


def rows(table: DeltaTable) -> str:
    """A digest of a table's rows, in any order."""
    found = table.to_pyarrow_table()
    name = Path(table.table_uri.rstrip("/")).name
    columns = sorted(set(found.column_names) - _VOLATILE.get(name, set()))
    if found.num_rows == 0:
        return EMPTY
    lines = sorted(repr(sorted(row.items())) for row in found.select(columns).to_pylist())
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def releases(lake: Path) -> list[dict[str, int]]:
    """Table -> version, of each release, oldest first."""
    if not has_version(lake / "releases"):
        return []
    found = DeltaTable(lake / "releases").to_pyarrow_table(columns=["release", "tables"]).to_pylist()
    return [
        {entry["table"]: entry["version"] for entry in row["tables"]}
        for row in sorted(found, key=lambda row: row["release"])
    ]


def released(lake: Path) -> dict[str, str]:
    found = releases(lake)
    newest = found[-1] if found else {}
    return {name: rows(DeltaTable(lake / name, version=version)) for name, version in newest.items()}


def commits(table: Path) -> list[dict[str, Any]]:
    """What jobs recorded with each of their commits, newest first."""
    return [commit for commit in DeltaTable(table).history() if "app" in commit]


# --- MLflow's store ---------------------------------------------------------------------------------------------------


def query(store: Path, text: str, *given: Any) -> list[tuple[Any, ...]]:
    """Rows of a question to an SQLite store. Raises sqlite3.Error where it can't be read."""
    connection = sqlite3.connect(f"file:{store}?mode=rw", uri=True, timeout=20)
    try:
        return connection.execute(text, given).fetchall()
    finally:
        connection.close()


def has_table(store: Path, table: str) -> bool:
    if not store.is_file():
        return False
    return bool(query(store, "SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = ?", table))


def registry(store: Path, models: str = "") -> dict[str, Any]:
    if not has_table(store, "model_version_tags"):
        return {}
    found: dict[str, Any] = {}
    hashes = query(
        store,
        "SELECT v.name, v.version, t.value FROM model_versions v LEFT JOIN model_version_tags t ON t.name = v.name "
        "AND t.version = v.version AND t.key = 'graftrec.hash' WHERE v.current_stage != 'Deleted_Internal'",
    )
    champions = dict(query(store, "SELECT name, version FROM registered_model_aliases WHERE alias = 'champion'"))
    for name in sorted({name for name, _, _ in hashes if name.startswith(models)}):
        of_name = {version: digest for found_name, version, digest in hashes if found_name == name}
        found[name.removeprefix(models)] = {
            "versions": sorted(map(str, of_name.values())),
            "champion": of_name.get(champions.get(name)),
        }
    return found


@dataclass(frozen=True)
class TrackedRun:
    id: str
    name: str
    status: str
    model_hash: str | None
    metrics: dict[str, float]


def tracked_runs(store: Path, experiment: str | None = None) -> list[TrackedRun]:
    """The store's runs, or those of one experiment."""
    if not has_table(store, "latest_metrics"):
        return []
    metrics: dict[str, dict[str, float]] = {}
    for run, key, value in query(store, "SELECT run_uuid, key, value FROM latest_metrics"):
        metrics.setdefault(run, {})[key] = value
    hashes = dict(query(store, "SELECT run_uuid, value FROM tags WHERE key = 'graftrec.model_hash'"))
    chosen = "SELECT r.run_uuid, r.name, r.status FROM runs r JOIN experiments e USING (experiment_id)"
    found = query(store, f"{chosen} WHERE e.name = ?", experiment) if experiment else query(store, chosen)
    return [TrackedRun(run, name, status, hashes.get(run), metrics.get(run, {})) for run, name, status in found]


def relocate(store: Path, old: Path, new: Path) -> None:
    """Put a copied store's addresses of artifacts, which are absolute, right."""
    connection = sqlite3.connect(store)
    with connection:
        for (table,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall():
            for _, column, kind, *_ in connection.execute(f"PRAGMA table_info('{table}')").fetchall():
                if kind.upper().startswith(("VARCHAR", "TEXT")):
                    changed = f'UPDATE "{table}" SET "{column}" = replace("{column}", ?, ?) WHERE instr("{column}", ?)'
                    connection.execute(changed, (f"{old}/", f"{new}/", f"{old}/"))
    connection.close()
