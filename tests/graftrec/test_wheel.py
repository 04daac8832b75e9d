"""The wheel: built, installed into an environment of its own, and run in an empty folder with a space in its name."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from deltalake import DeltaTable

from tests.fixtures.places import ROOT

SOURCES = ("etl", "trainer", "graftrec", "conf", "mlflow_projects")
FILES = ("pyproject.toml", "README.md", "LICENSE")
SMALL = ("--config", "etl/demo", "--source.users", "200", "--source.items", "80", "--spark.engine", "sail")


def run(*words: str | Path, cwd: Path) -> "subprocess.CompletedProcess[str]":
    """Without what would lead to this checkout, or to a store."""
    ours = ("PYTHON", "GRAFTREC_", "MLFLOW_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    command = list(map(str, words))
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=500, check=False)


def succeed(*words: str | Path, cwd: Path) -> str:
    done = run(*words, cwd=cwd)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, since a build leaves files beside its sources, by the backend that is here, offline."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        shutil.copytree(ROOT / name, folder / "sources" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in FILES:
        shutil.copy2(ROOT / name, folder / "sources")
    build = ("-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", folder / "built", ".")
    succeed(sys.executable, *build, cwd=folder / "sources")
    (built,) = (folder / "built").glob("graftrec-*.whl")
    return built


@pytest.fixture(scope="module")
def binaries(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`bin` of a fresh environment with the wheel; the packages that it needs are those of this test's environment."""
    environment = tmp_path_factory.mktemp("environment") / "fresh"
    succeed(sys.executable, "-m", "venv", "--without-pip", environment, cwd=wheel.parent)
    python = environment / "bin" / "python"
    install = ("install", "--quiet", "--no-deps", "--no-index", wheel)
    succeed(sys.executable, "-m", "pip", "--python", python, *install, cwd=wheel.parent)
    own = Path(succeed(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=environment).strip())
    (own / "needed.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    return environment / "bin"


@pytest.fixture
def empty(tmp_path: Path) -> Path:
    folder = tmp_path / "an empty folder"
    folder.mkdir()
    return folder


def test_a_wheel_has_every_configuration_and_the_project(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    found = {name.removeprefix("graftrec/conf/") for name in names if name.startswith("graftrec/conf/")}
    assert found == {path.relative_to(ROOT / "conf").as_posix() for path in (ROOT / "conf").rglob("*.yaml")}
    assert {"graftrec/mlflow_projects/MLproject", "graftrec/mlflow_projects/python_env.yaml"} <= names
    files = [
        path for package in ("etl", "trainer", "graftrec") for path in (ROOT / package).rglob("*") if path.is_file()
    ]
    assert {path.relative_to(ROOT).as_posix() for path in files if path.suffix not in (".pyc", ".md")} <= names


def test_a_wheel_works_in_an_empty_folder(binaries: Path, empty: Path) -> None:
    version = succeed(binaries / "graftrec", "--version", cwd=empty)
    assert version.startswith("graftrec ")
    doctor = succeed(binaries / "graftrec", "doctor", "--config", "pipeline/demo", cwd=empty)
    conf = binaries.parent / "lib"
    assert str(conf) in doctor, "the configurations of the wheel"
    assert list(empty.iterdir()) == [], "neither leaves anything"
    succeed(binaries / "graftrec", "etl", *SMALL, cwd=empty)
    rows = DeltaTable(empty / "lake" / "sequences").to_pyarrow_table(columns=["user"]).num_rows
    assert rows > 100
    assert "0 rows in quarantine" in succeed(binaries / "graftrec", "etl", "report", "--lake", "lake", cwd=empty)


def test_old_spellings_stay_in_a_wheel(binaries: Path, empty: Path) -> None:
    for module in ("etl", "trainer", "graftrec"):
        printed = succeed(binaries / "python", "-m", module, "--version", cwd=empty)
        assert printed == succeed(binaries / "graftrec", "--version", cwd=empty)


@pytest.mark.slow
@pytest.mark.ci
def test_a_pipeline_runs_from_a_wheel(binaries: Path, empty: Path) -> None:
    """By configurations of the user's own folder that are based on the wheel's; again, and all of it is reused."""
    shop = {
        "etl": "{base: demo, lake: shop lake, source: {users: 300, items: 120}, spark: {engine: sail}}",
        "pretrain": "{base: demo, train: {epochs: 1}}",
        "finetune": "{base: demo, train: {epochs: 1}}",
        "promote": "{base: default, gate: {base: default, min_seeds: 2}}",
        "pipeline": (
            "{base: demo, name: shop, runs: my runs, registered_model: shop, etl: shop, pretrain: shop, "
            "finetune: shop, promote: shop, seeds: [0, 1], transfers: [none, deep], reads_all: false, "
            "cold_users: false}"
        ),
    }
    for section, text in shop.items():
        (empty / "conf" / section).mkdir(parents=True)
        (empty / "conf" / section / "shop.yaml").write_text(text)
    for again in (False, True):
        done = run(binaries / "graftrec", "pipeline", "--config", "pipeline/shop", cwd=empty)
        assert done.returncode in (0, 3), done.stdout + done.stderr  # after one epoch the gate may refuse
        assert "\nmodel " in done.stdout
        trainings = re.findall(r"^\[\d+/\d+\] (?:pretrain|target).*$", done.stdout, re.MULTILINE)
        assert [": unchanged, " in line for line in trainings] == [again] * 5, done.stdout
        if done.returncode == 3:
            assert "graftrec recommend --config recommend/default" in done.stdout, "as this command was started"
