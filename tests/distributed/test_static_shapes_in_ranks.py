"""Steps of static shapes in two processes: the training of one."""

import json

import pytest
import torch
from safetensors.torch import load_file

from tests.fixtures.trainings import start

LAUNCHER = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone")
MODEL = {"dropout": 0.0}
TRAIN = {"batch_size": 7, "epochs": 2, "min_epochs": 2, "checkpoint_seconds": 0.05}


def trained(folder, lake, task, launcher):
    folder.mkdir()
    settings = {"model": MODEL, "train": TRAIN, "task": {"kind": task}, "name": "run"}
    runtime = {"precision": "fp64", "static_shapes": True}
    process = start(folder, lake, launcher=launcher, runtime=runtime, **settings)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    run = folder / "runs" / "run"
    return load_file(run / "model" / "weights.safetensors"), json.loads((run / "history.json").read_text())


@pytest.mark.parametrize("task", ["next_item", "masked_item"])
def test_two_processes_train_by_static_shapes_as_one_does(task, tiny_lake, tmp_path):
    """Batches of 7: the processes' shares differ, and so do their packed rows. Checkpoints come at any step."""
    one, history = trained(tmp_path / "one", tiny_lake, task, ())
    two, others = trained(tmp_path / "two", tiny_lake, task, LAUNCHER)
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=0, atol=1e-11, msg=name)
    assert [line["loss"] for line in others] == pytest.approx([line["loss"] for line in history], rel=1e-12)
