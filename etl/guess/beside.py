"""Settings of the files beside the log: items, users and edges."""

import re
from collections.abc import Sequence
from typing import Any

from etl.guess import names
from etl.guess.lines import Line, file_lines, shown, yaml_text
from etl.guess.roles import holds_lists, is_numeric, list_separator
from etl.guess.sample import Column
from etl.guess.survey import FileSet, Survey, edges_of, items_of, users_of

_FEW = 100  # different values of an attribute


def sections(found: Survey) -> tuple[dict[str, tuple[list[Line], FileSet]], set[str]]:
    """Section -> its settings and its files; and the paths that are used."""
    found_sections: dict[str, tuple[list[Line], FileSet]] = {}
    if edges := edges_of(found):
        one, user, friend = edges
        if holds_lists(one.sample.columns[friend]):
            separator = list_separator(one.sample.columns[friend]) or ","
            explode = f"  - {{columns: {{friend: {yaml_text(friend)}}}, separator: {yaml_text(separator)}}}"
            own: list[Line] = [(f"user: {yaml_text(user)}", ""), ("explode:", ""), (explode, "")]
        else:
            own = [(f"user: {yaml_text(user)}", ""), (f"friend: {yaml_text(friend)}", "")]
        found_sections["edges"] = file_lines(one) + own, one
    if items := items_of(found):
        found_sections["items"] = _items(*items), items[0]
    if (users := users_of(found)) and users[0].path not in {one.path for _, one in found_sections.values()}:
        found_sections["users"] = _users(*users), users[0]
    return found_sections, {one.path for _, one in found_sections.values()}


def _items(one: FileSet, column: Column) -> list[Line]:
    cells = {name: given for name, given in one.sample.columns.items() if name != column}
    lines = [*file_lines(one), (f"id: {yaml_text(column)}", shown(one.sample.columns[column]))]
    title = _by_name(cells, "title") if isinstance(column, str) else _title(cells)
    if title is not None:
        lines.append((f"title: {yaml_text(title)}", shown(cells[title])))
        dated = [re.search(r"\(\d{4}\)\s*$", str(cell)) is not None for cell in cells[title] if cell is not None]
        year = "title" if 2 * sum(dated) > len(dated) else _by_name(cells, "year")
        lines += [(f"year: {yaml_text(year)}", "")] if year is not None else []
    category = _by_name(cells, "categories")
    if category is None and not isinstance(column, str):
        category = next((name for name, given in cells.items() if name != title and _bars(given)), None)
    if category is not None:
        lines.append((f"categories: {yaml_text(category)}", shown(cells[category])))
        if (separator := _category_separator(cells[category])) not in (None, "|"):
            lines.append((f"categories_separator: {yaml_text(separator)}", ""))
    return lines


def _users(one: FileSet, column: Column) -> list[Line]:
    lines = [*file_lines(one), (f"id: {yaml_text(column)}", shown(one.sample.columns[column]))]
    few = [
        name
        for name, cells in one.sample.columns.items()
        if name != column and not holds_lists(cells) and 1 < len(set(map(str, cells))) <= min(_FEW, len(cells) / 2)
    ]
    named = {(name if isinstance(name, str) else f"column{name}"): name for name in few}
    inner = ", ".join(f"{yaml_text(name)}: {yaml_text(place)}" for name, place in named.items())
    return lines + ([(f"attributes: {{{inner}}}", "")] if few else [])


def _by_name(cells: dict[Column, list[Any]], role: str) -> Column | None:
    ranked = [(rank, str(name), name) for name in cells if (rank := names.rank(name, role)) is not None]
    return min(ranked)[2] if ranked else None


def _title(cells: dict[Column, list[Any]]) -> Column | None:
    """Of columns by position, the first of texts that are nearly all different."""
    for name, given in cells.items():
        words = [cell for cell in given if isinstance(cell, str)]
        if words and not is_numeric(words) and len(set(words)) > 0.9 * len(words) and not words[0].startswith("http"):
            return name
    return None


def _bars(cells: Sequence[Any]) -> bool:
    return any("|" in cell for cell in cells if isinstance(cell, str))


def _category_separator(cells: Sequence[Any]) -> str | None:
    words = [cell for cell in cells if isinstance(cell, str)]
    if not words:
        return None
    counts = {one: sum(one in word for word in words) for one in ("|", ", ", ",", ";", " ")}
    found = max(counts, key=lambda one: counts[one])
    return (found.strip() or " ") if counts[found] else None
