"""Training runs with real processes: killed anywhere they end with the same weights, and two processes equal one."""

import fcntl
import json
import shutil
import signal
import subprocess
import time

import numpy as np
import pytest
import torch

from tests.fixtures.folders import write_model
from tests.fixtures.stores import enter_store, runs_of
from tests.fixtures.trainings import equal_weights, start, tiny, weights_of
from trainer import tracking
from trainer.config import FinetuneConfig, PretrainConfig, TrainConfig
from trainer.data.events import Events
from trainer.data.release import pin
from trainer.evaluation.validation import Validator
from trainer.inference.model_folder import ModelFolderError, load_model, model_hash
from trainer.recipes.finetune import run as finetune
from trainer.recipes.finetune import seen_by_parent
from trainer.recipes.pretrain import run as pretrain
from trainer.recipes.run_folder import RunError
from trainer.training import checkpoint
from trainer.training.checkpoint import Checkpoint
from trainer.training.loop import NonFiniteLoss, learning_rate
from trainer.training.transfer import TransferError


@pytest.fixture(scope="module")
def uninterrupted(tiny_lake, tmp_path_factory):
    """The run that every interrupted one must equal."""
    folder = tmp_path_factory.mktemp("whole")
    return pretrain(tiny(PretrainConfig, folder, tiny_lake, name="whole")).folder


def test_a_model_of_the_same_lake_at_another_place_is_the_same_model(tiny_lake, tmp_path, monkeypatch):
    models = []
    for place in ("here", "elsewhere"):
        lake = shutil.copytree(tiny_lake, tmp_path / place / "lake")
        monkeypatch.chdir(tmp_path / place)
        config = tiny(PretrainConfig, tmp_path, "lake", output="runs", train={"epochs": 1, "min_epochs": 0})
        models.append(pretrain(config).folder.absolute() / "model")
        assert load_model(models[-1]).lake == str(lake)
    assert model_hash(models[0]) == model_hash(models[1])
    (models[0] / "origin.json").write_text('{"lake": ')
    with pytest.raises(ModelFolderError, match="missing or damaged: expected the lake"):
        load_model(models[0])


def test_pretrain_learns_and_leaves_a_model(uninterrupted):
    history = json.loads((uninterrupted / "history.json").read_text())
    assert [line["epoch"] for line in history] == [1, 2, 3]
    assert history[-1]["loss"] < history[0]["loss"]
    model = load_model(uninterrupted / "model")
    best = max(line["metrics"]["NDCG@10"] for line in history)
    assert model.metrics["validation/NDCG@10"] == best
    assert not (uninterrupted / "checkpoints").exists()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_run_stopped_in_mid_epoch_ends_with_the_same_weights(number, tiny_lake, tmp_path, uninterrupted):
    checkpoints = tmp_path / "runs" / "whole" / "checkpoints"
    process = start(tmp_path, tiny_lake, name="whole")
    deadline = time.monotonic() + 120
    while len(list(checkpoints.glob("step-*/manifest.json"))) < 2 and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert not (tmp_path / "runs" / "whole" / "done.json").exists(), "killed too late to show anything"
    if number == signal.SIGTERM:
        assert process.returncode == 143
        assert "run the same command to go on" in output
    kept = sorted(checkpoints.glob("step-*"))
    assert kept

    result = pretrain(tiny(PretrainConfig, tmp_path, tiny_lake, name="whole"))
    assert equal_weights(weights_of(result.folder), weights_of(uninterrupted))
    resumed, whole = (json.loads((folder / "history.json").read_text()) for folder in (result.folder, uninterrupted))
    assert [(e["loss"], e["metrics"]) for e in resumed] == [(e["loss"], e["metrics"]) for e in whole]


