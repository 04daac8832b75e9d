"""A patched model as a small folder: what it has beside its parent (survey 3.3).

A run's model folder is whole (`model_folder.py`). Of one that was fine-tuned by patches most is its parent's, byte for
byte: `write_patch` leaves that out, `assemble` puts it back, and checks that the folder is the one it was; `load_patch`
takes it from a parent in memory, so that many patches stand on one backbone.

    patch.json         the parent's hash; which tensors and files are the parent's; rows of tables that are
    patch.safetensors  all other tensors, and the other rows of those tables
    whole.json         the manifest of the whole folder
    config.json, catalogue.parquet, … as in the whole folder, where they aren't the parent's
"""

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field
from safetensors.torch import save_file
from torch import Tensor

from trainer.data.catalogue import rows_by_raw_id
from trainer.inference.model_folder import (
    MAX_INDEX,
    OPTIONAL,
    ORIGIN,
    REQUIRED,
    USER_FEATURES,
    USER_IDS,
    USER_TABLE,
    USERS,
    WEIGHTS,
    TrainedModel,
    catalogue_of,
    hash_of,
    model_hash,
    read_model,
    user_ids,
    user_table,
    verified_model,
)
from trainer.trust.verified_files import (
    MANIFEST,
    ModelFolderError,
    Record,
    VerifiedFolder,
    copy_file,
    digest_of,
    named_digests,
    read_json,
    record,
    refused,
)

PATCH, TENSORS, WHOLE = "patch.json", "patch.safetensors", "whole.json"
_FILES = OPTIONAL  # which may be the parent's
_MEND = "register it again"


class _Patch(Record):
    """What patch.json holds."""

    parent: str = Field(pattern="^[0-9a-f]{32}$")
    tensors: tuple[str, ...]
    rows: dict[str, tuple[Annotated[int, Field(ge=0, le=MAX_INDEX)], ...]]
    files: tuple[str, ...]
    digest: str = Field(pattern="^[0-9a-f]{64}$")


def is_patch(folder: str | Path) -> bool:
    return (Path(folder) / PATCH).is_file()


def parent_of(folder: str | Path) -> str:
    """The hash of the model that a patch stands on."""
    return _described(Path(folder)).parent


def write_patch(folder: Path, parent: Path, target: Path) -> None:
    """Write to `target` what the model in `folder` has beside the one in `parent`. Raises ModelFolderError."""
    whole, base = verified_model(folder), verified_model(parent)
    own, theirs = whole.tensors(WEIGHTS), base.tensors(WEIGHTS)
    rows_V = torch.from_numpy(rows_by_raw_id(catalogue_of(base), catalogue_of(whole)))
    target.mkdir(parents=True)
    inherited, of_rows, kept = [], {}, {}
    for name, tensor in own.items():
        given = theirs.get(name)
        if given is not None and given.shape == tensor.shape and torch.equal(given, tensor):
            inherited.append(name)
        elif given is not None and len(tensor) == len(rows_V) and given.shape[1:] == tensor.shape[1:]:
            differ_V = (given[rows_V] != tensor).flatten(1).any(1) if tensor.ndim > 1 else given[rows_V] != tensor
            of_rows[name] = differ_V.nonzero()[:, 0].tolist()
            kept[name] = tensor[differ_V].contiguous()
        else:
            kept[name] = tensor
    files = [name for name in _FILES if name in whole and whole.digests[name] == base.digests.get(name)]
    save_file(kept, target / TENSORS)
    described = {
        "parent": hash_of(base),
        "tensors": inherited,
        "rows": of_rows,
        "files": files,
        "digest": digest_of(target / TENSORS),
    }
    (target / PATCH).write_text(json.dumps(described))
    copy_file(folder / MANIFEST, target / WHOLE, _MEND)
    for name in (ORIGIN, *whole.digests):
        if name not in (WEIGHTS, *files) and (name != ORIGIN or (folder / ORIGIN).exists()):
            copy_file(folder / name, target / name, _MEND)


def assemble(patch: Path, parent: Path, target: Path) -> str:
    """Write the whole model folder of a patch to `target`; returns its hash. Raises ModelFolderError where `parent` is
    another model's, or what comes out is not what the patch was made of."""
    described, base = _described(patch), verified_model(parent)
    _check(described, hash_of(base), patch)
    stored = _verified_patch(patch, described)
    target.mkdir(parents=True)
    rows_V = rows_by_raw_id(catalogue_of(base), catalogue_of(stored))
    weights = _whole(described, stored.tensors(TENSORS), base.tensors(WEIGHTS), rows_V, patch)
    save_file(weights, target / WEIGHTS)
    for name in described.files:
        copy_file(base.file(name), target / name, _MEND)
    for name in stored.digests:
        if name != TENSORS:
            copy_file(patch / name, target / name, _MEND)
    if (patch / ORIGIN).exists():
        copy_file(patch / ORIGIN, target / ORIGIN, _MEND)
    copy_file(patch / WHOLE, target / MANIFEST, _MEND)
    return model_hash(target)


