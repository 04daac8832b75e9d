"""Models that read all domains and predict one: what the loss is taken on, what is ranked, which rows are kept."""

import numpy as np
import pytest
import torch

from etl.settings import ConfigError
from etl.tables import CLS, FIRST_INDEX, UNK
from tests.fixtures.networks import NUM_ITEMS, batch_of, model_of
from tests.fixtures.trainings import tiny
from trainer.config import (
    Bert4RecConfig,
    CaserConfig,
    FinetuneConfig,
    LossConfig,
    MaskedItemConfig,
    NextItemConfig,
    PretrainConfig,
    TargetDataConfig,
    TrainConfig,
)
from trainer.data.catalogue import read_catalogue, rows_by_raw_id
from trainer.data.held_out import ReadOptions, read_held_out
from trainer.data.release import DataError, pin
from trainer.evaluation.item_prediction import evaluate_scorers
from trainer.evaluation.ranking_metrics import means
from trainer.evaluation.scorers import label_of, model_scorer, read_evaluation_set
from trainer.inference.model_folder import load_model
from trainer.inference.recommender import Recommender, Request
from trainer.recipes.finetune import run as finetune
from trainer.recipes.pretrain import run as pretrain
from trainer.tasks import MaskedItem, NextItem

BERT = Bert4RecConfig(blocks=1, width=8, heads=2, max_length=12, dropout=0.0, user_width=4, knowledge_width=3)
CASER = CaserConfig(window=3, width=8, horizontal=2, vertical=2, max_length=12, dropout=0.0, user_width=4)
LOSSES = [LossConfig(), LossConfig(kind="sampled", num_negatives=7), LossConfig(kind="bce", num_negatives=7)]
EVEN = (torch.arange(NUM_ITEMS) >= FIRST_INDEX) & (torch.arange(NUM_ITEMS) % 2 == 0)


def tasks_of(loss):
    return [
        MaskedItem(MaskedItemConfig(loss=loss, mask_probability=0.5)),
        NextItem(NextItemConfig(loss=loss)),
        NextItem(NextItemConfig(loss=loss, targets=3)),
    ]


@pytest.mark.parametrize("config", [BERT, CASER])
@pytest.mark.parametrize("loss", LOSSES)
def test_items_that_are_not_predicted_are_no_answers_and_no_negatives(config, loss):
    for task in tasks_of(loss):
        model, batch = model_of(config), batch_of([9, 4, 12, 7])
        _, everywhere = task.loss(model, batch)
        model.restrict_targets(EVEN)
        total, positions = task.loss(model, batch)
        assert 0 < int(positions) < int(everywhere)
        (slopes_V,) = torch.autograd.grad(total, model.output_bias)
        assert (slopes_V[~EVEN] == 0).all()
        assert (slopes_V[EVEN] != 0).any()


def test_full_loss_is_the_likelihood_among_what_is_predicted():
    model, batch = model_of(BERT), batch_of([9, 4, 12, 7])
    task = NextItem(NextItemConfig())
    inputs_BT = torch.cat([torch.full((4, 1), CLS), batch.items[:, :-1]], 1)
    hidden_ND = model(inputs_BT, batch.lengths, batch.users, batch.mask_BT, causal=True)
    scores_NV, targets_N = model.scores(hidden_ND).detach(), batch.items[batch.mask_BT]
    expected = -sum(
        (scores[target] - scores[EVEN].logsumexp(0)).item()
        for scores, target in zip(scores_NV, targets_N.tolist(), strict=True)
        if EVEN[target]
    )
    model.restrict_targets(EVEN)
    total, positions = task.loss(model, batch)
    assert int(positions) == int(EVEN[targets_N].sum())
    assert total.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_batch_without_anything_predicted_costs_nothing(loss):
    model, batch = model_of(BERT), batch_of([3, 2])
    rows_V = torch.ones(NUM_ITEMS, dtype=torch.bool)
    rows_V[:FIRST_INDEX] = False
    rows_V[batch.items] = False
    model.restrict_targets(rows_V)
    for task in tasks_of(loss):
        total, positions = task.loss(model, batch)
        assert int(positions) == 0
        assert total.item() == 0


@pytest.fixture(scope="module")
def runs(tiny_lake, tmp_path_factory):
    """A parent on the source domain, and what is grafted on it to read both domains and predict the target's items."""
    folder = tmp_path_factory.mktemp("both")
    parent = pretrain(tiny(PretrainConfig, folder, tiny_lake, name="parent")).model
    grafted = {}
    for shared in (True, False):
        config = tiny(
            FinetuneConfig,
            folder,
            tiny_lake,
            name=f"both-{shared}",
            transfer="deep",
            parent=str(parent),
            shared_items=shared,
            data={"domain": "all", "predicted": "target", "split": "joint-5"},
            train={"epochs": 1, "min_epochs": 0, "learning_rate": 1e-30},
        )
        grafted[shared] = finetune(config)
    return load_model(parent), grafted


