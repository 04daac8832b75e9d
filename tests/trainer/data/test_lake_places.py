"""A lake is read alike wherever it lies: in a folder with an odd name, or in an object store."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from etl import tables
from etl.tables import FIRST_INDEX
from tests.fixtures.object_store import BUCKET, copy_lake, seaweed, settings, variables
from tests.fixtures.trainings import TINY, equal_weights, weights_of
from trainer.data.baskets import BasketDataset
from trainer.data.catalogue import read_catalogue, read_knowledge
from trainer.data.held_out import ReadOptions, read_held_out
from trainer.data.release import Release, pin
from trainer.data.sequences import SequenceDataset
from trainer.evaluation.scorers import raw_users

ODD = "lake [1] {2} 50% #?é"
COMMANDS = "import json, sys; from trainer.__main__ import main; sys.exit(sum(map(main, json.loads(sys.argv[1]))))"


@pytest.fixture(scope="module")
def store(tmp_path_factory, tiny_lake):
    """Variables that reach an object store with two copies of the tiny lake, s3://bucket/tiny and …/trained."""
    with seaweed(tmp_path_factory.mktemp("store") / "data") as endpoint, variables(settings(endpoint)):
        for name in ("tiny", "trained"):
            copy_lake(tiny_lake, f"s3://{BUCKET}/{name}")
        yield settings(endpoint)


def contents(lake):
    """All that recipes read of a lake, as text."""
    release = pin(lake, None)
    catalogue = read_catalogue(release, "target")
    datasets = [
        SequenceDataset(release, "last-5", "source").read_all(times=True),
        BasketDataset(release, "last-5", "target").read_all(times=True),
    ]
    held_out = read_held_out(
        release, "last-5", "target", catalogue, "test", ReadOptions(("full", "uniform-100"), times=True)
    )
    found = [vars(each) for each in (*datasets, held_out)]
    found += [catalogue.global_index, list(catalogue.raw_ids), list(catalogue.titles)]
    found += [
        read_knowledge(release, catalogue, {"director": 1}),
        release.versions,
        raw_users(release, np.arange(FIRST_INDEX, 9)),
    ]
    with np.printoptions(threshold=sys.maxsize):
        return repr([release.read(tables.ITEMS, ["item", "categories"]).to_pydict(), found]).replace(lake, "")


def test_a_folder_with_an_odd_name(tiny_lake, tmp_path):
    shutil.copytree(tiny_lake, tmp_path / ODD)
    assert contents(str(tmp_path / ODD)) == contents((tmp_path / ODD).as_uri()) == contents(tiny_lake)


@pytest.mark.parametrize("uri", [str, Path.as_uri])
def test_a_path_that_deltalake_would_decode_is_read_as_it_is(uri, tiny_lake, tmp_path):
    shutil.copytree(tiny_lake, tmp_path / "50%20 lake")
    assert contents(uri(tmp_path / "50%20 lake")) == contents(tiny_lake)
    (tmp_path / "plain").symlink_to(tmp_path / "50%20 lake")
    assert contents(str(tmp_path / "plain")) == contents(tiny_lake)


def test_what_is_recorded_of_a_relative_lake_is_absolute(tiny_lake, monkeypatch):
    monkeypatch.chdir(Path(tiny_lake).parent)
    assert pin(Path(tiny_lake).name, None).lake == tiny_lake


def test_an_object_store(tiny_lake, store):
    assert contents(f"s3://{BUCKET}/tiny") == contents(tiny_lake)


@pytest.mark.slow
@pytest.mark.ci
def test_from_pretrain_to_recommend_an_object_store_gives_bit_for_bit_what_a_disk_gives(tiny_lake, tmp_path, store):
    shutil.copytree(tiny_lake, tmp_path / ODD)
    lakes = {"disk": str(tmp_path / ODD), "store": f"s3://{BUCKET}/trained"}
    running = {name: recipes(tmp_path / name, lake, store) for name, lake in lakes.items()}
    for process in running.values():
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output
    for name in ("source", "target"):
        assert equal_weights(*(weights_of(tmp_path / place / "runs" / name) for place in lakes))
    users = [pl.read_parquet(tmp_path / place / "runs" / "eval" / "evaluation" / "users.parquet") for place in lakes]
    assert users[0].equals(users[1])
    columns = ["user", "rank", "item", "score"]
    found = [
        Release(lake, 1, {"recommendations": 1}).read(tables.RECOMMENDATIONS, columns).to_pylist()
        for lake in lakes.values()
    ]
    ordered = [sorted(rows, key=lambda row: (row["user"], row["rank"])) for rows in found]
    assert ordered[0] == ordered[1]
    assert len(found[0]) > 100


def recipes(folder, lake, store):
    """A process that runs pretrain, finetune, evaluate and recommend on a lake, in `folder`."""
    (folder / "runs").mkdir(parents=True)
    quiet = {"tracking": TINY["tracking"]}
    shared = {**TINY, "output": "runs"}
    model = {"model": "runs/target/model"}
    configs = {
        "pretrain": {**shared, "name": "source", "data": {"lake": lake, "domain": "source"}},
        "finetune": {
            **shared,
            "name": "target",
            "parent": "runs/source/model",
            "transfer": "deep",
            "data": {"lake": lake, "domain": "target"},
        },
        "evaluate": {**quiet, "output": "runs", "name": "eval", "models": [model], "runtime": TINY["runtime"]},
        "recommend": {**quiet, **model, "k": 4, "spark": {"engine": "sail", "master": "local[1]"}},
    }
    for recipe, changed in configs.items():
        (folder / f"{recipe}.yaml").write_text(json.dumps(changed))
    commands = [[recipe, "--config", f"{recipe}.yaml"] for recipe in configs]
    return subprocess.Popen(
        [sys.executable, "-c", COMMANDS, json.dumps(commands)],
        cwd=folder,
        env=os.environ | store,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
