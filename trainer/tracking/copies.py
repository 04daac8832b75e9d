"""An embedded MLflow store, copied and put elsewhere: its database names the places of its artifacts."""

import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

from trainer.tracking.connection import TrackingError, tracking_uri
from trainer.tracking.store import sqlite_file

DATABASE, ARTIFACTS = "mlflow.db", "mlartifacts"
_PLACE = "place.txt"  # of a copy: where its artifacts lay
# Columns of MLflow's database that hold places of artifacts.
_PLACES = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
)


def embedded_store() -> Path | None:
    """The database of the store in use, where it is a file."""
    return sqlite_file(tracking_uri())


def copy_store(to: Path) -> None:
    """Copy the embedded store in use: first its database, then the artifacts, which only grow. Raises TrackingError."""
    database = embedded_store()
    if database is None or not database.exists():
        raise TrackingError(f"{tracking_uri()}: expected a store in a file, found none; copy a server's by its tools")
    to.mkdir(parents=True, exist_ok=True)
    with closing(sqlite3.connect(database)) as source, closing(sqlite3.connect(to / DATABASE)) as target:
        source.backup(target)
    artifacts = database.parent / ARTIFACTS
    if artifacts.is_dir():
        shutil.copytree(artifacts, to / ARTIFACTS)
    (to / _PLACE).write_text(str(artifacts.resolve()), encoding="utf-8")


def check_room(folder: Path) -> None:
    """Raise TrackingError where a store lies in `folder`."""
    for name in (DATABASE, ARTIFACTS):
        if (folder / name).exists():
            raise TrackingError(f"{folder / name}: expected none, found one; move it away, or name another --store")


def restore_store(source: Path, folder: Path) -> None:
    """Put a copy into `folder`, and let its database name the artifacts there. Raises TrackingError."""
    check_room(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if (source / ARTIFACTS).is_dir():
        shutil.copytree(source / ARTIFACTS, folder / ARTIFACTS)
    before = (source / _PLACE).read_text(encoding="utf-8")
    now = str((folder / ARTIFACTS).resolve())
    new = folder / f"{DATABASE}.restoring"
    shutil.copyfile(source / DATABASE, new)
    with closing(sqlite3.connect(new)) as database:
        for table, column in _PLACES:
            if column in {row[1] for row in database.execute(f"PRAGMA table_info({table})")}:
                for old, put in ((Path(before).as_uri(), Path(now).as_uri()), (before, now)):
                    database.execute(f"UPDATE {table} SET {column} = replace({column}, ?, ?)", (old, put))
        database.commit()
    new.rename(folder / DATABASE)
