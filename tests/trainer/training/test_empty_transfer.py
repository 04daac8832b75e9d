"""Transfers that would copy nothing, and so be transfer `none` under another name."""

import pytest
from deltalake import DeltaTable

from tests.fixtures.lakes import build_tiny_lake
from tests.fixtures.trainings import start, tiny
from trainer.config import FinetuneConfig, PretrainConfig
from trainer.data.release import pin
from trainer.recipes.finetune import run as finetune
from trainer.recipes.pretrain import run as pretrain
from trainer.training.empty_transfer import empty_by_data, empty_by_settings
from trainer.training.transfer import TransferError

BARE = {"model": {"user_width": 0, "knowledge": {}}}
USERS = {"model": {"knowledge": {}}}
PEOPLE = {"model": {"user_width": 0}}


def shallow(folder, lake, **sections):
    return tiny(FinetuneConfig, folder, lake, transfer="shallow", data={"domain": "target"}, **sections)


@pytest.fixture(scope="module")
def apart(tmp_path_factory):
    """A lake whose domains share no user."""
    lake = build_tiny_lake(tmp_path_factory.mktemp("apart") / "lake")
    DeltaTable(f"{lake}/sequences").delete(
        "(domain = 'source' AND \"user\" % 2 = 0) OR (domain = 'target' AND \"user\" % 2 = 1)"
    )
    return lake


@pytest.mark.parametrize(
    ("sections", "is_empty"),
    [(BARE, True), (USERS, False), (PEOPLE, False), (BARE | {"shared_items": True}, False), ({}, False)],
)
def test_settings_say_whether_shallow_has_anything_to_copy(sections, is_empty, tiny_lake, tmp_path):
    config = shallow(tmp_path, tiny_lake, **sections)
    assert bool(empty_by_settings(config)) is is_empty
    for transfer in ("none", "deep", "patch"):
        assert empty_by_settings(config.model_copy(update={"transfer": transfer})) == ""


@pytest.mark.parametrize(
    ("sections", "lacking"), [(USERS, "no user,"), (USERS | {"shared_items": True}, "no user and no item,"), ({}, "")]
)
def test_domains_that_share_nothing_are_named(sections, lacking, apart, tiny_lake, tmp_path):
    config = shallow(tmp_path, apart, **sections)
    release = pin(apart, None)
    release.versions.pop("sequences")  # what is there now
    release.digests.clear()
    reason = empty_by_data(config, release, "source")
    assert (f"domains 'source' and 'target' share {lacking}" in reason) if lacking else reason == ""
    assert empty_by_data(config, release, "all") == empty_by_data(config, release, "nowhere") == ""
    assert empty_by_data(shallow(tmp_path, tiny_lake, **sections), pin(tiny_lake, None), "source") == ""


def test_finetune_refuses_a_transfer_of_nothing_before_it_trains(tiny_lake, tmp_path):
    parent = pretrain(
        tiny(PretrainConfig, tmp_path, tiny_lake, name="parent", train={"epochs": 1, "min_epochs": 0}, **BARE)
    ).model
    with pytest.raises(TransferError, match=r"transfer shallow copies user and knowledge embeddings.*transfer deep"):
        finetune(shallow(tmp_path, tiny_lake, name="child", parent=str(parent), **BARE))
    assert not (tmp_path / "runs" / "child").exists()
    process = start(
        tmp_path,
        tiny_lake,
        recipe="finetune",
        name="child",
        parent=str(parent),
        transfer="shallow",
        data={"domain": "target"},
        **BARE,
    )
    output, _ = process.communicate()
    assert process.returncode == 2, output
    assert output.splitlines()[-1].startswith("finetune: transfer shallow copies user and knowledge embeddings")
