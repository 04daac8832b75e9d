"""Training by default threads beside each fixed number of them: on quiet cores, and with a busy neighbour on each.

Steps (forward, backward, clipping, AdamW) of the demo's model and of a larger one, in fp32. The numbers of threads take
turns within a process, every other round backwards, and are compared round by round, so that other work on the machine
slows all of them alike; the default is one of these numbers. The neighbour is a process that counts, tied to each core
that training may use. Bars: beside neighbours the default does at least 0.8 of what one thread does; on quiet cores,
at least 0.95 of what the best number of threads does; on all cores, and on one.
"""

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch

from etl.tables import FIRST_INDEX
from tests.benchmarks.__main__ import Options
from tests.benchmarks.harness import Case, Numbers, Report, run
from tests.benchmarks.train_small import padded, training_of
from trainer.config import Bert4RecConfig, MaskedItemConfig, RuntimeConfig
from trainer.data.batch import Batch
from trainer.parallel.cores import num_threads, usable_cores, use_threads
from trainer.parallel.distributed import join
from trainer.tasks import MaskedItem
from trainer.training.loop import train_step

MODELS = {  # network, batch, items, median history, batches a pass
    "2 × 64": (Bert4RecConfig(blocks=2, width=64, heads=2, max_length=100, user_width=0, knowledge={}), 64, 600, 30, 4),
    "6 × 128": (Bert4RecConfig(blocks=6, width=128, heads=4, user_width=0, knowledge={}), 64, 3_416, 60, 1),
}
ROUNDS, SECONDS = 7, 0.5  # of each number of threads and round, at least


def measure(report: Report, options: Options) -> None:
    del options
    cores = usable_cores()
    rows: list[list[object]] = []
    bars: list[tuple[str, float, float]] = []
    for model in MODELS:
        for number in sorted({cores, 1}, reverse=True):
            for busy in (False, True):
                arguments = {"model": model, "cores": number, "busy": busy}
                found = run(Case(model, "tests.benchmarks.threads:speeds", arguments), timeout=300)
                by_round, default = found["items_per_second"], str(found["default"])
                speed = {threads: statistics.median(each) for threads, each in by_round.items()}
                other = "1" if busy else max(speed, key=lambda name: speed[name])
                ratio = statistics.median(a / b for a, b in zip(by_round[default], by_round[other], strict=True))
                where = f"{number} core{'s' * (number > 1)}, {'a busy neighbour on each' if busy else 'quiet'}"
                rows.append([model, where, int(default), *(speed.get(str(n), "") for n in (1, cores)), ratio])
                beside = "one thread" if busy else "the best number"
                what = f"threads: items/s by default over {beside}, {model}, {where}"
                bars.append((what, ratio, 0.8 if busy else 0.95))
    report.table(
        "Training, fp32, items/s; the ratio is the median over rounds of the default's over the other's",
        ["model", "cores", "threads by default", "1 thread", f"{cores} threads", "ratio"],
        rows,
    )
    for what, ratio, least in bars:
        report.bar(what, ratio, at_least=least)


def speeds(*, model: str, cores: int, busy: bool) -> Numbers:
    """items/s of each round, by number of threads (1, 2, 4 … and all), and which of them is the default."""
    for name in ("OMP_NUM_THREADS", "LOCAL_WORLD_SIZE"):
        os.environ.pop(name, None)
    allowed = sorted(os.sched_getaffinity(0))[:cores] if hasattr(os, "sched_getaffinity") else []
    if allowed:
        os.sched_setaffinity(0, set(allowed))
    one_pass = _training(model)
    join(RuntimeConfig(device="cpu"))
    default = num_threads()
    numbers = sorted({*(2**power for power in range(cores.bit_length())), default, cores})
    found: dict[int, list[float]] = {number: [] for number in numbers}
    with _neighbours((allowed or range(cores)) if busy else ()):
        for round_number in range(ROUNDS):
            for number in numbers if round_number % 2 == 0 else reversed(numbers):
                use_threads(number)
                one_pass()  # not counted
                items, begun = 0, time.perf_counter()
                while time.perf_counter() - begun < SECONDS:
                    items += one_pass()
                found[number].append(items / (time.perf_counter() - begun))
    return {"items_per_second": found, "default": default}


def _training(model: str) -> Callable[[], int]:
    """A pass over some batches; gives the number of items."""
    config, size, num_items, median, steps = MODELS[model]
    torch.manual_seed(0)
    random = np.random.default_rng(0)
    task = MaskedItem(MaskedItemConfig())
    training = training_of(config, task, num_items=FIRST_INDEX + num_items, autocast=False)
    batches: list[Batch] = []
    for step in range(steps):
        lengths = np.clip(random.lognormal(np.log(median), 0.7, size), 5, config.max_length).astype(np.int64)
        lists = [FIRST_INDEX + random.integers(0, num_items, length) for length in lengths]
        batches.append(padded(lists, step=step))

    def one_pass() -> int:
        for batch in batches:
            train_step(training, batch, stop=False)
        return sum(batch.global_items for batch in batches)

    return one_pass


@contextmanager
def _neighbours(cores: Sequence[int]) -> Iterator[None]:
    """A process that counts for each of these cores, tied to it where processes can be."""
    tied = "os.sched_setaffinity(0, {int(sys.argv[1])})" if hasattr(os, "sched_setaffinity") else ""
    script = f"import os, sys; {tied}\nwhile True: pass"
    processes = [subprocess.Popen([sys.executable, "-c", script, str(core)]) for core in cores]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()
