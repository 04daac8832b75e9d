"""Ridge regression from features to what trained items have: `features.aggregate: ridge`."""

import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from sklearn.linear_model import Ridge
from sklearn.model_selection import LeaveOneOut, cross_val_predict

from etl.tables import FIRST_INDEX, ITEMS
from tests.fixtures.feature_lakes import write_vectors
from tests.fixtures.trainings import TINY
from trainer.config import LossConfig, PretrainConfig
from trainer.data.release import pin
from trainer.inference.model_folder import load_model
from trainer.models import FeatureTable, ModelSizes, build_model
from trainer.models.feature_map import fitted_rows
from trainer.recipes.pretrain import run as pretrain
from trainer.ridge import PENALTIES
from trainer.tasks.loss import squared_loss

RIDGE = {"encoders": ["text"], "aggregate": "ridge"}
NETWORKS = {
    "mlp": {"kind": "mlp", "score": "dot", "user_width": 8, "width": 8, "knowledge": {}},
    "bert4rec": {"kind": "bert4rec", "blocks": 1, "width": 8, "heads": 1, "user_width": 0, "knowledge": {}},
    "caser": {"kind": "caser", "width": 8, "user_width": 4, "knowledge": {}},
}


def model_of(network, tables, num):
    config = network | {"features": {"encoders": [f"e{place}" for place in range(len(tables))], "aggregate": "ridge"}}
    settings = PretrainConfig.model_validate({"name": "x", "model": config, "task": {"kind": "next_item"}}).model
    sizes = ModelSizes(
        num_users=9, num_entities=0, knowledge_VS=torch.zeros(num, 0, dtype=torch.int32), features=tables
    )
    return build_model(settings, sizes, seed=0)


def drawn(num=60):
    random = np.random.default_rng(0)
    vectors = [torch.from_numpy(random.normal(size=(num, width)) + 1).float() for width in (3, 5)]
    has = [torch.ones(num, dtype=torch.bool), torch.arange(num) % 7 != 0]
    untrained = (torch.arange(num) % 5 == 0) & (torch.arange(num) >= FIRST_INDEX)
    return vectors, has, untrained


@pytest.mark.parametrize("name", NETWORKS)
def test_items_that_nobody_has_had_get_what_ridge_regression_predicts(name):
    """Compared with scikit-learn's, whose penalty is that of the least error of leaving each item out."""
    vectors, has, untrained = drawn()
    model = model_of(NETWORKS[name], tuple(map(FeatureTable, vectors, has)), len(untrained))
    model.mark_untrained(untrained)
    torch.manual_seed(1)
    torch.nn.init.normal_(model.output_bias)
    model.eval()
    before, bias_before = model.item_vectors().detach().clone(), model.bias().detach().clone()
    model.fit_features()

    known = (~untrained).numpy() & (np.arange(len(untrained)) >= FIRST_INDEX)
    x = np.concatenate([v.double().numpy() * h.numpy()[:, None] for v, h in zip(vectors, has, strict=True)], axis=1)
    filled = np.concatenate(
        [np.repeat(h.numpy()[:, None], v.shape[1], 1) for v, h in zip(vectors, has, strict=True)], 1
    )
    centred = np.where(filled, x - x[known].mean(0), 0)  # what is lacking is taken for the mean
    y = torch.cat([before, bias_before[:, None]], dim=1).double().numpy()
    errors = [
        ((cross_val_predict(Ridge(one), x[known], y[known], cv=LeaveOneOut()) - y[known]) ** 2).sum()
        for one in PENALTIES
    ]
    best = Ridge(PENALTIES[int(np.argmin(errors))]).fit(x[known], y[known])
    expected = centred @ best.coef_.T + y[known].mean(0)
    cold = untrained.numpy()
    found = torch.cat([model.item_vectors(), model.bias()[:, None]], dim=1).detach().numpy()
    np.testing.assert_allclose(found[cold], expected[cold], atol=1e-5)
    np.testing.assert_array_equal(found[known], y[known].astype(np.float32))  # the others stay as they are
    rows = torch.tensor([5, 6, 10])
    torch.testing.assert_close(model.item_vectors(rows), model.item_vectors()[rows])
    torch.testing.assert_close(model.bias(rows), model.bias()[rows])


