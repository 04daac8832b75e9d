"""A trained attention over friends as a folder: scores of users without a history, by what their friends have.

config.json          settings of the run, the split whose training part it reads, release, table versions
weights.safetensors  the attention
circle.safetensors   who knows whom and who has what, as sparse matrices, by place of a user
people.parquet       place of a user in these, global index, raw id: personal data, as is the circle
catalogue.parquet    row, global index, raw item id, title
manifest.json        SHA-256 of each file above; written last
origin.json          the lake's place

`on_release` reads another release's friendships and items by the same attention: it learned what to make of a circle,
not who is in it.
"""

import json
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import scipy.sparse as sp
import torch
from pydantic import Field
from safetensors.torch import save_file

from etl.plain_path import absolute
from etl.settings import replaced
from trainer.arrays import IntArray
from trainer.config import FriendsConfig
from trainer.data.catalogue import Catalogue, read_catalogue
from trainer.data.release import Release
from trainer.data.social import read_network, read_training, widened
from trainer.evaluation.scorers import raw_users
from trainer.inference.model_folder import (
    CATALOGUE,
    CONFIG,
    FRIENDS_RECIPE,
    MAX_INDEX,
    MEND,
    WEIGHTS,
    begun,
    catalogue_of,
    check_floating,
    finished,
    hash_of,
    lake_of,
    recipe_of,
    saved_settings,
    verified_model,
)
from trainer.models import check_shapes
from trainer.social.attention import FriendAttention, TrainedFriends
from trainer.social.evidence import Evidence
from trainer.trust.verified_files import ModelFolderError, Record, VerifiedFolder, read_json, record, refused

OTHER_END = "\x1f"  # no raw id begins with it: it is white space, and stripped (`etl.identifiers`)
CIRCLE, PEOPLE = "circle.safetensors", "people.parquet"


class _Description(Record):
    """What config.json holds."""

    recipe: Literal["friends"]
    config: dict[str, Any]
    split: str
    release: Annotated[int, Field(ge=0, le=MAX_INDEX)]
    versions: dict[str, Annotated[int, Field(ge=0)]]


@dataclass(frozen=True)
class FriendsModel:
    """An attention with the circle that it reads; `users` and `raw_ids` by place in the network."""

    config: FriendsConfig
    split: str  # whose training part is read
    release: Release
    catalogue: Catalogue
    users: IntArray  # [U] global index, ascending
    raw_ids: pa.StringArray  # [U]
    trained: TrainedFriends
    hash: str = ""  # of its folder

    @property
    def domain(self) -> str:
        return self.config.domain


def is_friends(folder: str | Path) -> bool:
    """Whether a folder holds an attention over friends."""
    return recipe_of(Path(folder)) == FRIENDS_RECIPE


def save_friends(folder: Path, model: FriendsModel) -> str:
    """Write the folder in the place of any old one; returns its hash."""
    new = begun(folder)
    evidence = model.trained.evidence
    save_file({name: one.contiguous() for name, one in model.trained.model.state_dict().items()}, new / WEIGHTS)
    parts: dict[str, npt.NDArray[Any]] = {}
    for name, matrix in (("edges", evidence.edges), ("taken", evidence.taken)):
        parts |= {f"{name}/indptr": matrix.indptr.astype(np.int64), f"{name}/indices": matrix.indices.astype(np.int32)}
    parts["edges/weights"] = evidence.edges.data.astype(np.float32)
    save_file({name: torch.from_numpy(np.ascontiguousarray(part)) for name, part in parts.items()}, new / CIRCLE)
    people = {"place": np.arange(len(model.users)), "index": model.users, "user": model.raw_ids}
    pq.write_table(pa.table(people), new / PEOPLE)
    catalogue = model.catalogue
    rows = {"row": np.arange(len(catalogue)), "index": catalogue.global_index, "item": catalogue.raw_ids}
    pq.write_table(pa.table(rows | {"title": catalogue.titles}), new / CATALOGUE)
    described = {
        "recipe": FRIENDS_RECIPE,
        "config": replaced(model.config, lake="").model_dump(mode="json"),
        "split": model.split,
        "release": model.release.number,
        "versions": model.release.versions,
    }
    (new / CONFIG).write_text(json.dumps(described, indent=1))
    return finished(folder, {"lake": model.release.lake})


def friends_config(folder: Path) -> tuple[FriendsConfig, dict[str, Any]]:
    """Settings of the run that made a folder, and all that its config.json says. Raises ModelFolderError."""
    if not is_friends(folder):
        raise ModelFolderError(
            f"expected a model of the recipe `friends` in {folder}, found none; give a finished run's `model` folder"
        )
    path = folder / CONFIG
    described = record(_Description, read_json(path, MEND), path, MEND)
    config = saved_settings(FriendsConfig, described.config, path)
    return replaced(config, lake=lake_of(folder)), described.model_dump()


