"""The judge of an experiment, against scipy and by hand, on grids whose truth is known."""

import itertools
import json

import numpy as np
import pytest
from scipy import stats as scipy_stats

from etl.settings import load
from tests.fixtures.worlds import LENGTHS, World, grid, row, survey_was_right
from trainer.experiment.plan import ExperimentConfig
from trainer.report import survey
from trainer.report.hypotheses import HYPOTHESES, OF_CAPACITY, HypothesisError, in_survey, judge
from trainer.report.survey import row_id

ONE = {"protocols": ["full"], "conventions": ["list"], "metric": "NDCG@10"}


def by_name(judged):
    return {hypothesis["name"]: hypothesis for hypothesis in judged["hypotheses"]}


def test_the_surveys_observations_are_found_where_they_are_true_and_turn_round_with_the_world():
    rows = grid()
    told = judge(rows, World(rows, survey_was_right), LENGTHS, **ONE)
    assert {h["name"]: h["verdict"] for h in told["hypotheses"]} == {h.name: "supported" for h in HYPOTHESES}
    turned = judge(rows, World(rows, lambda one: -survey_was_right(one)), LENGTHS, **ONE)
    assert {h["verdict"] for h in turned["hypotheses"]} == {"reversed"}
    assert by_name(told)["bert4rec-transfer"]["gain"] == pytest.approx(0.03, abs=0.01)
    assert by_name(told)["bert4rec-knowledge"]["num_pairs"] == 4
    assert by_name(told)["caser-pretraining"]["num_pairs"] == 8


def test_a_world_without_differences_seldom_has_findings():
    rows = grid()
    found = 0
    for random in range(20):
        judged = judge(rows, World(rows, random=random, luck=0.01, num_users=26), LENGTHS[:26], **ONE)
        found += any(h["verdict"] != "not supported" for h in judged["hypotheses"])
    assert found <= 4, "at most 5 % of families of hypotheses, give or take"


def test_with_one_seed_every_number_is_that_of_scipys_paired_t_test():
    rows = grid(seeds=(7,))
    world = World(rows, survey_was_right)
    judged = judge(rows, world, LENGTHS, **ONE)
    assert len(judged["comparisons"]) == 16
    for one in judged["comparisons"]:
        ours, theirs = world.values[one["row"]][0], world.values[one["against"]][0]
        expected = scipy_stats.ttest_rel(ours, theirs)
        interval = expected.confidence_interval()
        assert one["p_value"] == pytest.approx(expected.pvalue)
        assert (one["low"], one["high"]) == pytest.approx((interval.low, interval.high))
        assert one["gain"] == pytest.approx(ours.mean() - theirs.mean())
        assert one["relative_gain"] == pytest.approx(ours.mean() / theirs.mean() - 1)
        assert one["bootstrap"][0] == pytest.approx(one["low"], abs=0.004)
        assert one["num_seeds"] == 1
    for one in judged["hypotheses"]:
        diffs = [world.values[single["row"]][0] - world.values[single["against"]][0] for single in one["rows"]]
        expected = scipy_stats.ttest_1samp(np.mean(diffs, axis=0), 0)
        assert one["p_value"] == pytest.approx(expected.pvalue)
        assert [single["gain"] for single in one["rows"]] == pytest.approx([diff.mean() for diff in diffs])
        assert one["gain"] == pytest.approx(np.mean([diff.mean() for diff in diffs]))


def test_p_values_are_adjusted_within_a_protocol_and_convention():
    rows = grid(seeds=(1, 2))
    world = World(rows, lambda one: 0.02 * survey_was_right(one))
    judged = judge(
        rows, world, LENGTHS, protocols=["full", "uniform-100"], conventions=["list", "single"], metric="MRR"
    )
    for table, size in (("comparisons", 16), ("hypotheses", len(HYPOTHESES))):
        for place in itertools.product(("full", "uniform-100"), ("list", "single")):
            group = [one for one in judged[table] if (one["protocol"], one["convention"]) == place]
            raw = sorted(one["p_value"] for one in group)
            by_hand = [max(min(1, (size - j) * raw[j]) for j in range(i + 1)) for i in range(size)]
            assert sorted(one["p_holm"] for one in group) == pytest.approx(by_hand)
    assert len(set(world.examples)) == len(world.examples) == 20 * 4, "each row is asked for its metric once"


