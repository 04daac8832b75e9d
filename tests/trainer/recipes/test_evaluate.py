"""Contenders, comparisons and the recipe, on the tiny lake and model folders whose skill is set by hand."""

import dataclasses
import json

import numpy as np
import polars as pl
import pytest
import torch

from etl.settings import ConfigError
from etl.tables import FIRST_INDEX, UNK
from tests.fixtures.folders import popularity_of, write_model
from tests.fixtures.lake_rows import literal, rows_of
from tests.fixtures.lakes import build_tiny_lake
from trainer.config import BaselinesConfig, EvaluateConfig, EvaluationConfig, MaskedItemConfig
from trainer.data.catalogue import Catalogue
from trainer.data.events import Events
from trainer.data.held_out import ReadOptions
from trainer.data.release import pin
from trainer.evaluation.baselines.names import FRIENDS, OF_COLD_ITEMS, PERSONAL_FREQUENCY
from trainer.evaluation.comparison import compare_table, gain_over
from trainer.evaluation.item_prediction import ItemPrediction, evaluate_scorers
from trainer.evaluation.ranking_metrics import means
from trainer.evaluation.scorers import (
    EvaluateError,
    Scorer,
    baseline_scorers,
    model_scorer,
    read_evaluation_set,
    rows_by_raw_id,
)
from trainer.evaluation.significance import compare, holm
from trainer.inference.model_folder import load_model
from trainer.inference.scorer import Scores
from trainer.recipes import evaluate

FAST = EvaluationConfig(protocols=("full", "uniform-100"))


@pytest.fixture(scope="module")
def examples(tiny_lake):
    return read_evaluation_set(pin(tiny_lake, None), "last-5", "target", "test", ReadOptions(FAST.protocols))


@pytest.fixture(scope="module")
def models(tiny_lake, tmp_path_factory):
    """none-0, none-1: noise; deep-0, deep-1: noise and popularity."""
    folder = tmp_path_factory.mktemp("models")
    return {
        f"{transfer}-{seed}": write_model(
            folder / f"{transfer}-{seed}", tiny_lake, skill=skill, seed=seed, transfer=transfer
        )
        for transfer, skill in (("none", 0.0), ("deep", 3.0))
        for seed in (0, 1)
    }


def fixed(label, seed, values, *, is_model=True):
    """A contender that gives every user the scores [V] `values`."""
    scores = torch.as_tensor(values, dtype=torch.float32)
    return Scorer(label, seed, lambda histories: Scores.of(scores.expand(len(histories), -1)), "nothing", is_model)


def noise(examples, seed):
    return np.random.default_rng(seed).normal(size=len(examples.catalogue))


# --- what contenders read ---------------------------------------------


def test_elsewhere_is_what_came_before_in_other_domains(tiny_lake, examples):
    held_out = literal(tiny_lake, "last-5", "target", "test")
    sequences = {row["user"]: row for row in rows_of(tiny_lake, "sequences", split="last-5", domain="all")}
    own = {row["user"]: row for row in rows_of(tiny_lake, "sequences", split="last-5", domain="target")}
    met = 0
    for n, user in enumerate(examples.users.tolist()):
        wanted = held_out[user][1]
        first = own[user]["times"][own[user]["items"].index(wanted[0])]
        row = sequences[user]
        pairs = zip(row["items"], row["times"], strict=True)
        expected = [item for item, time in pairs if time < first and item not in own[user]["items"]]
        found = examples.elsewhere.take(np.array([n]))
        assert examples.everything.global_index[found.items].tolist() == expected
        met += len(expected)
    assert met > 100


def test_training_elsewhere_is_the_other_domains_training_part(tiny_lake, examples):
    source = {row["user"]: row for row in rows_of(tiny_lake, "sequences", split="last-5", domain="source")}
    for n, user in enumerate(examples.users.tolist()):
        expected = source[user]["items"][: source[user]["valid_start"]]
        found = examples.training_elsewhere.take(np.array([n]))
        assert examples.everything.global_index[found.items].tolist() == expected


