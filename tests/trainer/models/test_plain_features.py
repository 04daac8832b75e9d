"""The plain feature-based model: user and item vectors, features, and a score of both by product or by pairs."""

import itertools

import numpy as np
import pytest
import torch

from etl.tables import FIRST_INDEX
from tests.fixtures.networks import NUM_ITEMS, batch_of
from trainer.config import ItemFeaturesConfig, MlpConfig, NextItemConfig, PretrainConfig
from trainer.models import FeatureTable, ModelSizes, build_model
from trainer.tasks import NextItem

TASK = NextItem(NextItemConfig())


def model_of(score, *, features=0):
    """Double precision, every parameter drawn at random; `features`: encoders, a third of the items has none."""
    random = np.random.default_rng(3)
    tables = []
    for width in range(4, 4 + features):
        has = np.arange(NUM_ITEMS) % 3 != 0
        vectors = torch.from_numpy(random.normal(size=(NUM_ITEMS, width)) * has[:, None]).half()
        tables.append(FeatureTable(vectors, torch.from_numpy(has)))
    given = ItemFeaturesConfig(encoders=tuple(f"e{n}" for n in range(features)), aggregate="sum", width=3)
    config = MlpConfig(width=5, user_width=5, score=score, features=given)
    nothing = torch.zeros(NUM_ITEMS, 0)
    sizes = ModelSizes(num_users=50, num_entities=0, knowledge_VS=nothing, features=tuple(tables))
    model = build_model(config, sizes, seed=1).double().eval()
    torch.manual_seed(2)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    return model


def parts_of(model, item):
    """What stands for an item: its own vector, and one of each encoder."""
    own = model.item_embedding.weight[item]
    if not len(model.features):
        return [own]
    module = model.features["scored"]
    found = [own]
    for place, projection in enumerate(module.projections):
        vector = projection.weight @ module.get_buffer(f"vectors_{place}")[item]
        if module.get_buffer(f"lacks_{place}")[item]:
            vector = vector + module.missing[place]
        found.append(module.out.weight @ vector)
    return found


@pytest.mark.parametrize("features", [0, 1, 2])
@pytest.mark.parametrize("score", ["dot", "fm"])
def test_scores_are_products_of_pairs(score, features):
    model, batch = model_of(score, features=features), batch_of([5, 2, 7])
    hidden = TASK.query(model, batch)
    scores_BV = model.scores(hidden)
    items = [FIRST_INDEX, FIRST_INDEX + 1, FIRST_INDEX + 7, NUM_ITEMS - 1]
    for row, user in enumerate(batch.users.tolist()):
        for item in items:
            variables = [model.user_embedding.weight[user], *parts_of(model, item)]
            if score == "fm":
                expected = sum(one @ other for one, other in itertools.combinations(variables, 2))
            else:
                expected = variables[0] @ sum(variables[1:])
            torch.testing.assert_close(scores_BV[row, item], expected + model.output_bias[item])
    some = torch.tensor(items)
    torch.testing.assert_close(model.scores(hidden, some), scores_BV[:, some])
    matched = model.matched(model.head(hidden), model.item_vectors(some[:3])) + model.bias(some[:3])
    torch.testing.assert_close(matched, scores_BV[torch.arange(3), some[:3]])


def test_features_begin_without_effect_by_pairs_too():
    plain, other = (model_of("fm", features=number) for number in (0, 2))
    torch.nn.init.zeros_(other.features["scored"].out.weight)
    own = dict(plain.named_parameters())
    for name, parameter in other.named_parameters():
        if name in own:
            parameter.data = own[name].data
    batch = batch_of([4, 6])
    assert torch.equal(plain.scores(TASK.query(plain, batch)), other.scores(TASK.query(other, batch)))


def test_products_are_cheap_enough_for_the_whole_catalogue():
    full = {"task": {"kind": "next_item", "loss": {"kind": "full"}}}
    for score in ("dot", "fm"):
        PretrainConfig.model_validate({"model": {"kind": "mlp", "score": score}} | full)
    with pytest.raises(ValueError, match=r"set that to bce or sampled, or model\.score to dot or fm"):
        PretrainConfig.model_validate({"model": {"kind": "mlp"}} | full)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"score": "dot", "width": 5, "user_width": 4}, "score dot: expected user_width as width, 5, found 4"),
        (
            {"score": "fm", "features": {"encoders": ["a"], "aggregate": "gate"}},
            "score fm: expected features.aggregate sum, found gate",
        ),
    ],
)
def test_settings_that_do_not_go_together(settings, message):
    with pytest.raises(ValueError, match=message):
        MlpConfig.model_validate({"kind": "mlp"} | settings)


@pytest.mark.parametrize("untrained", [False, True])
@pytest.mark.parametrize("score", ["dot", "fm"])
def test_the_loss_of_users_is_that_of_all_their_positions(score, untrained, monkeypatch):
    """And so are its gradients; an item that nobody has had is no class of either."""
    found = []
    for reads in (False, True):
        model, batch = model_of(score, features=1), batch_of([5, 1, 7])
        monkeypatch.setattr(type(model), "reads_sequence", reads)
        if untrained:
            taken = set(batch.items.unique().tolist())
            cold = next(row for row in range(FIRST_INDEX, NUM_ITEMS) if row not in taken)
            model.mark_untrained(torch.arange(NUM_ITEMS) == cold)
        loss, count = TASK.loss(model, batch)
        loss.backward()
        found.append((loss, count, {name: one.grad for name, one in model.named_parameters()}))
        if untrained:
            assert not found[-1][2]["item_embedding.weight"][cold].any()
    (loss, count, grads), (expected, number, gradients) = found
    torch.testing.assert_close(loss, expected)
    assert count == number == 13
    for name, one in gradients.items():
        torch.testing.assert_close(grads[name], one, msg=name)