def test_a_missing_row_is_a_hole_with_its_reason_and_the_rest_is_judged():
    rows = grid()
    gone = row_id("bert4rec", "deep", "masked_item", True)
    world = World(rows, survey_was_right)
    del world.values[gone]  # asking for it would fail
    holed = [one | {"status": "missing", "reason": "loss became NaN"} if one["id"] == gone else one for one in rows]
    judged = judge(holed, world, LENGTHS, **ONE)
    assert gone not in {one["row"] for one in judged["comparisons"] + judged["slices"]}
    helps = by_name(judged)["bert4rec-pretraining"]
    (hole,) = [single for single in helps["rows"] if single["gain"] is None]
    assert hole["reason"] == f"{gone}: loss became NaN"
    assert helps["num_pairs"] == 7
    present = [single["gain"] for single in helps["rows"] if single["gain"] is not None]
    assert helps["gain"] == pytest.approx(np.mean(present))
    assert helps["verdict"] == "supported"


def test_a_model_without_a_row_that_is_done_is_unknown_and_one_without_any_is_not_judged():
    rows = grid(models=("bert4rec",))
    alone = by_name(judge(rows, World(rows, survey_was_right), LENGTHS, **ONE))
    assert {name.split("-")[0] for name in alone} == {"bert4rec"}
    both = [*rows, *(one | {"status": "missing", "reason": "no room"} for one in grid(models=("caser",)))]
    judged = by_name(judge(both, World(rows, survey_was_right), LENGTHS, **ONE))
    assert {name for name, one in judged.items() if one["verdict"] == "unknown"} == {
        "caser-pretraining",
        "caser-transfer",
        "caser-task",
    }
    caser = judged["caser-task"]
    assert caser["gain"] is caser["p_value"] is caser["p_holm"] is None
    assert caser["rows"][0]["reason"].endswith("no room")
    gone = "bert4rec/deep/next_item/plain"
    partly = by_name(judge([one for one in rows if one["id"] != gone], World(rows, survey_was_right), LENGTHS, **ONE))
    reasons = [one["reason"] for one in partly["bert4rec-pretraining"]["rows"] if one["gain"] is None]
    assert reasons == [f"{gone}: not in this experiment"]
    json.dumps(judged, allow_nan=False)


def test_a_missing_from_scratch_row_leaves_no_gain_of_its_rows():
    rows = [one for one in grid(models=("caser",)) if one["transfer"] != "none" or one["knowledge"]]
    judged = judge(rows, World(rows), LENGTHS, **ONE)
    assert {one["against"] for one in judged["comparisons"]} == {"caser/none/-/knowledge"}
    assert {one["row"].split("/")[-1] for one in judged["comparisons"]} == {"knowledge"}
    plain = [one for one in judged["slices"] if one["row"].endswith("plain")]
    assert plain
    assert all(one["gain"] is None for one in plain), "means can be told, gains can't"


def test_seeds_are_paired_by_their_number():
    rows = [row("caser", seeds=(1, 2, 3)), row("caser", "deep", "next_item", seeds=(3, 1))]
    world = World(rows)
    (comparison,) = judge(rows, world, LENGTHS, **ONE)["comparisons"]
    scratch, deep = world.values[rows[0]["id"]], world.values[rows[1]["id"]]
    assert comparison["gain"] == pytest.approx((deep - scratch[[2, 0]]).mean())
    assert comparison["num_seeds"] == 2


def test_rows_without_a_common_seed_are_not_compared():
    rows = [row("caser", seeds=(1,)), row("caser", "deep", "next_item", seeds=(2,))]
    judged = judge(rows, World(rows), LENGTHS, **ONE)
    assert judged["comparisons"] == []
    singles = by_name(judged)["caser-pretraining"]["rows"]
    assert [one["reason"] for one in singles if one["row"] == rows[1]["id"]] == [
        "caser/deep/next_item/plain and caser/none/-/plain share no seed"
    ]


