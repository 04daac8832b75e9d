"""Times of events in two processes: the training of one."""

import json

import torch
from safetensors.torch import load_file

from tests.fixtures.trainings import start

LAUNCHER = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone")
MODEL = {"dropout": 0.0, "user_width": 0, "knowledge": {}, "time": {"bias": True, "intervals": True}}
TRAIN = {"batch_size": 7, "epochs": 2, "min_epochs": 2, "checkpoint_seconds": 600}


def trained(folder, lake, launcher):
    folder.mkdir()
    settings = {"model": MODEL, "train": TRAIN, "task": {"kind": "next_item"}, "name": "run"}
    process = start(folder, lake, launcher=launcher, runtime={"precision": "fp64"}, **settings)
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 0, output
    run = folder / "runs" / "run"
    metrics = [epoch["metrics"] for epoch in json.loads((run / "history.json").read_text())]
    return load_file(run / "model" / "weights.safetensors"), metrics


def test_two_processes_train_a_model_with_times_as_one_does(tiny_lake, tmp_path):
    one, metrics = trained(tmp_path / "one", tiny_lake, ())
    two, others = trained(tmp_path / "two", tiny_lake, LAUNCHER)
    assert one.keys() == two.keys()
    assert one["time.bias.0.time_embedding"].any()
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=0, atol=1e-11, msg=name)
    for left, right in zip(metrics, others, strict=True):
        assert {name: round(value, 9) for name, value in left.items()} == {
            name: round(value, 9) for name, value in right.items()
        }
