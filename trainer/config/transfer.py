"""Settings of fine-tuning: what is copied, frozen or patched."""

from typing import Any, Literal

from pydantic import Field, model_validator

from etl.settings import FileName, Section, replaced
from trainer.config.data import TargetDataConfig
from trainer.config.training import PretrainConfig

TransferName = Literal["none", "shallow", "shallow+features", "deep", "patch"]


class PatchConfig(Section):
    """Model patches (survey 3.3), for transfer `patch`."""

    kind: Literal["adapter", "lora"] = "adapter"
    bottleneck: int | None = Field(
        None, ge=1, le=65_536
    )  # of an adapter: channels in its middle; None: an eighth of the width
    place: Literal["serial", "parallel"] = "serial"  # behind a layer, or beside it
    per_block: Literal[1, 2] = 2  # beside both layers of a block, or the second only
    # identity: begins as no change at all. paper: as in PeterRec's released code, drawn at random, and parallel with a
    # skip of its own.
    variant: Literal["identity", "paper"] = "identity"
    rank: int = Field(4, ge=1, le=65_536)  # of lora
    layer_norm: bool = False  # the network's own LayerNorms are trained too

    def channels(self, width: int) -> int:
        return max(1, width // 8) if self.bottleneck is None else self.bottleneck


class FinetuneConfig(PretrainConfig):
    """One training run on a target domain, started from a pre-trained model by `transfer`."""

    name: FileName = "finetune"
    data: TargetDataConfig = TargetDataConfig()
    transfer: TransferName = "deep"
    parent: str | None = None  # folder of the pre-trained model; not needed by transfer `none`
    freeze: tuple[str, ...] = ()  # parameter groups that do not train
    # Items that the parent knows too (by raw id) keep its rows, whatever `transfer`; for a model that reads its domain.
    shared_items: bool = False
    patch: PatchConfig = PatchConfig()  # of transfer `patch`

    @model_validator(mode="after")
    def _patch_fits(self) -> "FinetuneConfig":
        if self.transfer != "patch":
            return self
        if self.model.kind not in ("bert4rec", "peterrec"):
            raise ValueError(
                f"transfer patch: expected a model with blocks (bert4rec, peterrec), found {self.model.kind}; set deep"
            )
        width, patch = self.model.width, self.patch
        middle, name = (patch.rank, "rank") if patch.kind == "lora" else (patch.channels(width), "bottleneck")
        if middle >= width:
            raise ValueError(f"patch.{name}: expected less than the model's width, {width}, found {middle}; lower it")
        if self.shared_items and self.train.table_optimizer == "rowwise":
            raise ValueError(
                "transfer patch with shared_items freezes rows, which row-wise tables don't; set "
                "train.table_optimizer=adamw"
            )
        return self

    @model_validator(mode="after")
    def _features_are_there(self) -> "FinetuneConfig":
        if self.transfer == "shallow+features" and not self.model.features.given:
            raise ValueError("transfer shallow+features: expected encoders in model.features, found none; set shallow")
        if self.transfer == "shallow+features" and self.model.features.aggregate == "ridge":
            raise ValueError(
                "transfer shallow+features: expected features that are trained, found aggregate ridge; set shallow"
            )
        return self

    @model_validator(mode="after")
    def _items_come_from_a_parent(self) -> "FinetuneConfig":
        if self.shared_items and self.transfer == "none":
            raise ValueError("shared_items: transfer none takes nothing from a parent; set it to false, or transfer")
        return self


def patch_of(config: PretrainConfig) -> PatchConfig | None:
    """The patches that the run's model has, if any."""
    return config.patch if isinstance(config, FinetuneConfig) and config.transfer == "patch" else None


def with_transfer(config: FinetuneConfig, transfer: str, parent: str | None, **changes: Any) -> FinetuneConfig:
    """The run with another transfer; from scratch, no items are shared with a parent. Raises ConfigError where its
    settings don't go with it."""
    shared = config.shared_items and transfer != "none"
    return replaced(config, transfer=transfer, parent=parent, shared_items=shared, **changes)