def test_raw_users_and_training_interactions(tiny_lake, examples):
    raw = {row["index"]: row["user"] for row in rows_of(tiny_lake, "users")}
    assert examples.raw_users == [raw[user] for user in examples.users.tolist()]
    assert examples.training_interactions.tolist() == popularity_of(tiny_lake).tolist()


def test_strangers_have_no_events():
    given = Events.of(np.array([3, 5]), np.array([0, 2, 3]), np.array([7, 8, 9]), np.empty(0, np.int64))
    found = given.of_users(np.array([1, 3, 4, 5, 9]))
    assert found.users.tolist() == [1, 3, 4, 5, 9]
    assert found.offsets.tolist() == [0, 0, 2, 2, 3, 3]
    assert found.items.tolist() == [7, 8, 9]


def cosine_scores(training, history, candidates):
    """Item-to-item by sets of users."""
    users = {}
    for user, items in training.items():
        for item in items:
            users.setdefault(item, set()).add(user)

    def similarity(a, b):
        left, right = users.get(a, set()), users.get(b, set())
        return len(left & right) / np.sqrt(len(left) * len(right)) if a != b and left and right else 0.0

    return [sum(similarity(candidate, item) for item in history) for candidate in candidates]


@pytest.mark.parametrize("everywhere", [False, True])
def test_item_to_item_is_the_sum_of_cosines_counted_by_hand(tiny_lake, examples, everywhere):
    label = "item-to-item, all domains" if everywhere else "item-to-item"
    (found,) = [c for c in baseline_scorers(examples, BaselinesConfig()) if c.label == label]
    training = {}
    for domain in ("target", "source") if everywhere else ("target",):
        for row in rows_of(tiny_lake, "sequences", split="last-5", domain=domain):
            training.setdefault(row["user"], []).extend(row["items"][: row["valid_start"]])
    times = {
        (row["user"], item): time
        for row in rows_of(tiny_lake, "sequences", split="last-5", domain="all")
        for item, time in zip(row["items"], row["times"], strict=True)
    }
    scores = found.score(examples.held_out.histories).whole()
    candidates = examples.catalogue.global_index[FIRST_INDEX:].tolist()
    for n in (0, 17, 53):
        user = int(examples.users[n])
        read = examples.catalogue.global_index[examples.held_out.histories.take(np.array([n])).items].tolist()
        if everywhere:
            other = examples.everything.global_index[examples.elsewhere.take(np.array([n])).items].tolist()
            read = sorted(read + other, key=lambda item: times[user, item])
        expected = cosine_scores(training, read[-5:], candidates)
        assert scores[n, FIRST_INDEX:].numpy() == pytest.approx(expected, abs=2e-6), "popularity breaks ties by 1e-6"


def test_popularity_is_the_training_parts_count(tiny_lake, examples):
    (popular,) = [c for c in baseline_scorers(examples, BaselinesConfig()) if c.label == "popularity"]
    assert popular.score(examples.held_out.histories).whole()[0].tolist() == popularity_of(tiny_lake).tolist()


def test_baselines_of_a_lone_domain_have_no_other_to_read(tiny_lake):
    every = read_evaluation_set(pin(tiny_lake, None), "last-5", "all", "test", ReadOptions())
    assert [c.label for c in baseline_scorers(every, BaselinesConfig())] == [
        "popularity",
        "item-to-item",
        "item-to-item, decayed",
        "transitions",
    ]


# --- models ---------------------------------------------


def test_model_is_scored_as_its_own_scorer_scores_it(examples, models):
    trained_model = load_model(models["deep-0"])
    scorer = model_scorer(trained_model, examples)
    assert (scorer.label, scorer.seed) == ("deep", 0)
    assert scorer.facts["seconds"] == 10.0
    histories = examples.held_out.histories
    rows = np.array([trained_model.users[raw] for raw in examples.raw_users])
    expected = trained_model.scorer().score(dataclasses.replace(histories, users=rows))
    assert torch.equal(scorer.score(histories).whole()[:, FIRST_INDEX:], expected[:, FIRST_INDEX:])


