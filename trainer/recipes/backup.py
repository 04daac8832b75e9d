"""Recipes: copy a lake at one release and an embedded MLflow store, and put such a copy where there is nothing.

    python -m trainer backup --lake LAKE --to FOLDER
    python -m trainer restore --source FOLDER --lake LAKE --store FOLDER

A server's database and artifacts are copied by its own tools: then only the lake is copied here.
"""

from dataclasses import dataclass
from pathlib import Path

from etl.maintenance.backup import copy_lake, restore_lake
from etl.settings import GraftrecError
from trainer import tracking
from trainer.config import BackupConfig, RestoreConfig, required

LAKE, STORE = "lake", "store"


@dataclass(frozen=True)
class Copied:
    """The release that was copied, and whether a store was."""

    release: int
    store: bool


def run(config: BackupConfig) -> Copied:
    """The recipe `backup`. Raises GraftrecError."""
    required(config, "to")
    to = Path(config.to)
    if to.exists() and any(to.iterdir()):
        raise GraftrecError(f"to: expected a new or empty folder, found files in {to}; name another")
    embedded = config.tracking.enabled and tracking.is_there() and tracking.embedded_store() is not None
    if embedded:  # before the lake: a version that the store names was trained on a release that is there
        tracking.copy_store(to / STORE)
    number = copy_lake(config.lake, to / LAKE, release=config.release, wait_seconds=config.wait_seconds)
    beside = "the MLflow store" if embedded else "no MLflow store: a server's is copied by its own tools"
    print(f"backup: release {number} of {config.lake} and {beside}, in {to}", flush=True)
    return Copied(number, embedded)


def restore(config: RestoreConfig) -> Copied:
    """The recipe `restore`. Raises GraftrecError."""
    required(config, "source")
    source, has_store = Path(config.source), (Path(config.source) / STORE).is_dir()
    if has_store:
        tracking.check_room(Path(config.store))
    number = restore_lake(source / LAKE, Path(config.lake))
    if has_store:
        tracking.restore_store(source / STORE, Path(config.store))
    print(
        f"restore: release {number} is in {config.lake}{f', the MLflow store in {config.store}' if has_store else ''}; "
        "users who were forgotten since the backup are in it: forget them again",
        flush=True,
    )
    return Copied(number, has_store)
