"""What items are, as vectors: their text by a sentence encoder, their categories as flags (survey 2 and 3.2.2)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from etl import tables
from etl.settings import ConfigError
from etl.tables import FIRST_INDEX
from trainer.arrays import FloatArray
from trainer.data.catalogue import Catalogue
from trainer.data.release import Release
from trainer.encoders import text_encoder
from trainer.encoders.text import text_of

Part = Literal["text", "categories"]
TEXT_ENCODER = "wordllama"  # static vectors of tokens, averaged
TEXTS_AT_ONCE = 10_000


@dataclass(frozen=True)
class Content:
    """What the items of a catalogue are."""

    vectors_VF: FloatArray  # parts side by side, each of length one; zero for reserved rows and for what an item lacks
    categories: tuple[str, ...]  # those that have a flag, in the order of flags

    @property
    def width(self) -> int:
        return int(self.vectors_VF.shape[1])


def read_content(
    release: Release, catalogue: Catalogue, parts: Sequence[Part], *, known: Sequence[str] | None = None
) -> Content:
    """Of a catalogue's rows. `known`: the categories that have flags, where a model was trained on them already; None:
    all that there are. Raises ConfigError where no item has any of a part, or the encoder's package isn't there."""
    items = release.read(tables.ITEMS, ["index", "title", "categories"])
    rows = catalogue.rows(items["index"].to_numpy())
    inside = np.flatnonzero(rows >= FIRST_INDEX)
    items, rows = items.take(inside), rows[inside]
    titles = items["title"].fill_null("").to_pylist()
    categories: list[list[str]] = [one or [] for one in items["categories"].to_pylist()]
    names = tuple(sorted({name for own in categories for name in own}) if known is None else known)
    found = []
    for part in parts:
        own = _flags(categories, names) if part == "categories" else _texts(titles, categories)
        if known is None and not own.any():
            lacks = "a category" if part == "categories" else "a title or a category"
            raise ConfigError(
                f"task.content: no item of release {release.number} of {release.lake} has {lacks}; leave {part} out, "
                "or describe it in the source's `items` file"
            )
        length = np.linalg.norm(own, axis=1, keepdims=True)
        whole = np.zeros((len(catalogue), own.shape[1]), dtype=np.float32)
        whole[rows] = own / np.maximum(length, 1e-12)
        found.append(whole)
    return Content(np.concatenate(found, axis=1), names)


def _flags(categories: Sequence[Sequence[str]], names: Sequence[str]) -> FloatArray:
    """[N, number of names]; other categories have none."""
    place = {name: number for number, name in enumerate(names)}
    flags = np.zeros((len(categories), max(len(names), 1)), dtype=np.float32)
    for row, own in enumerate(categories):
        flags[row, [place[name] for name in own if name in place]] = 1
    return flags


def _texts(titles: Sequence[str], categories: Sequence[Sequence[str]]) -> FloatArray:
    """[N, width] of the title and the categories behind it; zero for an item with neither."""
    texts = [text_of(parts) for parts in zip(titles, categories, strict=True)]
    filled = [row for row, text in enumerate(texts) if text]
    encoder = text_encoder(TEXT_ENCODER)
    vectors = np.zeros((len(texts), encoder.width), dtype=np.float32)
    for start in range(0, len(filled), TEXTS_AT_ONCE):
        part = filled[start : start + TEXTS_AT_ONCE]
        vectors[part] = encoder.encode([texts[row] for row in part])
    return vectors
