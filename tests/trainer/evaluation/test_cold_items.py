"""Cold items: ranked apart, never trained on, and what simple baselines say of them, by plain loops."""

import math

import numpy as np
import pytest
import torch

from etl.settings import ConfigError
from etl.tables import FIRST_INDEX
from tests.fixtures.cold_lakes import SPLIT, cold_rows_of, part_of, with_cold_items
from tests.fixtures.lake_rows import literal, rows_of
from tests.fixtures.trainings import tiny
from trainer.config import BaselinesConfig, EvaluateConfig, GateConfig, PretrainConfig
from trainer.data.cold_items import COLD, WARM
from trainer.data.events import Events
from trainer.data.held_out import FULL, ReadOptions
from trainer.data.release import pin
from trainer.evaluation.baselines import cold_items
from trainer.evaluation.evaluator import Question
from trainer.evaluation.item_prediction import ItemPrediction, evaluate_scorers
from trainer.evaluation.scorers import EvaluateError, Scorer, baseline_scorers, model_scorer, read_evaluation_set
from trainer.inference.model_folder import load_model
from trainer.inference.scorer import Scores
from trainer.models import ModelSizes, build_model
from trainer.recipes.pretrain import run as pretrain
from trainer.registry.gate_evidence import evidence_of
from trainer.ridge import PENALTIES

PROTOCOLS = ReadOptions((COLD, WARM, FULL))
TRAIN = {"epochs": 2, "min_epochs": 0, "learning_rate": 0.01, "weight_decay": 0}


@pytest.fixture(scope="module")
def lake(tiny_lake, tmp_path_factory):
    return with_cold_items(tiny_lake, tmp_path_factory.mktemp("cold") / "lake")


