"""The training step of `preset/next_w64` with times as input, beside the same step without.

Synthetic batches of MovieLens-1M's lengths (log-normal, 20 to 200), whose events come in bursts as its ratings do. The
variants take turns in one process, a few steps each, so that a busy machine slows all of them.
"""

import statistics
import time

import numpy as np
import torch

from etl.tables import FIRST_INDEX, PAD
from tests.benchmarks.__main__ import Options
from tests.benchmarks.harness import Case, Numbers, Report, run
from trainer.config import Bert4RecConfig, LossConfig, NextItemConfig
from trainer.data.batch import Batch
from trainer.models import ModelSizes, build_model
from trainer.parallel.cores import use_threads
from trainer.tasks import NextItem

VARIANTS: dict[str, dict[str, bool]] = {
    "no times": {},
    "intervals": {"intervals": True},
    "bias of attention": {"bias": True},
    "both": {"intervals": True, "bias": True},
}
USERS, LENGTH, ITEMS, BATCHES, ROUNDS, THREADS = 64, 200, 3_416, 4, 8, 2


def measure(report: Report, options: Options) -> None:
    for precision in ("fp32", "bf16"):
        found = run(Case(precision, "tests.benchmarks.train_time:steps", {"precision": precision}), timeout=600)
        alone = found["no times"]
        rows = [[name, found[name] * 1e3, found[name] / alone] for name in VARIANTS]
        report.table(
            f"A step of 2 × 64, batches of {USERS}, {precision}, median of {ROUNDS * BATCHES}",
            ["", "ms", "times"],
            rows,
        )
        if precision == "fp32":
            report.bar("the step with times as a bias of attention over that without", rows[2][2], at_most=1.25)
            report.bar("the step with intervals over that without", rows[1][2], at_most=1.15)


def steps(*, precision: str) -> Numbers:
    """Seconds of a step, by variant."""
    use_threads(THREADS)
    batches, task = [_batch(seed) for seed in range(BATCHES)], NextItem(NextItemConfig(loss=LossConfig()))
    made = {}
    for name, reads in VARIANTS.items():
        config = Bert4RecConfig(
            width=64, heads=2, max_length=LENGTH, dropout=0.2, user_width=0, knowledge={}, time=reads
        )
        sizes = ModelSizes(num_users=0, num_entities=0, knowledge_VS=torch.zeros(ITEMS, 0))
        model = build_model(config, sizes, seed=0).train()
        made[name] = model, torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    taken: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for place in range(ROUNDS + 1):
        for name, (model, optimizer) in made.items():
            for batch in batches:
                begun = time.perf_counter()
                with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                    loss, count = task.loss(model, batch)
                (loss / count).backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                if place:  # the first round isn't counted
                    taken[name].append(time.perf_counter() - begun)
    return {name: statistics.median(seconds) for name, seconds in taken.items()}


def _batch(seed: int) -> Batch:
    random = np.random.default_rng(seed)
    lengths = np.exp(random.normal(4.6, 1.0, USERS)).clip(20, LENGTH).astype(np.int64)
    items = random.integers(FIRST_INDEX, ITEMS, (USERS, LENGTH))
    items[np.arange(LENGTH) >= lengths[:, None]] = PAD
    apart = np.where(random.random((USERS, LENGTH)) < 0.03, random.exponential(1e6, (USERS, LENGTH)), 0)
    apart += np.where(random.random((USERS, LENGTH)) < 0.3, random.exponential(60, (USERS, LENGTH)), 0)
    batch = Batch(
        torch.from_numpy(items)[:, : lengths.max()],
        torch.from_numpy(lengths),
        torch.full((USERS,), FIRST_INDEX),
        USERS,
        slice(0, USERS),
        (0, 0, seed),
    )
    batch.times = torch.from_numpy((978_300_000 + apart.cumsum(1).astype(np.int64)) * 1_000_000)[:, : lengths.max()]
    return batch
