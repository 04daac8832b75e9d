"""Cells to values: text, whole numbers, floats, times. Vectorised; what can't be read becomes null and is flagged.

Every function takes an Arrow array of any type a reader may give (text from delimited files, typed from JSON and
Parquet) and returns arrays of the same length.
"""

import datetime as dt
from collections.abc import Sequence
from zoneinfo import ZoneInfo

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from etl.identifiers import NO_NUMBER, is_text, text
from etl.settings import ConfigError

MICROSECONDS = {"s": 1_000_000.0, "ms": 1_000.0, "us": 1.0, "ns": 0.001}
_WHOLE = r"^[+-]?\d{1,18}$"
_FLOAT = r"^[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d{1,4})?$"
_LOGS_BEGAN = 631_152_000_000_000  # 1990: logs are younger, and what one unit puts behind it no other does
_QUARTER = 900_000_000  # microseconds; zones change their offsets at quarters of an hour
_EPOCH = dt.datetime(1970, 1, 1, tzinfo=dt.UTC)


def without_nulls(cells: pa.Array, null_values: Sequence[str]) -> pa.Array:
    """The cells, null where one of `null_values` stands; text is trimmed."""
    if pa.types.is_dictionary(cells.type):
        cells = cells.dictionary_decode()
    if pa.types.is_floating(cells.type):
        return pc.if_else(pc.is_nan(cells), None, cells) if "NaN" in null_values else cells
    if not is_text(cells.type):
        return cells
    words = text(cells)
    return pc.if_else(pc.is_in(words, pa.array(null_values, pa.string())), None, words)


def given(cells: pa.Array) -> pa.Array:
    """True where a cell holds something."""
    return pc.is_valid(cells if pa.types.is_primitive(cells.type) else text(cells))


def number(cells: pa.Array) -> pa.Array:
    """float64; null where nothing or no number is given. NaN and infinity, however spelled, come out as they are."""
    if pa.types.is_integer(cells.type) or pa.types.is_floating(cells.type) or pa.types.is_boolean(cells.type):
        return pc.cast(cells, pa.float64(), safe=False)
    if pa.types.is_decimal(cells.type):
        return pc.cast(cells, pa.float64())
    words = text(cells)
    special = pc.match_substring_regex(words, NO_NUMBER)
    words = pc.if_else(pc.fill_null(special, False), "nan", words)
    readable = pc.or_(pc.match_substring_regex(words, _FLOAT), pc.equal(words, "nan"))
    return pc.cast(_without_plus(pc.if_else(readable, words, None)), pa.float64())


def with_point(cells: pa.Array) -> pa.Array:
    """Text with a decimal comma, as text with a point."""
    return pc.replace_substring(text(cells), ",", ".") if is_text(cells.type) else cells


def whole_number(cells: pa.Array) -> pa.Array:
    """int64; null where nothing or no whole number is given."""
    if pa.types.is_integer(cells.type):
        return _int64(cells)
    if pa.types.is_floating(cells.type):
        return _rounded(cells, must_be_whole=True)
    words = text(cells)
    plain = pc.fill_null(pc.match_substring_regex(words, _WHOLE), False)
    exact = pc.cast(_without_plus(pc.if_else(plain, words, None)), pa.int64())
    if pc.all(pc.or_(plain, pc.is_null(words))).as_py() is not False:
        return exact
    return pc.coalesce(exact, _rounded(number(pc.if_else(plain, None, words)), must_be_whole=True))


def time(cells: pa.Array, *, unit: str | None, form: str | None, zone: str = "UTC") -> pa.Array:
    """Microseconds since 1970 UTC as int64 (`unit` "ordinal": the number itself); null where unreadable.

    `form` is a strptime format; with neither unit nor form the text is ISO 8601. A textual or typed time that states no
    offset is of `zone`; what is twice there, when clocks go back, is the first.
    """
    if pa.types.is_timestamp(cells.type):
        stamps = pc.cast(pc.cast(cells, pa.timestamp("us", tz=cells.type.tz), safe=False), pa.int64())
        return stamps if cells.type.tz else _in_utc(stamps, zone)
    if pa.types.is_date(cells.type):
        return _in_utc(pc.cast(pc.cast(cells, pa.timestamp("us")), pa.int64()), zone)
    if form is not None:
        return _formatted(text(cells), form, zone)
    if unit is None:
        return _iso(text(cells), zone)
    if unit == "ordinal":
        return whole_number(cells)
    numbers = cells if pa.types.is_integer(cells.type) else None
    if numbers is None and not pa.types.is_floating(cells.type):
        words = text(cells)
        plain = pc.match_substring_regex(words, _WHOLE)
        if pc.all(pc.fill_null(plain, False)).as_py() is not False:
            numbers = pc.cast(_without_plus(words), pa.int64())
    if numbers is not None:
        return _whole_units(_int64(numbers), unit)
    return _rounded(pc.multiply(number(cells), MICROSECONDS[unit]), must_be_whole=False)


def fitting_units(cells: pa.Array, time: pa.Array, *, unit: str, latest: int) -> dict[str, pa.Array]:
    """Other units than `unit` -> True for cells whose `time`, in it, is before 1990 or after `latest`, but not in them.

    Empty where there is none.
    """
    if unit not in MICROSECONDS or pa.types.is_temporal(cells.type):
        return {}
    likely = pc.and_(pc.greater_equal(time, _LOGS_BEGAN), pc.less_equal(time, latest))
    if pc.all(likely, skip_nulls=False).as_py():
        return {}
    odd, numbers = pc.invert(pc.fill_null(likely, False)), number(cells)
    fits = {}
    for other in (name for name in MICROSECONDS if name != unit):
        there = pc.multiply(numbers, MICROSECONDS[other])
        there = pc.and_(pc.greater_equal(there, float(_LOGS_BEGAN)), pc.less_equal(there, float(latest)))
        if pc.any(pc.and_(odd, there)).as_py():
            fits[other] = pc.and_(odd, there)
    return fits


