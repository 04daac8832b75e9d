"""The gate's decisions on simulated metrics, where the truth is known."""

import dataclasses
import json
import shlex

import numpy as np
import pydantic
import pytest
import yaml

from etl.settings import ConfigError, GraftrecError, load
from trainer.config import (
    BaselinesConfig,
    ClickConfig,
    GateConfig,
    MaskedItemConfig,
    MultiConfig,
    NextBasketConfig,
    ProfileConfig,
)
from trainer.config.metrics import known_metric
from trainer.evaluation.evaluators import evaluators_of
from trainer.evaluation.gate import (
    Decision,
    Evidence,
    GateError,
    Slice,
    check_gate,
    decide,
    more_seeds,
    next_steps,
    seed_list,
)
from trainer.evaluation.significance import compare

GATE = GateConfig(min_gain=0.02, min_seeds=2, must_beat=("popularity",))
USERS = 1_500


def metrics(random, mean, *, users=USERS, spread=0.25, taste=None):
    """Per-user metrics about `mean`: what a user is like (`taste`, the same for all models), and the rest."""
    taste = random.normal(0, spread, users) if taste is None else taste
    return mean + taste + random.normal(0, 0.05, users)


def evidence(seed=0, *, version=0.18, scratch=0.13, champion=None, low=0.08, seeds=3, luck=0.001, **more):
    """A version's recipe and from-scratch, whose seeds are lucky by about `luck`; `low`: popularity's mean."""
    random = np.random.default_rng(seed)
    taste = random.normal(0, 0.25, USERS)

    def several(mean):
        return np.stack([metrics(random, mean + random.normal(0, luck), taste=taste) for _ in range(seeds)])

    recipe, numbers = several(version), tuple(range(seeds))
    return Evidence(
        version_U=recipe[0],
        version_seed=0,
        recipe_SU=recipe,
        recipe_seeds=numbers,
        scratch_SU=several(scratch),
        scratch_seeds=numbers,
        champion_U=None if champion is None else metrics(random, champion, taste=taste),
        baselines={"popularity": metrics(random, low, taste=taste)},
        **more,
    )


def verdicts(decision):
    return {check.name: check.verdict for check in decision.checks}


def test_gate_passes_what_is_better():
    decision = decide(evidence(), GATE)
    assert decision.passed
    assert decision.reasons == []
    assert verdicts(decision) == {"from-scratch": "passed", "popularity": "passed"}


def check_of(decision, name):
    return next(check for check in decision.checks if check.name == name)


def test_gate_refuses_what_is_no_better_than_from_scratch():
    decision = decide(evidence(version=0.13), GATE)
    assert not decision.passed
    check = check_of(decision, "from-scratch")
    assert check.text.startswith(("not shown to be", "worse than", "no gain of 2 %"))
    assert "over users and 3 seeds" in check.text
    assert "\n" not in check.text


def test_gate_compares_the_recipe_and_shows_the_version_beside_it():
    given = evidence()
    check = check_of(decide(given, GATE), "from-scratch")
    gain = compare(given.recipe_SU, given.scratch_SU)
    assert check.numbers["gain"] == gain.gain
    assert check.numbers["relative_gain"] == gain.relative_gain
    assert (check.numbers["p"], check.numbers["low"], check.numbers["high"]) == (gain.p_value, gain.low, gain.high)
    assert check.numbers["recipe"] == pytest.approx(given.recipe_SU.mean())
    assert check.numbers["version"] == pytest.approx(given.version_U.mean())
    assert (check.numbers["seeds"], check.numbers["users"]) == (3, USERS)
    assert f"{given.recipe_SU.mean():.4f} (mean of 3 seeds; this version, seed 0: {given.version_U.mean():.4f})" in (
        check.text
    )


def test_gate_pairs_the_seeds_that_both_have():
    given = evidence(seeds=4)
    rows = [3, 0, 2]  # of seeds 3, 0, 2
    fewer = dataclasses.replace(given, scratch_SU=given.scratch_SU[rows], scratch_seeds=(3, 0, 2))
    gain = compare(given.recipe_SU[rows], given.scratch_SU[rows])
    check = check_of(decide(fewer, GATE), "from-scratch")
    assert (check.numbers["gain"], check.numbers["p"]) == (gain.gain, gain.p_value)
    shown = check.numbers["recipe"] - check.numbers["scratch"]
    assert shown == pytest.approx(gain.gain), "the means shown are of the seeds compared"
    alone = dataclasses.replace(fewer, recipe_SU=None, recipe_seeds=())
    check = check_of(decide(alone, GATE), "from-scratch")
    assert check.numbers["p"] == compare(given.version_U, given.scratch_SU[rows]).p_value, (
        "one version, all their seeds"
    )
    assert check.numbers["recipe"] == check.numbers["version"]