def test_two_runs_in_one_folder_are_refused(tiny_lake, tmp_path):
    config = tiny(PretrainConfig, tmp_path, tiny_lake, name="taken")
    folder = tmp_path / "runs" / "taken"
    folder.mkdir(parents=True)
    with (folder / "lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(RunError, match="another process is training in"):
            pretrain(config)
    assert not list(folder.glob("checkpoints/*"))


def test_a_damaged_checkpoint_is_refused_by_name_and_the_one_before_used(tmp_path, capsys):
    told = []
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, step, Checkpoint({"model": {"w": torch.full((3,), step)}}, {"at": step}), keep=3)
    newest = tmp_path / "step-0000000003" / "model.safetensors"
    data = bytearray(newest.read_bytes())
    data[-1] ^= 1
    newest.write_bytes(data)
    (tmp_path / "step-0000000002" / "state.json").unlink()
    (tmp_path / "step-0000000009").mkdir()  # begun, never finished
    found = checkpoint.newest(tmp_path, warn=told.append)
    assert found is not None
    assert found.state == {"at": 1}
    assert found.tensors["model"]["w"].tolist() == [1, 1, 1]
    assert "step-0000000003/model.safetensors is damaged" in told[0]
    assert "step-0000000002/state.json is missing" in told[1]
    assert len(told) == 2


def test_checkpoints_beyond_keep_are_dropped(tmp_path):
    for step in range(5):
        checkpoint.save(tmp_path, step, Checkpoint({}, {}), keep=2)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["step-0000000003", "step-0000000004"]


def test_unchanged_run_is_not_done_again_and_a_changed_one_is(tiny_lake, tmp_path, capsys):
    config = tiny(PretrainConfig, tmp_path, tiny_lake, train={"epochs": 1})
    first = pretrain(config)
    again = pretrain(config)
    assert (first.reused, again.reused) == (False, True)
    assert again.metrics == first.metrics
    assert "unchanged" in capsys.readouterr().out
    other = pretrain(tiny(PretrainConfig, tmp_path, tiny_lake, train={"epochs": 1, "seed": 1}))
    assert not other.reused
    (other.folder / "model" / "weights.safetensors").write_bytes(b"broken")
    assert not pretrain(tiny(PretrainConfig, tmp_path, tiny_lake, train={"epochs": 1, "seed": 1})).reused


def test_no_curve_of_a_tracked_run_begins_with_its_best(tiny_lake, tmp_path, monkeypatch):
    enter_store(tmp_path / "store", monkeypatch)
    on = {"enabled": True, "system_metrics": False}
    result = pretrain(tiny(PretrainConfig, tmp_path, tiny_lake, name="tracked", tracking=on))
    run = runs_of(tmp_path / "store")["tracked"]
    client = tracking.connect()
    curves = [name for name in run.data.metrics if name.startswith(("validation/", "train/"))]
    assert len(curves) > 5
    for name in curves:
        assert sorted(point.step for point in client.get_metric_history(result.run_id, name)) == [1, 2, 3], name
    assert run.data.metrics["best/NDCG_10"] == result.metrics["validation/NDCG@10"]
    assert not [name for name in run.data.metrics if name.startswith("parameters")]
    assert int(run.data.params["parameters.total"]) > 0
    assert run.data.tags[tracking.DESCRIPTION].startswith(f"Validation NDCG@10 {run.data.metrics['best/NDCG_10']:.4f} ")
    (model,) = tracking.models_of(client, run.data.tags["graftrec.model_hash"])
    version = pin(tiny_lake, None).versions["sequences"]
    assert {metric.dataset_name for metric in model.metrics} == {f"sequences@{version}"}
    assert pretrain(tiny(PretrainConfig, tmp_path, tiny_lake, name="tracked", tracking=on)).run_id == result.run_id


def test_a_loss_that_is_no_number_stops_the_run_and_names_the_batch(tiny_lake, tmp_path):
    config = tiny(PretrainConfig, tmp_path, tiny_lake, train={"learning_rate": 1e30, "epochs": 3})
    with pytest.raises(NonFiniteLoss, match=r"at epoch \d+, step \d+: the batch of \d+ users"):
        pretrain(config)
    assert not (tmp_path / "runs" / "pretrain" / "model").exists()


@pytest.mark.parametrize("task", ["masked_item", "next_item"])
def test_two_processes_give_the_weights_of_one(task, tiny_lake, tmp_path):
    sections = {
        "model": {"dropout": 0.0},
        "runtime": {"precision": "fp64"},
        "task": {"kind": task},
        "train": {"batch_size": 7, "epochs": 2, "min_epochs": 2, "checkpoint_seconds": 600},  # 7: unequal slices
    }
    one = pretrain(tiny(PretrainConfig, tmp_path, tiny_lake, name="one", **sections))
    launcher = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone")
    process = start(tmp_path, tiny_lake, launcher=launcher, name="two", **sections)
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 0, output
    alone, together = weights_of(one.folder), weights_of(tmp_path / "runs" / "two")
    for name, tensor in alone.items():
        torch.testing.assert_close(together[name], tensor, rtol=0, atol=1e-9)
    one_run, two_runs = (json.loads((tmp_path / "runs" / n / "history.json").read_text()) for n in ("one", "two"))
    assert [e["loss"] for e in two_runs] == pytest.approx([e["loss"] for e in one_run], rel=1e-9)
    assert [e["metrics"] for e in two_runs] == [pytest.approx(e["metrics"], abs=1e-12) for e in one_run]