def test_model_meets_items_and_users_by_raw_id(examples, models):
    """The same model with its rows in another order, and its users under other numbers, scores the same."""
    trained_model = load_model(models["deep-0"])
    order = np.concatenate([np.arange(FIRST_INDEX), np.arange(len(trained_model.catalogue) - 1, FIRST_INDEX - 1, -1)])
    shuffled = load_model(models["deep-0"])
    with torch.no_grad():
        shuffled.model.item_embedding.weight.copy_(trained_model.model.item_embedding.weight[order])
        shuffled.model.output_bias.copy_(trained_model.model.output_bias[order])
        shuffled.model.knowledge_VS.copy_(trained_model.model.knowledge_VS[order])
    renamed = Catalogue(
        trained_model.catalogue.global_index,
        [trained_model.catalogue.raw_ids[row] for row in order],
        trained_model.catalogue.titles,
    )
    other = dataclasses.replace(shuffled, catalogue=renamed)
    histories = examples.held_out.histories
    scores = model_scorer(trained_model, examples).score(histories).whole()
    assert model_scorer(other, examples).score(histories).whole().numpy() == pytest.approx(scores.numpy(), abs=1e-6)


def test_model_that_lacks_items_ranks_them_last(examples, models):
    trained_model = load_model(models["deep-0"])
    lacking = dataclasses.replace(
        trained_model,
        catalogue=dataclasses.replace(
            trained_model.catalogue,
            raw_ids=[
                raw if n % 2 or n < FIRST_INDEX else f"gone{n}" for n, raw in enumerate(trained_model.catalogue.raw_ids)
            ],
        ),
    )
    scores = model_scorer(lacking, examples).score(examples.held_out.histories).whole()
    known = np.arange(FIRST_INDEX, len(examples.catalogue)) % 2 == 1
    assert torch.isneginf(scores[:, FIRST_INDEX:][:, ~known]).all()
    assert torch.isfinite(scores[:, FIRST_INDEX:][:, known]).all()


def test_model_without_a_user_table_is_scored_with_the_unknown_user(examples, models):
    without = load_model(models["deep-0"], users=False)
    scores = model_scorer(without, examples).score(examples.held_out.histories).whole()
    assert torch.isfinite(scores[:, FIRST_INDEX:]).all()


def test_rows_by_raw_id():
    own = Catalogue(np.arange(8), [""] * FIRST_INDEX + ["a", "b", "c"], [""] * 8)
    wanted = Catalogue(np.arange(8), [""] * FIRST_INDEX + ["c", "x", "a"], [""] * 8)
    assert rows_by_raw_id(own, wanted).tolist() == [0, 1, 2, 3, 4, FIRST_INDEX + 2, UNK, FIRST_INDEX]


def test_model_of_all_domains_reads_what_came_before_everywhere(tiny_lake, examples, tmp_path):
    folder = write_model(tmp_path / "joint", tiny_lake, domain="all", split="causal")
    trained_model = load_model(folder)
    met = {}

    class Watching:
        def scores(self, histories, candidates):
            for n, user in enumerate(histories.users.tolist()):
                met[user] = histories.items[histories.offsets[n] : histories.offsets[n + 1]].tolist()
            return Scores.of(torch.zeros(len(histories), len(candidates)))

    watched = dataclasses.replace(trained_model)
    object.__setattr__(watched, "scorer", lambda device: Watching())
    scorer = model_scorer(watched, examples, label="joint")
    scorer.score(examples.held_out.histories)
    sequences = {row["user"]: row for row in rows_of(tiny_lake, "sequences", split="last-5", domain="all")}
    held_out = literal(tiny_lake, "last-5", "target", "test")
    for user in examples.users.tolist():
        items = sequences[user]["items"]
        expected = items[: items.index(held_out[user][1][0])]
        assert trained_model.catalogue.global_index[met[user]].tolist() == expected
    assert "all domains" in scorer.reads


def test_model_trained_on_what_is_held_out_is_refused(tiny_lake, examples, tmp_path):
    folder = write_model(tmp_path / "leaky", tiny_lake, domain="all", split="last-5")
    held_out, leaked = literal(tiny_lake, "last-5", "target", "test"), 0
    for row in rows_of(tiny_lake, "sequences", split="last-5", domain="all"):
        trained = row["items"][: row["valid_start"]]
        leaked += sum(item in trained for item in held_out.get(row["user"], ((), ()))[1])
    assert leaked > 0
    with pytest.raises(EvaluateError, match=f"found {leaked} held-out interactions"):
        model_scorer(load_model(folder), examples)


