"""Texts of a catalogue's items as words, for a network that reads them (survey 2.1).

Words are tokens of an encoder of word vectors (`trainer.encoders.word_vectors`); the table has those that some item's
text has, so that a model folder holds few.

Shape letters: ``V`` catalogue rows, ``L`` words of a text, ``U`` different words, ``F`` width of a word's vector.
"""

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from etl import tables
from etl.tables import FIRST_INDEX
from trainer.arrays import Int32Array
from trainer.config import DocumentConfig
from trainer.config.columns import attribute_of, columns_read
from trainer.data.catalogue import Catalogue
from trainer.data.release import DataError, Release
from trainer.data.shuffled_features import Shuffle
from trainer.encoders.text import Part, as_placeholders, text_of


@dataclass(frozen=True)
class Documents:
    """See trainer.models.documents.DocumentTable."""

    words_VL: Int32Array
    vectors_UF: npt.NDArray[np.float16]

    def shuffled(self, shuffle: Shuffle) -> "Documents":
        """Items exchange their texts."""
        return replace(self, words_VL=self.words_VL[shuffle.rows((self.words_VL != 0).any(1))])


def read_documents(release: Release, catalogue: Catalogue, config: DocumentConfig) -> Documents:
    """Texts of a catalogue's rows, each its first `max_words` words. Raises DataError where no item has any,
    EncoderError where the word vectors' package isn't there."""
    from trainer.encoders.word_vectors import WordLlamaEncoder

    items = release.read(tables.ITEMS, ["index", *columns_read(config.columns)])
    rows = catalogue.rows(items["index"].to_numpy())
    inside = np.flatnonzero(rows >= FIRST_INDEX)
    items, rows = items.take(inside), rows[inside]
    placeholders = as_placeholders(config.placeholders)
    parts = zip(*(cells_of(items, name) for name in config.columns), strict=True)
    encoder = WordLlamaEncoder()
    tokens = encoder.tokens([text_of(each, placeholders) for each in parts])
    if not any(tokens):
        raise DataError(
            f"model.features.document: expected a text of one item at least in {', '.join(config.columns)}, found none "
            f"in release {release.number} of {release.lake}; name columns that hold texts"
        )
    tokens = [own[: config.max_words] for own in tokens]
    known = np.unique(np.concatenate([np.asarray(own, dtype=np.int64) for own in tokens]))
    words_VL = np.zeros((len(catalogue), max(map(len, tokens))), dtype=np.int32)
    for row, own in zip(rows, tokens, strict=True):
        words_VL[row, : len(own)] = np.searchsorted(known, own) + 1
    vectors = encoder.vectors_of(known)
    return Documents(words_VL, np.concatenate([np.zeros_like(vectors[:1]), vectors]).astype(np.float16))


def cells_of(rows: pa.Table, name: str) -> list[Part]:
    """A column of items or users; `attributes.<name>`: one of their attributes."""
    key = attribute_of(name)
    if key is None:
        found: list[Part] = rows[name].to_pylist()
        return found
    return [dict(attributes or ()).get(key) for attributes in rows["attributes"].to_pylist()]