def test_users_who_hold_nothing_out_are_left_out():
    rows = grid(models=("bert4rec",))
    world = World(rows, survey_was_right)
    for values in world.values.values():
        values[:, :9] = np.nan
    judged = judge(rows, world, LENGTHS, **ONE)
    assert {one["num_users"] for one in judged["comparisons"]} == {len(LENGTHS) - 9}
    users = {one["slice"]: one["users"] for one in judged["slices"]}
    assert sum(users.values()) == len(LENGTHS) - 9
    json.dumps(judged, allow_nan=False)


def test_extra_and_joint_rows_are_compared_with_from_scratch_of_their_model_and_baselines_are_not():
    rows = [
        row("bert4rec"),
        row("bert4rec", id="bert4rec/none/-/plain/next_item", kind="extra", task="next_item"),
        row("bert4rec", id="joint/bert4rec/plain", kind="joint"),
        row("bert4rec", seeds=()) | {"id": "popularity", "kind": "baseline", "model": None, "transfer": None},
    ]
    judged = judge(rows, World(rows), LENGTHS, **ONE)
    assert {(one["row"], one["against"]) for one in judged["comparisons"]} == {
        (rows[1]["id"], rows[0]["id"]),
        (rows[2]["id"], rows[0]["id"]),
    }
    assert {one["row"] for one in judged["slices"]} == {one["id"] for one in rows}


def test_slices_hold_every_user_once_the_coldest_first():
    rows = [row("caser"), row("caser", "deep", "next_item")]
    world = World(rows)
    slices = judge(rows, world, LENGTHS, **ONE)["slices"]
    deep = [one for one in slices if one["row"] == rows[1]["id"]]
    assert [one["slice"] for one in deep] == ["0", "1-5", "6-10", "11-20", "21-50", "51-100", "101+"]
    assert [one["users"] for one in deep] == [20, 40, 40, 40, 40, 40, 40]
    differences = world.values[rows[1]["id"]] - world.values[rows[0]["id"]]
    for one, (low, high) in zip(
        deep, [(0, 0), (1, 5), (6, 10), (11, 20), (21, 50), (51, 100), (101, 999)], strict=True
    ):
        inside = np.isin(LENGTHS, range(low, high + 1))
        assert one["gain"] == pytest.approx(differences[:, inside].mean())
        assert one["low"] < one["gain"] < one["high"]
        assert one["mean"] == pytest.approx(world.values[rows[1]["id"]][:, inside].mean())


def test_a_slice_of_one_user_has_a_mean_but_no_interval():
    rows = [row("caser"), row("caser", "deep", "next_item")]
    lengths = np.array([3, *[30] * 9])
    first = judge(rows, World(rows, num_users=10), lengths, **ONE)["slices"][1]
    assert (first["slice"], first["users"], first["gain"], first["low"]) == ("1-5", 1, None, None)


def test_metrics_of_other_users_or_seeds_are_refused():
    rows = [row("caser")]
    with pytest.raises(HypothesisError, match=r"3 seeds and 260 users, found \[3, 5\]"):
        judge(rows, World(rows, num_users=5), LENGTHS, **ONE)


def test_the_surveys_table_is_whole_and_its_numbers_can_come_about():
    assert survey.TABLE_2.keys() == {one["id"] for one in grid()}
    for one in HYPOTHESES:
        assert {name for pair in one.pairs for name in pair} <= survey.TABLE_2.keys()
    for numbers in survey.TABLE_2.values():
        found = dict(zip(survey.METRICS, numbers, strict=True))
        assert found["NDCG@1"] < found["NDCG@5"] < found["NDCG@10"]
        assert found["NDCG@5"] < found["Recall@5"] < found["Recall@10"]