def test_model_of_another_domain_is_refused(tiny_lake, examples, tmp_path):
    folder = write_model(tmp_path / "pre", tiny_lake, domain="source")
    with pytest.raises(EvaluateError, match="fine-tune it on the domain first"):
        model_scorer(load_model(folder), examples)
    nothing = model_scorer(load_model(folder), examples, must_know=False)
    evaluation = evaluate_scorers([nothing], examples)
    assert means(evaluation.metrics((nothing.label, 0), "full"))["NDCG@1"] == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scores_that_are_not_finite_are_counted(examples, value):
    scores = noise(examples, 0)
    scores[..., -1] = value
    evaluation = evaluate_scorers([fixed("m", 0, noise(examples, 0)), fixed("popularity", None, scores)], examples)
    assert evaluation.broken["m", 0] == 0
    assert evaluation.broken["popularity", None] > 0


def test_model_of_a_newer_release_is_refused(examples, models):
    newer = dataclasses.replace(load_model(models["none-0"]), release=2)
    with pytest.raises(EvaluateError, match="release at least as new as 2"):
        model_scorer(newer, examples)


# --- the comparison ---------------------------------------------


def test_matrix_and_gain_are_those_of_the_users(examples):
    values = [noise(examples, seed) for seed in range(4)]
    scorers = [fixed("none", 0, values[0]), fixed("none", 1, values[1])]
    scorers += [fixed("deep", 1, values[3]), fixed("deep", 0, values[2])]  # in another order
    evaluation = evaluate_scorers(scorers, examples, batch_size=13)
    ours = np.stack([evaluation.metrics(("deep", seed), "full")["NDCG@10"] for seed in (0, 1)])
    theirs = np.stack([evaluation.metrics(("none", seed), "full")["NDCG@10"] for seed in (0, 1)])
    gain, diff = gain_over(evaluation, "deep", "none", "full", "NDCG@10")
    expected = compare(ours, theirs)  # paired by seed, whatever the order
    assert vars(gain) == {name: pytest.approx(value) for name, value in vars(expected).items()}
    assert diff == pytest.approx((ours - theirs).mean(0))
    assert evaluation.matrix("deep", "full", "single/MRR", seeds=[0])[0] == pytest.approx(
        evaluation.metrics(("deep", 0), "full")["single/MRR"]
    )


def test_matrix_of_some_held_out_items_asks_about_them_alone(examples):
    evaluation = evaluate_scorers([fixed("m", 0, noise(examples, 0))], examples)
    only = np.zeros(examples.held_out.targets.shape, dtype=bool)
    only[:30, 1] = True
    found = evaluation.of_users(("m", 0), "full", "single/NDCG@10", only)
    assert np.isnan(found[30:]).all()
    ranks_UR = evaluation.ranks["m", 0]["full"]
    for n in range(30):
        alone = ranks_UR[n, 1] - sum(ranks_UR[n, other] < ranks_UR[n, 1] for other in (0, 2))
        assert found[n] == pytest.approx(1 / np.log2(alone + 1) if alone <= 10 else 0.0)


def test_table_adjusts_p_values_over_models_and_metrics(examples):
    scorers = [
        fixed(label, seed, noise(examples, hash_))
        for hash_, (label, seed) in enumerate((label, seed) for label in ("none", "shallow", "deep") for seed in (0, 1))
    ] + [fixed("popularity", None, noise(examples, 9), is_model=False)]
    evaluation = evaluate_scorers(scorers, examples)
    rows = compare_table(evaluation, against="none", protocols=("full",), metrics=("NDCG@10", "MRR"))
    tested = [row for row in rows if row.p_value is not None]
    assert [(row.label, row.metric) for row in tested] == [
        ("shallow", "NDCG@10"),
        ("deep", "NDCG@10"),
        ("shallow", "MRR"),
        ("deep", "MRR"),
    ]
    least = min(tested, key=lambda row: row.gain.p_value)
    assert least.p_value == pytest.approx(min(1.0, 4 * least.gain.p_value))
    for row in rows:
        assert row.mean == pytest.approx(evaluation.matrix(row.label, "full", row.metric).mean())
        assert (row.gain is None) == (row.label == "none")
    text = evaluation.text(rows, against="none")
    assert "Holm over 4 tests" in text
    assert all(len(line) < 160 for line in text.splitlines())


