"""Transfer between models with and without times: what a parent has is copied, what it lacks begins as no change."""

import pytest
import torch

from etl.settings import replaced
from tests.fixtures.trainings import tiny
from trainer.config import FinetuneConfig, PretrainConfig
from trainer.inference.model_folder import load_model
from trainer.recipes import finetune, pretrain

PLAIN = {"user_width": 0, "knowledge": {}, "dropout": 0.0}
TIMED = PLAIN | {"time": {"bias": True, "intervals": True}}
TASK = {"kind": "next_item"}


@pytest.fixture(scope="module")
def parents(tiny_lake, tmp_path_factory):
    root = tmp_path_factory.mktemp("parents")
    return {
        name: pretrain.run(tiny(PretrainConfig, root, tiny_lake, name=name, model=model, task=TASK)).model
        for name, model in (("plain", PLAIN), ("timed", TIMED))
    }


def grafted(folder, lake, parent, model, transfer):
    """A fine-tuned model after one epoch at a rate that changes next to nothing."""
    train = {"epochs": 1, "min_epochs": 1, "learning_rate": 1e-12, "weight_decay": 0}
    more = {"name": "grafted", "transfer": transfer, "parent": str(parent), "data": {"domain": "target"}}
    return load_model(
        finetune.run(tiny(FinetuneConfig, folder, lake, model=model, task=TASK, train=train, **more)).model
    )


@pytest.mark.parametrize("transfer", ["deep", "patch"])
def test_times_of_the_parent_are_copied(transfer, parents, tiny_lake, tmp_path):
    child, parent = grafted(tmp_path, tiny_lake, parents["timed"], TIMED, transfer), load_model(parents["timed"])
    own, theirs = dict(child.model.named_parameters()), dict(parent.model.named_parameters())
    names = [name for name in theirs if name.startswith("time.")]
    assert len(names) == 4
    for name in names:
        assert theirs[name].any()
        torch.testing.assert_close(own[name], theirs[name], rtol=0, atol=1e-9)


@pytest.mark.parametrize("transfer", ["deep", "patch"])
def test_a_parent_without_times_gives_all_else(transfer, parents, tiny_lake, tmp_path):
    child = grafted(tmp_path, tiny_lake, parents["plain"], TIMED, transfer)
    times = {name: p for name, p in child.model.named_parameters() if name.startswith("time.")}
    assert times
    assert max(float(p.detach().abs().max()) for p in times.values()) < 1e-9
    theirs = dict(load_model(parents["plain"]).model.named_parameters())
    name = "blocks.0.qkv.weight"
    torch.testing.assert_close(dict(child.model.named_parameters())[name], theirs[name], rtol=0, atol=1e-9)


def test_a_child_may_do_without_the_parents_times(parents, tiny_lake, tmp_path):
    child = grafted(tmp_path, tiny_lake, parents["timed"], PLAIN, "deep")
    assert not child.config.reads_times
    assert not [name for name, _ in child.model.named_parameters() if name.startswith("time.")]


def test_times_can_be_frozen(parents, tiny_lake, tmp_path):
    config = tiny(
        FinetuneConfig,
        tmp_path,
        tiny_lake,
        model=TIMED,
        task=TASK,
        name="frozen",
        transfer="deep",
        parent=str(parents["timed"]),
        data={"domain": "target"},
        freeze=["time"],
    )
    child, parent = load_model(finetune.run(config).model), load_model(parents["timed"])
    own, theirs = dict(child.model.named_parameters()), dict(parent.model.named_parameters())
    assert all(torch.equal(own[name], theirs[name]) for name in theirs if name.startswith("time."))
    assert not torch.equal(own["blocks.0.qkv.weight"], theirs["blocks.0.qkv.weight"])
    assert replaced(config, freeze=()).freeze == ()
