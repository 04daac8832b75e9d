"""The training step of `preset/bert4rec_w64` beside a plain one: sequences padded to 200, logits at every position.

Both are the same network (2 pre-normalised blocks of width 64, 2 heads, learned positions, dropout 0.1, a head tied to
the item table), trained by masked item prediction and AdamW in fp32. The plain one is what one would write with torch's
own modules: nn.TransformerEncoder, logits at all positions, F.cross_entropy with an ignored index. Speed is
measured on MovieLens-1M's leave-one-out sequences, or a log of their shape; what the two have learned after the same
number of epochs, on a small log in which an item tells its successor's kind, so that minutes show it.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import cast

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from etl.tables import FIRST_INDEX, MASK, PAD, UNK
from tests.benchmarks.__main__ import Options
from tests.benchmarks.harness import Case, Numbers, Report, alternate, median, run
from tests.benchmarks.movielens import movielens
from tests.benchmarks.peers_train import ARCHITECTURE
from trainer.config import Bert4RecConfig, MaskedItemConfig, TrainConfig
from trainer.data.batch import Batch
from trainer.data.loader import Loader
from trainer.data.order import shuffled
from trainer.models import ModelSizes, build_model
from trainer.parallel.cores import use_threads
from trainer.parallel.distributed import World
from trainer.tasks import MaskedItem
from trainer.training.loop import Training, train_step

LENGTH = 200
SECONDS = 6.0  # of each case and round
THREADS = 2
USERS, ITEMS, KINDS, EPOCHS, BATCH, RATE = 640, 400, 20, 12, 32, 3e-3  # of the log that is learned
Lists = list[npt.NDArray[np.int64]]


def measure(report: Report, options: Options) -> None:
    log = movielens(options.data, options.work)
    settings = {"train": str(log.train), "seconds": SECONDS}
    cases = [
        Case("graftrec", "tests.benchmarks.peers_train:train", {"lake": str(log.lake), "seconds": SECONDS}),
        Case("plain torch", "tests.benchmarks.train_small:plain_speed", settings),
    ]
    found = alternate(cases, timeout=120)
    speed = {name: median(rounds, "items_per_second") for name, rounds in found.items()}
    report.table(
        f"BERT4Rec 2 × 64, 200 positions, batches of {ARCHITECTURE['batch_size']}, fp32, on {log.name}",
        ["step", "items/s", "faster by", "peak GB"],
        [
            [name, speed[name], speed[name] / speed["plain torch"], median(rounds, "peak_bytes") / 2**30]
            for name, rounds in found.items()
        ],
    )
    report.bar(
        "training items/s over a plain padded full-logit step", speed["graftrec"] / speed["plain torch"], at_least=5
    )

    learned = {
        name: run(Case(name, "tests.benchmarks.train_small:learn", {"plainly": plainly}), timeout=240)
        for name, plainly in (("graftrec", False), ("plain torch", True))
    }
    scores = {name: np.array(numbers["ndcg"]) for name, numbers in learned.items()}
    gain = scores["graftrec"] - scores["plain torch"]
    noise = 1.96 * gain.std(ddof=1) / np.sqrt(len(gain))
    report.table(
        f"Validation NDCG@10 after {EPOCHS} epochs on a generated log of {USERS} users and {ITEMS} items",
        ["step", "NDCG@10", "95 % interval of the gain, paired over users", "seconds"],
        [
            [
                name,
                scores[name].mean(),
                f"{gain.mean():+.3f} ± {noise:.3f}" if name == "graftrec" else "",
                learned[name]["seconds"],
            ]
            for name in scores
        ],
    )
    report.bar("NDCG@10 over the plain run's, upper end of the 95 % interval", float(gain.mean() + noise), at_least=0)


def plain_speed(*, train: str, seconds: float) -> Numbers:
    """Steps of the plain network on random users, for about `seconds`."""
    torch.set_num_threads(THREADS)
    table = pq.read_table(train)
    user, item = table["user"].to_numpy(), FIRST_INDEX + table["item"].to_numpy()
    lists = [one[-LENGTH:] for one in np.split(item, np.flatnonzero(np.diff(user)) + 1)]
    random = np.random.default_rng(0)
    plain = Plain(num_items=int(item.max()) + 1)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-3, weight_decay=0.01)
    items, begun, step = 0, 0.0, 0
    while step < 3 or time.perf_counter() - begun < seconds:
        if step == 1:  # the first isn't counted
            begun, items = time.perf_counter(), 0
        rows = random.choice(len(lists), ARCHITECTURE["batch_size"], replace=False)
        batch = padded([lists[row] for row in rows], step=step, width=LENGTH)
        plain_step(plain, optimizer, batch)
        items, step = items + batch.global_items, step + 1
    return {"items_per_second": items / (time.perf_counter() - begun)}


class Plain(nn.Module):
    """The network with torch's own modules: scores [B, T, V] of every position."""

    def __init__(self, *, num_items: int, width: int = 64, blocks: int = 2, heads: int = 2) -> None:
        super().__init__()
        self.item_embedding = nn.Embedding(num_items, width)
        self.position_embedding = nn.Embedding(LENGTH, width)
        self.input_norm = nn.LayerNorm(width)
        layer = nn.TransformerEncoderLayer(
            width, heads, 4 * width, dropout=0.1, activation="gelu", batch_first=True, norm_first=True
        )
        layer.self_attn.dropout = 0.0  # as ours, and so that the fused attention may be used
        self.encoder = nn.TransformerEncoder(layer, blocks, nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.LayerNorm(width))
        self.output_bias = nn.Parameter(torch.zeros(num_items))
        self.dropout = nn.Dropout(0.1)
        for parameter in self.parameters():  # as ours
            if parameter.ndim == 2:
                std = 0.02 if len(parameter) in (num_items, LENGTH) else parameter.shape[1] ** -0.5
                nn.init.trunc_normal_(parameter, std=std, a=-2 * std, b=2 * std)

    def forward(self, items_BT: Tensor, lengths_B: Tensor) -> Tensor:
        place_T = torch.arange(items_BT.shape[1], device=items_BT.device)
        x_BTD = self.item_embedding(items_BT) + self.position_embedding(place_T)
        x_BTD = self.dropout(self.input_norm(x_BTD))
        hidden_BTD = self.encoder(x_BTD, src_key_padding_mask=place_T >= lengths_B[:, None])
        return F.linear(self.head(hidden_BTD), self.item_embedding.weight, self.output_bias)


