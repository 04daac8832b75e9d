"""Model folders that somebody else may have written: loaded as they were saved, or refused in one line."""

import json
import os
import resource
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from etl.settings import GraftrecError
from tests.fixtures.folders import write_model
from tests.fixtures.hostile import EXAMPLES, SEEDED, copied, rewritten, sealed, spoilt, spoilt_bytes
from trainer.inference.model_folder import ModelFolderError, config_of, lake_of, load_model, model_hash, recipe_of
from trainer.inference.recommender import Recommender, Request
from trainer.social.friends_folder import is_friends, load_friends

FILES = ("config.json", "weights.safetensors", "catalogue.parquet", "users.safetensors", "users.parquet")


@pytest.fixture(scope="module")
def whole(tiny_lake, tmp_path_factory):
    return Path(write_model(tmp_path_factory.mktemp("foreign") / "model", tiny_lake, seed=3, skill=0.3))


@pytest.fixture
def folder(whole, tmp_path):
    return copied(whole, tmp_path / "model")


def said_of(folder):
    """What loading a folder ends with: one line."""
    with pytest.raises(ModelFolderError) as caught:
        load_model(folder)
    said = str(caught.value)
    assert "\n" not in said
    assert len(said) < 1_500
    assert str(folder) in said
    return said


def loads_or_is_refused(folder):
    """Whatever a folder holds: it is refused in a line, or it answers."""
    begun, said = time.monotonic(), "fine"
    try:
        loaded = load_model(folder)
        items = list(loaded.catalogue.raw_ids[6:9])
        (answer,) = Recommender(loaded, "m/1").answer([Request(items, "u007")], k=5)
        assert all(isinstance(item, str) for item in answer.items)
    except GraftrecError as error:
        said = str(error)
    assert said
    assert "\n" not in said
    assert time.monotonic() - begun < 20


# --- manifests ------------------------------------------------------------------------------------------------------


def flip_weights(folder):
    data = bytearray((folder / "weights.safetensors").read_bytes())
    data[-1] ^= 0x40
    (folder / "weights.safetensors").write_bytes(data)


@pytest.mark.parametrize("kept", [[], ["config.json"], ["config.json", "catalogue.parquet"]])
def test_a_manifest_that_names_too_little_is_refused_whatever_the_weights(folder, kept):
    digests = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({name: digests[name] for name in kept}))
    flip_weights(folder)
    assert "names too little: expected the SHA-256 of" in said_of(folder)
    with pytest.raises(ModelFolderError):
        model_hash(folder)


@pytest.mark.parametrize("text", ["[]", "null", "3", '"x"', "", "{", "[" * 100_000, '{"config.json": null}', "\ud800"])
def test_a_manifest_that_is_none_is_refused(folder, text):
    (folder / "manifest.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    said_of(folder)


@pytest.mark.parametrize(
    "name", ["../secret.json", "/etc/passwd", "a/b.json", "..", ".", "", "manifest.json", "a\0b", ".hidden", "x\n.json"]
)
def test_a_manifest_that_names_a_place_outside_is_refused(folder, name):
    digests = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(digests | {name: "0" * 64}))
    assert "expected names of files in its folder" in said_of(folder)


def test_a_name_that_stands_twice_in_a_manifest_is_refused(folder):
    text = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text(text.replace("{", '{"config.json": "' + "0" * 64 + '",', 1))
    assert "found one twice" in said_of(folder)


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_a_link_is_refused_and_a_folder_that_is_one_is_not(folder, name, tmp_path):
    os.rename(folder / name, tmp_path / name)
    (folder / name).symlink_to(tmp_path / name)
    assert "found a link" in said_of(folder)
    (folder / name).unlink()
    os.rename(tmp_path / name, folder / name)
    (tmp_path / "linked").symlink_to(folder)
    assert load_model(tmp_path / "linked").hash == model_hash(folder)


@pytest.mark.parametrize("name", ["content.safetensors", "features.safetensors", "user_features.safetensors"])
def test_a_file_that_the_manifest_does_not_name_changes_nothing(folder, whole, name):
    save_file({"content": torch.ones(len(load_model(whole).catalogue), 4)}, folder / name)
    loaded = load_model(folder)
    assert loaded.model.content_VF is None
    assert loaded.hash == model_hash(whole)


# --- settings and catalogue, sealed again ---------------------------------------------------------------------------


