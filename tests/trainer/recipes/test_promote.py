"""Promotion on a real registry (an embedded store): aliases, refusals, rollback, the trail, and promoters that race."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import mlflow
import numpy as np
import pytest

from etl.settings import GraftrecError
from tests.fixtures.folders import write_model
from tests.fixtures.lake_rows import literal
from tests.fixtures.places import ROOT
from tests.fixtures.stores import enter_store
from trainer.__main__ import main
from trainer.config import EvaluateConfig, GateConfig, PromoteConfig
from trainer.data.held_out import ReadOptions
from trainer.data.release import pin
from trainer.evaluation import item_prediction
from trainer.evaluation.gate import GateError
from trainer.evaluation.item_prediction import evaluate_scorers
from trainer.evaluation.scorers import model_scorer, read_evaluation_set
from trainer.evaluation.significance import p_text
from trainer.recipes import evaluate, promote
from trainer.recipes.compared_models import PromoteError
from trainer.recipes.promote import GateRefused
from trainer.registry import CANDIDATE, CHAMPION, PREVIOUS, Registry, audit_trail
from trainer.registry.gate_evidence import evidence_of

GATE = {"level": 0.1, "min_seeds": 2, "min_users": 20, "min_slice_users": 20, "must_beat": []}


@pytest.fixture(scope="module")
def models(tiny_lake, tmp_path_factory):
    """Model folders by name: `weak-*` prefer what nobody likes, `good` and `better` what is popular."""
    folder = tmp_path_factory.mktemp("models")
    skills = {"weak-0": -3.0, "weak-1": -3.0, "weak-2": -3.0, "good": 0.7, "better": 6.0, "broken": 6.0}
    made = {
        name: write_model(
            folder / name,
            tiny_lake,
            skill=skill,
            noise=0.2,
            seed=int(name[-1]) if name[-1].isdigit() else 0,
            poison=name == "broken",
        )
        for name, skill in skills.items()
    }
    for seed in range(3):  # one recipe, whose seeds are lucky by different amounts, and from-scratch
        for transfer, skill in (("none", 0.2), ("deep", 0.6 + 0.2 * seed)):
            name = f"{transfer}-{seed}"
            made[name] = write_model(folder / name, tiny_lake, skill=skill, seed=seed, transfer=transfer)
    return made


@pytest.fixture
def store(tmp_path, monkeypatch):
    enter_store(tmp_path / "store", monkeypatch)
    return tmp_path / "store"


def config(models, candidate, **settings):
    given = {
        "candidate": models.get(candidate, candidate),
        "from_scratch": [models["weak-0"], models["weak-1"]],
        "gate": GATE,
        "runtime": {"progress": False, "device": "cpu"},
        "tracking": {"enabled": False},
    }
    return PromoteConfig.model_validate(given | settings)


def aliases(name="graftrec"):
    registry = Registry(name)
    found = {alias: registry.find(alias) for alias in (CANDIDATE, CHAMPION, PREVIOUS)}
    return {alias: version.number for alias, version in found.items() if version is not None}


def trail(number):
    """Actions of a version's audit entries, oldest first."""
    return [entry["action"] for entry in audit_trail(Registry().version(str(number)))]


def test_promote_refuse_replace_and_roll_back(store, models, capsys):
    """The life of a registry, in one store (making one takes seconds)."""
    with pytest.raises(GateRefused, match=r"graftrec/1 is not promoted: .* than from-scratch") as caught:
        promote.run(config(models, "weak-2"))
    assert caught.value.exit_code == 3
    assert "\n" not in str(caught.value)
    assert aliases() == {CANDIDATE: 1}
    assert trail(1) == ["refused"]
    assert json.loads(Path("runs/promote/decision.json").read_text())["passed"] is False

    promoted = promote.run(config(models, "good"))
    assert (promoted.version.number, promoted.replaced) == (2, None)
    assert aliases() == {CHAMPION: 2}, "a champion is no candidate any more"
    assert "graftrec/2 is champion" in capsys.readouterr().out

    with pytest.raises(GateRefused, match="worse than the champion"):
        promote.run(
            config(models, "weak-0", gate=GATE | {"level": 0.999, "min_seeds": 1}, from_scratch=[models["weak-1"]])
        )
    hint = "→ recommend by this model instead of the champion graftrec/2, whose rows it replaces: python -m trainer"
    assert re.search(rf"{hint} recommend .*--replace true\b", capsys.readouterr().out)
    assert aliases() == {CANDIDATE: 3, CHAMPION: 2}, "the alias stays"

    promoted = promote.run(config(models, "better"))
    assert (promoted.version.number, promoted.replaced) == (4, 2)
    assert aliases() == {CHAMPION: 4, PREVIOUS: 2}
    assert trail(2) == ["promoted", "replaced"]

    again = promote.run(config(models, "better"))
    assert again.version.number == 4, "the same model is the same version"
    assert again.decision is None
    assert "is the champion already" in capsys.readouterr().out

    restored = promote.run(config(models, None, rollback=True))
    assert restored.version.number == 2
    assert aliases() == {CHAMPION: 2}, "before 2 there was none"
    assert trail(4)[-1] == "rolled back"
    with pytest.raises(PromoteError, match="champion 2 and previous None"):
        promote.run(config(models, None, rollback=True))


