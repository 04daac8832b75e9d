"""A model folder: all that is needed to score, to serve, and to graft on. No pickle; damaged files are refused by name.

config.json          the run's whole configuration, its release, table versions, parent, metrics
weights.safetensors  every tensor but the user table
users.safetensors    the user table, apart from the rest: it can be huge, and it is personal data. Optional.
users.parquet        raw user id -> row of the user table. Optional, as above.
user_features.safetensors of each encoder that the model reads: vectors of users, as of items below. Optional, as above.
content.safetensors  what items are (float16), where the task reads it
features.safetensors of each encoder that the model reads: vectors of items (float16), which have one, its whitening;
                     of a trained one: texts as words, and the words' vectors
catalogue.parquet    row, global index, raw item id, title, popularity, whether it is predicted (where not all are),
                     untrained (where the model does without ids) and of the domain that is asked (where the model reads
                     which one is), entity index of each knowledge slot
manifest.json        SHA-256 of each file above; written last, so that a half-written folder is no model
"""

import hashlib
import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from pydantic import TypeAdapter
from safetensors.torch import load_file, save_file
from torch import Tensor

from etl.plain_path import absolute
from etl.settings import GraftrecError, replaced
from etl.tables import UNK
from trainer import old_versions
from trainer.arrays import Int32Array
from trainer.config import (
    FinetuneConfig,
    ItemFeaturesConfig,
    JoinedFeaturesConfig,
    PretrainConfig,
    TaskHead,
    event_types_read,
    patch_of,
)
from trainer.data.catalogue import Catalogue, Texts
from trainer.data.documents import Documents
from trainer.data.item_features import Content
from trainer.data.item_vectors import EncodedVectors, Whitening
from trainer.data.release import Release
from trainer.inference.scorer import LaterVectors, ModelScorer
from trainer.models import DocumentTable, FeatureTable, ModelSizes, SequenceModel, build_saved
from trainer.models.row_table import interleave
from trainer.tasks import Task, build_task

CONFIG, WEIGHTS, CATALOGUE, MANIFEST = "config.json", "weights.safetensors", "catalogue.parquet", "manifest.json"
ORIGIN = "origin.json"  # the lake's place, and what the training cost: no part of the hash
COSTS = ("seconds", "pretrain_seconds", "peak_gb")  # metrics that another training of the same model has otherwise
USERS, USER_IDS = "users.safetensors", "users.parquet"
USER_FEATURES = "user_features.safetensors"
OPTIONAL = (USERS, USER_IDS, USER_FEATURES)  # personal data
CONTENT = "content"
FEATURES = "features.safetensors"
DOCUMENT = "document"  # with a colon behind it; of other encoders a slash is behind the name
USER_TABLE = "user_embedding.weight"
FRIENDS_RECIPE = "friends"  # of folders that hold no network of sequences: see `trainer/social/friends_folder.py`


class ModelFolderError(GraftrecError):
    """A model folder that is not there, incomplete, or damaged."""


