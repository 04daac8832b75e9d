"""Texts and their vectors as Arrow batches: what an engine's tasks do. Nothing is imported that a task may not need."""

import functools
import os
import threading
from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from trainer.encoders import TextEncoder, text_encoder
from trainer.encoders.text import source_hash, text_of

ROWS = ["id", "index", "vector", "source_hash"]


def rendered(batches: Iterator[pa.RecordBatch], *, placeholders: frozenset[str]) -> Iterator[pa.RecordBatch]:
    """id, index, text and its hash, of rows (id, index, any number of parts of a text) that have a text."""
    for batch in batches:
        parts = zip(*(column.to_pylist() for column in batch.columns[2:]), strict=True)
        texts = [text_of(each, placeholders) for each in parts]
        hashes = [source_hash(text) for text in texts]
        rows = [batch.column(0), batch.column(1), pa.array(texts, pa.string()), pa.array(hashes, pa.int64())]
        filled = pa.array([bool(text) for text in texts])
        yield pa.RecordBatch.from_arrays(rows, names=["id", "index", "text", "source_hash"]).filter(filled)


def encoded(batches: Iterator[pa.RecordBatch], *, name: str, at_once: int) -> Iterator[pa.RecordBatch]:
    """ROWS of a task's rows (id, index, text, source_hash), in the order of their indices: what an encoder is given
    together depends on them alone, and not on how the engine cut them into batches."""
    filled = [batch for batch in batches if batch.num_rows]
    if not filled:
        return
    given = pa.Table.from_batches(filled).sort_by("index")
    encoder = _loaded(name)
    for start in range(0, len(given), at_once):
        rows = given.slice(start, at_once)
        vectors = encoder.encode(rows["text"].to_pylist())
        offsets = np.arange(len(rows) + 1, dtype=np.int32) * encoder.width
        lists = pa.ListArray.from_arrays(pa.array(offsets), pa.array(vectors.ravel()))
        columns = [rows["id"], rows["index"], lists, rows["source_hash"]]
        yield from pa.table(columns, names=ROWS).combine_chunks().to_batches()


_loading = threading.Lock()  # Sail's tasks are threads of one process


def _loaded(name: str) -> TextEncoder:
    """An encoder, kept by a worker from task to task."""
    from trainer.parallel.cores import use_threads

    use_threads(1)  # there are as many tasks at once as cores
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with _loading:
        return _encoder(name)


_encoder = functools.lru_cache(maxsize=1)(text_encoder)
