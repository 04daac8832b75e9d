"""BERT4Rec and its tasks: what a position may see, which positions train, and that the query is what was trained."""

import math

import numpy as np
import pytest
import torch

from etl.tables import CLS, FIRST_INDEX, MASK, PAD, UNK
from tests.fixtures import networks
from tests.fixtures.networks import NUM_ITEMS, batch_of
from trainer.config import Bert4RecConfig, LossConfig, MaskedItemConfig, NextItemConfig
from trainer.data.batch import Batch
from trainer.models import bert4rec, group_of, groups_of, item_encoder
from trainer.models.cpu import rotary
from trainer.parallel.cores import use_threads
from trainer.tasks import MaskedItem, NextItem, softmax
from trainer.tasks.loss import sampled_softmax, summed_loss

SMALL = Bert4RecConfig(blocks=2, width=16, heads=2, max_length=12, dropout=0.0, user_width=4, knowledge_width=3)


def model_of(config=SMALL, **how):
    return networks.model_of(config, **how)


def hidden_of(model, items_BT, lengths_B, users_B, *, causal, table_VD=None):
    """Hidden states of all real positions as [B, T, D], zero behind them."""
    real_BT = torch.arange(items_BT.shape[1]) < lengths_B[:, None]
    hidden_ND = model(items_BT, lengths_B, users_B, real_BT, causal=causal, table_VD=table_VD)
    hidden_BTD = hidden_ND.new_zeros(*items_BT.shape, hidden_ND.shape[1])
    hidden_BTD[real_BT] = hidden_ND
    return hidden_BTD


@pytest.mark.parametrize("causal", [False, True])
def test_hidden_states_do_not_depend_on_padding(causal):
    model, batch = model_of(), batch_of([5, 3, 8])
    wide = torch.cat([batch.items, torch.full((3, 4), PAD)], dim=1)
    narrow_BTD = hidden_of(model, batch.items, batch.lengths, batch.users, causal=causal)
    wide_BTD = hidden_of(model, wide, batch.lengths, batch.users, causal=causal)
    for row, length in enumerate(batch.lengths.tolist()):
        torch.testing.assert_close(wide_BTD[row, :length], narrow_BTD[row, :length])
        one = slice(row, row + 1)
        alone = hidden_of(model, batch.items[one, :length], batch.lengths[one], batch.users[one], causal=causal)
        torch.testing.assert_close(alone[0], narrow_BTD[row, :length])


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("share", [0.15, 0.7])
@pytest.mark.parametrize("positions", [8, 30, 1_000])
def test_wanted_positions_are_those_of_all_whatever_the_chunks(causal, share, positions, monkeypatch):
    """And so are the gradients, of a loss over the wanted positions."""
    model, batch = model_of(), batch_of([5, 12, 3, 8, 12, 1, 7])
    wanted_BT = (torch.rand(batch.items.shape, generator=torch.Generator().manual_seed(1)) < share) & batch.mask_BT
    weights_ND = torch.randn(int(wanted_BT.sum()), 16, dtype=torch.float64)
    expected_ND = hidden_of(model, batch.items, batch.lengths, batch.users, causal=causal)[wanted_BT]
    slopes = torch.autograd.grad((expected_ND * weights_ND).sum(), list(model.blocks.parameters()))
    monkeypatch.setattr(item_encoder, "CHUNK_POSITIONS", positions)
    found_ND = model(batch.items, batch.lengths, batch.users, wanted_BT, causal=causal)
    torch.testing.assert_close(found_ND, expected_ND)
    found = torch.autograd.grad((found_ND * weights_ND).sum(), list(model.blocks.parameters()))
    torch.testing.assert_close(found, slopes)