@dataclass(frozen=True)
class TrainedModel:
    """A trained model with what it was trained on."""

    folder: Path
    config: PretrainConfig
    lake: str
    release: int
    versions: dict[str, int]  # Delta version of each table it was trained on
    catalogue: Catalogue
    popularity: npt.NDArray[np.int64]  # [V] interactions in the training part of its domain
    knowledge: Int32Array  # [V, S] entity indices
    model: SequenceModel  # in eval mode
    task: Task
    parent: str | None  # hash of the model it was grafted on
    hash: str  # of the folder's required files
    metrics: dict[str, float]
    classes: dict[str, tuple[str, ...]]  # head of the task -> the classes that it tells, in the order of its outputs
    categories: tuple[str, ...]  # those that have flags in what items are, where the task reads that
    users: dict[str, int] | None  # raw user id -> row; None where the folder lacks it
    features: dict[str, EncodedVectors]  # encoder -> its vectors of items, where the model reads any
    user_features: dict[str, EncodedVectors]  # as `features`, of users
    documents: Documents | None = None  # texts of items, where the model reads these
    # Encoder -> its weights and template; empty in folders of before.
    encodings: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    # Of items that came after training (`trainer.inference.later_items`), the last rows of the catalogue: [N, Q].
    later: LaterVectors | None = None
    later_items: Any = None

    @property
    def predicted_V(self) -> npt.NDArray[np.bool_] | None:
        """[V] the rows that are ever an answer, later items among them; None: all real ones."""
        if self.model.predicted_V is None:
            return None
        own = self.model.predicted_V.cpu().numpy()
        return np.concatenate([own, np.ones(len(self.catalogue) - len(own), bool)])

    @property
    def event_types(self) -> tuple[str, ...]:
        """The kinds of event that the model reads, or passes over."""
        return event_types_read(self.config)

    def scorer(self, *, device: str = "cpu", clicks: bool = False) -> ModelScorer:
        """`clicks`: items may be scored by whether a user takes each. Raises ModelFolderError for a model that ranks no
        items."""
        task = self.config.task
        if not (task.ranks_items or (clicks and task.scores_items)):
            raise ModelFolderError(
                f"expected a model that ranks items, found {self.folder}, which predicts a user's {task.predicts}; "
                "`python -m trainer evaluate` scores it"
            )
        return ModelScorer(self.model, self.task, device=device, later=self.later)

    @property
    def facts(self) -> dict[str, Any]:
        """What a summary says of it."""
        return {"folder": str(self.folder), "hash": self.hash, "parent": self.parent} | self.metrics

    def user_scorer(self) -> ModelScorer:
        """Hidden states of users, for whatever is predicted by them."""
        return ModelScorer(self.model, self.task, device=next(self.model.parameters()).device)


@dataclass(frozen=True, kw_only=True)
class ModelParts:
    """What a model folder is made of.

    `weights`: each tensor whole, or the parts that processes shared it out in (row r in part r mod their number).
    `parent`: the hash of its folder. `users`: user (raw id), index. `predicted`: the rows that are ever an answer;
    None: all real ones. `untrained`: those that nobody has had, where the model does without ids. `asked`: those of the
    domain that is asked, where the model reads which one is. `classes`: of the task's heads, if any; `task_heads`: the
    task's layers; `content`: what items are, where the task reads it.
    """

    config: PretrainConfig
    release: Release
    catalogue: Catalogue
    popularity: npt.NDArray[np.int64]
    knowledge: Int32Array
    weights: Mapping[str, Tensor | Sequence[Tensor]]
    metrics: dict[str, float]
    parent: str | None
    users: pa.Table | None
    predicted: npt.NDArray[np.bool_] | None = None
    untrained: npt.NDArray[np.bool_] | None = None
    asked: npt.NDArray[np.bool_] | None = None
    classes: Mapping[str, Sequence[str]] = field(default_factory=dict)
    task_heads: Mapping[str, TaskHead] = field(default_factory=dict)
    content: Content | None = None
    features: Mapping[str, EncodedVectors] = field(default_factory=dict)
    user_features: Mapping[str, EncodedVectors] = field(default_factory=dict)
    documents: Documents | None = None
    encodings: Mapping[str, Mapping[str, str]] = field(default_factory=dict)


def feature_tables(features: Mapping[str, EncodedVectors]) -> tuple[FeatureTable, ...]:
    """As a model takes them."""
    found = features.values()
    return tuple(FeatureTable(torch.from_numpy(one.vectors_VF), torch.from_numpy(one.has_V)) for one in found)


def document_table(documents: Documents | None) -> DocumentTable | None:
    """As a model takes them."""
    if documents is None:
        return None
    return DocumentTable(torch.from_numpy(documents.words_VL), torch.from_numpy(documents.vectors_UF))


def _save_features(path: Path, features: Mapping[str, EncodedVectors], documents: Documents | None) -> None:
    tensors: dict[str, Tensor] = {}
    if (table := document_table(documents)) is not None:
        tensors = {f"{DOCUMENT}:words": table.words_VL, f"{DOCUMENT}:vectors": table.vectors_UF}
    for encoder, one in features.items():
        parts = {"vectors": one.vectors_VF, "has": one.has_V}
        parts |= {"mean": one.whitening.mean_F, "transform": one.whitening.transform_FF}
        tensors |= {f"{encoder}/{name}": torch.from_numpy(np.ascontiguousarray(part)) for name, part in parts.items()}
    save_file(tensors, path)


