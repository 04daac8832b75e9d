"""Row-wise tables and their optimiser, against dense gradients and a plain loop; settings that can't work together."""

import json
import math

import numpy as np
import pytest
import torch
from torch import nn

from etl.settings import ConfigError, load
from etl.tables import FIRST_INDEX, UNK
from trainer.config import Bert4RecConfig, LossConfig, MaskedItemConfig, NextItemConfig, PretrainConfig, TrainConfig
from trainer.data.batch import Batch
from trainer.inference.model_folder import load_model
from trainer.models import ModelSizes, RowTables, build_model
from trainer.models.row_table import BLOCK_ROWS, RowTable, interleave, take_rows
from trainer.parallel.distributed import ALONE, World
from trainer.recipes.pretrain import run as pretrain
from trainer.tasks import MaskedItem, NextItem
from trainer.training.loop import Training, train_step
from trainer.training.optimizer import Optimizer, row_wise_adagrad

NUM_ITEMS, NUM_USERS = FIRST_INDEX + 40, 30
CONFIG = Bert4RecConfig(blocks=1, width=8, heads=2, max_length=12, user_width=4, knowledge_width=3, dropout=0.0)
SAMPLED = MaskedItem(MaskedItemConfig(loss=LossConfig(kind="sampled", num_negatives=25)))


def part_of(rank, size):
    return World(rank, size, torch.device("cpu"), torch.float32, autocast=False)


def model_of(tables):
    knowledge = torch.from_numpy(np.random.default_rng(7).integers(UNK, 20, (NUM_ITEMS, 2)))
    model = build_model(
        CONFIG, ModelSizes(num_users=NUM_USERS, num_entities=20, knowledge_VS=knowledge), seed=0, tables=tables
    )
    return model.double()


def batch_of(draw=(0, 0, 0)):
    random = np.random.default_rng([1, *draw])
    items = torch.from_numpy(random.integers(FIRST_INDEX, NUM_ITEMS, (6, 10)))
    users = torch.from_numpy(random.integers(FIRST_INDEX, NUM_USERS, 6))
    return Batch(items, torch.full((6,), 10), users, 6, slice(0, 6), draw, 60)


def pair():
    """A row-wise model and a dense one with its weights."""
    rowwise, dense = model_of(RowTables(ALONE)), model_of(None)
    dense.load_state_dict(rowwise.state_dict())
    return rowwise, dense


def test_row_gradients_are_the_rows_of_the_dense_gradient():
    rowwise, dense = pair()
    losses = []
    for model in (rowwise, dense):
        loss, _ = SAMPLED.loss(model, batch_of())
        loss.backward()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-13)
    tables = rowwise.row_tables()
    whole = dict(dense.named_parameters())
    assert set(tables) == {"item_embedding.weight", "output_bias", "user_embedding.weight", "entity_embedding.weight"}
    gradients = rowwise.tables.gradients(list(tables.values()))
    for (name, table), (rows, gradient) in zip(tables.items(), gradients, strict=True):
        assert table.grad is None
        assert torch.equal(rows, rows.unique())
        spread = torch.zeros_like(table).index_add_(0, rows, gradient)
        torch.testing.assert_close(spread, whole[name].grad, rtol=1e-12, atol=1e-14, msg=name)
    assert all(len(rows) == 0 for rows, _ in rowwise.tables.gradients(list(tables.values()))), "each is handed out once"


def test_clipping_measures_all_gradients_together():
    rowwise, dense = pair()
    optimizer = Optimizer(rowwise, TrainConfig(table_optimizer="rowwise"), ALONE)
    for model in (rowwise, dense):
        SAMPLED.loss(model, batch_of())[0].backward()
    expected = float(nn.utils.clip_grad_norm_(dense.parameters(), 0.5))
    before = {name: table.detach().clone() for name, table in rowwise.row_tables().items()}
    assert optimizer.clip(0.5) == pytest.approx(expected, rel=1e-12)
    for name, parameter in dense.named_parameters():
        if name not in before:
            torch.testing.assert_close(rowwise.get_parameter(name).grad, parameter.grad, msg=name)
    optimizer.update(1e-3)
    rate = TrainConfig().table_learning_rate
    for name, table in rowwise.row_tables().items():
        gradient = dense.get_parameter(name).grad
        of_row = gradient.abs() if gradient.ndim == 1 else gradient.square().mean(1, keepdim=True).sqrt()
        step = torch.where(of_row > 0, rate * gradient / of_row.clamp(min=1e-300), 0)  # Adagrad's first is scale-free
        torch.testing.assert_close(table, before[name] - step, rtol=1e-4, atol=1e-9, msg=name)


