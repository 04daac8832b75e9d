"""Model folders without training: fresh weights, and an output bias that says how good the model is."""

from pathlib import Path

import numpy as np
import pytest
import torch

from etl import tables
from etl.tables import FIRST_INDEX
from trainer.config import FinetuneConfig
from trainer.data.catalogue import read_catalogue, read_knowledge
from trainer.data.release import pin, vocabulary_size
from trainer.data.sequences import SequenceDataset
from trainer.inference.model_folder import ModelParts, load_model, save_model
from trainer.models import ModelSizes, build_model

MODEL = {"width": 8, "blocks": 1, "max_length": 24, "user_width": 4, "knowledge_width": 4, "dropout": 0.0}


def popularity_of(lake, domain="target", split="last-5"):
    """[V] interactions in training parts, counted one by one."""
    release = pin(lake, None)
    catalogue = read_catalogue(release, domain)
    counts = np.zeros(len(catalogue), dtype=np.int64)
    sequences = SequenceDataset(release, split, domain).read_all()
    for start, length in zip(sequences.offsets, sequences.valid_start, strict=False):
        for item in sequences.items[start : start + length]:
            counts[catalogue.rows(np.array([item]))[0]] += 1
    return counts


def write_model(
    folder,
    lake,
    *,
    skill=0.0,
    domain="target",
    predicted=None,
    split="last-5",
    seed=0,
    transfer="none",
    poison=False,
    noise=1.0,
):
    """A model whose scores are `noise` plus `skill` times the popularity's logarithm. Returns its folder."""
    release = pin(lake, None)
    catalogue = read_catalogue(release, domain)
    config = FinetuneConfig.model_validate(
        {
            "name": Path(folder).name,
            "model": MODEL,
            "data": {"lake": lake, "domain": domain, "predicted": predicted, "split": split},
            "train": {"seed": seed},
            "transfer": transfer,
        }
    )
    knowledge = read_knowledge(release, catalogue, config.model.knowledge)
    popularity = popularity_of(lake, domain, split)
    model = build_model(
        config.model,
        ModelSizes(
            num_users=vocabulary_size(release, tables.USERS),
            num_entities=vocabulary_size(release, tables.ENTITIES),
            knowledge_VS=torch.from_numpy(knowledge),
        ),
        seed=seed,
    )
    weights = dict(model.state_dict())
    bias = noise * np.random.default_rng(seed).normal(size=len(catalogue)) + skill * np.log1p(popularity)
    bias[:FIRST_INDEX] = 0
    if poison:
        bias[-1] = np.nan
    weights["output_bias"] = torch.from_numpy(bias).float()
    save_model(
        Path(folder),
        ModelParts(
            config=config,
            release=release,
            catalogue=catalogue,
            popularity=popularity,
            knowledge=knowledge,
            weights=weights,
            metrics={"seconds": 10.0 + seed, "pretrain_seconds": 5.0, "validation/NDCG@10": 0.1},
            parent=None,
            users=release.read(tables.USERS, ["user", "index"]),
        ),
    )
    return str(folder)


def alike(scores, folder):
    """Equal to `scores` of a model of `write_model`, but for rounding of what they are sums of, where the bias is the
    largest: a sum itself may be near zero."""
    largest = load_model(Path(folder)).model.state_dict()["output_bias"].abs().max()
    return pytest.approx(scores, rel=0, abs=1e-5 * float(largest))
