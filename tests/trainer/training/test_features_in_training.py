"""Features of items through training, model folders and transfer."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from etl.settings import GraftrecError
from etl.tables import ITEMS
from tests.fixtures.feature_lakes import write_vectors
from tests.fixtures.trainings import tiny
from trainer.config import FinetuneConfig, PretrainConfig
from trainer.data.events import Events
from trainer.data.release import pin
from trainer.inference.model_folder import load_model
from trainer.recipes.finetune import run as finetune
from trainer.recipes.pretrain import run as pretrain

STILL = {"epochs": 1, "min_epochs": 0, "learning_rate": 1e-30}  # weights stay as they are, but for zeros: 1e-30
TEXT = {"encoders": ["text"], "width": 6}


@pytest.fixture(scope="module")
def done(tiny_lake, tmp_path_factory):
    """A lake with vectors of most items, and two parents of the domain `source`: without features, and with."""
    root = tmp_path_factory.mktemp("features")
    lake = str(root / "lake")
    shutil.copytree(tiny_lake, lake)
    items = pin(lake, None).read(ITEMS, ["item", "index"]).to_pylist()[:35]
    vectors = np.random.default_rng(0).normal(size=(35, 10)).astype(np.float32) + 1
    write_vectors(lake, items, vectors)
    train = {"epochs": 2, "min_epochs": 0, "learning_rate": 0.01}
    plain = pretrain(tiny(PretrainConfig, root, lake, name="plain", train=train))
    featured = pretrain(tiny(PretrainConfig, root, lake, name="featured", train=train, model={"features": TEXT}))
    return SimpleNamespace(root=root, lake=lake, plain=plain, featured=featured)


def grafted(done, name, parent, **settings):
    config = tiny(FinetuneConfig, done.root, done.lake, name=name, parent=str(parent.model), **settings)
    return load_model(finetune(config).model)


def scores_of(trained):
    random = np.random.default_rng(1)
    items = random.integers(5, trained.model.num_items, 24)
    histories = Events(np.array([5, 9, 4]), np.array([0, 10, 24, 24]), {"items": items})
    return trained.scorer().score(histories)


@pytest.mark.parametrize("aggregate", ["concat", "sum", "gate", "attention"])
def test_a_grafted_model_that_is_given_features_equals_its_parent_to_the_bit(done, aggregate):
    settings = {"shared_items": True, "data": {"domain": "source"}, "train": STILL, "transfer": "deep"}
    own = grafted(
        done, f"given-{aggregate}", done.plain, **settings, model={"features": TEXT | {"aggregate": aggregate}}
    )
    assert any(name.startswith("features.") for name in own.model.state_dict())
    assert torch.equal(scores_of(own), scores_of(load_model(done.plain.model)))


def test_a_model_folder_has_the_vectors_it_was_trained_on(done):
    loaded = load_model(done.featured.model)
    assert list(loaded.features) == ["text"]
    one = loaded.features["text"]
    assert one.vectors_VF.shape == (len(loaded.catalogue), 10)
    assert one.vectors_VF.dtype == np.float16
    assert 0 < one.has_V.sum() < len(loaded.catalogue)
    module = loaded.model.features["scored"]
    assert module.out.weight.any()  # trained
    assert torch.equal(module.vectors_0, torch.from_numpy(one.vectors_VF).float())
    without = load_model(done.featured.model)
    torch.nn.init.zeros_(without.model.features["scored"].out.weight)
    assert not torch.equal(scores_of(loaded), scores_of(without))
    assert loaded.versions["features"] == 1


@pytest.mark.parametrize(
    ("transfer", "copied"), [("shallow", False), ("shallow+features", True), ("deep", True), ("patch", True)]
)
def test_which_transfer_copies_what_joins_features(done, transfer, copied):
    own = grafted(
        done,
        transfer.replace("+", "-"),
        done.featured,
        transfer=transfer,
        data={"domain": "target"},
        train=STILL | {"seed": 9},
        model={"features": TEXT},
    )
    parent = load_model(done.featured.model)
    theirs = {name: one for name, one in parent.model.state_dict().items() if name.startswith("features.")}
    assert len(theirs) > 2
    for name, tensor in theirs.items():
        alike = torch.allclose(own.model.state_dict()[name], tensor, atol=1e-25, rtol=0)
        assert alike == copied, name
    lines = json.loads((done.root / "runs" / transfer.replace("+", "-") / "transfer.json").read_text())["tensors"]
    found = {line["origin"] for line in lines if line["group"] == "features"}
    assert found == {"copied" if copied else "new"}
    trained = {line["trained"] for line in lines if line["group"] == "features"}
    assert trained == {transfer != "patch"}
    same = own.features["text"].whitening.mean_F == parent.features["text"].whitening.mean_F
    assert same.all() == copied  # projections read what they were trained to read


def test_features_are_frozen_by_their_group(done):
    own = grafted(
        done,
        "frozen",
        done.featured,
        transfer="deep",
        freeze=["features"],
        data={"domain": "target"},
        train={"epochs": 1, "min_epochs": 0},
        model={"features": TEXT},
    )
    parent = load_model(done.featured.model).model.state_dict()
    state = own.model.state_dict()
    assert all(torch.equal(state[name], parent[name]) for name in state if name.startswith("features."))
    assert not torch.equal(state["head.0.weight"], parent["head.0.weight"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": {"features": TEXT | {"width": 7}}}, "expected the parent's .* to fit"),
        ({"model": {"features": TEXT | {"encoders": ["bert"]}}}, "by 'bert' for split 'last-5', found those by text"),
        ({"transfer": "shallow+features", "parent": "plain", "model": {"features": TEXT}}, "has no tensor features."),
    ],
)
def test_features_that_a_graft_refuses(done, settings, message):
    given = {"transfer": "deep", "data": {"domain": "target"}, "train": STILL} | settings
    parent = done.plain if given.pop("parent", "") == "plain" else done.featured
    with pytest.raises(GraftrecError, match=message) as raised:
        grafted(done, "refused", parent, **given)
    assert "\n" not in str(raised.value)


def test_ids_that_are_left_out_change_what_is_learned_and_resume_exactly(done):
    settings = {"model": {"features": TEXT | {"id_dropout": 0.5}}, "train": {"epochs": 2, "min_epochs": 0}}
    runs = [pretrain(tiny(PretrainConfig, done.root, done.lake, name=name, **settings)) for name in ("one", "two")]
    one, two = (load_model(run.model).model.state_dict() for run in runs)
    assert all(torch.equal(one[name], two[name]) for name in one)
    without = {"model": {"features": TEXT}, "train": settings["train"]}
    other = load_model(pretrain(tiny(PretrainConfig, done.root, done.lake, name="kept", **without)).model).model
    assert not torch.equal(other.state_dict()["head.0.weight"], one["head.0.weight"])


def test_a_trained_encoder_of_texts_through_training_and_transfer(done):
    pytest.importorskip("wordllama")
    features = {"encoders": ["text"], "document": {"columns": ["title", "categories"], "max_words": 9}, "width": 6}
    train = {"epochs": 1, "min_epochs": 0, "learning_rate": 0.01}
    settings = {"model": {"features": features}, "train": train}
    parent = pretrain(tiny(PretrainConfig, done.root, done.lake, name="documents", **settings))
    loaded = load_model(parent.model)
    assert loaded.documents.words_VL.shape[1] <= 9
    assert loaded.documents.words_VL[5:].any(1).all()
    fresh = tiny(PretrainConfig, done.root, done.lake, name="fresh", model={"features": features}, train=STILL)
    first, state = load_model(pretrain(fresh).model).model.state_dict(), loaded.model.state_dict()
    trained = [name for name in state if ".document." in name]
    assert len(trained) == 5
    assert not any(torch.equal(first[name], state[name]) for name in trained)
    own = grafted(
        done,
        "texts",
        parent,
        transfer="deep",
        data={"domain": "target"},
        train=STILL,
        model={"features": features},
    )
    assert all(torch.allclose(own.model.state_dict()[name], state[name], atol=1e-25, rtol=0) for name in trained)
    assert own.documents.words_VL.shape != loaded.documents.words_VL.shape


def test_shuffled_features_are_the_same_vectors_on_other_items_by_the_seed(done):
    def trained(seed):
        name = f"shuffled-{seed}"
        given = {"name": name, "train": STILL | {"seed": seed}, "model": {"features": TEXT | {"shuffled": True}}}
        return load_model(pretrain(tiny(PretrainConfig, done.root, done.lake, **given)).model)

    real = load_model(done.featured.model).features["text"]
    first, other = (trained(seed).features["text"] for seed in (0, 1))
    for shuffled in (first, other):
        assert (shuffled.has_V == real.has_V).all()
        own, given = (one.vectors_VF[real.has_V].astype(np.float64) for one in (real, shuffled))
        distances = np.linalg.norm(given[:, None] - own[None], axis=-1)
        giver = distances.argmin(1)
        assert distances.min(1).max() < 0.02  # the same but for the order of whitening's sums
        assert sorted(giver.tolist()) == list(range(len(own)))
        assert (giver != np.arange(len(own))).all()
    assert not np.array_equal(first.vectors_VF, other.vectors_VF)


def test_shuffled_features_are_transferred_and_exchanged_in_each_domain(done):
    """The control of features that join domains: projections are learned and copied as real ones are."""
    given = {"model": {"features": TEXT | {"shuffled": True}}}
    parent = pretrain(tiny(PretrainConfig, done.root, done.lake, name="shuffled-parent", train=STILL, **given))
    domain = {"data": {"domain": "target"}, "transfer": "deep", "train": STILL}
    own = grafted(done, "shuffled-deep", parent, **domain, **given)
    real = grafted(done, "real-deep", parent, **domain, model={"features": TEXT})
    theirs = load_model(parent.model).model.state_dict()
    copied = [name for name in theirs if name.startswith("features.")]
    assert all(torch.allclose(own.model.state_dict()[name], theirs[name], atol=1e-25, rtol=0) for name in copied)
    has_V = own.features["text"].has_V
    assert (has_V == real.features["text"].has_V).all()
    own_NF, real_NF = (one.features["text"].vectors_VF[has_V] for one in (own, real))
    assert not (own_NF == real_NF).all(1).any()
    assert sorted(own_NF.tolist()) == sorted(real_NF.tolist())