@pytest.mark.parametrize("causal", [False, True])
def test_network_is_torchs_own_encoder(causal):
    """With learned positions and no side information: nn.TransformerEncoder with the same weights, padded."""
    config = SMALL.model_copy(update={"positions": "learned", "user_width": 0, "knowledge": {}})
    model, batch = model_of(config, slots=0), batch_of([5, 12, 3, 8])
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(len(name)))
    layer = torch.nn.TransformerEncoderLayer(16, 2, 64, 0.0, "gelu", batch_first=True, norm_first=True)
    encoder = torch.nn.TransformerEncoder(layer, 2, model.output_norm, enable_nested_tensor=False).double().eval()
    names = {
        "attention_norm": "norm1",
        "qkv": "self_attn.in_proj_",
        "attention_out": "self_attn.out_proj",
        "feed_norm": "norm2",
        "feed_in": "linear1",
        "feed_out": "linear2",
    }
    for ours, theirs in zip(model.blocks, encoder.layers, strict=True):
        told = {}
        for name, tensor in ours.state_dict().items():
            part, _, kind = name.partition(".")
            told[f"{names[part]}{'' if part == 'qkv' else '.'}{kind}"] = tensor
        told["self_attn.in_proj_bias"] = torch.zeros(48)
        theirs.load_state_dict(told)
    x_BTD = model.item_embedding(batch.items) + model.position_embedding.weight[:12]
    ahead_TT = torch.triu(torch.ones(12, 12, dtype=torch.bool), 1) if causal else None
    expected_BTD = encoder(model.input_norm(x_BTD), mask=ahead_TT, src_key_padding_mask=~batch.mask_BT)
    found_BTD = hidden_of(model, batch.items, batch.lengths, batch.users, causal=causal)
    torch.testing.assert_close(found_BTD[batch.mask_BT], expected_BTD[batch.mask_BT])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_dropout_drops_its_share_scales_the_rest_and_so_for_gradients(dtype):
    dropout, random = bert4rec.Dropout(0.1), torch.Generator().manual_seed(0)
    x = torch.full((1_001, 101), 2.0, dtype=dtype, requires_grad=True)
    y = dropout(x, random)
    y.sum().backward()
    kept = y != 0
    rate = 26 / 256  # the nearest that a byte can tell
    share = 1 - kept.float().mean().item()
    assert abs(share - rate) < 4 * math.sqrt(rate * (1 - rate) / x.numel())
    scale = torch.tensor(1 / (1 - rate), dtype=dtype)
    torch.testing.assert_close(y, kept * (2 * scale))
    torch.testing.assert_close(x.grad, kept * scale)
    assert torch.equal(dropout(x, None), x)
    assert not torch.equal(dropout(x, random) != 0, kept)


def test_training_step_is_the_same_bits_each_time_whichever_thread_is_first(monkeypatch):
    """Dropout and all, with many more chunks than threads; and one thread gives them too."""
    monkeypatch.setattr(item_encoder, "CHUNK_POSITIONS", 16)
    config = SMALL.model_copy(update={"dropout": 0.3})
    model, batch = model_of(config).float().train(), batch_of([12, 3, 8, 12, 1, 7] * 5)
    monkeypatch.setattr(softmax, "BLOCK_ROWS", 8)
    monkeypatch.setattr(softmax, "BLOCK_SCORES", 0)
    found = []
    for number in (3, 3, 2, 1):
        use_threads(number)
        torch.manual_seed(5)
        loss, _ = MaskedItem(MaskedItemConfig()).loss(model, batch)
        found.append([loss, *torch.autograd.grad(loss, [*model.blocks.parameters(), model.item_embedding.weight])])
    for again in found[1:]:
        assert all(torch.equal(*pair) for pair in zip(found[0], again, strict=True))


@pytest.mark.parametrize("per_row", [False, True])
def test_rotation_turns_gradients_back(per_row):
    config = SMALL.model_copy(update={"max_length": 5})
    rotation = bert4rec._rotation(config).double()
    if per_row:
        rotation = rotation[torch.tensor([[0, 4, 2, 2, 1], [3, 3, 0, 1, 2]])][:, None]
    x = torch.randn(2, 2, 5, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: rotary.rotated(x, rotation), (x,))


def test_causal_position_sees_nothing_after_it_and_bidirectional_does():
    model, batch = model_of(), batch_of([8])
    changed = batch.items.clone()
    changed[0, 5] = FIRST_INDEX + (changed[0, 5] - FIRST_INDEX + 1) % 30
    for causal in (True, False):
        before = hidden_of(model, batch.items, batch.lengths, batch.users, causal=causal)
        after = hidden_of(model, changed, batch.lengths, batch.users, causal=causal)
        moved = ((before - after).abs().amax(-1) > 1e-9)[0].tolist()
        assert moved == ([False] * 5 + [True] * 3 if causal else [True] * 8)


