"""Several things told together: labels, losses by hand, weights, a planted pattern, evaluation, and refusals."""

import json

import numpy as np
import polars as pl
import pytest
import torch

from etl.settings import ConfigError
from etl.tables import CLS, FIRST_INDEX
from tests.fixtures.lakes import build_tiny_lake
from tests.fixtures.networks import NUM_ITEMS, batch_of, descend, model_of
from tests.fixtures.processes import trained_by
from tests.fixtures.trainings import TINY
from trainer.config import (
    Bert4RecConfig,
    CaserConfig,
    DataConfig,
    DupnConfig,
    EvaluateConfig,
    EvaluatedModel,
    FinetuneConfig,
    MlpConfig,
    MultiConfig,
    PeterRecConfig,
    PretrainConfig,
    WeightsHeadConfig,
)
from trainer.data.batch import Batch
from trainer.data.catalogue import read_catalogue
from trainer.data.held_out import ReadOptions, read_held_out
from trainer.data.loader import Loader
from trainer.data.release import pin
from trainer.data.sequences import SequenceDataset
from trainer.evaluation import event_prediction
from trainer.evaluation.scorers import EvaluateError
from trainer.inference.model_folder import ModelFolderError, load_model
from trainer.recipes.evaluate import run as evaluate
from trainer.recipes.finetune import run as finetune
from trainer.recipes.pretrain import run as pretrain
from trainer.tasks import Multi, multi
from trainer.tasks.multi import NOTHING, WEIGHTS

NETWORKS = {
    "dupn": DupnConfig(width=16, max_length=13, dropout=0.0, user_width=0),
    "bert4rec": Bert4RecConfig(width=16, blocks=1, heads=2, max_length=13, dropout=0.0, user_width=0, knowledge={}),
    "peterrec": PeterRecConfig(width=16, dilations=(1, 2), max_length=13, dropout=0.0),
    "caser": CaserConfig(width=16, max_length=13, dropout=0.0, user_width=3, knowledge={}),
}
SMALL = {"kind": "dupn", "width": 16, "max_length": 24, "user_width": 4, "dropout": 0.0}
TRAINED = {
    "batch_size": 16,
    "epochs": 8,
    "learning_rate": 0.02,
    "warmup_steps": 0,
    "min_epochs": 8,
    "checkpoint_seconds": 0,
}
TASK = {"kind": "multi", "tells": ["next_item", "category", "value"]}


def settings(kind, folder, lake, **more):
    given = {"data": {"lake": str(lake), "domain": "source"}, "model": SMALL, "task": TASK, "train": TRAINED}
    return kind.model_validate({**TINY, "output": str(folder / "runs"), **given, **more})


@pytest.fixture(scope="module")
def lake(tmp_path_factory):
    return build_tiny_lake(tmp_path_factory.mktemp("several") / "lake", num_users=150, described=True)


# --- values and classes ---------------------------------------------


def rows_of(lake, domain):
    return pl.read_delta(f"{lake}/sequences").filter((pl.col("split") == "last-5") & (pl.col("domain") == domain))


def test_values_lie_beside_items(lake):
    release = pin(lake, None)
    found = SequenceDataset(release, "last-5", "source", values=True).read_all()
    expected = {row["user"]: row["values"] for row in rows_of(lake, "source").to_dicts()}
    for place, user in enumerate(found.users):
        own = found.values[found.offsets[place] : found.offsets[place + 1]]
        np.testing.assert_array_equal(own, np.array([np.nan if v is None else v for v in expected[user]], np.float32))
    some = found.take(np.array([3, 1]))
    assert len(some.values) == len(some.items)
    assert not len(SequenceDataset(release, "last-5", "source").read_all().values)


def test_a_user_without_values_has_none(tiny_lake):
    found = SequenceDataset(pin(tiny_lake, None), "last-5", "source", values=True).read_all()
    assert len(found.values) == len(found.items)
    assert np.isnan(found.values).all()


def test_batches_hold_the_values_of_their_items(lake):
    release = pin(lake, None)
    catalogue = read_catalogue(release, "source")
    dataset = SequenceDataset(release, "last-5", "source", values=True)
    value_of = {
        (row["user"], item): value
        for row in rows_of(lake, "source").to_dicts()
        for item, value in zip(row["items"], row["values"], strict=True)
    }
    loader = Loader(dataset, catalogue, DataConfig(unknown_users=0.0), batch_size=16, max_length=6, seed=0)
    for batch in loader:
        for row, length in enumerate(batch.lengths.tolist()):
            for place in range(length):
                key = int(batch.users[row]), int(catalogue.global_index[batch.items[row, place]])
                found = batch.values[row, place].item()
                assert np.isnan(found) if value_of[key] is None else found == value_of[key]


