"""PeterRec: its network beside torch's own convolutions, what a position reads, and its way of telling target items."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from etl.tables import CLS, FIRST_INDEX, PAD
from tests.fixtures import networks
from tests.fixtures.networks import NUM_ITEMS, batch_of, descend
from trainer.config import LossConfig, MaskedItemConfig, NextItemConfig, PeterRecConfig, TargetItemConfig
from trainer.data.batch import Batch
from trainer.models import item_encoder
from trainer.models.item_encoder import Chunk
from trainer.tasks import MaskedItem, NextItem
from trainer.tasks.target_item import TargetItem
from trainer.tasks.user_vector import newest

SMALL = PeterRecConfig(width=16, dilations=(1, 2), max_length=14, dropout=0.0)


def model_of(config=SMALL, *, slots=0):
    return networks.model_of(config, slots=slots)


def hidden_of(model, items_BT, lengths_B, *, causal):
    """Hidden states of all real positions as [B, T, D], zero behind them."""
    real_BT = torch.arange(items_BT.shape[1]) < lengths_B[:, None]
    hidden_ND = model(items_BT, lengths_B, torch.zeros(len(items_BT)).long(), real_BT, causal=causal)
    hidden_BTD = hidden_ND.new_zeros(*items_BT.shape, hidden_ND.shape[1])
    hidden_BTD[real_BT] = hidden_ND
    return hidden_BTD


@pytest.mark.parametrize("causal", [False, True])
def test_network_is_torchs_own_convolutions(causal):
    """nn.Conv1d with the same weights: left padding where it is causal, "same" padding where not."""
    model, batch = model_of(), batch_of([9])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(len(name)))
    x_1TD = model.input_norm(model.item_embedding.weight[batch.items])
    for block in model.blocks:
        h_1TD = x_1TD
        for layer, norm, dilation in (
            (block.first, block.first_norm, block.dilation),
            (block.second, block.second_norm, 2 * block.dilation),
        ):
            kernel = layer.weight.view(16, 3, 16).transpose(1, 2)
            padded = F.pad(h_1TD.mT, (2 * dilation, 0) if causal else (dilation, dilation))
            h_1TD = norm(F.conv1d(padded, kernel, layer.bias, dilation=dilation).mT).relu()
        x_1TD = x_1TD + h_1TD
    torch.testing.assert_close(hidden_of(model, batch.items, batch.lengths, causal=causal), model.output_norm(x_1TD))


@pytest.mark.parametrize("positions", [8, 1_000])
@pytest.mark.parametrize("causal", [False, True])
def test_hidden_states_depend_on_no_padding_and_no_chunk(causal, positions, monkeypatch):
    model, batch = model_of(), batch_of([5, 12, 3, 8, 1])
    monkeypatch.setattr(item_encoder, "CHUNK_POSITIONS", positions)
    found_BTD = hidden_of(model, batch.items, batch.lengths, causal=causal)
    for row, length in enumerate(batch.lengths.tolist()):
        one = slice(row, row + 1)
        alone = hidden_of(model, batch.items[one, :length], batch.lengths[one], causal=causal)
        torch.testing.assert_close(alone[0], found_BTD[row, :length])


@pytest.mark.parametrize("causal", [False, True])
def test_a_position_reads_what_its_dilations_reach(causal):
    """Eight blocks of dilation 1, 4, …: 120 positions before it, and itself; to either side half as many."""
    config = SMALL.model_copy(update={"dilations": (1, 4) * 4, "max_length": 300})
    model, length, at = model_of(config), 260, 130
    x_1TD = torch.randn(1, length, 16, dtype=torch.float64, requires_grad=True)
    wanted_1T = torch.arange(length)[None] == at
    hidden = model._chunk(x_1TD, Chunk(torch.tensor([length]), wanted_1T, None, causal), None)
    (slope,) = torch.autograd.grad(hidden.square().sum(), x_1TD)
    reached = slope[0].abs().sum(1).nonzero()[:, 0]
    assert (int(reached.min()), int(reached.max())) == ((at - 120, at) if causal else (at - 60, at + 60))


@given(st.lists(st.lists(st.booleans(), min_size=7, max_size=7), max_size=5), st.integers(1, 9))
def test_the_newest_kept_items_in_order(kept, at_most):
    items_BT = torch.arange(FIRST_INDEX, FIRST_INDEX + 7 * len(kept)).view(len(kept), 7)
    kept_BT = torch.tensor(kept, dtype=torch.bool).view(len(kept), 7)
    found_BT, lengths_B = newest(items_BT, kept_BT, at_most=at_most)
    for row, flags in enumerate(kept_BT):
        expected = items_BT[row][flags].tolist()[-at_most:]
        assert found_BT[row, : lengths_B[row]].tolist() == expected
        assert found_BT[row, lengths_B[row] :].tolist() == [PAD] * (found_BT.shape[1] - len(expected))


def told_apart(model):
    """Predicts every other item; gives which."""
    predicted_V = torch.zeros(NUM_ITEMS, dtype=torch.bool)
    predicted_V[FIRST_INDEX::2] = True
    model.restrict_targets(predicted_V)
    return predicted_V


@pytest.mark.parametrize("causal", [False, True])
def test_the_user_vector_is_of_what_is_not_predicted(causal):
    model, batch = model_of(), batch_of([9, 4, 14, 1])
    predicted_V = told_apart(model)
    found_BD = TargetItem(TargetItemConfig(causal=causal)).query(model, batch)
    for row, length in enumerate(batch.lengths.tolist()):
        read = [item for item in batch.items[row, :length].tolist() if not predicted_V[item]]
        items = torch.tensor([[*([] if causal else [CLS]), *read, CLS]])
        hidden_TD = hidden_of(model, items, torch.tensor([items.shape[1]]), causal=causal)[0]
        torch.testing.assert_close(found_BD[row], hidden_TD[-1] if causal else hidden_TD[0] + hidden_TD[-1])


def test_the_newest_is_read_where_not_all_fits():
    config = SMALL.model_copy(update={"max_length": 5})
    model, batch = model_of(config), batch_of([12])
    predicted_V = told_apart(model)
    read = [item for item in batch.items[0].tolist() if not predicted_V[item]]
    assert len(read) > 4
    items = torch.tensor([[*read[-4:], CLS]])
    expected = hidden_of(model, items, torch.tensor([5]), causal=True)[0, -1]
    torch.testing.assert_close(TargetItem(TargetItemConfig()).query(model, batch)[0], expected)


@pytest.mark.parametrize("kind", ["full", "bce", "sampled"])
def test_the_loss_is_one_row_a_target(kind):
    """As if each target were told by a sequence of its own (the paper's rows)."""
    model, batch = model_of(), batch_of([9, 4, 14, 1])
    predicted_V = told_apart(model)
    task = TargetItem(TargetItemConfig(loss=LossConfig(kind=kind, num_negatives=5)))
    loss, count = task.loss(model, batch)
    examples = batch.items[batch.mask_BT]
    assert int(count) == int(predicted_V[examples].sum())
    if kind != "full":
        assert torch.isfinite(loss)
        return
    user_BD, classes = task.query(model, batch), predicted_V.nonzero()[:, 0].tolist()
    expected = 0.0
    for row, length in enumerate(batch.lengths.tolist()):
        scores = model.scores(user_BD[row, None])[0, classes]
        for item in batch.items[row, :length].tolist():
            if predicted_V[item]:
                expected -= scores.log_softmax(0)[classes.index(item)].item()
    assert loss.item() == pytest.approx(expected)


def test_a_user_who_did_nothing_else_has_a_vector_too():
    model, batch = model_of(), batch_of([3, 2])
    told_apart(model)
    batch.items[:, :3] = torch.where(batch.mask_BT, FIRST_INDEX, PAD)  # a predicted one
    found = TargetItem(TargetItemConfig()).query(model, batch)
    assert found.shape == (2, 16)
    torch.testing.assert_close(found[0], found[1])
    assert np.isfinite(found.detach().numpy()).all()


KINDS, OF_SOURCE, OF_TARGET = 4, 4, 3
FIRST_TARGET = FIRST_INDEX + KINDS * OF_SOURCE


def taste_batch(random, *, users=32, targets=4):
    """Users of one taste each: items of its kind in the source, and, among them, of its kind in the target."""
    taste = random.integers(0, KINDS, users)
    source = FIRST_INDEX + taste[:, None] * OF_SOURCE + random.integers(0, OF_SOURCE, (users, 6))
    target = (
        FIRST_INDEX + KINDS * OF_SOURCE + taste[:, None] * OF_TARGET + random.integers(0, OF_TARGET, (users, targets))
    )
    items = random.permuted(np.concatenate([source, target], axis=1), axis=1)
    lengths = torch.full((users,), items.shape[1])
    batch = Batch(torch.from_numpy(items), lengths, torch.zeros(users).long(), users, slice(0, users), (0, 0, 0))
    return taste, batch


@pytest.mark.parametrize("causal", [False, True])
def test_a_planted_pattern_is_found_and_holds_for_new_users(causal):
    """A taste in the source tells that in the target, also of users who did nothing there yet."""
    model = model_of().float().train()
    predicted_V = torch.zeros(NUM_ITEMS, dtype=torch.bool)
    predicted_V[FIRST_TARGET : FIRST_TARGET + KINDS * OF_TARGET] = True
    model.restrict_targets(predicted_V)
    task, random = TargetItem(TargetItemConfig(causal=causal)), np.random.default_rng(0)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(60):
        loss = descend(task, model, taste_batch(random)[1], optimizer)
    assert loss.item() == pytest.approx(np.log(OF_TARGET), abs=0.2)  # nothing but luck within a kind
    taste, cold = taste_batch(random, targets=0)
    scores_BV = model.eval().scores(task.query(model, cold)).masked_fill(~predicted_V, -torch.inf)
    best_BK = scores_BV.topk(OF_TARGET).indices - FIRST_TARGET
    assert (best_BK // OF_TARGET == torch.from_numpy(taste)[:, None]).all()


@pytest.mark.parametrize("task", [NextItem(NextItemConfig()), MaskedItem(MaskedItemConfig(mask_probability=0.3))])
def test_it_learns_a_successor(task):
    """Items in a ring: each tells the next."""
    model = model_of().float().train()
    random, optimizer = np.random.default_rng(0), torch.optim.Adam(model.parameters(), lr=0.01)
    for step in range(120):
        items = FIRST_INDEX + (random.integers(0, 30, 32)[:, None] + np.arange(10)) % 30
        lengths, users = torch.full((32,), 10), torch.zeros(32).long()
        batch = Batch(torch.from_numpy(items), lengths, users, 32, slice(0, 32), (0, 0, step))
        descend(task, model, batch, optimizer)
    best_B = model.eval().scores(task.query(model, batch))[:, FIRST_INDEX:].argmax(1)
    expected_B = (batch.items[:, -1] - FIRST_INDEX + 1) % 30
    assert (best_B == expected_B).float().mean() > 0.95
