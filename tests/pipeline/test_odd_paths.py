"""Folders and names with any character: what is written lies where it should, and what can't be is refused by name."""

import os
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest
import yaml

from etl.config import EtlConfig
from etl.plain_path import plain_path
from etl.settings import ConfigError, load, texts
from etl.sources.files import find_files
from tests.fixtures.places import ROOT
from trainer.config import PretrainConfig

ODD = "o d é+&=,@()':[]{}#?%~ %20;!$"


def _run(folder: Path, *command: str) -> str:
    """A command in a folder of that name, which is where it looks for everything."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "GRAFTREC_CONF": str(ROOT / "conf")}
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_from_a_log_to_recommendations_below_an_odd_folder(tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / ODD, tmp_path / "elsewhere"
    folder.mkdir()
    elsewhere.mkdir()
    small = ["--source.users", "120", "--source.items", "60", "--spark.engine", "sail", "--spark.master", "local[2]"]
    _run(folder, "etl", "all", "--config", "etl/demo", *small)
    again = _run(folder, "etl", "all", "--config", "etl/demo", *small, "--lake", str(folder / "lake"))
    assert "11 of 11 jobs unchanged" in again
    _run(folder, "trainer", "pretrain", "--config", "pretrain/demo", "--train.epochs", "1")
    model = "runs/demo-pretrain/model"
    told = _run(folder, "trainer", "evaluate", "--config", "evaluate/default", "--model", model)
    assert "best model demo-pretrain" in told
    recommend = ["recommend", "--config", "recommend/default", "--k", "3", "--spark.engine", "sail"]
    _run(folder, "trainer", *recommend, "--model", model)
    _run(elsewhere, "trainer", "evaluate", "--config", "evaluate/default", "--model", str(folder / model))
    rows = sorted((folder / "lake" / "recommendations").rglob("*.parquet"))
    assert sum(pl.read_parquet(path.open("rb")).height for path in rows) == 120 * 3
    assert (folder / "mlflow.db").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["elsewhere", ODD]


def test_a_plain_path_leads_to_the_folder_and_a_plain_one_stays(tmp_path: Path) -> None:
    assert plain_path(tmp_path) == str(tmp_path)
    link = plain_path(tmp_path / ODD)
    (tmp_path / ODD).mkdir()
    (Path(link) / "file").touch()
    assert (tmp_path / ODD / "file").exists()
    assert link == plain_path(tmp_path / ODD)


@pytest.mark.parametrize("text", ["a #b", "2024", "x: y", "[x]", "{x}", "&x", "*x", "@x", "%x", "!x", "- x", ODD])
def test_a_text_on_the_command_line_means_itself(text: str) -> None:
    source = ["--source.kind", "generator"]
    assert load(EtlConfig, "etl/demo", ["--lake", text, *source]).lake == text
    assert load(EtlConfig, "etl/demo", [f"--lake={text}", *source]).lake == text
    assert texts(["--lake", text]) == {"lake": text}


def test_quotes_and_null_on_the_command_line_are_yaml() -> None:
    config = load(PretrainConfig, "pretrain/demo", ["--name", "'a b'", "--data.predicted", "null"])
    assert (config.name, config.data.predicted) == ("a b", None)


@pytest.mark.parametrize("name", ["../x", "/x", "a/../../x", "a//x", "x/", ".", "x" * 300, "é" * 120])
def test_a_name_that_no_file_of_its_folder_can_have_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"name: expected (a name that stays|at most 180 bytes).*found"):
        load(PretrainConfig, "pretrain/demo", [f"--name={name}"])
    domains = yaml.safe_dump({"base": str(ROOT / "conf" / "etl" / "demo"), "domains": [{"name": name}]})
    (tmp_path / "domains.yaml").write_text(domains)
    with pytest.raises(ConfigError, match=r"domains.0.name: expected"):
        load(EtlConfig, tmp_path / "domains.yaml")


def test_a_roots_own_name_is_no_pattern(tmp_path: Path) -> None:
    for name in (ODD, "o*", "[ab]"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "day1.csv").touch()
        for path in ("*.csv", "day[0-9].csv", "day1.csv", ""):
            found = find_files(str(tmp_path / name), path, what="source.events.path")
            assert [file.name for file in found] == ["day1.csv"], (name, path)
