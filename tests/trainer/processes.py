"""A run by one process or several, as torchrun starts them."""

import subprocess
import sys

from trainer.artifact import load_artifact


def trained_by(processes, config, folder):
    """Pre-train as configured in a process group of its own; gives the model. `config.output` lies in `folder`."""
    path = folder / f"{config.name}.json"
    path.write_text(config.model_dump_json())
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [sys.executable, *launcher, "-m", "trainer", "pretrain", "--config", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return load_artifact(folder / "runs" / config.name / "model")
