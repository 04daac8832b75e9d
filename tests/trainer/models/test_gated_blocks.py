"""Gated blocks (LiGR, as in eSASRec): their formula, their patches and sizes, and that they train and transfer."""

import pytest
import torch

from etl.tables import FIRST_INDEX
from tests.fixtures.networks import NUM_ITEMS, batch_of, descend, model_of
from tests.fixtures.patches import settings
from tests.fixtures.trainings import tiny
from trainer.config import Bert4RecConfig, FinetuneConfig, MaskedItemConfig, NextItemConfig, PatchConfig, PretrainConfig
from trainer.inference.model_folder import load_model
from trainer.models import ModelSizes, build_model, group_of, item_encoder
from trainer.recipes.finetune import run as finetune
from trainer.recipes.pretrain import run as pretrain
from trainer.tasks import MaskedItem, NextItem
from trainer.training.transfer import TransferError

PLAIN = {"width": 16, "blocks": 2, "heads": 2, "max_length": 24, "user_width": 0, "knowledge": {}}
LIGR = PLAIN | {"block": "ligr"}
SMALL = Bert4RecConfig(**LIGR | {"dropout": 0.0, "positions": "learned"})


def hidden_by_formula(model, items_BT, mask_BT, *, causal):
    """x + sigmoid(W1 x) * MHA(LN x), then x + sigmoid(W2 x) * SwiGLU(LN x), one head after the other."""
    T = items_BT.shape[1]
    may_look = mask_BT[:, None, :].expand(-1, T, -1)
    if causal:
        may_look = may_look & torch.ones(T, T, dtype=torch.bool).tril()
    x = model.input_norm(model.item_embedding(items_BT) + model.position_embedding.weight[:T])
    for block in model.blocks:
        normed, heads = block.attention_norm(x), []
        query, key, value = (normed @ part.T for part in block.qkv.weight.chunk(3))
        for head in range(2):
            of = slice(8 * head, 8 * head + 8)
            scores = query[..., of] @ key[..., of].transpose(1, 2) / 8**0.5
            heads.append(scores.masked_fill(~may_look, -torch.inf).softmax(-1) @ value[..., of])
        attention = torch.cat(heads, -1) @ block.attention_out.weight.T + block.attention_out.bias
        x = x + torch.sigmoid(x @ block.first_gate.weight.T + block.first_gate.bias) * attention
        normed = block.feed_norm(x)
        left, right = (normed @ part.T for part in block.feed_in.weight.chunk(2))
        fed = (left * torch.sigmoid(left) * right) @ block.feed_out.weight.T
        x = x + torch.sigmoid(x @ block.second_gate.weight.T + block.second_gate.bias) * fed
    return model.output_norm(x)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("share", [0.2, 1.0])  # the last layer asks for few positions in its own way
def test_the_block_is_its_formula(share, causal, monkeypatch):
    monkeypatch.setattr(item_encoder, "CHUNK_POSITIONS", 30)
    model, batch = model_of(SMALL, slots=0), batch_of([5, 12, 3, 8])
    with torch.no_grad():  # biases begin at zero
        for name, tensor in model.named_parameters():
            if name.endswith("bias"):
                tensor.normal_(std=0.3)
    drawn_BT = torch.rand(batch.items.shape, generator=torch.Generator().manual_seed(0))
    wanted_BT = (drawn_BT < share) & batch.mask_BT
    found = model(batch.items, batch.lengths, batch.users, wanted_BT, causal=causal)
    expected = hidden_by_formula(model, batch.items, batch.mask_BT, causal=causal)[wanted_BT]
    torch.testing.assert_close(found, expected)
    weights = torch.randn_like(found)
    slopes = [torch.autograd.grad((one * weights).sum(), list(model.blocks.parameters())) for one in (found, expected)]
    torch.testing.assert_close(*slopes)


def test_a_closed_gate_lets_nothing_through_and_an_open_one_everything():
    model, batch = model_of(SMALL, slots=0), batch_of([5, 12])
    given = (batch.items, batch.lengths, batch.users, batch.mask_BT)
    with torch.no_grad():
        for block in model.blocks:
            for gate in (block.first_gate, block.second_gate):
                gate.weight.zero_()
                gate.bias.fill_(-1e4)
    x = model.input_norm(model.item_embedding(batch.items) + model.position_embedding.weight[:12])
    torch.testing.assert_close(model(*given, causal=True), model.output_norm(x)[batch.mask_BT])