def day(written: str, *, setting: str) -> int:
    """Microseconds of an ISO 8601 date or time in the configuration. Raises ConfigError."""
    try:
        return _microseconds(dt.datetime.fromisoformat(written), dt.UTC)
    except ValueError:
        raise ConfigError(f"{setting}: expected a date such as 1995-01-31, found {written!r}") from None


def _int64(numbers: pa.Array) -> pa.Array:
    """Whole numbers as int64, null where they are larger."""
    if numbers.type == pa.uint64():
        numbers = pc.if_else(pc.less_equal(numbers, pa.scalar((1 << 63) - 1, pa.uint64())), numbers, None)
    return pc.cast(numbers, pa.int64())


def _without_plus(words: pa.Array) -> pa.Array:
    return pc.utf8_ltrim(words, characters="+")


def _whole_units(numbers: pa.Array, unit: str) -> pa.Array:
    if unit == "ns":
        return pc.divide(numbers, 1000)
    factor = int(MICROSECONDS[unit])
    limit = (1 << 62) // factor
    sane = pc.and_(pc.less_equal(numbers, limit), pc.greater_equal(numbers, -limit))
    return pc.multiply(pc.if_else(sane, numbers, None), factor)


def _rounded(numbers: pa.Array, *, must_be_whole: bool) -> pa.Array:
    values = pc.cast(numbers, pa.float64())
    sane = pc.less(pc.abs(values), 2.0**62)  # False for NaN
    if must_be_whole:
        sane = pc.and_(sane, pc.equal(values, pc.floor(values)))
    return pc.cast(pc.round(pc.if_else(sane, values, None)), pa.int64())


def _in_utc(local: pa.Array, zone: str) -> pa.Array:
    """Microseconds since 1970 by a zone's clock, as those of UTC."""
    if zone == "UTC":
        return local
    clock = pc.fill_null(local, 0).to_numpy(zero_copy_only=False)
    quarters, where = np.unique(clock // _QUARTER, return_inverse=True)
    known, offsets = ZoneInfo(zone), []
    for quarter in quarters.tolist():
        try:
            moment = dt.datetime(1970, 1, 1, tzinfo=known) + dt.timedelta(microseconds=quarter * _QUARTER)
            offsets.append((moment.utcoffset() or dt.timedelta()) // dt.timedelta(microseconds=1))
        except OverflowError:  # years that no calendar has: rejected for that
            offsets.append(0)
    moved = pa.array(clock - np.array(offsets, np.int64)[where])
    return pc.if_else(pc.is_valid(local), moved, None)


def _formatted(words: pa.Array, form: str, zone: str) -> pa.Array:
    """Arrow's strptime where it is exact (the text comes back), Python's for every other distinct text."""
    if "%f" in form or "%z" in form or "%Z" in form:
        return _each(words, lambda word: dt.datetime.strptime(word, form), zone)
    quick = pc.strptime(words, format=form, unit="us", error_is_null=True)
    same = pc.fill_null(pc.equal(pc.strftime(pc.cast(quick, pa.timestamp("s"), safe=False), format=form), words), False)
    exact = _in_utc(pc.cast(pc.if_else(same, quick, None), pa.int64()), zone)
    odd = pc.and_(pc.invert(same), pc.is_valid(words))
    if not pc.any(odd).as_py():
        return exact
    return pc.coalesce(exact, _each(pc.if_else(odd, words, None), lambda word: dt.datetime.strptime(word, form), zone))


def _iso(words: pa.Array, zone: str) -> pa.Array:
    try:
        return _in_utc(pc.cast(pc.cast(words, pa.timestamp("us")), pa.int64()), zone)
    except pa.ArrowInvalid:
        return _each(words, dt.datetime.fromisoformat, zone)


def _each(words: pa.Array, parse: "object", zone: str) -> pa.Array:
    """One call of `parse` for each distinct text; `zone` is that of times without one."""
    clock = dt.UTC if zone == "UTC" else ZoneInfo(zone)
    encoded = pc.dictionary_encode(words)
    parsed: list[int | None] = []
    for word in encoded.dictionary.to_pylist():
        try:
            parsed.append(_microseconds(parse(word), clock))  # type: ignore[operator]
        except (ValueError, OverflowError):
            parsed.append(None)
    return pc.take(pa.array(parsed, pa.int64()), encoded.indices)


def _microseconds(moment: dt.datetime, clock: dt.tzinfo) -> int:
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=clock)
    return (moment - _EPOCH) // dt.timedelta(microseconds=1)


def listed(cells: pa.Array, separator: str) -> pa.Array:
    """list<string>: the non-empty parts of each cell, trimmed, also of lists in lists; empty where there is nothing."""
    lists = cells if _is_list(cells.type) else pc.split_pattern(pc.fill_null(text(cells), ""), separator)
    owner, flat = pc.list_parent_indices(lists), pc.list_flatten(lists)
    while _is_list(flat.type):
        owner, flat = owner.take(pc.list_parent_indices(flat)), pc.list_flatten(flat)
    parts = text(flat)
    kept = pc.is_valid(parts)
    counts = np.bincount(pc.filter(owner, kept).to_numpy(), minlength=len(lists))
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pc.filter(parts, kept))


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))
