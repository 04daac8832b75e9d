"""Transfer: what a model for a new domain takes from a pre-trained one (survey 4.3).

=========  ====================================================================================================
none       nothing: from scratch
shallow    user and knowledge embeddings; projections, positions, body, head and all items start anew
           (refused where there is none of these to copy, trainer/training/empty_transfer.py)
shallow+features  as shallow, and what joins items' features (of the table `features`) to their vectors
deep       all but the item-indexed tensors
patch      as deep, and all of it frozen but items; patches are added, and trained (trainer/models/adapters.py)
=========  ====================================================================================================

A model that reads its parent's domain too (`data.domain: all`) may keep the parent's rows of the items that both know
(`shared_items`); the survey's domains share none.

Users and entities are the lake's own indices, which are given once and for ever: row r means the same in both models. A
parent that knows fewer (older) ones gives the rows it has, the rest start anew.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from etl.settings import GraftrecError
from etl.tables import FIRST_INDEX, UNK
from trainer.arrays import IntArray
from trainer.config import ModelConfig, TiedConfig, TransferName
from trainer.inference.model_folder import TrainedModel
from trainer.models import SequenceModel, group_of, groups_of

COPIED_GROUPS: dict[str, tuple[str, ...]] = {
    "none": (),
    "shallow": ("user", "knowledge"),
    "shallow+features": ("user", "knowledge", "features"),
    "deep": ("user", "knowledge", "features", "time", "asked", "position", "body", "head"),
    "patch": ("user", "knowledge", "features", "time", "asked", "position", "body", "head"),
}


class TransferError(GraftrecError):
    """A parent that can't be grafted on this model."""


