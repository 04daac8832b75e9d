"""Names beyond ASCII where the locale is C: files are found, and messages can be printed."""

import os
import subprocess
import sys

import pytest


def command(folder, *words, **environment):
    words = [sys.executable, "-m", *words]
    done = subprocess.run(
        words, cwd=folder, env=os.environ | environment, capture_output=True, timeout=400, check=False
    )
    return done.returncode, (done.stdout + done.stderr).decode("utf-8", "replace")


@pytest.mark.parametrize("environment", [{"LC_ALL": "C"}, {"LC_ALL": "POSIX", "PYTHONIOENCODING": "ascii"}])
def test_help_is_printed(tmp_path, environment):
    code, said = command(tmp_path, "trainer", "pretrain", "--help", **environment)
    assert code == 0
    assert "--train.epochs" in said


def test_a_name_is_refused_where_python_reads_no_utf_8(tmp_path):
    words = ["trainer", "pretrain", "--config", "pretrain/demo", "--name", "né"]
    code, said = command(tmp_path, *words, LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    assert code == 2
    assert "Traceback" not in said
    assert "name: expected text that a file or path can hold" in said


@pytest.mark.slow
def test_tables_and_models_of_such_names_are_written(tmp_path):
    log = ["--source.users", "120", "--source.items", "60", "--lake", "lakeé"]
    code, said = command(tmp_path, "etl", "all", "--config", "etl/demo", *log, LC_ALL="C")
    assert code == 0, said
    words = ["trainer", "pretrain", "--config", "pretrain/demo", "--data.lake", "lakeé", "--name", "né"]
    words += ["--train.epochs", "1", "--train.min_epochs", "0", "--tracking.enabled", "false"]
    code, said = command(tmp_path, *words, LC_ALL="C")
    assert code == 0, said
    assert (tmp_path / "runs" / "né" / "model" / "manifest.json").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lakeé", "runs"]
