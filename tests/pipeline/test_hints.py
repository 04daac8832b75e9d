"""Commands that messages suggest: taken out of the message, and read by the real command."""

import re
import shlex
from pathlib import Path

import pytest

from etl.settings import load, replaced
from trainer import __main__ as trainer
from trainer.config import RecommendConfig
from trainer.evaluation.gate import Check, Decision
from trainer.recipes import pipeline, promote
from trainer.recipes.hints import recommend_command
from trainer.recipes.pipeline_plan import PipelineConfig, Trained

SETTINGS = [
    "--etl.lake",
    "my lake",
    "--runs",
    "my runs",
    "--registered_model",
    "shop",
    "--recommend.k",
    "7",
    "--etl.spark.engine",
    "sail",
    "--etl.spark.settings",
    "{spark.a: \"b 'c'\", spark.password: hidden-word}",
]
SHORT = Check("from-scratch", "refused", "no", refusal="not shown", seeds=(0, 1, 2, 3))


def settings_of(message: str, monkeypatch: pytest.MonkeyPatch) -> RecommendConfig:
    """What `python -m trainer recommend` makes of the command in a message."""
    found: list[RecommendConfig] = []
    monkeypatch.setattr(trainer, "run", lambda recipe, config: found.append(config) or 0)
    command = re.search(r"python -m trainer .*", message)
    assert command is not None
    assert trainer.main(shlex.split(command[0])[3:]) == 0
    return found[0]


@pytest.mark.parametrize("champion", [None, "shop-target/2"])
def test_a_pipelines_hint_runs_as_it_is_printed(champion: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(config: object, recommend: RecommendConfig) -> None:
        assert recommend.spark.engine == "sail", "of the command that promote prints"
        raise promote.GateRefused("refused", Decision((SHORT,)), "my runs/it's a model", champion)

    monkeypatch.setattr(promote, "run", refuse)
    config = load(PipelineConfig, "pipeline/demo", SETTINGS)
    models = [Trained(label, 0, Path(label), 0.1) for label in ("none", "deep")]
    _, lines = pipeline.promote(config, "target", 3, models, results=Path("my runs/evaluate"))
    assert "hidden-word" not in str(lines)
    found = settings_of(lines[0], monkeypatch)
    assert (found.model, found.lake, found.domain, found.k) == ("my runs/it's a model", "my lake", "target", 7)
    assert (found.spark.engine, found.spark.settings) == ("sail", {"spark.a": "b 'c'"})
    assert (found.replace, found.release) == (champion is not None, None)
    assert lines[0].count("whose rows it replaces") == (champion is not None)
    (seeds,) = [line for line in lines if "--seeds" in line]
    again = load(PipelineConfig, "pipeline/demo", [*SETTINGS, *shlex.split(seeds.partition(" with ")[2])])
    assert again.seeds == (0, 1, 2, 3)


def test_a_hint_names_the_configuration_in_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = tmp_path / "my own.yaml"
    own.write_text("k: 3\nlake: here")
    given = replaced(load(RecommendConfig, own), model="true", domain="--x", split="a: b", batch_size=9)
    command = recommend_command(given)
    assert shlex.split(command)[3:6] == ["recommend", "--config", str(own)]
    assert not {"--k", "--lake"} & set(shlex.split(command)), "as they are there"
    assert settings_of(command, monkeypatch) == given


def test_a_hint_needs_no_configuration_of_the_users_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "conf").mkdir()
    monkeypatch.chdir(tmp_path)
    wanted = RecommendConfig(model="a/b", domain="2", split="null", k=4)
    assert settings_of(recommend_command(wanted), monkeypatch) == wanted
