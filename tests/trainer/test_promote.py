"""Promotion on a real registry (an embedded store): aliases, refusals, rollback, the trail, and promoters that race."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from folders import write_model
from stores import enter_store
from test_ranking import literal

from trainer import promote
from trainer.__main__ import main
from trainer.comparison import evaluate_contenders
from trainer.config import EvaluationConfig, GateConfig, PromoteConfig
from trainer.contenders import model_contender, read_evaluation_set
from trainer.data.dataset import pin
from trainer.judged import evidence_of
from trainer.promote import GateRefused, PromoteError
from trainer.registry import CANDIDATE, CHAMPION, PREVIOUS, Registry

ROOT = Path(__file__).parents[2]
GATE = {"level": 0.1, "min_users": 20, "min_slice_users": 20, "above": []}


@pytest.fixture(scope="module")
def models(tiny_lake, tmp_path_factory):
    """Model folders by name: `weak-*` prefer what nobody likes, `good` and `better` what is popular."""
    folder = tmp_path_factory.mktemp("models")
    skills = {"weak-0": -3.0, "weak-1": -3.0, "good": 0.7, "better": 6.0, "broken": 6.0}
    return {
        name: write_model(
            folder / name, tiny_lake, skill=skill, noise=0.2, seed=int(name == "weak-1"), poison=name == "broken"
        )
        for name, skill in skills.items()
    }


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
    tags = Registry().version(str(number)).tags
    return [json.loads(tags[key])["action"] for key in sorted(tags) if key.startswith(promote.TAG_AUDIT)]


def test_promote_refuse_replace_and_roll_back(store, models, capsys):
    """The life of a registry, in one store (making one takes seconds)."""
    with pytest.raises(GateRefused, match="graftrec/1 is not promoted: no better than from-scratch") as caught:
        promote.run(config(models, "weak-1"))
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


def test_promote_without_from_scratch_is_refused(store, models):
    with pytest.raises(GateRefused, match="at least 2 seeds, found 0"):
        promote.run(config(models, "better", from_scratch=[]))


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
    asked = read_evaluation_set(pin(tiny_lake, None), "last-5", "target", "test", EvaluationConfig(protocols=("full",)))
    given = config(models, "better")
    contenders = [
        model_contender(promote.load_artifact(models[name]), asked, label=label)
        for label, name in ((promote.VERSION, "better"), (promote.SCRATCH, "weak-0"), (promote.SCRATCH, "weak-1"))
    ]
    evaluation = evaluate_contenders(contenders, asked)
    gate = given.gate.model_copy(update={"cold_user_items": 2, "cold_item_interactions": 10})
    evidence = evidence_of(evaluation, None, gate)
    users, items = evidence.slices
    expected = literal(tiny_lake, "last-5", "target", "test")
    cold = [n for n, user in enumerate(asked.users.tolist()) if len(expected[user][0]) - 2 <= 2]
    assert 0 < len(cold) < len(asked.users)
    ndcg = evaluation.metrics((promote.VERSION, 0), "full")["NDCG@10"]
    assert users.version_C.tolist() == ndcg[cold].tolist()
    counts = asked.training_interactions
    rare = [n for n, row in enumerate(asked.held_out.targets) if any(counts[item] <= 10 for item in row)]
    assert 0 < len(rare) < len(asked.users)
    assert len(items.version_C) == len(items.reference_C) == len(rare)
    assert np.isfinite(items.version_C).all()
    assert evidence.recipe_SU is None, "there is one seed of the version, and two of from-scratch"


RACER = """
import sys
from trainer import promote
from trainer.config import PromoteConfig, GraftrecError
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
    good, better = (by_hash[promote.load_artifact(models[name]).hash] for name in ("good", "better"))
    assert CHAMPION in Registry().version(str(better.number)).aliases, said
    assert "CHAMPION" in said[1], said
    if "ERROR" in said[0]:
        assert "worse than the champion" in said[0], said
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
    with pytest.raises(GateRefused, match="worse than the champion"):
        promote.run(config(models, "good"))
    assert scored == [best.number]
    assert aliases()[CHAMPION] == best.number