def test_unknown_users_share_one_vector_and_known_ones_have_their_own():
    model, batch = model_of(), batch_of([6, 6])
    items = batch.items[:1].expand(3, -1)
    lengths = torch.tensor([6, 6, 6])
    hidden = hidden_of(model, items, lengths, torch.tensor([UNK, 50, 10_000]), causal=False)
    torch.testing.assert_close(hidden[0], hidden[1])
    torch.testing.assert_close(hidden[0], hidden[2])
    known = hidden_of(model, items, lengths, torch.tensor([6, 7, 7]), causal=False)
    assert not torch.allclose(known[0], known[1])
    torch.testing.assert_close(known[1], known[2])


def test_items_are_scored_with_the_table_they_are_embedded_with():
    model, batch = model_of(), batch_of([4, 7])
    table_VD = model.item_vectors()
    torch.testing.assert_close(model.item_vectors(batch.items), table_VD[batch.items])
    hidden_BTD = hidden_of(model, batch.items, batch.lengths, batch.users, causal=False)
    with_table = hidden_of(model, batch.items, batch.lengths, batch.users, causal=False, table_VD=table_VD)
    torch.testing.assert_close(hidden_BTD, with_table)
    rows = torch.tensor([9, 5, 30])
    scores = model.scores(hidden_BTD[:, 0])
    torch.testing.assert_close(model.scores(hidden_BTD[:, 0], rows), scores[:, rows])
    by_hand = model.head(hidden_BTD[:, 0]) @ table_VD.T + model.output_bias
    torch.testing.assert_close(scores, by_hand)


def test_knowledge_enters_the_item_vectors_of_its_items_only():
    model = model_of()
    before = model.item_vectors().detach().clone()
    with torch.no_grad():
        model.entity_embedding.weight[11] += 1
    moved = ((model.item_vectors() - before).abs().amax(-1) > 1e-9).tolist()
    assert moved == (model.knowledge_VS == 11).any(1).tolist()
    without = model_of(SMALL.model_copy(update={"knowledge": {}}), slots=0)
    assert "entity_embedding.weight" not in dict(without.named_parameters())
    assert without.item_vectors().shape == (NUM_ITEMS, 16)


def test_every_parameter_belongs_to_one_group():
    for user_width, slots in ((4, 4), (0, 4), (4, 0)):
        config = SMALL.model_copy(update={"user_width": user_width})
        model = model_of(config, slots=slots)
        found = group_of(model, config)
        assert set(found) == set(dict(model.named_parameters()))
        assert set(found.values()) <= set(groups_of(config))
        assert ("user" in found.values(), "knowledge" in found.values()) == (user_width > 0, slots > 0)


def test_build_model_is_a_function_of_its_seed_and_leaves_random_state_alone():
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    first, again, other = model_of(seed=1), model_of(seed=1), model_of(seed=2)
    torch.testing.assert_close(torch.rand(2), expected)
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])
    assert not torch.equal(first.item_embedding.weight, other.item_embedding.weight)


# --- masked item ---------------------------------------------


def test_mask_shares_are_those_of_the_settings():
    config = MaskedItemConfig(mask_probability=0.3, last_only_probability=0.25)
    batch = batch_of([40] * 4_000)
    corrupted, lengths, chosen = MaskedItem(config).mask(batch, NUM_ITEMS)
    alone = (chosen.sum(1) == 1) & (corrupted[torch.arange(4_000), lengths - 1] == MASK)
    assert alone.float().mean().item() == pytest.approx(0.25, abs=0.03)
    ends = lengths[alone].double()
    assert (ends.mean().item(), ends.min().item(), ends.max().item()) == (pytest.approx(20.5, abs=1.5), 1, 40)
    rest = ~alone
    assert (lengths[rest] == 40).all()
    assert chosen[rest].float().mean().item() == pytest.approx(0.3, abs=0.01)
    picked, original = corrupted[rest][chosen[rest]], batch.items[rest][chosen[rest]]
    assert (picked == MASK).float().mean().item() == pytest.approx(0.8, abs=0.01)
    # a random item is the original one in 30th of the cases
    assert (picked == original).float().mean().item() == pytest.approx(0.1 + 0.1 / 30, abs=0.01)
    assert ((picked == MASK) | (picked >= FIRST_INDEX)).all()


