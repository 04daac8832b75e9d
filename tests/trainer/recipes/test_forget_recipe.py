"""Forgetting users beyond the lake: models, registered versions, per-user files, and what the receipt says."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from etl.lake.readers import stop_reading
from etl.settings import load
from etl.tables import UNK
from tests.fixtures.folders import write_model
from tests.fixtures.lakes import build_tiny_lake
from tests.fixtures.mentions import mentions
from tests.fixtures.patches import MODELS, settings
from tests.fixtures.places import ROOT
from tests.fixtures.stores import enter_store
from tests.fixtures.trainings import TINY
from trainer.config import EvaluateConfig, ForgetConfig, FriendsConfig, PretrainConfig
from trainer.inference import without_users as module
from trainer.inference.model_folder import USER_TABLE, USERS, load_model
from trainer.inference.recommender import Recommender, Request
from trainer.inference.without_users import without_users
from trainer.recipes import evaluate, finetune, forget, friends, pretrain
from trainer.registry import CHAMPION, TAG_KIND, Registry
from trainer.social.friends_folder import load_friends

GONE, STAYS = "u017", "u018"


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A lake, a model of it that is champion, and its evaluation; the working directory."""
    enter_store(tmp_path, monkeypatch)
    lake = build_tiny_lake(tmp_path / "lake")
    folder = write_model(tmp_path / "runs" / "deep" / "model", lake)
    Registry().register(folder, alias=CHAMPION)
    evaluate.run(EvaluateConfig(name="deep", model=str(folder), lake=lake))
    stop_reading(lake)
    return tmp_path


def receipt_of(place):
    (path,) = (place / "runs" / "forgotten").glob("*.json")
    return json.loads(path.read_text())


def test_a_user_is_gone_from_models_versions_and_files(place):
    assert {path.split("/")[0] for path in mentions(place, GONE)} == {"lake", "runs", "mlartifacts"}
    before = load_model(place / "runs" / "deep" / "model")
    evaluated = pq.read_table(place / "runs" / "deep" / "evaluation" / "users.parquet")["user"].to_pylist()
    rows = evaluated.count(GONE)
    assert rows
    forget.run(ForgetConfig(user=GONE, lake=str(place / "lake")))
    assert mentions(place, GONE) == []
    assert mentions(place, STAYS)
    registry = Registry()
    version = registry.version(CHAMPION)
    for folder in (place / "runs" / "deep" / "model", registry.folder(version)):
        after = load_model(folder)
        assert after.hash == before.hash == version.hash, "a folder's hash does not depend on users"
        assert before.users.keys() - after.users.keys() == {GONE}
        table, old = after.model.state_dict()[USER_TABLE], before.model.state_dict()[USER_TABLE]
        row = before.users[GONE]
        assert torch.equal(table[row], old[UNK])
        others = [one for one in range(len(table)) if one != row]
        assert torch.equal(table[others], old[others])
    receipt = receipt_of(place)
    assert receipt["lake"]["rows"]["users"] == 1
    assert len(receipt["models"]) == 2
    assert sorted(receipt["files"].values()) == [rows, rows], "in the run's folder and in MLflow"
    assert len(receipt["shared"]) == 2
    assert GONE not in json.dumps(receipt)


def test_a_forgotten_user_is_answered_like_an_unknown_one(place):
    folder = place / "runs" / "deep" / "model"
    forget.run(ForgetConfig(user=GONE, lake=str(place / "lake")))
    recommender = Recommender(load_model(folder), "m")
    items = ["i05", "i06", "i07"]
    gone, nobody = recommender.answer([Request(user=GONE, items=items), Request(user="nobody", items=items)], 5)
    assert (gone.items, gone.scores) == (nobody.items, nobody.scores)


def test_models_of_another_lake_keep_their_users(place, tmp_path):
    other = build_tiny_lake(tmp_path / "other-lake", seed=3)
    folder = write_model(place / "runs" / "other" / "model", other)
    stop_reading(other)
    forget.run(ForgetConfig(user=GONE, lake=str(place / "lake")))
    assert GONE in load_model(folder).users
    assert [name for name in receipt_of(place)["models"] if "other" in name] == []
    forget.run(ForgetConfig(user=GONE, lake=str(place / "lake"), any_lake=True))
    assert GONE not in load_model(folder).users


@pytest.mark.parametrize("stop", range(6))
def test_killed_while_a_model_changes_it_loads_and_the_same_call_finishes(stop, place, monkeypatch):
    folder = place / "runs" / "deep" / "model"
    calls = 0

    class Killed(BaseException):
        pass

    def counted(function):
        def call(*given, **named):
            nonlocal calls
            calls += 1
            if calls > stop:
                raise Killed
            return function(*given, **named)

        return call

    with monkeypatch.context() as patched:
        for name in ("unlink", "replace", "rename"):
            patched.setattr(Path, name, counted(getattr(Path, name)))
        with pytest.raises(Killed):
            without_users(folder, {GONE})
    assert load_model(folder).hash == Registry().version(CHAMPION).hash
    without_users(folder, {GONE})
    after = load_model(folder)
    assert len(after.users) == 59
    assert GONE not in after.users
    assert len(load_file(folder / USERS)[USER_TABLE]) == len(after.model.state_dict()[USER_TABLE])
    assert not list(folder.glob(f"{module._READY}*"))


