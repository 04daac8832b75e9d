"""A training step's cost and memory against the catalogue: 10 k, 1 M, 10 M items of width 128.

Row-wise tables and sampled softmax, by the very `train_step` that training runs; batches are made beforehand, for
reading them is another benchmark's. Items are asked for by Zipf's law and lie scattered in the table, as real ones do.
Dense tables with AdamW stand beside, up to what memory allows.
"""

import time

import numpy as np
import psutil
import torch

from etl.tables import FIRST_INDEX
from tests.benchmarks.harness import Case, Numbers, Report, alternate, median
from trainer.config import Bert4RecConfig, LossConfig, MaskedItemConfig, TrainConfig
from trainer.data.batch import Batch
from trainer.distributed import ALONE
from trainer.loop import Training, train_step
from trainer.models import RowTables, build_model
from trainer.tasks import build_task

WIDTH, BATCH, LENGTH, NEGATIVES = 128, 128, 50, 1_024
SIZES = {"10 k": 10_000, "1 M": 1_000_000, "10 M": 10_000_000}
DENSE = ("10 k", "1 M")  # 10 M would be 20 GB: weights, gradient, two moments
BAR = 1.25


class _Endless:
    """Of a loader, all that a step asks for."""

    num_steps = 1_000


def steps(num_items: int, table_optimizer: str, warm: int, timed: int) -> Numbers:
    """Median seconds of a step, bytes of the table, and how much memory the process took for all of it."""
    begun = time.perf_counter()
    config = TrainConfig.model_validate({"batch_size": BATCH, "table_optimizer": table_optimizer, "warmup_steps": 0})
    task = build_task(MaskedItemConfig(loss=LossConfig(kind="sampled", num_negatives=NEGATIVES)))
    before = psutil.Process().memory_info().rss
    model = build_model(
        Bert4RecConfig(blocks=2, width=WIDTH, heads=4, max_length=LENGTH, user_width=0, knowledge={}),
        num_users=0, num_entities=0, knowledge_VS=torch.zeros(FIRST_INDEX + num_items, 0), seed=0,
        tables=RowTables(ALONE) if table_optimizer == "rowwise" else None,
    )  # fmt: skip
    training = Training(model, task, _Endless(), config, ALONE)
    batches = [_batch(num_items, step) for step in range(warm + timed)]
    made = time.perf_counter() - begun
    seconds = []
    for batch in batches:
        begun = time.perf_counter()
        train_step(training, batch, stop=False)
        seconds.append(time.perf_counter() - begun)
    rows = torch.cat([batch.items.flatten() for batch in batches[warm:]])
    return {
        "step_seconds": float(np.median(seconds[warm:])),
        "making_seconds": made,
        "rows_per_batch": len(torch.unique(rows)) / timed,
        "table_bytes": model.item_embedding.weight.nbytes,
        "memory_bytes": psutil.Process().memory_info().rss - before,
    }


def _batch(num_items: int, step: int) -> Batch:
    """Full sequences of items whose rank is log-uniform (Zipf's law, exponent 1), scattered over the table."""
    random = np.random.default_rng([7, step])
    rank = np.exp(random.random((BATCH, LENGTH)) * np.log(num_items)).astype(np.int64) - 1
    items = torch.from_numpy(FIRST_INDEX + rank * 7_368_787 % num_items)  # a prime: one to one
    lengths = torch.full((BATCH,), LENGTH)
    return Batch(
        items, lengths, torch.zeros(BATCH, dtype=torch.long), BATCH, slice(0, BATCH), (0, 0, step), items.numel()
    )


def measure(report: Report, options: object) -> None:
    """Print the table and hold the bar."""
    cases = [_case(size, "rowwise") for size in SIZES] + [_case(size, "adamw") for size in DENSE]
    found = alternate(cases)
    rows = []
    for case in cases:
        of_case = found[case.name]
        gigabytes = [median(of_case, key) / 2**30 for key in ("table_bytes", "memory_bytes", "peak_bytes")]
        rows.append([case.name, 1e3 * median(of_case, "step_seconds"), *gigabytes, median(of_case, "making_seconds")])
    columns = [
        "tables, items",
        "step, ms",
        "item table, GB",
        "taken by training, GB",
        "peak of the process, GB",
        "made in, s",
    ]
    report.table(f"{BATCH} sequences of {LENGTH}, width {WIDTH}, {NEGATIVES:,} negatives", columns, rows)
    seconds = {size: median(found[f"rowwise, {size}"], "step_seconds") for size in SIZES}
    # Not 1: a row of a table that no cache holds comes from memory, and fewer items of a batch are the same one.
    report.bar("catalogue: a step at 10 M items, over one at 10 k", seconds["10 M"] / seconds["10 k"], at_most=BAR)
    largest = found["rowwise, 10 M"]
    ratio = median(largest, "memory_bytes") / median(largest, "table_bytes")
    report.bar("catalogue: memory taken at 10 M items, over the table's", ratio, at_most=1.25)


def _case(size: str, table_optimizer: str) -> Case:
    dense = table_optimizer == "adamw"
    arguments = {
        "num_items": SIZES[size], "table_optimizer": table_optimizer,
        "warm": 2 if dense else 5, "timed": 5 if dense else 20,
    }  # fmt: skip
    return Case(f"{table_optimizer}, {size}", "tests.benchmarks.catalogue:steps", arguments)
