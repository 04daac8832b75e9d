"""A training step's cost and memory against the catalogue: 10 k, 1 M, 10 M items of width 128.

Row-wise tables and sampled softmax, by the very `train_step` that training runs; batches are made beforehand, for
reading them is another benchmark's. Items are asked for by Zipf's law and lie scattered in the table, as real ones do.
Steps of the three sizes take turns in one process, some at a time, so that a machine that is slow for a while is slow
for all; memory is measured in a process for each size. Dense tables with AdamW stand beside, up to what memory allows.
"""

import statistics
import time

import numpy as np
import psutil
import torch

from etl.tables import FIRST_INDEX
from tests.benchmarks.harness import Case, Numbers, Report, alternate, median
from trainer.config import Bert4RecConfig, LossConfig, MaskedItemConfig, TrainConfig
from trainer.data.batch import Batch
from trainer.models import ModelSizes, RowTables, build_model
from trainer.parallel.distributed import ALONE
from trainer.tasks import build_task
from trainer.training.loop import Training, train_step

WIDTH, BATCH, LENGTH, NEGATIVES = 128, 128, 50, 1_024
SIZES = {"10 k": 10_000, "1 M": 1_000_000, "10 M": 10_000_000}
TURNS, STEPS = 4, 4  # a turn of each size: a step that is not counted, so that caches are its own, then so many
BAR = 1.25


class _Endless:
    """Of a loader, all that a step asks for."""

    num_steps = 1_000


def by_turns() -> Numbers:
    """Median seconds of a step for each size."""
    trainings = {size: _training(num_items, "rowwise") for size, num_items in SIZES.items()}
    seconds: dict[str, list[float]] = {size: [] for size in SIZES}
    for turn in range(TURNS):
        for size in SIZES if turn % 2 else reversed(SIZES):
            batches = [_batch(SIZES[size], step) for step in range(turn * (STEPS + 1), (turn + 1) * (STEPS + 1))]
            seconds[size] += [_timed(trainings[size], batch) for batch in batches][1:]
    return {size: statistics.median(times) for size, times in seconds.items()}


def alone(num_items: int, table_optimizer: str) -> Numbers:
    """Bytes of the item table, of memory that training took beside the imports, and median seconds of a step."""
    before = psutil.Process().memory_info().rss
    begun = time.perf_counter()
    training = _training(num_items, table_optimizer)
    made = time.perf_counter() - begun
    seconds = [_timed(training, _batch(num_items, step)) for step in range(6)]
    return {
        "step_seconds": statistics.median(seconds[1:]),
        "making_seconds": made,
        "table_bytes": training.model.item_embedding.weight.nbytes,
        "memory_bytes": psutil.Process().memory_info().rss - before,
    }


def _training(num_items: int, table_optimizer: str) -> Training:
    config = TrainConfig.model_validate({"batch_size": BATCH, "table_optimizer": table_optimizer, "warmup_steps": 0})
    task = build_task(MaskedItemConfig(loss=LossConfig(kind="sampled", num_negatives=NEGATIVES)))
    model = build_model(
        Bert4RecConfig(blocks=2, width=WIDTH, heads=4, max_length=LENGTH, user_width=0, knowledge={}),
        ModelSizes(num_users=0, num_entities=0, knowledge_VS=torch.zeros(FIRST_INDEX + num_items, 0)),
        seed=0,
        tables=RowTables(ALONE) if table_optimizer == "rowwise" else None,
    )
    return Training(model, task, _Endless(), config, ALONE)


def _timed(training: Training, batch: Batch) -> float:
    begun = time.perf_counter()
    train_step(training, batch, stop=False)
    return time.perf_counter() - begun


def _batch(num_items: int, step: int) -> Batch:
    """Full sequences of items whose rank is log-uniform (Zipf's law, exponent 1), scattered over the table."""
    random = np.random.default_rng([7, step])
    rank = np.exp(random.random((BATCH, LENGTH)) * np.log(num_items)).astype(np.int64) - 1
    items = torch.from_numpy(FIRST_INDEX + rank * 7_368_787 % num_items)  # a prime: one to one
    lengths = torch.full((BATCH,), LENGTH)
    users = torch.zeros(BATCH, dtype=torch.long)
    return Batch(items, lengths, users, BATCH, slice(0, BATCH), (0, 0, step), items.numel())


def measure(report: Report, options: object) -> None:
    """Print the tables and hold the bars."""
    times = alternate([Case("turns", "tests.benchmarks.catalogue:by_turns")])["turns"]
    shown = [*((size, "rowwise") for size in SIZES), ("1 M", "adamw")]  # dense at 10 M: 20 GB
    cases = {
        chosen: Case(
            f"{chosen[1]}, {chosen[0]}",
            "tests.benchmarks.catalogue:alone",
            {"num_items": SIZES[chosen[0]], "table_optimizer": chosen[1]},
        )
        for chosen in shown
    }
    found = alternate(list(cases.values()), rounds=1)
    rows = []
    for (size, table_optimizer), case in cases.items():
        of_case = found[case.name]
        seconds = median(times, size) if table_optimizer == "rowwise" else median(of_case, "step_seconds")
        gigabytes = [median(of_case, key) / 2**30 for key in ("table_bytes", "memory_bytes")]
        rows.append([size, table_optimizer, 1e3 * seconds, *gigabytes, median(of_case, "making_seconds")])
    columns = ["items", "table_optimizer", "step, ms", "item table, GB", "taken by training, GB", "made in, s"]
    report.table(f"{BATCH} sequences of {LENGTH}, width {WIDTH}, {NEGATIVES:,} negatives", columns, rows)
    # Not 1: a row that no cache holds comes from memory, and fewer of a batch's items are the same one.
    ratio = statistics.median(turn["10 M"] / turn["10 k"] for turn in times)
    report.bar("catalogue: a step at 10 M items, over one at 10 k", ratio, at_most=BAR)
    largest = found["rowwise, 10 M"][0]
    share = largest["memory_bytes"] / largest["table_bytes"]
    report.bar("catalogue: memory taken by training at 10 M items, over the item table's", share, at_most=1.25)
