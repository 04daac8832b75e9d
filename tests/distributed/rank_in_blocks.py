"""Run by torchrun: validation metrics of a model whose table is shared out, and of the same one whole, to a file."""

import json
import os
import sys
from pathlib import Path

import numpy as np
import torch

from etl.tables import FIRST_INDEX
from trainer.config import Bert4RecConfig, MaskedItemConfig, RuntimeConfig
from trainer.data.events import Events
from trainer.data.held_out import FULL, HeldOut
from trainer.evaluation.item_prediction import validate
from trainer.inference import scorer
from trainer.inference.scorer import ModelScorer
from trainer.models import ModelSizes, RowTables, build_model
from trainer.parallel.distributed import ALONE, join, leave
from trainer.tasks import build_task

NUM_ITEMS, NUM_USERS = 300, 37


def held_out():
    random = np.random.default_rng(3)
    lengths = random.integers(1, 9, NUM_USERS)
    items = random.integers(FIRST_INDEX, NUM_ITEMS, lengths.sum())
    users = np.arange(NUM_USERS)
    histories = Events.of(users, np.concatenate([[0], np.cumsum(lengths)]), items, np.empty(0, dtype=np.int64))
    targets = random.integers(FIRST_INDEX, NUM_ITEMS, (NUM_USERS, 2))
    targets[:, 1] = np.where(targets[:, 1] == targets[:, 0], -1, targets[:, 1])
    return HeldOut(users, histories, targets, {}, (FULL,), NUM_ITEMS, lengths, np.empty(0, dtype=np.int64))


def model_of(world):
    knowledge = torch.from_numpy(np.random.default_rng(5).integers(0, 20, (NUM_ITEMS, 2)))
    config = Bert4RecConfig(width=8, blocks=1, max_length=12, user_width=4, knowledge_width=3, dropout=0.0)
    tables = RowTables(world)
    return build_model(
        config, ModelSizes(num_users=NUM_USERS, num_entities=20, knowledge_VS=knowledge), seed=1, tables=tables
    ).double()


def main():
    world = join(RuntimeConfig(precision="fp64", threads=1))
    scorer.SCORES_PER_BLOCK, scorer.ROWS_PER_BLOCK = 200, 100  # smaller than the catalogue
    task = build_task(MaskedItemConfig())
    blocks, columns = [], scorer.Scores.blocks

    def counted(self, first=0):
        for block in columns(self, first):
            blocks.append(block[0])
            yield block

    scorer.Scores.blocks = counted
    told = {
        "whole": validate(ModelScorer(model_of(ALONE), task), held_out(), ALONE, batch_size=8),
        "blocks": len(blocks),
        "shared_out": validate(ModelScorer(model_of(world), task), held_out(), world, batch_size=8),
    }
    (Path(sys.argv[1]) / f"{os.environ['RANK']}.json").write_text(json.dumps(told))
    leave()


main()
