"""Scoring beside RecTools: the 100 best items of every user, the whole catalogue scored, what was seen left out.

The same architecture and log as in `peers_train`; the weights are random, which changes no arithmetic. Both begin with
the histories in memory and end with ids and scores.
"""

import time
from importlib.metadata import version

import numpy as np
import torch

from tests.benchmarks.__main__ import Options
from tests.benchmarks.environments import PEERS, peers_table, pythons
from tests.benchmarks.harness import Case, Numbers, Report, alternate
from tests.benchmarks.movielens import movielens
from tests.benchmarks.peers_train import ARCHITECTURE, ours
from trainer.data.events import Events
from trainer.inference.scorer import ModelScorer, top_k

K = 100
USERS_PER_BATCH = 512
BAR = 5.0


def measure(report: Report, options: Options) -> None:
    what = f"users/s over {PEERS['rectools']}"
    python, missing = pythons(options.work)
    if "rectools" in missing:
        report.skip(what, missing["rectools"])
        return
    log = movielens(options.data, options.work)
    settings = {**ARCHITECTURE, "train": str(log.train), "precision": "32-true", "k": K}
    cases = [
        Case("graftrec", "tests.benchmarks.peers_score:score", {"lake": str(log.lake), "k": K}),
        Case("rectools", "tests/benchmarks/peers/rectools_score.py", settings, python["rectools"]),
    ]
    found = alternate(cases, timeout=300)
    title = f"The {K} best unseen items of every user of {log.name}"
    speed = peers_table(report, title, "users/s", found, "users_per_second")
    report.bar(what, speed["graftrec"] / speed["rectools"], at_least=BAR)


def score(*, lake: str, k: int) -> Numbers:
    """Every user of the lake, in batches of like lengths."""
    made = ours(lake=lake, **ARCHITECTURE)
    read = made.loader.dataset.read_all()
    rows = made.catalogue.rows(read.items).astype(np.int64)
    everyone = Events.of(read.users, read.offsets, rows, np.empty(0, np.int64)).until(read.valid_start)
    scorer = ModelScorer(made.training.model, made.training.task)

    def answer(histories: Events) -> int:
        """Global index and score of each user's best; their number."""
        order = np.argsort(histories.lengths, kind="stable")
        found = np.empty((len(histories), k), np.int64), np.empty((len(histories), k), np.float32)
        for users in np.split(order, range(USERS_PER_BATCH, len(order), USERS_PER_BATCH)):
            batch = histories.take(users)
            best, scores = top_k(scorer.scores(batch), batch, k)
            found[0][users], found[1][users] = made.catalogue.global_index[best], scores.numpy()
        return int(np.isfinite(found[1]).sum())

    answer(everyone.take(np.arange(256)))
    begun = time.perf_counter()
    answers = answer(everyone)
    spent = time.perf_counter() - begun
    return {
        "users_per_second": len(everyone) / spent,
        "rows": answers,
        "version": version("graftrec"),
        "torch": torch.__version__,
    }