def test_mask_leaves_what_is_not_chosen_and_hides_what_lies_behind_a_cut():
    batch = batch_of([1, 2, 3, 30] * 200, width=33)
    corrupted, lengths, chosen = MaskedItem(MaskedItemConfig(last_only_probability=0.5)).mask(batch, NUM_ITEMS)
    inside = torch.arange(33) < lengths[:, None]
    assert (lengths >= 1).all()
    assert (lengths <= batch.lengths).all()
    assert torch.equal(corrupted[inside & ~chosen], batch.items[inside & ~chosen])
    assert (corrupted[~inside] == PAD).all()
    assert not chosen[~inside].any()
    assert (chosen.sum(1) >= 1).all()


def test_mask_takes_at_least_one_real_position_of_each_sequence():
    batch = batch_of([1, 2, 3] * 200, width=9)
    task = MaskedItem(MaskedItemConfig(mask_probability=0.01, last_only_probability=0))
    _, lengths, chosen = task.mask(batch, NUM_ITEMS)
    assert (chosen.sum(1) >= 1).all()
    assert torch.equal(lengths, batch.lengths)
    assert not chosen[~batch.mask_BT].any()


def test_mask_of_a_rank_is_its_slice_of_the_global_one():
    whole = batch_of([9, 4, 6, 7, 5])
    task = MaskedItem(MaskedItemConfig(last_only_probability=0.5))
    expected = task.mask(whole, NUM_ITEMS)
    for rows in (slice(0, 2), slice(2, 5)):
        part = Batch(whole.items[rows], whole.lengths[rows], whole.users[rows], 5, rows, whole.draw)
        for found, of_whole in zip(task.mask(part, NUM_ITEMS), expected, strict=True):
            assert torch.equal(found, of_whole[rows])


@pytest.mark.parametrize("task", [MaskedItem(MaskedItemConfig()), NextItem(NextItemConfig())])
def test_loss_of_the_whole_is_the_sum_of_its_parts(task):
    model, whole = model_of(), batch_of([9, 4, 6, 7, 5])
    loss, positions = task.loss(model, whole)
    parts = [
        task.loss(model, Batch(whole.items[rows], whole.lengths[rows], whole.users[rows], 5, rows, whole.draw))
        for rows in (slice(0, 3), slice(3, 5), slice(5, 5))
    ]
    assert sum(int(part[1]) for part in parts) == int(positions)
    assert sum(part[0].item() for part in parts) == pytest.approx(loss.item(), rel=1e-12)


def test_masked_query_is_the_training_sample_with_the_last_item_masked():
    model, batch = model_of(), batch_of([6, 9, 9, 9, 9])
    task = MaskedItem(MaskedItemConfig(last_only_probability=1.0))
    corrupted, lengths, chosen = task.mask(batch, NUM_ITEMS)
    trained = hidden_of(model, corrupted, lengths, batch.users, causal=False)[chosen]
    examples = Batch(
        torch.where(corrupted == MASK, PAD, corrupted)[:, :-1], lengths - 1, batch.users, 5, slice(0, 5), ()
    )
    torch.testing.assert_close(task.query(model, examples), trained)


def test_next_item_query_is_the_trained_position():
    model, batch = model_of(), batch_of([7, 7])
    inputs = torch.cat([torch.full((2, 1), CLS), batch.items[:, :-1]], dim=1)
    trained = hidden_of(model, inputs, batch.lengths, batch.users, causal=True)[:, -1]
    shorter = Batch(batch.items[:, :-1], batch.lengths - 1, batch.users, 2, slice(0, 2), ())
    torch.testing.assert_close(NextItem(NextItemConfig()).query(model, shorter), trained)


