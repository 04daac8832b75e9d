"""Patches as small versions: put together they are the model they were made of, and many stand on one backbone."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from etl.tables import FIRST_INDEX
from tests.fixtures.lakes import build_tiny_lake
from tests.fixtures.patches import MODELS, settings
from tests.fixtures.trainings import tiny
from trainer import registry
from trainer.config import PretrainConfig, RecommendConfig
from trainer.data.events import Events
from trainer.inference import delta_folder
from trainer.inference.model_folder import ModelFolderError, load_model, model_hash
from trainer.inference.recommender import Recommender, Request, RequestError
from trainer.recipes import recommend
from trainer.recipes.finetune import run as finetune
from trainer.recipes.pretrain import run as pretrain
from trainer.registry import Registry
from trainer.tracking import TrackingError


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A lake, a parent of the source domain with a user table and metadata, and patches of it for other domains."""
    folder = tmp_path_factory.mktemp("patches")
    lake = build_tiny_lake(folder / "lake")
    config = tiny(PretrainConfig, folder, lake, name="parent", task={"kind": "next_item"})
    parent = pretrain(config.model_copy(update={"model": type(config.model).model_validate(MODELS["bert4rec"])})).model
    children = {}
    reads = {
        "target": {"domain": "all", "predicted": "target", "split": "joint-5"},
        "all": {"domain": "all", "split": "joint-5"},
    }
    for domain, data in reads.items():
        more = {"name": f"patch-{domain}", "data": {"lake": str(lake), **data}, "task": {"kind": "next_item"}}
        children[domain] = finetune(settings(folder, lake, {"bert4rec": parent}, "bert4rec", **more)).model
    return lake, parent, children


def small(made, tmp_path, domain="target"):
    _, parent, children = made
    delta_folder.write_patch(children[domain], parent, tmp_path / "small")
    return tmp_path / "small"


@pytest.mark.parametrize("domain", ["target", "all"])
def test_put_together_it_is_the_folder_it_was_made_of(domain, made, tmp_path):
    _, parent, children = made
    folder = small(made, tmp_path, domain)
    assert delta_folder.is_patch(folder)
    assert not delta_folder.is_patch(children[domain])
    assert delta_folder.parent_of(folder) == model_hash(parent)
    assert delta_folder.assemble(folder, parent, tmp_path / "whole") == model_hash(children[domain])
    for file in children[domain].iterdir():
        assert (tmp_path / "whole" / file.name).read_bytes() == file.read_bytes()
    assert not (folder / "users.safetensors").exists()  # nobody's vector was trained


def test_it_holds_what_was_trained_and_no_more(made, tmp_path):
    folder, (_, _, children) = small(made, tmp_path), made
    told = json.loads((children["target"].parent / "transfer.json").read_text())["parameters"]
    held = load_file(folder / delta_folder.TENSORS)
    assert sum(tensor.numel() for name, tensor in held.items() if name.startswith("patches.")) == told["added"]
    assert {name for name in held if not name.startswith("patches.")} == {"item_embedding.weight", "output_bias"}
    target = [row for row, item in enumerate(load_model(children["target"]).model.predicted_V.tolist()) if item]
    assert set(json.loads((folder / delta_folder.PATCH).read_text())["rows"]["output_bias"]) <= set(target)


def scores_of(trained_model):
    items = np.array([FIRST_INDEX, FIRST_INDEX + 3, FIRST_INDEX + 5])
    histories = Events.of(np.array([FIRST_INDEX + 1]), np.array([0, 3]), items, np.empty(0, np.int64))
    return trained_model.scorer().score(histories)


def test_many_patches_stand_on_one_backbone(made, tmp_path):
    _, parent, children = made
    backbone = load_model(parent)
    theirs = {name: tensor.data_ptr() for name, tensor in backbone.model.state_dict().items()}
    for domain in children:
        (tmp_path / domain).mkdir()
        patched, whole = (
            delta_folder.load_patch(small(made, tmp_path / domain, domain), backbone),
            load_model(children[domain]),
        )
        torch.testing.assert_close(scores_of(patched), scores_of(whole))  # tensors may be aligned differently
        assert (patched.hash, patched.users, patched.parent) == (whole.hash, whole.users, backbone.hash)
        shared = {name for name, tensor in patched.model.state_dict().items() if tensor.data_ptr() == theirs.get(name)}
        own = {"item_embedding.weight", "output_bias"}
        assert shared == {name for name in patched.model.state_dict() if not name.startswith("patches.")} - own
    torch.testing.assert_close(scores_of(backbone), scores_of(load_model(parent)))  # and it is what it was


def test_a_patch_refuses_another_parent_and_damage(made, tmp_path):
    _, parent, children = made
    folder = small(made, tmp_path)
    with pytest.raises(ModelFolderError, match="is for the model"):
        delta_folder.load_patch(folder, load_model(children["all"]))
    with pytest.raises(ModelFolderError, match="is for the model"):
        delta_folder.assemble(folder, children["all"], tmp_path / "whole")
    data = bytearray((folder / delta_folder.TENSORS).read_bytes())
    data[-1] ^= 1
    (folder / delta_folder.TENSORS).write_bytes(data)
    with pytest.raises(ModelFolderError, match="damaged"):
        delta_folder.load_patch(folder, load_model(parent))
    with pytest.raises(ModelFolderError, match="damaged"):
        delta_folder.assemble(folder, parent, tmp_path / "other")


