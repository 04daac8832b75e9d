"""The gate's decisions on simulated metrics, where the truth is known."""

import numpy as np
import pytest

from trainer.config import GateConfig, load
from trainer.gate import Evidence, Slice, decide

GATE = GateConfig(min_gain=0.02, above=("popularity",))
USERS = 1_500


def metrics(random, mean, *, users=USERS, spread=0.25, taste=None):
    """Per-user metrics about `mean`: what a user is like (`taste`, the same for all models), and the rest."""
    taste = random.normal(0, spread, users) if taste is None else taste
    return mean + taste + random.normal(0, 0.05, users)


def evidence(seed=0, *, version=0.18, scratch=0.13, champion=None, low=0.08, seeds=3, luck=0.001, **more):
    """A version, its replicas and from-scratch, whose seeds are lucky by about `luck`; `low`: popularity's mean."""
    random = np.random.default_rng(seed)
    taste = random.normal(0, 0.25, USERS)

    def several(mean):
        return np.stack([metrics(random, mean + random.normal(0, luck), taste=taste) for _ in range(seeds)])

    recipe = several(version)
    return Evidence(
        version_U=recipe[0],
        recipe_SU=recipe if seeds > 1 else None,
        scratch_SU=several(scratch),
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


def test_gate_refuses_what_is_no_better_than_from_scratch():
    decision = decide(evidence(version=0.13), GATE)
    assert not decision.passed
    (reason,) = decision.reasons
    assert reason.startswith("no better than from-scratch: NDCG@10 0.1")
    assert "over users and 3 seeds" in reason
    assert "\n" not in reason


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
    """Replicas may be better than from-scratch; the version that is to be served must be too."""
    given = evidence(luck=0.0)
    poor = Evidence(given.scratch_SU.mean(0), given.scratch_SU, given.recipe_SU, baselines=given.baselines)
    assert verdicts(decide(poor, GATE))["from-scratch"] == "refused"


@pytest.mark.parametrize(("champion", "passed"), [(0.17, True), (0.19, False)])
def test_gate_compares_with_the_champion(champion, passed):
    decision = decide(evidence(champion=champion), GATE)
    assert decision.passed is passed
    if not passed:
        assert decision.reasons[0].startswith("worse than the champion: ")


def test_gate_passes_the_champion_itself():
    given = evidence()
    same = Evidence(given.version_U, given.scratch_SU, given.recipe_SU, given.version_U.copy(), given.baselines)
    assert decide(same, GATE).passed


def test_gate_lets_a_set_share_below_the_champion_pass():
    given = evidence(version=0.18, champion=0.185)
    assert not decide(given, GATE).passed
    assert decide(given, GATE.model_copy(update={"champion_margin": 0.1})).passed


def test_gate_refuses_what_is_not_above_popularity():
    decision = decide(evidence(low=0.2), GATE)
    assert decision.reasons[0].startswith("not above the simple baseline popularity")
    assert decide(evidence(low=0.2), GATE.model_copy(update={"above": ()})).passed
    assert "mend gate.above" in decide(evidence(), GATE.model_copy(update={"above": ("gossip",)})).reasons[0]


@pytest.mark.parametrize("where", ["version_U", "scratch_SU", "recipe_SU", "champion_U"])
def test_gate_refuses_what_is_no_number(where):
    given = evidence(champion=0.17)
    getattr(given, where)[..., 3] = np.nan
    decision = decide(given, GATE)
    assert not decision.passed
    assert "are not numbers" in decision.reasons[0]
    assert [check.name for check in decision.checks] == ["sound"]


def test_gate_refuses_faults_whatever_the_numbers():
    decision = decide(evidence(faults=("weights of m are not finite",)), GATE)
    assert decision.reasons == ["weights of m are not finite"]


def test_gate_of_few_users_says_nothing():
    few = Evidence(np.full(30, 0.5), np.zeros((3, 30)), baselines={"popularity": np.zeros(30)})
    assert "30 evaluated users say nothing" in decide(few, GATE).reasons[0]


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


def test_gate_leaves_users_without_cold_items_out_of_a_slice():
    part = slice_of(0.0, 1_000)
    part.version_C[:500] = np.nan
    part.reference_C[:500] = np.nan
    (check,) = [check for check in decide(evidence(slices=(part,)), GATE).checks if check.name == "cold users"]
    assert check.numbers["users"] == 500


def test_gate_tells_every_check_not_only_the_first_refusal():
    given = evidence(version=0.13, champion=0.2, low=0.3, slices=(slice_of(-0.06, 1_000),))
    decision = decide(given, GATE)
    assert len(decision.reasons) == 4
    assert decision.text().count("✗") == 4
    assert decision.as_dict()["passed"] is False


def test_gate_thresholds_are_data():
    gate = load(GateConfig, "gate/default")
    assert gate.min_seeds >= 2
    assert gate.above == ("popularity",)