def _load_features(path: Path, config: JoinedFeaturesConfig) -> tuple[dict[str, EncodedVectors], Documents | None]:
    if not config.given:
        return {}, None
    found = {name: tensor.numpy() for name, tensor in load_file(path).items()}
    documents = None
    if isinstance(config, ItemFeaturesConfig) and config.document is not None:
        documents = Documents(found[f"{DOCUMENT}:words"], found[f"{DOCUMENT}:vectors"])
    features = {
        one: EncodedVectors(
            found[f"{one}/vectors"],
            found[f"{one}/has"],
            Whitening(found[f"{one}/mean"], found[f"{one}/transform"]),
        )
        for one in config.encoders
    }
    return features, documents


def _load_user_features(
    path: Path, config: JoinedFeaturesConfig, weights: Mapping[str, Tensor]
) -> dict[str, EncodedVectors]:
    """Of nobody, where the folder lacks them or users are left out."""
    if not config.given:
        return {}
    if path.is_file() and len(weights[USER_TABLE]) > UNK + 1:
        return _load_features(path, config)[0]
    found = {}
    for place, encoder in enumerate(config.encoders):
        width = weights[f"features.user.projections.{place}.weight"].shape[1]
        no_change = Whitening(np.zeros(width, np.float32), np.eye(width, dtype=np.float32))
        nobody = np.zeros((len(weights[USER_TABLE]), width), np.float16)
        found[encoder] = EncodedVectors(nobody, np.zeros(len(nobody), dtype=bool), no_change)
    return found


def save_model(folder: Path, parts: ModelParts) -> str:
    """Write a model folder in the place of any old one; returns its hash."""
    config, release, catalogue, content = parts.config, parts.release, parts.catalogue, parts.content
    new = begun(folder)
    tensors = {name: _whole(shares, new / f"{name}.whole") for name, shares in parts.weights.items()}
    user_table = tensors.pop(USER_TABLE, None)
    save_file(tensors, new / WEIGHTS)
    if content is not None:
        save_file({CONTENT: torch.from_numpy(content.vectors_VF).half()}, new / f"{CONTENT}.safetensors")
    if config.model.features.given:
        _save_features(new / FEATURES, parts.features, parts.documents)
    described: dict[str, Any] = {
        "recipe": "finetune" if isinstance(config, FinetuneConfig) else "pretrain",
        "config": replaced(config, data=replaced(config.data, lake="")).model_dump(mode="json"),
        "release": release.number,
        "versions": release.versions,
        "parent": parts.parent,
        "classes": {head: list(names) for head, names in parts.classes.items()},
        "task_heads": {
            name: head if isinstance(head, int) else head.model_dump() for name, head in parts.task_heads.items()
        },
        "encodings": {name: dict(one) for name, one in parts.encodings.items()},
        "categories": list(content.categories) if content is not None else [],
        "metrics": {name: value for name, value in parts.metrics.items() if name not in COSTS},
        "num_users": 0 if user_table is None else len(user_table),
        "num_entities": len(tensors["entity_embedding.weight"]) if "entity_embedding.weight" in tensors else 0,
    }
    (new / CONFIG).write_text(json.dumps(described, indent=1))
    rows = {
        "row": np.arange(len(catalogue)),
        "index": catalogue.global_index,
        "item": catalogue.raw_ids,
        "title": catalogue.titles,
        "popularity": parts.popularity,
        "knowledge": pa.FixedSizeListArray.from_arrays(parts.knowledge.ravel(), parts.knowledge.shape[1])
        if parts.knowledge.shape[1]
        else pa.array([[] for _ in range(len(catalogue))], pa.list_(pa.int32())),
    }
    if parts.predicted is not None:
        rows["predicted"] = parts.predicted
    if parts.untrained is not None:
        rows["untrained"] = parts.untrained
    if parts.asked is not None:
        rows["asked"] = parts.asked
    pq.write_table(pa.table(rows), new / CATALOGUE)
    if user_table is not None:
        save_file({USER_TABLE: user_table}, new / USERS)
        if parts.user_features:
            _save_features(new / USER_FEATURES, parts.user_features, None)
        if parts.users is not None:
            pq.write_table(parts.users.select(["user", "index"]), new / USER_IDS)
    for scratch in new.glob("*.whole"):
        scratch.unlink()
    costs = {name: parts.metrics[name] for name in COSTS if name in parts.metrics}
    return finished(folder, {"lake": release.lake, "costs": costs})


