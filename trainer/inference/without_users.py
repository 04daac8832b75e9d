"""Users taken out of model folders: their ids, their rows of the user table, their vectors.

What is left answers for them as for anybody unknown. The weights that all users share were trained on their events too:
only a training without them takes that back. The hash of a folder stays, for it doesn't depend on users.

Killed anywhere, the folder is a model still, if without its users; the same call finishes it.
"""

import json
import shutil
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file, save_file

from etl.durable import sync
from etl.tables import UNK
from trainer.inference.delta_folder import PATCH, WHOLE
from trainer.inference.model_folder import (
    MANIFEST,
    OPTIONAL,
    USER_FEATURES,
    USER_IDS,
    USER_TABLE,
    USERS,
    ModelFolderError,
    digest_of,
    lake_of,
)

_READY = ".without-users"  # files that are about to take the places of others


def is_model(folder: Path) -> bool:
    """Whether a folder is a model's, or a patch's."""
    return (folder / MANIFEST).is_file() or (folder / WHOLE).is_file()


def is_of_lake(folder: Path, same: Callable[[str], bool]) -> bool:
    """Whether a model was trained on a lake that is the `same`: ids of another log may be other people's."""
    try:
        return same(lake_of(folder))
    except (ModelFolderError, OSError, ValueError):
        return False


def without_users(folder: Path, users: Collection[str]) -> int:
    """Take users (raw ids) out of a model folder or a patch; how many it had."""
    manifest = folder / (WHOLE if (folder / PATCH).is_file() else MANIFEST)
    ready = folder / _READY
    num = 0
    if not ready.is_dir():
        if not (folder / USER_IDS).is_file():
            return 0
        ids = pq.read_table(folder / USER_IDS)
        named = pc.is_in(ids["user"], value_set=pa.array(sorted(users), pa.string()))
        gone = ids.filter(named)
        num = len(gone)
        if not num:
            return 0
        _write(folder, ids.filter(pc.invert(named)), gone["index"].to_pylist())
    names = [path.name for path in ready.iterdir()]
    for name in names:  # a folder without them is a model; one with other files than its manifest names isn't
        (folder / name).unlink(missing_ok=True)
    renew_digests(manifest, {name: digest_of(ready / name) for name in names})
    for name in names:
        (ready / name).replace(folder / name)
    ready.rmdir()
    return num


def follow_parent(patch: Path, parent: Path) -> bool:
    """Let a patch name its parent's files of users as they are now; whether that changed anything."""
    inherited = json.loads((patch / PATCH).read_text())["files"]
    own, theirs = json.loads((patch / WHOLE).read_text()), json.loads((parent / MANIFEST).read_text())
    changed = {name: theirs[name] for name in inherited if name in theirs}
    if changed.items() <= own.items():
        return False
    renew_digests(patch / WHOLE, changed)
    return True


def renew_digests(manifest: Path, changed: Mapping[str, str]) -> None:
    """Let a manifest name files by other digests; it is whole at any moment."""
    digests = json.loads(manifest.read_text()) | changed
    new = manifest.with_name(manifest.name + ".new")
    new.write_text(json.dumps(digests, indent=1))
    sync(new)
    new.replace(manifest)


def _write(folder: Path, ids: pa.Table, rows: list[int]) -> None:
    """What takes the place of a folder's files of users, whole or not there."""
    new = folder / (_READY + ".new")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir()
    pq.write_table(ids, new / USER_IDS)
    if (folder / USERS).is_file():
        table = load_file(folder / USERS)[USER_TABLE]
        table[rows] = table[UNK].clone()
        save_file({USER_TABLE: table}, new / USERS)
    if (folder / USER_FEATURES).is_file():
        tensors = load_file(folder / USER_FEATURES)
        for name, tensor in tensors.items():
            if name.endswith(("/vectors", "/has")):
                tensor[rows] = torch.zeros_like(tensor[rows])
        save_file(tensors, new / USER_FEATURES)
    assert {path.name for path in new.iterdir()} <= set(OPTIONAL)
    for path in new.iterdir():
        sync(path)
    new.rename(folder / _READY)
