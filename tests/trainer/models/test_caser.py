"""Caser: its filters against convolutions written out, which window a position has, that it learns and transfers."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from etl.settings import ConfigError
from etl.tables import CLS, FIRST_INDEX, MASK, PAD, UNK
from tests.fixtures import networks
from tests.fixtures.networks import NUM_ITEMS, batch_of, descend
from trainer.config import CaserConfig, FinetuneConfig, LossConfig, MaskedItemConfig, NextItemConfig, PretrainConfig
from trainer.data.batch import Batch
from trainer.data.events import Events
from trainer.inference.model_folder import load_model
from trainer.models import Caser, ModelSizes, RowTables, build_model, caser, group_of
from trainer.parallel.distributed import ALONE
from trainer.recipes import finetune, pretrain
from trainer.tasks import MaskedItem, NextItem
from trainer.tasks.loss import binary_loss

SMALL = CaserConfig(window=3, width=6, horizontal=4, vertical=2, max_length=12, user_width=5, knowledge_width=3)


def model_of(config=SMALL, **how):
    return networks.model_of(config, **how)


def convolved(model, items, user):
    """The paper's network (figure 2) for one window of items, PAD for none: filters as images, each by itself."""
    config = model.config
    rows = []
    for item in items:
        parts = [model.item_embedding.weight[item]]
        if model.knowledge_projection is not None:
            parts += [model.entity_embedding.weight[entity] for entity in model.knowledge_VS[item].tolist()]
        rows.append(torch.cat(parts) * (item != PAD))
    image = torch.stack(rows)[None, None]  # [1, 1, L, D]
    L, D = image.shape[2:]
    vertical = F.conv2d(image, model.vertical.weight.view(config.vertical, 1, L, 1), model.vertical.bias)
    found = [vertical[0, :, 0].T.reshape(-1)]  # coordinate after coordinate
    for height, filters in enumerate(model.horizontal, start=1):
        weight = filters.weight.view(config.horizontal, 1, height, D)
        found.append(F.conv2d(image, weight, filters.bias).relu().amax((2, 3))[0])
    hidden = model.merged(torch.cat(found)).relu()
    return torch.cat([hidden, model.user_embedding.weight[user]]) if config.user_width else hidden


@pytest.mark.parametrize("slots", [0, 4])
@pytest.mark.parametrize("positions", [4, 1_000])
@pytest.mark.parametrize("user_width", [0, 5])
def test_a_position_sees_the_window_that_ends_with_it(slots, positions, user_width, monkeypatch):
    monkeypatch.setattr(caser, "CHUNK_POSITIONS", positions)
    model, batch = model_of(SMALL.model_copy(update={"user_width": user_width}), slots=slots), batch_of([5, 1, 7, 2])
    wanted_BT = batch.mask_BT & (torch.arange(7) % 3 != 1)
    hidden_ND = model(batch.items, batch.lengths, batch.users, wanted_BT, causal=True)
    for hidden, (row, place) in zip(hidden_ND, wanted_BT.nonzero().tolist(), strict=True):
        window = [PAD, PAD, *batch.items[row].tolist()][place : place + 3]
        torch.testing.assert_close(hidden, convolved(model, window, int(batch.users[row])))


def test_masked_items_see_the_tile_that_holds_them_counted_from_the_end():
    model, batch = model_of(), batch_of([7, 4, 2])
    hidden_ND = model(batch.items, batch.lengths, batch.users, batch.mask_BT, causal=False)
    for hidden, (row, place) in zip(hidden_ND, batch.mask_BT.nonzero().tolist(), strict=True):
        length = int(batch.lengths[row])
        end = next(end for end in range(length, 0, -3) if end - 3 <= place < end)
        window = ([PAD] * 3 + batch.items[row, :length].tolist())[end : end + 3]
        torch.testing.assert_close(hidden, convolved(model, window, int(batch.users[row])))


def test_in_training_the_tiles_stand_everywhere():
    model = model_of(SMALL.model_copy(update={"dropout": 0.0})).train()
    batch = batch_of([7])
    torch.manual_seed(0)
    found = {
        tuple(model(batch.items, batch.lengths, batch.users, batch.mask_BT, causal=False)[3].tolist())
        for _ in range(20)
    }
    windows = [batch.items[0, begin : begin + 3].tolist() for begin in (1, 2, 3)]
    expected = {tuple(convolved(model, window, int(batch.users[0])).tolist()) for window in windows}
    assert {tuple(np.round(f, 9)) for f in found} == {tuple(np.round(e, 9)) for e in expected}