def test_while_a_training_reads_the_command_ends_with_5_and_later_finishes(place):
    lake = str(place / "lake")
    program = (
        "import sys; from trainer.data.release import pin; pin(sys.argv[1], 1); print('reads', flush=True); input()"
    )
    reader = subprocess.Popen(
        [sys.executable, "-c", program, lake], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert reader.stdout.readline() == "reads\n"
    command = [sys.executable, "-m", "trainer", "forget", "--user", GONE, "--lake", lake]
    environment = {"PYTHONPATH": str(ROOT), "GRAFTREC_CONF": str(ROOT / "conf"), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(command, cwd=place, capture_output=True, text=True, env=environment)
    assert done.returncode == 5, done.stderr
    assert f"release 1 by process {reader.pid}" in done.stderr
    assert [path for path in mentions(place, GONE) if not path.startswith("lake")] == [], "models needn't wait"
    reader.kill()
    reader.wait()
    done = subprocess.run(command, cwd=place, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert mentions(place, GONE) == []
    receipt = receipt_of(place)
    assert receipt["lake"]["rows"]["users"] == 1
    assert len(receipt["models"]) == 2
    assert "weights that all users share can't unlearn anybody" in done.stdout


def test_a_user_whom_nothing_names_is_said_so(place, capsys):
    forget.run(ForgetConfig(user="u999", lake=str(place / "lake")))
    assert "nothing names them: is the id right?" in capsys.readouterr().out


def test_no_lake_no_forgetting(place):
    environment = {"PYTHONPATH": str(ROOT), "GRAFTREC_CONF": str(ROOT / "conf"), "PATH": "/usr/bin:/bin"}
    command = [sys.executable, "-m", "trainer", "forget", "--user", GONE, "--lake", "nowhere"]
    done = subprocess.run(command, cwd=place, capture_output=True, text=True, env=environment)
    assert done.returncode == 2
    assert "expected a lake (a folder of Delta tables), found no table" in done.stderr
    shutil.rmtree(place / "lake")


def test_a_friends_model_loses_name_edges_and_history(tmp_path, monkeypatch):
    enter_store(tmp_path, monkeypatch)
    lake = build_tiny_lake(tmp_path / "lake", friends=True)
    words = [
        "--lake",
        lake,
        "--output",
        str(tmp_path / "runs"),
        "--tracking.enabled",
        "false",
        "--model.candidates",
        "20",
    ]
    words += ["--model.epochs", "2", "--model.batch_size", "16", "--control", "false", "--splits", "[users-0]"]
    folder = friends.run(load(FriendsConfig, "friends/lastfm", [*words, "--name", "friends"])).folder / "model"
    version = Registry().register(folder, alias="friends")
    stop_reading(lake)
    before = load_friends(folder)
    forget.run(ForgetConfig(user=GONE, lake=lake))
    assert mentions(tmp_path, GONE) == []
    after = load_friends(folder)
    place = before.raw_ids.to_pylist().index(GONE)
    assert before.trained.evidence.edges[[place]].nnz
    assert not after.trained.evidence.edges[[place]].nnz
    assert not after.trained.evidence.edges.tocsc()[:, [place]].nnz
    assert not after.trained.evidence.taken[[place]].nnz
    others = [one for one in range(len(before.users)) if one != place]
    assert (after.trained.evidence.taken[others] != before.trained.evidence.taken[others]).nnz == 0
    registry = Registry()
    again = registry.version(str(version.number))
    assert again.hash == after.hash != before.hash
    assert load_friends(registry.folder(again)).hash == after.hash


def test_a_patch_and_its_parent_lose_the_user_and_still_fit(place):
    lake = str(place / "lake")
    kind = {"model": MODELS["bert4rec"], "task": {"kind": "next_item"}, "train": {**TINY["train"], "epochs": 1}}
    data = {"lake": lake, "domain": "all", "split": "joint-5"}
    parent = pretrain.run(PretrainConfig.model_validate({**TINY, **kind, "name": "parent", "data": data})).model
    patch = finetune.run(settings(place, lake, {"bert4rec": parent}, "bert4rec", train=kind["train"])).model
    stop_reading(lake)
    registry = Registry("shop")
    version = registry.register(patch)
    assert version.tags[TAG_KIND] == "patch"
    forget.run(ForgetConfig(user=GONE, lake=lake))
    assert mentions(place, GONE) == []
    whole = load_model(Registry("shop").folder(version))
    assert whole.hash == version.hash
    assert GONE not in whole.users
    assert STAYS in whole.users