@pytest.mark.parametrize("width", [None, 3])
def test_row_wise_adagrad_is_the_plain_loop(width):
    random = np.random.default_rng(0)
    shape = (9,) if width is None else (9, width)
    table, sums = random.normal(size=shape), np.zeros(9)
    fast, fast_sums = torch.from_numpy(table.copy()), torch.zeros(9, dtype=torch.float64)
    for _ in range(5):
        rows = np.sort(random.choice(9, 4, replace=False))
        gradient = random.normal(size=(4, *shape[1:]))
        row_wise_adagrad(fast, fast_sums, torch.from_numpy(rows), torch.from_numpy(gradient), 0.1)
        for row, slope in zip(rows, gradient, strict=True):
            sums[row] += np.mean(slope**2)
            table[row] -= 0.1 * slope / math.sqrt(sums[row])
    np.testing.assert_allclose(fast.numpy(), table, rtol=1e-8)
    np.testing.assert_allclose(fast_sums.numpy(), sums, rtol=1e-12)


def test_a_step_leaves_the_rows_alone_that_it_does_not_read():
    model = model_of(RowTables(ALONE))
    optimizer = Optimizer(model, TrainConfig(table_optimizer="rowwise"), ALONE)
    before = model.user_embedding.weight.detach().clone()
    batch = batch_of()
    SAMPLED.loss(model, batch)[0].backward()
    optimizer.clip(5.0)
    optimizer.update(1e-3)
    moved = (model.user_embedding.weight != before).any(1).nonzero()[:, 0]
    assert torch.equal(moved, batch.users.unique())


@pytest.mark.parametrize("size", [1, 2, 3, 7])
@pytest.mark.parametrize("num_rows", [7, 100, BLOCK_ROWS, 2 * BLOCK_ROWS + 5])
def test_a_table_begins_alike_on_any_number_of_processes(size, num_rows):
    def begun(rank, size):
        tables = RowTables(part_of(rank, size))
        table = RowTable(num_rows, 2, tables)
        tables.initialise(table, seed=[3, 1], std=0.5)
        return table.weight.detach()

    whole, together = begun(0, 1), torch.full((num_rows, 2), torch.nan)
    parts = [begun(rank, size) for rank in range(size)]
    interleave(together, parts)
    assert torch.equal(together, whole)
    for rank in range(4):  # and goes on on any other
        mine = torch.full((len(range(rank, num_rows, 4)), 2), torch.nan)
        take_rows(mine, parts, part_of(rank, 4))
        assert torch.equal(mine, whole[rank::4])


def test_a_table_begins_with_normals_cut_at_two_deviations():
    tables = RowTables(ALONE)
    table = RowTable(BLOCK_ROWS + 9, 8, tables)
    tables.initialise(table, seed=[0, 0], std=0.1)
    drawn = table.weight.detach()
    other = RowTable(BLOCK_ROWS + 9, 8, tables)
    tables.initialise(other, seed=[0, 1], std=0.1)
    assert drawn.abs().max() <= 0.2 + 1e-6
    assert drawn.std().item() == pytest.approx(0.1 * 0.8796, rel=0.01)  # of a normal cut at two deviations
    assert not torch.equal(drawn[:9], drawn[BLOCK_ROWS:])
    assert not torch.equal(drawn, other.weight)


def test_more_processes_than_rows_are_refused():
    with pytest.raises(ConfigError, match=r"shares tables out over 64 processes, .* only 45 rows; start fewer"):
        model_of(RowTables(part_of(63, 64)))