def test_dropout_is_of_what_a_layer_gives_and_not_of_the_stream():
    """Where nearly all of both layers is dropped, the rest of the stream goes on as it was."""
    block = model_of(SMALL.model_copy(update={"dropout": 0.996}), slots=0).train().blocks[0]
    x = torch.randn(8, 12, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    out = block(x, None, None, causal=True, random=torch.Generator().manual_seed(0))
    assert 0.97 < (out == x).float().mean() < 1


def test_sizes_are_those_of_the_paper_on_a_real_and_a_meta_device():
    """12 D² of a SwiGLU of 4 D (three matrices), 4 D² of attention, 2 D² of the gates; no bias in the second layer."""
    sizes = ModelSizes(num_users=0, num_entities=0, knowledge_VS=torch.empty(NUM_ITEMS, 0, dtype=torch.int32))
    for device in ("cpu", "meta"):
        with torch.device(device):
            model = build_model(Bert4RecConfig(**LIGR | {"width": 64, "blocks": 1}), sizes, seed=0)
        found = sum(p.numel() for p in model.blocks.parameters())
        assert found == 18 * 64**2 + 64 + 2 * 64 + 2 * 2 * 64  # bias of attention, of two gates, two LayerNorms
        groups = group_of(model, model.config)
        assert {groups[name] for name in groups if name.startswith("blocks.")} == {"body"}


@pytest.mark.parametrize("patch", [PatchConfig(), PatchConfig(place="parallel", per_block=1), PatchConfig(kind="lora")])
@pytest.mark.parametrize("causal", [False, True])
def test_patches_begin_without_effect_and_each_has_one(patch, causal):
    sizes = ModelSizes(num_users=0, num_entities=0, knowledge_VS=torch.empty(NUM_ITEMS, 0, dtype=torch.int32))
    model, copy = (build_model(SMALL, sizes, seed=seed, patch=one).eval() for seed, one in ((0, None), (1, patch)))
    missing, unexpected = copy.load_state_dict(model.state_dict(), strict=False)
    assert not unexpected
    assert all(name.startswith("patches.") for name in missing)
    batch = batch_of([5, 12, 3, 8])
    given = (batch.items, batch.lengths, batch.users, batch.mask_BT)
    assert torch.equal(model(*given, causal=causal), copy(*given, causal=causal))
    ups = [module for module in copy.patches.modules() if hasattr(module, "up")]
    assert len(ups) == 2 * (6 if patch.kind == "lora" else patch.per_block)
    for module in ups:
        torch.nn.init.normal_(module.up.weight, std=0.1)
        assert not torch.allclose(model(*given, causal=causal), copy(*given, causal=causal))
        torch.nn.init.zeros_(module.up.weight)


@pytest.mark.parametrize("task", [NextItem(NextItemConfig()), MaskedItem(MaskedItemConfig())])
def test_steps_lower_the_loss(task):
    model = model_of(SMALL, slots=0).train()
    batch = batch_of([12, 9, 7, 12])
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = [descend(task, model, batch, optimizer).item() for _ in range(60)]
    assert losses[-1] < 0.7 * losses[0]


# --- trained, saved and transferred -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def parents(tiny_lake, tmp_path_factory):
    folder = tmp_path_factory.mktemp("gated")
    return {
        block: pretrain(
            tiny(
                PretrainConfig,
                folder,
                tiny_lake,
                name=block,
                task={"kind": "next_item"},
                model=PLAIN | {"block": block},
            )
        ).model
        for block in ("plain", "ligr")
    }


def child(folder, lake, parent, *, transfer, model=LIGR, **more):
    given = {"task": {"kind": "next_item"}, "shared_items": False, **more}
    config = settings(folder, lake, {"bert4rec": parent}, "bert4rec", transfer=transfer, model=model, **given)
    assert isinstance(config, FinetuneConfig)
    return config


@pytest.mark.parametrize("kind", ["adapter", "lora"])
def test_a_patched_gated_network_trains_nothing_but_its_patches(kind, parents, tiny_lake, tmp_path):
    done = finetune(child(tmp_path, tiny_lake, parents["ligr"], transfer="patch", patch={"kind": kind}))
    before, after = (load_model(folder).model.state_dict() for folder in (parents["ligr"], done.model))
    for name, tensor in before.items():
        if not name.startswith(("item_embedding.", "output_bias")):
            assert torch.equal(tensor, after[name]), name
    assert all(tensor.abs().max() > 0 for name, tensor in after.items() if "patches." in name and ".up." in name)


def test_deep_copies_the_gates(parents, tiny_lake, tmp_path):
    done = finetune(child(tmp_path, tiny_lake, parents["ligr"], transfer="deep", freeze=("body",)))
    before, after = (load_model(folder).model.state_dict() for folder in (parents["ligr"], done.model))
    gates = [name for name in before if "gate" in name]
    assert len(gates) == 2 * 2 * 2
    assert all(torch.equal(before[name], after[name]) for name in gates)
    assert len(after["item_embedding.weight"]) > FIRST_INDEX


@pytest.mark.parametrize(("parent", "block"), [("plain", "ligr"), ("ligr", "plain")])
@pytest.mark.parametrize("transfer", ["deep", "patch"])
def test_blocks_of_two_kinds_do_not_mix(parent, block, transfer, parents, tiny_lake, tmp_path):
    config = child(tmp_path, tiny_lake, parents[parent], transfer=transfer, model=PLAIN | {"block": block})
    with pytest.raises(TransferError, match=r"blocks"):
        finetune(config)