def plain_step(plain: Plain, optimizer: torch.optim.Optimizer, batch: Batch) -> None:
    corrupted_BT, lengths_B, chosen_BT = MaskedItem(MaskedItemConfig()).mask(batch, plain.item_embedding.num_embeddings)
    scores_BTV = plain(corrupted_BT, lengths_B)[:, :, FIRST_INDEX:]
    targets_BT = torch.where(chosen_BT, batch.items - FIRST_INDEX, -100)
    F.cross_entropy(scores_BTV.flatten(0, 1), targets_BT.flatten(), ignore_index=-100).backward()
    nn.utils.clip_grad_norm_(plain.parameters(), 5.0)
    optimizer.step()
    optimizer.zero_grad()


def padded(lists: Lists, *, step: int, width: int | None = None) -> Batch:
    """A batch of item lists, `width` wide (None: as wide as the longest)."""
    lengths = np.array([len(one) for one in lists])
    items = np.full((len(lists), width or lengths.max()), PAD)
    items[np.arange(items.shape[1]) < lengths[:, None]] = np.concatenate(lists)
    users = torch.full((len(lists),), UNK)
    return Batch(
        torch.from_numpy(items),
        torch.from_numpy(lengths),
        users,
        len(lists),
        slice(0, len(lists)),
        (0, 0, step),
        int(lengths.sum()),
    )


# --- what is learned ---------------------------------------------


