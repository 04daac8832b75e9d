"""Model patches: no change at first, nothing else trained, and how many parameters they are."""

import itertools
import json

import pytest
import torch
from safetensors.torch import load_file

from etl.settings import GraftrecError
from etl.tables import FIRST_INDEX
from tests.fixtures.networks import NUM_ITEMS, batch_of
from tests.fixtures.patches import MODELS, settings
from tests.fixtures.trainings import equal_weights, tiny
from trainer.config import Bert4RecConfig, PatchConfig, PeterRecConfig, PretrainConfig
from trainer.inference.model_folder import load_model
from trainer.models import ModelSizes, build_model
from trainer.models.adapters import Adapter
from trainer.recipes.finetune import run as finetune
from trainer.recipes.pretrain import run as pretrain
from trainer.training.transfer import TransferError, TransferPlan, initialise_from

NETWORKS = {
    "bert4rec": Bert4RecConfig(blocks=2, width=16, heads=2, max_length=12, dropout=0.0, user_width=0, knowledge={}),
    "peterrec": PeterRecConfig(width=16, dilations=(1, 2), max_length=12, dropout=0.0),
}
PATCHES = {
    **{
        f"{place}, {number} a block": PatchConfig(place=place, per_block=number)  # type: ignore[arg-type]
        for place, number in itertools.product(("serial", "parallel"), (1, 2))
    },
    "lora": PatchConfig(kind="lora"),
}


def network(config, *, patch=None, seed=0):
    no_knowledge_VS = torch.empty(NUM_ITEMS, 0, dtype=torch.int32)
    model = build_model(
        config, ModelSizes(num_users=9, num_entities=0, knowledge_VS=no_knowledge_VS), seed=seed, patch=patch
    )
    return model.eval()


def patched_copy(model, config, patch):
    """With patches, and all else as `model` has it."""
    copy = network(config, patch=patch, seed=1)
    missing, unexpected = copy.load_state_dict(model.state_dict(), strict=False)
    assert not unexpected
    assert all(name.startswith("patches.") for name in missing)
    return copy


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("share", [0.2, 1.0])  # the last layer asks for few positions in its own way
@pytest.mark.parametrize("patch", PATCHES)
@pytest.mark.parametrize("name", NETWORKS)
def test_a_patched_network_begins_bit_for_bit_as_it_was(name, patch, share, causal):
    model, batch = network(NETWORKS[name]), batch_of([5, 12, 3, 8])
    copy = patched_copy(model, NETWORKS[name], PATCHES[patch])
    drawn_BT = torch.rand(batch.items.shape, generator=torch.Generator().manual_seed(0))
    wanted_BT = (drawn_BT < share) & batch.mask_BT
    given = (batch.items, batch.lengths, batch.users, wanted_BT)
    assert torch.equal(model(*given, causal=causal), copy(*given, causal=causal))
    # … and every patch is there: each changes what comes out, once it is no longer zero
    for module in copy.patches.modules():
        if hasattr(module, "up"):
            torch.nn.init.normal_(module.up.weight, std=0.1)
            assert not torch.allclose(model(*given, causal=causal), copy(*given, causal=causal))
            torch.nn.init.zeros_(module.up.weight)


@pytest.mark.parametrize("place", ["serial", "parallel"])
def test_the_papers_patch_is_its_formula(place):
    """`x + up(gelu(down(x)))` in the place of x: behind a layer of its output, beside it of its input, and added."""
    patch = Adapter(PatchConfig(place=place, variant="paper", bottleneck=4), 16)
    x, out = torch.randn(2, 3, 16), torch.randn(2, 3, 16)

    def block(x):
        inner = torch.nn.functional.gelu(x @ patch.down.weight.T + patch.down.bias, approximate="tanh")
        return x + inner @ patch.up.weight.T + patch.up.bias

    assert patch.up.weight.abs().max() > 0
    torch.testing.assert_close(patch(x, out), block(out) if place == "serial" else out + block(x))