def test_the_candidates_gain_is_the_one_planned_test(examples):
    scorers = [
        fixed(label, seed, noise(examples, 2 * place + seed))
        for place, label in enumerate(("none", "shallow", "deep"))
        for seed in (0, 1)
    ] + [fixed("popularity", None, noise(examples, 9), is_model=False)]
    evaluation = evaluate_scorers(scorers, examples)
    protocols, metrics = ("full", "uniform-100"), ("NDCG@10", "MRR")
    plain = compare_table(evaluation, against="none", protocols=protocols, metrics=metrics)
    rows = compare_table(evaluation, against="none", protocols=protocols, metrics=metrics, candidate="deep")
    planned = [row for row in rows if row.planned]
    assert [(r.label, r.protocol, r.metric) for r in planned] == [("deep", "full", "NDCG@10")]
    assert planned[0].p_value == planned[0].gain.p_value
    for protocol in protocols:  # the others among themselves: three under the first protocol, four under the other
        others = [r for r in rows if r.protocol == protocol and r.p_value is not None and not r.planned]
        assert [r.p_value for r in others] == holm([r.gain.p_value for r in others])
        assert len(others) == (3 if protocol == "full" else 4)
    assert [r.p_value for r in rows if r.protocol == "uniform-100"] == [
        r.p_value for r in plain if r.protocol == "uniform-100"
    ]
    assert [r.gain for r in rows] == [r.gain for r in plain]
    assert not any(r.planned or r.is_candidate for r in plain)
    text = evaluation.text(rows, against="none")
    (note,) = [line for line in text.splitlines() if "planned test" in line]
    assert "* candidate, chosen on the validation part: its NDCG@10 is the one planned test, not adjusted" in note
    assert "Holm over 3 tests" in note
    assert next(line.split()[:2] for line in text.splitlines() if line.startswith("deep ")) == ["deep", "*"]
    alone = compare_table(evaluation, against="none", protocols=protocols, metrics=metrics, candidate="none")
    assert "* candidate, chosen on the validation part" in evaluation.text(alone, against="none")
    assert not any(row.planned for row in alone), "it is not compared with itself"


def test_models_that_share_no_seed_are_not_compared(examples):
    evaluation = evaluate_scorers(
        [fixed("none", 0, noise(examples, 0)), fixed("deep", 1, noise(examples, 1))], examples
    )
    with pytest.raises(EvaluateError, match="share a seed"):
        gain_over(evaluation, "deep", "none", "full", "NDCG@10")


def test_two_models_of_one_label_and_seed_are_refused(examples):
    twice = [fixed("deep", 0, noise(examples, 0)), fixed("deep", 0, noise(examples, 1))]
    with pytest.raises(EvaluateError, match="two of 'deep', seed 0"):
        evaluate_scorers(twice, examples)


def test_unknown_metric_names_the_known(examples):
    evaluation = evaluate_scorers([fixed("none", 0, noise(examples, 0))], examples)
    with pytest.raises(EvaluateError, match="NDCG@10"):
        evaluation.matrix("none", "full", "HR@10")


def test_scores_that_are_not_numbers_are_counted(examples):
    broken = noise(examples, 0)
    broken[FIRST_INDEX] = np.nan
    evaluation = evaluate_scorers([fixed("none", 0, broken)], examples)
    assert evaluation.broken["none", 0] == len(examples.users)


# --- the recipe ---------------------------------------------


def config(folder, models, **settings):
    given = {
        "output": str(folder),
        "models": [{"model": path} for path in models.values()],
        "runtime": {"progress": False, "device": "cpu"},
        "tracking": {"enabled": False},
    }
    return EvaluateConfig.model_validate(given | settings)