def by_hand(gains, users=200, spread=0.05):
    """A recipe above from-scratch by `gains` of its seeds; users differ by ± spread."""
    scratch = np.full((len(gains), users), 0.2)
    sign = np.where(np.arange(users) % 2, spread, -spread)
    recipe = scratch + np.array(gains)[:, None] + sign
    numbers = tuple(range(len(gains)))
    return Evidence(recipe[0], 0, recipe, numbers, scratch, numbers)


PLAIN = GateConfig(min_seeds=2, must_beat=(), min_gain=0.0)


@pytest.mark.parametrize(
    ("gains", "settings", "start", "refusal"),
    [
        ((0.03, 0.02, 0.04), {}, "better than from-scratch", None),
        ((-0.03, -0.02, -0.04), {}, "worse than from-scratch", "worse"),
        ((0.001, 0.0005, 0.0015), {"min_gain": 0.2, "level": 0.4}, "no gain of 20 % over from-scratch", "worse"),
        ((0.03, 0.02, 0.04), {"min_gain": 0.2}, "not shown to be 20 % better than from-scratch", "not shown"),
        ((0.03, -0.02, 0.04), {}, "not shown to be better than from-scratch", "not shown"),
        ((-0.01, 0.02, -0.04), {}, "not shown to be better than from-scratch", "not shown"),
    ],
)
def test_gate_refuses_as_worse_or_as_not_shown(gains, settings, start, refusal):
    check = check_of(decide(by_hand(gains), PLAIN.model_copy(update=settings)), "from-scratch")
    assert check.text.startswith(start)
    assert check.refusal == refusal


def test_gate_says_how_many_seeds_would_show_the_gain():
    check = check_of(decide(by_hand((0.03, 0.01, 0.05)), PLAIN), "from-scratch")
    # sd of the seeds 0.02, of the users 0.05·sqrt(200/199): with 4 seeds t(3)·0.02/2 = 0.0318, with 5
    # t(4)·0.02/√5 = 0.0248, and t(199)·0.0501/√200 = 0.0070 beside it; the gain is 0.03.
    assert check.text.endswith("5 seeds would show it if the gain stays as observed")
    assert check.seeds == (0, 1, 2, 3, 4)
    assert check.remedy in check.text


def test_gate_advises_no_seeds_where_another_check_would_refuse():
    short = by_hand((0.03, 0.01, 0.05))
    decision = decide(dataclasses.replace(short, champion_U=short.version_U + 0.2), PLAIN)
    assert [check.name for check in decision.refused] == ["from-scratch", "champion"]
    assert "seeds would show it" not in decision.text()
    assert not any("seeds" in step for step in next_steps(decision, recommend=None))


def test_gate_says_how_many_users_would_where_no_seeds_do():
    check = check_of(decide(by_hand((0.004, 0.004, 0.004), spread=0.1), PLAIN), "from-scratch")
    # the seeds agree: users alone, (1.96·0.1/0.004)² = 2,401
    assert "no number of seeds would show it, users differ too much: about 2,500 users with 3 seeds would" in check.text
    assert check.seeds == ()


def test_gate_has_no_remedy_where_there_is_no_gain():
    check = check_of(decide(by_hand((-0.01, 0.02, -0.04)), PLAIN), "from-scratch")
    assert "there is no gain to show" in check.text


def test_gate_refuses_a_certain_gain_below_the_margin():
    small = evidence(version=0.14, luck=0.0)
    assert not decide(small, GATE.model_copy(update={"min_gain": 0.2})).passed
    assert decide(small, GATE.model_copy(update={"min_gain": 0.0})).passed


def test_gate_rarely_passes_the_luck_of_seeds():
    """Version and from-scratch are the same recipe; their seeds differ by as much as transfers do."""
    free = GATE.model_copy(update={"min_gain": 0.0})
    passed = [decide(evidence(seed, version=0.13, luck=0.02), free).passed for seed in range(300)]
    assert np.mean(passed) < 0.05


def test_gate_of_one_seed_would_pass_that_luck():
    """Why one seed of from-scratch is refused by default."""
    free = GATE.model_copy(update={"min_gain": 0.0, "min_seeds": 1})
    passed = [decide(evidence(seed, version=0.13, luck=0.02, seeds=1), free).passed for seed in range(100)]
    assert np.mean(passed) > 0.25
    decision = decide(evidence(seeds=1), GATE)
    assert "at least 2 seeds, found 1" in decision.reasons[0]