def test_classes_are_first_categories_and_levels(lake):
    release = pin(lake, None)
    catalogue = read_catalogue(release, "source")
    config = MultiConfig.model_validate(TASK)
    dataset = SequenceDataset(release, "last-5", "source", values=True)
    found = multi.read_classes(release, catalogue, config, dataset)
    assert found.names == {"category": ("kind 0", "kind 1", "kind 2", "kind 3"), "value": ("2", "5")}
    categories = dict(pl.read_delta(f"{lake}/items").select("index", pl.col("categories").list.first()).iter_rows())
    for row in range(FIRST_INDEX, len(catalogue)):
        assert found.names["category"][found.class_V[row]] == categories[catalogue.global_index[row]]
    assert (found.class_V[:FIRST_INDEX] == NOTHING).all()
    held_out = read_held_out(release, "last-5", "source", catalogue, "test", ReadOptions(values=True))
    examples = {name: event_prediction.examples_of(held_out, found, name) for name in found.names}
    first = {
        r["user"]: (r["items"][r["test_start"]], r["values"][r["test_start"]])
        for r in rows_of(lake, "source").to_dicts()
    }
    for user, one in zip(examples["category"].histories.users, examples["category"].class_N, strict=True):
        assert categories[first[user][0]] == found.names["category"][one]
    valued = {user for user in held_out.users.tolist() if first[user][1] is not None}
    assert set(examples["value"].histories.users.tolist()) == valued
    for user, one in zip(examples["value"].histories.users, examples["value"].class_N, strict=True):
        assert f"{first[user][1]:g}" == found.names["value"][one]


def test_what_can_not_be_told_is_named(lake, tiny_lake):
    plain, described = pin(tiny_lake, None), pin(lake, None)

    def classes(release, tells, domain="source", **more):
        config = MultiConfig(tells=tells, **more)
        dataset = SequenceDataset(release, "last-5", domain, values="value" in tells)
        return multi.read_classes(release, read_catalogue(release, domain), config, dataset)

    with pytest.raises(ConfigError, match=r"tells category: expected items of two categories .* found source"):
        classes(plain, ("category",))
    with pytest.raises(ConfigError, match=r"tells value: expected events with two different values .* found 0"):
        classes(plain, ("value",))
    assert classes(described, ("value",), max_levels=2).names
    known = classes(described, ("value",))
    held_out = read_held_out(
        described, "last-5", "source", read_catalogue(described, "source"), "test", ReadOptions(values=True)
    )
    fewer = multi.Classes({"value": ("5",)}, known.class_V, known.levels_L[1:])
    with pytest.raises(ConfigError, match="found 2, which no training event has"):
        event_prediction.examples_of(held_out, fewer, "value")


def test_values_that_are_no_levels_are_refused(lake, monkeypatch):
    release = pin(lake, None)
    dataset = SequenceDataset(release, "last-5", "source", values=True)
    whole = dataset.read
    monkeypatch.setattr(dataset, "read", lambda groups: _priced(whole(groups)))
    config = MultiConfig(tells=("value",), max_levels=5)
    with pytest.raises(ConfigError, match=r"at most 5 different values .* a price is no level"):
        multi.read_classes(release, read_catalogue(release, "source"), config, dataset)


def _priced(sequences):
    sequences.values[:] = np.random.default_rng(0).random(len(sequences.values))
    return sequences


# --- the task ---------------------------------------------


def told(config, *, name="dupn"):
    model = model_of(NETWORKS[name], slots=0)
    torch.manual_seed(0)
    model.add_task_head("category", 3)
    model.add_task_head("value", 2)
    if config.weighting == "uncertainty":
        model.add_task_head(WEIGHTS, WeightsHeadConfig(losses=len(config.tells)))
    model.double()
    class_V = torch.arange(NUM_ITEMS) % 4 - 1  # a quarter has none
    class_V[:FIRST_INDEX] = NOTHING
    batch = batch_of([5, 11, 1])
    batch.values = torch.tensor([1.0, 3.0, torch.nan])[batch.items % 3]
    return model, Multi(config, class_V, torch.tensor([1.0, 3.0])), batch


def plain_losses(model, task, batch):
    """(summed loss, count) of each thing that is told, position by position."""
    found = {name: [0.0, 0] for name in ("next_item", "category", "value")}
    for row, length in enumerate(batch.lengths.tolist()):
        own = batch.items[row, :length].tolist()
        read = torch.tensor([[CLS, *own[:-1]]])
        every = torch.ones_like(read, dtype=torch.bool)
        hidden_TD = model(read, torch.tensor([length]), batch.users[row, None], every, causal=True)
        for place, item in enumerate(own):
            scores = {"next_item": model.scores(hidden_TD[place, None])[0, FIRST_INDEX:]}
            scores |= {name: model.task_heads[name](hidden_TD[place]) for name in ("category", "value")}
            value = batch.values[row, place].item()
            classes = {
                "next_item": item - FIRST_INDEX,
                "category": int(task.class_V[item]),
                "value": {1.0: 0, 3.0: 1}.get(value, NOTHING),
            }
            for name, one in classes.items():
                if one != NOTHING:
                    found[name][0] -= scores[name].log_softmax(0)[one].item()
                    found[name][1] += 1
    return found


