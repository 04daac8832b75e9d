"""Checkpoints: a directory per step, a manifest with a hash of each file written last, safetensors and JSON, no pickle.

A directory without its manifest is unfinished and ignored. One whose files differ from the manifest is refused by name,
and the one before it is used.

A table that is shared out over processes is written by each: ``<stem>.<rank>-of-<size>.safetensors``.
"""

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from etl.durable import sync
from etl.settings import GraftrecError
from trainer.parallel.distributed import ALONE, World
from trainer.trust.verified_files import (
    MANIFEST,
    ModelFolderError,
    VerifiedFolder,
    digest_of,
    named_digests,
    refused,
    verified,
)

_PREFIX = "step-"
_STATE = "state.json"
_PART = re.compile(r"([\w-]+)\.(\d+)-of-(\d+)\.safetensors")
_MEND = "refused, the one before it is used"
_ANEW = "remove the run's folder, and run the same command again"


@dataclass(frozen=True)
class Checkpoint:
    """`tensors`: file stem -> name -> tensor, the same on every process; `state`: anything JSON holds; `parts`: as
    `tensors`, of tables that are shared out: the parts of all processes in order (to be saved: the process's own)."""

    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]
    parts: dict[str, dict[str, list[Tensor]]] = field(default_factory=dict)
    folder: Path | None = None  # where it was read


def save(
    root: Path,
    step: int,
    checkpoint: Checkpoint,
    *,
    keep: int,
    world: World = ALONE,
    is_best: bool = False,
    before: Path | None = None,
) -> Path:
    """Write ``step-<step>`` under `root`, durably, then drop all but the newest `keep`. Called by all processes.

    `is_best`: its model is the best so far; otherwise the best is that of the checkpoint `before`. It is linked, not
    written again. Raises GraftrecError where `root` is not the same storage for all processes.
    """
    folder = root / f"{_PREFIX}{step:010}"
    new = folder.with_name(folder.name + ".new")
    if world.first:
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(parents=True)
    world.wait()
    written = {}
    for stem, parts in checkpoint.parts.items():
        if parts:
            name = f"{stem}.{world.rank}-of-{world.size}.safetensors"
            written[name] = _write({table: part for table, (part,) in parts.items()}, new / name)
    if world.first:
        for stem, tensors in checkpoint.tensors.items():
            written[f"{stem}.safetensors"] = _write(tensors, new / f"{stem}.safetensors")
        (new / _STATE).write_text(json.dumps(checkpoint.state))
        written[_STATE] = digest_of(new / _STATE)
    digests = {name: digest for found in world.objects(written) for name, digest in found.items()}
    if world.first:
        if is_best:
            digests |= _linked(new, new, digests, "model")
        elif before is not None:
            digests |= _linked(new, before, named_digests(before / MANIFEST, _ANEW), "best")
        _finish(new, folder, digests)
        kept = [path for path in _folders(root) if path.name <= folder.name][-keep:]
        for path in _folders(root):  # later ones are of a run that was gone on with from before them
            if path not in kept:
                shutil.rmtree(path, ignore_errors=True)
    world.wait()
    return folder


def _linked(to: Path, source: Path, digests: Mapping[str, str], stem: str) -> dict[str, str]:
    """Make the files of one stem in `source` the best weights in `to`; their digests."""
    found = {}
    for name, digest in digests.items():
        if name.startswith(f"{stem}."):
            best = "best" + name.removeprefix(stem)
            os.link(source / name, to / best)
            found[best] = digest
    return found


def _finish(new: Path, folder: Path, digests: dict[str, str]) -> None:
    """Write the manifest, and put the new folder in its place."""
    if missing := [name for name in digests if not (new / name).is_file()]:
        raise GraftrecError(
            f"{new}: {missing[0]} was written by another process and is not to be seen here; set output to storage "
            "that all hosts share"
        )
    for name in digests:
        sync(new / name)
    (new / MANIFEST).write_text(json.dumps(digests))
    sync(new / MANIFEST)
    sync(new)
    if folder.exists():
        replaced = folder.with_name(folder.name + ".old")
        folder.rename(replaced)
        new.rename(folder)
        shutil.rmtree(replaced)
    else:
        new.rename(folder)
    sync(folder.parent)