def test_the_surveys_rows_contradict_parts_of_its_second_observation():
    told = {one.name: in_survey(one, "NDCG@10") for one in HYPOTHESES}
    assert told["bert4rec-task"]["verdict"] == "holds in 3 of 4 rows"  # 42.36 < 42.85: shallow with metadata
    assert told["bert4rec-knowledge"]["verdict"] == "holds in 4 of 4 rows"
    assert told["bert4rec-knowledge"]["gain"] == pytest.approx(
        (42.85 - 41.37 + 42.36 - 41.39 + 42.71 - 41.21 + 42.95 - 42.60) / 400
    )
    assert in_survey(HYPOTHESES[-1], "Recall@10")["verdict"] == "holds in 3 of 4 rows"  # 54.73 both
    assert in_survey(HYPOTHESES[0], "MRR") is None


# --- capacity --------------------------------------------

CAPACITY = [
    {
        "id": name,
        "kind": "custom",
        "model": "bert4rec",
        "transfer": name.split("-")[0],
        "against": None if name.startswith("none") else f"none-{name.split('-')[1]}",
        "pretrain_task": "masked_item",
        "task": "masked_item",
        "knowledge": False,
        "status": "done",
        "seeds": [{"seed": seed} for seed in range(3)],
    }
    for name in load(ExperimentConfig, "experiment/capacity").custom
]


def capacity_counts(one):
    """Deep transfer gains 0.03 over shallow with each doubling of blocks, half of it where users are few."""
    kind, blocks, *users = one["id"].split("-")
    deep = 0.03 * np.log2(int(blocks)) * (kind == "deep")
    return 0.1 * np.sqrt(int(blocks)) + deep * (0.5 if users == ["tenth"] else 1.0)


def test_what_depth_adds_to_a_difference_is_found_where_it_is_true_and_turns_round_with_the_world():
    judged = by_name(judge(CAPACITY, World(CAPACITY, capacity_counts), LENGTHS, **ONE))
    assert {name: one["verdict"] for name, one in judged.items()} == {
        "capacity-transfer": "supported",
        "capacity-users": "supported",
    }
    # (0.06 + 0.09) / 2 of four and eight blocks, (0 + 0.03) / 2 of one and two; half of it by users.
    assert judged["capacity-transfer"]["gain"] == pytest.approx(0.06, abs=0.01)
    assert judged["capacity-users"]["gain"] == pytest.approx(0.03, abs=0.01)
    assert judged["capacity-transfer"]["num_pairs"] == 4
    turned = judge(CAPACITY, World(CAPACITY, lambda one: -capacity_counts(one)), LENGTHS, **ONE)
    assert {one["verdict"] for one in turned["hypotheses"]} == {"reversed"}


def test_what_helps_at_every_depth_alike_is_no_matter_of_depth():
    world = World(CAPACITY, lambda one: 0.05 * one["id"].startswith("deep"))
    judged = by_name(judge(CAPACITY, world, LENGTHS, **ONE))
    assert judged["capacity-transfer"]["verdict"] == "not supported"
    assert judged["capacity-transfer"]["rows"][0]["gain"] == pytest.approx(0.05, abs=0.01)


def test_a_difference_of_differences_is_that_of_scipys_paired_t_test():
    rows = [one | {"seeds": [{"seed": 0}]} for one in CAPACITY]
    world = World(rows, capacity_counts)
    for hypothesis in OF_CAPACITY:
        more, fewer = (
            np.mean([world.values[row][0] - world.values[against][0] for row, against in pairs], axis=0)
            for pairs in (hypothesis.pairs, hypothesis.less)
        )
        expected = scipy_stats.ttest_rel(more, fewer)
        found = by_name(judge(rows, world, LENGTHS, **ONE))[hypothesis.name]
        assert found["gain"] == pytest.approx(float((more - fewer).mean()))
        assert found["p_value"] == pytest.approx(expected.pvalue)


def test_depths_of_which_one_side_is_missing_are_unknown():
    rows = [one for one in CAPACITY if one["id"].split("-")[1] not in ("1", "2")]
    judged = by_name(judge(rows, World(rows, capacity_counts), LENGTHS, **ONE))
    assert {one["verdict"] for one in judged.values()} == {"unknown"}
    assert judged["capacity-transfer"]["rows"][2]["gain"] is None
