"""Which columns hold users, items, times, values…, by their names, else by what is in them."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from etl.guess import names
from etl.guess.sample import Column, Sample
from etl.guess.times import Times, guess_times

_NUMBER = re.compile(r"[+-]?(\d+([.,]\d*)?|[.,]\d+)([eE][+-]?\d+)?")
_ONE_ID = re.compile(r"[A-Za-z]{0,4}[-_]?\d+(-\d)?")
_FEW = 50  # different values of event types
ORDER_NAMES = ("position", "rank", "order", "index", "seq")
NULLS = ("null", "nan", "none", "N/A", "n/a", "NaT", "<NA>", "-", "?", "nil", "undefined")


@dataclass
class Roles:
    """Column of each role, the settings of its times, and what is in doubt."""

    columns: dict[str, Column]
    lists: dict[str, Column]  # whose cells hold several values
    times: Times | None
    doubts: list[str] = field(default_factory=list)

    @property
    def is_log(self) -> bool:
        return {"user", "item"} <= {*self.columns, *self.lists}

    @property
    def is_named(self) -> bool:
        """Whether users and items were known by their columns' names."""
        return not self.doubts


def roles_of(sample: Sample) -> Roles:
    """Of an interaction log."""
    if sample.shape == "a user a line":
        return Roles({"user": 0}, {"item": 1}, None)
    if sample.shape == "matrix":
        return Roles({"user": next(iter(sample.columns))}, {}, None)
    lists = {column: cells for column, cells in sample.columns.items() if holds_lists(cells)}
    single = {column: cells for column, cells in sample.columns.items() if column not in lists and _given(cells)}
    taken = _Taken(single)
    taken.by_name("user")
    item_lists = {column: cells for column, cells in lists.items() if names.rank(column, "item") is not None}
    if not item_lists:
        taken.by_name("item")
    times = _take_time(taken)
    taken.by_name("event_type", lambda cells: len(set(cells)) <= _FEW)
    taken.by_name("value", is_numeric)
    taken.by_name("basket")
    return _with_others(taken, lists, item_lists, times, sample)


class _Taken:
    """Columns of single values, and those that have a role."""

    def __init__(self, columns: dict[Column, list[Any]]) -> None:
        self.columns, self.found = columns, dict[str, Column]()

    @property
    def free(self) -> dict[Column, list[Any]]:
        return {column: cells for column, cells in self.columns.items() if column not in self.found.values()}

    def by_name(self, role: str, fits: Callable[[list[Any]], bool] = lambda cells: True) -> None:
        ranked = [(rank, column) for column in self.free if (rank := names.rank(column, role)) is not None]
        good = [column for _, column in sorted(ranked, key=lambda one: one[0]) if fits(_given(self.columns[column]))]
        if good:
            self.found[role] = good[0]


def _take_time(taken: _Taken) -> Times | None:
    ranked = {column: names.rank(column, "time") for column in taken.free}
    named = sorted((rank, str(column), column) for column, rank in ranked.items() if rank is not None)
    for _, _, column in named:
        cells = taken.columns[column]
        if times := guess_times(cells):
            taken.found["time"] = column
            return times
        if names.plain(column) in ORDER_NAMES and is_numeric(_given(cells)):
            taken.found["time"] = column
            return Times({"time_unit": "ordinal"}, "an order", ["it is taken for mere order"])
    for column, cells in taken.free.items():
        numbers = is_numeric(_given(cells))
        if (not numbers or len(str(_given(cells)[0]).split(".")[0]) >= 8) and (times := guess_times(cells)):
            taken.found["time"] = column
            return times
    for _, _, column in named:
        if is_numeric(_given(taken.columns[column])):
            taken.found["time"] = column
            doubt = "numbers that are no times since 1990: they are taken for mere order"
            return Times({"time_unit": "ordinal"}, "an order", [doubt])
    return None


