"""Every model and every task, stopped in mid-epoch and gone on with, ends with the weights of a run that was not."""

import json
import signal
import subprocess
import sys
import time

import pytest
from safetensors.torch import load_file

from tests.fixtures.lakes import build_tiny_lake
from tests.fixtures.trainings import TINY, equal_weights
from trainer.config import FinetuneConfig, PretrainConfig
from trainer.recipes.finetune import run as finetune
from trainer.recipes.pretrain import run as pretrain
from trainer.training import checkpoint

BERT4REC = {"kind": "bert4rec", "width": 16, "blocks": 1, "max_length": 24, "user_width": 4, "knowledge_width": 4}
PETERREC = {"kind": "peterrec", "width": 16, "dilations": [1, 2], "max_length": 24}
CASER = {"kind": "caser", "width": 8, "user_width": 4, "knowledge_width": 4, "max_length": 24}
DUPN = {"kind": "dupn", "width": 16, "max_length": 24, "user_width": 4, "event_types": True}
MLP = {"kind": "mlp", "width": 8, "user_width": 6, "layers": [8], "max_length": 24}
BCE = {"kind": "bce", "num_negatives": 20}
KINDS = {"event_types": ["look", "buy"]}

RUNS = {  # model, task, data
    "bert4rec masked item": (BERT4REC, {"kind": "masked_item"}, {}),
    "bert4rec next basket": (BERT4REC, {"kind": "next_basket"}, {}),
    "peterrec next item": (PETERREC, {"kind": "next_item"}, {}),
    "peterrec target item": (
        PETERREC,
        {"kind": "target_item"},
        {"domain": "all", "predicted": "target", "split": "joint-5"},
    ),
    "peterrec profile": (PETERREC, {"kind": "profile", "attribute": "taste"}, {}),
    "peterrec pairs of baskets": (PETERREC, {"kind": "basket_pair"}, {}),
    "peterrec clicks": (PETERREC, {"kind": "click", "content": ["categories"], "impressions": ["look"]}, {}),
    "caser next items": (CASER, {"kind": "next_item", "targets": 3, "loss": BCE}, {}),
    "dupn several": (
        DUPN,
        {"kind": "multi", "tells": ["next_item", "category", "event_type", "value"], "weighting": "uncertainty"},
        KINDS,
    ),
    "bert4rec next item, times": (BERT4REC | {"time": {"bias": True, "intervals": True}}, {"kind": "next_item"}, {}),
    "bert4rec masked item, times": (BERT4REC | {"time": {"bias": True}}, {"kind": "masked_item"}, {}),
    "caser next items, times": (CASER | {"time": {"intervals": True}}, {"kind": "next_item", "loss": BCE}, {}),
    "mlp next item": (MLP, {"kind": "next_item", "loss": BCE}, {}),
}
PATCHES = {"serial": {"kind": "adapter"}, "lora": {"kind": "lora"}}
TRAIN = {"batch_size": 16, "epochs": 2, "warmup_steps": 0, "checkpoint_seconds": 0, "min_epochs": 2}


class Killed(BaseException):
    """Nothing catches it, as nothing catches SIGKILL."""


@pytest.fixture(scope="module")
def lake(tmp_path_factory):
    return build_tiny_lake(tmp_path_factory.mktemp("resumed") / "lake", num_users=100, described=True)


def settings(kind, lake, folder, name, **more):
    model, task, data = RUNS[name]
    given = {
        "name": "run",
        "output": str(folder / "runs"),
        "model": model,
        "task": task,
        "train": TRAIN,
        "data": {"lake": str(lake), "domain": "source"} | data,
    }
    return kind.model_validate({**TINY, **given, **more})


def weights_of(result):
    tables = (result.model / name for name in ("weights.safetensors", "users.safetensors"))
    return {name: tensor for path in tables if path.is_file() for name, tensor in load_file(path).items()}


def dying(monkeypatch, after):
    """Die right behind the checkpoint of a step, each `after`-th time that one is written."""
    save, calls = checkpoint.save, []

    def saved(*given, **more):
        found = save(*given, **more)
        calls.append(1)
        if len(calls) % after == 0:
            raise Killed
        return found

    monkeypatch.setattr(checkpoint, "save", saved)


def gone_on_with(run, config, monkeypatch, *, after):
    """(what it leaves, how often it died)."""
    deaths = 0
    with monkeypatch.context() as patch:
        dying(patch, after)
        while True:
            try:
                return run(config), deaths
            except Killed:
                deaths += 1
                assert deaths < 20


@pytest.mark.parametrize("name", RUNS)
def test_a_run_that_died_again_and_again_ends_with_the_same_weights(name, lake, tmp_path, monkeypatch):
    whole = pretrain(settings(PretrainConfig, lake, tmp_path / "whole", name))
    config = settings(PretrainConfig, lake, tmp_path / "died", name)
    result, deaths = gone_on_with(pretrain, config, monkeypatch, after=4)
    assert deaths >= 2
    assert equal_weights(weights_of(result), weights_of(whole))
    told = [json.loads((one.folder / "history.json").read_text()) for one in (result, whole)]
    assert [(e["loss"], e["metrics"]) for e in told[0]] == [(e["loss"], e["metrics"]) for e in told[1]]


@pytest.mark.parametrize("patch", PATCHES)
def test_patches_too(patch, lake, tmp_path, monkeypatch):
    name = "peterrec next item"
    parent = pretrain(settings(PretrainConfig, lake, tmp_path / "parent", name)).model
    more = {
        "transfer": "patch",
        "patch": {"bottleneck": 4, **PATCHES[patch]},
        "parent": str(parent),
        "data": {"lake": str(lake), "domain": "target"},
    }
    whole = finetune(settings(FinetuneConfig, lake, tmp_path / "whole", name, **more))
    config = settings(FinetuneConfig, lake, tmp_path / "died", name, **more)
    result, deaths = gone_on_with(finetune, config, monkeypatch, after=5)
    assert deaths >= 1
    assert equal_weights(weights_of(result), weights_of(whole))


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_a_process_killed_in_mid_epoch_ends_with_the_same_weights(name, lake, tmp_path):
    whole = pretrain(settings(PretrainConfig, lake, tmp_path / "whole", name))
    config = settings(PretrainConfig, lake, tmp_path / "killed", name)
    path, checkpoints = tmp_path / "run.json", tmp_path / "killed" / "runs" / "run" / "checkpoints"
    path.write_text(config.model_dump_json())
    process = subprocess.Popen([sys.executable, "-m", "trainer", "pretrain", "--config", str(path)], cwd=tmp_path)
    deadline = time.monotonic() + 120
    while len(list(checkpoints.glob("step-*/manifest.json"))) < 2 and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait(60) == -signal.SIGKILL, "it ended before it was killed"
    assert list(checkpoints.glob("step-*"))
    assert equal_weights(weights_of(pretrain(config)), weights_of(whole))
