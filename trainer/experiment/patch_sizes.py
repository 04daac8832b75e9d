"""What an experiment's patched models cost as patches of the parent that they share, beside whole copies.

Bytes, time to load all of them, time to answer a request (survey 3.3: one backbone for many targets).
"""

import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors.torch import load_file

from etl.tables import FIRST_INDEX
from trainer.config import patch_of
from trainer.inference.delta_folder import TENSORS, bytes_of, load_patch, write_patch
from trainer.inference.model_folder import TrainedModel, config_of, load_model
from trainer.inference.recommender import Recommender
from trainer.models import groups_of

if TYPE_CHECKING:
    from trainer.experiment.plan import Row

REQUESTS = 64  # sent to the models in turns
ROUNDS = 3  # of loading them; the median counts
HISTORY = 50  # items


def beside_copies(rows: Sequence["Row"]) -> list[dict[str, Any]]:
    """For each parent: seed, ids of the rows patched on it, and of both ways MB on disk, seconds, and milliseconds a
    request; MB of the patches, and of the item tables in them. Left out: missing rows, models that score no item."""
    together: dict[Path, list[tuple[str, int, Path]]] = {}
    for row in rows:
        for seed, training in row.trainings.items():
            if training.parent is None or training.failure or patch_of(training.config) is None:
                continue
            if training.config.task.scores_items:
                together.setdefault(training.parent.folder / "model", []).append(
                    (row.id, seed, training.folder / "model")
                )
    return [
        {"seed": models[0][1], "rows": [row for row, _, _ in models]} | _measured(parent, [m for _, _, m in models])
        for parent, models in together.items()
    ]


def _measured(parent: Path, models: Sequence[Path]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="graftrec-patches-") as scratch:
        patches = [Path(scratch) / str(number) for number in range(len(models))]
        for model, patch in zip(models, patches, strict=True):
            write_patch(model, parent, patch)

        def on_one_backbone() -> list[TrainedModel]:
            backbone = load_model(parent)
            return [load_patch(patch, backbone) for patch in patches]

        small = [bytes_of(patch) for patch in patches]
        whole = {"mb": sum(map(bytes_of, models)) / 1e6} | _timed(lambda: [load_model(model) for model in models])
        patched = {"mb": (bytes_of(parent) + sum(small)) / 1e6} | _timed(on_one_backbone)
        items = sum(map(_item_bytes, patches, models))
        return {"whole": whole, "patched": patched, "patches_mb": sum(small) / 1e6, "items_mb": items / 1e6}


def _timed(load: Callable[[], list[TrainedModel]]) -> dict[str, float]:
    seconds = []
    for _ in range(ROUNDS):
        begun = time.perf_counter()
        models = load()
        seconds.append(time.perf_counter() - begun)
    return {"seconds": float(np.median(seconds)), "ms": milliseconds_to_answer(models, REQUESTS)}


def milliseconds_to_answer(models: Sequence[TrainedModel], requests: int) -> float:
    """The median of one request of HISTORY items, the models in turns; the first of each model doesn't count."""
    servers = [Recommender(model, "measured/1") for model in models]
    random, times = np.random.default_rng(0), []
    items = [str(item) for item in models[0].catalogue.raw_ids[FIRST_INDEX:]]
    for number in range(requests + len(servers)):
        history = random.choice(items, min(HISTORY, len(items)), replace=False).tolist()
        begun = time.perf_counter()
        server = servers[number % len(servers)]
        server.answer([server.request(history)])
        times.append(time.perf_counter() - begun)
    return float(1e3 * np.median(times[len(servers) :]))


def _item_bytes(patch: Path, model: Path) -> int:
    """Bytes of a patch that are rows of items: of the target, however it is fine-tuned."""
    of_items = groups_of(config_of(model)[0].model)["item"]
    return sum(tensor.nbytes for name, tensor in load_file(patch / TENSORS).items() if name.startswith(of_items))
