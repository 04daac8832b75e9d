"""Which models the gate compares: found, and checked before anything is registered or scored."""

from dataclasses import dataclass
from pathlib import Path

from etl.settings import GraftrecError
from trainer.config import PretrainConfig, PromoteConfig
from trainer.evaluation.gate import check_gate, contrast_seeds
from trainer.inference.model_folder import config_of, load_model, model_hash
from trainer.registry import CANDIDATE, CHAMPION, Registry, Version
from trainer.registry.gate_evidence import was_transferred


class PromoteError(GraftrecError):
    """A promotion or rollback that can't be made."""


@dataclass(frozen=True)
class ModelInfo:
    """What is read of a model without loading its weights. `parent`: its parent's hash."""

    folder: Path
    config: PretrainConfig
    parent: str | None
    hash: str


@dataclass(frozen=True)
class Compared:
    """The models that the gate compares."""

    candidate: ModelInfo
    replicas: tuple[ModelInfo, ...]
    scratch: tuple[ModelInfo, ...]


def compared_models(registry: Registry, config: PromoteConfig) -> Compared:
    """Find all models, and check them before anything is registered or scored. If nothing was transferred, from-scratch
    models that are the candidate and its replicas themselves are left out. Raises GraftrecError."""
    candidate = _model_info(registry, config.candidate or f"@{CANDIDATE}")
    replicas = tuple(_model_info(registry, name) for name in config.replicas)
    scratch = tuple(_model_info(registry, name) for name in config.from_scratch)
    transferred = was_transferred(candidate.config, candidate.parent)
    for one in scratch:
        if was_transferred(one.config, one.parent):
            raise PromoteError(
                f"from_scratch: expected models of transfer none, found {one.folder}, which has a parent; name it in "
                "replicas if it has the candidate's settings"
            )
    if not transferred and {one.hash for one in scratch} <= {one.hash for one in (candidate, *replicas)}:
        scratch = ()
    recipe, other = ([one.config.train.seed for one in models] for models in ((candidate, *replicas), scratch))
    check_gate(
        config.gate,
        task=candidate.config.task,
        seeds=contrast_seeds(recipe, other),
        transferred=transferred,
        has_scratch=bool(scratch),
        baselines=config.baselines,
    )
    return Compared(candidate, replicas, scratch)


def _model_info(registry: Registry, name: str) -> ModelInfo:
    folder = registry.folder(registry.version(name)) if _is_version(name) else Path(name)
    digest = model_hash(folder)
    return ModelInfo(folder, *config_of(folder), digest)


def candidate_version(registry: Registry, config: PromoteConfig) -> Version:
    """The version named, else the one with the alias `candidate`; a model folder is registered."""
    named = config.candidate
    if named is None:
        return registry.version(CANDIDATE)
    if _is_version(named):
        return registry.version(named)
    trained_model = load_model(named)
    tags = {
        "graftrec.release": str(trained_model.release),
        "graftrec.transfer": str(getattr(trained_model.config, "transfer", "none")),
    } | ({"graftrec.parent": trained_model.parent} if trained_model.parent else {})
    version = registry.register(named, tags=tags, alias=None)
    if CHAMPION not in version.aliases:
        registry.set_alias(CANDIDATE, version.number)
    return version


def _is_version(name: str) -> bool:
    """A version's number or alias ("3", "@champion"), rather than a folder."""
    return (name.isascii() and name.isdecimal()) or name.startswith("@")