def test_promote_refuses_weights_that_are_no_numbers(store, models):
    with pytest.raises(GateRefused, match=r"weights of .* are not finite \(output_bias\)"):
        promote.run(config(models, "broken"))
    assert aliases() == {CANDIDATE: 1}


@pytest.mark.parametrize(
    ("candidate", "settings", "message"),
    [
        ("deep-0", {"from_scratch": []}, "from-scratch models beside a candidate that was transferred, found none"),
        ("deep-0", {"gate": GATE | {"min_seeds": 4}}, r"at least 4 seeds \(gate.min_seeds\), found 2 \(0, 1\)"),
        ("deep-0", {"gate": GATE | {"must_beat": ["gossip"]}}, "found gossip"),
        ("deep-0", {"gate": GATE | {"metric": "user AUC"}}, "found 'user AUC'"),
        ("weak-2", {"from_scratch": "deep"}, "from_scratch: expected models of transfer none"),
    ],
)
def test_what_is_known_before_scoring_ends_with_two(store, models, candidate, settings, message, monkeypatch):
    if settings.get("from_scratch") == "deep":
        settings = {"from_scratch": [models["deep-0"], models["deep-1"]]}
    monkeypatch.setattr(promote, "GateEvidence", None)  # nothing is scored
    with pytest.raises(GraftrecError, match=message) as caught:
        promote.run(config(models, candidate, **settings))
    assert caught.value.exit_code == 2
    assert Registry().versions() == [], "nor registered"


def test_a_baseline_that_the_log_does_not_have_ends_with_two(store, models):
    """`all` is every domain: there is no other to read."""
    with pytest.raises(GateError, match="must_beat: expected simple baselines among best, popularity"):
        promote.run(
            config(
                models,
                "deep-0",
                domain="all",
                split="joint-5",
                gate=GATE | {"must_beat": ["item-to-item, all domains"]},
            )
        )


def recipe(models, transfer):
    return [models[f"{transfer}-{seed}"] for seed in range(3)]