def load_patch(patch: str | Path, parent: TrainedModel) -> TrainedModel:
    """The patched model, on the tensors of `parent` that it shares: what is loaded and kept is the patch. Raises
    ModelFolderError where `parent` is another model, or the weights are not those that were registered."""
    patch = Path(patch)
    described = _described(patch)
    _check(described, parent.hash, patch)
    stored = _verified_patch(patch, described)
    theirs = parent.model.state_dict()
    device = str(next(iter(theirs.values())).device)
    rows_V = rows_by_raw_id(parent.catalogue, catalogue_of(stored))
    weights = _whole(described, stored.tensors(TENSORS, device=device), theirs, rows_V, patch)
    whole = named_digests(patch / WHOLE, _MEND)
    if _digest_of_weights(weights) != whole[WEIGHTS]:
        raise ModelFolderError(
            f"the patch in {patch} is damaged: its parent's weights with its own are not those of {WHOLE}; {_MEND}"
        )
    users = parent.users
    if USERS in described.files:
        weights[USER_TABLE] = theirs[USER_TABLE]
    elif USERS in stored:
        weights[USER_TABLE] = user_table(stored, device=device)
        users = user_ids(stored, len(weights[USER_TABLE])) if USER_IDS in stored else None
    user_features = parent.user_features if USER_FEATURES in described.files else None
    there = {name: digest for name, digest in whole.items() if name in stored or name in described.files}
    folder = VerifiedFolder(patch, there | {WEIGHTS: whole[WEIGHTS]}, _MEND)
    return read_model(folder, weights, users=users, user_features=user_features, device=device)


def _digest_of_weights(weights: Mapping[str, Tensor]) -> str:
    """The SHA-256 that the file of these weights has in a model folder. A file on disk: weights may be larger than the
    memory that is left."""
    with tempfile.TemporaryDirectory(prefix="graftrec-patch-") as scratch:
        path = Path(scratch) / WEIGHTS
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}, path)
        return digest_of(path)


def _described(folder: Path) -> _Patch:
    path = folder / PATCH
    if not path.is_file():
        raise ModelFolderError(f"no patch in {folder}: expected {PATCH} and the files it names; {_MEND}")
    described = record(_Patch, read_json(path, _MEND), path, _MEND)
    if wrong := [name for name in described.files if name not in _FILES]:
        raise ModelFolderError(f"{path}: expected files among {', '.join(_FILES)}, found {wrong[0][:80]!r}; {_MEND}")
    return described


def _verified_patch(folder: Path, described: _Patch) -> VerifiedFolder:
    """The files of a patch, each as it was registered. Raises ModelFolderError."""
    digests = named_digests(folder / WHOLE, _MEND)
    if lacking := [name for name in REQUIRED if name not in digests]:
        raise ModelFolderError(f"{folder / WHOLE}: expected the SHA-256 of {lacking[0]}, found none; {_MEND}")
    there = {name: digest for name, digest in digests.items() if name not in (WEIGHTS, *described.files)}
    there[TENSORS] = described.digest
    for name, digest in list(there.items()):
        path = folder / name
        if name in OPTIONAL and not path.exists() and not path.is_symlink():
            del there[name]
        elif path.is_symlink() or not path.is_file():
            raise ModelFolderError(f"{path}: expected a file, found none, or a link; {_MEND}")
        elif digest_of(path) != digest:
            raise ModelFolderError(
                f"the patch in {folder} is damaged: the SHA-256 of {name} is not the one noted; {_MEND}"
            )
    return VerifiedFolder(folder, there, _MEND)


def _check(described: _Patch, found: str, patch: Path) -> None:
    if described.parent != found:
        raise ModelFolderError(
            f"the patch in {patch} is for the model {described.parent[:12]}, found {found[:12]}; give its parent"
        )


def _whole(
    described: _Patch,
    own: Mapping[str, Tensor],
    theirs: Mapping[str, Tensor],
    rows_V: np.ndarray[Any, Any],
    patch: Path,
) -> dict[str, Tensor]:
    """Raises ModelFolderError for tensors or rows that the parent lacks."""
    with refused(patch / PATCH, _MEND):
        weights = {name: theirs[name] for name in described.tensors}
        for name, tensor in own.items():
            weights[name] = tensor
            if name in described.rows:
                weights[name] = theirs[name][torch.from_numpy(rows_V).to(tensor.device)]
                weights[name][list(described.rows[name])] = tensor
    return weights


def bytes_of(folder: str | Path) -> int:
    """Of all its files."""
    return sum(file.stat().st_size for file in Path(folder).iterdir())
