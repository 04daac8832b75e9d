"""Checkpoints that are damaged, cut short, or somebody else's: the one before is used, or the run ends in one line."""

import contextlib
import json
import os
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from etl.settings import GraftrecError
from tests.fixtures.hostile import EXAMPLES, SEEDED, copied, json_values, sealed, spoilt
from tests.fixtures.trainings import tiny
from trainer.config import PretrainConfig
from trainer.recipes.pretrain import run as pretrain
from trainer.training import checkpoint
from trainer.training.checkpoint import Checkpoint
from trainer.training.loop import Stopped


@pytest.fixture
def root(tmp_path):
    for step in (1, 2):
        tensors = {"model": {"w": torch.full((3,), float(step))}}
        checkpoint.save(tmp_path / "c", step, Checkpoint(tensors, {"at": step}), keep=3)
    return tmp_path / "c"


def newest(root):
    said = []
    found = checkpoint.newest(root, warn=said.append)
    assert all("\n" not in line for line in said)
    return found, said


MANIFESTS = ["{}", "[]", "null", "3", "", "{", "[" * 50_000, '{"model.safetensors": 1}', '{"../x": "' + "0" * 64 + '"}']


@pytest.mark.parametrize("text", MANIFESTS)
def test_a_manifest_that_is_none_or_names_too_little_is_passed_over(root, text):
    (root / "step-0000000002" / "manifest.json").write_text(text)
    found, said = newest(root)
    assert found.state == {"at": 1}
    assert len(said) == 1


def test_a_checkpoint_of_links_or_of_other_things_is_passed_over(root, tmp_path):
    folder = root / "step-0000000002"
    os.rename(folder / "state.json", tmp_path / "state.json")
    (folder / "state.json").symlink_to(tmp_path / "state.json")
    assert newest(root)[0].state == {"at": 1}


@pytest.mark.parametrize("text", ["[]", "null", "{", "3"])
def test_a_state_that_is_none_is_passed_over(root, text):
    (root / "step-0000000002" / "state.json").write_text(text)
    sealed(root / "step-0000000002")
    assert newest(root)[0].state == {"at": 1}


def test_a_file_that_the_manifest_does_not_name_is_no_weights(root):
    save_file({"w": torch.full((3,), 9.0)}, root / "step-0000000002" / "best.safetensors")
    assert checkpoint.weights(root / "step-0000000002", "best") == {}


@pytest.mark.parametrize("names", [["t.1-of-2.safetensors"], ["t.0-of-3.safetensors", "t.1-of-3.safetensors"]])
def test_a_table_of_which_a_part_is_missing_is_passed_over(root, names):
    folder = root / "step-0000000002"
    manifest = json.loads((folder / "manifest.json").read_text())
    for name in names:
        save_file({"t": torch.zeros(2, 2)}, folder / name)
    (folder / "manifest.json").write_text(json.dumps(manifest | dict.fromkeys(names, "")))
    sealed(folder)
    found, said = newest(root)
    assert found.state == {"at": 1}
    assert "expected t of" in said[0]


# --- of a run -------------------------------------------------------------------------------------------------------


def config(folder, lake):
    train = {"epochs": 2, "min_epochs": 0, "checkpoint_seconds": 0}
    return tiny(PretrainConfig, folder, lake, name="run", output="runs", train=train)


@pytest.fixture(scope="module")
def stopped(tiny_lake, tmp_path_factory):
    """The folder of a run that was stopped after its first epoch."""
    folder = tmp_path_factory.mktemp("stopped")

    def judge(progress):
        raise Stopped("after an epoch")

    with contextlib.chdir(folder), pytest.raises(Stopped):
        pretrain(config(folder, tiny_lake), judge=judge)
    return folder / "runs" / "run"


@pytest.fixture
def run(stopped, tmp_path, monkeypatch):
    """(its folder, its newest checkpoint), the only one."""
    monkeypatch.chdir(tmp_path)
    folder = copied(stopped, tmp_path / "runs" / "run")
    *older, last = sorted((folder / "checkpoints").glob("step-*"))
    for other in older:
        shutil.rmtree(other)
    return folder, last


def test_a_stopped_run_is_gone_on_with(run, tiny_lake, tmp_path, capsys):
    assert pretrain(config(tmp_path, tiny_lake)).metrics["epochs"] == 2
    assert "resuming at epoch" in capsys.readouterr().out


@pytest.mark.parametrize(
    "change",
    [
        lambda weights: {name: one[..., :1] if one.ndim else one for name, one in weights.items()},
        lambda weights: {f"x.{name}": one for name, one in weights.items()},
        lambda weights: {},
    ],
)
@pytest.mark.parametrize("stem", ["model", "optimizer"])
def test_a_checkpoint_of_other_weights_ends_the_run_in_a_line(run, tiny_lake, tmp_path, stem, change):
    _, last = run
    changed = {name: one.contiguous() for name, one in change(load_file(last / f"{stem}.safetensors")).items()}
    if stem == "optimizer" and not changed:
        return  # moments begin anew
    save_file(changed, last / f"{stem}.safetensors")
    sealed(last)
    with pytest.raises(GraftrecError, match=r"checkpoint .*remove the run's folder") as caught:
        pretrain(config(tmp_path, tiny_lake))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("progress",), None),
        (("progress",), []),
        (("progress", "step"), "x"),
        (("progress", "step"), None),
        (("progress", "history"), {}),
        (("progress", "history"), [1]),
        (("progress", "history"), [{"epoch": 1}]),
        (("progress", "best_score"), "high"),
        (("loader",), None),
        (("loader", "epoch"), "x"),
        (("loader", "epoch"), -1),
        (("loader", "step"), -5),
    ],
)
def test_a_state_of_another_kind_ends_the_run_in_a_line(run, tiny_lake, tmp_path, path, value):
    _, last = run
    state = json.loads((last / "state.json").read_text())
    place = state
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    (last / "state.json").write_text(json.dumps(state))
    sealed(last)
    with pytest.raises(GraftrecError, match=r"checkpoint .*remove the run's folder") as caught:
        pretrain(config(tmp_path, tiny_lake))
    assert "\n" not in str(caught.value)


@given(st.data())
@settings(SEEDED, max_examples=EXAMPLES)
def test_any_state_and_manifest_are_read_or_passed_over(tmp_path, data):
    root = tmp_path / "any"
    shutil.rmtree(root, ignore_errors=True)
    checkpoint.save(root, 1, Checkpoint({"model": {"w": torch.zeros(3)}}, {"at": 1, "more": {"x": [1]}}), keep=3)
    folder = root / "step-0000000001"
    if data.draw(st.booleans()):
        (folder / "state.json").write_text(json.dumps(data.draw(spoilt({"at": 1, "more": {"x": [1]}}) | json_values)))
        sealed(folder)
    else:
        manifest = json.loads((folder / "manifest.json").read_text())
        (folder / "manifest.json").write_text(json.dumps(data.draw(spoilt(manifest))))
    found, said = newest(root)
    assert (found is None) == bool(said)
    if found is not None:
        assert isinstance(found.state, dict)
