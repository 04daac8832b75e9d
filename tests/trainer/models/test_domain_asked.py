"""The domain asked, as input: no change at first, what each position is told, and a joint model that reads it."""

import dataclasses

import pytest
import torch
from torch import nn

from etl.settings import ConfigError, replaced
from etl.tables import FIRST_INDEX
from tests.fixtures.networks import NUM_ITEMS, batch_of, model_of
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
)
from trainer.inference.model_folder import load_model
from trainer.models.time import EventInputs
from trainer.recipes import finetune, pretrain
from trainer.tasks import NextItem
from trainer.tasks.next_item import begun

BASE = {"width": 16, "max_length": 24, "dropout": 0.0, "user_width": 0, "knowledge": {}, "domain_asked": True}
NETWORKS = {
    "transformer": Bert4RecConfig(**BASE),
    "caser": CaserConfig(**BASE, horizontal=4, vertical=2),
    "dupn": DupnConfig(**BASE),
    "peterrec": PeterRecConfig(**BASE, dilations=(1, 2)),
}
EVEN = (torch.arange(NUM_ITEMS) >= FIRST_INDEX) & (torch.arange(NUM_ITEMS) % 2 == 0)
TASK = NextItem(NextItemConfig())


def asking(config):
    """A model that is asked for even rows, with weights as after training."""
    model = model_of(config)
    model.ask_for(EVEN)
    nn.init.normal_(model.asked["domain"].embedding, generator=torch.Generator().manual_seed(3))
    return model


@pytest.mark.parametrize("network", NETWORKS)
def test_untrained_it_changes_nothing(network):
    config = NETWORKS[network]
    model, without = model_of(config), model_of(replaced(config, domain_asked=False))
    model.ask_for(EVEN)
    batch = batch_of([9, 4, 0, 12])
    assert torch.equal(TASK.query(model, batch), TASK.query(without, batch))
    assert torch.equal(TASK.loss(model, batch)[0], TASK.loss(without, batch)[0])


def test_a_position_is_told_of_the_item_that_it_predicts():
    model, batch = asking(NETWORKS["transformer"]), batch_of([5, 2])
    _, events = begun(model, batch)
    assert torch.equal(events.asked_BT & batch.mask_BT, EVEN[batch.items] & batch.mask_BT)


@pytest.mark.parametrize("network", NETWORKS)
def test_an_answer_is_for_the_domain_that_is_asked(network):
    """The query is the hidden state of a position that an item of that domain follows in training."""
    model, batch = asking(NETWORKS[network]), batch_of([7, 7, 7])
    behind = torch.tensor([FIRST_INDEX + (FIRST_INDEX % 2), FIRST_INDEX + 1 - (FIRST_INDEX % 2), FIRST_INDEX])
    assert EVEN[behind].tolist() == [True, False, bool(EVEN[FIRST_INDEX])]
    longer = dataclasses.replace(batch, items=torch.cat([batch.items, behind[:, None]], 1), lengths=batch.lengths + 1)
    items_BT, events = begun(model, longer)
    last_BT = torch.zeros_like(items_BT, dtype=torch.bool)
    last_BT[:, -1] = True
    trained_BD = model(items_BT, longer.lengths, longer.users, last_BT, causal=True, events=events)
    asked_BD = TASK.query(model, batch)
    torch.testing.assert_close(trained_BD[0], asked_BD[0])
    assert (trained_BD[1] - asked_BD[1]).abs().max() > 1e-3


def test_an_item_that_came_after_training_is_of_no_domain():
    model, batch = asking(NETWORKS["transformer"]), batch_of([3])
    batch.items[0, 1] = NUM_ITEMS + 5
    _, events = begun(model, batch)
    assert not events.asked_BT[0, 1]


def test_rows_and_first_positions_are_taken_together():
    asked_BT = torch.tensor([[True, False, True], [False, False, True]])
    events = EventInputs(asked_BT=asked_BT)
    assert torch.equal(events.take(torch.tensor([1])).asked_BT, asked_BT[1:])
    assert torch.equal(events.until(2).asked_BT, asked_BT[:, :2])


PLAIN = {"user_width": 0, "knowledge": {}, "dropout": 0.0}
JOINT = {"domain": "all", "ranked": "target", "split": "joint-5"}


def test_a_joint_model_learns_which_domain_is_asked(tiny_lake, tmp_path):
    """Trained, loaded and grafted: the folder keeps the domain, an answer scores the target's items higher than where
    another domain is asked, and a child that predicts the target alone does without."""
    config = tiny(
        PretrainConfig,
        tmp_path,
        tiny_lake,
        name="joint",
        data=JOINT,
        task={"kind": "next_item"},
        model=PLAIN | {"domain_asked": True},
        train={"epochs": 6, "min_epochs": 6, "learning_rate": 0.01},
    )
    folder = pretrain.run(config).model
    joint = load_model(folder)
    among = joint.model.asked_V
    assert 0 < int(among.sum()) < len(among) - FIRST_INDEX
    batch = batch_of([0, 0])
    batch.items = torch.zeros(2, 0, dtype=torch.long)
    share = {}
    for asked in (True, False):
        if not asked:
            joint.model.asked["domain"].embedding.data = joint.model.asked["domain"].embedding.data.flip(0)
        scores_BV = joint.model.scores(joint.task.query(joint.model, batch)).double()
        share[asked] = scores_BV[0, FIRST_INDEX:].softmax(0)[among[FIRST_INDEX:]].sum().item()
    assert share[True] > share[False] + 0.1
    child = finetune.run(
        tiny(
            FinetuneConfig,
            tmp_path,
            tiny_lake,
            name="child",
            parent=str(folder),
            transfer="deep",
            data={"domain": "all", "predicted": "target", "split": "joint-5"},
            task={"kind": "next_item"},
            model=PLAIN,
        )
    )
    assert not [name for name, _ in load_model(child.model).model.named_parameters() if name.startswith("asked.")]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"data": {"domain": "all"}}, "data.ranked null"),
        ({"data": JOINT | {"predicted": "target"}}, "data.predicted target"),
        ({"data": JOINT, "task": {"kind": "masked_item"}}, "found masked_item"),
        ({"data": JOINT, "task": {"kind": "next_item", "targets": 2}}, "one target"),
    ],
)
def test_what_has_no_domain_to_ask_is_refused(more, message, tiny_lake, tmp_path):
    given = {"task": {"kind": "next_item"}, "model": PLAIN | {"domain_asked": True}} | more
    with pytest.raises(ConfigError, match=message):
        tiny(PretrainConfig, tmp_path, tiny_lake, **given)


def test_a_model_that_reads_no_sequence_is_refused():
    with pytest.raises(ValueError, match="reads a sequence"):
        MlpConfig(domain_asked=True)
