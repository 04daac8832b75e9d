"""The result of a training run, and what it depends on: a run whose settings, code, data and parent are unchanged is
not repeated."""

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from etl import tables
from etl.settings import GraftrecError, config_hash, replaced
from trainer import tracking
from trainer.code_hash import code_hash
from trainer.config import FinetuneConfig, FriendsConfig, GraphConfig, PretrainConfig, SocialConfig
from trainer.data.release import Release, pin
from trainer.inference import model_folder
from trainer.inference.model_folder import TrainedModel, load_model, model_hash
from trainer.knowledge_graph import vectors
from trainer.parallel.distributed import World
from trainer.recipes.run_folder import DONE, RunError, tidy
from trainer.trust.verified_files import parse_json

_READ_TABLES = (tables.ITEMS, tables.USERS, tables.ENTITIES, tables.KNOWLEDGE, tables.DOMAINS)


@dataclass(frozen=True)
class Result:
    """The result of a training run. `metrics`: best validation metrics, epochs, seconds."""

    folder: Path  # of the run; the model is in <folder>/model
    metrics: dict[str, float]
    reused: bool  # nothing has changed since the earlier result
    run_id: str = ""  # of the MLflow run that trained it; "" where that is unknown

    @property
    def model(self) -> Path:
        return self.folder / "model"


def recipe_of(config: PretrainConfig) -> str:
    return "finetune" if isinstance(config, FinetuneConfig) else "pretrain"


def sequence_table(config: PretrainConfig) -> tables.Table:
    return tables.TABLES[config.task.needs.table]


def read_tables(config: PretrainConfig) -> tuple[tables.Table, ...]:
    encoders = (*config.model.features.encoders, *config.model.user_features.encoders)
    features = (tables.FEATURES,) if encoders else ()
    return (sequence_table(config), *_READ_TABLES, *features)


def run_identity(config: PretrainConfig, release: Release, parent: TrainedModel | None) -> dict[str, str]:
    """Fingerprints of settings, code, data and parent; they change if the weights could, and not with where the run
    runs."""
    parent_hash = parent.hash if parent else ""
    return identity_of(config, release, f"trainer.recipes.{recipe_of(config)}", read_tables(config), parent_hash)


def identity_of(
    config: PretrainConfig | GraphConfig | SocialConfig | FriendsConfig,
    release: Release,
    module: str,
    read: Sequence[tables.Table],
    parent_hash: str,
) -> dict[str, str]:
    """As run_identity, of the code that `module` reaches and the tables that are read."""
    runtime, tracked = type(config.runtime)(precision=config.runtime.precision), type(config.tracking)()
    versions = {table.name: release.versions.get(table.name) for table in read}
    return {
        "settings": config_hash(replaced(config, runtime=runtime, tracking=tracked)),
        "code": code_hash(module),
        "data": json.dumps(versions, sort_keys=True),
        "parent": parent_hash,
    }


def agreed(identity: dict[str, str], world: World) -> dict[str, str]:
    """The identity, which must be the same in all processes. Raises RunError."""
    for rank, other in enumerate(world.objects(identity)):
        if differing := [name for name in identity if identity[name] != other[name]]:
            raise RunError(
                f"expected the same settings, code, data and parent in all processes, found another {differing[0]} in "
                f"process {rank} than in process {world.rank}; give all hosts the same configuration and code"
            )
    return identity


def finished(config: PretrainConfig) -> Result | None:
    """The result of this run if it is done and its settings, code, data and parent are unchanged. Raises GraftrecError
    for a lake or parent that does not exist."""
    parent_folder = config.parent if isinstance(config, FinetuneConfig) and config.transfer != "none" else None
    parent = load_model(parent_folder, users=False) if parent_folder else None
    release = pin(config.data.lake, config.data.release)
    identity = ":".join(run_identity(config, release, parent).values())
    return finished_in(Path(config.output) / config.name, identity)


def reused(
    config: PretrainConfig | GraphConfig | SocialConfig | FriendsConfig, folder: Path, identity: str, world: World
) -> Result | None:
    """What a finished run of this identity has left in its folder, None where there is none. MLflow's run notes it."""
    required = vectors.REQUIRED if isinstance(config, GraphConfig | SocialConfig) else model_folder.REQUIRED
    found = world.of_first(finished_in(folder, identity, required) if world.first else None)
    if found is not None:
        tracking.note_reused(config.name, found.run_id)
        tracking.settle(config.tracking)
        tidy(folder, world)
    return found


def finished_in(folder: Path, identity: str, required: Collection[str] = model_folder.REQUIRED) -> Result | None:
    """The result that a folder holds, whose model has the files `required`; None where it is another, or damaged."""
    try:
        done = parse_json((folder / DONE).read_bytes())
        if done["identity"] == identity and model_hash(folder / "model", required) == done["hash"]:
            metrics = {str(name): float(value) for name, value in done["metrics"].items()}
            return Result(folder, metrics, reused=True, run_id=str(done.get("mlflow_run", "")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, GraftrecError):
        pass
    return None
