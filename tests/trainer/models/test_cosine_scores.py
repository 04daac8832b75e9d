"""Cosines over a temperature as scores: by hand, and the same in training, serving and transfer."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from etl.tables import CLS, FIRST_INDEX, UNK
from tests.fixtures.networks import NUM_ITEMS, batch_of, model_of
from tests.fixtures.patches import settings
from tests.fixtures.trainings import equal_weights, tiny
from trainer.config import Bert4RecConfig, FinetuneConfig, LossConfig, NextItemConfig, PeterRecConfig, PretrainConfig
from trainer.data.events import Events
from trainer.inference import delta_folder, scorer
from trainer.inference.model_folder import load_model
from trainer.inference.recommender import Recommender, Request
from trainer.models import ModelSizes, RowTables, build_model
from trainer.models.heads import unit
from trainer.parallel.distributed import ALONE
from trainer.recipes.finetune import run as finetune
from trainer.recipes.pretrain import run as pretrain
from trainer.tasks import NextItem
from trainer.training.transfer import TransferError

COMMON = {"width": 16, "max_length": 12, "dropout": 0.0, "user_width": 4, "knowledge_width": 3}
NETWORKS = {
    "bert4rec": Bert4RecConfig(blocks=2, heads=2, score="cosine", temperature=0.1, **COMMON),
    "peterrec": PeterRecConfig(dilations=(1, 2), score="cosine", temperature=0.1, **COMMON),
}
SMALL = {"kind": "bert4rec", "width": 16, "blocks": 1, "max_length": 24, "user_width": 0, "knowledge": {}}
COSINE = SMALL | {"score": "cosine"}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("slots", [0, 4])
def test_a_score_is_the_cosine_of_user_and_item_over_the_temperature(name, slots):
    model = model_of(NETWORKS[name], slots=slots)
    hidden = torch.randn(5, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    *layers, _ = model.head
    user = torch.nn.Sequential(*layers)(hidden)
    expected = torch.nn.functional.cosine_similarity(user[:, None], model.item_vectors()[None], dim=2) / 0.1
    scores = model.scores(hidden)
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-5)
    assert scores.abs().max() <= 10
    rows = torch.tensor([9, 5, 30])
    torch.testing.assert_close(model.scores(hidden, rows), scores[:, rows])
    table_VD = model.as_scored(model.item_vectors())
    assert torch.equal(model.scores(hidden, slice(None), table_VD, model.bias()), scores)


@pytest.mark.parametrize("name", NETWORKS)
def test_cosines_have_no_biases_and_items_are_read_as_they_are(name):
    """What is read has the lengths that training gives it; only what scores has none."""
    plain, cosine = model_of(as_dot(NETWORKS[name])), model_of(NETWORKS[name])
    own, others = (dict(model.named_parameters()) for model in (cosine, plain))
    assert others.keys() - own.keys() == {"output_bias"}
    assert all(torch.equal(tensor, others[key]) for key, tensor in own.items())  # drawn alike
    batch = batch_of([5, 9])
    given = (batch.items, batch.lengths, batch.users, batch.mask_BT)
    assert torch.equal(plain(*given, causal=True), cosine(*given, causal=True))
    assert not cosine.bias().any()
    assert cosine.bias().shape == (NUM_ITEMS,)
    with torch.no_grad():
        cosine.item_embedding.weight[batch.items[0, 0]] *= 3
    assert not torch.allclose(plain(*given, causal=True), cosine(*given, causal=True))


def as_dot(config):
    return config.model_copy(update={"score": "dot", "temperature": 0.05})


def test_longer_vectors_score_alike_and_unknown_ones_stay_finite():
    x = torch.tensor([[3.0, 4.0], [30.0, 40.0], [0.0, 0.0]], requires_grad=True)
    found = unit(x)
    torch.testing.assert_close(found, torch.tensor([[0.6, 0.8], [0.6, 0.8], [0.0, 0.0]]))
    found.sum().backward()
    assert torch.isfinite(x.grad).all()
    assert unit(x.detach().bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_full_softmax_of_cosines_and_its_slopes_are_torchs(label_smoothing):
    """In one table with plain autograd: normalised, multiplied, cross-entropy."""
    model = model_of(Bert4RecConfig(**SMALL | {"dropout": 0.0, "score": "cosine", "temperature": 0.2}), slots=0)
    batch = batch_of([7, 12, 3])
    loss, count = NextItem(NextItemConfig(loss=LossConfig(label_smoothing=label_smoothing))).loss(model, batch)
    found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    inputs = torch.nn.functional.pad(batch.items, (1, 0), value=CLS)[:, :-1]
    hidden = model(inputs, batch.lengths, batch.users, batch.mask_BT, causal=True)
    *layers, _ = model.head
    user = torch.nn.functional.normalize(torch.nn.Sequential(*layers)(hidden), dim=1, eps=0)
    items = torch.nn.functional.normalize(model.item_embedding.weight[FIRST_INDEX:], dim=1, eps=0)
    targets = batch.items[batch.mask_BT] - FIRST_INDEX
    expected = torch.nn.functional.cross_entropy(
        user @ items.T / 0.2, targets, reduction="sum", label_smoothing=label_smoothing
    )
    assert int(count) == 22
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    slopes = torch.autograd.grad(expected, list(model.parameters()), allow_unused=True)
    for ours, theirs in zip(found, slopes, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_rows_of_a_row_wise_table_score_and_learn_as_those_of_a_dense_one():
    config = NETWORKS["bert4rec"].model_copy(update={"user_width": 0})
    sizes = ModelSizes(num_users=0, num_entities=0, knowledge_VS=torch.empty(NUM_ITEMS, 0, dtype=torch.int32))
    dense = build_model(config, sizes, seed=0)
    tables = RowTables(ALONE)
    by_row = build_model(config, sizes, seed=0, tables=tables)
    by_row.load_state_dict(dense.state_dict())
    assert set(by_row.row_tables()) == {"item_embedding.weight"}
    batch = batch_of([7, 4])
    task = NextItem(NextItemConfig(loss=LossConfig(kind="sampled", num_negatives=9)))
    losses = [task.loss(model.train(), batch)[0] for model in (dense, by_row)]
    torch.testing.assert_close(*losses)
    for loss in losses:
        loss.backward()
    ((rows, gradient),) = tables.gradients([by_row.item_embedding.weight])
    torch.testing.assert_close(dense.item_embedding.weight.grad[rows], gradient)


# --- trained, served and transferred ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tiny_lake, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cosine")
    config = tiny(PretrainConfig, folder, tiny_lake, name="parent", task={"kind": "next_item"}, model=COSINE)
    return pretrain(config)


def histories(num_rows, users=40):
    random = np.random.default_rng(3)
    return Events(
        np.full(users, UNK),
        np.arange(0, 6 * users + 1, 6),
        {"items": random.integers(FIRST_INDEX, num_rows, 6 * users)},
    )


def test_what_is_served_is_what_training_scored(trained):
    """By the table of the scorer, made once; by rows; a block at a time; and as the loss has it."""
    model_and_more = load_model(trained.model)
    model, given = model_and_more.model, histories(len(model_and_more.catalogue))
    scores = model_and_more.scorer().score(given)
    hidden = model_and_more.scorer().hidden(given)
    with torch.inference_mode():
        by_hand = model.head(hidden) @ model.as_scored(model.item_vectors()).T
    torch.testing.assert_close(scores[:, FIRST_INDEX:], by_hand[:, FIRST_INDEX:], rtol=1e-6, atol=1e-6)
    assert scores[:, FIRST_INDEX:].abs().max() <= 20.001
    some = np.array([FIRST_INDEX + 3, FIRST_INDEX, len(model_and_more.catalogue) - 1])
    torch.testing.assert_close(model_and_more.scorer().score(given, some), scores[:, some], rtol=1e-6, atol=1e-6)
    items = [model_and_more.catalogue.raw_ids[row] for row in given.items[:6]]
    (answer,) = Recommender(model_and_more, "").answer([Request(items)], k=5)
    expected = scores[0].clone()
    expected[given.items[:6]] = -torch.inf
    assert answer.items == [model_and_more.catalogue.raw_ids[row] for row in expected.topk(5).indices.tolist()]
    np.testing.assert_allclose(answer.scores, expected.topk(5).values.numpy(), rtol=1e-6)


@pytest.mark.parametrize("by_row", [False, True])
def test_a_catalogue_of_many_blocks_is_scored_as_one(trained, by_row, monkeypatch):
    model_and_more = load_model(trained.model)
    given = histories(len(model_and_more.catalogue))
    whole = model_and_more.scorer().score(given)
    monkeypatch.setattr(scorer, "ROWS_PER_BLOCK", 7)
    if by_row:
        model_and_more.model.tables = RowTables(ALONE)
    blocks = model_and_more.scorer()
    torch.testing.assert_close(blocks.score(given), whole, rtol=1e-6, atol=1e-6)
    assert (blocks._scored_VD is None) == by_row  # no second table beside a row-wise one


def test_a_run_goes_on_where_it_was_stopped(trained, tiny_lake, tmp_path):
    class Enough(Exception):
        pass

    def stop(progress):
        if len(progress.history) == 2:
            raise Enough

    config = tiny(PretrainConfig, tmp_path, tiny_lake, name="parent", task={"kind": "next_item"}, model=COSINE)
    with pytest.raises(Enough):
        pretrain(config, judge=stop)
    resumed = pretrain(config)
    weights = [load_file(folder / "model" / "weights.safetensors") for folder in (trained.folder, resumed.folder)]
    assert equal_weights(*weights)
    assert "output_bias" not in weights[0]


@pytest.mark.parametrize("transfer", ["none", "shallow", "deep", "patch"])
def test_a_parent_of_cosines_gives_what_others_give(transfer, trained, tiny_lake, tmp_path):
    config = settings(
        tmp_path,
        tiny_lake,
        {"bert4rec": trained.model},
        "bert4rec",
        transfer=transfer,
        model=COSINE,
        shared_items=transfer != "none",
        task={"kind": "next_item"},
    )
    done = finetune(config)
    told = json.loads((done.folder / "transfer.json").read_text())["tensors"]
    items = next(line for line in told if line["tensor"] == "item_embedding.weight")
    assert items["origin"].startswith("new" if transfer == "none" else "copied")
    assert "output_bias" not in {line["tensor"] for line in told}
    if transfer == "patch":
        delta_folder.write_patch(done.model, trained.model, tmp_path / "small")
        given = histories(len(load_model(done.model).catalogue))
        small = delta_folder.load_patch(tmp_path / "small", load_model(trained.model))
        torch.testing.assert_close(small.scorer().score(given), load_model(done.model).scorer().score(given))


@pytest.mark.parametrize(
    ("transfer", "shared"), [("deep", False), ("patch", False), ("shallow", True)], ids=["deep", "patch", "items"]
)
def test_products_and_cosines_do_not_mix(transfer, shared, trained, tiny_lake, tmp_path):
    config = settings(
        tmp_path,
        tiny_lake,
        {"bert4rec": trained.model},
        "bert4rec",
        transfer=transfer,
        model=SMALL,
        shared_items=shared,
        task={"kind": "next_item"},
    )
    assert isinstance(config, FinetuneConfig)
    with pytest.raises(TransferError, match=r"expected model.score to be that of the parent .*, cosine, found dot"):
        finetune(config)