@pytest.mark.parametrize("name", NETWORKS)
def test_losses_are_added_up(name):
    tells = ("next_item", "category", "value")
    model, task, batch = told(MultiConfig(tells=tells, weights={"category": 0.5, "value": 2.0}), name=name)
    expected = plain_losses(model, task, batch)
    loss, count = task.loss(model, batch)
    assert int(count) == 17
    assert 0 < expected["category"][1] < 17
    assert 0 < expected["value"][1] < 17
    weighed = expected["next_item"][0] + 0.5 * expected["category"][0] + 2 * expected["value"][0]
    assert loss.item() == pytest.approx(weighed)


def test_weights_are_learned_from_the_losses():
    tells = ("next_item", "category", "value")
    model, task, batch = told(MultiConfig(tells=tells, weighting="uncertainty"))
    expected = plain_losses(model, task, batch)
    with torch.no_grad():
        model.task_heads[WEIGHTS].log_variance[:] = torch.tensor([0.5, -1.0, 0.2])
    s = model.task_heads[WEIGHTS].log_variance
    loss, _ = task.loss(model, batch)
    by_hand = sum(
        np.exp(-s[place].item()) * expected[name][0] + s[place].item() / 2 * expected[name][1]
        for place, name in enumerate(tells)
    )
    assert loss.item() == pytest.approx(by_hand)
    loss.backward()
    assert (s.grad != 0).all()


def test_one_thing_alone_can_be_told():
    model, task, batch = told(MultiConfig(tells=("value",)))
    expected = plain_losses(model, task, batch)["value"]
    loss, count = task.loss(model, batch)
    assert (loss.item(), int(count)) == (pytest.approx(expected[0]), 17)


@pytest.mark.parametrize("name", NETWORKS)
def test_planted_patterns_are_found(name):
    """A category follows on the one before; a value is that of the user's first item's parity."""
    model = model_of(NETWORKS[name], slots=0).float().train()
    torch.manual_seed(0)
    model.add_task_head("category", 3)
    model.add_task_head("value", 2)
    class_V = (torch.arange(NUM_ITEMS) - FIRST_INDEX) % 3
    task = Multi(MultiConfig(tells=("category", "value")), class_V, torch.tensor([1.0, 2.0]))
    random, optimizer = np.random.default_rng(0), torch.optim.Adam(model.parameters(), lr=0.01)

    def users(step):
        start = random.integers(0, 3, 32)
        kinds = (start[:, None] + np.arange(6)) % 3
        items = torch.from_numpy(FIRST_INDEX + kinds + 3 * random.integers(0, 10, kinds.shape))
        values = 1.0 + (class_V[items].roll(1, 1) == 0)  # 2 behind an item of kind 0
        return Batch(items, torch.full((32,), 6), torch.zeros(32).long(), 32, slice(0, 32), (0, 0, step), values=values)

    for step in range(250):
        descend(task, model, users(step), optimizer)
    batch = users(0)
    hidden_BD = task.query(model.eval(), batch)
    last = class_V[batch.items[:, -1]]
    assert (model.task_heads["category"](hidden_BD).argmax(1) == (last + 1) % 3).float().mean() > 0.95
    assert (model.task_heads["value"](hidden_BD).argmax(1) == (last == 0)).float().mean() > 0.95


# --- trained, transferred, evaluated ---------------------------------------------


@pytest.fixture(scope="module")
def trained(lake, tmp_path_factory):
    """A parent that tells items and categories of the source; and models of the target's values, a new task."""
    folder = tmp_path_factory.mktemp("told")
    together = {"kind": "multi", "tells": ["next_item", "category"], "weighting": "uncertainty"}
    parent = pretrain(settings(PretrainConfig, folder, lake, name="parent", task=together)).model
    new = {"data": {"lake": str(lake), "domain": "target"}, "task": {"kind": "multi", "tells": ["value"]}}
    models = {"none": finetune(settings(FinetuneConfig, folder, lake, name="none", transfer="none", **new)).model}
    more = {"name": "deep", "transfer": "deep", "parent": str(parent)}
    models["deep"] = finetune(settings(FinetuneConfig, folder, lake, **more, **new)).model
    return folder, parent, models


