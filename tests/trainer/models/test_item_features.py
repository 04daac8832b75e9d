"""Features of items begin without effect, join by each aggregate, and are a parameter group of their own."""

import numpy as np
import pytest
import torch

from etl.tables import FIRST_INDEX
from tests.fixtures.networks import NUM_ITEMS, batch_of
from trainer.config import (
    Bert4RecConfig,
    CaserConfig,
    DocumentConfig,
    DupnConfig,
    ItemFeaturesConfig,
    MlpConfig,
    NextItemConfig,
    PeterRecConfig,
)
from trainer.models import DocumentTable, FeatureTable, ModelSizes, build_model, group_of, groups_of
from trainer.models.documents import DocumentEncoder
from trainer.models.features import Features, kept_ids
from trainer.tasks import build_task

AGGREGATES = ("concat", "sum", "gate", "attention")
NETWORKS = {
    "bert4rec": Bert4RecConfig(width=16, heads=2, blocks=1, user_width=4, knowledge_width=4),
    "caser": CaserConfig(width=16, user_width=4, knowledge_width=4),
    "peterrec": PeterRecConfig(width=16, dilations=(1, 2)),
    "dupn": DupnConfig(width=16, user_width=4),
    "mlp": MlpConfig(width=16, user_width=4, layers=(8,)),
}


def tables(widths=(6,), *, seed=0):
    """Vectors of encoders of some widths; a third of the items has none."""
    random = np.random.default_rng(seed)
    found = []
    for width in widths:
        has = np.arange(NUM_ITEMS) % 3 != 0
        has[:FIRST_INDEX] = False
        vectors = random.normal(size=(NUM_ITEMS, width)).astype(np.float16) * has[:, None]
        found.append(FeatureTable(torch.from_numpy(vectors), torch.from_numpy(has)))
    return tuple(found)


def documents(*, seed=0):
    """Texts of up to 6 of 11 words; a fifth of the items has none."""
    random = np.random.default_rng(seed)
    words = random.integers(1, 12, (NUM_ITEMS, 6))
    words[np.arange(6) >= random.integers(1, 7, NUM_ITEMS)[:, None]] = 0
    words[::5] = words[:FIRST_INDEX] = 0
    vectors = np.concatenate([np.zeros((1, 4)), random.normal(size=(11, 4))]).astype(np.float16)
    return DocumentTable(torch.from_numpy(words), torch.from_numpy(vectors))


def model_of(kind, *, features=(), texts=None, seed=3, **settings):
    config = NETWORKS[kind]
    if features or texts is not None:
        names = tuple(f"e{place}" for place in range(len(features)))
        document = DocumentConfig() if texts is not None else None
        settings = {"features": ItemFeaturesConfig(encoders=names, document=document, width=5, **settings)}
        config = type(config).model_validate(config.model_dump() | settings)
    slots = sum(config.knowledge.values())
    knowledge = torch.from_numpy(np.random.default_rng(7).integers(5, 20, (NUM_ITEMS, slots)))
    sizes = ModelSizes(num_users=50, num_entities=20, knowledge_VS=knowledge, features=features, documents=texts)
    return build_model(config, sizes, seed=seed)


def loss_of(model):
    task = build_task(NextItemConfig(loss={"kind": "bce" if model.config.kind == "mlp" else "full"}))
    torch.manual_seed(0)
    return task.loss(model, batch_of([4, 7, 3], draw=(0, 0, 0)))[0]


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("aggregate", AGGREGATES)
def test_an_untrained_model_with_features_is_the_same_without_to_the_bit(kind, aggregate):
    plain, other = model_of(kind), model_of(kind, features=tables((6, 9)), texts=documents(), aggregate=aggregate)
    theirs = other.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in plain.state_dict().items())
    assert any(name.startswith("features.") for name in theirs)
    for model in (plain.eval(), other.eval()):
        assert not model.training
    rows = torch.arange(NUM_ITEMS)
    assert torch.equal(plain.item_vectors(), other.item_vectors())
    assert torch.equal(plain.item_vectors(rows[7:19]), other.item_vectors(rows[7:19]))
    batch = batch_of([4, 7, 3])
    wanted = torch.arange(7) == batch.lengths[:, None] - 1
    hidden = [m(batch.items, batch.lengths, batch.users, wanted, causal=True) for m in (plain, other)]
    assert torch.equal(*hidden)
    assert torch.equal(plain.scores(hidden[0]), other.scores(hidden[1]))
    assert torch.equal(loss_of(plain.train()), loss_of(other.train()))


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("aggregate", AGGREGATES)
def test_training_reaches_every_part_of_the_features(kind, aggregate):
    model = model_of(kind, features=tables((6, 9)), texts=documents(), aggregate=aggregate)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    before = {name: tensor.clone() for name, tensor in model.named_parameters()}
    for _ in range(3):
        optimizer.zero_grad()
        loss_of(model.train()).backward()
        optimizer.step()
    named = [name for name in before if name.startswith("features.")]
    still = [name for name in named if torch.equal(before[name], model.get_parameter(name))]
    assert still == []
    groups = group_of(model, model.config)
    assert {groups[name] for name in named} == {"features"}
    assert groups_of(model.config)["features"] == ("features.",)