@pytest.mark.parametrize("value", [[], None, 3, "x", True, {}, [{}]])
def test_settings_that_are_no_object_are_refused_wherever_they_are_read(folder, value):
    (folder / "config.json").write_text(json.dumps(value))
    sealed(folder)
    said_of(folder)
    assert recipe_of(folder) == ""
    assert not is_friends(folder)
    for read in (config_of, load_friends):
        with pytest.raises(ModelFolderError):
            read(folder)


def newer(described):
    described["config"]["model"]["mixture_of_experts"] = 8


def newer_still(described):
    described["ensemble"] = ["a", "b"]


def newer_recipe(described):
    described["recipe"] = "distil"


def newer_network(described):
    described["config"]["model"]["kind"] = "mamba"


@pytest.mark.parametrize("change", [newer, newer_still, newer_recipe, newer_network])
def test_a_model_of_a_newer_version_is_refused_by_what_is_new(folder, change):
    said = said_of(rewritten(folder, "config.json", change))
    assert any(name in said for name in ("mixture_of_experts", "ensemble", "recipe", "model.kind"))


@pytest.mark.parametrize(
    ("section", "setting", "value"),
    [
        ("model", "width", 10**9),
        ("model", "blocks", 10**7),
        ("model", "heads", 10**9),
        ("model", "user_width", 10**9),
        ("model", "knowledge_width", 10**9),
        ("model", "max_length", 10**12),
        ("model", "width", -8),
        ("model", "width", 8.5),
        ("model", "width", 10**30),
        ("model", "blocks", float("nan")),
        ("model", "knowledge", {"director": 10**9}),
        ("model", "knowledge", {"director": -1}),
        ("model", "knowledge", []),
        ("model", "knowledge", {"director": 7}),
        ("model", "features", {"encoders": ["e"] * 10}),
        ("data", "event_types", ["x"] * 10**5),
    ],
)
def test_sizes_are_refused_before_memory_is_taken(folder, section, setting, value):
    before, begun = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()

    def change(described):
        described["config"][section][setting] = value

    said_of(rewritten(folder, "config.json", change))
    assert time.monotonic() - begun < 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # KB


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_entities", 10**18),
        ("num_entities", -1),
        ("num_entities", 10**30),
        ("num_users", "many"),
        ("release", -1),
        ("release", [1]),
        ("versions", []),
        ("versions", {"items": "x"}),
        ("parent", 3),
        ("task_heads", {"a": 10**18}),
        ("task_heads", {"a": -1}),
        ("task_heads", {"a": {"content": 10**12, "layers": [10**12]}}),
        ("task_heads", {"a.b": 3}),
        ("classes", {"a": 3}),
        ("metrics", {"a": "x"}),
        ("metrics", []),
        ("encodings", {"a": 1}),
        ("categories", [1]),
    ],
)
def test_what_a_folder_says_of_itself_is_checked(folder, key, value):
    said_of(rewritten(folder, "config.json", lambda described: described.__setitem__(key, value)))


def rows_of(folder):
    return pq.read_table(folder / "catalogue.parquet")


def changed_rows(folder, name, values):
    rows = rows_of(folder)
    place = rows.column_names.index(name)
    pq.write_table(rows.set_column(place, name, values), folder / "catalogue.parquet")
    return sealed(folder)


@pytest.mark.parametrize("name", ["index", "item", "title", "popularity", "knowledge"])
def test_a_catalogue_without_a_column_or_with_another_type_is_refused(folder, name):
    rows = rows_of(folder)
    changed_rows(folder, name, pa.array([3.5] * len(rows)))
    said_of(folder)
    changed_rows(folder, name, pa.nulls(len(rows), rows.schema.field(name).type))
    said_of(folder)
    pq.write_table(rows.drop_columns([name]), folder / "catalogue.parquet")
    assert name in said_of(sealed(folder))


def test_entities_and_rows_that_lead_outside_are_refused(folder):
    rows = rows_of(folder)
    slots = np.full((len(rows), 4), 10**6, dtype=np.int32)
    changed_rows(folder, "knowledge", pa.FixedSizeListArray.from_arrays(slots.ravel(), 4))
    assert "expected entities from 0 to" in said_of(folder)
    ragged = pa.array([[0] * (place % 3) for place in range(len(rows))], pa.list_(pa.int32()))
    changed_rows(folder, "knowledge", ragged)
    assert "expected entities" in said_of(folder)


