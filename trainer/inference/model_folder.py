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
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from pydantic import Field, ValidationError
from safetensors.torch import save_file
from torch import Tensor

from etl.plain_path import absolute
from etl.program import spelled
from etl.settings import SectionT, explained, replaced, without_credentials
from etl.tables import FIRST_INDEX, UNK
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
from trainer.trust.verified_files import MANIFEST as MANIFEST
from trainer.trust.verified_files import ModelFolderError as ModelFolderError
from trainer.trust.verified_files import Record, VerifiedFolder, read_json, record, refused, verified
from trainer.trust.verified_files import digest_of as digest_of

CONFIG, WEIGHTS, CATALOGUE = "config.json", "weights.safetensors", "catalogue.parquet"
REQUIRED = (CONFIG, WEIGHTS, CATALOGUE)
ORIGIN = "origin.json"  # the lake's place, and what the training cost: no part of the hash
COSTS = ("seconds", "pretrain_seconds", "peak_gb")  # metrics that another training of the same model has otherwise
USERS, USER_IDS = "users.safetensors", "users.parquet"
USER_FEATURES = "user_features.safetensors"
MAX_INDEX, MAX_NUMBER = 2**31 - 1, 2**63 - 1  # rows and indices of tables; any other whole number
OPTIONAL = (USERS, USER_IDS, USER_FEATURES)  # personal data
CONTENT, CONTENT_FILE = "content", "content.safetensors"
FEATURES = "features.safetensors"
DOCUMENT = "document"  # with a colon behind it; of other encoders a slash is behind the name
USER_TABLE = "user_embedding.weight"
FRIENDS_RECIPE = "friends"  # of folders that hold no network of sequences: see `trainer/social/friends_folder.py`


MEND = "train the model again or restore the folder"
WHERE = "give a finished run's `model` folder"


_Count = Annotated[int, Field(ge=0, le=MAX_NUMBER)]


class _Description(Record):
    """What config.json holds. Of folders from before, some keys are not there, and `lake` is."""

    recipe: Literal["pretrain", "finetune"]
    config: dict[str, Any]
    release: _Count
    versions: dict[str, _Count]
    parent: str | None
    classes: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    task_heads: dict[str, TaskHead] = Field(default_factory=dict)
    encodings: dict[str, dict[str, str]] = Field(default_factory=dict)
    categories: tuple[str, ...] = ()
    metrics: dict[str, float]
    num_users: _Count
    num_entities: _Count
    lake: str = ""


class _Origin(Record):
    """What origin.json holds; no hash covers it."""

    lake: str
    costs: dict[str, float] = Field(default_factory=dict)


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
                f"`{spelled('trainer', 'evaluate')}` scores it"
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


def _load_features(
    folder: VerifiedFolder, name: str, config: JoinedFeaturesConfig, rows: int
) -> tuple[dict[str, EncodedVectors], Documents | None]:
    """Of `rows` items or users. Raises ModelFolderError."""
    if not config.given:
        return {}, None
    found = {key: tensor.numpy() for key, tensor in folder.tensors(name).items()}

    def part(key: str, dtype: type[Any], *shape: int | None) -> npt.NDArray[Any]:
        if key not in found:
            raise ModelFolderError(f"{folder.path / name}: expected {key}, found none; {folder.mend}")
        given = found[key]
        fits = given.ndim == len(shape) and all(
            want in (None, has) for want, has in zip(shape, given.shape, strict=True)
        )
        if not fits or not np.issubdtype(given.dtype, dtype):
            expected = f"{dtype.__name__} {list(shape)}".replace("None", "any")
            raise ModelFolderError(
                f"{folder.path / name}: expected {key} to be {expected}, found {given.dtype} {list(given.shape)}; "
                f"{folder.mend}"
            )
        return given

    documents = None
    if isinstance(config, ItemFeaturesConfig) and config.document is not None:
        words = part(f"{DOCUMENT}:words", np.integer, rows, None)
        of_words = part(f"{DOCUMENT}:vectors", np.floating, None, None)
        if words.size and not 0 <= int(words.min()) <= int(words.max()) < len(of_words):
            raise ModelFolderError(
                f"{folder.path / name}: expected words from 0 to {len(of_words) - 1}, found {words.min()} to "
                f"{words.max()}; {folder.mend}"
            )
        documents = Documents(words, of_words)
    features = {}
    for one in config.encoders:
        vectors = part(f"{one}/vectors", np.floating, rows, None)
        width = vectors.shape[1]
        mean, transform = part(f"{one}/mean", np.floating, width), part(f"{one}/transform", np.floating, width, width)
        features[one] = EncodedVectors(vectors, part(f"{one}/has", np.bool_, rows), Whitening(mean, transform))
    return features, documents


