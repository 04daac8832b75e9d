"""Training speed beside RecTools, RePlay and RecBole: BERT4Rec of one architecture, on the same sequences.

Real items per second: padding doesn't count. Set-up and the first steps aren't timed. What the networks share: 2
blocks of width 64, 2 heads, 200 learned positions, 0.1 dropout, a fifth of the items masked, softmax over the
catalogue, batches of 128, two threads. Ours without user and knowledge embeddings, which the others haven't. All in
fp32. The peers without validation, logging, checkpoints or progress bars. RePlay twice: with its default loss `CE`, to
which the bar belongs, and with `CE_restricted`, the same loss computed at masked positions only.
"""

import time
from dataclasses import dataclass
from importlib.metadata import version

import torch

from etl.tables import DOMAIN_ALL
from tests.benchmarks.__main__ import Options
from tests.benchmarks.environments import PEERS, peers_table, pythons
from tests.benchmarks.harness import Case, Numbers, Report, alternate
from tests.benchmarks.movielens import SPLIT, movielens
from trainer.config import Bert4RecConfig, DataConfig, MaskedItemConfig, RuntimeConfig, TrainConfig
from trainer.data.catalogue import Catalogue, read_catalogue
from trainer.data.loader import Loader
from trainer.data.release import pin
from trainer.data.sequences import SequenceDataset
from trainer.models import ModelSizes, build_model
from trainer.parallel.distributed import join
from trainer.tasks import build_task
from trainer.training.loop import Training, train_step

ARCHITECTURE = {
    "blocks": 2,
    "heads": 2,
    "width": 64,
    "length": 200,
    "dropout": 0.1,
    "mask_probability": 0.2,
    "batch_size": 128,
    "threads": 2,
}
SECONDS = 20.0
BARS = {"rectools": 8.0, "replay": 5.0, "recbole": 5.0}
WARM_STEPS = 5


def measure(report: Report, options: Options) -> None:
    log = movielens(options.data, options.work)
    python, missing = pythons(options.work)
    settings = {**ARCHITECTURE, "seconds": SECONDS, "train": str(log.train), "precision": "32-true", "loss": "CE"}
    cases = [
        Case("graftrec", "tests.benchmarks.peers_train:train", {"lake": str(log.lake), "seconds": SECONDS}),
        *(Case(peer, f"tests/benchmarks/peers/{peer}_train.py", settings, python[peer]) for peer in python),
    ]
    if "replay" in python:
        restricted = settings | {"loss": "CE_restricted"}
        cases.append(
            Case("replay, CE_restricted", "tests/benchmarks/peers/replay_train.py", restricted, python["replay"])
        )
    found = alternate(cases, timeout=300)
    title = f"BERT4Rec 2 × 64, 200 positions, batches of 128, on {log.name}"
    speed = peers_table(report, title, "items/s", found, "items_per_second")
    for peer, wanted in BARS.items():
        what = f"training items/s over {PEERS[peer]}"
        if peer in missing:
            report.skip(what, missing[peer])
        else:
            report.bar(what, speed["graftrec"] / speed[peer], at_least=wanted)


@dataclass(frozen=True)
class Ours:
    """What a case of ours works with."""

    catalogue: Catalogue
    loader: Loader
    training: Training


def ours(
    *,
    lake: str,
    blocks: int,
    heads: int,
    width: int,
    length: int,
    dropout: float,
    mask_probability: float,
    batch_size: int,
    threads: int,
) -> Ours:
    """The architecture, with fresh weights, and what trains it; in fp32, as the peers compute."""
    world = join(RuntimeConfig(device="cpu", precision="fp32", threads=threads))
    release = pin(lake, None)
    catalogue = read_catalogue(release, DOMAIN_ALL)
    architecture = Bert4RecConfig(
        blocks=blocks,
        width=width,
        heads=heads,
        max_length=length,
        positions="learned",
        dropout=dropout,
        user_width=0,
        knowledge={},
    )
    no_knowledge_VS = torch.empty(len(catalogue), 0, dtype=torch.int32)
    model = build_model(architecture, ModelSizes(num_users=0, num_entities=0, knowledge_VS=no_knowledge_VS), seed=0)
    data = DataConfig(lake=lake, split=SPLIT, domain=DOMAIN_ALL, window="last", unknown_users=0.0)
    dataset = SequenceDataset(release, SPLIT, DOMAIN_ALL)
    loader = Loader(dataset, catalogue, data, batch_size=batch_size, max_length=length, seed=0)
    task = build_task(MaskedItemConfig(mask_probability=mask_probability, last_only_probability=0.0))
    return Ours(catalogue, loader, Training(model, task, loader, TrainConfig(batch_size=batch_size), world))


def train(*, lake: str, seconds: float) -> Numbers:
    """Whole epochs of ours, for about `seconds`: batches differ in length, so that only an epoch is representative."""
    made = ours(lake=lake, **ARCHITECTURE)
    loader, training = made.loader, made.training
    for _, batch in zip(range(WARM_STEPS), loader, strict=False):
        train_step(training, batch, stop=False)
    loader.load_state_dict({"epoch": 1, "step": 0})
    training.progress.items = 0
    begun = time.perf_counter()
    while time.perf_counter() - begun < seconds:
        for batch in loader:
            train_step(training, batch, stop=False)
    spent = time.perf_counter() - begun
    return {
        "items_per_second": training.progress.items / spent,
        "version": version("graftrec"),
        "torch": torch.__version__,
    }