def test_gate_without_from_scratch_says_how_to_make_it():
    given = evidence()
    decision = decide(Evidence(given.version_U, baselines=given.baselines), GATE)
    assert "transfer none" in decision.reasons[0]


def test_gate_refuses_a_lucky_recipe_whose_version_is_no_better():
    """The mean over seeds may be better than from-scratch's; the version that is to be served must be too."""
    given = evidence(luck=0.0)
    poor = dataclasses.replace(given, version_U=given.scratch_SU.mean(0))
    assert verdicts(decide(poor, GATE)) == {"from-scratch": "passed", "this version": "refused", "popularity": "passed"}


def test_gate_without_transfer_compares_with_baselines_and_champion():
    given = dataclasses.replace(evidence(champion=0.17), scratch_SU=None, scratch_seeds=(), transferred=False)
    decision = decide(given, GATE)
    assert decision.passed
    assert check_of(decision, "from-scratch").verdict == "not judged"
    assert check_of(decision, "from-scratch").text == "not asked: nothing was transferred"
    assert not decide(dataclasses.replace(given, transferred=True), GATE).passed, "what was transferred needs it"
    weak = dataclasses.replace(given, baselines={"popularity": given.version_U + 0.01})
    assert not decide(weak, GATE).passed


def test_gate_compares_an_untransferred_recipe_where_from_scratch_is_given():
    """A model that reads all domains has no parent, and from-scratch on the target alone beside it."""
    given = dataclasses.replace(evidence(version=0.1), transferred=False)
    assert check_of(decide(given, GATE), "from-scratch").verdict == "refused"


@pytest.mark.parametrize(("champion", "passed"), [(0.17, True), (0.19, False)])
def test_gate_compares_with_the_champion(champion, passed):
    decision = decide(evidence(champion=champion), GATE)
    assert decision.passed is passed
    if not passed:
        assert decision.reasons[0].startswith("worse than the champion: ")


def test_gate_passes_the_champion_itself():
    given = evidence()
    assert decide(dataclasses.replace(given, champion_U=given.version_U.copy()), GATE).passed


def test_gate_lets_a_set_share_below_the_champion_pass():
    given = evidence(version=0.18, champion=0.185)
    assert not decide(given, GATE).passed
    assert decide(given, GATE.model_copy(update={"champion_margin": 0.1})).passed


def test_gate_refuses_what_is_not_above_popularity():
    decision = decide(evidence(low=0.2), GATE)
    assert decision.reasons[0].startswith("worse than the simple baseline, popularity")
    assert decide(evidence(low=0.2), GATE.model_copy(update={"must_beat": ()})).passed
    assert "mend gate.must_beat" in decide(evidence(), GATE.model_copy(update={"must_beat": ("gossip",)})).reasons[0]


def test_gate_must_beat_the_best_baseline_whichever_it_is():
    given = evidence()
    beside = dict(given.baselines)
    best = GATE.model_copy(update={"must_beat": ("best",)})
    check = check_of(decide(given, best), "best baseline")
    assert check.verdict == "passed"
    assert "the best simple baseline, popularity" in check.text
    strong = dataclasses.replace(given, baselines=beside | {"item-to-item": given.recipe_SU.mean(0) - 1e-4})
    check = check_of(decide(strong, best), "best baseline")
    gain = compare(given.recipe_SU, strong.baselines["item-to-item"])
    assert (check.numbers["gain"], check.numbers["p"]) == (gain.gain, gain.p_value)
    assert check.numbers["baseline"] == pytest.approx(given.recipe_SU.mean() - 1e-4)
    assert (check.verdict, check.refusal) == ("refused", "not shown"), "above it, but not by more than chance"
    none = dataclasses.replace(given, baselines={})
    assert check_of(decide(none, best), "best baseline").verdict == "refused"


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("where", ["version_U", "scratch_SU", "recipe_SU", "champion_U", "baselines"])
def test_gate_refuses_what_is_no_number(where, value):
    given = evidence(champion=0.17)
    place = given.baselines["popularity"] if where == "baselines" else getattr(given, where)
    place[..., 3] = value
    decision = decide(given, GATE)
    assert not decision.passed
    assert "are not numbers" in decision.reasons[0]
    assert [check.name for check in decision.checks] == ["sound"]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("side", ["version_C", "reference_C"])