@pytest.mark.parametrize("task", [MaskedItem(MaskedItemConfig()), NextItem(NextItemConfig())])
def test_query_of_an_empty_history_is_finite(task):
    empty = Batch(torch.zeros(2, 0, dtype=torch.long), torch.tensor([0, 0]), torch.tensor([UNK, 7]), 2, slice(0, 2), ())
    assert torch.isfinite(task.query(model_of(), empty)).all()


# --- loss ---------------------------------------------


def test_full_loss_is_the_negative_log_likelihood_over_real_items():
    model = model_of()
    hidden, targets = torch.randn(3, 16, dtype=torch.float64), torch.tensor([FIRST_INDEX, 20, NUM_ITEMS - 1])
    scores = model.scores(hidden).detach().numpy()
    expected = 0.0
    for row, target in enumerate(targets.tolist()):
        expected -= scores[row, target] - math.log(sum(math.exp(s) for s in scores[row, FIRST_INDEX:]))
    found = summed_loss(model, hidden, targets, LossConfig(), draw=(0,), table_VD=None)
    assert found.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
@pytest.mark.parametrize("block_rows", [1, 4, 100])
def test_full_loss_and_gradients_are_torchs_whatever_the_blocks(label_smoothing, block_rows, monkeypatch):
    monkeypatch.setattr(softmax, "BLOCK_ROWS", block_rows)
    monkeypatch.setattr(softmax, "BLOCK_SCORES", 0)
    generator = torch.Generator().manual_seed(0)
    given = [torch.randn(*shape, generator=generator).double() * 3 for shape in ((9, 6), (11, 6), (11,))]
    given = [tensor.requires_grad_() for tensor in given]
    query_ND, table_VD, bias_V = given
    targets_N = torch.randint(0, 11, (9,), generator=generator)
    expected = torch.nn.functional.cross_entropy(
        query_ND @ table_VD.T + bias_V, targets_N, reduction="sum", label_smoothing=label_smoothing
    )
    found = softmax.summed_cross_entropy(query_ND, table_VD, bias_V, targets_N, label_smoothing=label_smoothing)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found * 0.3, given), torch.autograd.grad(expected * 0.3, given))
    frozen = softmax.summed_cross_entropy(query_ND, table_VD.detach(), bias_V, targets_N)
    assert len(torch.autograd.grad(frozen, [query_ND, bias_V])) == 2


def test_full_loss_in_bf16_is_near_the_one_in_fp32():
    generator = torch.Generator().manual_seed(0)
    query_ND = torch.randn(50, 16, generator=generator, requires_grad=True)
    table_VD, targets_N = torch.randn(300, 16, generator=generator), torch.randint(0, 300, (50,), generator=generator)
    expected = softmax.summed_cross_entropy(query_ND, table_VD, torch.zeros(300), targets_N)
    with torch.autocast("cpu", torch.bfloat16):
        found = softmax.summed_cross_entropy(query_ND, table_VD, torch.zeros(300), targets_N)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(expected.item(), rel=3e-3)
    slopes = [torch.autograd.grad(loss, query_ND)[0] for loss in (found, expected)]
    assert torch.nn.functional.cosine_similarity(*slopes).min() > 0.999


def test_sampled_partition_function_is_unbiased():
    """Over many draws, exp(loss + own score) averages to the full partition function."""
    model = model_of()
    with torch.no_grad():
        model.item_embedding.weight *= 20
    hidden, target = (
        torch.randn(1, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1)),
        torch.tensor([11]),
    )
    scores = model.scores(hidden)[0, FIRST_INDEX:]
    full = torch.exp(scores).sum().item()
    random, num = np.random.default_rng(0), 8
    totals = []
    for _ in range(4_000):
        negatives = torch.from_numpy(random.integers(FIRST_INDEX, NUM_ITEMS, num))
        loss = sampled_softmax(model, hidden, target, negatives, math.log(num / 30))
        totals.append(math.exp(loss.item() + scores[11 - FIRST_INDEX].item()))
    error = np.std(totals) / math.sqrt(len(totals))
    assert abs(np.mean(totals) - full) < 4 * error
    assert error < 0.05 * full