def begun(folder: Path) -> Path:
    """An empty folder beside a model's, to be filled with its files; `finished` puts it in the place of any old one."""
    new = folder.with_name(folder.name + ".new")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    return new


def finished(folder: Path, origin: Mapping[str, Any]) -> str:
    """Seal the files that stand in what `begun` gave. Returns the model folder's hash."""
    new = folder.with_name(folder.name + ".new")
    digests = {path.name: digest_of(path) for path in sorted(new.iterdir())}
    (new / MANIFEST).write_text(json.dumps(digests, indent=1))
    (new / ORIGIN).write_text(json.dumps(origin), encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    new.rename(folder)
    return _hash(digests)


def _whole(parts: Tensor | Sequence[Tensor], scratch: Path) -> Tensor:
    """One tensor of its parts. It is put together in the file `scratch`, for it may be larger than memory."""
    if isinstance(parts, Tensor) or len(parts) == 1:
        one = parts if isinstance(parts, Tensor) else parts[0]
        return one.detach().cpu().contiguous()
    shape = (sum(map(len, parts)), *parts[0].shape[1:])
    whole = torch.from_file(str(scratch), shared=True, size=math.prod(shape), dtype=parts[0].dtype).view(shape)
    interleave(whole, parts)
    return whole


def load_model(folder: str | Path, *, device: str = "cpu", users: bool = True) -> TrainedModel:
    """Read a model folder. `users` False: without the user table (every user is then unknown). Raises ArtifactError."""
    folder = Path(folder)
    digests = _verified(folder)
    weights = load_file(folder / WEIGHTS)
    with_users = users and USERS in digests
    if with_users:
        weights[USER_TABLE] = load_file(folder / USERS)[USER_TABLE].to(next(iter(weights.values())).dtype)
    ids = None
    if with_users and USER_IDS in digests:
        named = pq.read_table(folder / USER_IDS)
        ids = dict(zip(named["user"].to_pylist(), named["index"].to_pylist(), strict=True))
    return read_model(folder, weights, digests, users=ids, device=device)


def read_model(
    folder: Path,
    weights: dict[str, Tensor],
    digests: dict[str, str],
    *,
    users: dict[str, int] | None,
    user_features: dict[str, EncodedVectors] | None = None,
    device: str,
) -> TrainedModel:
    """The model of a folder's settings and catalogue, and of tensors that were read already, which it takes as they
    are; `digests` of the whole folder's files. `user_features` None: the folder's."""
    config, parent = config_of(folder)
    described = json.loads((folder / CONFIG).read_text())
    classes = {head: tuple(names) for head, names in described.get("classes", {}).items()}
    rows = pq.read_table(folder / CATALOGUE)
    flat = rows["knowledge"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
    knowledge = np.asarray(flat, dtype=np.int32).reshape(len(rows), -1)
    if config.model.user_width and USER_TABLE not in weights:  # everybody is unknown
        nobody = torch.zeros(UNK + 1, config.model.user_width)
        weights[USER_TABLE] = nobody.to(next(iter(weights.values())))
    features, documents = _load_features(folder / FEATURES, config.model.features)
    if user_features is None:
        user_features = _load_user_features(folder / USER_FEATURES, config.model.user_features, weights)
    model = build_saved(
        config.model,
        ModelSizes(
            num_users=len(weights[USER_TABLE]) if config.model.user_width else 0,
            num_entities=described["num_entities"],
            knowledge_VS=torch.from_numpy(knowledge.copy()),
            num_event_types=len(config.data.event_types),
            features=feature_tables(features),
            documents=document_table(documents),
            user_features=feature_tables(user_features),
        ),
        weights=weights,
        patch=patch_of(config),
        task_heads={
            name: TypeAdapter(TaskHead).validate_python(head) for name, head in described.get("task_heads", {}).items()
        },
    )
    if (predicts := folder / f"{CONTENT}.safetensors").is_file():
        model.describe(load_file(predicts)[CONTENT].float())
    if "predicted" in rows.column_names:
        model.restrict_targets(torch.from_numpy(rows["predicted"].to_numpy()))
    if "untrained" in rows.column_names:
        model.mark_untrained(torch.from_numpy(rows["untrained"].to_numpy()))
    if "asked" in rows.column_names:
        model.ask_for(torch.from_numpy(rows["asked"].to_numpy()))
    return TrainedModel(
        folder=folder,
        config=config,
        lake=lake_of(folder),
        release=described["release"],
        versions=described["versions"],
        catalogue=_catalogue(rows),
        popularity=rows["popularity"].to_numpy().astype(np.int64),
        knowledge=knowledge,
        model=model.to(device).eval(),
        task=build_task(config.task),
        parent=parent,
        hash=_hash(digests),
        metrics=described["metrics"] | _origin(folder).get("costs", {}),
        classes=classes,
        categories=tuple(described.get("categories", ())),
        users=users,
        features=features,
        user_features=user_features,
        documents=documents,
        encodings=described.get("encodings", {}),
    )


def recipe_of(folder: Path) -> str:
    """The recipe that made a model folder; "" where that can't be read."""
    try:
        return str(json.loads((folder / CONFIG).read_text())["recipe"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def config_of(folder: Path) -> tuple[PretrainConfig, str | None]:
    """Settings of the run that made a model folder, and the hash of the model it was grafted on. Raises
    ModelFolderError."""
    if recipe_of(folder) == FRIENDS_RECIPE:
        raise ModelFolderError(
            f"expected a model of sequences in {folder}, found an attention over friends, which stands beside one: "
            "register it with the alias `friends`, or give it as `friends` of recommend"
        )
    described = json.loads((folder / CONFIG).read_text())
    kind = FinetuneConfig if described["recipe"] == "finetune" else PretrainConfig
    config = kind.model_validate(old_versions.settings(described["config"]))
    return replaced(config, data=replaced(config.data, lake=lake_of(folder))), described["parent"]


def lake_of(folder: Path) -> str:
    """The lake that a model was trained on. Raises ModelFolderError."""
    return absolute(_origin(folder)["lake"])


def release_of(folder: Path) -> int:
    """The number of the release that a model was trained on. Raises ModelFolderError."""
    try:
        return int(json.loads((folder / CONFIG).read_text())["release"])
    except (OSError, ValueError, KeyError, TypeError):
        raise ModelFolderError(f"{folder / CONFIG}: expected a release, found none; restore the folder") from None


def _origin(folder: Path) -> dict[str, Any]:
    """Raises ModelFolderError where it can't be read."""
    path = folder / ORIGIN
    try:
        if not path.is_file():  # an older folder has all of it in its configuration
            return {"lake": json.loads((folder / CONFIG).read_text())["lake"]}
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(found["lake"], str):
            return found
    except (ValueError, KeyError, TypeError):
        pass
    raise ModelFolderError(f"{path} is missing or damaged: expected the lake that the model was trained on; restore it")


def catalogue_of(folder: Path) -> Catalogue:
    """The catalogue of a model folder."""
    return _catalogue(pq.read_table(folder / CATALOGUE, columns=["index", "item", "title"]))


def _catalogue(rows: pa.Table) -> Catalogue:
    return Catalogue(rows["index"].to_numpy().astype(np.int64), Texts(rows["item"]), Texts(rows["title"]))


def model_hash(folder: str | Path) -> str:
    """The hash of a model folder, its files verified. Raises ArtifactError."""
    return _hash(_verified(Path(folder)))


def _verified(folder: Path) -> dict[str, str]:
    """Digests of the files that are there. Raises ArtifactError for one that is missing or differs."""
    if not (folder / MANIFEST).is_file():
        raise ModelFolderError(
            f"no model in {folder}: expected {MANIFEST} and the files it names; give a finished run's `model` folder"
        )
    try:
        digests: dict[str, str] = json.loads((folder / MANIFEST).read_text())
    except ValueError:
        raise ModelFolderError(f"{folder / MANIFEST} is damaged; train the model again or restore the folder") from None
    for name in list(digests):
        path = folder / name
        if not path.is_file():
            if name in OPTIONAL:
                del digests[name]
                continue
            raise ModelFolderError(f"{path} is missing; train the model again or restore the folder")
        if digest_of(path) != digests[name]:
            raise ModelFolderError(f"{path} is damaged: its SHA-256 is not the manifest's; train again or restore it")
    return digests


def digest_of(path: Path) -> str:
    """A file's SHA-256."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _hash(digests: dict[str, str]) -> str:
    required = {name: digest for name, digest in digests.items() if name not in OPTIONAL}
    return hashlib.sha256(json.dumps(required, sort_keys=True).encode()).hexdigest()[:32]
