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
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from trainer.data.catalogue import rows_by_raw_id
from trainer.inference.model_folder import (
    CATALOGUE,
    CONFIG,
    MANIFEST,
    OPTIONAL,
    USER_FEATURES,
    USER_TABLE,
    USERS,
    WEIGHTS,
    ModelFolderError,
    TrainedModel,
    catalogue_of,
    digest_of,
    model_hash,
    read_model,
)

PATCH, TENSORS, WHOLE = "patch.json", "patch.safetensors", "whole.json"
_FILES = OPTIONAL  # which may be the parent's


def is_patch(folder: str | Path) -> bool:
    return (Path(folder) / PATCH).is_file()


def parent_of(folder: str | Path) -> str:
    """The hash of the model that a patch stands on."""
    return str(_described(Path(folder))["parent"])


def write_patch(folder: Path, parent: Path, target: Path) -> None:
    """Write to `target` what the model in `folder` has beside the one in `parent`. Raises ArtifactError."""
    own, theirs = load_file(folder / WEIGHTS), load_file(parent / WEIGHTS)
    rows_V = torch.from_numpy(rows_by_raw_id(catalogue_of(parent), catalogue_of(folder)))
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
    files = [name for name in _FILES if _same(folder / name, parent / name)]
    save_file(kept, target / TENSORS)
    described = {
        "parent": model_hash(parent),
        "tensors": inherited,
        "rows": of_rows,
        "files": files,
        "digest": digest_of(target / TENSORS),
    }
    (target / PATCH).write_text(json.dumps(described))
    shutil.copyfile(folder / MANIFEST, target / WHOLE)
    for file in folder.iterdir():
        if file.name not in (WEIGHTS, MANIFEST, *files):
            shutil.copyfile(file, target / file.name)


def assemble(patch: Path, parent: Path, target: Path) -> str:
    """Write the whole model folder of a patch to `target`; returns its hash. Raises ArtifactError where `parent` is
    another model's, or what comes out is not what the patch was made of."""
    described = _described(patch)
    _check(described, model_hash(parent), patch)
    target.mkdir(parents=True)
    rows_V = rows_by_raw_id(catalogue_of(parent), catalogue_of(patch))
    save_file(_whole(described, load_file(patch / TENSORS), load_file(parent / WEIGHTS), rows_V), target / WEIGHTS)
    for name in described["files"]:
        shutil.copyfile(parent / name, target / name)
    for file in patch.iterdir():
        if file.name not in (PATCH, TENSORS, WHOLE):
            shutil.copyfile(file, target / file.name)
    shutil.copyfile(patch / WHOLE, target / MANIFEST)
    return model_hash(target)


def load_patch(patch: str | Path, parent: TrainedModel) -> TrainedModel:
    """The patched model, on the tensors of `parent` that it shares: what is loaded and kept is the patch. Raises
    ArtifactError where `parent` is another model."""
    patch = Path(patch)
    described = _described(patch)
    _check(described, parent.hash, patch)
    digests = json.loads((patch / WHOLE).read_text())
    if described["digest"] != digest_of(patch / TENSORS) or any(
        digests[name] != digest_of(patch / name) for name in (CONFIG, CATALOGUE)
    ):
        raise ModelFolderError(f"the patch in {patch} is damaged: a SHA-256 is not the one noted; register it again")
    theirs = parent.model.state_dict()
    device = str(next(iter(theirs.values())).device)
    own = {name: tensor.to(device) for name, tensor in load_file(patch / TENSORS).items()}
    weights = _whole(described, own, theirs, rows_by_raw_id(parent.catalogue, catalogue_of(patch)))
    users = parent.users
    if USERS in described["files"]:
        weights[USER_TABLE] = theirs[USER_TABLE]
    elif (patch / USERS).is_file():
        weights |= load_file(patch / USERS, device=device)
        users = None
    user_features = parent.user_features if USER_FEATURES in described["files"] else None
    return read_model(patch, weights, digests, users=users, user_features=user_features, device=device)


def _described(folder: Path) -> dict[str, Any]:
    try:
        described: dict[str, Any] = json.loads((folder / PATCH).read_text())
    except (OSError, ValueError):
        raise ModelFolderError(
            f"no patch in {folder}: expected {PATCH} and the files it names; register it again"
        ) from None
    return described


def _check(described: Mapping[str, Any], found: str, patch: Path) -> None:
    if described["parent"] != found:
        raise ModelFolderError(
            f"the patch in {patch} is for the model {described['parent'][:12]}, found {found[:12]}; give its parent"
        )


def _whole(
    described: Mapping[str, Any], own: Mapping[str, Tensor], theirs: Mapping[str, Tensor], rows_V: np.ndarray[Any, Any]
) -> dict[str, Tensor]:
    weights = {name: theirs[name] for name in described["tensors"]}
    for name, tensor in own.items():
        weights[name] = tensor
        if name in described["rows"]:
            weights[name] = theirs[name][torch.from_numpy(rows_V).to(tensor.device)]
            weights[name][described["rows"][name]] = tensor
    return weights


def _same(left: Path, right: Path) -> bool:
    return left.is_file() and right.is_file() and left.read_bytes() == right.read_bytes()


def bytes_of(folder: str | Path) -> int:
    """Of all its files."""
    return sum(file.stat().st_size for file in Path(folder).iterdir())