@pytest.mark.parametrize(
    ("loss", "train", "said"),
    [
        (
            {"kind": "full"},
            {"table_optimizer": "rowwise"},
            "set task.loss.kind=sampled, or train.table_optimizer=adamw",
        ),
        ({"kind": "sampled", "label_smoothing": 0.1}, {}, "label_smoothing is of the whole catalogue's softmax"),
    ],
)
def test_settings_that_can_not_work_together_are_refused(loss, train, said, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps({"task": {"kind": "masked_item", "loss": loss}, "train": train}))
    with pytest.raises(ConfigError, match=said) as error:
        load(PretrainConfig, str(path))
    assert "\n" not in str(error.value)


def trained(folder, lake, name, *, loss, **train):
    settings = {
        "name": name,
        "output": str(folder / "runs"),
        "data": {"lake": str(lake), "domain": "source"},
        "model": {"width": 16, "blocks": 1, "max_length": 24, "user_width": 4, "knowledge_width": 4},
        "task": {"kind": "masked_item", "loss": loss},
        "train": {"batch_size": 16, "warmup_steps": 0, "checkpoint_seconds": 600, **train},
        "runtime": {"progress": False, "device": "cpu", "precision": "fp32", "threads": 1},
        "tracking": {"enabled": False},
    }
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps(settings))
    return pretrain(load(PretrainConfig, str(path)))


class Steps:
    """Of a loader, what a step asks for."""

    num_steps = 1_000


@pytest.mark.parametrize(("table_optimizer", "kind"), [("adamw", "full"), ("adamw", "sampled"), ("rowwise", "sampled")])
def test_what_follows_what_is_learnt_from_few_rows_a_step_too(table_optimizer, kind):
    """Items follow each other in a hidden order of 150; the next one is to be first of all, for 9 of 10 histories."""
    torch.manual_seed(0)
    order = torch.from_numpy(FIRST_INDEX + np.random.default_rng(0).permutation(150))
    config = TrainConfig(table_optimizer=table_optimizer, learning_rate=5e-3, warmup_steps=0)
    model = build_model(
        CONFIG.model_copy(update={"width": 16, "user_width": 0}),
        ModelSizes(num_users=0, num_entities=0, knowledge_VS=torch.zeros(FIRST_INDEX + 150, 0)),
        seed=0,
        tables=RowTables(ALONE) if table_optimizer == "rowwise" else None,
    )
    task = NextItem(NextItemConfig(loss=LossConfig(kind=kind, num_negatives=32)))
    training = Training(model, task, Steps(), config, ALONE)

    def histories(step, length):
        starts = np.random.default_rng([2, step]).integers(0, 150, 32)
        items = order[torch.from_numpy(starts[:, None] + np.arange(length)) % 150]
        lengths, users = torch.full((32,), length), torch.full((32,), UNK)
        return Batch(items, lengths, users, 32, slice(0, 32), (0, 0, step), items.numel()), order[
            (starts + length) % 150
        ]

    for step in range(250):
        train_step(training, histories(step, 8)[0], stop=False)
    examples, following = histories(1_000, 5)
    with torch.inference_mode():
        scores = model.scores(task.query(model, examples))
    assert (scores[:, FIRST_INDEX:].argmax(1) + FIRST_INDEX == following).float().mean() > 0.9


@pytest.mark.parametrize("table_optimizer", ["adamw", "rowwise"])
def test_the_model_kept_is_the_best_epochs_not_the_last(table_optimizer, tmp_path, tiny_lake):
    settings = {"loss": {"kind": "sampled"}, "table_optimizer": table_optimizer, "learning_rate": 0.05}
    long = trained(tmp_path, tiny_lake, "long", epochs=12, min_epochs=12, **settings)
    best = int(long.metrics["best_epoch"])
    assert best < 12
    short = trained(tmp_path, tiny_lake, "short", epochs=best, min_epochs=best, **settings)
    weights = load_model(short.model).model.state_dict()
    for name, tensor in load_model(long.model).model.state_dict().items():
        assert torch.equal(tensor, weights[name]), name