def test_at_most_so_many_items_are_fitted_at_even_distances(monkeypatch):
    monkeypatch.setattr("trainer.models.feature_map.MAX_FITTED", 4)
    untrained = torch.zeros(FIRST_INDEX + 10, dtype=torch.bool)
    untrained[FIRST_INDEX] = untrained[FIRST_INDEX + 9] = True
    assert fitted_rows(untrained).tolist() == [FIRST_INDEX + place for place in (1, 3, 5, 7)]


@pytest.fixture(scope="module")
def done(tiny_lake, tmp_path_factory):
    root = tmp_path_factory.mktemp("ridge")
    lake = str(root / "lake")
    shutil.copytree(tiny_lake, lake)
    rows = pin(lake, None).read(ITEMS, ["item", "index"]).to_pylist()
    vectors = np.random.default_rng(0).normal(size=(len(rows), 6)).astype(np.float32)
    write_vectors(lake, rows, vectors)
    return SimpleNamespace(root=root, lake=lake)


@pytest.mark.parametrize("loss", ["full", "squared"])
def test_training_is_that_of_a_model_without_features_to_the_bit(done, loss):
    trained = {}
    for name, given in (("plain", {}), ("ridge", {"features": RIDGE})):
        settings = {
            "name": f"{name}-{loss}",
            "output": str(done.root / "runs"),
            "data": {"lake": done.lake, "domain": "target"},
            "model": NETWORKS["mlp"] | {"max_length": 24} | given,
            "task": {"kind": "next_item", "loss": {"kind": loss}},
            "train": TINY["train"] | {"epochs": 2, "min_epochs": 0, "learning_rate": 0.01},
        }
        config = PretrainConfig.model_validate(TINY | settings)
        trained[name] = load_model(pretrain(config).model).model
    own, plain = dict(trained["ridge"].state_dict()), dict(trained["plain"].state_dict())
    assert own["features.scored.weight_FK"].any()
    assert plain
    for name, tensor in plain.items():
        assert torch.equal(tensor, own[name]), name


def test_squared_loss_by_hand():
    """Two users, three items; user 0 took items 0 and 2, user 1 item 1."""
    query = torch.tensor([[1.0], [0.5]], dtype=torch.float64, requires_grad=True)
    table = torch.tensor([[0.5], [1.0], [-1.0]], dtype=torch.float64)
    bias = torch.tensor([0.0, 0.25, 0.0], dtype=torch.float64)
    taken = (torch.tensor([0, 0, 1]), torch.tensor([0, 2, 1]))
    # scores: user 0: 0.5, 1.25, -1; user 1: 0.25, 0.75, -0.5
    missed = 0.5**2 + 2**2 + 0.25**2
    squares = 0.5**2 + 1.25**2 + 1 + 0.25**2 + 0.75**2 + 0.5**2
    lengths = (1 + 0.25) + (1 + 1) + (0.25 + 1)  # of the pairs that were taken
    everyone = 3 * (1 + 0.25) + 2 * (0.25 + 1 + 1)
    config = LossConfig(kind="squared", unobserved_weight=0.1, l2=0.2)
    found = squared_loss(query, table, bias, taken, config)
    assert found.item() == pytest.approx(missed + 0.1 * squares + 0.2 * (lengths + 0.1 * everyone))
    plain = squared_loss(query, table, bias, taken, LossConfig(kind="squared", unobserved_weight=0.1, l2=0))
    assert plain.item() == pytest.approx(missed + 0.1 * squares)


@pytest.mark.parametrize(
    ("model", "task", "said"),
    [
        ({"features": RIDGE | {"dropout": 0.1}}, {}, "expected encoders alone, found dropout"),
        ({"features": RIDGE | {"id_dropout": 0.1}}, {}, "expected encoders alone, found id_dropout"),
        ({"features": {"aggregate": "ridge"}}, {}, "expected encoders alone, found none"),
        ({"user_features": {"encoders": ["a"], "aggregate": "ridge"}}, {}, "user_features: expected aggregate"),
        ({"kind": "mlp", "score": "mlp", "knowledge": {}, "features": RIDGE}, {}, "set score dot"),
        ({"kind": "bert4rec"}, {"loss": {"kind": "squared"}}, "task.loss.kind squared: expected"),
        ({"kind": "mlp", "score": "dot"}, {"loss": {"kind": "squared"}, "targets": 2}, "task.loss.kind squared"),
    ],
)
def test_what_does_not_go_together_is_refused(model, task, said):
    with pytest.raises(ValidationError, match=said):
        PretrainConfig.model_validate({"name": "x", "model": model, "task": {"kind": "next_item"} | task})
