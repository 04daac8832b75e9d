"""What a table's log should hold: seals that our commits carry, and their check.

A commit's custom metadata names the digest of the whole version (`snapshot`: path, size and partition of every data
file, and the table's properties) and a `seal`: the digest of the metadata themselves and of the files added and
removed and the transactions of this log entry. So an entry that lost an action or was altered in any of these is
found, and so is an entry that is missing or empty. Entries without a seal (older lakes', other writers') aren't
checked.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from urllib.parse import unquote

import pyarrow.fs as pafs
from deltalake.transaction import AddAction

from etl.lake.datafile import DataFile

ENTRY = re.compile(r"(?:.*/)?(\d{20})\.json")
_ACTIONS = {"add", "remove", "txn", "commitInfo", "metaData", "protocol", "cdc", "domainMetadata"}
_intact: set[tuple[str, ...]] = set()  # (table's place, entry, its size and time): checked by this process


def snapshot_digest(files: Iterable[DataFile], configuration: Mapping[str, str | None]) -> str:
    """Of the data files that a version names, and its table's properties."""
    named = sorted((file.path, file.size, sorted(file.partition.items())) for file in files)
    return _digest([named, sorted(configuration.items())])


def seal(
    metadata: Mapping[str, str], adds: Sequence[AddAction], removes: Sequence[str], transactions: Mapping[str, int]
) -> dict[str, str]:
    """`metadata` of a commit, sealed. `removes`: paths."""
    commit_info = {**metadata, "sealed": ",".join(sorted(metadata))}
    added = [(add.path, add.size, dict(add.partition_values), json.loads(add.stats)) for add in adds]
    return {**commit_info, "seal": _seal(commit_info, added, removes, transactions)}


def check_log(filesystem: pafs.FileSystem, place: str) -> int:
    """The newest version in the log of the table at `place`, to which `filesystem` is rooted; -1 for no log.

    Raises ValueError that names the entry where one is missing, empty, torn, or not as it was sealed, and where files
    have deletion vectors.
    """
    found = filesystem.get_file_info(pafs.FileSelector("_delta_log", allow_not_found=True))
    entries = {int(match[1]): info for info in found if (match := ENTRY.fullmatch(info.path))}
    if not entries:
        return -1
    for version in range(min(entries), max(entries) + 1):
        if version not in entries:
            raise ValueError(f"expected the entry of version {version}, found none")
        info = entries[version]
        key = (place, info.path, str(info.size), str(info.mtime_ns))
        if key in _intact:
            continue
        with filesystem.open_input_file(info.path) as file:
            check_entry(bytes(file.read()), version)
        _intact.add(key)
    return max(entries)


def check_entry(text: bytes, version: int) -> None:
    """Raise ValueError unless a log entry is whole and, where it has a seal, as it was sealed."""
    try:
        actions = [json.loads(line) for line in text.decode().splitlines() if line.strip()]
        kinds = {kind for action in actions for kind in action}
    except (UnicodeDecodeError, json.JSONDecodeError, TypeError):
        raise ValueError(f"expected the entry of version {version} in JSON, found it torn") from None
    if not actions:
        raise ValueError(f"expected the commit of version {version}, found an empty file")
    if unknown := kinds - _ACTIONS:
        raise ValueError(f"expected actions of Delta in the entry of version {version}, found {sorted(unknown)[0]!r}")
    if any(action.get("add", {}).get("deletionVector") for action in actions):
        raise ValueError(f"the entry of version {version} has files with deletionVectors, which graftrec doesn't read")
    info: dict[str, Any] = next((action["commitInfo"] for action in actions if "commitInfo" in action), {})
    if not {"seal", "sealed"} & info.keys():
        return
    commit_info = {name: info.get(name) for name in ("sealed", *str(info.get("sealed")).split(","))}
    try:
        adds = [action["add"] for action in actions if "add" in action]
        added = [
            (unquote(add["path"]), add["size"], dict(add["partitionValues"]), json.loads(add["stats"])) for add in adds
        ]
        removed = [unquote(action["remove"]["path"]) for action in actions if "remove" in action]
        transactions = {action["txn"]["appId"]: action["txn"]["version"] for action in actions if "txn" in action}
        whole = _seal(commit_info, added, removed, transactions) == info.get("seal")
    except (KeyError, TypeError, ValueError):
        whole = False
    if not whole:
        raise ValueError(f"expected the entry of version {version} as its commit sealed it, found it altered")


def recorded_snapshot(filesystem: pafs.FileSystem, version: int) -> str | None:
    """The `snapshot` that the commit of `version` names; None where it names none, or has left the log."""
    path = f"_delta_log/{version:020d}.json"
    try:
        with filesystem.open_input_file(path) as file:
            lines = bytes(file.read()).decode().splitlines()
    except FileNotFoundError:
        return None
    infos = (json.loads(line).get("commitInfo") for line in lines if '"commitInfo"' in line)
    return next((info.get("snapshot") for info in infos if info), None)


def _seal(
    commit_info: Mapping[str, Any],
    added: Sequence[tuple[Any, ...]],
    removed: Sequence[str],
    transactions: Mapping[str, int],
) -> str:
    return _digest(
        [sorted(commit_info.items()), sorted(added, key=lambda add: str(add[0])), sorted(removed), transactions]
    )


def _digest(value: Any) -> str:
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=8).hexdigest()
