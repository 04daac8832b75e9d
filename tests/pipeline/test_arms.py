"""The experiment on features: its plan, its slices beside plain loops, what it refuses, and, slowly, all of it."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from etl.settings import ConfigError, GraftrecError, load, replaced
from trainer.config import FinetuneConfig
from trainer.data.held_out import ReadOptions
from trainer.data.release import pin
from trainer.evaluation.item_prediction import Evaluation
from trainer.evaluation.scorers import EvaluationSet, Scorer, read_evaluation_set
from trainer.experiment import arms, arms_report, arms_results
from trainer.experiment.arms_plan import ArmsConfig, SliceConfig, experiment_of, placed_vectors
from trainer.experiment.command import movielens_in
from trainer.experiment.plan import planned, training_jobs
from trainer.recipes import training_jobs as training_jobs_recipe
from trainer.recipes.training_jobs import TrainingJob

MODEL = {"width": 8, "blocks": 1, "max_length": 24, "user_width": 0, "knowledge": {}}
TRAIN = {"epochs": 1, "min_epochs": 0, "batch_size": 16, "warmup_steps": 0}
FEATURES = {"text": {"encoders": ["text"], "width": 4}, "two": {"encoders": ["text", "graph"], "width": 4}}


def config(lake: str | Path, folder: Path, **more: Any) -> ArmsConfig:
    given = {"name": "tiny", "runs": str(folder), "lake": str(lake), "features": FEATURES, "seeds": [3, 4]}
    given |= {"preset": {"model": MODEL, "train": TRAIN, "task": {"kind": "next_item"}}}
    given |= {"slices": {"all": {}, "rare": {"items": [0, 9]}}, "tracking": {"system_metrics": False}}
    return ArmsConfig.model_validate(given | more)


# --- the plan


def test_arms_differ_in_their_features_alone(tmp_path: Path) -> None:
    given = config("lake", tmp_path, transfers=["none", "deep"])
    rows = planned(experiment_of(given, "last-5", "lake", 1), "lake", 1)
    names = ["none", "text.real", "text.shuffled", "two.real", "two.shuffled"]
    assert {row.id for row in rows} == {name + end for name in names for end in ("", "-deep")}
    bare = set()
    for row in rows:
        arm = row.id.removesuffix("-deep")
        for seed, training in row.trainings.items():
            assert isinstance(training.config, FinetuneConfig)
            assert (training.parent is None) == (row.transfer == "none")
            for each, domain in ((training, "target"), (training.parent, "source")):
                if each is None:
                    continue
                features = each.config.model.features
                assert features.encoders == {"none": (), "text": ("text",), "two": ("text", "graph")}[arm.split(".")[0]]
                assert features.shuffled == arm.endswith("shuffled")
                assert (each.config.train.seed, each.config.data.domain) == (seed, domain)
                plain = replaced(each.config.model, features=given.preset.model.features)
                same = {"model": plain, "name": "", "parent": None}
                bare.add((domain, seed, row.transfer, str({**dict(each.config), **same})))
    assert len(bare) == 2 * (1 + 2)  # of each seed: from scratch, the parent and what is made of it
    jobs = training_jobs(rows)
    assert len({job.folder for job in jobs}) == len(jobs) == 2 * 5 * 3


def test_features_of_users_are_arms_too(tmp_path: Path) -> None:
    network = MODEL | {"user_width": 4}
    preset = {"model": network, "train": TRAIN, "task": {"kind": "next_item"}}
    given = config("lake", tmp_path, preset=preset, features={}, user_features={"friends": {"encoders": ["walks"]}})
    rows = planned(experiment_of(given, "last-5", "lake", 1), "lake", 1)
    found = {row.id: row.trainings[3].config.model for row in rows}
    assert [found[f"friends.{arm}"].user_features.shuffled for arm in ("real", "shuffled")] == [False, True]
    assert {model.user_features.encoders for model in found.values()} == {(), ("walks",)}
    assert not any(model.features.given for model in found.values())


def test_models_of_users_who_are_new_in_the_target_read_all_domains(tmp_path: Path) -> None:
    preset = {"model": MODEL, "train": TRAIN, "task": {"kind": "next_item"}, "data": {"predicted": "target"}}
    given = config("lake", tmp_path, preset=preset, reads="all")
    experiment = experiment_of(given, "cold-users", "lake", 1)
    trained = [training.config.data for row in planned(experiment, "lake", 1) for training in row.trainings.values()]
    assert {(data.domain, data.predicted, data.split) for data in trained} == {("all", "target", "cold-users")}
    assert experiment.target == "target"  # evaluated
    with pytest.raises(ValueError, match=r"reads: expected transfers \[none\] beside it"):
        config("lake", tmp_path, preset=preset, reads="all", transfers=["none", "deep"])


def test_vectors_are_placed_in_the_lake_under_their_names(tmp_path: Path) -> None:
    vectors = {
        "people": {"attributes": {"relations": ["actor"]}},
        "graph": {"graph": {"data": {"release": 7}}},
        "late": {"graph": {"name": "graph", "data": {"events": "cold"}}},
        "friends": {"social": {"data": {"lake": "elsewhere"}}},
    }
    people, graph, late, friends = placed_vectors(config("there", tmp_path, vectors=vectors), "there")
    assert (people.name, people.lake, people.graph) == ("people", "there", None)
    assert graph.graph is not None
    assert late.graph is not None
    assert (graph.graph.name, graph.graph.data.lake, graph.graph.data.release) == ("graph", "there", None)
    assert (late.graph.name, late.graph.data.events) == ("graph", "cold")
    assert graph.graph.output != late.graph.output
    assert friends.social is not None
    assert (friends.social.name, friends.social.data.lake) == ("friends", "there")
    assert friends.social.output.startswith(graph.graph.output.removesuffix("graph"))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"features": {"text": {}}}, "features.text: expected encoders or a document, unshuffled, found none"),
        ({"features": {"none": FEATURES["text"]}}, "different names, none of them none, found none; name some"),
        ({"features": {}}, "found none at all"),
        ({"user_features": {"text": {"encoders": ["walks"]}}}, "found text; name some"),
        ({"features": {"text": {"encoders": ["text"], "shuffled": True}}}, "found shuffled ones"),
        ({"pairs": [["text", "kge"]]}, r"pairs: expected names in features \(text, two\), found 'kge'"),
        ({"slices": {"rare": {"items": [5, 2]}}}, r"items: expected \[least, most\], both 0 and more, found \[5, 2\]"),
        ({"seeds": [0]}, "at least 2 items"),
        ({"release": 1, "vectors": {"people": {}}}, "release: expected none beside vectors"),
        ({"preset": {"model": MODEL | {"features": FEATURES["text"]}}}, "move them to features"),
    ],
)
def test_settings_that_make_no_experiment_are_refused(tmp_path: Path, wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config("lake", tmp_path, **wrong)


# --- slices


@pytest.fixture(scope="module")
def examples(tiny_lake: str) -> EvaluationSet:
    return read_evaluation_set(pin(tiny_lake, 1), "last-5", "target", "test", ReadOptions(("full",)))


def made_up(examples: EvaluationSet, *labels: str, seeds: tuple[int, ...] = (3, 4)) -> Evaluation:
    """Ranks by chance, those of an example all different."""
    random = np.random.default_rng(0)
    shape = examples.held_out.targets.shape
    keys = [(label, seed) for label in labels for seed in seeds]
    ranks = {key: {"full": np.argsort(random.random((shape[0], 14)), axis=1)[:, : shape[1]] + 1} for key in keys}
    for by_protocol in ranks.values():
        by_protocol["full"][examples.held_out.targets < 0] = -1
    scorers = {key: Scorer(*key, lambda given: given, "", is_model=True) for key in keys}
    return Evaluation(scorers, examples, ranks, dict.fromkeys(keys, 0))


@pytest.mark.parametrize(("items", "users"), [((0, 9), (0, None)), ((10, None), (0, None)), ((0, 9), (4, 6))])
def test_a_slice_is_what_plain_loops_find(
    examples: EvaluationSet, items: tuple[int, int | None], users: tuple[int, int | None]
) -> None:
    results = made_up(examples, "none")
    one = arms_results.slice_of("some", SliceConfig(items=items, users=users), {"last-5": results}, "NDCG@10")
    found = one.matrix("none", [4])[0]
    expected, counts = [], examples.training_interactions
    for user, targets in enumerate(examples.held_out.targets.tolist()):
        ranks = results.ranks["none", 4]["full"][user].tolist()
        gains = []
        for target, rank in zip(targets, ranks, strict=True):
            if target < 0 or not items[0] <= counts[target] <= (items[1] or math.inf):
                continue
            alone = rank - sum(0 < other < rank for other in ranks)  # without the user's others above
            gains.append(1 / math.log2(alone + 1) if alone <= 10 else 0.0)
        if gains and users[0] <= examples.held_out.training_items[user] <= (users[1] or math.inf):
            expected.append(sum(gains) / len(gains))
    assert 2 < len(expected) <= len(examples.users)
    np.testing.assert_allclose(found, expected)


def test_claims_need_two_seeds_of_each_arm_and_pairs_compare_real_features(
    examples: EvaluationSet, tmp_path: Path
) -> None:
    given = config("lake", tmp_path, pairs=[["two", "text"]])
    results = made_up(examples, *given.arms)
    found = arms_results.collect(given, {"last-5": results})
    assert [(one.slice, one.features) for one in found.entries] == [
        (name, features) for name in ("all", "rare") for features in ("text", "two")
    ]
    gain = found.pairs[0].gain.gain
    assert gain == pytest.approx(found.entries[1].means["real"] - found.entries[0].means["real"])
    text, table = arms_report.text(found, given), arms_report.as_markdown(found, given)
    assert text.count("not shown") == table.count("not shown") == 4
    assert "all, from scratch: two isn't shown to differ from text" in text
    json.dumps(arms_report.as_json(found, given.level))
    fewer = {key: value for key, value in results.scorers.items() if key != ("two.shuffled", 4)}
    lacking = arms_results.collect(given, {"last-5": Evaluation(fewer, examples, results.ranks, results.broken)})
    assert [one.features for one in lacking.entries] == ["text", "text"]
    assert lacking.missing[0] == "all, two, from scratch: expected two seeds of each arm, found 1"


def test_a_slice_without_users_is_refused_by_name(examples: EvaluationSet) -> None:
    results = {"last-5": made_up(examples, "none")}
    with pytest.raises(
        ConfigError, match=r"slices.huge: expected two users at least, found 0 of \d+ in split 'last-5'"
    ):
        arms_results.slice_of("huge", SliceConfig(items=(10_000, None)), results, "NDCG@10")


def test_cold_items_need_a_split_that_has_some(examples: EvaluationSet) -> None:
    results = {"last-5": made_up(examples, "none")}
    with pytest.raises(
        ConfigError, match=r"slices.cold.protocol: expected one that split 'last-5' is ranked by \(full\)"
    ):
        arms_results.slice_of("cold", SliceConfig(protocol="cold"), results, "NDCG@10")


def test_draws_stand_side_by_side_and_seeds_are_those_of_all(examples: EvaluationSet) -> None:
    first, second = made_up(examples, "none"), made_up(examples, "none", seeds=(4, 5))
    draws = SliceConfig(split=("one", "two"))
    found = arms_results.slice_of("both", draws, {"one": first, "two": second}, "NDCG@10")
    assert found.seeds("none") == [4]
    alone = [
        arms_results.slice_of("one", SliceConfig(split="one"), {"one": results}, "NDCG@10").matrix("none", [4])
        for results in (first, second)
    ]
    assert np.array_equal(found.matrix("none", [4]), np.concatenate(alone, axis=1))
    with pytest.raises(ValueError, match="split: expected different ones, at least one, found one, one"):
        SliceConfig(split=("one", "one"))


# --- all of it


def test_where_all_trainings_fail_the_first_ones_reason_is_given(
    tiny_lake: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(trainings: list[TrainingJob], **_: Any) -> None:
        for job in trainings:
            job.failure = f"ended with 4; see {job.name}.log"

    monkeypatch.setattr(training_jobs_recipe, "run", fail)
    given = config(tiny_lake, tmp_path)
    expected = r"split last-5: expected a trained model, found none of 10: none-3: ended with 4; see none-3.log"
    with pytest.raises(GraftrecError, match=expected):
        arms._of_split(given, "last-5", pin(tiny_lake, 1), {}, [])


@pytest.mark.slow
def test_the_command_trains_each_arm_once_and_goes_on_where_it_was(
    tiny_lake: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_lake, tmp_path / "lake")
    given = config(
        tmp_path / "lake",
        tmp_path / "runs",
        vectors={"text": {"attributes": {"relations": ["director"]}, "max_shared": 1}},
        features={"text": FEATURES["text"]},
    )
    assert arms.run(given) == 0
    printed = capfd.readouterr().out
    assert "[6/6]" in printed
    assert "text.shuffled-4: validation" in printed
    found = json.loads((tmp_path / "runs" / "tiny" / "results.json").read_text())
    assert [(claim["slice"], claim["features"]) for claim in found["claims"]] == [("all", "text"), ("rare", "text")]
    assert set(found["baselines"]["rare"]) >= {"popularity", "item-to-item"}
    assert (tmp_path / "runs" / "tiny" / arms.PICTURE).read_bytes().startswith(b"\x89PNG")
    assert arms.run(given) == 0
    again = capfd.readouterr().out
    assert again.count("unchanged, validation") == 6
    assert "features item/text: unchanged" in again
    repeated = json.loads((tmp_path / "runs" / "tiny" / "results.json").read_text())
    assert repeated["claims"] == found["claims"]
    with pytest.raises(ConfigError, match=r"expected encoders of items in release 2 of .* \(text\), found 'graph'"):
        arms.run(config(tmp_path / "lake", tmp_path / "runs"))


def test_movielens_brings_knowledge_and_what_links_it_from_beside_its_folder(tmp_path: Path) -> None:
    for name in ("ml-1m/ratings.dat", "mkr-ml1m/kg.txt", "mkr-ml1m/item_index2entity_id.txt", "ml-1m/dbpedia.csv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    given = movielens_in(load(ArmsConfig, "arms/ml1m"), tmp_path / "ml-1m")
    assert given.etl is not None
    files = {file.name: file for file in given.etl.knowledge.files}
    assert {name: Path(file.path) for name, file in files.items()} == {
        "dbpedia": tmp_path / "ml-1m/dbpedia.csv",
        "mkr": tmp_path / "mkr-ml1m/kg.txt",
    }
    link = files["mkr"].link
    assert link is not None
    assert Path(link.path) == tmp_path / "mkr-ml1m/item_index2entity_id.txt"
    (tmp_path / "mkr-ml1m/item_index2entity_id.txt").unlink()  # triples without their link would be of no film
    without = movielens_in(load(ArmsConfig, "arms/ml1m"), tmp_path / "ml-1m")
    assert without.etl is not None
    assert [file.name for file in without.etl.knowledge.files] == ["dbpedia"]
