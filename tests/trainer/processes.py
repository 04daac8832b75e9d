"""Recipes in processes of their own."""

import subprocess
import sys

from trainer.inference.model_folder import load_model


def trained_by(processes, config, folder):
    """Pre-train as configured, as torchrun starts so many processes; gives the model. `config.output` lies in
    `folder`."""
    path = folder / f"{config.name}.json"
    path.write_text(config.model_dump_json())
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [sys.executable, *launcher, "-m", "trainer", "pretrain", "--config", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return load_model(folder / "runs" / config.name / "model")


def recommended_on_sail(config):
    """Run the recipe `recommend` on Sail: in a process of its own, since this one has a Spark session."""
    settings = config.model_copy(update={"spark": config.spark.model_copy(update={"engine": "sail"})})
    script = (
        "import sys; from trainer.recipes import recommend; from trainer.config import RecommendConfig;"
        "recommend.run(RecommendConfig.model_validate_json(sys.argv[1]))"
    )
    command = [sys.executable, "-c", script, settings.model_dump_json()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
