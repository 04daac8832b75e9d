"""Scoring: the 100 best unseen items of every user, the whole catalogue scored exactly.

Beside it the plain way to write it in torch: histories padded to the model's length, every position computed, a score
of every item, a mask of the same shape for what was seen, `topk`. Both run the same model, with random weights (which
changes no arithmetic), from histories in memory to rows and scores.

Memory is that of a catalogue of a million items, asked by some users and by four times as many.
"""

import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from torch import Tensor

from etl.tables import FIRST_INDEX, MASK, PAD
from tests.benchmarks.__main__ import Options
from tests.benchmarks.harness import Case, Numbers, Report, alternate, median, run
from tests.benchmarks.movielens import movielens
from trainer.config import Bert4RecConfig, MaskedItemConfig
from trainer.data.events import Events
from trainer.inference.scorer import ModelScorer, top_k
from trainer.models import Bert4Rec, ModelSizes, build_model
from trainer.tasks import build_task

K = 100
MODEL = Bert4RecConfig(width=64, blocks=2, heads=2, max_length=200, knowledge={}, user_width=0, positions="learned")
USERS, USERS_PER_BATCH = 2_000, 512
PLAIN_USERS_PER_BATCH = 256
LARGE_ITEMS, FEW_USERS = 1_000_000, 512


def measure(report: Report, options: Options) -> None:
    log = movielens(options.data, options.work)
    cases = [Case(name, f"tests.benchmarks.score:{name}", {"train": str(log.train)}) for name in ("ours", "plain")]
    found = alternate(cases, timeout=300)
    speed = {name: median(rounds, "users_per_second") for name, rounds in found.items()}
    report.table(
        f"Top {K} of {USERS:,} users of {log.name}; 2 blocks, width 64, 200 positions",
        ["scoring", "users/s", "peak GB"],
        [[name, speed[name], median(rounds, "peak_bytes") / 2**30] for name, rounds in found.items()],
    )
    report.bar("scoring: users/s over a plain padded loop", speed["ours"] / speed["plain"], at_least=2)
    same = run(Case("same", "tests.benchmarks.score:same", {"train": str(log.train)}))
    report.say(f"{same['same']:.2%} of users get the very rows of the plain loop in its order")
    report.bar("scoring: furthest from the plain loop's best scores", float(same["furthest"]), at_most=1e-5)

    sizes = {f"{times * FEW_USERS:,} users": times * FEW_USERS for times in (1, 4)}
    large = {
        name: run(Case(name, "tests.benchmarks.score:large", {"users": users, "items": LARGE_ITEMS}))
        for name, users in sizes.items()
    }
    report.table(
        f"Top {K} among {LARGE_ITEMS:,} items (a table of {LARGE_ITEMS * MODEL.width * 4 / 2**30:.2f} GB)",
        ["asked by", "users/s", "peak GB", "of which scoring"],
        [
            [name, one["users_per_second"], one["peak"] / 2**30, (one["peak"] - one["before"]) / 2**30]
            for name, one in large.items()
        ],
    )
    few, many = large.values()
    report.bar("scoring: memory of 4 times the users", many["peak"] / few["peak"], at_most=1.05)
    report.bar("scoring: GB beside the model, 1 M items", (many["peak"] - many["before"]) / 2**30, at_most=0.4)


def ours(*, train: str) -> Numbers:
    histories, model = _asked(train)
    scorer = ModelScorer(model, build_task(MaskedItemConfig()))
    _best(scorer, histories.take(np.arange(64)))
    begun = time.perf_counter()
    _best(scorer, histories)
    return {"users_per_second": len(histories) / (time.perf_counter() - begun)}


def plain(*, train: str) -> Numbers:
    histories, model = _asked(train)
    _plain(model, histories.take(np.arange(64)))
    begun = time.perf_counter()
    _plain(model, histories)
    return {"users_per_second": len(histories) / (time.perf_counter() - begun)}


def same(*, train: str) -> Numbers:
    """How many users get the same rows from both, and how far the scores of ours, by the plain loop, are from its
    own."""
    histories, model = _asked(train)
    some = histories.take(np.arange(500))
    rows, _ = _best(ModelScorer(model, build_task(MaskedItemConfig())), some)
    their_rows, their_best, their_scores = _plain(model, some)
    furthest = np.abs(np.take_along_axis(their_scores, rows, 1) - their_best).max()
    return {"same": float((rows == their_rows).all(1).mean()), "furthest": float(furthest)}


