"""How near the machine's own limit the training step of `preset/bert4rec_paper` comes: 6 blocks of width 128, 4 heads.

Limit: the seconds that torch.matmul alone takes for the products that the step can't do without, at the shapes the step
has them in, forward and both backward products, measured in the same process. Counted are the linear layers at real
positions (of the last layer, whose other positions nobody asks for, queries and feed-forward where a loss is taken
only), attention's six products of real lengths, head and output layer where a loss is taken; neither padding nor what
is computed twice. A step is forward, backward, clipping and AdamW, over batches of all lengths.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Sequence

import numpy as np
import pyarrow.parquet as pq
import torch
from torch import Tensor

from etl.tables import FIRST_INDEX
from tests.benchmarks.__main__ import Options
from tests.benchmarks.harness import Case, Numbers, Report, alternate, median, quick
from tests.benchmarks.movielens import movielens
from tests.benchmarks.train_small import LENGTH, THREADS, Plain, padded, plain_step, training_of
from trainer.config import Bert4RecConfig, MaskedItemConfig
from trainer.data.batch import Batch
from trainer.data.order import shuffled
from trainer.models.item_encoder import CHUNK_POSITIONS
from trainer.parallel.cores import use_threads
from trainer.tasks import MaskedItem
from trainer.tasks.softmax import BLOCK_SCORES
from trainer.training.loop import train_step

BLOCKS, WIDTH, HEADS = 6, 128, 4
USERS, BATCH = 128, 64
ALTERNATIONS = 3
SHARE = {"AVX512-bf16": 0.5, "AMX": 0.3}  # machine class -> bar; seen: 0.55 and 0.35
Shape = tuple[str, int, int]  # of a product: kind, and its sizes
STEPS = {"graftrec, fp32": "fp32", "graftrec, bf16": "bf16", "plain torch, fp32": "plain"}


def measure(report: Report, options: Options) -> None:
    log = movielens(options.data, options.work)
    cases = [
        Case(name, "tests.benchmarks.train_survey:step", {"train": str(log.train), "kind": kind})
        for name, kind in STEPS.items()
    ]
    found = alternate(cases, timeout=200)
    report.table(
        f"BERT4Rec 6 × 128, 200 positions, batches of {BATCH}, on {log.name}: a training step",
        ["step", "items/s", "useful GFLOP/s", "products alone, GFLOP/s", "share of the time", "peak GB"],
        [
            [
                name,
                *(median(rounds, key) for key in ("items_per_second", "rate", "bare_rate", "share")),
                median(rounds, "peak_bytes") / 2**30,
            ]
            for name, rounds in found.items()
        ],
    )
    fp32, bf16, _ = found.values()
    share = SHARE.get(str(report.machine_class), min(SHARE.values()))
    report.bar(
        "share of the measured matmul rate, whole step, fp32",
        median(fp32, "share"),
        at_least=share,
        seen_on=tuple(SHARE),
    )
    faster = median(bf16, "items_per_second") / median(fp32, "items_per_second")
    report.bar("a step in bf16 faster than in fp32 by", faster, at_least=1.0)


def step(*, train: str, kind: str) -> Numbers:
    """Whole passes over a few batches: `kind` fp32, bf16 or plain."""
    table = pq.read_table(train)
    user, item = table["user"].to_numpy(), FIRST_INDEX + table["item"].to_numpy()
    lists = np.split(item, np.flatnonzero(np.diff(user)) + 1)
    chosen = [lists[row][-LENGTH:] for row in np.random.default_rng(0).choice(len(lists), USERS, replace=False)]
    num_items = int(item.max()) + 1
    rows = np.split(shuffled(USERS, seed=0, epoch=0, block=0), range(BATCH, USERS, BATCH))
    width = LENGTH if kind == "plain" else None
    batches = [padded([chosen[row] for row in some], step=number, width=width) for number, some in enumerate(rows)]
    task = MaskedItem(MaskedItemConfig())
    one_step = _plain(num_items) if kind == "plain" else _ours(task, num_items, autocast=kind == "bf16")

    def whole_pass() -> None:
        for batch in batches:
            one_step(batch)

    flops = needed(task, batches, num_items, last_whole=kind == "plain")
    total = sum(flops.values())
    threads = torch.set_num_threads if kind == "plain" else use_threads
    threads(THREADS)
    whole_pass()  # not counted
    seconds = bare = 0.0
    for _ in range(ALTERNATIONS):  # side by side, for the machine's speed changes
        threads(THREADS)
        begun = time.perf_counter()
        whole_pass()
        seconds += (time.perf_counter() - begun) / ALTERNATIONS
        torch.set_num_threads(THREADS)
        bare += bare_seconds(flops, torch.bfloat16 if kind == "bf16" else torch.float32) / ALTERNATIONS
    return {
        "items_per_second": sum(batch.global_items for batch in batches) / seconds,
        "rate": total / seconds / 1e9,
        "bare_rate": total / bare / 1e9,
        "share": bare / seconds,
    }


def _ours(task: MaskedItem, num_items: int, *, autocast: bool) -> Callable[[Batch], object]:
    config = Bert4RecConfig(
        blocks=BLOCKS, width=WIDTH, heads=HEADS, max_length=LENGTH, positions="learned", user_width=0, knowledge={}
    )
    training = training_of(config, task, num_items=num_items, autocast=autocast)
    return lambda batch: train_step(training, batch, stop=False)


def _plain(num_items: int) -> Callable[[Batch], object]:
    plain = Plain(num_items=num_items, width=WIDTH, blocks=BLOCKS, heads=HEADS)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-3)
    return lambda batch: plain_step(plain, optimizer, batch)


def needed(task: MaskedItem, batches: Sequence[Batch], num_items: int, *, last_whole: bool) -> dict[Shape, float]:
    """Floating point operations of the products that a pass can't do without, forward and backward, by shape."""
    D, flops = WIDTH, defaultdict[Shape, float](float)
    for batch in batches:
        _, lengths_B, chosen_BT = task.mask(batch, num_items)
        T, asked_B = int(lengths_B.max()), chosen_BT.sum(1)
        real, examples = int(lengths_B.sum()), int(asked_B.sum())
        asking_B = lengths_B if last_whole else asked_B
        asking = int(asking_B.sum())
        for inputs, outputs, positions in (
            (D, 3 * D, (BLOCKS - 1) * real),
            (D, D, asking),
            (D, 2 * D, real),
            *((i, o, (BLOCKS - 1) * real + asking) for i, o in ((D, D), (D, 4 * D), (4 * D, D))),
            (D, D, examples),
        ):
            flops["layer", inputs, outputs] += 3 * 2 * inputs * outputs * positions
        flops["output", D, num_items] += 3 * 2 * D * num_items * examples
        pairs = (BLOCKS - 1) * int(lengths_B.square().sum()) + int((lengths_B * asking_B).sum())
        flops["attention", T, D // HEADS] += 3 * 4 * D * pairs
    return flops


def bare_seconds(flops: dict[Shape, float], dtype: torch.dtype) -> float:
    """Seconds that torch.matmul takes for these operations."""

    def some(*shape: int) -> Tensor:
        return torch.randn(*shape).to(dtype)

    total = 0.0
    for (kind, first, second), count in flops.items():
        if kind == "attention":  # of the sequences of one chunk: scores, their use, and both gradients of each
            heads = CHUNK_POSITIONS // first * HEADS
            small, large = some(heads, first, second), some(heads, first, first)
            seconds = 2 * _time(small, small.mT) + 2 * _time(large, small) + 2 * _time(large.mT, small)
            operations = 6 * 2 * heads * first * first * second
        else:
            rows = BLOCK_SCORES // second if kind == "output" else CHUNK_POSITIONS
            x, weight, gradient = some(rows, first), some(second, first), some(rows, second)
            seconds = _time(x, weight.T) + _time(gradient, weight) + _time(gradient.T, x)
            operations = 3 * 2 * rows * first * second
        total += count / operations * seconds
    return total


def _time(left: Tensor, right: Tensor) -> float:
    begun = time.perf_counter()
    torch.matmul(left, right)
    once = time.perf_counter() - begun
    return quick(lambda: torch.matmul(left, right), seconds=max(0.02, 3 * once), least=3)
