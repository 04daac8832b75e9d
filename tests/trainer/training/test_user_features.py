"""Features of users: without effect at first, in every network, in model folders, and in patches."""

import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from etl.settings import GraftrecError
from etl.tables import FIRST_INDEX, UNK, USERS
from tests.fixtures.feature_lakes import write_vectors
from tests.fixtures.networks import NUM_ITEMS, batch_of
from tests.fixtures.trainings import tiny
from trainer.config import (
    Bert4RecConfig,
    CaserConfig,
    DupnConfig,
    FinetuneConfig,
    MlpConfig,
    NextItemConfig,
    PeterRecConfig,
    PretrainConfig,
    UserFeaturesConfig,
)
from trainer.data.events import Events
from trainer.data.release import pin
from trainer.inference.delta_folder import assemble, load_patch, write_patch
from trainer.inference.model_folder import USER_FEATURES, USER_IDS, load_model
from trainer.inference.model_folder import USERS as USER_TABLE_FILE
from trainer.inference.scorer import ModelScorer, answered
from trainer.models import FeatureTable, ModelSizes, build_model, group_of
from trainer.recipes.finetune import run as finetune
from trainer.recipes.pretrain import run as pretrain
from trainer.tasks import build_task

NUM_USERS = 50
NETWORKS = {
    "bert4rec": Bert4RecConfig(width=16, heads=2, blocks=1, user_width=4, knowledge={}),
    "caser": CaserConfig(width=16, user_width=4, knowledge={}),
    "peterrec": PeterRecConfig(width=16, dilations=(1, 2), user_width=4),
    "dupn": DupnConfig(width=16, user_width=4),
    "mlp": MlpConfig(width=16, user_width=4, layers=(8,)),
    "mlp-fm": MlpConfig(width=16, user_width=16, score="fm"),
}
TOLD = {"encoders": ["social"], "width": 6}
TRAIN = {"epochs": 2, "min_epochs": 0, "learning_rate": 0.01}


def model_of(kind, aggregate=None, **settings):
    config, tables = NETWORKS[kind], ()
    if aggregate is not None:
        random = np.random.default_rng(0)
        has = np.arange(NUM_USERS) % 3 != 0
        has[:FIRST_INDEX] = False
        vectors = random.normal(size=(NUM_USERS, 7)).astype(np.float16) * has[:, None]
        tables = (FeatureTable(torch.from_numpy(vectors), torch.from_numpy(has)),)
        joined = UserFeaturesConfig(encoders=("social",), width=5, aggregate=aggregate, **settings)
        config = type(config).model_validate(config.model_dump() | {"user_features": joined})
    knowledge = torch.zeros(NUM_ITEMS, 0, dtype=torch.int32)
    sizes = ModelSizes(num_users=NUM_USERS, num_entities=0, knowledge_VS=knowledge, user_features=tables)
    return build_model(config, sizes, seed=3)


def loss_of(model):
    task = build_task(NextItemConfig(loss={"kind": "bce" if model.config.kind == "mlp" else "full"}))
    torch.manual_seed(0)
    return task.loss(model, batch_of([4, 7, 3, 5, 6, 2, 4, 3]))[0]


CASES = [(kind, how) for kind in NETWORKS for how in ("concat", "sum", "gate", "attention")]
CASES = [case for case in CASES if case[0] != "mlp-fm" or case[1] == "sum"]


@pytest.mark.parametrize(("kind", "aggregate"), CASES)
def test_features_of_users_begin_without_effect_and_are_trained(kind, aggregate):
    plain, model = model_of(kind), model_of(kind, aggregate)
    assert torch.equal(loss_of(plain), loss_of(model))
    users = torch.tensor([UNK, 5, 6, NUM_USERS, NUM_USERS + 9])
    assert torch.equal(plain.user_vectors(users), model.user_vectors(users))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    before = {name: tensor.clone() for name, tensor in model.named_parameters() if name.startswith("features.user.")}
    for _ in range(3):
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()
    assert [name for name, tensor in before.items() if torch.equal(tensor, model.get_parameter(name))] == []
    assert {group_of(model, model.config)[name] for name in before} == {"features"}
    # The unknown user has no features; concat projects the own vector too.
    own, joined = model.user_embedding.weight[users[[0, 1, 2]]], model.user_vectors(users[[0, 1, 2]])
    assert torch.equal(own[0], joined[0]) == (aggregate != "concat")
    assert not torch.equal(own[1:], joined[1:])


def test_users_are_left_with_their_features_alone():
    model = model_of("bert4rec", "sum", id_dropout=0.5).train()
    torch.nn.init.ones_(model.features["user"].out.weight)
    users = torch.arange(FIRST_INDEX, NUM_USERS)
    torch.manual_seed(1)
    found, own = model.user_vectors(users), model.user_embedding.weight[users]
    alone = found - (joined := model.eval().user_vectors(users))
    dropped = ~torch.isclose(alone, torch.zeros(())).all(1)
    torch.testing.assert_close(found[dropped], (joined - own)[dropped])
    assert 10 < dropped.sum() < 35


