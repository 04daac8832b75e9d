"""Training steps on a CUDA device beside plain compiled ones (`plain_gpu`), on the same card in alternation; bf16.

At three sizes: a small network spends its step on starting kernels, a large one in them. Counted are real items.
`fed`: steps on batches that the loader reads, packs and copies, over steps on a batch that is there.
"""

import time
from collections.abc import Callable, Iterator
from itertools import cycle

import torch
from torch import Tensor

from etl.settings import GraftrecError
from etl.tables import DOMAIN_ALL
from tests.benchmarks.__main__ import Options
from tests.benchmarks.harness import Case, Numbers, Report, alternate, median
from tests.benchmarks.movielens import SPLIT, movielens
from tests.benchmarks.plain_gpu import LENGTH, SHARE, plain_step
from trainer.config import Bert4RecConfig, DataConfig, MaskedItemConfig, TrainConfig
from trainer.data.ahead import packed
from trainer.data.batch import Batch
from trainer.data.catalogue import read_catalogue
from trainer.data.loader import Loader
from trainer.data.release import pin
from trainer.data.sequences import SequenceDataset
from trainer.models import ModelSizes, build_model
from trainer.parallel.distributed import World
from trainer.tasks import MaskedItem
from trainer.training.loop import Training, train_step

SIZES = {"2 × 64": (2, 64, 2, 128), "6 × 128": (6, 128, 4, 256), "6 × 256": (6, 256, 4, 1_024)}  # blocks … batch
LARGEST = "6 × 256"
PEAK = 989e12  # FLOP/s of dense bf16, an H100 SXM's by its maker
WARM_SECONDS, SECONDS = 120.0, 4.0  # at most, until all shapes were compiled; and measured
CASES = {"graftrec, fed": "fed", "graftrec, one batch": "repeated", "plain, compiled": "plain"}


def measure(report: Report, options: Options) -> None:
    if not torch.cuda.is_available():
        raise GraftrecError("expected a CUDA device, found none; run this where there is one")
    log = movielens(options.data, options.work)
    for size, (blocks, width, heads, batch_size) in SIZES.items():
        settings = {"lake": str(log.lake), "blocks": blocks, "width": width, "heads": heads, "batch_size": batch_size}
        cases = [
            Case(name, "tests.benchmarks.train_gpu:step", {**settings, "kind": kind}) for name, kind in CASES.items()
        ]
        found = alternate(cases, timeout=300)
        speed = {name: median(rounds, "items_per_second") for name, rounds in found.items()}
        share = {name: median(rounds, "flops") / PEAK for name, rounds in found.items()}
        fed, repeated, plain = speed.values()
        report.table(
            f"BERT4Rec {size}, 200 positions, batches of {batch_size}, bf16, on {log.name}, "
            f"{torch.cuda.get_device_name()}",
            ["step", "items/s", "over plain", "share of 989 TFLOP/s", "warm-up, s", "peak GB"],
            [
                [
                    name,
                    speed[name],
                    speed[name] / plain,
                    share[name],
                    median(rounds, "warm_seconds"),
                    median(rounds, "device_bytes") / 2**30,
                ]
                for name, rounds in found.items()
            ],
        )
        report.bar(f"{size}: items/s over a plain compiled step", fed / plain, at_least=1)
        report.bar(f"{size}: a step fed by the loader over one on a batch that is there", fed / repeated, at_least=0.95)
        if size == LARGEST:
            _, bare = bare_products(blocks, width, batch_size)
            report.say(f"bare products of these shapes: {bare / PEAK:.3f} of 989 TFLOP/s")
            report.bar(f"{size}: share of 989 TFLOP/s", next(iter(share.values())), at_least=0.06)


def step(
    *, lake: str, blocks: int, width: int, heads: int, batch_size: int, kind: str, device: str = "cuda"
) -> Numbers:
    """Steps for about SECONDS, after an epoch at least, in which each shape is compiled."""
    release = pin(lake, None)
    catalogue, dataset = read_catalogue(release, DOMAIN_ALL), SequenceDataset(release, SPLIT, DOMAIN_ALL)
    data = DataConfig(lake=lake, split=SPLIT, domain=DOMAIN_ALL, window="last", unknown_users=0.0)
    loader = Loader(dataset, catalogue, data, batch_size=batch_size, max_length=LENGTH, seed=0)
    sizes = {"num_items": len(catalogue), "blocks": blocks, "width": width, "heads": heads}
    if kind == "plain":
        steps = _plain_steps(loader, sizes, batch_size, device)
    else:
        steps = _our_steps(loader, sizes, batch_size, device, repeated=kind == "repeated")
    wait: Callable[[], object] = torch.cuda.synchronize if device == "cuda" else lambda: None
    begun = time.perf_counter()
    for _ in range(loader.num_steps + 3):  # not counted
        next(steps)
        if time.perf_counter() - begun > WARM_SECONDS:
            break
    wait()
    warm, items, squares, begun = time.perf_counter() - begun, 0, 0, time.perf_counter()
    while time.perf_counter() - begun < SECONDS:
        more, square = next(steps)
        items, squares = items + more, squares + square
    wait()
    seconds = time.perf_counter() - begun
    return {
        "items_per_second": items / seconds,
        "flops": needed(items, squares, sizes) / seconds,
        "warm_seconds": warm,
        "device_bytes": float(torch.cuda.max_memory_allocated()) if device == "cuda" else 0.0,
    }