def test_table_picture_gate_and_metrics_show_one_contrast(store, models, monkeypatch):
    """Gain and p-value of the candidate, to the last bit, though models are given in another order."""
    tracking = {"experiment": "contrast", "system_metrics": False}
    shown = []
    drawn = item_prediction.transfer_gains
    monkeypatch.setattr(
        item_prediction, "transfer_gains", lambda gains, **more: shown.extend(gains) or drawn(gains, **more)
    )
    report = evaluate.run(
        EvaluateConfig.model_validate(
            {
                "name": "compared",
                "models": [{"model": m} for m in (*recipe(models, "none"), *recipe(models, "deep"))],
                "candidate": "deep",
                "runtime": {"progress": False, "device": "cpu"},
                "tracking": tracking,
            }
        )
    )
    row = next(r for r in report.rows if (r["label"], r["protocol"], r["metric"]) == ("deep", "full", "NDCG@10"))
    assert row["planned"]
    assert row["p_value"] == row["gain"]["p_value"], "not adjusted"

    third, first, second = (recipe(models, "deep")[seed] for seed in (2, 0, 1))
    given = {"replicas": [first, second], "from_scratch": recipe(models, "none")[::-1]}
    settings = config(models, third, **given, tracking=tracking, gate=GATE | {"level": 0.9})
    promoted = promote.run(settings)
    decision = json.loads(Path("runs/promote/decision.json").read_text())
    (check,) = [check for check in decision["checks"] if check["name"] == "from-scratch"]
    summary = json.loads((report.folder / "summary.json").read_text())
    (saved,) = [r for r in summary["rows"] if r["planned"]]
    for numbers in (check["numbers"], promoted.decision.checks[0].numbers):
        assert numbers["gain"] == row["gain"]["gain"] == saved["gain"]["gain"]
        assert numbers["relative_gain"] == row["gain"]["relative_gain"] == saved["gain"]["relative_gain"]
        assert numbers["p"] == row["p_value"] == saved["p_value"]
        assert (numbers["low"], numbers["high"]) == (row["gain"]["low"], row["gain"]["high"])
        assert numbers["recipe"] == row["mean"] == saved["mean"]
        assert (numbers["seeds"], numbers["users"]) == (3, row["gain"]["num_users"])
    assert numbers["version"] != numbers["recipe"], "one seed is not the recipe"
    assert "mean of 3 seeds; this version, seed 2: " in check["text"]

    line = next(line for line in report.text.splitlines() if line.startswith("deep *"))
    share, p_value = f"{100 * numbers['relative_gain']:+.1f} %", p_text(numbers["p"])
    assert line.split()[:7] == ["deep", "*", "3", f"{numbers['recipe']:.4f}", *share.split(), p_value]
    for text in (f"{numbers['recipe']:.4f} (mean", share, p_value):
        assert text in check["text"]
    (gain,) = [gain for gain in shown if gain.marked]
    assert (gain.name, gain.gain, gain.low, gain.high) == ("deep", numbers["gain"], numbers["low"], numbers["high"])
    assert gain.note == f"{share}, p {p_value}"

    logged = {name: value for run in runs_of("contrast") for name, value in run.data.metrics.items()}
    for kind, value in (("gain", numbers["gain"]), ("p", numbers["p"])):
        wanted = rf"test/full/NDCG\W?_?10/{kind}/deep|gate/from-scratch/{kind}"  # of the table, and of the gate
        found = {name: given for name, given in logged.items() if re.fullmatch(wanted, name)}
        assert list(found.values()) == [value, value], sorted(logged)


def runs_of(experiment):
    client = mlflow.MlflowClient()
    found = client.get_experiment_by_name(experiment)
    return client.search_runs([found.experiment_id])


def test_where_nothing_is_transferred_the_gate_asks_baselines_and_champion(store, models, capsys):
    gate = {"level": 0.2, "min_users": 20, "min_slice_users": 20, "must_beat": ["best"]}
    with pytest.raises(GateRefused, match="the best simple baseline") as caught:
        promote.run(config(models, "none-0", replicas=[models["none-1"]], from_scratch=[], gate=gate))
    assert "from-scratch" not in str(caught.value)
    assert "from-scratch: not asked: nothing was transferred" in capsys.readouterr().out
    itself = {"replicas": [models["none-1"]], "from_scratch": [models["none-1"], models["none-0"]]}
    promoted = promote.run(config(models, "none-0", gate=gate | {"must_beat": []}, **itself))
    assert promoted.decision.checks[0].verdict == "not judged"
    with pytest.raises(GateRefused, match="the champion"):
        promote.run(config(models, "weak-0", from_scratch=[], gate=gate | {"must_beat": []}))


def test_a_model_of_all_domains_is_compared_with_from_scratch_on_the_target(store, models, tiny_lake, tmp_path):
    folder = write_model(tmp_path / "joint", tiny_lake, domain="all", split="causal", skill=-3.0)
    examples = config(models, folder, domain="target", split="last-5", from_scratch=[models["good"], models["weak-1"]])
    with pytest.raises(GateRefused, match="than from-scratch"):
        promote.run(examples)


def test_promote_says_what_seeds_and_users_can_show(store, models, capsys):
    promote.run(config(models, "better"))
    assert re.search(
        r"2 seeds of 54 users show gains above [\d,.]+ % over from-scratch, with p ≤ 0.1", capsys.readouterr().out
    )


def test_promote_by_alias_and_number_and_the_commands_exit_code(store, models, capsys):
    registry = Registry()
    registry.register(models["weak-1"])
    settings = Path("promote.yaml")
    settings.write_text(config(models, "@candidate").model_dump_json())
    assert main(["promote", "--config", str(settings)]) == 3
    assert "promote: graftrec/1 is not promoted" in capsys.readouterr().err
    registry.register(models["better"])
    assert main(["promote", "--config", str(settings), "--candidate", "'2'"]) == 0
    assert aliases() == {CHAMPION: 2}
    assert main(["promote", "--config", str(settings), "--candidate", "'9'"]) == 2