def test_gate_refuses_a_slice_that_one_side_has_no_number_for(side, value):
    part = slice_of(0.0, 1_000)
    getattr(part, side)[7] = value
    decision = decide(evidence(slices=(part,)), GATE)
    assert decision.reasons == [
        "metrics of the version or champion in the slice cold users are not numbers for 1 users"
    ]


def test_gate_refuses_faults_whatever_the_numbers():
    decision = decide(evidence(faults=("weights of m are not finite",)), GATE)
    assert decision.reasons == ["weights of m are not finite"]


def test_gate_of_few_users_says_nothing():
    few = Evidence(np.full(30, 0.5), scratch_SU=np.zeros((3, 30)), scratch_seeds=(0, 1, 2))
    assert "at least 100 evaluated users (gate.min_users), found 30" in decide(few, GATE).reasons[0]


def slice_of(gain, users, *, seed=0):
    random = np.random.default_rng(seed)
    reference = metrics(random, 0.2, users=users)
    return Slice("cold users", reference + gain + random.normal(0, 0.05, users), reference, "champion")


@pytest.mark.parametrize(
    ("gain", "users", "verdict"),
    [
        (0.0, 1_000, "passed"),
        (0.05, 1_000, "passed"),
        (-0.01, 1_000, "passed"),  # within the margin of a tenth of 0.2
        (-0.06, 1_000, "refused"),
        (-0.06, 50, "not judged"),  # too few users by the setting
        (-0.012, 120, "not judged"),  # the interval reaches beyond the margin, the mean does not
    ],
)
def test_gate_judges_slices_by_a_margin_where_they_can_say(gain, users, verdict):
    decision = decide(evidence(slices=(slice_of(gain, users),)), GATE)
    assert verdicts(decision)["cold users"] == verdict
    assert decision.passed is (verdict != "refused")


def test_gate_says_how_many_users_a_slice_has_and_needs():
    (check,) = [c for c in decide(evidence(slices=(slice_of(0.0, 50),)), GATE).checks if c.name == "cold users"]
    assert check.text == "only 50 users are in this slice; it is compared from 100 on (gate.min_slice_users)"


def test_gate_leaves_users_without_cold_items_out_of_a_slice():
    part = slice_of(0.0, 1_000)
    part.version_C[:500] = np.nan
    part.reference_C[:500] = np.nan
    (check,) = [check for check in decide(evidence(slices=(part,)), GATE).checks if check.name == "cold users"]
    assert check.numbers["users"] == 500


def test_gate_tells_every_check_not_only_the_first_refusal():
    given = evidence(version=0.12, champion=0.2, low=0.3, slices=(slice_of(-0.06, 1_000),))
    decision = decide(given, GATE)
    assert len(decision.reasons) == 5
    assert decision.text().count("✗") == 5
    assert decision.as_dict()["passed"] is False


def test_decision_is_json_of_finite_numbers():
    given = dataclasses.replace(evidence(champion=0.17), baselines={"popularity": np.zeros(USERS)})
    told = json.loads(json.dumps(decide(given, GATE).as_dict(), allow_nan=False))
    assert {check["name"] for check in told["checks"]} == {"from-scratch", "champion", "popularity"}


# --- settings ---------------------------------------------


def test_gate_thresholds_are_data():
    gate = load(GateConfig, "gate/default")
    assert gate.min_seeds >= 3
    assert gate.must_beat == ("best",)


def test_the_old_name_of_must_beat_is_refused_with_the_new(tmp_path):
    with pytest.raises(pydantic.ValidationError, match="above is now must_beat"):
        GateConfig.model_validate({"above": ["popularity"]})
    with pytest.raises(ConfigError, match="above is now must_beat; rename it"):
        load(GateConfig, "gate/default", ["--above", "[popularity]"])


@pytest.mark.parametrize("name", ["level", "min_gain", "champion_margin", "slice_margin"])
@pytest.mark.parametrize("value", [".inf", ".nan"])
def test_thresholds_are_finite(name, value):
    with pytest.raises(ConfigError, match=name):
        load(GateConfig, "gate/default", [f"--{name}", value])


# --- before training ---------------------------------------------

KNOWN = {"task": MaskedItemConfig(), "seeds": (0, 1, 2), "transferred": True, "has_scratch": True}


def checked(gate=None, **settings):
    return check_gate(GateConfig(**(gate or {})), **{**KNOWN, "baselines": BaselinesConfig(), **settings})