# --- transfer ---------------------------------------------


def initial(tmp_path, lake, transfer, parent, **sections):
    """Weights right after grafting: a run whose learning rate is next to nothing."""
    train = {"epochs": 1, "min_epochs": 0, "learning_rate": 1e-30, "seed": 5}
    data = {"domain": "target"}
    config = tiny(
        FinetuneConfig,
        tmp_path,
        lake,
        name=f"graft-{transfer}",
        transfer=transfer,
        parent=str(parent / "model"),
        train=train,
        data=data,
        **sections,
    )
    return load_model(finetune(config).model)


ITEM = {"item_embedding.weight", "output_bias"}
SHARED = {"user_embedding.weight", "entity_embedding.weight"}


@pytest.mark.parametrize("transfer", ["none", "shallow", "deep"])
def test_transfer_copies_exactly_its_groups(transfer, tiny_lake, tmp_path, uninterrupted):
    parent = load_model(uninterrupted / "model").model.state_dict()
    grafted = initial(tmp_path, tiny_lake, transfer, uninterrupted).model.state_dict()
    scratch = initial(tmp_path, tiny_lake, "none", uninterrupted).model.state_dict()
    copied = {"none": set(), "shallow": SHARED, "deep": set(parent) - ITEM}[transfer]
    for name, tensor in grafted.items():
        expected = parent[name] if name in copied else scratch[name]
        torch.testing.assert_close(tensor, expected, rtol=0, atol=1e-25, msg=name)  # zeros move by the rate
    account = json.loads((tmp_path / "runs" / f"graft-{transfer}" / "transfer.json").read_text())
    assert {line["tensor"] for line in account["tensors"] if line["origin"] == "copied"} == copied


def test_frozen_groups_do_not_move_and_the_others_do(tiny_lake, tmp_path, uninterrupted):
    config = tiny(
        FinetuneConfig,
        tmp_path,
        tiny_lake,
        transfer="deep",
        parent=str(uninterrupted / "model"),
        freeze=["body", "user"],
        data={"domain": "target"},
        train={"epochs": 1, "min_epochs": 0},
    )
    before, after = load_model(uninterrupted / "model"), load_model(finetune(config).model)
    moved = {
        name
        for name, tensor in after.model.state_dict().items()
        if name not in ITEM and not torch.equal(tensor, before.model.state_dict()[name])
    }
    assert moved
    assert all(name.startswith(("entity_embedding", "position_embedding", "head")) for name in moved)
    assert after.parent == before.hash
    assert after.metrics["pretrain_seconds"] == before.metrics["seconds"]


def test_fine_tuning_on_the_parents_own_domain_is_noted_at_the_start(tiny_lake, tmp_path, uninterrupted, capsys):
    settings = {"transfer": "deep", "parent": str(uninterrupted / "model"), "train": {"epochs": 1, "min_epochs": 0}}
    own = load_model(uninterrupted / "model").config.data
    finetune(tiny(FinetuneConfig, tmp_path, tiny_lake, **settings, data={"domain": own.domain}))
    first = capsys.readouterr().out.splitlines()[0]
    assert first.startswith("note: ")
    assert f"fine-tunes on domain {own.domain}, on which its parent {uninterrupted / 'model'} was trained" in first
    assert first.endswith(f"(release 1, split {own.split})")
    finetune(tiny(FinetuneConfig, tmp_path, tiny_lake, name="target", **settings, data={"domain": "target"}))
    assert "note: " not in capsys.readouterr().out