def _our_steps(
    loader: Loader, sizes: dict[str, int], batch_size: int, device: str, *, repeated: bool
) -> Iterator[tuple[int, int]]:
    """Items of each step, and the sum of the squares of its lengths."""
    config = Bert4RecConfig(
        blocks=sizes["blocks"],
        width=sizes["width"],
        heads=sizes["heads"],
        max_length=LENGTH,
        positions="learned",
        user_width=0,
        knowledge={},
    )
    no_knowledge_VS = torch.empty(sizes["num_items"], 0, dtype=torch.int32)
    model = build_model(config, ModelSizes(num_users=0, num_entities=0, knowledge_VS=no_knowledge_VS), seed=0)
    place = torch.device(device)
    world = World(0, 1, place, torch.float32, True, True, "on" if device == "cuda" else "off")
    task = MaskedItem(MaskedItemConfig(mask_probability=SHARE, last_only_probability=0.0))
    training = Training(model.to(place).train(), task, loader, TrainConfig(batch_size=batch_size), world)
    for batch, counts in _repeated(loader, batch_size, place) if repeated else _fed(training):
        train_step(training, batch, stop=False)
        yield counts


def _fed(training: Training) -> Iterator[tuple[Batch, tuple[int, int]]]:
    while True:
        for batch in training.batches:
            # Lengths are on the device by now; squares of their mean are fewer, so the share of the peak is no more.
            yield batch, (batch.global_items, batch.global_items**2 // batch.global_rows)


def _repeated(loader: Loader, batch_size: int, device: torch.device) -> Iterator[tuple[Batch, tuple[int, int]]]:
    batch = next(iter(loader))
    squares = int(batch.lengths.square().sum())
    there = packed(batch, rows=batch_size, max_length=LENGTH).to(device)
    return cycle([(there, (batch.global_items, squares))])


def _plain_steps(loader: Loader, sizes: dict[str, int], batch_size: int, device: str) -> Iterator[tuple[int, int]]:
    """On full batches that are on the device already."""
    one_step = plain_step(**sizes, device=device, compiled=device == "cuda")
    given: list[tuple[Tensor, Tensor, tuple[int, int]]] = []
    for batch in loader:
        if len(batch.items) == batch_size:
            there = packed(batch, rows=batch_size, max_length=LENGTH)
            counts = batch.global_items, int(batch.lengths.square().sum())
            given.append((there.items.to(device), there.lengths.to(device), counts))
    for items_BT, lengths_B, counts in cycle(given):
        one_step(items_BT, lengths_B)
        yield counts


def needed(items: int, squares: int, sizes: dict[str, int]) -> float:
    """Floating point operations of the products that such steps can't do without, forward and backward, as
    `train_survey` counts them: neither padding nor what is computed twice."""
    D, asked = sizes["width"], SHARE * items
    before = sizes["blocks"] - 1
    layers = 12 * D * D * before * items + 2 * D * D * items + 10 * D * D * asked
    scores = D * D * asked + D * sizes["num_items"] * asked
    attention = 2 * D * (before + SHARE) * squares
    return 3 * 2 * (layers + scores + attention)


def bare_products(blocks: int, width: int, batch_size: int) -> tuple[float, float]:
    """Seconds of the linear layers' products of a step alone, forward and backward, and their FLOP/s."""
    rows = int(0.56 * batch_size) * LENGTH
    pairs = [
        (torch.randn(rows, i, device="cuda").bfloat16(), torch.randn(o, i, device="cuda").bfloat16())
        for i, o in ((width, 3 * width), (width, width), (width, 4 * width), (4 * width, width))
    ]
    slopes = [torch.randn(rows, len(weight), device="cuda").bfloat16() for _, weight in pairs]

    def once() -> None:
        for _ in range(blocks):
            for (x, weight), slope in zip(pairs, slopes, strict=True):
                torch.mm(x, weight.T), torch.mm(slope, weight), torch.mm(slope.T, x)

    once()
    torch.cuda.synchronize()
    begun = time.perf_counter()
    for _ in range(10):
        once()
    torch.cuda.synchronize()
    seconds = (time.perf_counter() - begun) / 10
    return seconds, 3 * 2 * 12 * width * width * rows * blocks / seconds