def test_in_training_the_last_item_alone_is_asked_as_at_evaluation():
    model = model_of(SMALL.model_copy(update={"dropout": 0.0})).train()
    batch, last_BT = batch_of([7]), torch.arange(7)[None] == 6
    for _ in range(10):
        hidden = model(batch.items, batch.lengths, batch.users, last_BT, causal=False)[0]
        torch.testing.assert_close(hidden, convolved(model, batch.items[0, 4:].tolist(), int(batch.users[0])))


@pytest.mark.parametrize("task", [NextItem(NextItemConfig()), MaskedItem(MaskedItemConfig())])
def test_the_query_reads_the_newest_items_and_an_empty_history_too(task):
    model = model_of()
    batch = batch_of([6, 2])
    batch = Batch(
        torch.cat([batch.items, torch.full((1, 6), PAD)]),
        torch.tensor([6, 2, 0]),
        torch.tensor([7, 8, UNK]),
        3,
        slice(0, 3),
        (),
    )
    query_BD = task.query(model, batch)
    begin = [CLS] if task.causal else [PAD]
    end = [] if task.causal else [MASK]
    for row, hidden in enumerate(query_BD):
        items = [PAD, PAD, *begin, *batch.items[row, : batch.lengths[row]].tolist(), *end]
        torch.testing.assert_close(hidden, convolved(model, items[-3:], int(batch.users[row])))


def test_the_next_items_are_targets_of_every_position():
    model, batch = model_of(), batch_of([4, 2])
    task = NextItem(NextItemConfig(targets=3, loss=LossConfig()))
    asking, targets = task._following(batch)
    first, second = batch.items[0].tolist(), batch.items[1].tolist()
    expected = [(i, first[i + k]) for i in range(4) for k in range(3) if i + k < 4]
    expected += [(4 + i, second[i + k]) for i in range(2) for k in range(3) if i + k < 2]
    assert sorted(zip(asking.tolist(), targets.tolist(), strict=True)) == sorted(expected)
    loss, count = task.loss(model, batch)
    assert int(count) == len(expected)
    inputs = torch.cat([torch.full((2, 1), CLS), batch.items[:, :-1]], dim=1)
    hidden = model(inputs, batch.lengths, batch.users, batch.mask_BT, causal=True)
    scores = model.scores(hidden)[:, FIRST_INDEX:].log_softmax(1)
    by_hand = -sum(scores[position, item - FIRST_INDEX] for position, item in expected)
    torch.testing.assert_close(loss, by_hand)


def test_binary_loss_is_of_the_target_and_of_negatives_that_are_not_the_target():
    model, hidden = model_of(), torch.randn(3, 11, dtype=torch.double)
    targets, negatives = torch.tensor([8, 9, 10]), torch.tensor([9, 20, 9, 30])
    chances = model.scores(hidden).sigmoid()
    expected = 0.0
    for row, target in enumerate(targets.tolist()):
        others = [chances[row, item] for item in negatives.tolist() if item != target]
        expected = expected - chances[row, target].log() - sum((1 - c).log() for c in others) / len(others)
    torch.testing.assert_close(binary_loss(model, hidden, targets, negatives), expected)


