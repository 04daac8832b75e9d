"""The rule for raw ids, the same for every format of a log and for a served request. Imports pyarrow and nothing else.

Text is trimmed; a whole number is spelled without a fraction, whatever its type and size (5, 5.0 and 28.00 are "5" and
"28"); NaN and infinity are missing. What may have lost digits is refused.
"""

import re
from collections.abc import Collection, Sequence

import pyarrow as pa
import pyarrow.compute as pc

from etl.settings import GraftrecError

NO_NUMBER = r"(?i)^[+-]?(nan|inf|infinity)$"
_SCIENTIFIC = r"^[+-]?\d+(\.\d+)?[eE]\+\d+$"
_ODD_ID = r"(?i)^([+-]?(nan|inf|infinity|\d+\.0+|\d+(\.\d+)?e\+\d+)$|\{\")"  # any of the above, 5.0, or an object
# Text that is an id as it stands: digits, or a word that is no name of a number.
_CLEAR_ID = re.compile(r"\d+|(?!(?i:nan|inf|infinity)\Z)[a-z_][\w-]*", re.ASCII | re.IGNORECASE)
_EXACT = {16: 2.0**11, 32: 2.0**24, 64: 2.0**53}  # float's bits -> whole numbers below it differ from their neighbours

# As files and their conversions write that nothing is known.
NO_TEXT = frozenset(
    {
        "",
        "[]",
        "['']",
        '[""]',
        "[none]",
        "{}",
        "()",
        "-",
        "?",
        "unknown",
        "null",
        "none",
        "nan",
        "n/a",
        "\\n",
        "undefined",
    }
)


def identifier(cells: pa.Array) -> tuple[pa.Array, list[tuple[pa.Array, str]]]:
    """Ids as text, null where missing; and (True for cells that are refused, why).

    Refused are floats too large to tell neighbouring whole numbers apart, numbers in scientific notation, which have
    lost digits, and JSON objects. Raises GraftrecError for lists and structs.
    """
    if pa.types.is_dictionary(cells.type):
        cells = cells.dictionary_decode()
    if pa.types.is_floating(cells.type):
        largest, cells = _EXACT[cells.type.bit_width], pc.cast(cells, pa.float64())
        cells = pc.if_else(pc.is_finite(cells), cells, None)
        inexact = pc.greater_equal(pc.abs(cells), largest)
        words = text(pc.if_else(inexact, None, cells))
        return words, [(inexact, "is a float too large to be exact; store it as text"), _scientific(words)]
    words = text(cells)
    if not (is_text(cells.type) or pa.types.is_decimal(cells.type)):
        return words, []
    odd = pc.fill_null(pc.match_substring_regex(words, _ODD_ID), False)
    if not pc.any(odd).as_py():
        return words, []
    words = pc.if_else(pc.match_substring_regex(words, NO_NUMBER), None, words)
    words = pc.replace_substring_regex(words, r"^([+-]?\d+)\.0+$", r"\1")
    refused = [_scientific(words), (pc.starts_with(words, '{"'), "is an object; name a column of single values")]
    return pc.if_else(pc.equal(words, "-0"), "0", words), refused


def raw_ids(values: Sequence[str | int | float]) -> list[str]:
    """The ids of plain values; text without an id, which no table holds, stays. Raises ValueError for other values."""
    if all(isinstance(value, str) and _CLEAR_ID.fullmatch(value) for value in values):  # most requests
        return [str(value) for value in values]
    words = pa.array([value if isinstance(value, str) else _spelled(value) for value in values], pa.string())
    ids: list[str] = pc.coalesce(identifier(words)[0], words).to_pylist()
    return ids


def text(cells: pa.Array) -> pa.Array:
    """Trimmed text, null where empty. Whole floats are spelled without a fraction, where they are exact."""
    if pa.types.is_dictionary(cells.type):
        cells = cells.dictionary_decode()
    if pa.types.is_floating(cells.type):
        cells = pc.cast(cells, pa.float64())
        whole = pc.fill_null(pc.and_(pc.equal(cells, pc.floor(cells)), pc.less(pc.abs(cells), 2.0**53)), False)
        cells = pc.if_else(
            whole,
            pc.cast(pc.cast(pc.if_else(whole, cells, None), pa.int64()), pa.string()),
            pc.cast(cells, pa.string()),
        )
    if pa.types.is_nested(cells.type):
        raise GraftrecError(f"expected text or numbers, found {cells.type}; name a column of single values")
    if is_binary(cells.type):
        cells = pa.array([None if v is None else v.decode("utf-8", "replace") for v in cells.to_pylist()], pa.string())
    trimmed = pc.utf8_trim_whitespace(pc.cast(cells, pa.string()))
    return pc.if_else(pc.equal(trimmed, ""), None, trimmed)


def is_no_text(text: str, placeholders: Collection[str] = ()) -> bool:
    """Whether a text stands for none, in any case of letters."""
    folded = text.strip().casefold()
    return folded in NO_TEXT or folded in placeholders


def is_text(kind: pa.DataType) -> bool:
    is_string: bool = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    return is_string or is_binary(kind)


def is_binary(kind: pa.DataType) -> bool:
    found: bool = pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind)
    return found


def _scientific(words: pa.Array) -> tuple[pa.Array, str]:
    failed = pc.match_substring_regex(words, _SCIENTIFIC)
    return failed, "is in scientific notation: digits are lost; store it as text"


def _spelled(number: int | float) -> str:
    """A number as text, a float as Arrow spells it. Raises ValueError where a float is missing or has lost digits."""
    if isinstance(number, int):
        return str(number)
    found, refused = identifier(pa.array([number], pa.float64()))
    if found[0].as_py() is None or any(failed[0].as_py() for failed, _ in refused):
        raise ValueError(f"expected an id, found {number!r}, which may have lost digits; give it as text")
    return str(found[0])