def load_friends(folder: str | Path) -> FriendsModel:
    """Raises ModelFolderError."""
    found = verified_model(folder)
    config, described = friends_config(found.path)
    catalogue = catalogue_of(found)
    edges, taken = _matrices(found, len(catalogue))
    people = found.table(PEOPLE, ["index", "user"], max_rows=edges.shape[0])
    with refused(found.path, MEND):
        users, raw_ids = people["index"].cast(pa.int64()), people["user"].cast(pa.string()).combine_chunks()
        if users.null_count or raw_ids.null_count or len(people) != edges.shape[0]:
            raise ModelFolderError(
                f"{found.path / PEOPLE}: expected index and id of {edges.shape[0]} users, found {len(people)} rows, or "
                f"rows without; {MEND}"
            )
        with torch.device("meta"):  # nothing is drawn, and no memory taken, before the weights are seen to fit
            attention = FriendAttention(config.model.hidden)
        weights = found.tensors(WEIGHTS)
        check_floating(found.path / WEIGHTS, weights)
        check_shapes(attention, weights)
        attention.load_state_dict(weights, assign=True)
        evidence = Evidence(edges, taken, num_candidates=config.model.candidates)
    release = Release(absolute(config.lake), described["release"], described["versions"])
    return FriendsModel(
        config,
        described["split"],
        release,
        catalogue,
        users.to_numpy().astype(np.int64),
        raw_ids,
        TrainedFriends(attention.eval(), evidence, []),
        hash_of(found),
    )


def _matrices(folder: VerifiedFolder, num_rows: int) -> tuple[sp.csr_array, sp.csr_array]:
    """Who knows whom, and who has what. Raises ModelFolderError for indices that lead outside."""
    path = folder.path / CIRCLE
    parts = {name: one.numpy() for name, one in folder.tensors(CIRCLE).items()}
    with refused(path, folder.mend):
        num = len(parts["edges/indptr"]) - 1
        given = (parts["edges/weights"], parts["edges/indices"], parts["edges/indptr"])
        ones = np.ones(len(parts["taken/indices"]), np.float32)
        edges = sp.csr_array(given, shape=(num, num))
        taken = sp.csr_array((ones, parts["taken/indices"], parts["taken/indptr"]), shape=(num, num_rows))
        for matrix in (edges, taken):
            matrix.check_format(full_check=True)
    return edges, taken


def on_release(model: FriendsModel, release: Release) -> FriendsModel:
    """The same attention on the friendships and the training part of a release; itself on its own. Raises DataError."""
    own = model.release
    if (own.lake, own.number) == (release.lake, release.number):
        return model
    catalogue = read_catalogue(release, model.domain)
    network = read_network(release, directed=model.config.directed)
    users, taken = read_training(release, model.split, model.domain, catalogue)
    everyone = np.union1d(users, network.users)
    evidence = Evidence(
        network.of(everyone).edges,
        widened(taken, users, everyone),
        num_candidates=model.config.model.candidates,
    )
    trained = TrainedFriends(model.trained.model, evidence, model.trained.losses)
    raw = pa.array(raw_users(release, everyone), pa.string())
    return replace(model, release=release, catalogue=catalogue, users=everyone, raw_ids=raw, trained=trained)


def without_people(folder: Path, users: Collection[str]) -> tuple[int, str]:
    """Take people (raw ids) out of the folder: names, edges, what they had. How many it had, and the folder's hash,
    which depends on them. Raises ModelFolderError."""
    model = load_friends(folder)
    named = pc.is_in(model.raw_ids, value_set=pa.array(sorted(users), pa.string())).to_numpy(zero_copy_only=False)
    places = np.flatnonzero(named)
    if not len(places):
        return 0, model.hash
    evidence = model.trained.evidence
    stays = sp.diags_array((~named).astype(np.float32), format="csr")
    edges, taken = (stays @ evidence.edges @ stays).tocsr(), (stays @ evidence.taken).tocsr()
    for matrix in (edges, taken):
        matrix.eliminate_zeros()
        matrix.sort_indices()
    # What no raw id begins with stands in the place of a name: places are numbers of rows.
    ids = [
        f"{OTHER_END}{place}" if gone else one
        for place, (one, gone) in enumerate(zip(model.raw_ids.to_pylist(), named, strict=True))
    ]
    left = Evidence(edges, taken, num_candidates=model.config.model.candidates)
    trained = replace(model.trained, evidence=left)
    return len(places), save_friends(folder, replace(model, raw_ids=pa.array(ids, pa.string()), trained=trained))
