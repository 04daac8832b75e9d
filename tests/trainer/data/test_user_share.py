"""A share of users is trained on: the same ones everywhere, and read as those of a table that holds no others."""

import numpy as np
import pytest
import torch

from tests.fixtures.trainings import tiny
from trainer.config import DataConfig, PretrainConfig
from trainer.data.baskets import BasketDataset
from trainer.data.catalogue import read_catalogue
from trainer.data.held_out import ReadOptions, read_held_out
from trainer.data.loader import Loader
from trainer.data.release import DataError, pin
from trainer.data.sequences import SequenceDataset
from trainer.inference.model_folder import load_model
from trainer.recipes import pretrain


def datasets(lake):
    release = pin(lake, None)
    return [
        SequenceDataset(release, "last-5", "source", times=True),
        SequenceDataset(release, "last-5", "target"),
        BasketDataset(release, "last-5", "target"),
    ]


def of_some(sequences, users):
    return sequences.take(np.flatnonzero(np.isin(sequences.users, users)))


def test_a_share_is_read_as_a_table_of_its_users_alone(tiny_lake):
    for whole in datasets(tiny_lake):
        few, everybody = whole.sample_users(0.4), whole.read_all()
        expected, found = of_some(everybody, few.read_all().users), few.read_all()
        assert 0 < len(found) == few.num_rows < whole.num_rows
        for name in ("users", "offsets", "items", "times", "valid_start", "test_start", "end"):
            assert np.array_equal(getattr(found, name), getattr(expected, name)), name
        assert whole.num_rows == len(whole.read_all())  # as it was


def test_users_are_the_same_in_every_table_and_among_those_of_a_larger_share(tiny_lake):
    few, more = ([d.sample_users(share).read_all().users for d in datasets(tiny_lake)] for share in (0.3, 0.6))
    for own, larger, whole in zip(few, more, datasets(tiny_lake), strict=True):
        everybody = whole.read_all().users
        assert set(own) < set(larger) < set(everybody)
        assert set(own) == set(few[0]) & set(everybody) or not set(everybody) <= set(
            datasets(tiny_lake)[0].read_all().users
        )


def test_batches_hold_those_users_and_no_others(tiny_lake):
    release = pin(tiny_lake, None)
    few = SequenceDataset(release, "last-5", "source").sample_users(0.3)
    config = DataConfig(lake=str(tiny_lake), unknown_users=0)
    loader = Loader(few, read_catalogue(release, "source"), config, batch_size=4, max_length=10, seed=0)
    seen = torch.cat([batch.users for batch in loader]).tolist()
    assert sorted(seen) == sorted(few.read_all().users.tolist())
    assert loader.num_steps == -(-few.num_rows // 4)


def test_a_share_of_nobody_is_refused(tiny_lake):
    with pytest.raises(DataError, match=r"data\.user_share"):
        datasets(tiny_lake)[0].sample_users(1e-9)


def test_training_sees_the_share_and_validation_everybody(tiny_lake, tmp_path):
    config = tiny(PretrainConfig, tmp_path, tiny_lake, name="few", data={"user_share": 0.4})
    model = load_model(pretrain.run(config).model)
    release = pin(tiny_lake, None)
    few = SequenceDataset(release, "last-5", "source").sample_users(0.4).read_all()
    trained = few.items[few.positions < few.valid_start[few.owners]]
    assert model.popularity.sum() == len(trained)
    options = ReadOptions()
    validated = read_held_out(release, "last-5", "source", model.catalogue, "validation", options)
    users = set(validated.users.tolist())
    assert len(users - set(few.users.tolist())) > 0
