"""What a column's times are: a unit, ISO 8601, or a strptime pattern."""

import datetime as dt
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from etl.sources.values import MICROSECONDS

_DAYS = ["%Y-%m-%d", "%d-%m-%Y", "%m-%d-%Y", "%Y/%m/%d", "%d/%m/%Y", "%m/%d/%Y", "%d.%m.%Y", "%Y.%m.%d", "%Y%m%d"]
_DAYS += ["%d %b %Y", "%d-%b-%Y", "%d/%b/%Y", "%b %d, %Y", "%d %B %Y", "%B %d, %Y", "%m %d, %Y"]
_DAYS += ["%m/%d/%y", "%d/%m/%y", "%d.%m.%y", "%y%m%d"]
_CLOCKS = ["", " %H:%M", " %H:%M:%S", " %H:%M:%S.%f", " %I:%M %p", " %I:%M:%S %p", ":%H:%M:%S", "T%H:%M:%S", "%H%M%S"]
_ZONES = ["", " %z", "%z"]
_WHOLE = ["%a %b %d %H:%M:%S %Y", "%a %b %d %H:%M:%S %z %Y", "%a, %d %b %Y %H:%M:%S %z"]
PATTERNS = [*_WHOLE, *map("".join, itertools.product(_DAYS, _CLOCKS, _ZONES))]
_OFFSET = re.compile(r"[+-]\d\d:?\d\d(?= |$)|Z$")
_NUMBER = re.compile(r"[+-]?\d+(\.\d*)?([eE][+-]?\d{1,2})?")
_BEGAN = dt.datetime(1990, 1, 1, tzinfo=dt.UTC).timestamp()
_MOST = 0.9  # of the cells that a pattern must read


def _marks(text: str) -> str:
    """What stands between words and numbers: `x-x-x x:x`."""
    return re.sub(r"[A-Za-z0-9]+", "x", text)


_BY_MARKS: dict[str, list[str]] = {}  # compiling a pattern is dear, so only those that may fit are tried
for _form in PATTERNS:
    _BY_MARKS.setdefault(_marks(re.sub("%[A-Za-z]", "x", _form.replace("%z", "§"))), []).append(_form)


@dataclass(frozen=True)
class Times:
    """`settings` of the events file, `seen` in words, and doubts."""

    settings: dict[str, Any]
    seen: str
    doubts: list[str] = field(default_factory=list)


def guess_times(cells: Sequence[Any]) -> Times | None:
    """What the times of a column are; None where its cells, None aside, are none."""
    given = [cell for cell in cells if cell is not None][:1_000]
    if not given:
        return None
    if all(isinstance(cell, dt.date) for cell in given):
        aware = all(isinstance(cell, dt.datetime) and cell.tzinfo for cell in given)
        return Times({}, _span(list(map(str, given))), [] if aware else [_NO_ZONE])
    if not all(isinstance(cell, str | int | float) and not isinstance(cell, bool) for cell in given):
        return None
    words = [str(cell).strip() for cell in given]
    if sum(_NUMBER.fullmatch(word) is not None for word in words) >= _MOST * len(words):
        return _units(words) or _patterns(words)
    return _iso(words) or _patterns(words)


_NO_ZONE = "times state no zone: UTC is taken; if they are local ones set timezone, e.g. Europe/Rome"


def _units(words: list[str]) -> Times | None:
    numbers = [float(word) for word in words if _NUMBER.fullmatch(word)]
    now = dt.datetime.now(dt.UTC).timestamp() + 86_400
    inside = {
        unit: [moment for number in numbers if _BEGAN <= (moment := number * factor / 1e6) <= now]
        for unit, factor in MICROSECONDS.items()
    }
    unit = max(inside, key=lambda one: len(inside[one]))
    found = inside[unit]
    if 2 * len(found) < len(numbers):
        return None
    others = [f"{len(there):,} as {one}" for one, there in inside.items() if there and one != unit]
    more = f" ({', '.join(others)})" if others else ""
    odd = len(words) - len(found)
    said = f"{odd:,} of {len(words):,} times are none since 1990 as {unit}{more}: such rows are rejected"
    doubts = [said] * (odd > 0)
    days = [dt.datetime.fromtimestamp(moment, dt.UTC).date().isoformat() for moment in found]
    return Times({"time_unit": unit}, _span(days), doubts)


def _iso(words: list[str]) -> Times | None:
    found = [moment for word in words if (moment := _moment(word, None))]
    if len(found) < _MOST * len(words):
        return None
    return Times({"time_unit": None}, _span([str(one.date()) for one in found]), _doubts(words, found))


def _patterns(words: list[str]) -> Times | None:
    fitting = {}
    first = words[0]
    spelled = [first, *(f"{first[: one.start()]}§{first[one.end() :]}" for one in _OFFSET.finditer(first))]
    for form in [form for marks in dict.fromkeys(map(_marks, spelled)) for form in _BY_MARKS.get(marks, [])]:
        if not any(_moment(word, form) for word in words[:3]):
            continue
        found = [moment for word in words if (moment := _moment(word, form))]
        if len(found) >= _MOST * len(words) and _plausible(found):
            fitting[form] = found
    if not fitting:
        named = [bare for word in words if (bare := re.sub(r" [A-Z]{2,5}$", "", word)) != word]
        times = guess_times(named) if 2 * len(named) > len(words) else None
        doubt = f"times name zones ({words[0]!r}), which can't be read: write offsets (%z) or one zone's times"
        return None if times is None else Times(times.settings, times.seen, [doubt])
    form, found = max(fitting.items(), key=lambda one: len(one[1]))
    doubts = _doubts(words, found)
    other = next((one for one in fitting if one != form and len(fitting[one]) == len(found)), None)
    if other is not None:
        doubts.append(f"{other!r} fits as well")
    return Times({"time_format": form}, _span([str(one.date()) for one in found]), doubts)


def _doubts(words: list[str], found: list[dt.datetime]) -> list[str]:
    odd = len(words) - len(found)
    doubts = [f"{odd:,} of {len(words):,} times can't be read so: such rows are rejected"] * (odd > 0)
    return doubts + [_NO_ZONE] * (any(one.tzinfo is None for one in found))


def _moment(word: str, form: str | None) -> dt.datetime | None:
    try:
        return dt.datetime.fromisoformat(word) if form is None else dt.datetime.strptime(word, form)
    except (ValueError, OverflowError):
        return None


def _plausible(found: list[dt.datetime]) -> bool:
    return sum(1990 <= one.year <= dt.date.today().year + 1 for one in found) >= _MOST * len(found)


def _span(days: list[str]) -> str:
    return f"{min(days)[:10]} to {max(days)[:10]}"
