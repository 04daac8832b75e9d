"""The spool: what a dead server did not take, in a folder for each run, until a later command sends it."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from etl.redaction import one_line
from trainer.tracking.queue import Entry, warn
from trainer.tracking.store import sqlite_file
from trainer.trust.verified_files import parse_json


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


def _checked(content: Any) -> tuple[Entry, list[Entry]]:
    """Header and entries of what `keep` wrote. Raises ValueError, KeyError or TypeError for anything else."""
    header, entries = content["header"], content["entries"]
    texts = [header[name] for name in ("uid", "uri", "name", "run_id")]
    if not all(isinstance(text, str) for text in texts) or not isinstance(header["tags"], dict):
        raise ValueError("expected the header of a run, found another")
    if not isinstance(entries, list) or not all(isinstance(one, dict) and "kind" in one for one in entries):
        raise ValueError("expected a list of entries, found another")
    return header, entries


def _is_own(entry: Entry, folder: Path) -> bool:
    """Whether an entry names no file but those that were kept with it."""
    if entry["kind"] != "artifact":
        return True
    inside = isinstance(entry.get("path"), str) and Path(entry["path"]).resolve().is_relative_to(folder.resolve())
    if not inside:
        warn(f"{folder}: expected files in it, found {str(entry.get('path'))[:200]!r}, which is not sent")
    return inside


def kept(root: Path) -> list[tuple[Path, Entry, list[Entry]]]:
    """(folder, header, entries) of each run whose entries wait under `root`."""
    found = []
    for file in sorted(root.glob("*/unsent.json")):
        try:
            content = parse_json(file.read_bytes())
            header, entries = _checked(content)
            found.append((file.parent, header, [one for one in entries if _is_own(one, file.parent)]))
        except FileNotFoundError:  # sent since
            continue
        except (OSError, ValueError, KeyError, TypeError) as error:
            warn(f"can't read {file} ({one_line(error)}); remove it")
    return found