def _load_user_features(
    folder: VerifiedFolder, config: JoinedFeaturesConfig, weights: Mapping[str, Tensor]
) -> dict[str, EncodedVectors]:
    """Of nobody, where the folder lacks them or users are left out."""
    if not config.given:
        return {}
    rows = len(weights[USER_TABLE])
    if USER_FEATURES in folder and rows > UNK + 1:
        return _load_features(folder, USER_FEATURES, config, rows)[0]
    found = {}
    for place, encoder in enumerate(config.encoders):
        width = weights[f"features.user.projections.{place}.weight"].shape[1]
        no_change = Whitening(np.zeros(width, np.float32), np.eye(width, dtype=np.float32))
        nobody = np.zeros((rows, width), np.float16)
        found[encoder] = EncodedVectors(nobody, np.zeros(rows, dtype=bool), no_change)
    return found


def save_model(folder: Path, parts: ModelParts) -> str:
    """Write a model folder in the place of any old one; returns its hash."""
    config, release, catalogue, content = parts.config, parts.release, parts.catalogue, parts.content
    new = begun(folder)
    tensors = {name: _whole(shares, new / f"{name}.whole") for name, shares in parts.weights.items()}
    user_table = tensors.pop(USER_TABLE, None)
    save_file(tensors, new / WEIGHTS)
    if content is not None:
        save_file({CONTENT: torch.from_numpy(content.vectors_VF).half()}, new / CONTENT_FILE)
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
    """Read a model folder. `users` False: without the user table (every user is then unknown). Raises
    ModelFolderError."""
    found = verified_model(folder)
    require_sequences(found.path)
    weights = found.tensors(WEIGHTS)
    with_users = users and USERS in found
    if with_users:
        weights |= {USER_TABLE: user_table(found)}
    ids = user_ids(found, len(weights[USER_TABLE])) if with_users and USER_IDS in found else None
    return read_model(found, weights, users=ids, device=device)


def user_table(folder: VerifiedFolder, *, device: str = "cpu") -> Tensor:
    """Raises ModelFolderError for a file of other tensors."""
    found = folder.tensors(USERS, device=device)
    if found.keys() != {USER_TABLE}:
        raise ModelFolderError(
            f"{folder.path / USERS}: expected {USER_TABLE}, found {', '.join(found)[:100] or 'nothing'}; {folder.mend}"
        )
    return found[USER_TABLE]


def user_ids(folder: VerifiedFolder, num_users: int) -> dict[str, int]:
    """Raw user id -> row of the user table. Raises ModelFolderError for rows that it lacks."""
    path = folder.path / USER_IDS
    named = folder.table(USER_IDS, ["user", "index"], max_rows=num_users)
    with refused(path, folder.mend):
        ids, rows = named["user"].cast(pa.string()), named["index"].cast(pa.int64())
        if ids.null_count or rows.null_count or not _within(rows, num_users):
            raise ModelFolderError(
                f"{path}: expected an id for each user, and rows from 0 to {num_users - 1}, found others; {folder.mend}"
            )
        return dict(zip(ids.to_pylist(), rows.to_pylist(), strict=True))


def _within(column: pa.ChunkedArray, stop: int) -> bool:
    """Whether all of a column of whole numbers is from 0 to below `stop`."""
    if not len(column):
        return True
    ends = pc.min_max(column).as_py()
    return int(ends["min"]) >= 0 and int(ends["max"]) < stop