@pytest.mark.parametrize("kind", sorted(NETWORKS.keys() - {"dupn"}))
def test_a_user_without_an_item_is_scored_by_features_alone(kind):
    model = model_of(kind, "sum", id_dropout=0.5, alone=True).eval()
    torch.nn.init.normal_(model.features["user"].out.weight)
    own = model.user_embedding.weight[6]
    alone, joined = model.user_vectors(torch.tensor([-1 - 6, 6]))
    torch.testing.assert_close(alone, joined - own)
    task = build_task(NextItemConfig(loss={"kind": "bce" if kind.startswith("mlp") else "full"}))
    nothing = Events(np.array([7, 8, 9]), np.zeros(4, np.int64), {"items": np.empty(0, np.int64)})
    before = ModelScorer(model, task).score(nothing)
    assert torch.isfinite(before[:, FIRST_INDEX:]).all()
    assert not torch.equal(before[0], before[1])
    torch.nn.init.normal_(model.user_embedding.weight)  # whatever is there
    assert torch.equal(ModelScorer(model, task).score(nothing), before)
    assert answered(model, nothing).tolist() == [True, True, False]  # one in three has no features


def test_features_need_a_user_embedding():
    with pytest.raises(ValidationError, match=r"user_features: expected users' embeddings, .* found user_width 0"):
        Bert4RecConfig(user_width=0, user_features={"encoders": ["social"]})
    with pytest.raises(ValidationError, match=r"user_features\.alone: .* found dupn, whose users only weigh items"):
        DupnConfig(user_features={"encoders": ["social"], "id_dropout": 0.5, "alone": True})
    with pytest.raises(ValidationError, match=r"score fm: expected user_features\.aggregate sum, found gate"):
        MlpConfig(score="fm", user_features={"encoders": ["social"]})


@pytest.fixture(scope="module")
def done(tiny_lake, tmp_path_factory):
    """A lake with vectors of most users, and a parent of the domain `source` that reads them."""
    root = tmp_path_factory.mktemp("user_features")
    lake = str(root / "lake")
    shutil.copytree(tiny_lake, lake)
    users = pin(lake, None).read(USERS, ["user", "index"]).to_pylist()
    some = users[: len(users) - 5]
    vectors = np.random.default_rng(0).normal(size=(len(some), 3)).astype(np.float32) + 1
    write_vectors(lake, some, vectors, kind="user", encoder="social", split="last-5")
    model = {"user_width": 4, "user_features": TOLD}
    run = pretrain(tiny(PretrainConfig, root, lake, name="parent", train=TRAIN, model=model))
    return SimpleNamespace(root=root, lake=lake, model=model, run=run, users=users, some=some)


def scores_of(trained, users):
    histories = Events(np.array(users), np.arange(len(users) + 1) * 4, {"items": np.tile([5, 9, 7, 6], len(users))})
    return trained.scorer().score(histories)


def test_a_model_folder_has_the_vectors_of_users_apart(done, tmp_path):
    loaded = load_model(done.run.model)
    vectors = loaded.user_features["social"]
    assert vectors.has_V.sum() == len(done.some)
    told, untold = done.some[0]["index"], done.users[-1]["index"]
    module = loaded.model.features["user"]
    before = scores_of(loaded, [told, untold, UNK])
    torch.nn.init.zeros_(module.out.weight)
    after = scores_of(loaded, [told, untold, UNK])
    assert [torch.equal(*pair) for pair in zip(before, after, strict=True)] == [False, False, True]
    # Without users: who they are and what is known of them is gone, and the model scores as for an unknown user.
    bare = tmp_path / "bare"
    shutil.copytree(done.run.model, bare)
    for name in (USER_FEATURES, USER_IDS, USER_TABLE_FILE):
        (bare / name).unlink()
    for nobody in (load_model(bare), load_model(done.run.model, users=False)):
        scores = scores_of(nobody, [told, untold, UNK])
        assert torch.equal(scores[0], scores[1])
        assert torch.equal(scores[0], scores[2])
    assert load_model(bare).hash == load_model(done.run.model).hash


def test_a_patch_reads_the_users_of_its_parent(done, tmp_path):
    config = tiny(
        FinetuneConfig,
        done.root,
        done.lake,
        name="patched",
        parent=str(done.run.model),
        transfer="patch",
        data={"domain": "target"},
        train=TRAIN,
        model=done.model,
    )
    whole = finetune(config).model
    write_patch(whole, done.run.model, tmp_path / "patch")
    assert not (tmp_path / "patch" / USER_FEATURES).exists()
    users = [row["index"] for row in done.users[:6]]
    expected = scores_of(load_model(whole), users)
    assert torch.equal(scores_of(load_patch(tmp_path / "patch", load_model(done.run.model)), users), expected)
    assemble(tmp_path / "patch", done.run.model, tmp_path / "whole")
    assert torch.equal(scores_of(load_model(tmp_path / "whole"), users), expected)


def test_features_of_users_that_are_not_there_are_refused(done):
    config = tiny(
        PretrainConfig,
        done.root,
        done.lake,
        name="refused",
        train=TRAIN,
        model={"user_width": 4, "user_features": TOLD | {"encoders": ["text"]}},
    )
    with pytest.raises(GraftrecError, match=r"model\.user_features: expected vectors of users by 'text'.*by social"):
        pretrain(config)


def test_a_parent_without_features_gives_all_else(done):
    plain = pretrain(tiny(PretrainConfig, done.root, done.lake, name="plain", train=TRAIN, model={"user_width": 4}))
    still = {"epochs": 1, "min_epochs": 0, "learning_rate": 1e-30}
    settings = {"shared_items": True, "data": {"domain": "source"}, "train": still, "transfer": "deep"}
    config = tiny(
        FinetuneConfig, done.root, done.lake, name="given", parent=str(plain.model), model=done.model, **settings
    )
    users = [row["index"] for row in done.users[:6]]
    assert torch.equal(scores_of(load_model(finetune(config).model), users), scores_of(load_model(plain.model), users))
