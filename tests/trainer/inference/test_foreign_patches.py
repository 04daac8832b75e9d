"""Patches that somebody else may have written: nothing outside their folder is read or written, and what they give is
the model that was registered, or a refusal."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from tests.fixtures.folders import write_model
from tests.fixtures.hostile import EXAMPLES, SEEDED, copied, sealed, spoilt, spoilt_bytes
from trainer.inference import delta_folder
from trainer.inference.model_folder import ModelFolderError, load_model, model_hash


@pytest.fixture(scope="module")
def made(tiny_lake, tmp_path_factory):
    """A parent, and a model that has other biases and no users of its own."""
    folder = tmp_path_factory.mktemp("foreign-patches")
    parent = Path(write_model(folder / "parent", tiny_lake, seed=1))
    child = copied(parent, folder / "child")
    weights = load_file(child / "weights.safetensors")
    weights["output_bias"][7:12] += 1
    save_file(weights, child / "weights.safetensors")
    sealed(child)
    delta_folder.write_patch(child, parent, folder / "patch")
    return parent, child, folder / "patch"


@pytest.fixture
def patch(made, tmp_path):
    return copied(made[2], tmp_path / "inside" / "patch")


def refuses(patch, made, tmp_path):
    """Both ways of reading a patch, which leave nothing elsewhere; what they say."""
    said = []
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    for read in (
        lambda: delta_folder.load_patch(patch, load_model(made[0])),
        lambda: delta_folder.assemble(patch, made[0], tmp_path / "whole"),
    ):
        with pytest.raises(ModelFolderError) as caught:
            read()
        said.append(str(caught.value))
        assert "\n" not in said[-1]
    left = [str(path) for path in tmp_path.rglob("*") if not path.is_relative_to(tmp_path / "whole")]
    assert sorted(left) == before
    shutil.rmtree(tmp_path / "whole", ignore_errors=True)
    return said[0]


def changed(patch, **more):
    described = json.loads((patch / "patch.json").read_text())
    (patch / "patch.json").write_text(json.dumps(described | more))
    return patch


def test_an_untouched_patch_is_the_model_it_was(made, patch, tmp_path):
    parent, child, _ = made
    assert delta_folder.assemble(patch, parent, tmp_path / "whole") == model_hash(child)
    loaded = delta_folder.load_patch(patch, load_model(parent))
    assert loaded.hash == model_hash(child)
    for name, tensor in load_model(child).model.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], tensor)


@pytest.mark.parametrize(
    "name", ["../../secret.txt", "/etc/hostname", "../parent/config.json", "config.json", "users.parquet/..", "", "a\0"]
)
def test_a_patch_that_names_files_outside_is_refused(made, patch, tmp_path, name):
    (tmp_path / "secret.txt").write_text("secret")
    assert "expected files among" in refuses(changed(patch, files=[name]), made, tmp_path)


@pytest.mark.parametrize("name", ["patch.json", "whole.json", "patch.safetensors", "config.json", "catalogue.parquet"])
def test_a_patch_with_a_link_in_it_is_refused(made, patch, tmp_path, name):
    (patch / name).rename(tmp_path / name)
    (patch / name).symlink_to(tmp_path / name)
    assert "link" in refuses(patch, made, tmp_path)


def test_a_file_beside_those_of_a_patch_is_not_copied(made, patch, tmp_path):
    (tmp_path / "secret.txt").write_text("secret")
    (patch / "stray.txt").symlink_to(tmp_path / "secret.txt")
    (patch / "content.safetensors").write_bytes(b"x")
    delta_folder.assemble(patch, made[0], tmp_path / "whole")
    assert {path.name for path in (tmp_path / "whole").iterdir()} == {path.name for path in made[1].iterdir()}


def test_a_link_in_a_model_folder_reaches_no_registered_patch(made, tmp_path):
    child = copied(made[1], tmp_path / "child")
    (tmp_path / "secret.txt").write_text("secret")
    (child / "stray.txt").symlink_to(tmp_path / "secret.txt")
    delta_folder.write_patch(child, made[0], tmp_path / "patch")
    assert not (tmp_path / "patch" / "stray.txt").exists()


@pytest.mark.parametrize(
    "more",
    [
        {"tensors": ["nothing"]},
        {"tensors": []},
        {"rows": {"output_bias": [10**6] * 5}},
        {"rows": {"output_bias": [-1]}},
        {"rows": {"output_bias": [6, 7, 8, 9, 10]}},  # other rows than were trained
        {"rows": {}},
        {"rows": []},
        {"parent": "0" * 32},
        {"parent": None},
        {"digest": "0" * 64},
        {"more": 1},
    ],
)
def test_a_patch_that_gives_other_weights_than_were_registered_is_refused(made, patch, tmp_path, more):
    refuses(changed(patch, **more), made, tmp_path)


def test_weights_that_were_exchanged_with_their_digest_are_refused(made, patch, tmp_path):
    tensors = {name: one + 1 for name, one in load_file(patch / "patch.safetensors").items()}
    save_file(tensors, patch / "patch.safetensors")
    changed(patch, digest=delta_folder.digest_of(patch / "patch.safetensors"))
    assert "damaged" in refuses(patch, made, tmp_path)


@pytest.mark.parametrize("kept", [[], ["config.json", "catalogue.parquet"], ["weights.safetensors"]])
def test_a_whole_that_names_too_little_is_refused(made, patch, tmp_path, kept):
    digests = json.loads((patch / "whole.json").read_text())
    (patch / "whole.json").write_text(json.dumps({name: digests[name] for name in kept}))
    assert "expected the SHA-256 of" in refuses(patch, made, tmp_path)


@given(st.data())
@settings(SEEDED, max_examples=EXAMPLES)
def test_any_patch_gives_what_was_registered_or_is_refused(made, tmp_path, data):
    parent, child, stored = made
    patch = copied(stored, tmp_path / "patch")
    shutil.rmtree(tmp_path / "whole", ignore_errors=True)
    name = data.draw(st.sampled_from(["patch.json", "whole.json", "patch.safetensors", "config.json"]))
    if name.endswith(".json"):
        (patch / name).write_text(json.dumps(data.draw(spoilt(json.loads((stored / name).read_text())))))
    else:
        (patch / name).write_bytes(data.draw(spoilt_bytes((stored / name).read_bytes())))
    for read in (
        lambda: delta_folder.load_patch(patch, load_model(parent)).hash,
        lambda: delta_folder.assemble(patch, parent, tmp_path / "whole"),
    ):
        try:
            found = read()
        except ModelFolderError as error:
            found, said = None, str(error)
            assert "\n" not in said
        if found == model_hash(child):
            assert load_file(tmp_path / "whole" / "weights.safetensors") if (tmp_path / "whole").exists() else True
    assert {path.name for path in tmp_path.iterdir()} <= {"patch", "whole"}
