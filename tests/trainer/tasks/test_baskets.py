"""Next baskets: what is read and asked, pre-training on pairs, metrics and baselines by hand and by plain loops."""

import itertools
import json
import math
import shutil
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from etl import tables
from etl.settings import ConfigError, replaced
from etl.tables import CLS, FIRST_INDEX, MASK, PAD, SEP
from tests.fixtures.networks import NUM_ITEMS, descend, model_of
from tests.fixtures.processes import trained_by
from tests.fixtures.stores import enter_store
from tests.fixtures.trainings import TINY
from trainer.config import (
    BasketPairConfig,
    Bert4RecConfig,
    CaserConfig,
    EvaluateConfig,
    EvaluatedModel,
    EvaluationConfig,
    FinetuneConfig,
    NextBasketConfig,
    PeterRecConfig,
    PretrainConfig,
    PromoteConfig,
)
from trainer.data.baskets import BasketDataset
from trainer.data.batch import Batch
from trainer.data.catalogue import read_catalogue
from trainer.data.events import Events
from trainer.data.held_out import ReadOptions, read_held_out
from trainer.data.release import DataError, pin
from trainer.evaluation.baselines import next_basket
from trainer.evaluation.item_ranking import ranks
from trainer.evaluation.ranking_metrics import metrics_from_ranks
from trainer.evaluation.scorers import EvaluateError, model_scorer, read_evaluation_set
from trainer.inference.model_folder import digest_of, load_model
from trainer.inference.scorer import Scores
from trainer.recipes import promote
from trainer.recipes.evaluate import run as evaluate
from trainer.recipes.finetune import run as finetune
from trainer.recipes.pretrain import run as pretrain
from trainer.tasks import BasketPair, NextBasket
from trainer.tasks.baskets import HEAD, Spans, find_baskets, join_pairs

NETWORKS = {
    "bert4rec": Bert4RecConfig(width=16, blocks=1, heads=2, max_length=16, dropout=0.0, user_width=0, knowledge={}),
    "peterrec": PeterRecConfig(width=16, dilations=(1, 2), max_length=16, dropout=0.0),
}
SMALL = {"kind": "peterrec", "width": 16, "dilations": [1, 2], "max_length": 24}
TRAINED = {
    "batch_size": 16,
    "epochs": 4,
    "learning_rate": 0.01,
    "warmup_steps": 0,
    "min_epochs": 4,
    "checkpoint_seconds": 0,
}


def settings(kind, folder, lake, **more):
    given = {
        "data": {"lake": str(lake), "domain": "source"},
        "model": SMALL,
        "task": {"kind": "next_basket"},
        "train": TRAINED,
    }
    return kind.model_validate({**TINY, "output": str(folder / "runs"), **given, **more})


def batch_of(lists, *, draw=(0, 0, 0), rows=None):
    """Users' baskets, given as lists of lists of items counted from 0."""
    flat = [[place for basket in user for place in [*(FIRST_INDEX + i for i in basket), SEP]] for user in lists]
    width = max(map(len, flat))
    items = torch.tensor([user + [PAD] * (width - len(user)) for user in flat])
    lengths = torch.tensor([len(user) for user in flat])
    users = torch.arange(FIRST_INDEX, FIRST_INDEX + len(lists))
    return Batch(items, lengths, users, len(lists), rows or slice(0, len(lists)), draw)


def rows_of(items_PW):
    return [[i for i in row if i != PAD] for row in items_PW.tolist()]


# --- what is read ---------------------------------------------


def test_baskets_are_sequences_with_separators(tiny_lake):
    release = pin(tiny_lake, None)
    rows = pl.read_delta(f"{tiny_lake}/baskets").filter(pl.col("split") == "last-5").sort("user", "basket")
    for domain in ("source", "target"):
        dataset = BasketDataset(release, "last-5", domain)
        found = dataset.read_all(times=True)
        assert len(found) == dataset.num_rows == rows.filter(pl.col("domain") == domain)["user"].n_unique()
        for place, user in enumerate(found.users):
            own = rows.filter((pl.col("domain") == domain) & (pl.col("user") == user))
            items = found.items[found.offsets[place] : found.offsets[place + 1]].tolist()
            assert items == [i for basket in own["items"] for i in [*basket, SEP]]
            sizes = {
                part: sum(len(b) + 1 for b in own.filter(pl.col("part") == part)["items"]) for part in tables.PARTS
            }
            assert found.valid_start[place] == sizes["train"]
            assert found.test_start[place] == sizes["train"] + sizes["validation"]
            assert found.end[place] == len(items)