@pytest.mark.parametrize("value", [-1, 2**31, 2**62])
def test_indices_that_no_table_has_are_refused(folder, value):
    changed_rows(folder, "index", pa.array([value] * len(rows_of(folder)), pa.int64()))
    said_of(folder)


def test_a_catalogue_of_more_rows_than_there_are_weights_is_refused_before_it_is_read(folder):
    rows = 30_000_000  # some KB on disk
    group = pa.table({name: pa.array(np.zeros(rows // 100, np.int8)) for name in ("index",)})
    with pq.ParquetWriter(folder / "catalogue.parquet", group.schema, compression="zstd") as writer:
        for _ in range(100):
            writer.write_table(group)
    assert (folder / "catalogue.parquet").stat().st_size < 500_000
    assert f"found {rows:,}" in said_of(sealed(folder))


def test_users_that_the_table_lacks_are_refused(folder):
    named = pq.read_table(folder / "users.parquet")
    place = named.column_names.index("index")
    pq.write_table(named.set_column(place, "index", pa.array([10**6] * len(named))), folder / "users.parquet")
    assert "users.parquet" in said_of(sealed(folder))


@pytest.mark.parametrize(
    "change",
    [
        lambda weights: {name: one.to(torch.int32) for name, one in weights.items()},
        lambda weights: {name: one[:1] for name, one in weights.items()},
        lambda weights: {name: one.flatten() for name, one in weights.items()},
        lambda weights: {f"other.{name}": one for name, one in weights.items()},
        lambda weights: weights | {"more": torch.zeros(1)},
        lambda weights: {name: torch.zeros(0) for name in weights},
        lambda weights: {},
    ],
)
def test_weights_that_are_not_the_settings_are_refused(folder, change):
    save_file(change(load_file(folder / "weights.safetensors")), folder / "weights.safetensors")
    assert "weights" in said_of(sealed(folder))


def test_a_header_that_promises_more_than_the_file_holds_is_refused(folder):
    data = (folder / "weights.safetensors").read_bytes()
    for changed in (b"\xff" * 8 + data[8:], (1 << 40).to_bytes(8, "little") + data[8:], data[:100], b"", data[:7]):
        (folder / "weights.safetensors").write_bytes(changed)
        assert "weights.safetensors" in said_of(sealed(folder))


@pytest.mark.parametrize(
    "text", ['{"lake": 3}', "[]", "null", '{"lake": "x", "costs": []}', '{"lake": "s3://a:b@c/d"}']
)
def test_an_origin_that_is_none_is_refused(folder, text):
    (folder / "origin.json").write_text(text)
    said_of(folder)
    with pytest.raises(ModelFolderError):
        lake_of(folder)


def test_a_folder_from_before_has_its_lake_in_its_settings(folder, whole):
    (folder / "origin.json").unlink()
    rewritten(folder, "config.json", lambda described: described.__setitem__("lake", "old/lake"))
    assert load_model(folder).lake == str(Path("old/lake").absolute())


# --- anything -------------------------------------------------------------------------------------------------------


@given(st.data())
@settings(SEEDED, max_examples=EXAMPLES)
def test_any_settings_load_or_are_refused_in_a_line(whole, tmp_path, data):
    folder = copied(whole, tmp_path / "model")
    described = data.draw(spoilt(json.loads((whole / "config.json").read_text())))
    (folder / "config.json").write_text(json.dumps(described))
    loads_or_is_refused(sealed(folder))


@given(st.data())
@settings(SEEDED, max_examples=EXAMPLES)
def test_any_bytes_load_or_are_refused_in_a_line(whole, tmp_path, data):
    folder = copied(whole, tmp_path / "model")
    name = data.draw(st.sampled_from(FILES))
    (folder / name).write_bytes(data.draw(spoilt_bytes((whole / name).read_bytes())))
    loads_or_is_refused(sealed(folder))


@given(st.data())
@settings(SEEDED, max_examples=EXAMPLES)
def test_any_manifest_loads_the_model_that_was_saved_or_none(whole, tmp_path, data):
    folder = copied(whole, tmp_path / "model")
    described = data.draw(spoilt(json.loads((whole / "manifest.json").read_text())))
    (folder / "manifest.json").write_text(json.dumps(described))
    flip_weights(folder)
    said_of(folder)
