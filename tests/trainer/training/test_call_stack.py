"""How much of ours one reads from the command to the first step of the optimizer."""

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.fixtures.places import ROOT

MOST_FILES, MOST_LINES = 9, 1_500
# At the first step: the files on the stack, outermost first.
SCRIPT = """
import json, runpy, sys, traceback
import torch
def step(self):
    print("STACK", json.dumps([frame.filename for frame in traceback.extract_stack()]), flush=True)
    raise SystemExit(0)
torch.optim.AdamW.step = step
sys.argv = ["trainer", "pretrain", "--config", "pretrain/demo", *sys.argv[1:]]
runpy.run_module("trainer", run_name="__main__", alter_sys=True)
"""


def test_few_files_lie_between_a_command_and_the_first_step(tiny_lake, tmp_path):
    settings = ["--data.lake", str(tiny_lake), "--tracking.enabled", "false", "--runtime.progress", "false"]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *settings],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "GRAFTREC_CONF": str(ROOT / "conf")},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("STACK ")] or [done.stderr]
    stack = [Path(name) for name in json.loads(line.removeprefix("STACK "))]
    rooms = (ROOT / "etl", ROOT / "trainer")
    ours = [path for path in dict.fromkeys(stack) if any(path.is_relative_to(room) for room in rooms)]
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in ours}
    total = sum(lengths.values())
    print(f"\n{len(lengths)} files, {total:,} lines: {lengths}")
    assert "trainer/recipes/pretrain.py" in lengths
    assert len(lengths) <= MOST_FILES
    assert total <= MOST_LINES
    told = f"{len(lengths)} files of ours, {round(total, -2):,} lines to the nearest hundred"
    assert told in (ROOT / "trainer" / "README.md").read_text(encoding="utf-8"), told