def test_aggregates_are_what_numpy_makes_of_the_same_numbers():
    features, width = tables((6, 9)), 8
    own = torch.from_numpy(np.random.default_rng(1).normal(size=(NUM_ITEMS, width)))
    for aggregate in AGGREGATES:
        config = ItemFeaturesConfig(encoders=("a", "b"), width=5, aggregate=aggregate)
        torch.manual_seed(0)
        module = Features(config, width, features).double()
        torch.nn.init.normal_(module.out.weight)
        w = {name: tensor.detach().numpy() for name, tensor in module.named_parameters()}
        parts = []
        for place, table in enumerate(features):
            lacks = ~table.has_V.numpy()
            lacks[:FIRST_INDEX] = False
            projected = table.vectors_VF.double().numpy() @ w[f"projections.{place}.weight"].T
            parts.append(projected + lacks[:, None] * w["missing"][place])
        mine = own.numpy()
        if aggregate == "concat":
            added = np.concatenate([mine, *parts], 1) @ w["out.weight"].T
        elif aggregate == "sum":
            added = sum(parts) @ w["out.weight"].T
        elif aggregate == "gate":
            gate = np.concatenate([mine, *parts], 1) @ w["gate.weight"].T + w["gate.bias"]
            added = np.concatenate(parts, 1) @ w["out.weight"].T / (1 + np.exp(-gate))
        else:
            query = mine @ w["query.weight"].T + w["query.bias"]
            exps = [np.exp((query * part).sum(1, keepdims=True) / np.sqrt(5)) for part in parts]
            mixed = sum(weight * part for weight, part in zip(exps, parts, strict=True)) / (1 + sum(exps))
            added = mixed @ w["out.weight"].T
        np.testing.assert_allclose(module(own, None).detach().numpy(), mine + added, atol=1e-12)


@pytest.mark.parametrize("aggregate", AGGREGATES)
def test_some_rows_are_those_of_all(aggregate):
    config = ItemFeaturesConfig(encoders=("a",), width=5, aggregate=aggregate)
    module = Features(config, 8, tables()).double()
    torch.nn.init.normal_(module.out.weight)
    own = torch.randn(NUM_ITEMS, 8, dtype=torch.float64)
    whole = module(own, None)
    few, many = torch.tensor([[7, 5], [9, 7]]), torch.arange(NUM_ITEMS).repeat(3, 1)
    torch.testing.assert_close(module(own[few], few), whole[few])
    torch.testing.assert_close(module(own[many], many), whole[many])  # looked up in the whole catalogue's


def test_what_stands_for_a_missing_vector():
    has = tables()[0].has_V
    lacking = [row for row in range(FIRST_INDEX, NUM_ITEMS) if not has[row]]
    learned = Features(ItemFeaturesConfig(encoders=("a",), width=5), 8, tables())
    zero = Features(ItemFeaturesConfig(encoders=("a",), width=5, missing="zero"), 8, tables())
    assert zero.missing is None
    found = learned.projected(None)[:, 0]
    for row in lacking:
        assert torch.equal(found[row], learned.missing[0])
        assert not zero.projected(None)[row].any()
    assert not found[:FIRST_INDEX].any()  # reserved rows lack nothing
    assert all(not torch.equal(found[row], learned.missing[0]) for row in range(NUM_ITEMS) if has[row])


def test_ids_are_left_out_in_training_alone():
    model = model_of("bert4rec", features=tables(), id_dropout=0.5)
    table = model.item_embedding.weight
    assert torch.equal(model.eval().own_vectors(table, None), table)
    torch.manual_seed(1)
    rows = torch.arange(FIRST_INDEX, NUM_ITEMS).repeat(100)
    dropped = ~model.train().own_vectors(table, rows).any(1)
    assert 0.45 < dropped.float().mean() < 0.55
    torch.manual_seed(1)
    assert torch.equal(dropped, ~kept_ids(rows, 0.5))  # of the step's seed: resume is exact


def test_a_document_is_what_numpy_makes_of_its_words():
    table, width, window = documents(), 5, 3
    torch.manual_seed(0)
    module = DocumentEncoder(table, width, window).double()
    w = {name: tensor.detach().numpy() for name, tensor in module.named_parameters()}
    vectors, found = table.vectors_UF.double().numpy(), module(None).detach().numpy()
    for row, words in enumerate(table.words_VL.numpy()):
        length = int((words != 0).sum())
        text = [np.zeros(4), *vectors[words], np.zeros(4)]
        places = [
            np.maximum(np.concatenate(text[at : at + window]) @ w["convolution.weight"].T + w["convolution.bias"], 0)
            for at in range(length)
        ]
        scores = [
            np.tanh(place @ w["attention.weight"].T + w["attention.bias"]) @ w["query.weight"][0] for place in places
        ]
        weights = np.exp(scores) / np.exp(scores).sum() if length else []
        expected = sum((weight * place for weight, place in zip(weights, places, strict=True)), np.zeros(width))
        np.testing.assert_allclose(found[row], expected, atol=1e-12)
    assert not found[::5].any()
    rows = torch.tensor([[7, 9], [12, 6]])
    torch.testing.assert_close(module(rows), module(None)[rows])


def test_reserved_rows_are_never_left_out():
    model = model_of("bert4rec", features=tables(), id_dropout=0.9).train()
    table = model.item_embedding.weight
    assert torch.equal(model.own_vectors(table, None)[:FIRST_INDEX], table[:FIRST_INDEX])
    rows = torch.arange(FIRST_INDEX).repeat(50)
    assert torch.equal(model.own_vectors(table, rows), table[rows])


def test_settings_that_go_together():
    with pytest.raises(ValueError, match="id_dropout: expected encoders whose vectors are left"):
        ItemFeaturesConfig(id_dropout=0.1)
    with pytest.raises(ValueError, match="expected each encoder once, found a, a"):
        ItemFeaturesConfig(encoders=("a", "a"))
    with pytest.raises(ValueError, match=r"expected columns of items .*, found 'plot'"):
        DocumentConfig(columns=("plot",))
    assert not any(config.features.given for config in NETWORKS.values())
