"""Checkpoints: a directory per step, a manifest with a hash of each file written last, safetensors and JSON, no pickle.

A directory without its manifest is unfinished and ignored. One whose files differ from the manifest is refused by name,
and the one before it is used.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

MANIFEST = "manifest.json"
_PREFIX = "step-"


@dataclass(frozen=True)
class Checkpoint:
    """`tensors`: file stem -> name -> tensor; `state`: anything JSON holds."""

    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]


def save(root: Path, step: int, checkpoint: Checkpoint, *, keep: int) -> Path:
    """Write ``step-<step>`` under `root`, durably, then drop all but the newest `keep`."""
    folder = root / f"{_PREFIX}{step:010}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for stem, tensors in checkpoint.tensors.items():
        save_file(
            {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
            folder / f"{stem}.safetensors",
        )
    (folder / "state.json").write_text(json.dumps(checkpoint.state))
    digests = {path.name: _digest(path) for path in sorted(folder.iterdir())}
    for name in digests:
        _sync(folder / name)
    unfinished = folder / (MANIFEST + ".new")
    unfinished.write_text(json.dumps(digests))
    _sync(unfinished)
    unfinished.rename(folder / MANIFEST)
    _sync(folder)
    _sync(root)
    for old in _folders(root)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return folder


def newest(root: Path, *, warn: Callable[[str], None]) -> Checkpoint | None:
    """The newest whole checkpoint under `root`; each damaged one on the way is told to `warn`. None: there is none."""
    for folder in reversed(_folders(root)):
        try:
            return _load(folder)
        except _Damaged as damage:
            warn(f"checkpoint {folder}: {damage}; refused, the one before it is used")
    return None


def clear(root: Path) -> None:
    shutil.rmtree(root, ignore_errors=True)


class _Damaged(Exception):
    pass


def _folders(root: Path) -> list[Path]:
    """Checkpoints that were finished, oldest first."""
    return sorted(path for path in root.glob(f"{_PREFIX}*") if (path / MANIFEST).is_file())


def _load(folder: Path) -> Checkpoint:
    try:
        digests = json.loads((folder / MANIFEST).read_text())
    except ValueError:
        raise _Damaged(f"{MANIFEST} is not readable") from None
    for name, digest in digests.items():
        if not (folder / name).is_file():
            raise _Damaged(f"{name} is missing")
        if _digest(folder / name) != digest:
            raise _Damaged(f"{name} is damaged: its SHA-256 is not the manifest's")
    tensors = {Path(name).stem: load_file(folder / name) for name in digests if name.endswith(".safetensors")}
    return Checkpoint(tensors, json.loads((folder / "state.json").read_text()))


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