def read_model(
    folder: VerifiedFolder,
    weights: dict[str, Tensor],
    *,
    users: dict[str, int] | None,
    user_features: dict[str, EncodedVectors] | None = None,
    device: str,
) -> TrainedModel:
    """The model of a folder's settings and catalogue, and of tensors that were read already, which it takes as they
    are. `user_features` None: the folder's. Raises ModelFolderError."""
    config, described = _described(folder.path)
    check_floating(folder.path / WEIGHTS, weights)
    if config.model.user_width and USER_TABLE not in weights:  # everybody is unknown
        nobody = torch.zeros(UNK + 1, config.model.user_width)
        weights[USER_TABLE] = nobody.to(next(iter(weights.values())))
    most = max((len(tensor) for tensor in weights.values() if tensor.ndim), default=0)
    rows = _read_rows(folder, config, described.num_entities, most)
    flat = rows["knowledge"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
    knowledge = np.asarray(flat, dtype=np.int32).reshape(len(rows), -1)
    with refused(folder.path, MEND):
        features, documents = _load_features(folder, FEATURES, config.model.features, len(rows))
        if user_features is None:
            user_features = _load_user_features(folder, config.model.user_features, weights)
        model = build_saved(
            config.model,
            ModelSizes(
                num_users=len(weights[USER_TABLE]) if config.model.user_width else 0,
                num_entities=described.num_entities,
                knowledge_VS=torch.from_numpy(knowledge.copy()),
                num_event_types=len(config.data.event_types),
                features=feature_tables(features),
                documents=document_table(documents),
                user_features=feature_tables(user_features),
            ),
            weights=weights,
            patch=patch_of(config),
            task_heads=described.task_heads,
        )
        if CONTENT_FILE in folder:
            model.describe(_content(folder, len(rows)))
        if "predicted" in rows.column_names:
            model.restrict_targets(torch.from_numpy(rows["predicted"].to_numpy()))
        if "untrained" in rows.column_names:
            model.mark_untrained(torch.from_numpy(rows["untrained"].to_numpy()))
        if "asked" in rows.column_names:
            model.ask_for(torch.from_numpy(rows["asked"].to_numpy()))
    return TrainedModel(
        folder=folder.path,
        config=config,
        lake=config.data.lake,
        release=described.release,
        versions=described.versions,
        catalogue=_catalogue(rows),
        popularity=rows["popularity"].to_numpy().astype(np.int64),
        knowledge=knowledge,
        model=model.to(device).eval(),
        task=build_task(config.task),
        parent=described.parent,
        hash=hash_of(folder),
        metrics=described.metrics | _origin(folder.path).costs,
        classes=described.classes,
        categories=described.categories,
        users=users,
        features=features,
        user_features=user_features,
        documents=documents,
        encodings=described.encodings,
    )


def check_floating(path: Path, weights: Mapping[str, Tensor]) -> None:
    """Raises ModelFolderError for weights of other types than networks compute in, or none."""
    if not weights:
        raise ModelFolderError(f"{path}: expected weights, found none; {MEND}")
    if wrong := [
        name for name, one in weights.items() if one.dtype not in (torch.float64, torch.float32, torch.bfloat16)
    ]:
        raise ModelFolderError(f"{path}: expected weights in floating point, found {weights[wrong[0]].dtype}; {MEND}")


def _content(folder: VerifiedFolder, num_rows: int) -> Tensor:
    found = folder.tensors(CONTENT_FILE)
    shapes = {name: list(tensor.shape) for name, tensor in found.items()}
    if shapes.keys() != {CONTENT} or len(shapes[CONTENT]) != 2 or shapes[CONTENT][0] != num_rows:
        raise ModelFolderError(
            f"{folder.path / CONTENT_FILE}: expected {CONTENT} of {num_rows} rows, found {str(shapes)[:100]}; "
            f"{folder.mend}"
        )
    return found[CONTENT].float()


_CATALOGUE_TYPES: dict[str, tuple[str, pa.DataType]] = {
    "index": ("whole numbers", pa.int64()),
    "item": ("texts", pa.string()),
    "title": ("texts", pa.string()),
    "popularity": ("whole numbers", pa.int64()),
    "predicted": ("true or false", pa.bool_()),
    "untrained": ("true or false", pa.bool_()),
    "asked": ("true or false", pa.bool_()),
}


def _read_rows(folder: VerifiedFolder, config: PretrainConfig, num_entities: int, most: int) -> pa.Table:
    """The catalogue, of at most `most` rows. Raises ModelFolderError for what no model writes."""
    path = folder.path / CATALOGUE
    rows = folder.table(CATALOGUE, max_rows=most)
    needed = {"index", "item", "title", "popularity", "knowledge"}
    needed |= {"predicted"} if config.data.predicted is not None else set()
    needed |= {"asked"} if config.model.domain_asked else set()
    if lacking := needed - set(rows.column_names):
        raise ModelFolderError(f"{path}: expected the column {min(lacking)}, found none; {folder.mend}")
    with refused(path, folder.mend):
        rows = _typed(rows, path, folder.mend)
        slots = rows["knowledge"].combine_chunks()
        widths = set(pc.unique(pc.list_value_length(slots)).to_pylist())
        entities = slots.flatten()
        wanted = sum(config.model.knowledge.values())
        sound = widths == {wanted} and not slots.null_count and not entities.null_count
        if not sound or (len(entities) and not _within(pa.chunked_array([entities]), max(num_entities, 1))):
            raise ModelFolderError(
                f"{path}: expected entities from 0 to {num_entities - 1} in {wanted} slots of each row, found others; "
                f"{folder.mend}"
            )
    return rows


def _typed(rows: pa.Table, path: Path, mend: str) -> pa.Table:
    if len(rows) < FIRST_INDEX:
        raise ModelFolderError(f"{path}: expected {FIRST_INDEX} rows at least, found {len(rows)}; {mend}")
    for name, (what, kind) in _CATALOGUE_TYPES.items():
        if name not in rows.column_names:
            continue
        column = rows[name]
        is_kind = pa.types.is_integer(column.type) if kind == pa.int64() else column.type in (kind, pa.large_string())
        if not is_kind or column.null_count:
            raise ModelFolderError(f"{path}: expected {what} in {name}, found {column.type} or nothing; {mend}")
        column = column.cast(kind)
        if kind == pa.int64() and not _within(column, MAX_INDEX if name == "index" else MAX_NUMBER):
            raise ModelFolderError(f"{path}: expected {name} of 0 and more, found others; {mend}")
        rows = rows.set_column(rows.column_names.index(name), name, column)
    return rows


def recipe_of(folder: Path) -> str:
    """The recipe that made a model folder; "" where that can't be read."""
    try:
        found = read_json(folder / CONFIG, MEND)
    except ModelFolderError:
        return ""
    recipe = found.get("recipe") if isinstance(found, dict) else None
    return recipe if isinstance(recipe, str) else ""


def config_of(folder: Path) -> tuple[PretrainConfig, str | None]:
    """Settings of the run that made a model folder, and the hash of the model it was grafted on. Raises
    ModelFolderError."""
    config, described = _described(folder)
    return config, described.parent


def require_sequences(folder: Path) -> None:
    """Raises ModelFolderError for a folder of another kind of model than one of sequences."""
    if recipe_of(folder) == FRIENDS_RECIPE:
        raise ModelFolderError(
            f"expected a model of sequences in {folder}, found an attention over friends, which stands beside one: "
            "register it with the alias `friends`, or give it as `friends` of recommend"
        )


def _described(folder: Path) -> tuple[PretrainConfig, _Description]:
    require_sequences(folder)
    path = folder / CONFIG
    described = record(_Description, read_json(path, MEND), path, MEND)
    kind = FinetuneConfig if described.recipe == "finetune" else PretrainConfig
    config = saved_settings(kind, old_versions.settings(described.config), path)
    return replaced(config, data=replaced(config.data, lake=lake_of(folder))), described


def saved_settings(kind: type[SectionT], given: Mapping[str, Any], path: Path) -> SectionT:
    """Settings that a folder holds. Raises ModelFolderError, for those that only a newer version knows too."""
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        raise ModelFolderError(
            f"{path}: {explained(kind, error)}; a newer version of graftrec may have written it: read it with that "
            f"one, or {MEND}"
        ) from None


def lake_of(folder: Path) -> str:
    """The lake that a model was trained on. Raises ModelFolderError."""
    return absolute(_origin(folder).lake)


def release_of(folder: Path) -> int:
    """The number of the release that a model was trained on. Raises ModelFolderError."""
    return _described(folder)[1].release


def _origin(folder: Path) -> _Origin:
    """Raises ModelFolderError where it can't be read."""
    path = folder / ORIGIN
    try:
        if path.exists() or path.is_symlink():
            found = read_json(path, MEND)
        else:  # an older folder has all of it in its configuration
            found = {"lake": read_json(folder / CONFIG, MEND)["lake"]}
        origin = record(_Origin, found, path, MEND)
        without_credentials(origin.lake)
        return origin
    except (ModelFolderError, ValueError, LookupError, TypeError):
        raise ModelFolderError(
            f"{path} is missing or damaged: expected the lake that the model was trained on; restore it"
        ) from None


def catalogue_of(folder: VerifiedFolder) -> Catalogue:
    """The catalogue of a model folder. Raises ModelFolderError."""
    rows = folder.table(CATALOGUE, ["index", "item", "title"], max_rows=MAX_INDEX)
    with refused(folder.path / CATALOGUE, folder.mend):
        return _catalogue(_typed(rows, folder.path / CATALOGUE, folder.mend))


def _catalogue(rows: pa.Table) -> Catalogue:
    return Catalogue(rows["index"].to_numpy().astype(np.int64), Texts(rows["item"]), Texts(rows["title"]))


def verified_model(folder: str | Path, required: Collection[str] = REQUIRED) -> VerifiedFolder:
    """A model folder whose files are those of its manifest. Raises ModelFolderError."""
    folder = Path(folder)
    mend = MEND if (folder / MANIFEST).is_file() else WHERE
    return verified(folder, required, mend=mend, optional=OPTIONAL, what="model")


def model_hash(folder: str | Path, required: Collection[str] = REQUIRED) -> str:
    """The hash of a model folder, its files verified. Raises ModelFolderError."""
    return hash_of(verified_model(folder, required))


def hash_of(folder: VerifiedFolder) -> str:
    """Of all its files but those with personal data."""
    return _hash(dict(folder.digests))


def _hash(digests: dict[str, str]) -> str:
    required = {name: digest for name, digest in digests.items() if name not in OPTIONAL}
    return hashlib.sha256(json.dumps(required, sort_keys=True).encode()).hexdigest()[:32]