@dataclass(frozen=True)
class ParameterReport:
    """What became of one tensor."""

    tensor: str
    group: str
    shape: tuple[int, ...]
    origin: str  # copied | copied (n of m rows) | new | added
    trained: bool

    @property
    def size(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class TransferReport:
    """What was copied, frozen and re-initialised: printed and logged with each fine-tuning."""

    transfer: str
    parent: str | None
    lines: tuple[ParameterReport, ...]

    def text(self) -> str:
        """One line per group: tensors, parameters, where they come from, whether they train."""
        rows = [f"transfer {self.transfer}" + (f" from {self.parent}" if self.parent else "")]
        for group in dict.fromkeys(line.group for line in self.lines):
            mine = [line for line in self.lines if line.group == group]
            origins = ", ".join(dict.fromkeys(line.origin for line in mine))
            trained = [line.trained for line in mine]
            state = "trained" if all(trained) else "trained in part" if any(trained) else "frozen"
            size = sum(line.size for line in mine)
            rows.append(f"  {group:<10} {len(mine):>3} tensors {size:>12,} parameters  {origins:<28} {state}")
        if self.transfer == "patch":
            n = self.counts()
            rows.append(
                f"  trained {n['trained']:,} of {n['total']:,} parameters; added to the network {n['added']:,}, "
                f"{n['added'] / n['backbone']:.1%} of its {n['backbone']:,} without item, user and entity tables"
            )
        return "\n".join(rows)

    def counts(self) -> dict[str, int]:
        """Parameters: all, those trained, those added; and, of layers alone (no tables of items, users and entities),
        those not added (`backbone`), and those trained (`trained_layers`, added ones too)."""
        layers = [line for line in self.lines if line.group not in ("item", "user", "knowledge")]
        return {
            "total": sum(line.size for line in self.lines),
            "trained": sum(line.size for line in self.lines if line.trained),
            "added": sum(line.size for line in self.lines if line.group == "patch"),
            "backbone": sum(line.size for line in layers if line.group != "patch"),
            "trained_layers": sum(line.size for line in layers if line.trained),
        }

    def as_dict(self) -> dict[str, object]:
        return {
            "transfer": self.transfer,
            "parent": self.parent,
            "parameters": self.counts(),
            "tensors": [vars(line) for line in self.lines],
        }


@dataclass(frozen=True)
class TransferPlan:
    """What a new model takes from its parent, and what of it is trained.

    `freeze`: parameter groups. `shared_V`: the parent's row of each catalogue row, UNK where it has none; those rows
    are copied too. None: no item. Transfer `patch` freezes what it copies, those rows too, but with `layer_norm` no
    LayerNorm of the body. `unused`: name prefixes of what no step reaches, which is not trained. `event_types`: those
    that the model's data distinguish.
    """

    transfer: TransferName
    freeze: Sequence[str] = ()
    shared_V: IntArray | None = None
    layer_norm: bool = False
    unused: tuple[str, ...] = ()
    event_types: tuple[str, ...] = ()


@torch.no_grad()
def initialise_from(
    model: SequenceModel,
    config: ModelConfig,
    parent: TrainedModel | None,
    plan: TransferPlan,
) -> TransferReport:
    """Copy what the plan says from `parent` into `model`, freeze what it says, and account for every tensor.

    Raises TransferError: no parent where one is needed, an unknown group, or tensors whose shapes don't agree.
    """
    transfer, freeze, shared_V = plan.transfer, plan.freeze, plan.shared_V
    if transfer != "none" and parent is None:
        raise TransferError(f"transfer {transfer} needs a pre-trained model; set parent to its `model` folder")
    if unknown := set(freeze) - set(groups_of(config)):
        raise TransferError(
            f"freeze: expected parameter groups ({', '.join(groups_of(config))}), found {sorted(unknown)}"
        )
    if parent is not None and transfer != "none":
        _check_event_types(config, plan.event_types, parent)
        if "head" in COPIED_GROUPS[transfer] or shared_V is not None:
            _check_score(config, parent)
    given = dict(parent.model.named_parameters()) if parent is not None and transfer != "none" else {}
    groups = group_of(model, config)
    norms = _layer_norms(model) if plan.layer_norm else set()
    # Features of items, or of users, that the parent has none of begin as no change, and so do times.
    known_features = {name.split(".")[1] for name in given if name.startswith("features.")}
    asks_for_features = transfer == "shallow+features" and not known_features
    lines = []
    for name, tensor in model.named_parameters():
        group = groups[name]
        origin, shape = "new", tuple(tensor.shape)
        shared_out = model.tables if name in model.row_tables() else None
        if shared_out is not None:
            shape = (shared_out.num_rows(tensor), *shape[1:])
        begins = group == "features" and not asks_for_features and name.split(".")[1] not in known_features
        begins |= group in ("time", "asked") and name not in given  # of a parent that doesn't read it
        if group in COPIED_GROUPS[transfer] and not begins:
            if name not in given:
                raise TransferError(
                    f"transfer {transfer}: the parent {_named(parent)} has no tensor {name}; give both models the same "
                    "knowledge, user_width, blocks and block"
                )
            source: torch.Tensor = given[name]
            if shared_out is not None:
                source = source[shared_out.world.rank :: shared_out.world.size]  # this process's rows
            origin = _copy(tensor, source, name, rows=group in ("user", "knowledge"))
            if transfer == "patch" and len(source) < len(tensor):  # the rows that are new are trained
                _freeze_rows(tensor, torch.arange(len(tensor)) < len(source))
        elif group == "item" and shared_V is not None and given:
            rows_V = shared_V if shared_out is None else shared_V[shared_out.world.rank :: shared_out.world.size]
            known_V = _copy_shared(tensor, given[name], name, torch.from_numpy(rows_V))
            if transfer == "patch":
                _freeze_rows(tensor, known_V)
            origin = f"copied ({int((shared_V[FIRST_INDEX:] != UNK).sum()):,} of {len(shared_V) - FIRST_INDEX:,} items)"
        if group == "patch":
            origin = "added"
        is_kept = transfer == "patch" and origin == "copied" and name not in norms
        tensor.requires_grad_(group not in freeze and not is_kept and not name.startswith(plan.unused))
        lines.append(ParameterReport(name, group, shape, origin, tensor.requires_grad))
    return TransferReport(transfer, _named(parent) if given else None, tuple(lines))


def _check_event_types(config: ModelConfig, event_types: tuple[str, ...], parent: TrainedModel) -> None:
    """Row r of the table of kinds is the r-th name in both models, or the parent's rows would mean something else."""
    if not getattr(config, "event_types", False) or not getattr(parent.config.model, "event_types", False):
        return
    theirs = parent.config.data.event_types
    if event_types != theirs:
        raise TransferError(
            f"expected data.event_types to be the parent's ({', '.join(theirs)}), found {', '.join(event_types)}; set "
            "them alike"
        )


def _check_score(config: ModelConfig, parent: TrainedModel) -> None:
    """A head, and items' vectors, that were trained for products are of no use for cosines, which have no biases."""
    theirs = parent.config.model
    if isinstance(config, TiedConfig) and isinstance(theirs, TiedConfig) and config.score != theirs.score:
        raise TransferError(
            f"expected model.score to be that of the parent {_named(parent)}, {theirs.score}, found {config.score}; "
            "set them alike"
        )


def _copy(to: torch.Tensor, source: torch.Tensor, name: str, *, rows: bool) -> str:
    same = source.shape[1:] == to.shape[1:] if rows else source.shape == to.shape
    if not same:
        raise TransferError(
            f"{name}: expected the parent's {tuple(source.shape)} to fit {tuple(to.shape)}; pre-train with the same "
            "model settings (width, heads, blocks, max_length, knowledge)"
        )
    if not rows:
        to.copy_(source)
        return "copied"
    common = min(len(to), len(source))
    to[:common] = source[:common].to(to.dtype)
    return "copied" if common == len(to) else f"copied ({common:,} of {len(to):,} rows)"


def _copy_shared(to: torch.Tensor, source: torch.Tensor, name: str, rows_V: torch.Tensor) -> torch.Tensor:
    """Which rows were, bool [V]."""
    if source.shape[1:] != to.shape[1:]:
        raise TransferError(
            f"{name}: expected the parent's rows {tuple(source.shape[1:])} to fit {tuple(to.shape[1:])}; pre-train "
            "with the same settings"
        )
    known = rows_V != UNK
    to[known] = source[rows_V[known]].to(to)
    return known


def _freeze_rows(table: torch.Tensor, frozen_V: torch.Tensor) -> None:
    """No gradient reaches them, and AdamW leaves alone what never had one (tables have no weight decay)."""
    mask = frozen_V.to(table.device).view(-1, *[1] * (table.ndim - 1))
    table.register_hook(lambda gradient: gradient.masked_fill(mask, 0))  # type: ignore[no-untyped-call]


def _layer_norms(model: SequenceModel) -> set[str]:
    """Names of their parameters."""
    return {
        f"{name}.{part}"
        for name, module in model.named_modules()
        if isinstance(module, nn.LayerNorm)
        for part, _ in module.named_parameters()
        if not name.startswith("head.")
    }


def _named(parent: TrainedModel | None) -> str:
    return "" if parent is None else f"{parent.folder} ({parent.hash[:8]})"
