"""Many target domains on one backbone: patches of one model beside as many whole copies of it.

Each domain has its own third of the items and its own patches; random weights, which change no arithmetic. Measured are
bytes, the time to load all of them, memory, and the time to answer one request, the domains in turns.
"""

import time
from pathlib import Path

import numpy as np
import torch

from etl.tables import FIRST_INDEX
from tests.benchmarks.__main__ import Options
from tests.benchmarks.harness import Case, Numbers, Report, alternate, median
from tests.benchmarks.movielens import SPLIT, movielens
from trainer.config import Bert4RecConfig, DataConfig, FinetuneConfig, NextItemConfig, PretrainConfig, TargetDataConfig
from trainer.data.catalogue import read_catalogue
from trainer.data.release import pin
from trainer.experiment import patch_sizes
from trainer.inference.delta_folder import bytes_of, load_patch, write_patch
from trainer.inference.model_folder import ModelParts, load_model, save_model
from trainer.models import ModelSizes, build_model
from trainer.parallel.cores import use_threads

DOMAINS = 16
MODEL = Bert4RecConfig(blocks=6, width=256, heads=4, user_width=0, knowledge={})
REQUESTS = 320


def measure(report: Report, options: Options) -> None:
    log = movielens(options.data, options.work)
    folder = options.work / "patches"
    parent = folder / "parent"
    if not (folder / "made").exists():
        _make(folder, str(log.lake))
    cases = [
        Case(name, "tests.benchmarks.patches:serve", {"folder": str(folder), "how": name})
        for name in ("whole copies", "patches")
    ]
    found = alternate(cases, timeout=300)
    whole = sum(bytes_of(folder / f"whole-{n}") for n in range(DOMAINS))
    small = [bytes_of(folder / f"small-{n}") for n in range(DOMAINS)]
    stored = {"whole copies": whole, "patches": bytes_of(parent) + sum(small)}
    report.table(
        f"{DOMAINS} domains on one backbone of {MODEL.blocks} × {MODEL.width}, {log.name}; a patch is "
        f"{np.mean(small) / 2**20:.2f} MB, a whole copy {whole / DOMAINS / 2**20:.1f} MB",
        ["models", "MB on disk", "seconds to load", "peak GB", "ms to answer a request"],
        [
            [
                name,
                stored[name] / 2**20,
                median(rounds, "load_seconds"),
                median(rounds, "peak_bytes") / 2**30,
                median(rounds, "answer_ms"),
            ]
            for name, rounds in found.items()
        ],
    )
    report.bar("patches: bytes over whole copies'", stored["patches"] / whole, at_most=0.5)
    times = {name: median(rounds, "load_seconds") for name, rounds in found.items()}
    report.bar("patches: time to load over whole copies'", times["patches"] / times["whole copies"], at_most=1.0)


def _make(folder: Path, lake: str) -> None:
    release = pin(lake, None)
    catalogue = read_catalogue(release, "all")
    nothing = torch.empty(len(catalogue), 0, dtype=torch.int32)
    data = {"lake": lake, "domain": "all", "split": SPLIT}
    random = np.random.default_rng(0)

    def save(name: str, config: PretrainConfig, weights: dict[str, torch.Tensor], parent: str | None) -> str:
        return save_model(
            folder / name,
            ModelParts(
                config=config,
                release=release,
                catalogue=catalogue,
                knowledge=nothing.numpy(),
                popularity=np.ones(len(catalogue), dtype=np.int64),
                weights=weights,
                metrics={"seconds": 0.0},
                parent=parent,
                users=None,
            ),
        )

    plain = PretrainConfig(model=MODEL, task=NextItemConfig(), data=DataConfig.model_validate(data))
    given = build_model(MODEL, ModelSizes(num_users=0, num_entities=0, knowledge_VS=nothing), seed=0).state_dict()
    parent = save("parent", plain, dict(given), None)
    config = FinetuneConfig(
        model=MODEL,
        task=NextItemConfig(),
        transfer="patch",
        parent=str(folder / "parent"),
        data=TargetDataConfig.model_validate(data),
    )
    for n in range(DOMAINS):
        own = build_model(
            MODEL, ModelSizes(num_users=0, num_entities=0, knowledge_VS=nothing), seed=n, patch=config.patch
        )
        weights = {name: given.get(name, tensor).clone() for name, tensor in own.state_dict().items()}
        for name in weights:
            if name.startswith("patches."):
                weights[name].normal_(std=0.01, generator=torch.Generator().manual_seed(n))
        rows = FIRST_INDEX + random.choice(len(catalogue) - FIRST_INDEX, (len(catalogue) - FIRST_INDEX) // 3, False)
        weights["item_embedding.weight"][rows] += 0.01
        save(f"whole-{n}", config, weights, parent)
        write_patch(folder / f"whole-{n}", folder / "parent", folder / f"small-{n}")
    (folder / "made").touch()


def serve(*, folder: str, how: str) -> Numbers:
    """Load all, then answer requests of the domains in turns."""
    use_threads(1)
    place, begun = Path(folder), time.perf_counter()
    if how == "patches":
        backbone = load_model(place / "parent")
        models = [load_patch(place / f"small-{n}", backbone) for n in range(DOMAINS)]
    else:
        models = [load_model(place / f"whole-{n}") for n in range(DOMAINS)]
    loaded = time.perf_counter() - begun
    return {"load_seconds": loaded, "answer_ms": patch_sizes.milliseconds_to_answer(models, REQUESTS)}