def newest(root: Path, *, warn: Callable[[str], None]) -> Checkpoint | None:
    """The newest whole checkpoint under `root`; each damaged one on the way is reported by `warn`. None: there is none.

    Tensors are mapped from their files, not read into memory.
    """
    for folder in reversed(_folders(root)):
        try:
            return _load(folder)
        except ModelFolderError as damage:
            warn(f"checkpoint {damage}")
    return None


def weights(folder: Path, stem: str) -> dict[str, list[Tensor]]:
    """The tensors of one stem of a checkpoint that this process wrote or loaded, mapped from its files: each whole, or
    in the parts it was shared in. Raises ModelFolderError."""
    digests = named_digests(folder / MANIFEST, _ANEW)
    of_stem = {name: digest for name, digest in digests.items() if name.startswith(f"{stem}.")}
    found = _read(VerifiedFolder(folder, of_stem, _ANEW))
    return {name: [tensor] for name, tensor in found.tensors.get(stem, {}).items()} | found.parts.get(stem, {})


def clear(root: Path) -> None:
    shutil.rmtree(root, ignore_errors=True)


def tidy(root: Path) -> None:
    """Remove what a kill or a full disk left half made. For the run that holds the folder."""
    for old in root.glob(f"{_PREFIX}*.old"):
        if old.with_suffix("").exists():
            shutil.rmtree(old, ignore_errors=True)
        else:  # a kill came before another of the same step took its place
            old.rename(old.with_suffix(""))
    for unfinished in root.glob(f"{_PREFIX}*.new"):
        shutil.rmtree(unfinished, ignore_errors=True)


def _folders(root: Path) -> list[Path]:
    """Checkpoints that were finished, oldest first."""
    numbered = [path for path in root.glob(f"{_PREFIX}*") if path.name.removeprefix(_PREFIX).isdigit()]
    return sorted(path for path in numbered if (path / MANIFEST).is_file())


def _load(folder: Path) -> Checkpoint:
    """Raises ModelFolderError."""
    found = verified(folder, (_STATE,), mend=_MEND)
    state = found.json(_STATE)
    if not isinstance(state, dict):
        raise ModelFolderError(f"{folder / _STATE}: expected an object, found {type(state).__name__}; {_MEND}")
    return replace(_read(found), state=state, folder=folder)


def _read(folder: VerifiedFolder) -> Checkpoint:
    """Raises ModelFolderError for a table of which a process's part is not there."""
    found = Checkpoint({}, {})
    parts: dict[str, dict[int, str]] = {}
    sizes: dict[str, set[int]] = {}
    for name in folder.digests:
        if match := _PART.fullmatch(name):
            parts.setdefault(match[1], {})[int(match[2])] = name
            sizes.setdefault(match[1], set()).add(int(match[3]))
        elif name.endswith(".safetensors"):
            found.tensors[name.partition(".")[0]] = folder.tensors(name)
    for stem, of_stem in parts.items():
        numbers = sorted(of_stem)
        if numbers != list(range(len(numbers))) or sizes[stem] != {len(numbers)}:
            raise ModelFolderError(
                f"{folder.path}: expected {stem} of {max(sizes[stem])} processes, found {len(numbers)} parts; "
                f"{folder.mend}"
            )
        for number in numbers:
            for table, part in folder.tensors(of_stem[number]).items():
                found.parts.setdefault(stem, {}).setdefault(table, []).append(part)
    return found


@contextmanager
def fitting(saved: Checkpoint) -> Iterator[None]:
    """Turns what a checkpoint that does not fit its run makes a restoration raise into a GraftrecError of one line."""
    with refused(f"checkpoint {saved.folder}", _ANEW):
        yield


def _write(tensors: Mapping[str, Tensor], path: Path) -> str:
    """Write a file; its digest. Tensors on the CPU are not copied."""
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)
    return digest_of(path)