def test_shared_items_keep_their_rows(runs, tiny_lake):
    parent, grafted = runs
    shared, apart = (load_model(grafted[flag].model) for flag in (True, False))
    rows = rows_by_raw_id(parent.catalogue, shared.catalogue)
    known = torch.from_numpy((rows != UNK) & (np.arange(len(rows)) >= FIRST_INDEX))
    assert int(known.sum()) == len(read_catalogue(pin(tiny_lake, None), "source")) - FIRST_INDEX
    for name in ("item_embedding.weight", "output_bias"):
        ours, new, theirs = (one.model.state_dict()[name] for one in (shared, apart, parent))
        torch.testing.assert_close(ours[known], theirs[rows[known.numpy()]], rtol=0, atol=1e-25)
        if name != "output_bias":  # which starts at zero
            assert (new[known] != ours[known]).any()
        torch.testing.assert_close(ours[~known][FIRST_INDEX:], new[~known][FIRST_INDEX:], rtol=0, atol=1e-25)


def test_validation_is_what_evaluation_of_that_part_finds(runs, tiny_lake):
    """Which reads what the user did elsewhere before the first held-out item, and ranks the target's items alone."""
    _, grafted = runs
    release = pin(tiny_lake, None)
    examples = read_evaluation_set(release, "joint-5", "target", "validation", ReadOptions())
    scorer = model_scorer(load_model(grafted[True].model), examples, label="both")
    found = means(evaluate_scorers([scorer], examples).metrics(("both", 0), "full"))
    for metric in ("NDCG@10", "Recall@5", "MRR"):
        assert grafted[True].metrics[f"validation/{metric}"] == pytest.approx(found[metric])
    trained_model = load_model(grafted[True].model)
    target = np.isin(trained_model.catalogue.global_index, read_catalogue(release, "target").global_index[FIRST_INDEX:])
    held_out = read_held_out(release, "joint-5", "all", trained_model.catalogue, "validation", ReadOptions(times=True))
    given = held_out.histories
    owner = np.repeat(np.arange(len(given)), given.lengths)
    was_known = np.array(
        [
            target[item] or time < held_out.first_time[n]
            for n, item, time in zip(owner, given.items, given.times, strict=True)
        ]
    )
    assert not was_known.all()  # the split's training part holds later events of the other domain
    whole = trained_model.scorer().score(given.keep(was_known))
    assert torch.isinf(whole[:, ~target]).all()
    gains = []
    for n in range(len(held_out)):
        history = given.items[given.offsets[n] : given.offsets[n + 1]]
        order = [row for row in whole[n].argsort(descending=True).tolist() if target[row] and row not in history]
        wanted = [row for row in held_out.targets[n].tolist() if row >= 0]
        discounts = [1 / np.log2(2 + order.index(row)) for row in wanted if order.index(row) < 10]
        gains.append(sum(discounts) / sum(1 / np.log2(2 + place) for place in range(len(wanted))))
    assert grafted[True].metrics["validation/NDCG@10"] == pytest.approx(np.mean(gains))


def test_answers_are_of_the_predicted_domain_whatever_is_read(runs, tiny_lake):
    _, grafted = runs
    trained_model, release = load_model(grafted[True].model), pin(tiny_lake, None)
    read, answered = (list(read_catalogue(release, name).raw_ids[FIRST_INDEX:]) for name in ("source", "target"))
    served = Recommender(trained_model, "x/1")
    for items in (read[:4], answered[:3], [*read[:2], answered[0]], []):
        answer = served.answer([Request(items)], k=100)[0]
        assert set(answer.items) == set(answered) - set(items)
        assert not answer.unknown


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"domain": "source", "predicted": "target"}, "expected items of domain 'target' among those that are read"),
        ({"domain": "all", "predicted": "target"}, "to hold out items of domain 'target'"),
        ({"domain": "all", "ranked": "source", "split": "joint-5"}, "to hold out items of domain 'source'"),
        ({"domain": "all", "predicted": "books", "split": "joint-5"}, "no domain 'books'"),
    ],
)
def test_domains_that_do_not_fit_are_refused_in_one_line(data, said, tiny_lake, tmp_path):
    with pytest.raises((ConfigError, DataError), match=said) as error:
        pretrain(tiny(PretrainConfig, tmp_path, tiny_lake, data=data))
    assert "\n" not in str(error.value)


def test_a_joint_model_learns_from_all_and_is_judged_by_one_domain(tiny_lake, tmp_path):
    ranked = {"domain": "all", "ranked": "target", "split": "joint-5"}
    judged = pretrain(tiny(PretrainConfig, tmp_path, tiny_lake, name="judged", data=ranked))
    plain = pretrain(tiny(PretrainConfig, tmp_path, tiny_lake, name="plain", data=ranked | {"ranked": None}))
    ours, theirs = load_model(judged.model), load_model(plain.model)
    if judged.metrics["best_epoch"] == plain.metrics["best_epoch"]:
        assert torch.equal(ours.model.state_dict()["output_bias"], theirs.model.state_dict()["output_bias"])
    assert judged.metrics["validation/NDCG@10"] >= plain.metrics["validation/NDCG@10"]  # fewer items to rank among
    assert ours.model.predicted_V is None


def test_items_are_shared_with_a_parent_only():
    with pytest.raises(ValueError, match="takes nothing from a parent"):
        FinetuneConfig(transfer="none", shared_items=True, train=TrainConfig())


def test_a_model_of_all_domains_has_that_as_its_label():
    data = TargetDataConfig(domain="all", predicted="target")
    assert label_of(FinetuneConfig(transfer="none", data=data)) == "all-domains"
    assert label_of(FinetuneConfig(transfer="deep", data=data)) == "deep"
    assert label_of(FinetuneConfig(transfer="none")) == "none"
