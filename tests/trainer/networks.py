"""Small networks and batches of random sequences, for tests of models and tasks."""

import numpy as np
import torch

from etl.tables import FIRST_INDEX, PAD, UNK
from trainer.data.batch import Batch
from trainer.models import ModelSizes, build_model

NUM_ITEMS = FIRST_INDEX + 30


def model_of(config, *, seed=0, slots=4):
    knowledge = torch.from_numpy(np.random.default_rng(7).integers(UNK, 20, (NUM_ITEMS, slots)))
    model = build_model(config, ModelSizes(num_users=50, num_entities=20, knowledge_VS=knowledge), seed=seed)
    return model.double().eval()


def batch_of(lengths, *, seed=0, draw=(0, 0, 0), width=None):
    random = np.random.default_rng(seed)
    lengths = torch.tensor(lengths)
    width = width or int(lengths.max())
    items = torch.from_numpy(random.integers(FIRST_INDEX, NUM_ITEMS, (len(lengths), width)))
    items[torch.arange(width) >= lengths[:, None]] = PAD
    users = torch.from_numpy(random.integers(FIRST_INDEX, 50, len(lengths)))
    return Batch(items, lengths, users, len(lengths), slice(0, len(lengths)), draw, int(lengths.sum()))


def descend(task, model, batch, optimizer):
    """One plain step of training; gives the loss a target."""
    loss, count = task.loss(model, batch)
    optimizer.zero_grad()
    (loss / count).backward()
    optimizer.step()
    return loss / count