@pytest.mark.parametrize(
    ("gate", "settings"),
    [
        ({}, {}),
        ({"metric": "single/Recall@10", "must_beat": ("best", "item-to-item, all domains", "transitions")}, {}),
        ({"metric": "basket/F1@5", "must_beat": ("Markov chain",)}, {"task": NextBasketConfig()}),
        ({"metric": "accuracy"}, {"task": ProfileConfig(attribute="age")}),
        ({"metric": "user AUC"}, {"task": ClickConfig()}),
        ({"metric": "value/log loss"}, {"task": MultiConfig(tells=("category", "value"))}),
        ({"metric": "NDCG@10"}, {"task": MultiConfig(tells=("next_item", "value"))}),
        ({}, {"transferred": False, "has_scratch": False, "seeds": (0,)}),
        ({"must_beat": ()}, {"baselines": BaselinesConfig(enabled=False)}),
    ],
)
def test_check_gate_passes_what_training_can_meet(gate, settings):
    checked(gate, **settings)


@pytest.mark.parametrize(
    ("gate", "settings", "message"),
    [
        ({}, {"seeds": (0, 3)}, r"at least 3 seeds .* found 2 \(0, 3\); train more .*--seeds \"\[0, 1, 3\]\""),
        ({"min_seeds": 9}, {}, r'--seeds "\[0, 1, 2, 3, 4, 5, 6, 7, 8\]"'),
        ({}, {"has_scratch": False}, "found none; train them with transfer none"),
        ({}, {"transferred": False, "seeds": (0,)}, "found 1"),
        ({"metric": "user AUC"}, {}, "NDCG@10, .*found 'user AUC'"),
        ({"metric": "basket/F1@5"}, {}, "gate.metric"),
        ({"metric": "accuracy"}, {"task": ClickConfig()}, "user AUC, log loss"),
        ({"protocol": "uniform-100"}, {"task": NextBasketConfig()}, "expected full for task next_basket"),
        ({"must_beat": ("gossip",)}, {}, "best, popularity; item-to-item; .*found gossip"),
        ({"must_beat": ("Markov chain",)}, {}, "found Markov chain"),
        ({}, {"baselines": BaselinesConfig(enabled=False)}, "found baselines.enabled false"),
    ],
)
def test_check_gate_refuses_what_no_training_mends(gate, settings, message):
    with pytest.raises(GateError, match=message) as caught:
        checked(gate, **settings)
    assert isinstance(caught.value, GraftrecError)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)


def test_metrics_and_baselines_of_every_task_are_named():
    for task in (MaskedItemConfig(), NextBasketConfig(), ProfileConfig(attribute="age"), ClickConfig(), MultiConfig()):
        for evaluator in evaluators_of(task):
            metrics = evaluator.metrics_of(task)
            assert metrics.per_user
            for name in (*metrics.per_user, *metrics.table):
                assert known_metric(name) == name, "settings take it"
            names = metrics.baselines
            assert len(names) == len(set(names)) >= 2


def test_seeds_to_add_keep_those_there_are():
    assert more_seeds((0, 1, 7), 5) == (0, 1, 2, 3, 7)
    assert more_seeds((), 2) == (0, 1)
    assert list(yaml.safe_load(shlex.split(seed_list(range(300)))[0])) == list(range(300)), "whole, however long"


# --- afterwards ---------------------------------------------


def test_next_steps_say_what_can_be_done():
    assert next_steps(decide(evidence(), GATE), recommend="command") == []
    unsure = decide(by_hand((0.03, 0.01, 0.05)), PLAIN)
    steps = next_steps(unsure, recommend="command", results="runs/evaluation")
    assert steps[0] == "recommend by this model all the same: command"
    assert "runs/evaluation" in steps[1]
    assert '--seeds "[0, 1, 2, 3, 4]"' in steps[2]
    alone = next_steps(unsure, recommend=None, champion="shop/2")
    assert len(alone) == 1, "a model that ranks nothing is not recommended by"
    assert "--seeds" not in alone[0], "promote has no such setting"
    (instead, *_) = next_steps(unsure, recommend="command", champion="shop/2")
    assert instead == "recommend by this model instead of the champion shop/2, whose rows it replaces: command"
    beaten = next_steps(decide(evidence(low=0.2), GATE), recommend="command")
    assert any("simple baseline is better" in step for step in beaten)
    assert not any("--seeds" in step for step in beaten)
    broken = Decision(decide(evidence(faults=("weights are not finite",)), GATE).checks)
    assert next_steps(broken, recommend="command") == []