@pytest.mark.parametrize(("divisor", "share"), [(4, 0.171), (8, 0.088), (16, 0.046)])
def test_two_patches_a_block_add_what_they_should(divisor, share):
    """Of a block of two convolutions and two norms of width 64 (the released code's sizes)."""
    config = PeterRecConfig(width=64, dilations=(1,))
    model = network(config, patch=PatchConfig(bottleneck=64 // divisor))
    added = sum(p.numel() for name, p in model.named_parameters() if name.startswith("patches."))
    block = sum(p.numel() for name, p in model.named_parameters() if name.startswith("blocks."))
    assert added / block == pytest.approx(share, abs=5e-4)
    account = initialise_from(model, config, None, TransferPlan("none"))
    counts = account.counts()
    assert counts["added"] == added
    assert counts["total"] == sum(p.numel() for p in model.parameters())
    items = sum(p.numel() for name, p in model.named_parameters() if name in ("item_embedding.weight", "output_bias"))
    assert counts["backbone"] == counts["total"] - added - items


def test_the_default_adds_less_than_a_tenth():
    for config in (PeterRecConfig(), Bert4RecConfig(user_width=0, knowledge={})):
        counts = initialise_from(network(config, patch=PatchConfig()), config, None, TransferPlan("none")).counts()
        assert 0 < counts["added"] < 0.1 * counts["backbone"]


# --- trained ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def parents(tiny_lake, tmp_path_factory):
    """A model of each kind, pre-trained on the source domain by next items."""
    folder = tmp_path_factory.mktemp("parents")
    return {
        name: pretrain(
            tiny(PretrainConfig, folder, tiny_lake, name=name, task={"kind": "next_item"}).model_copy(
                update={"model": type(NETWORKS[name]).model_validate(model)}
            )
        ).model
        for name, model in MODELS.items()
    }


@pytest.mark.parametrize("kind", ["serial", "lora", "serial and norms"])
@pytest.mark.parametrize("name", MODELS)
def test_nothing_but_patches_and_the_targets_items_is_trained(name, kind, parents, tiny_lake, tmp_path):
    patch = {"kind": "lora" if kind == "lora" else "adapter", "layer_norm": "norms" in kind}
    config = settings(tmp_path, tiny_lake, parents, name, patch=patch)
    folder = finetune(config).folder
    before, after = (load_file(model / "weights.safetensors") for model in (parents[name], folder / "model"))
    users = [model / "users.safetensors" for model in (parents[name], folder / "model")]
    if users[0].exists():
        assert users[0].read_bytes() == users[1].read_bytes()
    items = {"item_embedding.weight", "output_bias"}
    for tensor in before.keys() - items:
        is_norm = "norm" in tensor and not tensor.startswith("head.")
        assert torch.equal(before[tensor], after[tensor]) != (is_norm and "norms" in kind), tensor
    patches = {tensor for tensor in after if tensor.startswith("patches.")}
    assert after.keys() == before.keys() | patches
    assert all(after[tensor].abs().max() > 0 for tensor in patches if "up" in tensor)
    # the source's items are the parent's, byte for byte; the target's are trained
    old, new = load_model(parents[name]).catalogue, load_model(folder / "model").catalogue
    place = {item: row for row, item in enumerate(old.raw_ids) if row >= FIRST_INDEX}
    shared = [(place[item], row) for row, item in enumerate(new.raw_ids) if item in place]
    assert len(shared) == len(place)
    others = sorted(set(range(FIRST_INDEX, len(new))) - {row for _, row in shared})
    fresh = network_like(config, len(new))
    for tensor in items:
        left, right = zip(*shared, strict=True)
        assert torch.equal(before[tensor][list(left)], after[tensor][list(right)])
        assert (fresh[tensor][others] != after[tensor][others]).any(-1).all()
    told = json.loads((folder / "transfer.json").read_text())
    assert 0 < told["parameters"]["added"] < told["parameters"]["trained"] < told["parameters"]["total"]


def network_like(config, num_items):
    """The weights that a run of these settings begins with, as far as they are new."""
    knowledge_VS = torch.empty(num_items, sum(config.model.knowledge.values()), dtype=torch.int32)
    model = build_model(
        config.model,
        ModelSizes(num_users=9, num_entities=9, knowledge_VS=knowledge_VS),
        seed=config.train.seed,
        patch=config.patch,
    )
    return model.state_dict()


def test_a_patched_run_goes_on_where_it_was_stopped(parents, tiny_lake, tmp_path):
    """Frozen rows too: what freezes them is no part of a checkpoint."""
    whole = finetune(settings(tmp_path / "whole", tiny_lake, parents, "peterrec"))

    class Enough(Exception):
        pass

    def judge(progress):
        if len(progress.history) == 2:
            raise Enough

    config = settings(tmp_path / "stopped", tiny_lake, parents, "peterrec")
    with pytest.raises(Enough):
        finetune(config, judge=judge)
    resumed = finetune(config)
    assert equal_weights(
        *(load_file(folder / "model" / "weights.safetensors") for folder in (whole.folder, resumed.folder))
    )


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"model": {"kind": "caser"}}, "transfer patch: expected a model with blocks .*found caser"),
        ({"patch": {"bottleneck": 16}}, "patch.bottleneck: expected less than the model's width, 16, found 16"),
        ({"patch": {"kind": "lora", "rank": 99}}, "patch.rank: expected less than .*, 16, found 99"),
        (
            {"train": {"table_optimizer": "rowwise"}, "task": {"kind": "target_item", "loss": {"kind": "sampled"}}},
            "table_optimizer=adamw",
        ),
        ({"data": {"domain": "source"}}, "task target_item .*set data.domain=all"),
        ({"parent": None}, "needs a pre-trained model"),
    ],
)
def test_patches_that_do_not_fit_are_refused_before_anything_runs(more, told, parents, tiny_lake, tmp_path):
    with pytest.raises((GraftrecError, ValueError), match=told):
        finetune(settings(tmp_path, tiny_lake, parents, "peterrec", **more))
    assert not (tmp_path / "runs").exists() or not list((tmp_path / "runs").glob("*/checkpoints"))


def test_a_patch_for_another_backbone_is_refused_by_name(parents, tiny_lake, tmp_path):
    config = settings(tmp_path, tiny_lake, parents, "peterrec", parent=str(parents["bert4rec"]))
    with pytest.raises(TransferError, match=r"the parent .*bert4rec"):
        finetune(config)