@pytest.mark.parametrize(
    "task",
    [
        NextItem(NextItemConfig(targets=1, loss=LossConfig(kind="bce", num_negatives=10))),
        NextItem(NextItemConfig(targets=2)),
        MaskedItem(MaskedItemConfig(last_only_probability=0.5)),
    ],
    ids=["next item, bce", "two targets", "masked item"],
)
def test_learns_a_planted_order(task):
    """Item n is followed by n + 1, round and round: after training the query says so."""
    torch.manual_seed(0)
    num_items = 12
    config = CaserConfig(window=3, width=16, horizontal=4, vertical=2, max_length=16, user_width=0, dropout=0.1)
    model = build_model(
        config, ModelSizes(num_users=9, num_entities=0, knowledge_VS=torch.zeros(FIRST_INDEX + num_items, 0)), seed=0
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    random = np.random.default_rng(0)

    def batch(step, length=8):
        items = (random.integers(0, num_items, 64)[:, None] + np.arange(length)) % num_items + FIRST_INDEX
        lengths, users = torch.full((64,), length), torch.full((64,), UNK)
        return Batch(torch.from_numpy(items), lengths, users, 64, slice(0, 64), (0, 0, step), 64 * length)

    for step in range(150):
        descend(task, model.train(), batch(step), optimizer)
    examples = batch(0)
    best = model.scores(task.query(model.eval(), examples))[:, FIRST_INDEX:].argmax(1)
    expected = (examples.items[:, -1] - FIRST_INDEX + 1) % num_items
    assert (best == expected).float().mean() > 0.8  # seen over 5 seeds, in fp32 and bf16: 0.89 to 1


def test_every_tensor_has_a_group_and_items_have_two_tables():
    groups = group_of(model_of(), SMALL)
    assert {name for name, group in groups.items() if group == "item"} == {
        "item_embedding.weight",
        "item_weights.weight",
        "output_bias",
    }
    assert set(groups.values()) == {"item", "user", "knowledge", "body"}


def test_tables_looked_up_by_row_have_the_rows_of_the_dense_gradient():
    knowledge = torch.from_numpy(np.random.default_rng(7).integers(UNK, 20, (NUM_ITEMS, 2)))
    task, losses = NextItem(NextItemConfig(targets=2, loss=LossConfig(kind="bce", num_negatives=9))), []
    rowwise, dense = (
        build_model(
            SMALL.model_copy(update={"dropout": 0.0}),
            ModelSizes(num_users=50, num_entities=20, knowledge_VS=knowledge),
            seed=0,
            tables=tables,
        ).double()
        for tables in (RowTables(ALONE), None)
    )
    for weight in (rowwise.item_embedding.weight, dense.item_embedding.weight):
        assert weight.std().item() == pytest.approx(1 / SMALL.width, rel=0.2)
    dense.load_state_dict(rowwise.state_dict())
    for model in (rowwise, dense):
        loss, _ = task.loss(model, batch_of([5, 3, 7]))
        loss.backward()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)
    tables, whole = rowwise.row_tables(), dict(dense.named_parameters())
    assert set(tables) == set(Caser.ROW_TABLES)
    for (name, table), (rows, gradient) in zip(
        tables.items(), rowwise.tables.gradients(list(tables.values())), strict=True
    ):
        spread = torch.zeros_like(table).index_add_(0, rows, gradient)
        torch.testing.assert_close(spread, whole[name].grad, rtol=1e-10, atol=1e-13, msg=name)


def settings(lake, folder, **more):
    return {
        "output": str(folder),
        "data": {"lake": lake},
        "train": {"epochs": 2, "min_epochs": 0, "batch_size": 32},
        "model": {"kind": "caser", "width": 8, "user_width": 4, "knowledge_width": 4, "max_length": 24},
        "task": {"kind": "next_item", "targets": 3, "loss": {"kind": "bce", "num_negatives": 20}},
        "tracking": {"enabled": False},
        "runtime": {"progress": False},
    } | more


def test_trains_transfers_and_scores_after_loading_as_before(tiny_lake, tmp_path):
    source = settings(tiny_lake, tmp_path, name="source")
    source["data"] = {"lake": tiny_lake, "domain": "source"}
    pretrained = pretrain.run(PretrainConfig.model_validate(source))
    parent = load_model(pretrained.model)
    for transfer, copied in (("shallow", {"user", "knowledge"}), ("deep", {"user", "knowledge", "body"})):
        more = settings(tiny_lake, tmp_path, name=transfer, transfer=transfer, parent=str(pretrained.model))
        more["train"] = more["train"] | {"epochs": 1, "learning_rate": 1e-12, "warmup_steps": 0, "weight_decay": 0.0}
        child = load_model(finetune.run(FinetuneConfig.model_validate(more)).model)
        before, groups = dict(parent.model.named_parameters()), group_of(child.model, child.config.model)
        for name, tensor in child.model.named_parameters():
            same = tensor.shape == before[name].shape and torch.allclose(tensor, before[name], atol=1e-8)
            assert same == (groups[name] in copied), name
    users, offsets = np.array([7, 9]), np.array([0, 4, 6])
    items = np.arange(FIRST_INDEX, FIRST_INDEX + 6)
    histories = Events.of(users, offsets, items, np.zeros(6, np.int64))
    both = [load_model(pretrained.model).scorer().score(histories) for _ in range(2)]
    assert torch.equal(*both)
    again = pretrain.run(PretrainConfig.model_validate(source))
    assert again.reused


def test_a_setting_of_the_other_model_is_refused_by_name(tiny_lake, tmp_path):
    with pytest.raises(ValueError, match="heads"):
        PretrainConfig.model_validate(settings(tiny_lake, tmp_path, model={"kind": "caser", "heads": 2}))
    with pytest.raises((ValueError, ConfigError), match="casper"):
        PretrainConfig.model_validate(settings(tiny_lake, tmp_path, model={"kind": "casper"}))
