"""The frame of a recipe that trains once: what a finished run left stands until settings, code or data change."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from etl.tables import Table
from trainer import tracking
from trainer.config import FriendsConfig, GraphConfig, SocialConfig
from trainer.data.release import Release
from trainer.parallel.distributed import World
from trainer.recipes.run_folder import DONE, clear_other, noted
from trainer.recipes.training_record import mlflow_uid
from trainer.tracking import Run


@contextmanager
def recorded_once(
    config: GraphConfig | SocialConfig | FriendsConfig,
    folder: Path,
    identity: str,
    world: World,
    *,
    release: Release,
    read: Sequence[Table],
) -> Iterator[Run]:
    """An MLflow run of what is trained in `folder`, which is cleared of a run of another identity first: enter it when
    all that is read is known to be there, so that a mistake removes nothing. `note_done` ends it."""
    clear_other(folder, identity, world, print if world.first else lambda line: None)
    with (
        noted(folder, world),
        tracking.start_run(
            config.tracking, name=config.name, resolved=config, uid=mlflow_uid(folder, world), must_record=True
        ) as tracked,
    ):
        tracked.log_release(release, tables=[table.name for table in read])
        yield tracked


def note_done(folder: Path, identity: str, digest: str, metrics: Mapping[str, float], tracked: Run) -> dict[str, Any]:
    """The note that all is done, which `noted` gives its name. `digest`: of the folder `model`."""
    tracked.set_tags({"graftrec.model_hash": digest, "graftrec.run_folder": str(folder)})
    done = {"identity": identity, "hash": digest, "metrics": dict(metrics), "mlflow_run": tracked.id}
    (folder / (DONE + ".new")).write_text(json.dumps(done, indent=1))
    return done