def test_a_table_that_lacks_them_is_named(tiny_lake):
    with pytest.raises(DataError, match=r"no baskets of split 'causal'.* it has last-5/all, .* name the log's basket"):
        BasketDataset(pin(tiny_lake, None), "causal", "source")


def test_the_next_basket_is_held_out(tiny_lake):
    release = pin(tiny_lake, None)
    catalogue = read_catalogue(release, "target")
    examples = read_held_out(release, "last-5", "target", catalogue, "test", ReadOptions(table="baskets"))
    rows = pl.read_delta(f"{tiny_lake}/baskets").filter((pl.col("split") == "last-5") & (pl.col("domain") == "target"))
    held = {row["user"]: row["items"] for row in rows.filter(pl.col("part") == "test").to_dicts()}
    assert examples.users.tolist() == sorted(held)
    for user, targets, history in zip(examples.users, examples.targets, range(len(examples)), strict=True):
        assert catalogue.global_index[targets[targets >= 0]].tolist() == held[user]
        read = examples.histories.items[examples.histories.offsets[history] : examples.histories.offsets[history + 1]]
        assert read[-1] == SEP
        assert len(read[read != SEP]) == sum(
            map(len, rows.filter((pl.col("user") == user) & (pl.col("part") != "test"))["items"])
        )
    with pytest.raises(ConfigError, match="ranked in full only"):
        read_held_out(release, "last-5", "target", catalogue, "test", ReadOptions(("full", "uniform-100"), "baskets"))


# --- what is asked ---------------------------------------------


def test_whole_baskets_are_found():
    items = torch.tensor([[7, 8, SEP, 9, SEP, 6], [SEP, 7, SEP, PAD, PAD, PAD], [7, 8, 9, 10, 11, 12]])
    found = find_baskets(items)
    assert found.count_B.tolist() == [2, 1, 0]
    assert list(zip(found.start_S.tolist(), found.stop_S.tolist(), strict=True)) == [(0, 2), (3, 4), (1, 2)]
    assert found.first_B.tolist() == [0, 2, 3]


@pytest.mark.parametrize(
    ("max_length", "expected"),
    [
        (20, [CLS, 6, 7, SEP, 8, SEP, 20, 21, 22, SEP]),
        (9, [CLS, 7, SEP, 8, SEP, 20, 21, 22, SEP]),  # the oldest goes first
        (7, [CLS, SEP, 8, SEP, 20, 21, 22]),  # of the second side at most a half stays
    ],
)
def test_two_sides_are_joined(max_length, expected):
    of_one = torch.tensor([[6, 7, SEP, 8, SEP, 9, SEP]])
    of_other = torch.tensor([[19, SEP, 20, 21, 22, SEP]])
    zero, last = torch.tensor([0]), torch.tensor([5])
    pairs = join_pairs(
        Spans(of_one, zero, zero, last),
        Spans(of_other, zero, torch.tensor([2]), torch.tensor([6])),
        max_length=max_length,
    )
    assert rows_of(pairs.items_PW) == [expected]
    assert pairs.lengths_P.tolist() == [len(expected)]
    assert pairs.items_PW[0, pairs.second_P[0]] == 20


@pytest.mark.parametrize("name", NETWORKS)
def test_a_user_is_asked_by_a_mask_behind_the_newest_baskets(name):
    model = model_of(NETWORKS[name], slots=0)
    batch = batch_of([[[0], [1, 2], [3]], [[4, 5]], [[7] * 20, [8]]])
    task = NextBasket(NextBasketConfig(context=2))
    found = task.query(model, batch)
    first = FIRST_INDEX
    read = [
        [CLS, first + 1, first + 2, SEP, first + 3, SEP, MASK, SEP],
        [CLS, first + 4, first + 5, SEP, MASK, SEP],
        [CLS, *[first + 7] * 10, SEP, first + 8, SEP, MASK, SEP],  # 16 places
    ]
    for row, items in enumerate(read):
        given = torch.tensor([items])
        wanted = given == MASK
        hidden = model(given, torch.tensor([len(items)]), batch.users[row, None], wanted, causal=False)
        torch.testing.assert_close(found[row], hidden[0])