# --- registered -------------------------------------------------------------------------------------------------------


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.chdir(tmp_path)
    return Registry("patched")


def test_small_versions_name_their_parent_and_are_picked_by_domain(made, store):
    _, parent, children = made
    versions = {domain: store.register(children[domain], alias=domain) for domain in children}
    backbone = store.of_hash(model_hash(parent))  # registered along with the first
    assert backbone.aliases == ()
    assert len(store.versions()) == 3
    for domain, version in versions.items():
        assert version.tags[registry.TAG_KIND] == "patch"
        assert version.tags[registry.TAG_PARENT] == backbone.hash
        assert version.hash == model_hash(children[domain]) == model_hash(store.folder(version))
        assert delta_folder.bytes_of(store.stored(version)) < 0.8 * delta_folder.bytes_of(store.folder(version))
        for examples in (backbone, *versions.values()):
            assert store.for_domain(examples, domain).number == version.number
    assert store.for_domain(versions["target"], "source").number == backbone.number
    with pytest.raises(TrackingError, match="is the parent of"):
        store.delete(backbone.number)

    examples = RecommendConfig(registered_model="patched", model=str(backbone.number), domain="target")
    folder, label, _ = recommend._model(examples, examples.model)
    assert (model_hash(folder), label) == (versions["target"].hash, versions["target"].label)

    from trainer.registry import pyfunc  # as MLflow runs it

    recommender = pyfunc.load(store.stored(versions["target"]), versions["target"].label)
    history = [item for item in recommender.trained_model.catalogue.raw_ids[FIRST_INDEX : FIRST_INDEX + 4]]
    for domain, version in versions.items():
        whole = Recommender(load_model(children[domain]), version.label).answer([Request(history)])[0]
        answer = recommender.of_domain(domain).answer([Request(history)])[0]
        assert dataclasses.replace(answer, scores=[]) == dataclasses.replace(whole, scores=[])
        assert answer.scores == pytest.approx(whole.scores, abs=1e-5)
    assert recommender.of_domain("all") is recommender.of_domain("all")  # read once
    assert recommender.of_domain("source").version == backbone.label
    with pytest.raises(RequestError, match=r"expected 'target'.* found 'moon'"):
        recommender.of_domain("moon")


def test_targets_of_a_family_share_their_parent_and_answer_for_each_other(made, store):
    _, parent, children = made
    of = {domain: Registry(f"shop-{domain}", family="shop") for domain in ("source", *children)}
    versions = {domain: of[domain].register(children[domain], alias=registry.CHAMPION) for domain in children}
    (backbone,) = of["source"].versions()  # registered once, as the model of the domain that it was trained on
    assert backbone.hash == model_hash(parent)
    for domain, version in versions.items():
        assert [one.label for one in of[domain].versions()] == [f"shop-{domain}/1"]
        assert model_hash(of[domain].folder(version)) == model_hash(children[domain])
        for other, expected in versions.items():
            assert of[domain].for_domain(version, other).label == expected.label
        assert of[domain].for_domain(version, "source").label == version.label  # the parent is no champion
    with pytest.raises(TrackingError, match="is the parent of shop-all/1, shop-target/1"):
        of["source"].delete(backbone.number)

    examples = RecommendConfig(registered_model="shop-target", model="champion", domain="all")
    folder, label, _ = recommend._model(examples, examples.model)
    assert (model_hash(folder), label) == (versions["all"].hash, "shop-all/1")

    from trainer.registry import pyfunc  # as MLflow runs it

    of["source"].set_alias(registry.CHAMPION, backbone.number)  # whole models answer beside patches
    recommender = pyfunc.load(of["target"].stored(versions["target"]), "shop-target/1")
    history = [item for item in recommender.trained_model.catalogue.raw_ids[FIRST_INDEX : FIRST_INDEX + 4]]
    for domain, folder in {**children, "source": parent}.items():
        whole = Recommender(load_model(folder), f"shop-{domain}/1").answer([Request(history)])[0]
        answer = recommender.of_domain(domain).answer([Request(history)])[0]
        assert dataclasses.replace(answer, scores=[]) == dataclasses.replace(whole, scores=[])


def test_a_patch_whose_parent_is_gone_is_refused(made, store, tmp_path):
    _, _, children = made
    orphan = tmp_path / "orphan"
    shutil.copytree(children["target"], orphan)
    described = json.loads((orphan / "config.json").read_text())
    described["config"]["parent"] = str(tmp_path / "nowhere")
    (orphan / "config.json").write_text(json.dumps(described))
    manifest = json.loads((orphan / "manifest.json").read_text())
    manifest["config.json"] = delta_folder.digest_of(orphan / "config.json")
    (orphan / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(TrackingError, match="register that model first"):
        store.register(orphan)
    assert store.versions() == []
