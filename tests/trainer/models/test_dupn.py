"""DUPN beside a plain loop: an LSTM cell by cell, attention over what was; what it learns and what it refuses."""

import numpy as np
import pytest
import torch

from etl.tables import FIRST_INDEX, PAD, UNK
from tests.fixtures.networks import NUM_ITEMS, batch_of, descend, model_of
from tests.fixtures.trainings import TINY, equal_weights, weights_of
from trainer.config import (
    DupnConfig,
    FinetuneConfig,
    MaskedItemConfig,
    NextBasketConfig,
    NextItemConfig,
    PretrainConfig,
    TargetItemConfig,
)
from trainer.data.batch import Batch
from trainer.inference.model_folder import load_model
from trainer.models.dupn import MOST
from trainer.recipes.finetune import run as finetune
from trainer.recipes.pretrain import run as pretrain
from trainer.tasks import NextItem

SMALL = DupnConfig(
    width=8, max_length=16, user_width=5, knowledge={"director": 1, "actor": 3}, knowledge_width=3, dropout=0.0
)


def plain_hidden(model, items, user):
    """[T, D], gate by gate and position by position."""
    state, cell = torch.zeros(8).double(), torch.zeros(8).double()
    states, scores, hidden = [], [], []
    lstm = model.lstm
    for item in items:
        x = model.item_embedding.weight[item]
        x = x + model.knowledge_projection.weight @ model.entity_embedding.weight[model.knowledge_VS[item]].flatten()
        x = (x - x.mean()) / (x.var(unbiased=False) + 1e-5).sqrt()
        gates = lstm.weight_ih_l0 @ x + lstm.bias_ih_l0 + lstm.weight_hh_l0 @ state + lstm.bias_hh_l0
        into, forget, new, out = gates.chunk(4)
        cell = forget.sigmoid() * cell + into.sigmoid() * new.tanh()
        state = out.sigmoid() * cell.tanh()
        examples = model.attention_state.weight @ state + model.attention_state.bias
        examples = examples + model.attention_user.weight @ model.user_embedding.weight[user]
        scores.append(MOST * torch.tanh((model.attention.weight[0] @ examples.tanh()) / MOST))
        states.append(state)
        weights = torch.stack(scores).softmax(0)
        attended = (weights[:, None] * torch.stack(states)).sum(0)
        hidden.append(torch.tanh(model.merged.weight @ torch.cat([attended, state]) + model.merged.bias))
    return torch.stack(hidden)


def test_hidden_states_are_those_of_a_plain_loop():
    model, batch = model_of(SMALL), batch_of([7, 3, 12])
    found_ND = model(batch.items, batch.lengths, batch.users, batch.mask_BT, causal=True)
    expected = [
        plain_hidden(model, batch.items[row, :length].tolist(), int(batch.users[row]))
        for row, length in enumerate(batch.lengths.tolist())
    ]
    torch.testing.assert_close(found_ND, torch.cat(expected), atol=1e-6, rtol=1e-5)  # scores are fp32


def test_a_position_sees_nothing_behind_it():
    model, batch = model_of(SMALL), batch_of([9, 9])
    before = model(batch.items, batch.lengths, batch.users, batch.mask_BT, causal=True).view(2, 9, -1)
    batch.items[:, 5:] = FIRST_INDEX
    after = model(batch.items, batch.lengths, batch.users, batch.mask_BT, causal=True).view(2, 9, -1)
    assert torch.equal(before[:, :5], after[:, :5])
    assert not torch.allclose(before[:, 5:], after[:, 5:])
    padded = torch.cat([batch.items, torch.full((2, 4), PAD)], dim=1)
    wanted = torch.arange(13).expand(2, -1) < 9
    torch.testing.assert_close(model(padded, batch.lengths, batch.users, wanted, causal=True).view(2, 9, -1), after)


def test_users_ask_differently_and_strangers_alike():
    model, batch = model_of(SMALL), batch_of([6, 6])
    batch.items[1] = batch.items[0]
    torch.nn.init.normal_(model.user_embedding.weight)
    examples = NextItem(NextItemConfig()).query(model, batch)
    assert not torch.allclose(examples[0], examples[1])
    batch.users[:] = torch.tensor([UNK, 10_000])
    examples = NextItem(NextItemConfig()).query(model, batch)
    torch.testing.assert_close(examples[0], examples[1])


def test_it_learns_a_successor():
    """Items in a ring: each tells the next."""
    model = model_of(SMALL.model_copy(update={"width": 16})).float().train()
    random, optimizer = np.random.default_rng(0), torch.optim.Adam(model.parameters(), lr=0.02)
    task = NextItem(NextItemConfig())
    for step in range(200):
        items = FIRST_INDEX + (random.integers(0, 30, 32)[:, None] + np.arange(10)) % 30
        users, lengths = torch.zeros(32).long(), torch.full((32,), 10)
        batch = Batch(torch.from_numpy(items), lengths, users, 32, slice(0, 32), (0, 0, step))
        descend(task, model, batch, optimizer)
    best_B = model.eval().scores(task.query(model, batch))[:, FIRST_INDEX:NUM_ITEMS].argmax(1)
    assert (best_B == (batch.items[:, -1] - FIRST_INDEX + 1) % 30).float().mean() > 0.95


def settings(kind, folder, lake, **more):
    given = {
        "data": {"lake": str(lake), "domain": "source"},
        "task": {"kind": "next_item"},
        "model": {"kind": "dupn", "width": 8, "max_length": 24, "user_width": 4},
    }
    return kind.model_validate({**TINY, "output": str(folder / "runs"), **given, **more})


def test_it_is_trained_saved_and_transferred(tiny_lake, tmp_path):
    parent = pretrain(settings(PretrainConfig, tmp_path, tiny_lake, name="parent"))
    again = pretrain(settings(PretrainConfig, tmp_path / "again", tiny_lake, name="parent"))
    assert equal_weights(weights_of(parent.folder), weights_of(again.folder))
    more = {"data": {"lake": str(tiny_lake), "domain": "target"}, "transfer": "deep", "parent": str(parent.model)}
    frozen = {**TINY["train"], "learning_rate": 1e-12}
    child = finetune(settings(FinetuneConfig, tmp_path, tiny_lake, name="child", train=frozen, **more)).model
    before, after = (load_model(folder).model.state_dict() for folder in (parent.model, child))
    for name in ("lstm.weight_hh_l0", "attention.weight", "merged.weight", "user_embedding.weight"):
        torch.testing.assert_close(after[name], before[name])
    assert after["item_embedding.weight"].shape != before["item_embedding.weight"].shape


@pytest.mark.parametrize("task", [MaskedItemConfig(), NextBasketConfig(), TargetItemConfig(causal=False)])
def test_tasks_that_look_ahead_are_refused(task):
    with pytest.raises(ValueError, match=r"reads from left to right|expected a model of kind bert4rec, peterrec"):
        PretrainConfig(model=SMALL, task=task, data={"domain": "all", "predicted": "target"})
    with pytest.raises(ValueError, match="expected a model with blocks"):
        FinetuneConfig(model=SMALL, task=NextItemConfig(), transfer="patch")