def test_who_had_no_basket_is_asked_too():
    model = model_of(NETWORKS["bert4rec"], slots=0)
    batch = batch_of([[[1]], []])
    found = NextBasket(NextBasketConfig()).query(model, batch)
    given = torch.tensor([[CLS, MASK, SEP]])
    torch.testing.assert_close(
        found[1], model(given, torch.tensor([3]), batch.users[1:], given == MASK, causal=False)[0]
    )
    empty = Batch(torch.zeros(2, 0).long(), torch.zeros(2).long(), batch.users, 2, slice(0, 2), ())
    torch.testing.assert_close(NextBasket(NextBasketConfig()).query(model, empty), found[1].expand(2, -1))


@pytest.mark.parametrize("name", NETWORKS)
def test_the_loss_is_of_the_items_of_later_baskets(name):
    model = model_of(NETWORKS[name], slots=0)
    lists = [[[0], [1, 2]], [[3], [4], [5, 6, 7]], [[8, 9]]]
    task = NextBasket(NextBasketConfig(context=1, baskets=1))
    seen = Counter()
    for step in range(30):
        batch = batch_of(lists, draw=(0, 0, step))
        loss, count = task.loss(model, batch)
        of_first = told(model, batch, 0, lists[0][0], lists[0][1])
        options = {2 + len(lists[1][k]): of_first + told(model, batch, 1, lists[1][k - 1], lists[1][k]) for k in (1, 2)}
        assert loss.item() == pytest.approx(options[int(count)])
        seen[int(count)] += 1
    assert set(seen) == {3, 5}  # either basket is drawn


def told(model, batch, row, before, basket):
    """Negative log-likelihood of a basket's items, each told by the MASK in its place."""
    given = torch.tensor([[CLS, *(FIRST_INDEX + i for i in before), SEP, MASK, SEP]])
    hidden = model(given, torch.tensor([given.shape[1]]), batch.users[row, None], given == MASK, causal=False)
    scores = model.scores(hidden)[0, FIRST_INDEX:].log_softmax(0)
    return -sum(scores[i].item() for i in basket)


def test_users_with_one_basket_teach_nothing():
    model = model_of(NETWORKS["bert4rec"], slots=0).train()
    batch = batch_of([[[0, 1]], [[2]]])
    model.add_task_head(HEAD, 1)
    model.double()
    for task in (NextBasket(NextBasketConfig()), BasketPair(BasketPairConfig())):
        loss, count = task.loss(model, batch)
        assert (loss.item(), int(count)) == (0, 0)
        loss.backward()  # … but every parameter has a gradient, for other processes wait for it
        assert all(p.grad is not None for p in model.parameters())


# --- pairs ---------------------------------------------


LISTS = [[[0], [1, 2], [3]], [[10, 11], [12]], [[20], [21], [22], [23, 24]], [[29]]]


def test_pairs_are_of_the_user_or_of_another():
    task = BasketPair(BasketPairConfig(baskets=3, asked_probability=0.3))
    adjacent, total, examples, firsts = 0, 0, 0, Counter()
    for step in range(200):
        batch = batch_of(LISTS, draw=(1, 0, step))
        drawn = task.draw(batch, max_length=16)
        examples += len(drawn.asked_A)
        for items, owner, is_next in zip(
            rows_of(drawn.pairs.items_PW), drawn.pairs.owner_P.tolist(), drawn.adjacent_P.tolist(), strict=True
        ):
            assert items[0] == CLS
            assert items[-1] == SEP
            middle = items.index(SEP)
            first, second = ([i - FIRST_INDEX for i in side] for side in (items[1:middle], items[middle + 1 : -1]))
            assert first in LISTS[owner]
            others = [basket for user, baskets in enumerate(LISTS) if user != owner for basket in baskets]
            if is_next:
                assert second == LISTS[owner][LISTS[owner].index(first) + 1]
            else:
                assert second in others
                firsts[tuple(second)] += 1
            adjacent, total = adjacent + is_next, total + 1
    drawn_pairs = 200 * 3 * 3  # three users have two baskets
    assert examples / drawn_pairs == pytest.approx(0.5 * 0.3, abs=0.03)
    assert total == drawn_pairs - examples
    assert (adjacent + examples) / drawn_pairs == pytest.approx(0.5, abs=0.05)
    assert len(firsts) == sum(map(len, LISTS))  # anybody's any basket


