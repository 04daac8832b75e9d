"""Completion in a real bash: commands, settings, configurations."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from graftrec.commands import COMMANDS
from graftrec.completion import script
from tests.fixtures.places import ROOT

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")


def completed(folder: Path, *words: str) -> set[str]:
    """What bash offers for the last of these words of a command line."""
    (folder / "graftrec").write_text(f'#!/bin/sh\necho asked >> asked\nexec "{sys.executable}" -m graftrec "$@"\n')
    (folder / "graftrec").chmod(0o755)
    line = " ".join(f"'{word}'" for word in words)
    lines = [
        script("bash", list(COMMANDS)),
        f"COMP_WORDS=(./graftrec {line}); COMP_CWORD={len(words)}",
        "_graftrec; _graftrec",
        'printf "%s\\n" "${COMPREPLY[@]}"',
    ]
    done = subprocess.run(
        ["bash", "-c", "\n".join(lines)],
        cwd=folder,
        env={"PYTHONPATH": str(ROOT), "PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == ""
    return set(done.stdout.split("\n")) - {""}


def test_commands_are_completed(tmp_path: Path) -> None:
    assert completed(tmp_path, "") == {*COMMANDS, "--help", "--version"}
    assert completed(tmp_path, "pr") == {"pretrain", "promote", "protocols", "project"}
    assert not (tmp_path / "asked").exists(), "no process is started for it"


def test_settings_of_a_command_are_completed_and_asked_for_once(tmp_path: Path) -> None:
    found = completed(tmp_path, "pretrain", "--config", "pretrain/demo", "--train.e")
    assert found == {"--train.epochs"}
    assert (tmp_path / "asked").read_text() == "asked\n"
    assert {"--config", "--data", "--etl.lake"} <= completed(tmp_path, "pipeline", "--")
    assert completed(tmp_path, "run-etl", "--kcore.min_u") == {"--kcore.min_user"}
    assert completed(tmp_path, "nope", "--train.e") == set()


def test_configurations_are_completed_the_users_own_too(tmp_path: Path) -> None:
    (tmp_path / "conf" / "pipeline").mkdir(parents=True)
    (tmp_path / "conf" / "pipeline" / "shop.yaml").write_text("base: demo")
    (tmp_path / "conf" / "pipeline" / "demo.yaml").write_text("base: demo")
    assert completed(tmp_path, "pipeline", "--config", "pipeline/") == {
        "pipeline/demo",
        "pipeline/ml1m",
        "pipeline/shop",
    }
    assert "conf" in completed(tmp_path, "pipeline", "--config", "co"), "files too"


def test_zsh_has_the_same_by_its_emulation() -> None:
    text = script("zsh", ["etl"])
    assert text.endswith(script("bash", ["etl"]))
    assert "bashcompinit" in text