def test_champion_of_another_domain_is_scored_and_replaced(store, models, tiny_lake, tmp_path):
    """It knows none of the items: it is no bar, and no error either."""
    folder = write_model(tmp_path / "source", tiny_lake, domain="source")
    version = Registry().register(folder)
    with Registry().promoting() as promotion:
        promotion.crown(version.number)
    promoted = promote.run(config(models, "better"))
    assert promoted.replaced == 1
    assert any(check.name == "champion" for check in promoted.decision.checks)


def test_cold_slices_are_what_the_tables_say(tiny_lake, models):
    examples = read_evaluation_set(pin(tiny_lake, None), "last-5", "target", "test", ReadOptions())
    given = config(models, "better")
    scorers = [
        model_scorer(promote.load_model(models[name]), examples, label=label)
        for label, name in ((promote.VERSION, "better"), (promote.SCRATCH, "weak-0"), (promote.SCRATCH, "weak-1"))
    ]
    evaluation = evaluate_scorers(scorers, examples)
    gate = given.gate.model_copy(update={"cold_user_items": 2, "rare_item_interactions": 10})
    evidence = evidence_of(evaluation, None, gate)
    users, _, items = evidence.slices
    expected = literal(tiny_lake, "last-5", "target", "test")
    cold = [n for n, user in enumerate(examples.users.tolist()) if len(expected[user][0]) - 2 <= 2]
    assert 0 < len(cold) < len(examples.users)
    ndcg = evaluation.metrics((promote.VERSION, 0), "full")["NDCG@10"]
    assert users.version_C.tolist() == ndcg[cold].tolist()
    counts = examples.training_interactions
    rare = [n for n, row in enumerate(examples.held_out.targets) if any(counts[item] <= 10 for item in row)]
    assert 0 < len(rare) < len(examples.users)
    assert len(items.version_C) == len(items.reference_C) == len(rare)
    assert np.isfinite(items.version_C).all()
    assert (evidence.recipe_seeds, evidence.scratch_seeds) == ([0], [0, 1])


RACER = """
import sys
from trainer.recipes import promote
from etl.settings import GraftrecError
from trainer.config import PromoteConfig
try:
    done = promote.run(PromoteConfig.model_validate_json(open(sys.argv[1]).read()))
    print("CHAMPION", done.version.number)
except GraftrecError as error:
    print("ERROR", error.exit_code, error)
"""


@pytest.mark.slow
@pytest.mark.ci
def test_two_promoters_race_and_the_better_one_stays(store, models):
    """Whoever comes second is judged against the first: the weaker never replaces the better, whatever the order."""
    processes = []
    for name in ("good", "better"):
        path = Path(f"{name}.json")
        path.write_text(config(models, name).model_dump_json())
        processes.append(
            subprocess.Popen(
                [sys.executable, "-c", RACER, str(path)],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
            )
        )
    said = [process.communicate(timeout=240)[0] for process in processes]
    by_hash = {version.hash: version for version in Registry().versions()}
    good, better = (by_hash[promote.load_model(models[name]).hash] for name in ("good", "better"))
    assert CHAMPION in Registry().version(str(better.number)).aliases, said
    assert "CHAMPION" in said[1], said
    if "ERROR" in said[0]:
        assert "than the champion" in said[0] or "as good as the champion" in said[0], said
        assert "previous" not in aliases()
    else:
        assert aliases()[PREVIOUS] == good.number, said
    assert trail(better.number)[-1] == "promoted"


def test_a_champion_changed_meanwhile_is_scored_before_moving(store, models, monkeypatch):
    """Another promoter moves the alias between judgement and lock: the candidate is judged again."""
    registry = Registry()
    best = registry.register(models["better"])
    judged = promote._score_champion
    scored = []

    def watched(registry, champion, *rest):
        scored.append(champion.number)
        return judged(registry, champion, *rest)

    decided = promote.decide

    def interrupted(evidence, gate: GateConfig):
        if evidence.champion_U is None:
            with registry.promoting() as promotion:
                promotion.crown(best.number)
        return decided(evidence, gate)

    monkeypatch.setattr(promote, "_score_champion", watched)
    monkeypatch.setattr(promote, "decide", interrupted)
    with pytest.raises(GateRefused, match=r"(worse than|as good as) the champion"):
        promote.run(config(models, "good"))
    assert scored == [best.number]
    assert aliases()[CHAMPION] == best.number
