"""Every setting of training, as frozen types (composed from conf/ by `etl.settings.load`)."""

from trainer.config.backtest import BacktestConfig
from trainer.config.data import DataConfig, TargetDataConfig
from trainer.config.evaluation import (
    BaselinesConfig,
    EvaluateConfig,
    EvaluatedModel,
    GateConfig,
    PromoteConfig,
    RecommendConfig,
)
from trainer.config.features import FeaturesConfig, TextConfig
from trainer.config.model import Bert4RecConfig, CaserConfig, DupnConfig, MlpConfig, ModelConfig, PeterRecConfig
from trainer.config.search import Choice, PrunerConfig, RangeConfig, SearchConfig
from trainer.config.task import (
    BasketPairConfig,
    ClickConfig,
    LossConfig,
    MaskedItemConfig,
    MultiConfig,
    NextBasketConfig,
    NextItemConfig,
    PairHeadConfig,
    ProfileConfig,
    TargetItemConfig,
    TaskConfig,
    TaskHead,
    TaskSettings,
    WeightsHeadConfig,
)
from trainer.config.training import (
    EvaluationConfig,
    PretrainConfig,
    RuntimeConfig,
    TrackingConfig,
    TrainConfig,
    event_types_read,
)
from trainer.config.transfer import FinetuneConfig, PatchConfig, TransferName, patch_of, with_transfer

__all__ = [
    "BacktestConfig",
    "BaselinesConfig",
    "BasketPairConfig",
    "Bert4RecConfig",
    "CaserConfig",
    "Choice",
    "ClickConfig",
    "DataConfig",
    "DupnConfig",
    "EvaluateConfig",
    "EvaluatedModel",
    "EvaluationConfig",
    "FeaturesConfig",
    "FinetuneConfig",
    "GateConfig",
    "LossConfig",
    "MaskedItemConfig",
    "MlpConfig",
    "ModelConfig",
    "MultiConfig",
    "NextBasketConfig",
    "NextItemConfig",
    "PairHeadConfig",
    "PatchConfig",
    "PeterRecConfig",
    "PretrainConfig",
    "ProfileConfig",
    "PromoteConfig",
    "PrunerConfig",
    "RangeConfig",
    "RecommendConfig",
    "RuntimeConfig",
    "SearchConfig",
    "TargetDataConfig",
    "TargetItemConfig",
    "TaskConfig",
    "TaskHead",
    "TaskSettings",
    "TextConfig",
    "TrackingConfig",
    "TrainConfig",
    "TransferName",
    "WeightsHeadConfig",
    "event_types_read",
    "patch_of",
    "with_transfer",
]