def test_each_thing_is_validated_by_itself(trained):
    folder, parent, models = trained
    metrics = load_model(parent).metrics
    assert {"validation/NDCG@10", "validation/category/AUC", "validation/category/accuracy"} <= metrics.keys()
    history = json.loads((folder / "runs" / "deep" / "history.json").read_text())
    best = max(line["metrics"]["value/AUC"] for line in history)  # what early stopping watches
    assert load_model(models["deep"]).metrics["validation/value/AUC"] == best
    assert set(load_model(parent).model.task_heads) == {"category", WEIGHTS}
    assert set(load_model(models["deep"]).model.task_heads) == {"value"}
    account = json.loads((folder / "runs" / "deep" / "transfer.json").read_text())
    origins = {line["tensor"]: line["origin"] for line in account["tensors"]}
    assert origins["lstm.weight_hh_l0"] == "copied"
    assert origins["task_heads.value.weight"] == "new"


def test_a_model_that_tells_items_ranks_them_and_others_do_not(trained):
    _, parent, models = trained
    assert load_model(parent).scorer()
    with pytest.raises(
        ModelFolderError, match=r"expected a model that ranks items, found .* predicts a user's next events"
    ):
        load_model(models["deep"]).scorer()


def evaluated(tmp_path, models, name):
    config = EvaluateConfig(
        name=name,
        output=str(tmp_path),
        tracking={"enabled": False},
        runtime={"progress": False},
        models=tuple(EvaluatedModel(model=str(model), label=label) for label, model in models.items()),
        against="none",
    )
    return evaluate(config), config


def test_models_of_a_new_task_are_compared(trained, lake, tmp_path):
    report, config = evaluated(tmp_path, trained[2], "new")
    users = pl.read_parquet(report.folder / "users.parquet")
    labels = {"none", "deep", "shares of all", "the user's own past"}
    assert set(users["label"]) == labels == {row["label"] for row in report.rows}
    for label in labels:
        own = users.filter(pl.col("label") == label)
        loss = -np.log(own["probability"].to_numpy()).mean()
        row = next(r for r in report.rows if r["label"] == label and r["metric"] == "log loss")
        assert row["mean"] == pytest.approx(loss)
    # the user's past by hand: two levels, five events' worth of everybody's shares
    rows = rows_of(lake, "target").to_dicts()
    rows = [row for row in rows if row["test_start"] < row["end"]]
    everyone = [v for r in rows for v in r["values"][: r["valid_start"]] if v is not None]
    share = everyone.count(5.0) / len(everyone)
    past = users.filter(pl.col("label") == "the user's own past")
    for row in rows:
        own = past.filter(pl.col("user") == f"u{row['user'] - FIRST_INDEX:03d}")
        if len(own):
            before = [v for v in row["values"][: row["test_start"]] if v is not None]
            fives = (before.count(5.0) + 5 * share) / (len(before) + 5)
            assert own["probability"][0] == pytest.approx(fives if own["is"][0] == "5" else 1 - fives)
    assert "value · test · domain target" in report.text
    assert evaluate(config).skipped


def test_what_is_told_beside_items_follows_their_table(trained, tmp_path):
    report, _ = evaluated(tmp_path, {"none": trained[1]}, "together")
    assert {row["protocol"] for row in report.rows} >= {"full", "category"}
    assert report.text.index("full ranking") < report.text.index("category · test")
    own = [row for row in report.rows if row["protocol"] == "category" and row["metric"] == "AUC"]
    assert {row["label"] for row in own} == {"none", "shares of all", "the user's own past"}


def test_models_that_tell_other_things_are_not_compared(trained, tmp_path):
    with pytest.raises(EvaluateError, match="expected models that predict the same as"):
        evaluated(tmp_path, {"none": trained[2]["none"], "other": trained[1]}, "mixed")


def test_settings_that_make_no_sense_are_refused():
    for more, message in [
        ({"tells": ("category", "category")}, "expected each once"),
        ({"weights": {"value": 1.0}}, "expected names among next_item, category, found value"),
        ({"weights": {"category": -1.0}}, "none below 0"),
        ({"weights": {"category": 1.0}, "weighting": "uncertainty"}, "weights are of weighting fixed"),
    ]:
        with pytest.raises(ValueError, match=message):
            MultiConfig(**more)
    with pytest.raises(ValueError, match=r"expected a model of kind .*, found mlp"):
        PretrainConfig(model=MlpConfig(), task=MultiConfig())


@pytest.mark.slow
def test_two_processes_see_what_one_sees(lake, tmp_path):
    found = {}
    for processes in (1, 2):
        config = settings(
            PretrainConfig,
            tmp_path,
            lake,
            name=f"by{processes}",
            train={**TRAINED, "epochs": 2},
            task=TASK | {"weighting": "uncertainty"},
            runtime={"progress": False, "threads": 1, "precision": "fp64"},
        )
        found[processes] = trained_by(processes, config, tmp_path)
    for name, one in found[1].model.state_dict().items():
        torch.testing.assert_close(found[2].model.state_dict()[name], one)