def test_of_each_pair_some_items_are_masked():
    task, model = BasketPair(BasketPairConfig(mask_probability=0.3)), model_of(NETWORKS["bert4rec"], slots=0)
    chosen, kinds = 0, Counter()
    items = 0
    for step in range(100):
        batch = batch_of(LISTS, draw=(2, 0, step))
        drawn = task.draw(batch, max_length=16)
        corrupted_PW, chosen_PW = task.mask(batch, drawn.pairs, drawn.places_P, model)
        given_PW = drawn.pairs.items_PW
        assert (chosen_PW.sum(1) >= 1).all()
        assert (given_PW[chosen_PW] >= FIRST_INDEX).all()
        assert torch.equal(corrupted_PW[~chosen_PW], given_PW[~chosen_PW])
        chosen, items = chosen + int(chosen_PW.sum()), items + int((given_PW >= FIRST_INDEX).sum())
        for before, after in zip(given_PW[chosen_PW].tolist(), corrupted_PW[chosen_PW].tolist(), strict=True):
            kinds["mask" if after == MASK else "same" if after == before else "other"] += 1
    assert 0.3 < chosen / items < 0.6  # at least one of a few
    assert kinds["mask"] / chosen == pytest.approx(0.8, abs=0.05)
    assert kinds["other"] / chosen == pytest.approx(0.1, abs=0.05)


def test_a_rank_draws_what_one_process_would():
    """Two halves of a global batch hold the very pairs of the whole, masks and others' baskets too."""
    task, model = BasketPair(BasketPairConfig(asked_probability=0.4)), model_of(NETWORKS["bert4rec"], slots=0)
    model.add_task_head(HEAD, 1)
    model.double()
    whole = batch_of(LISTS, draw=(3, 0, 1))
    loss, count = task.loss(model, whole)
    halves = []
    for rows in (slice(0, 2), slice(2, 4)):
        half = Batch(
            whole.items[rows],
            whole.lengths[rows],
            whole.users[rows],
            len(LISTS),
            rows,
            whole.draw,
            everyone=whole.items,
        )
        halves.append(task.loss(model, half))
    assert sum(part[0].item() for part in halves) == pytest.approx(loss.item())
    assert sum(int(part[1]) for part in halves) == int(count)


def test_the_loss_of_pairs_is_masked_items_and_answers():
    model = model_of(NETWORKS["peterrec"], slots=0)
    model.add_task_head(HEAD, 1)
    model.double()
    batch = batch_of(LISTS, draw=(4, 0, 0))
    losses = {}
    for weight in (0.0, 1.0, 2.0):
        task = BasketPair(BasketPairConfig(asked_probability=0.0, weight=weight))
        losses[weight], count = task.loss(model, batch)
    drawn = task.draw(batch, max_length=16)
    corrupted_PW, chosen_PW = task.mask(batch, drawn.pairs, drawn.places_P, model)
    answers = masked = 0.0
    for row in range(len(corrupted_PW)):
        length = int(drawn.pairs.lengths_P[row])
        given, users = corrupted_PW[row, None, :length], batch.users[drawn.pairs.owner_P[row], None]
        every = torch.ones_like(given, dtype=torch.bool)
        hidden_TD = model(given, torch.tensor([length]), users, every, causal=False)
        score = model.task_heads[HEAD](hidden_TD[0]).item()
        answers += math.log1p(math.exp(-score if drawn.adjacent_P[row] else score))
        for place in chosen_PW[row].nonzero()[:, 0].tolist():
            of_item = model.scores(hidden_TD[place, None])[0, FIRST_INDEX:].log_softmax(0)
            masked -= of_item[drawn.pairs.items_PW[row, place] - FIRST_INDEX].item()
    assert int(count) == int(chosen_PW.sum())
    assert losses[0.0].item() == pytest.approx(masked)
    assert losses[1.0].item() == pytest.approx(masked + answers)
    assert losses[2.0].item() == pytest.approx(masked + 2 * answers)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("kind", ["next_basket", "basket_pair"])
