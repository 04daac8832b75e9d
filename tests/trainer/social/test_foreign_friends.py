"""Folders of an attention over friends, and of embeddings, that somebody else may have written."""

import json
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scipy.sparse as sp
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from etl.settings import GraftrecError
from etl.tables import FIRST_INDEX
from tests.fixtures.hostile import EXAMPLES, SEEDED, copied, rewritten, sealed, spoilt, spoilt_bytes
from trainer.config import FriendsConfig
from trainer.data.catalogue import Catalogue
from trainer.data.release import Release
from trainer.inference.model_folder import ModelFolderError
from trainer.inference.recommender import Request
from trainer.knowledge_graph.vectors import Features, load_embedding, save_embedding
from trainer.social.attention import FriendAttention, TrainedFriends
from trainer.social.evidence import Evidence
from trainer.social.friends_folder import FriendsModel, load_friends, save_friends
from trainer.social.friends_recommender import FriendsRecommender

USERS, ITEMS = 12, 9


@pytest.fixture(scope="module")
def friends(tmp_path_factory):
    random = np.random.default_rng(0)
    edges = np.triu(random.random((USERS, USERS)) < 0.4, 1)
    taken = random.random((USERS, FIRST_INDEX + ITEMS)) < 0.4
    taken[:, :FIRST_INDEX] = False
    matrices = [sp.csr_array((one).astype(np.float32)) for one in (edges | edges.T, taken)]
    names = ["" if place < FIRST_INDEX else f"i{place}" for place in range(FIRST_INDEX + ITEMS)]
    model = FriendsModel(
        FriendsConfig.model_validate({"model": {"hidden": 4, "candidates": 5}}),
        "users-0",
        Release("/nowhere/lake", 1, {"items": 0}),
        Catalogue(np.arange(len(names)), names, [""] * len(names)),
        np.arange(USERS),
        pa.array([f"u{user}" for user in range(USERS)]),
        TrainedFriends(FriendAttention(4).eval(), Evidence(*matrices, num_candidates=5), []),
    )
    folder = tmp_path_factory.mktemp("friends") / "model"
    save_friends(folder, model)
    return folder


@pytest.fixture
def folder(friends, tmp_path):
    return copied(friends, tmp_path / "model")


def said_of(folder):
    begun = time.monotonic()
    with pytest.raises(ModelFolderError) as caught:
        load_friends(folder)
    assert "\n" not in str(caught.value)
    assert time.monotonic() - begun < 10
    return str(caught.value)


def test_an_untouched_folder_answers(folder):
    (answer,) = FriendsRecommender(load_friends(folder), "f/1").answer([Request([], friends=["u1", "u2"])], k=3)
    assert answer.basis == "friends"
    assert len(answer.items) == 3


@pytest.mark.parametrize("lacking", ["circle.safetensors", "people.parquet", "weights.safetensors"])
def test_a_friends_manifest_that_names_too_little_is_refused(folder, lacking):
    digests = json.loads((folder / "manifest.json").read_text())
    del digests[lacking]
    (folder / "manifest.json").write_text(json.dumps(digests))
    assert lacking in said_of(folder)


@pytest.mark.parametrize("value", [10**9, 65_536, 10**30, -1, "x", None])
def test_units_are_refused_before_memory_is_taken(folder, value):
    said_of(rewritten(folder, "config.json", lambda found: found["config"]["model"].__setitem__("hidden", value)))


@pytest.mark.parametrize("name", ["edges/indices", "taken/indices", "edges/indptr", "taken/indptr"])
@pytest.mark.parametrize("change", [lambda one: one + 10**6, lambda one: one - 10**6, lambda one: one[:1]])
def test_a_circle_that_leads_outside_is_refused(folder, name, change):
    parts = load_file(folder / "circle.safetensors")
    save_file(parts | {name: change(parts[name]).contiguous()}, folder / "circle.safetensors")
    said_of(sealed(folder))


def test_people_of_another_number_are_refused(folder):
    people = pq.read_table(folder / "people.parquet")
    pq.write_table(people.slice(1), folder / "people.parquet")
    assert "people.parquet" in said_of(sealed(folder))
    pq.write_table(pa.concat_tables([people] * 1_000), folder / "people.parquet")
    assert "people.parquet" in said_of(sealed(folder))


@given(st.data())
@settings(SEEDED, max_examples=EXAMPLES)
def test_any_friends_folder_answers_or_is_refused(friends, tmp_path, data):
    folder = copied(friends, tmp_path / "model")
    name = data.draw(st.sampled_from(sorted(path.name for path in friends.iterdir() if path.name != "manifest.json")))
    if name.endswith(".json"):
        (folder / name).write_text(json.dumps(data.draw(spoilt(json.loads((friends / name).read_text())))))
    else:
        (folder / name).write_bytes(data.draw(spoilt_bytes((friends / name).read_bytes())))
    said = "fine"
    try:
        FriendsRecommender(load_friends(sealed(folder)), "f/1").answer([Request([], user="u1"), Request(["i6"])], k=3)
    except GraftrecError as error:
        said = str(error)
    assert said
    assert "\n" not in said


# --- embeddings -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def embedding(tmp_path_factory):
    folder = tmp_path_factory.mktemp("embedding") / "model"
    nodes = pa.table({"kind": ["item", "item", "entity"], "id": ["a", "b", "c"]})
    tables = {"entities": torch.ones(3, 4), "relations": torch.ones(2, 4)}
    features = Features("e", "", ["item"], ["a"], np.array([6]), np.ones((1, 4), np.float32), {})
    save_embedding(folder, kind="transe", tables=tables, nodes=nodes, relations=["r", "s"], features=features)
    return folder


@pytest.mark.parametrize("lacking", ["tables.safetensors", "nodes.parquet", "embedding.json", "features.parquet"])
def test_an_embeddings_manifest_that_names_too_little_is_refused(embedding, tmp_path, lacking):
    folder = copied(embedding, tmp_path / "model")
    digests = json.loads((folder / "manifest.json").read_text())
    del digests[lacking]
    (folder / "manifest.json").write_text(json.dumps(digests))
    with pytest.raises(ModelFolderError, match=lacking):
        load_embedding(folder)


@given(st.data())
@settings(SEEDED, max_examples=EXAMPLES)
def test_any_embedding_is_read_or_refused(embedding, tmp_path, data):
    folder = copied(embedding, tmp_path / "model")
    name = data.draw(st.sampled_from(["embedding.json", "tables.safetensors", "nodes.parquet", "manifest.json"]))
    if name.endswith(".json"):
        (folder / name).write_text(json.dumps(data.draw(spoilt(json.loads((embedding / name).read_text())))))
    else:
        (folder / name).write_bytes(data.draw(spoilt_bytes((embedding / name).read_bytes())))
    said = "fine"
    try:
        load_embedding(folder if name == "manifest.json" else sealed(folder))
    except ModelFolderError as error:
        said = str(error)
    assert said
    assert "\n" not in said
