"""The recipe `features` from a lake to vectors: kill and resume, parents, held-out events, mistakes."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from deltalake import DeltaTable
from safetensors.torch import load_file

from etl import tables
from etl.settings import ConfigError, GraftrecError, load
from tests.fixtures.lakes import build_tiny_lake
from trainer.config import FeaturesConfig, GraphConfig
from trainer.data.release import DataError, pin
from trainer.data.sequences import SequenceDataset
from trainer.knowledge_graph.graph import KINDS, read_graph
from trainer.knowledge_graph.vectors import Features, write_features
from trainer.recipes import features as features_recipe
from trainer.recipes import graph_features as features
from trainer.training.loop import Stopped

TINY = {
    "model": {"kind": "transe", "width": 8},
    "train": {"epochs": 4, "batch_size": 16, "chunk": 8, "negatives": 8, "margin": 3},
    "runtime": {"progress": False, "device": "cpu", "precision": "fp32", "threads": 1},
    "tracking": {"enabled": False},
}


def config_file(folder: Path, lake: str, **sections: object) -> Path:
    settings: dict[str, object] = {**TINY, "output": str(folder / "runs"), "data": {"lake": lake, "test": 0.2}}
    for name, value in sections.items():
        before = settings.get(name, {})
        settings[name] = {**before, **value} if isinstance(value, dict) and isinstance(before, dict) else value
    path = folder / f"{settings.get('name', 'features')}.yaml"
    path.write_text(json.dumps({"graph": settings}))
    return path


def tiny(folder: Path, lake: str, **sections: object) -> GraphConfig:
    found = load(FeaturesConfig, str(config_file(folder, lake, **sections))).graph
    assert found is not None
    return found


def test_vectors_of_items_and_entities_by_raw_id(tiny_lake: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    result = features.run(tiny(tmp_path, tiny_lake))
    rows = pq.read_table(result.model / "features.parquet").to_pylist()
    release = pin(tiny_lake, None)
    items = {row["item"]: row["index"] for row in release.read(tables.ITEMS, ["item", "index"]).to_pylist()}
    entities = {r["entity"]: r["index"] for r in release.read(tables.ENTITIES, ["entity", "index"]).to_pylist()}
    assert {row["kind"] for row in rows} == {"item", "entity"}
    for row in rows:
        assert (items if row["kind"] == "item" else entities)[row["id"]] == row["index"]
        assert len(row["vector"]) == 8
        assert row["split"] == ""
    assert {row["encoder"] for row in rows} == {"features"}
    metadata = pq.read_schema(result.model / "features.parquet").metadata
    assert metadata[b"graftrec.width"] == b"8"
    assert json.loads(metadata[b"graftrec.snapshots"])["knowledge"] == release.versions["knowledge"]
    report = (result.folder / "report.md").read_text()
    assert "director" in report
    assert "| source" in report
    assert 0 < result.metrics["test/MRR"] < 1
    assert not (result.folder / "checkpoints").exists()

    assert features.run(tiny(tmp_path, tiny_lake)).reused
    assert "unchanged" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("lake", "other", r"lake: expected graph\.data\.lake in its place"),
        ("name", "mine", r"name: expected graph\.name in its place"),
        (
            "attributes",
            {"categorical": ["categories"]},
            "expected one of attributes, graph and social, found attributes",
        ),
    ],
)
def test_a_setting_that_the_graph_does_not_read_is_refused(
    name: str, value: object, message: str, tiny_lake: str, tmp_path: Path
) -> None:
    path = config_file(tmp_path, tiny_lake)
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
    with pytest.raises(ConfigError, match=message):
        load(FeaturesConfig, str(path))


def test_without_held_out_triples_nothing_is_said_of_ranks(
    tiny_lake: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    result = features.run(tiny(tmp_path, tiny_lake, data={"test": 0.0}))
    assert not [name for name in result.metrics if name.startswith("test/")]
    assert "nan" not in (result.folder / "report.md").read_text() + capsys.readouterr().out


def test_a_thing_without_a_training_triple_has_no_vector(tiny_lake: str, tmp_path: Path) -> None:
    config = tiny(tmp_path, tiny_lake, data={"lake": tiny_lake, "test": 0.6})
    rows = pq.read_table(features.run(config).model / "features.parquet").to_pylist()
    inputs = features._read(config, pin(tiny_lake, None), None)
    trained = np.unique(inputs.split.train[:, [0, 2]])
    assert len(trained) < inputs.graph.num_nodes
    assert {(list(KINDS).index(row["kind"]), row["index"]) for row in rows} == set(
        zip(inputs.graph.kinds[trained].tolist(), inputs.graph.indices[trained].tolist(), strict=True)
    )


@pytest.mark.slow
def test_a_killed_run_goes_on_bit_for_bit(tiny_lake: str, tmp_path: Path) -> None:
    """Killed in its second epoch, in a process; checkpoints after every step."""
    whole = features.run(tiny(tmp_path, tiny_lake, output=str(tmp_path / "whole")))
    lake = str(shutil.copytree(tiny_lake, tmp_path / "lake"))  # which the command writes to
    path = config_file(tmp_path, lake, train={"checkpoint_seconds": 0})
    script = (
        "import os, signal, sys\n"
        "from trainer.knowledge_graph import training\n"
        "from trainer.__main__ import main\n"
        "step, count = training.GraphTraining.step, [0]\n"
        "def counted(self, batch):\n"
        "    step(self, batch)\n"
        "    count[0] += 1\n"
        "    if count[0] == int(sys.argv[2]): os.kill(os.getpid(), int(sys.argv[3]))\n"
        "training.GraphTraining.step = counted\n"
        "sys.exit(main(['features', '--config', sys.argv[1]]))\n"
    )
    codes = []
    for after in (9, 10_000):
        command = [sys.executable, "-c", script, str(path), str(after), str(int(signal.SIGKILL))]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120)
        codes.append(done.returncode)
    assert codes == [-signal.SIGKILL, 0], done.stdout + done.stderr
    assert "resuming at epoch" in done.stdout
    for name in ("tables.safetensors", "features.parquet"):
        assert (tmp_path / "runs/features/model" / name).read_bytes() == (whole.model / name).read_bytes()


@pytest.mark.slow
def test_two_processes_learn_what_one_learns(tiny_lake: str, tmp_path: Path) -> None:
    """Their sums differ in the last bits only."""
    runtime = {"precision": "fp64"}
    one = features.run(tiny(tmp_path, tiny_lake, name="one", runtime=runtime))
    lake = str(shutil.copytree(tiny_lake, tmp_path / "lake"))  # which the command writes to
    path = config_file(tmp_path, lake, name="two", runtime=runtime)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [sys.executable, *launcher, "-m", "trainer", "features", "--config", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    left, right = (load_file(folder / "tables.safetensors") for folder in (one.model, tmp_path / "runs/two/model"))
    for name, table in left.items():
        torch.testing.assert_close(right[name], table, rtol=1e-9, atol=1e-9)


def test_transr_begins_where_transe_ended(tiny_lake: str, tmp_path: Path) -> None:
    parent = features.run(tiny(tmp_path, tiny_lake, name="parent"))
    config = tiny(
        tmp_path, tiny_lake, name="child", parent=str(parent.folder), model={"kind": "transr", "max_norm": None}
    )
    inputs = features._read(config, pin(tiny_lake, None), features.load_embedding(parent.model))
    training = features._training(inputs, features.join(config.runtime))
    before = load_file(parent.model / "tables.safetensors")
    for name, table in before.items():
        assert torch.equal(training.tables[name].detach(), table)
    eye = torch.eye(8).flatten().expand(len(inputs.graph.relations), -1)
    assert torch.equal(training.tables["projections"].detach(), eye)
    assert pq.read_table(features.run(config).model / "features.parquet").num_rows


def test_transr_without_a_parent_is_refused(tiny_lake: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="fails from a random start"):
        tiny(tmp_path, tiny_lake, model={"kind": "transr"})
    parent = features.run(tiny(tmp_path, tiny_lake, name="narrow", model={"width": 4}, train={"epochs": 1}))
    config = tiny(tmp_path, tiny_lake, parent=str(parent.folder), model={"kind": "transr"})
    with pytest.raises(ConfigError, match="expected an embedding by transe of width 8, found transe of width 4"):
        features.run(config)


def test_a_relation_that_is_not_there_is_named(tiny_lake: str, tmp_path: Path) -> None:
    config = tiny(tmp_path, tiny_lake, data={"relations": ["director", "composer"]})
    with pytest.raises(DataError, match="found no triple of composer; it has actor, director"):
        features.run(config)
    assert not (tmp_path / "runs/features/model").exists()


def test_events_of_the_training_part_are_edges(tmp_path: Path) -> None:
    lake = build_tiny_lake(tmp_path / "lake", described=True)
    config = tiny(tmp_path, lake, data={"relations": [], "events": "last-5", "domain": "all", "event_types": ["buy"]})
    release = pin(lake, None)
    graph = read_graph(release, config.data)
    assert list(graph.relations) == ["event", "event:buy"]
    sequences = SequenceDataset(release, "last-5", "all", event_types=("buy",)).read_all()
    expected = set()
    for user, start, first in zip(
        sequences.users, sequences.valid_start, np.cumsum(sequences.lengths) - sequences.lengths, strict=True
    ):
        for place in range(first, first + start):
            expected.add((int(user), int(sequences.event_types[place]), int(sequences.items[place])))
    found = {(int(graph.indices[h]), int(r), int(graph.indices[t])) for h, r, t in graph.triples}
    assert found == expected
    assert set(graph.kinds[graph.triples[:, 0]]) == {list(KINDS).index("user")}


def test_held_out_events_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What lies behind the training part is another item each: every vector stays as it was, bit for bit."""
    lake = build_tiny_lake(tmp_path / "lake")
    data = {"events": "last-5", "domain": "all"}
    first = features.run(tiny(tmp_path, lake, output=str(tmp_path / "first"), data=data))
    read = SequenceDataset.read_group

    def exchanged(self: SequenceDataset, group: int, **options: bool) -> object:
        sequences = read(self, group, **options)
        held_out = sequences.positions >= sequences.valid_start[sequences.owners]
        items = sequences.items.copy()
        assert held_out.any()
        items[held_out] = np.random.default_rng(0).permutation(items[held_out])
        assert (items != sequences.items).any()
        return sequences.with_columns(items=items)

    monkeypatch.setattr(SequenceDataset, "read_group", exchanged)
    second = features.run(tiny(tmp_path, lake, output=str(tmp_path / "second"), data=data))
    for name in ("features.parquet", "tables.safetensors", "nodes.parquet"):
        assert (first.model / name).read_bytes() == (second.model / name).read_bytes()
    rows = pq.read_table(first.model / "features.parquet").to_pylist()
    assert {row["kind"] for row in rows} == {"item", "entity", "user"}
    assert {row["split"] for row in rows} == {"last-5"}


