"""Rows of an experiment beside the survey's: a grid of models by transfers, and rows that are written out."""

from collections.abc import Mapping
from typing import Literal

from pydantic import model_validator

from etl.settings import Section, replaced
from trainer.config import FinetuneConfig, PatchConfig, PretrainConfig, TargetDataConfig, TransferName

GridTransfer = Literal["none", "shallow", "deep", "serial", "parallel", "lora"]
LABELS: dict[GridTransfer, str] = {
    "none": "from scratch",
    "shallow": "shallow",
    "deep": "deep",
    "serial": "serial patches",
    "parallel": "parallel patches",
    "lora": "LoRA",
}
PATCHES = {"serial": PatchConfig(), "parallel": PatchConfig(place="parallel"), "lora": PatchConfig(kind="lora")}


class RowPlan(Section):
    """A row beside the survey's rows, or in their place: what is trained, and the row that its gain is counted over.
    Domains and split are those of its sections; lake, seeds, names and folders are set here."""

    label: str
    against: str | None = None  # id of another row
    pretrain: PretrainConfig | None = None  # the parent of `finetune`; without `finetune`, the row itself
    finetune: FinetuneConfig | None = None

    @property
    def trained(self) -> PretrainConfig:
        """Of the row's model."""
        found = self.finetune or self.pretrain
        assert found is not None
        return found

    @model_validator(mode="after")
    def _has_a_parent_if_it_needs_one(self) -> "RowPlan":
        if self.finetune is None:
            if self.pretrain is None:
                raise ValueError("expected a section pretrain, finetune or both, found none")
        elif (self.pretrain is None) != (self.finetune.transfer == "none"):
            raise ValueError(
                f"expected a section pretrain for transfer {self.finetune.transfer}, found none; add it, or set "
                "finetune.transfer to none"
                if self.pretrain is None
                else "expected no section pretrain for transfer none; remove it, or set finetune.transfer"
            )
        return self


class GridPlan(Section):
    """Rows of one model: pre-trained on the experiment's source, brought to its target by each transfer."""

    label: str
    preset: PretrainConfig  # of all its trainings; domain and split are those of the experiment
    transfers: tuple[GridTransfer, ...] = ("none", "deep")

    def rows(self, name: str, source: str, target: str, split: str) -> dict[str, RowPlan]:
        """Id -> row. Gains are over the row from scratch."""
        pretrain = replaced(self.preset, data=replaced(self.preset.data, domain=source, split=split))
        data = TargetDataConfig.model_validate({**dict(self.preset.data), "domain": target, "split": split})
        found: dict[str, RowPlan] = {}
        for grid in self.transfers:
            transfer: TransferName = "patch" if grid in PATCHES else grid  # type: ignore[assignment]
            given = {**dict(self.preset), "data": data, "transfer": transfer, "patch": PATCHES.get(grid, PatchConfig())}
            from_scratch = transfer == "none"
            found[name if from_scratch else f"{name}-{grid}"] = RowPlan(
                label=f"{self.label}, {LABELS[grid]}",
                against=name if not from_scratch and "none" in self.transfers else None,
                pretrain=None if from_scratch else pretrain,
                finetune=FinetuneConfig.model_validate(given),
            )
        return found


def rows_of_grid(grid: Mapping[str, GridPlan], source: str, target: str, split: str) -> dict[str, RowPlan]:
    """Id -> row, of all models."""
    return {row: plan for name, one in grid.items() for row, plan in one.rows(name, source, target, split).items()}