@pytest.fixture(scope="module")
def trained(lake, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    config = tiny(PretrainConfig, folder, lake, data={"domain": "target", "split": SPLIT}, train=TRAIN)
    return load_model(pretrain(config).model)


@pytest.fixture(scope="module")
def examples(lake):
    return read_evaluation_set(pin(lake, None), SPLIT, "target", "test", PROTOCOLS)


@pytest.mark.parametrize("part", ["validation", "test"])
def test_cold_and_warm_items_are_ranked_apart_and_together(lake, part):
    examples = read_evaluation_set(pin(lake, None), SPLIT, "target", part, PROTOCOLS)
    catalogue = examples.catalogue
    score_V = np.random.default_rng(0).permutation(len(catalogue)).astype(np.float32)
    scorer = Scorer("fixed", None, lambda given: Scores.of(torch.from_numpy(score_V).repeat(len(given), 1)), "nothing")
    found = evaluate_scorers([scorer], examples)
    row_of = {index: row for row, index in enumerate(catalogue.global_index.tolist())}
    is_warm = {row: part_of(catalogue.raw_ids[row]) == "train" for row in range(FIRST_INDEX, len(catalogue))}
    among = {
        COLD: cold_rows_of(catalogue, part),
        WARM: [row for row, warm in is_warm.items() if warm],
        FULL: list(is_warm),
    }
    assert all(among.values())
    expected = literal(lake, SPLIT, "target", part)
    rows = rows_of(lake, "sequences", split=SPLIT, domain="target")
    trained_on = {row["user"]: [row_of[item] for item in row["items"][: row["valid_start"]]] for row in rows}
    num_without = 0
    for place, user in enumerate(examples.users.tolist()):
        _, held_out, _ = expected[user]
        for protocol, rows in among.items():
            targets = [row_of[item] for item in held_out if row_of[item] in rows]
            ranked = sorted((row for row in rows if row not in trained_on[user]), key=lambda row: -score_V[row])[:10]
            gain = sum(1 / math.log2(2 + ranked.index(row)) for row in targets if row in ranked)
            ideal = sum(1 / math.log2(2 + place) for place in range(min(len(targets), 10)))
            value = found.metrics(("fixed", None), protocol)["NDCG@10"][place]
            num_without += not targets
            assert np.isnan(value) if not targets else value == pytest.approx(gain / ideal)
    assert num_without  # and they are left out of the means
    assert not np.isnan(found.averages(("fixed", None), COLD)["NDCG@10"])


def test_no_cold_item_is_input_or_counted(examples, lake):
    cold = {row for part in ("validation", "test") for row in cold_rows_of(examples.catalogue, part)}
    given = examples.held_out.histories
    assert len(given.items)
    assert not cold & set(given.items.tolist())
    everywhere = {item for item in examples.elsewhere.items.tolist()}
    assert everywhere
    assert all(part_of(examples.everything.raw_ids[row]) == "train" for row in everywhere)
    assert not examples.training_interactions[list(cold)].any()
    rows = sorted(cold)
    for scorer in baseline_scorers(examples, BaselinesConfig()):
        assert not scorer.score(given).whole()[:, rows].any(), scorer.label


def test_a_cold_item_takes_no_part_in_training(trained, examples):
    """Its vector is the one that was drawn, to the bit: it is no class of the loss either."""
    fresh = build_model(
        trained.config.model,
        ModelSizes(
            num_users=len(trained.model.user_embedding.weight),
            num_entities=len(trained.model.entity_embedding.weight),
            knowledge_VS=torch.from_numpy(trained.knowledge.copy()),
        ),
        seed=trained.config.train.seed,
    )
    cold = [row for part in ("validation", "test") for row in cold_rows_of(trained.catalogue, part)]
    warm = sorted(set(range(FIRST_INDEX, len(trained.catalogue))) - set(cold))
    own, drawn = trained.model.item_embedding.weight, fresh.item_embedding.weight
    assert torch.equal(own[cold], drawn[cold])
    assert (own[warm] != drawn[warm]).any(1).all()
    assert not trained.model.output_bias[cold].any()
    assert sorted(trained.model.untrained_V.nonzero()[:, 0].tolist()) == sorted(cold)


def test_permuting_what_is_held_out_leaves_the_model_as_it_is(tiny_lake, trained, tmp_path):
    other = with_cold_items(tiny_lake, tmp_path / "lake", permute=True)
    config = tiny(PretrainConfig, tmp_path, other, data={"domain": "target", "split": SPLIT}, train=TRAIN)
    again = load_model(pretrain(config).model)
    assert all(torch.equal(one, again.model.state_dict()[name]) for name, one in trained.model.state_dict().items())


def test_validation_goes_by_cold_validation_items(trained, examples, lake):
    validation = read_evaluation_set(pin(lake, None), SPLIT, "target", "validation", PROTOCOLS)
    found = evaluate_scorers([model_scorer(trained, validation)], validation)
    own = found.averages(next(iter(found.scorers)), COLD)["NDCG@10"]
    assert trained.metrics["validation/NDCG@10"] == pytest.approx(own, abs=1e-6)
    assert not set(cold_rows_of(examples.catalogue, "test")) & set(np.flatnonzero(validation.held_out.sets[COLD]))


def test_a_model_that_has_seen_cold_items_is_refused(lake, examples, tmp_path):
    config = tiny(PretrainConfig, tmp_path, lake, data={"domain": "target"}, train=TRAIN | {"epochs": 1})
    seen = load_model(pretrain(config).model)
    with pytest.raises(EvaluateError, match=r"seen no cold item of split 'cold-items', found \d+ of them"):
        model_scorer(seen, examples)


@pytest.mark.parametrize(
    ("split", "protocol", "message"),
    [("last-5", COLD, "no cold items"), (SPLIT, "uniform-100", "its negatives would all be warm")],
)
def test_protocols_that_a_split_has_not_are_refused(lake, split, protocol, message):
    with pytest.raises(ConfigError, match=message):
        read_evaluation_set(pin(lake, None), split, "target", "test", ReadOptions((protocol,)))


def test_a_split_with_cold_items_is_ranked_by_its_own_protocols(lake, trained):
    question = Question(EvaluateConfig(), [trained], pin(lake, None))
    assert ItemPrediction.read(question)[0].examples.held_out.protocols == (COLD, WARM, FULL)


def test_the_gate_sees_cold_items_and_rare_ones_apart(trained, examples):
    scorers = [model_scorer(trained, examples, label=label) for label in ("candidate", "from-scratch")]
    results = evaluate_scorers(scorers, examples)
    slices = {one.name: one for one in evidence_of(results, None, GateConfig(rare_item_interactions=25)).slices}
    counts, targets = examples.training_interactions, examples.held_out.targets
    cold = sum(any(row >= 0 and counts[row] == 0 for row in own) for own in targets)
    rare = sum(any(row >= 0 and 1 <= counts[row] <= 25 for row in own) for own in targets)
    assert rare > 0
    assert (len(slices["cold items"].version_C), len(slices["rare items"].version_C)) == (cold, rare)


# --- baselines ---------------------------------------------


def features_of(num_rows, width=6):
    random = np.random.default_rng(1)
    features = random.normal(size=(num_rows, width))
    features[:FIRST_INDEX] = 0
    return features


@pytest.mark.parametrize("width", [6, 50])  # less than rows, and more
def test_ridge_has_the_penalty_that_predicts_rows_left_out_best(width):
    random = np.random.default_rng(0)
    features, trained_V = features_of(40, width), np.arange(40) >= 10
    given = features @ random.normal(size=(width, 3)) + width**0.5 * random.normal(size=(40, 3))

    def fitted(rows, penalty):
        mean_x, mean_y = features[rows].mean(0), given[rows].mean(0)
        x = features[rows] - mean_x
        weights = np.linalg.solve(x.T @ x + penalty * np.eye(width), x.T @ (given[rows] - mean_y))
        return mean_y + (features - mean_x) @ weights

    rows = np.flatnonzero(trained_V)

    def error(penalty):
        return sum(((fitted(rows[rows != row], penalty)[row] - given[row]) ** 2).sum() for row in rows)

    best = min(PENALTIES, key=error)
    np.testing.assert_allclose(
        cold_items.FittedOnTrained(features, trained_V).predict(given), fitted(rows, best), atol=1e-9
    )
    assert PENALTIES[0] < best < PENALTIES[-1]


def test_content_neighbours_sum_cosines_with_the_history():
    features = features_of(20)
    unit = cold_items._unit_rows(features)
    histories = Events(np.array([7, 9]), np.array([0, 3, 3]), {"items": np.array([5, 8, 8])})
    found = cold_items.ContentNeighbours(unit).score(histories)

    def cosine(left, right):
        return features[left] @ features[right] / np.linalg.norm(features[left]) / np.linalg.norm(features[right])

    expected = [sum(cosine(item, row) for item in (5, 8, 8)) for row in range(FIRST_INDEX, 20)]
    np.testing.assert_allclose(found[0, FIRST_INDEX:], expected)
    assert not found[1].any()


def test_ridge_onto_factors_scores_cold_items_by_who_likes_what():
    """Two tastes, and a feature that says of which an item is."""
    random = np.random.default_rng(0)
    features = np.zeros((45, 2))
    features[np.arange(5, 45), np.arange(5, 45) % 2] = 1
    items = [random.choice(np.arange(5 + user % 2, 41, 2), 8, replace=False) for user in range(60)]
    training = Events(np.arange(60), np.arange(0, 481, 8), {"items": np.concatenate(items)})
    ridge = cold_items.FittedOnTrained(features, (np.arange(45) >= 5) & (np.arange(45) < 41))
    scores = cold_items.ridge_onto_factors(ridge, training, 45, num_factors=2).score(training)
    cold = scores[:, 41:]  # 41 and 43 are of the taste of even users
    assert (cold[::2, [0, 2]].amin(1) > cold[::2, [1, 3]].amax(1)).all()
    assert (cold[1::2, [1, 3]].amin(1) > cold[1::2, [0, 2]].amax(1)).all()


def test_predicted_popularity_is_the_same_for_all():
    features = np.zeros((25, 1))
    features[5:, 0] = np.arange(20)
    counts = np.zeros(25, np.int64)
    counts[5:20] = 10 + 3 * np.arange(15)
    found = cold_items.predicted_popularity(cold_items.FittedOnTrained(features, counts > 0), counts)
    assert (found[20:].diff() > 0).all()
    assert float(found[24]) == pytest.approx(10 + 3 * 19, rel=0.02)