def test_a_stop_says_how_to_go_on(tiny_lake: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = features.GraphTraining.step

    def stopped(self: features.GraphTraining, batch: object) -> None:
        step(self, batch)  # type: ignore[arg-type]
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(features.GraphTraining, "step", stopped)
    with pytest.raises(Stopped, match="epoch 1, step 1; the state is saved"):
        features.run(tiny(tmp_path, tiny_lake))


@pytest.mark.parametrize("spoilt", [0.0, float("nan")])
def test_a_vector_that_says_nothing_is_refused(spoilt: float, tmp_path: Path) -> None:
    vectors = np.ones((2, 3), dtype=np.float32)
    vectors[1] = spoilt
    rows = Features("graph", "", ["item", "entity"], ["7", "person:x"], np.array([5, 6]), vectors, {})
    with pytest.raises(GraftrecError, match="found 1 that are not, the first of entity person:x"):
        write_features(tmp_path / "features.parquet", rows)
    assert not list(tmp_path.iterdir())


def test_the_command_writes_the_vectors_into_the_lake_once(
    tiny_lake: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    lake = str(shutil.copytree(tiny_lake, tmp_path / "lake"))
    config = load(FeaturesConfig, str(config_file(tmp_path, lake, name="vectors")))
    before = pin(lake, None)
    first = features_recipe.run(config)
    after = pin(lake, None)
    assert (first.committed, after.number) == (True, before.number + 1)
    rows = DeltaTable(f"{lake}/features").to_pyarrow_table().to_pylist()
    of_run = pq.read_table(tmp_path / "runs/vectors/model/features.parquet").to_pylist()
    found = {(row["kind"], row["id"]): row["vector"] for row in rows if row["encoder"] == "vectors"}
    assert found == {(row["kind"], row["id"]): row["vector"] for row in of_run}
    again = features_recipe.run(config)
    assert (again.committed, pin(lake, None).number) == (False, after.number)
    assert "unchanged" in capsys.readouterr().out