def _with_others(
    taken: _Taken,
    lists: dict[Column, list[Any]],
    item_lists: dict[Column, list[Any]],
    times: Times | None,
    sample: Sample,
) -> Roles:
    """Users and items that no name shows, by what their columns hold; then lists."""
    doubts, by_position = [], all(isinstance(column, int) for column in sample.columns)
    ids = [column for column, cells in taken.free.items() if _is_id(_given(cells))]
    if "user" not in taken.found and ids:
        again = [column for column in ids if len(set(cells := _given(taken.columns[column]))) < len(cells)]
        taken.found["user"] = (again or ids)[0]
        ids.remove(taken.found["user"])
        doubts.append(f"no name shows the users: column {taken.found['user']!r} is taken")
    found_lists: dict[str, Column] = {}
    if "item" not in taken.found and (item_lists or (lists and not _best_item(ids, taken))):
        found_lists["item"] = next(iter(item_lists or lists))
        if not item_lists:
            doubts.append(f"no name shows the items: the lists in column {found_lists['item']!r} are taken")
    elif "item" not in taken.found and ids:
        taken.found["item"] = _best_item(ids, taken) or ids[0]
        doubts.append(f"no name shows the items: column {taken.found['item']!r} is taken")
    if by_position and "value" not in taken.found and len(sample.columns) <= 8:
        for column, cells in taken.free.items():
            if "event_type" not in taken.found and _are_types(_given(cells)):
                taken.found["event_type"] = column
        numbers = {column: given for column, cells in taken.free.items() if is_numeric(given := _given(cells))}
        few = [column for column, given in numbers.items() if 1 < len(set(given)) <= 30]
        last = [column for column, given in numbers.items() if column == len(sample.columns) - 1]
        if found := few or last:
            taken.found["value"] = found[0]
            doubts.append(f"no name shows the values: column {found[0]} is taken")
    if "item" in found_lists:
        outer = str(found_lists["item"]).rpartition(".")[0]
        for column in lists:
            for role in ("time", "event_type", "value"):
                beside = str(column).rpartition(".")[0] == outer
                if beside and names.rank(column, role) is not None and role not in {*found_lists, *taken.found}:
                    found_lists[role] = column
        if "time" in found_lists:
            flat = [one for cell in lists[found_lists["time"]] for one in parts(cell)]
            times = guess_times(flat) or Times({"time_unit": "ordinal"}, "an order", ["it is taken for mere order"])
    return Roles(taken.found, found_lists, times, doubts)


def _are_types(cells: Sequence[Any]) -> bool:
    """Whether cells are few different words."""
    words = {str(cell) for cell in cells}
    return 1 < len(words) <= min(20, len(cells) / 10) and all(re.fullmatch(r"[A-Za-z_ -]+", word) for word in words)


def _best_item(ids: Sequence[Column], taken: _Taken) -> Column | None:
    """The first column of ids that are not all the same."""
    varied = [column for column in ids if len(set(_given(taken.columns[column]))) > 1]
    return next(iter(varied), None)


def _given(cells: Sequence[Any]) -> list[Any]:
    return [cell for cell in cells if cell is not None and not isinstance(cell, list)]


def is_numeric(cells: Sequence[Any]) -> bool:
    """Whether most cells are numbers."""
    good = sum(isinstance(cell, int | float) or _NUMBER.fullmatch(str(cell)) is not None for cell in cells)
    return bool(cells) and 10 * good >= 9 * len(cells)


def _is_id(cells: Sequence[Any]) -> bool:
    """Whether cells may be ids: neither numbers with fractions, nor long texts, nor one and the same."""
    words = [str(cell) for cell in cells]
    broken = sum(re.fullmatch(r"-?\d+[.,]\d*[1-9]", word) is not None for word in words)
    return bool(words) and 10 * broken < len(words) and sum(map(len, words)) < 60 * len(words)


def holds_lists(cells: Sequence[Any]) -> bool:
    """Whether cells hold lists, or text of several ids with spaces, commas or bars between them."""
    if any(isinstance(cell, list) for cell in cells):
        return True
    return list_separator(cells) is not None


def list_separator(cells: Sequence[Any]) -> str | None:
    """What stands between ids in most cells; None where cells hold one value each."""
    words = [cell for cell in cells if isinstance(cell, str)]
    if is_numeric(words):  # with a decimal comma
        return None
    for separator in (" ", ", ", ",", "|"):
        several = sum(separator in word for word in words)
        ids = [part for word in words for part in word.split(separator)]
        good = sum(_ONE_ID.fullmatch(part) is not None for part in ids)
        if 5 * several > len(words) and good > 0.95 * len(ids):
            return separator.strip() or " "
    return None


def parts(cell: Any, separator: str | None = None) -> list[Any]:
    """The values of a cell."""
    if isinstance(cell, list):
        return cell
    if cell is None:
        return []
    return [part.strip() for part in str(cell).split(separator or " ") if part.strip()]


def null_markers(sample: Sample) -> list[str]:
    """Spellings of nothing among the cells, that the default doesn't know."""
    found = {cell for cells in sample.columns.values() for cell in cells if isinstance(cell, str) and cell in NULLS}
    return sorted(found)
