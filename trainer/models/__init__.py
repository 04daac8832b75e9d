"""One file per model: the network, its configuration's meaning, its parameter groups."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from etl.settings import ConfigError
from trainer.config import (
    Bert4RecConfig,
    CaserConfig,
    DupnConfig,
    MlpConfig,
    ModelConfig,
    PatchConfig,
    PeterRecConfig,
    TaskHead,
)
from trainer.models.base import ModelSizes, SequenceModel
from trainer.models.bert4rec import Bert4Rec
from trainer.models.caser import Caser
from trainer.models.documents import DocumentTable
from trainer.models.dupn import Dupn
from trainer.models.features import FeatureTable
from trainer.models.item_encoder import TiedModel
from trainer.models.mlp import Mlp
from trainer.models.peterrec import PeterRec
from trainer.models.row_table import RowTable, RowTables
from trainer.parallel.cores import memory_bytes
from trainer.parallel.distributed import ALONE

__all__ = [
    "Bert4Rec",
    "Caser",
    "DocumentTable",
    "Dupn",
    "FeatureTable",
    "Mlp",
    "ModelSizes",
    "PeterRec",
    "RowTables",
    "SequenceModel",
    "build_model",
    "build_saved",
    "check_shapes",
    "group_of",
    "groups_of",
]


def build_model(
    config: ModelConfig,
    sizes: ModelSizes,
    *,
    seed: int,
    tables: RowTables | None = None,
    patch: PatchConfig | None = None,
    task_heads: Mapping[str, TaskHead] | None = None,
) -> SequenceModel:
    """A new model, its weights a function of `seed` alone (the global random state is left as it was).

    `patch`: patches that it has beside its blocks. `task_heads`: what tasks tell beside items. `tables`: its item,
    user and entity tables are row-wise, and this process keeps its share of them. Raises ConfigError where there are
    more processes than rows, and before memory is taken that this machine lacks.
    """
    _check_memory(config, sizes, tables, patch, task_heads)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _new(config, sizes, tables, patch, task_heads)
    if tables is not None:
        for place, table in enumerate(module for module in model.modules() if isinstance(module, RowTable)):
            tables.initialise(table, seed=[seed, place], std=model.table_std(table.weight.shape[1]))
    return model


def _check_memory(
    config: ModelConfig,
    sizes: ModelSizes,
    tables: RowTables | None,
    patch: PatchConfig | None,
    task_heads: Mapping[str, TaskHead] | None,
) -> None:
    """Raises ConfigError for a network whose weights alone are more than the machine's memory."""
    bare = replace(sizes, features=(), documents=None, user_features=())
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        model = _new(config, bare, tables, patch, task_heads)
    needed = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    if needed > (there := memory_bytes()):
        raise ConfigError(
            f"model: expected weights within the {there / 1e9:,.0f} GB of this machine, found {needed / 1e9:,.0f} GB; "
            "lower model.width, model.blocks or what else makes it large"
        )


def build_saved(
    config: ModelConfig,
    sizes: ModelSizes,
    weights: Mapping[str, Tensor],
    *,
    patch: PatchConfig | None = None,
    task_heads: Mapping[str, TaskHead] | None = None,
) -> SequenceModel:
    """A model of saved weights, which it takes as they are: no table is drawn first, or copied. Raises ValueError for
    weights of other names or shapes: nothing of their size is allocated before."""
    with torch.device("meta"):  # nothing is drawn that would be overwritten
        model = _new(config, sizes, RowTables(ALONE), patch, task_heads)
    model.tables = None  # their modules have served to leave them unfilled
    check_shapes(model, weights)
    model.to(next(iter(weights.values())).dtype)
    model.load_state_dict(weights, assign=True)
    return model


def check_shapes(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Raises ValueError for weights of other names or shapes than a network's."""
    wanted, found = ({name: list(one.shape) for name, one in each.items()} for each in (model.state_dict(), weights))
    for name in [*wanted, *found]:
        if wanted.get(name) != found.get(name):
            raise ValueError(
                f"expected weights {name} of shape {wanted.get(name, 'none')} by the settings, found "
                f"{found.get(name, 'none')}"
            )


def _new(
    config: ModelConfig,
    sizes: ModelSizes,
    tables: RowTables | None,
    patch: PatchConfig | None,
    task_heads: Mapping[str, TaskHead] | None,
) -> SequenceModel:
    model: SequenceModel
    match config:
        case Bert4RecConfig():
            model = Bert4Rec(config, sizes, tables)
        case CaserConfig():
            model = Caser(config, sizes, tables)
        case PeterRecConfig():
            model = PeterRec(config, sizes, tables)
        case DupnConfig():
            model = Dupn(config, sizes, tables)
        case MlpConfig():
            model = Mlp(config, sizes, tables)
    if patch is not None:
        assert isinstance(model, TiedModel), "settings refuse others"
        model.add_patches(patch)
    for name, head in (task_heads or {}).items():
        model.add_task_head(name, head)
    if sizes.item_features_given:  # last: what else is drawn is as without
        model.add_features(sizes.features, sizes.documents)
    if sizes.user_features:
        model.add_user_features(sizes.user_features)
    model.add_time()
    model.add_domain_asked()
    return model


def groups_of(config: ModelConfig) -> Mapping[str, tuple[str, ...]]:
    """Parameter groups (item, user, knowledge, features, time, asked, position, patch, body, head) to the name prefixes
    of their tensors."""
    return {**_network(config).GROUPS, "features": ("features.",), "time": ("time.",), "asked": ("asked.",)}


def _network(config: ModelConfig) -> type[SequenceModel]:
    match config:
        case Bert4RecConfig():
            return Bert4Rec
        case CaserConfig():
            return Caser
        case PeterRecConfig():
            return PeterRec
        case DupnConfig():
            return Dupn
        case MlpConfig():
            return Mlp


def group_of(model: nn.Module, config: ModelConfig) -> dict[str, str]:
    """Group of each parameter by name: of `groups_of`, or `task`. A tensor that none claims is a defect: KeyError."""
    prefixes = {prefix: group for group, starts in groups_of(config).items() for prefix in starts}
    prefixes["task_heads."] = "task"  # of what is predicted, whatever the network
    found = {}
    for name, _ in model.named_parameters():
        found[name] = next((group for prefix, group in prefixes.items() if name.startswith(prefix)), "")
        if not found[name]:
            raise KeyError(f"{name} belongs to no parameter group")
    return found
