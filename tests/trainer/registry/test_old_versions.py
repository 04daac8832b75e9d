"""Versions that were registered before modules were moved into rooms, loaded by a process that has today's code."""

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import mlflow
import pandas as pd
import pytest
import yaml

import trainer
from tests.fixtures.folders import write_model
from tests.fixtures.places import ROOT
from trainer import old_versions
from trainer.inference.model_folder import CONFIG, MANIFEST, digest_of, load_model
from trainer.inference.recommender import Recommender, Request

SERVED = """
import dataclasses

from etl.config import GraftrecError
from trainer import tracking
from trainer.artifact import ArtifactError, load_artifact
from trainer.outbox import warn
from trainer.patches import is_patch, load_patch, parent_of
from trainer.registry import Registry, Version
from trainer.serving import DEFAULT_K, Recommender, parse


def load(folder, label):
    assert not is_patch(folder)
    return Recommender(load_artifact(folder), label, lambda domain: None)


def answer(recommender, records, params):
    asked = recommender.of_domain(str(params.get("domain") or ""))
    answers = asked.answer(parse(records), int(params.get("k", DEFAULT_K)))
    return [dataclasses.asdict(one) for one in answers]


tracking.offer(load, answer)
"""  # as commit c7fac2e packed it, without patches and companions


@pytest.fixture(scope="module")
def folder(tiny_lake, tmp_path_factory):
    return Path(write_model(tmp_path_factory.mktemp("old") / "model", tiny_lake, seed=3, skill=0.3))


@pytest.fixture
def packed(folder, tmp_path):
    """An MLflow model as that commit wrote it, with packages of its own that must not be mixed with today's."""
    for package in ("etl", "trainer"):
        (tmp_path / "code" / package).mkdir(parents=True)
        (tmp_path / "code" / package / "__init__.py").write_text("")
    (tmp_path / "code" / "etl" / "tables.py").write_text("raise ImportError('the old code')")
    (tmp_path / "served.py").write_text(SERVED)
    (tmp_path / "artifacts").mkdir()
    (tmp_path / "artifacts" / "model").symlink_to(folder)
    flavor = {
        "artifacts": {"model": {"path": "artifacts/model", "uri": "runs/demo/model"}},
        "code": "code",
        "loader_module": "mlflow.pyfunc.loaders.code_model",
        "model_code_path": "trainer/served.py",
        "python_version": "3.11.7",
        "streamable": False,
    }
    (tmp_path / "MLmodel").write_text(yaml.safe_dump({"flavors": {"python_function": flavor}}))
    return tmp_path


def test_an_old_version_answers_as_todays_code_does(packed, folder, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))  # to which MLflow adds the version's code
    trained_model = load_model(folder)
    history = list(trained_model.catalogue.raw_ids[6:9])
    loaded = mlflow.pyfunc.load_model(str(packed), suppress_warnings=True)
    (found,) = loaded.predict(pd.DataFrame({"items": [history]}))
    (expected,) = Recommender(trained_model, "unregistered").answer([Request(history)])
    assert (found["items"], found["scores"]) == (expected.items, expected.scores)
    assert found["version"] == "unregistered"
    assert sys.modules["trainer"] is trainer


def test_both_packages_are_of_one_place_whatever_comes_first_in_the_path(packed):
    script = (
        f"import trainer, sys; sys.path.insert(0, {str(packed / 'code')!r}); import etl.tables; print(etl.__file__)"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(ROOT / "etl" / "__init__.py")


def test_names_that_never_were_are_not_found():
    with pytest.raises(ModuleNotFoundError, match=r"trainer\.artefact"):
        __import__("trainer.artefact")


@pytest.mark.parametrize(("is_old", "expected"), [(True, False), (False, True)])
def test_repeats_of_an_old_folder_are_of_baskets_alone(folder, tmp_path, is_old, expected):
    """Of a model of items: by default true in its settings, and what a user had was never recommended."""
    copy = tmp_path / "model"
    copy.mkdir()
    for file in folder.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    described = json.loads((copy / CONFIG).read_text())
    described["config"]["evaluation"]["repeats"] = True
    if is_old:
        del described["config"]["runtime"]["collective_seconds"]
    (copy / CONFIG).write_text(json.dumps(described))
    digests = json.loads((copy / MANIFEST).read_text())
    (copy / MANIFEST).write_text(json.dumps(digests | {CONFIG: digest_of(copy / CONFIG)}))
    trained_model = load_model(copy)
    assert trained_model.config.ranks_repeats is expected
    history = list(trained_model.catalogue.raw_ids[5:])
    (answer,) = Recommender(trained_model, "x/1").answer([Request(history)], k=3)
    assert len(answer.items) == (3 if expected else 0)


def test_old_versions_are_read_until_0_2():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert version.startswith("0.1."), f"remove {old_versions.__file__}, and what its docstring names"
