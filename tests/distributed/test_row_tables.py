"""Row-wise tables shared out over processes: the same training as in one, killed anywhere, on any number of them."""

import json
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from tests.fixtures.places import ROOT

SETTINGS = {
    "model": {"width": 16, "blocks": 1, "max_length": 24, "user_width": 4, "knowledge_width": 4, "dropout": 0.0},
    "task": {"kind": "masked_item", "loss": {"kind": "sampled", "num_negatives": 16}},
    "train": {
        "batch_size": 7,
        "epochs": 2,
        "min_epochs": 2,
        "warmup_steps": 0,
        "checkpoint_seconds": 600,
        "table_optimizer": "rowwise",
    },
    "runtime": {"progress": False, "threads": 1, "precision": "fp64"},
    "tracking": {"enabled": False},
}
TABLES = ("item_embedding.weight", "output_bias", "user_embedding.weight", "entity_embedding.weight")


def start(folder, lake, name, processes, *, recipe="pretrain", **sections):
    """A recipe of the trainer in so many processes; its run's folder is <folder>/runs/<name>."""
    settings = {**SETTINGS, "name": name, "output": str(folder / "runs"), "data": {"lake": lake, "domain": "source"}}
    for section, values in sections.items():
        settings[section] = {**settings[section], **values} if isinstance(values, dict) else values
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps(settings))
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--standalone"]
    command = [sys.executable, *(launcher if processes > 1 else []), "-m", "trainer", recipe, "--config", str(path)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=folder)


def finish(process):
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 0, output
    return output


def weights_of(run):
    return load_file(run / "model" / "weights.safetensors") | load_file(run / "model" / "users.safetensors")


def history_of(run):
    return [(e["loss"], e["metrics"]) for e in json.loads((run / "history.json").read_text())]


def assert_alike(left, right, tolerance):
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        torch.testing.assert_close(right[name], tensor, rtol=0, atol=tolerance, msg=name)


@pytest.fixture(scope="module")
def alone(tiny_lake, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("alone")
    finish(start(folder, tiny_lake, "run", 1))
    return folder / "runs" / "run"


@pytest.fixture(scope="module")
def together(tiny_lake, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("together")
    finish(start(folder, tiny_lake, "run", 2))
    return folder / "runs" / "run"


def test_two_processes_give_the_weights_and_metrics_of_one(alone, together):
    one, two = weights_of(alone), weights_of(together)
    assert set(TABLES) <= set(one)
    assert_alike(one, two, 1e-12)
    for (loss, metrics), (same_loss, same_metrics) in zip(history_of(alone), history_of(together), strict=True):
        assert same_loss == pytest.approx(loss, rel=1e-12)
        assert same_metrics == pytest.approx(metrics, abs=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(1, 1), (2, 2), (2, 1), (1, 2)])
def test_a_killed_run_goes_on_in_any_number_of_processes(before, after, tiny_lake, tmp_path, alone, together):
    run = tmp_path / "runs" / "run"
    process = start(tmp_path, tiny_lake, "run", before, train={"checkpoint_seconds": 0})
    deadline = time.monotonic() + 120
    while len(list(run.glob("checkpoints/step-*/manifest.json"))) < 2 and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    for one in [*psutil.Process(process.pid).children(recursive=True), process]:  # torchrun's have groups of their own
        one.kill()
    process.communicate(timeout=60)
    assert not (run / "done.json").exists(), "killed too late to show anything"
    parts = {path.name for path in run.glob("checkpoints/step-*/model.*-of-*.safetensors")}
    assert parts == {f"model.{number}-of-{before}.safetensors" for number in range(before)}

    assert "resuming at epoch" in finish(start(tmp_path, tiny_lake, "run", after, train={"checkpoint_seconds": 0}))
    whole = together if after == 2 else alone
    assert_alike(weights_of(run), weights_of(whole), 0 if before == after else 1e-12)
    if before == after:
        assert history_of(run) == history_of(whole)


@pytest.mark.slow
def test_each_process_grafts_its_rows_of_the_parents_tables(tiny_lake, tmp_path, together):
    still = {"learning_rate": 1e-30, "table_learning_rate": 1e-30}
    sections = {
        "recipe": "finetune",
        "transfer": "deep",
        "parent": str(together / "model"),
        "data": {"domain": "target"},
    }
    for name, processes in (("one", 1), ("two", 2)):
        finish(start(tmp_path, tiny_lake, name, processes, train=still, **sections))
    one, two = (weights_of(tmp_path / "runs" / name) for name in ("one", "two"))
    assert_alike(one, two, 1e-12)
    parent = weights_of(together)
    for name in ("user_embedding.weight", "entity_embedding.weight"):
        torch.testing.assert_close(two[name], parent[name], rtol=0, atol=1e-25, msg=name)


@pytest.mark.slow
def test_the_full_ranking_of_a_shared_out_table_takes_many_blocks(tmp_path):
    """Each process ranks users of its own against rows that all keep together, block by block."""
    worker = ROOT / "tests/fixtures/rank_in_blocks.py"
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    done = subprocess.run(
        [sys.executable, *launcher, str(worker), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    told = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert told[0]["shared_out"] == told[1]["shared_out"] == pytest.approx(told[0]["whole"], abs=1e-12)
    assert told[0]["blocks"] > 10
