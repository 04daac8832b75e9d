"""Transfer: what a model for a new domain takes from a pre-trained one (survey 4.3; DESIGN section 6).

=========  ====================================================================================================
none       nothing: from scratch
shallow    user and knowledge embeddings; projections, positions, body, head and all items start anew
deep       all but the item-indexed tensors
=========  ====================================================================================================

A model that reads its parent's domain too (`data.domain: all`) may keep the parent's rows of the items that both know
(`shared_items`); the survey's domains share none.

Users and entities are the lake's own indices, which are given once and for ever: row r means the same in both models. A
parent that knows fewer (older) ones gives the rows it has, the rest start anew.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from etl.config import GraftrecError
from etl.tables import FIRST_INDEX, UNK
from trainer.artifact import Artifact
from trainer.config import ModelConfig, TransferName
from trainer.data.dataset import IntArray
from trainer.models import SequenceModel, group_of, groups_of

COPIED_GROUPS: dict[str, tuple[str, ...]] = {
    "none": (),
    "shallow": ("user", "knowledge"),
    "deep": ("user", "knowledge", "position", "body", "head"),
}


class TransferError(GraftrecError):
    """A parent that can't be grafted on this model."""


@dataclass(frozen=True)
class Line:
    """What became of one tensor."""

    tensor: str
    group: str
    shape: tuple[int, ...]
    origin: str  # copied | copied (n of m rows) | new
    trained: bool


@dataclass(frozen=True)
class Account:
    """What was copied, frozen and re-initialised: printed and logged with each fine-tuning."""

    transfer: str
    parent: str | None
    lines: tuple[Line, ...]

    def text(self) -> str:
        """One line per group: tensors, parameters, where they come from, whether they train."""
        rows = [f"transfer {self.transfer}" + (f" from {self.parent}" if self.parent else "")]
        for group in dict.fromkeys(line.group for line in self.lines):
            mine = [line for line in self.lines if line.group == group]
            origins = ", ".join(dict.fromkeys(line.origin for line in mine))
            size = sum(torch.Size(line.shape).numel() for line in mine)
            state = "trained" if all(line.trained for line in mine) else "frozen"
            rows.append(f"  {group:<10} {len(mine):>3} tensors {size:>12,} parameters  {origins:<28} {state}")
        return "\n".join(rows)

    def as_dict(self) -> dict[str, object]:
        return {"transfer": self.transfer, "parent": self.parent, "tensors": [vars(line) for line in self.lines]}


@torch.no_grad()
def graft(
    model: SequenceModel,
    config: ModelConfig,
    parent: Artifact | None,
    transfer: TransferName,
    freeze: Sequence[str] = (),
    shared_V: IntArray | None = None,
) -> Account:
    """Copy what `transfer` says from `parent` into `model`, freeze the groups `freeze`, and account for every tensor.

    `shared_V`: the parent's row of each catalogue row, UNK where it has none; those rows are copied too. None: no item.
    Raises TransferError: no parent where one is needed, an unknown group, or tensors whose shapes don't agree.
    """
    if transfer != "none" and parent is None:
        raise TransferError(f"transfer {transfer} needs a pre-trained model; set parent to its `model` folder")
    if unknown := set(freeze) - set(groups_of(config)):
        raise TransferError(
            f"freeze: expected parameter groups ({', '.join(groups_of(config))}), found {sorted(unknown)}"
        )
    given = dict(parent.model.named_parameters()) if parent is not None and transfer != "none" else {}
    groups = group_of(model, config)
    lines = []
    for name, tensor in model.named_parameters():
        group = groups[name]
        origin, shape = "new", tuple(tensor.shape)
        shared_out = model.tables if name in model.row_tables() else None
        if shared_out is not None:
            shape = (shared_out.num_rows(tensor), *shape[1:])
        if group in COPIED_GROUPS[transfer]:
            if name not in given:
                raise TransferError(
                    f"transfer {transfer}: the parent {_named(parent)} has no tensor {name}; give both models the same "
                    "knowledge, user_width and blocks"
                )
            source: torch.Tensor = given[name]
            if shared_out is not None:
                source = source[shared_out.world.rank :: shared_out.world.size]  # this process's rows
            origin = _copy(tensor, source, name, rows=group in ("user", "knowledge"))
        elif group == "item" and shared_V is not None and given:
            rows_V = shared_V if shared_out is None else shared_V[shared_out.world.rank :: shared_out.world.size]
            _copy_shared(tensor, given[name], name, torch.from_numpy(rows_V))
            origin = f"copied ({int((shared_V[FIRST_INDEX:] != UNK).sum()):,} of {len(shared_V) - FIRST_INDEX:,} items)"
        tensor.requires_grad_(group not in freeze)
        lines.append(Line(name, group, shape, origin, group not in freeze))
    return Account(transfer, _named(parent) if given else None, tuple(lines))


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


def _copy_shared(to: torch.Tensor, source: torch.Tensor, name: str, rows_V: torch.Tensor) -> None:
    if source.shape[1:] != to.shape[1:]:
        raise TransferError(
            f"{name}: expected the parent's rows {tuple(source.shape[1:])} to fit {tuple(to.shape[1:])}; pre-train "
            "with the same settings"
        )
    known = rows_V != UNK
    to[known] = source[rows_V[known]].to(to)


def _named(parent: Artifact | None) -> str:
    return "" if parent is None else f"{parent.folder} ({parent.hash[:8]})"
