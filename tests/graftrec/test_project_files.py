"""The MLflow Project of an installed graftrec: its files in a folder, and a run of one entry point."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from graftrec.project import FILES, SHIPPED, main
from tests.fixtures.places import ROOT


def test_the_files_are_written_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([]) == main([]) == 0
    assert {path.name for path in (tmp_path / "mlflow_projects").iterdir()} == set(FILES)
    for name in FILES:
        assert (tmp_path / "mlflow_projects" / name).read_text() == (SHIPPED / name).read_text()
    (tmp_path / "mlflow_projects" / FILES[1]).write_text("mine")
    (tmp_path / "mlflow_projects" / FILES[0]).unlink()
    assert main([]) == 2
    assert "expected nothing or the same file, found another" in capsys.readouterr().err
    assert not (tmp_path / "mlflow_projects" / FILES[0]).exists(), "nothing half-written"


@pytest.mark.slow
def test_mlflow_runs_them_in_a_folder_of_ones_own(tmp_path: Path) -> None:
    assert main([str(tmp_path / "mlflow_projects")]) == 0
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MLFLOW_", "GRAFTREC_"))}
    environment |= {"PYTHONPATH": str(ROOT), "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    given = ("source.users=200", "source.items=80", "spark.engine=sail", "lake=mine")
    command = [sys.executable, "-m", "mlflow", "run", "mlflow_projects", "--env-manager", "local", "-e", "etl"]
    command += [word for one in given for word in ("-P", one)]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=400, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "mine" / "releases").is_dir()
