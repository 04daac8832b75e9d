"""Training steps on a CUDA device beside plain ones: every sequence padded to 200, logits at every position; bf16.

As `train_small` for CPUs, at three sizes: a small network spends its step on starting kernels, a large one in them.
"""

import time
from collections.abc import Callable

import numpy as np
import pyarrow.parquet as pq
import torch

from etl.settings import GraftrecError
from etl.tables import FIRST_INDEX
from tests.benchmarks.__main__ import Options
from tests.benchmarks.harness import Case, Numbers, Report, alternate, median
from tests.benchmarks.movielens import movielens
from tests.benchmarks.train_small import LENGTH, Plain, padded, plain_step, training_of
from trainer.config import Bert4RecConfig, MaskedItemConfig
from trainer.data.batch import Batch
from trainer.tasks import MaskedItem
from trainer.training.loop import train_step

SIZES = {"2 × 64": (2, 64, 2, 128), "6 × 128": (6, 128, 4, 256), "6 × 256": (6, 256, 4, 1_024)}  # blocks … batch
BATCHES = 12  # different ones
SECONDS = 2.0


def measure(report: Report, options: Options) -> None:
    if not torch.cuda.is_available():
        raise GraftrecError("expected a CUDA device, found none; run this where there is one")
    log = movielens(options.data, options.work)
    for size, (blocks, width, heads, batch_size) in SIZES.items():
        settings = {"train": str(log.train), "blocks": blocks, "width": width, "heads": heads, "batch_size": batch_size}
        cases = [
            Case(name, "tests.benchmarks.train_gpu:step", {**settings, "plainly": plainly})
            for name, plainly in (("graftrec", False), ("plain torch", True))
        ]
        found = alternate(cases, timeout=120)
        speed = {name: median(rounds, "items_per_second") for name, rounds in found.items()}
        report.table(
            f"BERT4Rec {size}, 200 positions, batches of {batch_size}, bf16, on {log.name}, "
            f"{torch.cuda.get_device_name()}",
            ["step", "items/s", "faster by", "peak GB"],
            [
                [name, speed[name], speed[name] / speed["plain torch"], median(rounds, "device_bytes") / 2**30]
                for name, rounds in found.items()
            ],
        )
        report.bar(f"{size}: items/s over a plain padded step", speed["graftrec"] / speed["plain torch"], at_least=1)


def step(*, train: str, blocks: int, width: int, heads: int, batch_size: int, plainly: bool) -> Numbers:
    """Steps on batches of random users, for about SECONDS."""
    table = pq.read_table(train)
    user, item = table["user"].to_numpy(), FIRST_INDEX + table["item"].to_numpy()
    lists = [one[-LENGTH:] for one in np.split(item, np.flatnonzero(np.diff(user)) + 1)]
    random = np.random.default_rng(0)
    batches = [
        padded(
            [lists[row] for row in random.choice(len(lists), batch_size, replace=False)],
            step=number,
            width=LENGTH if plainly else None,
        )
        for number in range(BATCHES)
    ]
    num_items = int(item.max()) + 1
    one_step = _plain(num_items, blocks, width, heads) if plainly else _ours(num_items, blocks, width, heads)
    for batch in batches[:3]:  # not counted
        one_step(batch)
    torch.cuda.synchronize()
    items, done, begun = 0, 0, time.perf_counter()
    while time.perf_counter() - begun < SECONDS:
        batch = batches[done % BATCHES]
        one_step(batch)
        items, done = items + batch.global_items, done + 1
    torch.cuda.synchronize()
    seconds = time.perf_counter() - begun
    return {"items_per_second": items / seconds, "device_bytes": float(torch.cuda.max_memory_allocated())}


def _ours(num_items: int, blocks: int, width: int, heads: int) -> Callable[[Batch], object]:
    config = Bert4RecConfig(
        blocks=blocks, width=width, heads=heads, max_length=LENGTH, positions="learned", user_width=0, knowledge={}
    )
    training = training_of(config, MaskedItem(MaskedItemConfig()), num_items=num_items, autocast=True, device="cuda")
    return lambda batch: train_step(training, batch, stop=False)


def _plain(num_items: int, blocks: int, width: int, heads: int) -> Callable[[Batch], object]:
    plain = Plain(num_items=num_items, width=width, blocks=blocks, heads=heads).cuda()
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-3, fused=True)

    def one_step(batch: Batch) -> None:
        with torch.autocast("cuda", torch.bfloat16):
            plain_step(plain, optimizer, batch.to(torch.device("cuda")))

    return one_step
