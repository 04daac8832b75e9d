"""Texts of items as words of a table of vectors."""

import numpy as np
import pytest

from etl.tables import FIRST_INDEX, ITEMS
from trainer.config import DocumentConfig
from trainer.data.catalogue import read_catalogue
from trainer.data.documents import read_documents
from trainer.data.release import DataError, pin
from trainer.encoders import text_encoder

pytest.importorskip("wordllama")


def test_words_of_items_average_to_the_frozen_encoders_vectors(tiny_lake: str) -> None:
    release = pin(tiny_lake, None)
    catalogue = read_catalogue(release, "source")
    documents = read_documents(release, catalogue, DocumentConfig())
    assert not documents.words_VL[:FIRST_INDEX].any()
    assert not documents.vectors_UF[0].any()
    known = {row["item"]: row for row in release.read(ITEMS, ["item", "title", "categories"]).to_pylist()}
    texts = [f"{known[raw]['title']}. {', '.join(known[raw]['categories'])}" for raw in catalogue.raw_ids[FIRST_INDEX:]]
    expected = text_encoder("wordllama").encode(texts)
    found = [documents.vectors_UF[row[row != 0]].astype(np.float32).mean(0) for row in documents.words_VL[FIRST_INDEX:]]
    np.testing.assert_allclose(found, expected, atol=1e-3)
    short = read_documents(release, catalogue, DocumentConfig(max_words=2))
    assert short.words_VL.shape == (len(catalogue), 2)
    assert (short.vectors_UF[short.words_VL] == documents.vectors_UF[documents.words_VL[:, :2]]).all()


def test_columns_without_a_text(tiny_lake: str) -> None:
    release = pin(tiny_lake, None)
    catalogue = read_catalogue(release, "source")
    with pytest.raises(
        DataError, match=r"model.features.document: expected a text of one item at least in attributes.x"
    ):
        read_documents(release, catalogue, DocumentConfig(columns=("attributes.x",)))
