"""The spool: what a dead server did not take, in a folder for each run, until a later command sends it."""

import hashlib
import json
import shutil
from pathlib import Path

from etl.redaction import one_line
from trainer.tracking.queue import Entry, warn
from trainer.tracking.store import sqlite_file


def fingerprint(uri: str) -> str:
    """Of the store that entries are for: a URI may hold secrets."""
    if (database := sqlite_file(uri)) is not None and database.parent.is_symlink():  # plain_path's, of one process
        uri = f"sqlite:///{database.parent.readlink() / database.name}"
    return hashlib.sha256(uri.encode()).hexdigest()[:16]


def keep(folder: Path, header: Entry, entries: list[Entry]) -> None:
    """Write unsent entries, and copies of the files they name, to a folder of their own. The JSON comes last."""
    folder.mkdir(parents=True, exist_ok=True)
    kept = []
    for number, entry in enumerate(entries):
        if entry["kind"] == "artifact" and (source := Path(entry["path"])).exists():
            copy = folder / f"{number:04d}" / source.name
            copy.parent.mkdir(exist_ok=True)
            (shutil.copytree if source.is_dir() else shutil.copy2)(source, copy)
            entry = entry | {"path": str(copy.resolve())}
        kept.append(entry)
    (folder / "unsent.tmp").write_text(json.dumps({"header": header, "entries": kept}))
    (folder / "unsent.tmp").replace(folder / "unsent.json")


def kept(root: Path) -> list[tuple[Path, Entry, list[Entry]]]:
    """(folder, header, entries) of each run whose entries wait under `root`."""
    found = []
    for file in sorted(root.glob("*/unsent.json")):
        try:
            content = json.loads(file.read_text())
            found.append((file.parent, content["header"], content["entries"]))
        except FileNotFoundError:  # sent since
            continue
        except (OSError, ValueError, KeyError) as error:
            warn(f"can't read {file} ({one_line(error)}); remove it")
    return found