def test_a_planted_pattern_is_found(kind, name):
    """A basket of kind k is followed by one of kind k + 1."""
    model = model_of(NETWORKS[name], slots=0).float().train()
    torch.manual_seed(0)
    model.add_task_head(HEAD, 1)
    pair = BasketPairConfig(asked_probability=0.5)
    task = NextBasket(NextBasketConfig(context=2)) if kind == "next_basket" else BasketPair(pair)
    random, optimizer = np.random.default_rng(0), torch.optim.Adam(model.parameters(), lr=0.01)

    def users(count):
        return [
            [(10 * ((start + turn) % 3) + random.permutation(10)[:2]).tolist() for turn in range(4)]
            for start in random.integers(0, 3, count)
        ]

    for step in range(150 if kind == "next_basket" else 400):
        descend(task, model, batch_of(users(24), draw=(0, 0, step)), optimizer)
    model.eval()
    lists = users(50)
    best_BK = model.scores(task.query(model, batch_of(lists)))[:, FIRST_INDEX:NUM_ITEMS].topk(5).indices
    expected = [(user[-1][0] // 10 + 1) % 3 for user in lists]
    assert (best_BK // 10 == torch.tensor(expected)[:, None]).float().mean() > 0.9
    if kind == "basket_pair":
        drawn = task.draw(batch_of(lists, draw=(9, 9, 9)), max_length=16)
        cls = torch.zeros_like(drawn.pairs.items_PW, dtype=torch.bool)
        cls[:, 0] = True
        scores = model.task_heads[HEAD](
            model(drawn.pairs.items_PW, drawn.pairs.lengths_P, drawn.pairs.owner_P, cls, causal=False)
        )[:, 0]
        of_next, of_others = scores[drawn.adjacent_P], scores[~drawn.adjacent_P]
        assert (of_next[:, None] > of_others).float().mean() > 0.7  # a third of others' baskets are of the right kind


# --- metrics and baselines ---------------------------------------------


def test_metrics_of_a_basket_by_hand():
    ranks = torch.tensor([[1, 4, 30, -1], [7, -1, -1, -1], [11, 12, 13, 14]])
    found = metrics_from_ranks(ranks, convention="basket", ks=(5, 10))
    assert found["Recall@5"].tolist() == [2 / 3, 0, 0]
    assert found["Recall@10"].tolist() == [2 / 3, 1, 0]
    assert found["HR@5"].tolist() == [1, 0, 0]
    precision, recall = 2 / 5, 2 / 3
    assert found["F1@5"][0] == pytest.approx(2 * precision * recall / (precision + recall))
    assert found["F1@10"].tolist() == pytest.approx([2 * 2 / 13, 2 / 11, 0])
    ideal = sum(1 / math.log2(rank + 1) for rank in (1, 2, 3))
    assert found["NDCG@5"][0] == pytest.approx((1 + 1 / math.log2(5)) / ideal)


def random_histories(seed, users=40, rows=20):
    random = np.random.default_rng(seed)
    lists = [
        [random.integers(FIRST_INDEX, rows, random.integers(1, 5)).tolist() for _ in range(random.integers(1, 6))]
        for _ in range(users)
    ]
    flat = [[i for basket in user for i in [*basket, SEP]] for user in lists]
    offsets = np.concatenate([[0], np.cumsum([len(user) for user in flat])])
    return lists, Events.of(np.arange(users), offsets, np.concatenate(flat), np.empty(0, np.int64))


@pytest.mark.parametrize("seed", range(3))
def test_baselines_equal_plain_loops(seed):
    lists, given = random_histories(seed)
    popular = Counter(i for user in lists for basket in user for i in basket)
    total = sum(popular.values())
    follows, before = defaultdict(Counter), Counter()
    for user in lists:
        for first, second in itertools.pairwise(user):
            for one, two in itertools.product(set(first), set(second)):
                follows[one][two] += 1
                before[one] += 1
    chain = next_basket.markov_chain(given, 20)
    by_user = next_basket.personal_frequency(given, next_basket.popularity(given, 20))
    scores = chain.score(given)
    for row, user in enumerate(lists):
        had = Counter(i for basket in user for i in basket)
        last = user[-1]
        for item in range(FIRST_INDEX, 20):
            tie = 1e-6 * popular[item] / total
            assert by_user[row, item].item() == pytest.approx(had[item] + tie)
            expected = sum(follows[i][item] / before[i] for i in last if before[i]) / len(last)
            assert scores[row, item].item() == pytest.approx(expected + tie)


# --- trained, transferred, evaluated ---------------------------------------------


@pytest.fixture(scope="module")
def trained(tiny_lake, tmp_path_factory):
    """Pre-trained on pairs of baskets of the source, fine-tuned on next baskets of the target; and from scratch."""
    folder = tmp_path_factory.mktemp("baskets")
    parent = pretrain(settings(PretrainConfig, folder, tiny_lake, name="pairs", task={"kind": "basket_pair"})).model
    target = {"data": {"lake": str(tiny_lake), "domain": "target"}}
    models = {
        "none": finetune(settings(FinetuneConfig, folder, tiny_lake, name="none", transfer="none", **target)).model
    }
    for transfer in ("deep", "patch"):
        more = {"name": transfer, "transfer": transfer, "parent": str(parent), **target}
        models[transfer] = finetune(settings(FinetuneConfig, folder, tiny_lake, **more)).model
    items = settings(
        FinetuneConfig, folder, tiny_lake, name="items", transfer="none", task={"kind": "next_item"}, **target
    )
    models["next items"] = finetune(items).model
    return folder, parent, models


def test_the_pairs_head_is_kept_and_not_transferred(trained):
    _, parent, models = trained
    assert HEAD in load_model(parent).model.task_heads
    assert not load_model(models["deep"]).model.task_heads
    again = load_model(parent)
    batch = batch_of([[[0, 1], [2]]])
    torch.testing.assert_close(again.task.query(again.model, batch), load_model(parent).task.query(again.model, batch))


def test_models_are_compared_by_the_next_basket(trained, tiny_lake, tmp_path):
    _, _, models = trained
    config = EvaluateConfig(
        name="asked",
        output=str(tmp_path),
        tracking={"enabled": False},
        runtime={"progress": False},
        models=tuple(EvaluatedModel(model=str(model), label=label) for label, model in models.items()),
    )
    with pytest.raises(EvaluateError, match="which differ in trained_on all baskets but the last two"):
        evaluate(config)
    report = evaluate(replaced(config, across=("trained_on",)))  # one reads single items, which are held out otherwise
    labels = {row["label"] for row in report.rows}
    assert labels == {*models, "popularity", "personal frequency", "Markov chain"}
    assert {row["metric"] for row in report.rows} == {f"basket/{name}@10" for name in ("NDCG", "Recall", "F1", "HR")}
    assert "what a user has had is a candidate too" in report.text
    users = pl.read_parquet(report.folder / "users.parquet")
    rows = pl.read_delta(f"{tiny_lake}/baskets").filter((pl.col("split") == "last-5") & (pl.col("domain") == "target"))
    held = rows.filter(pl.col("part") == "test").sort("user")
    read = rows.filter(pl.col("part") != "test")
    trained_on = rows.filter(pl.col("part") == "train")
    popular = Counter(trained_on.explode("items")["items"].to_list())
    catalogue = read_catalogue(pin(tiny_lake, None), "target")
    candidates = catalogue.global_index[FIRST_INDEX:].tolist()
    own = users.filter((pl.col("label") == "personal frequency") & (pl.col("convention") == "basket"))
    for row, recall in zip(held.to_dicts(), own["Recall@5"].to_list(), strict=True):
        had = Counter(read.filter(pl.col("user") == row["user"]).explode("items")["items"].to_list())
        scores, hits = {i: (had[i], popular[i]) for i in candidates}, 0
        for place, item in enumerate(row["items"]):  # ties count against it
            above = sum(scores[i] >= scores[item] for i in candidates if i not in row["items"])
            own_scores = [scores[i] for i in row["items"]]
            above += sum(score > scores[item] for score in own_scores) + own_scores[:place].count(scores[item])
            hits += above < 5
        assert recall == pytest.approx(hits / len(row["items"]))


def test_what_was_had_can_be_left_out(tiny_lake):
    """Of a log where nothing is taken twice: then no basket is told by what was in earlier ones."""
    release = pin(tiny_lake, None)
    catalogue = read_catalogue(release, "target")

    def by_frequency(given):
        return Scores.of(next_basket.personal_frequency(given, np.zeros(len(catalogue))))

    found = {}
    for repeats in (False, True):
        examples = read_held_out(
            release, "last-5", "target", catalogue, "test", ReadOptions(table="baskets", repeats=repeats)
        )
        found[repeats] = ranks(by_frequency, examples)["full"]
    had = np.array([len(set(examples.histories.take(np.array([row])).items) - {SEP}) for row in range(len(examples))])
    num_items = len(catalogue) - FIRST_INDEX
    assert (found[True][:, 0] > had).all()  # behind all that was had
    assert (found[False].max(1) == num_items - had).all()  # all others are tied: the last of them


def test_evaluate_and_promote_obey_the_models_own_repeats(trained, tmp_path, monkeypatch):
    """As the models were trained, without a setting; models that differ are refused, unless it is set for all."""
    _, _, models = trained

    def without_repeats(label):
        folder = Path(shutil.copytree(models[label], tmp_path / label))
        described = json.loads((folder / "config.json").read_text())
        described["config"]["evaluation"]["repeats"] = False
        (folder / "config.json").write_text(json.dumps(described))
        digests = json.loads((folder / "manifest.json").read_text())
        (folder / "manifest.json").write_text(json.dumps(digests | {"config.json": digest_of(folder / "config.json")}))
        return str(folder)

    def examples(*folders, **more):
        given = {"output": str(tmp_path / "runs"), "tracking": {"enabled": False}, "runtime": {"progress": False}}
        named = [{"model": str(folder), "label": f"m{place}"} for place, folder in enumerate(folders)]
        return evaluate(EvaluateConfig.model_validate(given | {"models": named} | more))

    other = without_repeats("deep")
    assert "what a user has had is a candidate too" in examples(models["deep"]).text
    assert "what a user has had" not in examples(other).text
    assert "what a user has had" in examples(other, evaluation={"repeats": True}).text
    with pytest.raises(EvaluateError, match=r"trained with the same, found true in .* set --evaluation.repeats"):
        examples(models["deep"], other)
    assert "what a user has had" not in examples(models["deep"], other, evaluation={"repeats": False}).text
    enter_store(tmp_path / "store", monkeypatch)
    gate = {"metric": "basket/NDCG@10", "min_seeds": 1, "min_users": 2, "must_beat": []}
    scratch = {"candidate": other, "from_scratch": [str(models["none"])], "gate": gate}
    with pytest.raises(EvaluateError, match="trained with the same"):
        promote.run(
            PromoteConfig.model_validate(scratch | {"tracking": {"enabled": False}, "runtime": {"progress": False}})
        )


def test_baskets_are_no_sequences(trained, tiny_lake, tmp_path):
    _, _, models = trained
    examples = read_evaluation_set(
        pin(tiny_lake, None), "last-5", "target", "test", ReadOptions(EvaluationConfig().protocols)
    )
    with pytest.raises(EvaluateError, match=r"reads the table sequences, found .* which reads baskets"):
        model_scorer(load_model(models["deep"]), examples)
    with pytest.raises(ValueError, match="expected a model of kind bert4rec, peterrec, found caser"):
        PretrainConfig(model=CaserConfig(), task=NextBasketConfig())
    with pytest.raises(ValueError, match="predicts the domain that it reads"):
        settings(PretrainConfig, tmp_path, tiny_lake, data={"lake": tiny_lake, "domain": "all", "predicted": "target"})


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["next_basket", "basket_pair"])
def test_two_processes_see_what_one_sees(kind, tiny_lake, tmp_path):
    found = {}
    for processes in (1, 2):
        config = settings(
            PretrainConfig,
            tmp_path,
            tiny_lake,
            name=f"by{processes}",
            model=SMALL | {"dropout": 0.0},
            train={**TRAINED, "epochs": 2},
            task={"kind": kind, "loss": {"kind": "sampled", "num_negatives": 20}},
            runtime={"progress": False, "threads": 1, "precision": "fp64"},
        )
        found[processes] = trained_by(processes, config, tmp_path)
    for name, one in found[1].model.state_dict().items():
        torch.testing.assert_close(found[2].model.state_dict()[name], one)