def test_a_parent_trained_on_another_split_may_have_seen_what_is_held_out(tiny_lake, tmp_path):
    parent = load_model(write_model(tmp_path / "parent", tiny_lake, domain="target"))
    config = FinetuneConfig.model_validate({"data": {"lake": tiny_lake, "domain": "target", "split": "causal"}})
    assert "what split causal holds out may have been in its training" in seen_by_parent(config, parent)
    elsewhere = config.model_copy(update={"data": config.data.model_copy(update={"lake": "another"})})
    assert seen_by_parent(elsewhere, parent) == ""


def test_a_run_whose_scores_are_no_numbers_leaves_no_model(tiny_lake, tmp_path, monkeypatch):
    def without_scores(*given):
        return dict.fromkeys(metrics(*given), float("nan"))

    metrics = Validator.metrics
    monkeypatch.setattr(Validator, "metrics", without_scores)
    config = tiny(PretrainConfig, tmp_path, tiny_lake, train={"epochs": 2, "min_epochs": 0})
    for _ in range(2):  # the second goes on from where the first ended
        with pytest.raises(
            NonFiniteLoss, match="expected a validation NDCG@10 that is a number, found none in 2 epochs"
        ):
            pretrain(config)
    assert not (tmp_path / "runs" / config.name / "model").exists()


def test_bars_are_for_terminals_only(tiny_lake, tmp_path, capfd):
    """A log file gets lines: stderr is none here."""
    config = tiny(PretrainConfig, tmp_path, tiny_lake, runtime={"progress": True}, train={"epochs": 1, "min_epochs": 0})
    pretrain(config)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model": {"width": 32}}, "expected the parent's"),
        ({"model": {"blocks": 2}}, "has no tensor"),
        ({"freeze": ["everything"]}, "expected parameter groups"),
        ({"parent": None}, "set parent"),
        ({"parent": "nowhere"}, "no model in nowhere"),
    ],
)
def test_a_parent_that_does_not_fit_is_refused_in_one_line(change, said, tiny_lake, tmp_path, uninterrupted):
    settings = {"transfer": "deep", "parent": str(uninterrupted / "model"), "data": {"domain": "target"}} | change
    with pytest.raises((TransferError, ModelFolderError), match=said) as error:
        finetune(tiny(FinetuneConfig, tmp_path, tiny_lake, **settings))
    assert "\n" not in str(error.value)


# --- model folders, rates ---------------------------------------------


@pytest.mark.parametrize("name", ["weights.safetensors", "catalogue.parquet", "config.json", "users.safetensors"])
def test_a_damaged_model_file_is_refused_by_name(name, uninterrupted, tmp_path):
    copy = tmp_path / "model"
    subprocess.run(["cp", "-r", str(uninterrupted / "model"), str(copy)], check=True)
    data = bytearray((copy / name).read_bytes())
    data[len(data) // 2] ^= 1
    (copy / name).write_bytes(data)
    with pytest.raises(ModelFolderError, match=f"{name} is damaged"):
        load_model(copy)


def test_a_model_without_its_user_table_serves_everybody_as_unknown(uninterrupted, tmp_path):
    copy = tmp_path / "model"
    subprocess.run(["cp", "-r", str(uninterrupted / "model"), str(copy)], check=True)
    whole = load_model(copy)
    for name in ("users.safetensors", "users.parquet"):
        (copy / name).unlink()
    bare = load_model(copy)
    assert bare.users is None
    assert bare.hash == whole.hash, "the user table is no part of a version's identity"
    item = len(whole.catalogue) - 1
    histories = Events.of(np.array([9, 10]), np.array([0, 1, 2]), np.array([item, item]), np.empty(0, dtype=np.int64))
    scores = bare.scorer().score(histories)
    assert torch.equal(scores[0], scores[1])
    assert not torch.equal(*whole.scorer().score(histories))


def test_learning_rate_warms_up_and_falls():
    config = TrainConfig(learning_rate=1.0, warmup_steps=4, schedule="linear", epochs=10, final_rate=0.1)
    rates = [learning_rate(config, step, 2) for step in range(20)]
    assert rates[:4] == pytest.approx([0.25, 0.5 * 0.95, 0.75 * 0.9, 0.85])
    assert rates[10] == pytest.approx(0.5)
    assert rates[-1] == pytest.approx(0.1)
    flat = TrainConfig(learning_rate=0.5, warmup_steps=0)
    assert [learning_rate(flat, step, 2) for step in (0, 1_000)] == [0.5, 0.5]