def generated() -> Lists:
    """Histories in which the next item is of the last one's kind mostly, else of any; every kind has popular items."""
    random = np.random.default_rng(0)
    popularity = (np.arange(ITEMS // KINDS) + 1.0) ** -1.0
    lists = []
    for length in np.clip(random.lognormal(np.log(40), 0.6, USERS), 10, LENGTH).astype(np.int64):
        begins = random.random(length) < 0.1
        begins[0] = True
        kinds = random.integers(0, KINDS, length)[np.maximum.accumulate(np.where(begins, np.arange(length), 0))]
        within = random.choice(ITEMS // KINDS, length, p=popularity / popularity.sum())
        lists.append(FIRST_INDEX + kinds * (ITEMS // KINDS) + within)
    return lists


def learn(*, plainly: bool) -> Numbers:
    """Train on all items but each user's last, and rank that among all items: NDCG@10 of each user."""
    (torch.set_num_threads if plainly else use_threads)(THREADS)
    torch.manual_seed(0)
    lists = generated()
    histories = [one[:-1] for one in lists]
    task, begun = MaskedItem(MaskedItemConfig()), time.perf_counter()
    if plainly:
        plain = Plain(num_items=FIRST_INDEX + ITEMS)
        optimizer = torch.optim.AdamW(plain.parameters(), lr=RATE, weight_decay=0.01)
        for batch in _epochs(histories, width=LENGTH):
            plain_step(plain, optimizer, batch)
    else:
        config = Bert4RecConfig(max_length=LENGTH, positions="learned", user_width=0, knowledge={})
        training = training_of(config, task, num_items=FIRST_INDEX + ITEMS, autocast=False)
        for batch in _epochs(histories, width=None):
            train_step(training, batch, stop=False)
    seconds = time.perf_counter() - begun
    scores = []
    with torch.inference_mode():
        for start in range(0, USERS, BATCH):
            examples = padded(histories[start : start + BATCH], step=0, width=LENGTH - 1)
            if plainly:
                plain.eval()
                newest_BT = torch.arange(LENGTH) == examples.lengths[:, None]
                items_BT = torch.where(newest_BT, MASK, F.pad(examples.items, (0, 1), value=PAD))
                scores.append(plain(items_BT, examples.lengths + 1)[newest_BT])
            else:
                training.model.eval()
                scores.append(training.model.scores(task.query(training.model, examples)))
    scores_BV = torch.cat(scores)[:, FIRST_INDEX:]
    target_B1 = torch.tensor([one[-1] for one in lists])[:, None] - FIRST_INDEX
    rank_B = (scores_BV >= scores_BV.gather(1, target_B1)).sum(1)  # from 1
    return {"ndcg": torch.where(rank_B <= 10, 1 / torch.log2(rank_B + 1), 0.0).tolist(), "seconds": seconds}


def _epochs(lists: Lists, *, width: int | None) -> Iterator[Batch]:
    """The same batches for both, as the loader makes them."""
    for epoch in range(EPOCHS):
        order = shuffled(len(lists), seed=0, epoch=epoch, block=0)
        for step, rows in enumerate(np.split(order, range(BATCH, len(order), BATCH))):
            batch = padded([lists[row] for row in rows], step=step, width=width)
            yield replace(batch, draw=(0, epoch, step))


def training_of(
    config: Bert4RecConfig, task: MaskedItem, *, num_items: int, autocast: bool, device: str = "cpu"
) -> Training:
    """A run of ours without user and knowledge embeddings, on batches that are given to it one by one."""
    no_knowledge_VS = torch.empty(num_items, 0, dtype=torch.int32)
    model = build_model(config, ModelSizes(num_users=0, num_entities=0, knowledge_VS=no_knowledge_VS), seed=0)
    world = World(0, 1, torch.device(device), torch.float32, autocast=autocast)
    model.to(world.device)
    rates = TrainConfig(learning_rate=RATE, warmup_steps=0, batch_size=BATCH, epochs=EPOCHS)
    return Training(model, task, cast(Loader, Steps(1)), rates, world)


@dataclass(frozen=True)
class Steps:
    """What a step asks of a loader."""

    num_steps: int
