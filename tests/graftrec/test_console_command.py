"""The console command: its table, its help, and how its mistakes end."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from etl.config import EtlConfig, etl_command
from etl.settings import load
from graftrec.commands import COMMANDS, main
from tests.fixtures.places import ROOT
from trainer.__main__ import RECIPES


def ended(arguments: list[str]) -> int:
    try:
        return main(arguments)
    except SystemExit as left:
        return int(left.code or 0)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_under_its_name(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert ended([name, "--help"]) == 0
    assert capsys.readouterr().out.startswith(f"usage: graftrec {name} ")
    assert ended([name, "--version"]) == 0
    assert re.fullmatch(r"graftrec \d+\.\d+\.\d+\n", capsys.readouterr().out)


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert set(RECIPES) < set(COMMANDS)
    assert ended(["--help"]) == 0
    printed = capsys.readouterr().out
    assert all(
        re.search(rf"^  {name} +{re.escape(command.about)}$", printed, re.M) for name, command in COMMANDS.items()
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "graftrec: the following arguments are required: command"),
        (["pretrian"], "graftrec: argument command: invalid choice: 'pretrian'"),
        (["--config", "etl/demo"], "graftrec: "),
        (["pretrain"], "graftrec pretrain: the following arguments are required: --config; graftrec pretrain --help"),
        (["pretrain", "--config", "pretrain/demo", "--trian", "1"], "pretrain: .*unknown setting trian"),
        (["etl"], "graftrec etl: the following arguments are required: command"),
        (["etl", "--config", "etl/nope"], "etl: no configuration etl/nope"),
        (["pipeline", "--config", "nope"], "pipeline: no configuration nope"),
        (["arms", "--experiment", "nope"], "arms: no configuration arms/nope"),
        (["protocols"], "graftrec protocols: the following arguments are required: --experiment"),
        (["completion", "fish"], "graftrec completion: argument shell: invalid choice: 'fish'"),
        (["doctor", "--config", "nope/nope"], "doctor: no configuration nope/nope"),
    ],
)
def test_a_mistake_is_one_line_and_code_2(
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert ended(arguments) == 2
    assert re.fullmatch(rf"{message}[^\n]*\n", capsys.readouterr().err)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_package_is_named(tmp_path: Path) -> None:
    """Of those that everything needs, and of those that a command needs: both are found here and hidden."""
    for package, command, message in (
        (
            "pydantic",
            ["--version"],
            "graftrec: expected the Python package pydantic, found none; install graftrec anew\n",
        ),
        (
            "torch",
            ["pretrain", "--config", "pretrain/demo", "--data.lake", "none"],
            "pretrain: expected the Python package torch, found none; `graftrec doctor` says what to install\n",
        ),
    ):
        script = f"import sys; sys.modules[{package!r}] = None; from graftrec.__main__ import run; run()"
        done = subprocess.run(
            [sys.executable, "-c", script, *command],
            cwd=tmp_path,
            env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert (done.returncode, done.stderr) == (2, message)


def test_hints_spell_a_command_as_it_was_started(monkeypatch: pytest.MonkeyPatch) -> None:
    from trainer.config import RecommendConfig
    from trainer.recipes.hints import recommend_command

    load(EtlConfig, "etl/demo")
    for started, etl, trainer in (
        ("/opt/bin/graftrec", "graftrec etl all", "graftrec recommend"),
        ("/opt/graftrec/__main__.py", "python -m etl all", "python -m trainer recommend"),
    ):
        monkeypatch.setattr(sys, "argv", [started, "pipeline"])
        assert etl_command("lake").startswith(f"`{etl} --config etl/demo")
        assert recommend_command(RecommendConfig()).startswith(f"{trainer} --config recommend/default")


def test_the_mlflow_project_and_make_start_the_same_commands() -> None:
    """One implementation: whatever starts a step names a command of this table."""
    entries = yaml.safe_load((ROOT / "mlflow_projects" / "MLproject").read_text())["entry_points"]
    texts = [entry["command"] for entry in entries.values()]
    started = [re.search(r"python -m graftrec ([\w-]+)", text) for text in texts]
    assert all(started)
    assert {found[1] for found in started if found} <= set(COMMANDS)
    named = re.findall(r"-m graftrec ([\w-]+)", (ROOT / "Makefile").read_text())
    assert {"pipeline", "experiment", "arms", "protocols"} <= set(named) <= set(COMMANDS)
    assert not list((ROOT / "mlflow_projects").glob("*.py"))