def test_run_writes_what_it_prints(tmp_path, models, capsys):
    report = evaluate.run(config(tmp_path, models))
    printed = capsys.readouterr().out
    assert report.text in printed
    assert not report.skipped
    folder = tmp_path / "evaluate-none-deep" / "evaluation"
    assert report.folder == folder
    assert (folder / "gains.png").read_bytes().startswith(b"\x89PNG")
    summary = json.loads((folder / "summary.json").read_text())
    users = pl.read_parquet(folder / "users.parquet")
    assert set(users["protocol"]) == {"full", "uniform-100", "popular-100"}
    assert set(users["label"]) > {"none", "deep", "popularity", "item-to-item", "item-to-item, all domains"}
    full = users.filter(pl.col("protocol") == "full", pl.col("convention") == "list")
    for row in summary["rows"]:
        if row["protocol"] == "full":
            own = full.filter(pl.col("label") == row["label"])
            assert own[row["metric"]].mean() == pytest.approx(row["mean"])
    deep = next(r for r in report.rows if (r["label"], r["protocol"], r["metric"]) == ("deep", "full", "NDCG@10"))
    assert deep["gain"]["gain"] > 0.05
    assert deep["num_seeds"] == 2
    assert (deep["seconds"], deep["pretrain_seconds"]) == (10.5, 5.0)
    assert full.filter(pl.col("label") == "none").height == 2 * 54


def test_run_again_is_skipped_until_something_changes(tmp_path, models, capsys):
    first = evaluate.run(config(tmp_path, models))
    again = evaluate.run(config(tmp_path, models))
    assert again.skipped
    assert again.text == first.text
    assert again.rows == json.loads(json.dumps(first.rows))
    assert "nothing has changed" in capsys.readouterr().out
    assert not evaluate.run(config(tmp_path, models, part="validation")).skipped


def test_run_without_a_name_leaves_other_evaluations_alone(tmp_path, models):
    first = evaluate.run(config(tmp_path, {}, model=models["deep-1"]))
    assert first.folder == tmp_path / "evaluate-deep-1" / "evaluation"
    several = evaluate.run(config(tmp_path, models))
    assert several.folder.parent.name == "evaluate-none-deep"
    part = evaluate.run(config(tmp_path, {}, model=models["deep-1"], part="validation"))
    assert part.folder.parent.name == "evaluate-deep-1-2", "another question about the same model"
    assert evaluate.run(config(tmp_path, {}, model=models["deep-1"])).skipped, "its own is found again"
    again = evaluate.run(config(tmp_path, {}, model=models["deep-1"], metrics=["MRR"]))
    assert (again.folder, again.skipped) == (first.folder, False), "the same, asked for another metric"


def test_run_refuses_a_candidate_that_is_no_label(tmp_path, models):
    with pytest.raises(ConfigError, match=r"candidate: expected a label of the models \(none, deep\), found 'patch'"):
        evaluate.run(config(tmp_path, models, candidate="patch"))


def test_baselines_have_the_names_that_are_listed(tiny_lake, examples):
    """What the gate accepts before training is what is scored later."""
    listed = ItemPrediction.metrics_of(MaskedItemConfig()).baselines
    scored = {scorer.label for scorer in baseline_scorers(examples, BaselinesConfig())}
    elsewhere = {PERSONAL_FREQUENCY, FRIENDS, *OF_COLD_ITEMS}  # where repeats, cold items, or friends are
    assert scored | elsewhere == set(listed)


def test_run_of_one_model_stands_beside_the_baselines(tmp_path, models):
    report = evaluate.run(config(tmp_path, {}, model=models["deep-1"]))
    assert {row["label"] for row in report.rows} > {"deep", "popularity"}
    assert all(row["gain"] is None for row in report.rows), "there is no from-scratch to gain over"


def test_run_without_a_model_says_how_to_give_one(tmp_path):
    with pytest.raises(ConfigError, match="--model FOLDER"):
        evaluate.run(config(tmp_path, {}))


def test_run_on_a_lake_of_its_own(tmp_path, models):
    """A model from one lake, asked about another's users: raw ids meet."""
    lake = build_tiny_lake(tmp_path / "other", num_users=30)
    report = evaluate.run(config(tmp_path, models, lake=lake, evaluation={"protocols": ["full"]}))
    assert json.loads((report.folder / "summary.json").read_text())["lake"] == lake
