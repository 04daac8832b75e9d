"""Users who are known in other domains and new in the target: how models and baselines are trained and scored there."""

import numpy as np
import pytest

from etl.settings import ConfigError
from etl.tables import FIRST_INDEX, cold_user_hash
from tests.fixtures.folders import write_model
from tests.fixtures.trainings import tiny
from trainer.config import BaselinesConfig, PretrainConfig
from trainer.data.catalogue import read_catalogue
from trainer.data.held_out import ReadOptions
from trainer.data.release import pin
from trainer.data.sequences import SequenceDataset
from trainer.evaluation.item_prediction import evaluate_scorers
from trainer.evaluation.ranking_metrics import means
from trainer.evaluation.scorers import EvaluateError, baseline_scorers, model_scorer, read_evaluation_set
from trainer.inference.model_folder import load_model
from trainer.recipes.pretrain import run as pretrain

FULL = ReadOptions(("full",))
READS_ALL = {"domain": "all", "predicted": "target", "split": "cold-users"}


@pytest.fixture(scope="module")
def examples(tiny_lake):
    return read_evaluation_set(pin(tiny_lake, None), "cold-users", "target", "test", FULL)


@pytest.fixture(scope="module")
def trained(tiny_lake, tmp_path_factory):
    return pretrain(tiny(PretrainConfig, tmp_path_factory.mktemp("cold"), tiny_lake, data=READS_ALL))


def whole_histories(lake):
    """user index -> [(item, time)] of all domains, in time order."""
    sequences = SequenceDataset(pin(lake, None), "last-5", "all").read_all(times=True)
    bounds = zip(sequences.users, sequences.offsets, sequences.offsets[1:], strict=False)
    return {int(u): list(zip(sequences.items[a:b], sequences.times[a:b], strict=True)) for u, a, b in bounds}


def test_held_out_is_the_whole_target_history_and_read_is_what_came_before(tiny_lake, examples):
    histories = whole_histories(tiny_lake)
    target = set(read_catalogue(examples.release, "target").global_index[FIRST_INDEX:].tolist())
    assert 5 <= len(examples.users) <= 20
    assert all(cold_user_hash(raw, "target") < 0.2 for raw in examples.raw_users)
    assert not examples.held_out.histories.lengths.any()
    for place, user in enumerate(examples.users):
        own = [item for item, _ in histories[int(user)] if item in target]
        held = examples.held_out.targets[place]
        assert examples.catalogue.global_index[held[held >= 0]].tolist() == own
        first = next(time for item, time in histories[int(user)] if item in target)
        elsewhere = examples.elsewhere.take(np.array([place])).items
        expected = [item for item, time in histories[int(user)] if time < first]
        assert examples.everything.global_index[elsewhere].tolist() == expected
        assert expected


def test_a_model_that_reads_the_target_alone_has_the_popular_items_to_say(tiny_lake, examples, tmp_path):
    """Also one whose own training counted what these users did."""
    for split in ("cold-users", "last-5"):
        trained_model = load_model(write_model(tmp_path / split, tiny_lake, split=split, seed=4))
        scorers = [
            model_scorer(trained_model, examples, label="target"),
            baseline_scorers(examples, BaselinesConfig())[0],
        ]
        evaluation = evaluate_scorers(scorers, examples)
        model, popular = (evaluation.metrics(key, "full") for key in evaluation.scorers)
        for name, values in popular.items():
            np.testing.assert_array_equal(model[name], values)


def test_a_model_is_asked_about_those_it_knows_something_of_and_no_others(tiny_lake, tmp_path):
    """One user of last-5 has items that the model lacks, all of them: it gets the popular ones, others the model's."""
    examples = read_evaluation_set(pin(tiny_lake, None), "last-5", "target", "test", FULL)
    trained_model = load_model(write_model(tmp_path / "model", tiny_lake, seed=4))
    lengths = examples.held_out.histories.lengths.copy()
    lengths[0] = 0
    given = examples.held_out.histories.until(lengths)
    scorer = model_scorer(trained_model, examples)
    scores = scorer.score(given).whole().numpy()
    np.testing.assert_array_equal(scores[0, FIRST_INDEX:], examples.training_interactions[FIRST_INDEX:])
    np.testing.assert_array_equal(scores[1:], scorer.score(examples.held_out.histories).whole().numpy()[1:])


def test_validation_is_what_evaluation_of_that_part_finds(trained, tiny_lake):
    examples = read_evaluation_set(pin(tiny_lake, None), "cold-users", "target", "validation", FULL)
    assert all(0.2 <= cold_user_hash(raw, "target") < 0.4 for raw in examples.raw_users)
    scorer = model_scorer(load_model(trained.model), examples, label="both")
    found = means(evaluate_scorers([scorer], examples).metrics(("both", 0), "full"))
    for metric in ("NDCG@10", "Recall@5", "MRR"):
        assert trained.metrics[f"validation/{metric}"] == pytest.approx(found[metric])


def test_a_model_that_has_seen_the_users_target_history_is_refused(tiny_lake, examples, tmp_path):
    data = READS_ALL | {"split": "joint-5"}
    seen = pretrain(tiny(PretrainConfig, tmp_path, tiny_lake, data=data))
    with pytest.raises(EvaluateError, match="expected a model that has not seen what it is asked"):
        model_scorer(load_model(seen.model), examples)


def test_training_needs_something_to_read_of_the_users_held_out(tiny_lake, tmp_path):
    data = {"domain": "target", "split": "cold-users"}
    with pytest.raises(ConfigError, match="read all domains") as error:
        pretrain(tiny(PretrainConfig, tmp_path, tiny_lake, data=data))
    assert "\n" not in str(error.value)