def large(*, users: int, items: int) -> Numbers:
    random = np.random.default_rng(0)
    lengths = random.integers(5, 40, users)
    histories = _histories(random.integers(FIRST_INDEX, items, lengths.sum()), lengths)
    scorer = ModelScorer(_model(items), build_task(MaskedItemConfig()))
    Path("/proc/self/clear_refs").write_text("5")  # to make the model took more: the peak begins anew
    before = _resident("VmRSS")
    begun = time.perf_counter()
    _best(scorer, histories)
    spent = time.perf_counter() - begun
    return {"users_per_second": users / spent, "before": before, "peak": _resident("VmHWM")}


def _resident(field: str) -> int:
    """Bytes of this process in memory, now (VmRSS) or at most (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def _best(scorer: ModelScorer, histories: Events) -> tuple[np.ndarray, np.ndarray]:
    """Rows and scores [U, K], users in batches of like lengths."""
    order = np.argsort(histories.lengths, kind="stable")
    rows, best = np.empty((len(order), K), np.int64), np.empty((len(order), K), np.float32)
    for users in np.split(order, range(USERS_PER_BATCH, len(order), USERS_PER_BATCH)):
        batch = histories.take(users)
        rows[users], scores = top_k(scorer.scores(batch), batch, K)
        best[users] = scores.numpy()
    return rows, best


@torch.inference_mode()
def _plain(model: Bert4Rec, histories: Events) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows [U, K], scores [U, K], and all scores [U, V] of the last batch's shape."""
    model.eval()
    table_VD = model.item_vectors()
    rows, best, every = [], [], []
    for start in range(0, len(histories), PLAIN_USERS_PER_BATCH):
        batch = histories.take(np.arange(start, min(start + PLAIN_USERS_PER_BATCH, len(histories))))
        recent = batch.newest(MODEL.max_length - 1)
        items = np.full((len(batch), MODEL.max_length), PAD, np.int64)
        items[np.arange(MODEL.max_length) < recent.lengths[:, None]] = recent.items
        items[np.arange(len(batch)), recent.lengths] = MASK
        seen = torch.zeros(len(batch), model.num_items, dtype=torch.bool)
        seen[np.repeat(np.arange(len(batch)), batch.lengths), batch.items] = True
        seen[:, :FIRST_INDEX] = True
        lengths = torch.from_numpy(recent.lengths)
        hidden_BTD = _plain_hidden(model, torch.from_numpy(items), lengths + 1)
        queries = model.head(hidden_BTD[torch.arange(len(batch)), lengths])
        scores = (queries @ table_VD.T + model.output_bias).masked_fill(seen, -torch.inf)
        found = scores.topk(K)
        rows.append(found.indices.numpy())
        best.append(found.values.numpy())
        if len(histories) <= 500:
            every.append(scores.numpy())
    return np.concatenate(rows), np.concatenate(best), np.concatenate(every) if every else np.empty(0)


def _plain_hidden(model: Bert4Rec, items_BT: Tensor, lengths_B: Tensor) -> Tensor:
    """The network as one would write it: all positions through all layers."""
    B, T = items_BT.shape
    x_BTD = model.input_norm(model.item_embedding(items_BT) + model.position_embedding.weight[:T])
    mask_B11T = (torch.arange(T) < lengths_B[:, None])[:, None, None]
    for block in model.blocks:
        qkv = block.qkv(block.attention_norm(x_BTD)).view(B, T, 3, MODEL.heads, MODEL.width // MODEL.heads)
        attended = F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4), attn_mask=mask_B11T)
        x_BTD = x_BTD + block.attention_out(attended.transpose(1, 2).reshape(B, T, MODEL.width))
        x_BTD = x_BTD + block.feed_out(F.gelu(block.feed_in(block.feed_norm(x_BTD))))
    hidden_BTD: Tensor = model.output_norm(x_BTD)
    return hidden_BTD


def _asked(train: str) -> tuple[Events, Bert4Rec]:
    """USERS of the log, and a model of its catalogue."""
    table = pq.read_table(train, columns=["user", "item"])
    items = np.unique(table["item"].to_numpy(), return_inverse=True)[1]
    lengths = np.unique(table["user"].to_numpy(), return_counts=True)[1]
    chosen = np.linspace(0, len(lengths) - 1, USERS).astype(np.int64)
    return _histories(items + FIRST_INDEX, lengths).take(chosen), _model(int(items.max()) + 1 + FIRST_INDEX)


def _histories(items: np.ndarray, lengths: np.ndarray) -> Events:
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return Events.of(np.arange(len(lengths)), offsets, items.astype(np.int64), np.empty(0, np.int64))


def _model(num_rows: int) -> Bert4Rec:
    return build_model(MODEL, ModelSizes(num_users=0, num_entities=0, knowledge_VS=torch.zeros(num_rows, 0)), seed=0)
