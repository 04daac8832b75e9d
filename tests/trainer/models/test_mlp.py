"""The shallow baseline: its network beside a plain one, what it knows of users, and what transfer gives it."""

import numpy as np
import pytest
import torch

from etl.tables import FIRST_INDEX, UNK
from tests.fixtures.networks import NUM_ITEMS, batch_of, descend, model_of
from tests.fixtures.trainings import tiny
from trainer.config import FinetuneConfig, LossConfig, MlpConfig, NextItemConfig, PretrainConfig
from trainer.data.batch import Batch
from trainer.inference.model_folder import load_model
from trainer.models import mlp
from trainer.recipes.finetune import run as finetune
from trainer.recipes.pretrain import run as pretrain
from trainer.tasks import NextItem

SMALL = MlpConfig(width=6, user_width=5, layers=(8, 4))
TASK = NextItem(NextItemConfig(loss=LossConfig(kind="bce", num_negatives=20)))


def plain_score(model, user, item):
    """One pair, both embeddings side by side through plain layers."""
    pair = torch.cat([model.user_embedding.weight[user], model.item_embedding.weight[item]])
    first = torch.cat([model.of_user.weight, model.of_item.weight], dim=1)
    x = first @ pair + model.of_user.bias
    for layer in model.layers:
        x = layer.weight @ x.clamp(min=0) + layer.bias
    return x[0] + model.output_bias[item]


@pytest.mark.parametrize("pairs", [1, 70, 1 << 18])
def test_scores_are_a_network_over_pairs(pairs, monkeypatch):
    monkeypatch.setattr(mlp, "PAIRS", pairs)
    model, batch = model_of(SMALL, slots=0), batch_of([5, 2, 7])
    torch.nn.init.normal_(model.output_bias, generator=torch.Generator().manual_seed(0))
    scores_BV = model.scores(TASK.query(model, batch))
    assert scores_BV.shape == (3, NUM_ITEMS)
    for row, user in enumerate(batch.users.tolist()):
        for item in (FIRST_INDEX, FIRST_INDEX + 7, NUM_ITEMS - 1):
            torch.testing.assert_close(scores_BV[row, item], plain_score(model, user, item))


def test_it_reads_no_history_and_an_unknown_user_is_everybody():
    model = model_of(SMALL, slots=0)
    batch, other = batch_of([5, 2]), batch_of([9, 1], seed=5)
    other.users = batch.users.clone()
    torch.testing.assert_close(TASK.query(model, batch), TASK.query(model, other))
    batch.users[:] = torch.tensor([UNK, 10_000])
    vectors = TASK.query(model, batch)
    torch.testing.assert_close(vectors[0], vectors[1])


def test_a_planted_pattern_is_found():
    """Users like items of one kind of three; each is seen with some of them, and scores all of them above others."""
    model, random = model_of(SMALL, slots=0).float().train(), np.random.default_rng(0)
    users = np.repeat(np.arange(FIRST_INDEX, FIRST_INDEX + 30), 4)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for step in range(150):
        items = FIRST_INDEX + users[:, None] % 3 + 3 * random.integers(0, 10, (len(users), 3))
        lengths = torch.full((len(users),), 3)
        batch = Batch(
            torch.from_numpy(items), lengths, torch.from_numpy(users), len(users), slice(0, len(users)), (0, 0, step)
        )
        descend(TASK, model, batch, optimizer)
    scores_BV = model.eval().scores(TASK.query(model, batch))[:, FIRST_INDEX : FIRST_INDEX + 30]
    best_BK = scores_BV.topk(10).indices
    assert (best_BK % 3 == torch.from_numpy(users % 3)[:, None]).float().mean() > 0.95


def test_shallow_transfer_begins_with_the_sources_users(tiny_lake, tmp_path):
    given = {
        "task": {"kind": "next_item", "loss": {"kind": "bce", "num_negatives": 20}},
        "model": {"kind": "mlp", "width": 6, "user_width": 5, "layers": [8, 4]},
    }

    def settings(kind, name, domain, **more):
        config = tiny(kind, tmp_path, tiny_lake, name=name, data={"domain": domain}, task=given["task"])
        update = {"model": MlpConfig.model_validate(given["model"]), **more}
        return config.model_copy(update=update)

    parent = pretrain(settings(PretrainConfig, "parent", "source")).model
    config = settings(FinetuneConfig, "child", "target", transfer="shallow", parent=str(parent))
    config = config.model_copy(update={"train": config.train.model_copy(update={"learning_rate": 1e-12})})
    child = finetune(config).model
    before, after = (load_model(folder).model.state_dict() for folder in (parent, child))
    torch.testing.assert_close(after["user_embedding.weight"], before["user_embedding.weight"])
    assert not torch.allclose(after["of_user.weight"], before["of_user.weight"])


def test_a_whole_catalogues_softmax_is_refused():
    with pytest.raises(ValueError, match=r"too dear for task\.loss\.kind full"):
        PretrainConfig(model=SMALL, task=NextItemConfig())
