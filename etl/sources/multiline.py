"""Rows of delimited text whose quoted cells hold line ends: lines with an open quote are joined to what closes it.

A quote that nothing closes within 1 MiB costs its own line, which is rejected; reading goes on with the next one.
"""

from collections import deque
from collections.abc import Iterator

import pyarrow as pa
import pyarrow.compute as pc

from etl.file_config import FileConfig
from etl.sources.delimited import TOO_LONG, Chunk
from etl.sources.files import MAX_ROW_BYTES

_OPEN = "a quote that nothing closes"
Line = tuple[int, str, str | None, bool]  # number, text, reason, whether it has an odd number of quotes


def joined(chunks: Iterator[Chunk], config: FileConfig) -> Iterator[Chunk]:
    """Chunks of lines, empty ones too, as chunks of rows; a row's line is its first."""
    waiting: deque[Line] = deque()  # lines of a row that is still open
    for chunk in chunks:
        odd = _odd_quotes(chunk.raw, config)
        if not waiting and not pc.any(odd).as_py():
            yield _without_empty(chunk)
            continue
        cells = (chunk.line, chunk.raw, chunk.reason, odd)
        waiting.extend(zip(*(cell.to_pylist() for cell in cells), strict=True))
        yield _chunk(list(_rows(waiting, is_end=False)))
    if waiting:
        yield _chunk(list(_rows(waiting, is_end=True)))


def _rows(waiting: deque[Line], *, is_end: bool) -> Iterator[Line]:
    """Whole rows of lines, which are taken off; a row that is open at the last line is left, unless it `is_end`."""
    while waiting:
        size, last = 0, None
        for place, (_, text, reason, is_odd) in enumerate(waiting):
            size += len(text)
            if reason == TOO_LONG or size > MAX_ROW_BYTES:
                break
            if is_odd == (place > 0):  # closed on the line that opened it, or on a later one
                last = place
                break
        else:
            if not is_end:
                return
        if last is None:
            line, text, reason, _ = waiting.popleft()
            yield line, text, reason or _OPEN, False
            continue
        record = [waiting.popleft() for _ in range(last + 1)]
        reasons = [reason for _, _, reason, _ in record if reason is not None]
        yield record[0][0], "\n".join(text for _, text, _, _ in record), reasons[0] if reasons else None, False


def _odd_quotes(texts: pa.Array, config: FileConfig) -> pa.Array:
    if config.escape:
        escape = "\\" + config.escape if not config.escape.isalnum() else config.escape
        texts = pc.replace_substring_regex(texts, f"{escape}.", "")
    return pc.equal(pc.bit_wise_and(pc.count_substring(texts, config.quote), 1), 1)


def _chunk(rows: list[Line]) -> Chunk:
    kinds = (pa.int64(), pa.string(), pa.string())
    line, raw, reason = (pa.array([row[place] for row in rows], kind) for place, kind in enumerate(kinds))
    return _without_empty(Chunk(line, [], reason, raw))


def _without_empty(rows: Chunk) -> Chunk:
    kept = pc.not_equal(rows.raw, "")
    return Chunk(rows.line.filter(kept), [], rows.reason.filter(kept), rows.raw.filter(kept))
