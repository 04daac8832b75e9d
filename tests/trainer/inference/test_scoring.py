"""Blocks of scores and the best rows of them, against everything at once and plain sorting."""

import dataclasses

import numpy as np
import pytest
import torch

from etl.tables import FIRST_INDEX, UNK
from tests.fixtures.folders import write_model
from trainer.config import Bert4RecConfig, MaskedItemConfig, NextItemConfig
from trainer.data.events import Events
from trainer.inference import scorer
from trainer.inference.model_folder import load_model
from trainer.inference.scorer import ModelScorer, Scores, top_k
from trainer.models import ModelSizes, build_model
from trainer.tasks import build_task


def seen_rows(*rows):
    """Histories of rows."""
    offsets = np.cumsum([0, *map(len, rows)])
    items = np.array([row for history in rows for row in history], dtype=np.int64)
    return Events.of(np.full(len(rows), UNK), offsets, items, np.empty(0, np.int64))


def sorted_rows(scores, seen, k):
    """The best rows of one user by plain sorting; NaN and -inf are no answer."""
    rows = [row for row in range(FIRST_INDEX, len(scores)) if row not in seen and scores[row] > -np.inf]
    return sorted(rows, key=lambda row: (-scores[row], row))[:k]


@pytest.mark.parametrize("k", [1, 5, 40, 100])
@pytest.mark.parametrize("width", [1, 3, 25, 54, 55, 56])
@pytest.mark.parametrize("kind", ["distinct", "tied", "constant", "broken"])
def test_top_k_is_a_sort_however_the_catalogue_is_cut(monkeypatch, kind, width, k):
    random = np.random.default_rng(width * k)
    B, V = 20, 60
    most = {"distinct": 100_000, "tied": 6, "constant": 1, "broken": 8}[kind]
    scores = random.integers(0, most, (B, V)).astype(np.float32)
    if kind == "broken":
        scores[random.random((B, V)) < 0.2] = np.nan
        scores[random.random((B, V)) < 0.2] = -np.inf
        scores[random.random((B, V)) < 0.1] = np.inf
    seen = [random.integers(FIRST_INDEX, V, random.integers(0, 30)).tolist() for _ in range(B)]
    monkeypatch.setattr(scorer, "SCORES_PER_BLOCK", width * B)
    rows, best = top_k(Scores.of(torch.from_numpy(scores.copy())), seen_rows(*seen), k)
    assert rows.shape == best.shape == (B, min(k, V))
    for user in range(B):
        expected = sorted_rows(scores[user], seen[user], k)
        found = rows[user][best[user].numpy() > -np.inf]
        assert found.tolist() == expected
        assert best[user, : len(expected)].tolist() == scores[user][expected].tolist()


def test_no_users_have_no_best_rows():
    rows, best = top_k(Scores.of(torch.zeros(0, 30)), seen_rows(), 4)
    assert rows.shape == best.shape == (0, 4)


@pytest.fixture(scope="module", params=["masked item", "next item"])
def trained_model(request, tiny_lake, tmp_path_factory):
    folder = write_model(tmp_path_factory.mktemp("scored") / "model", tiny_lake, seed=3, skill=0.3)
    found = load_model(folder)
    if request.param == "next item":
        found = dataclasses.replace(found, task=build_task(NextItemConfig()))
    return found


def some_histories(trained_model, num_users=150):
    random = np.random.default_rng(1)
    lengths = random.integers(0, 2 * trained_model.config.model.max_length, num_users)
    rows = [random.integers(FIRST_INDEX, len(trained_model.catalogue), length).tolist() for length in lengths]
    return seen_rows(*rows)


def test_every_user_is_scored_as_if_alone(trained_model):
    """Whatever is read beside it: histories are sorted and cut to the longest of some only."""
    histories = some_histories(trained_model)
    together = trained_model.scorer().score(histories)
    for user in (0, 1, 77, 149):
        alone = trained_model.scorer().score(histories.take(np.array([user])))[0]
        torch.testing.assert_close(together[user], alone, rtol=1e-5, atol=1e-5)


def test_scores_of_blocks_and_of_candidates_are_those_of_the_whole(trained_model, monkeypatch):
    histories = some_histories(trained_model)
    whole = trained_model.scorer().score(histories)
    candidates = np.array([FIRST_INDEX + 3, FIRST_INDEX, len(trained_model.catalogue) - 1])
    torch.testing.assert_close(trained_model.scorer().score(histories, candidates), whole[:, candidates])
    monkeypatch.setattr(scorer, "SCORES_PER_BLOCK", 150 * 4)
    monkeypatch.setattr(scorer, "ROWS_PER_BLOCK", 3)
    parts = dict(trained_model.scorer().scores(histories).blocks())
    assert len(parts) > 2
    joined = torch.cat(list(parts.values()), 1)
    torch.testing.assert_close(joined[:, FIRST_INDEX:], whole[:, FIRST_INDEX:])


def test_an_item_table_without_knowledge_is_not_copied():
    bare = build_model(
        Bert4RecConfig(), ModelSizes(num_users=9, num_entities=0, knowledge_VS=torch.zeros(50, 0)), seed=0
    )
    scorer = ModelScorer(bare, build_task(MaskedItemConfig()))
    scores = scorer.scores(seen_rows([7, 8]))
    assert scores.whole().shape == (1, 50)
    assert scorer._table_VD.data_ptr() == bare.item_embedding.weight.data_ptr()
