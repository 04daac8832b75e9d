"""Separator, quoting, header and shape of delimited text, guessed from its first lines."""

import csv
import io
import re
import statistics
from collections.abc import Sequence
from typing import Any

from etl.file_config import FileConfig
from etl.guess.names import is_known, is_typed
from etl.sources.delimited import parse_line

SEPARATORS = ("::", "\t", ";", ",", "|", " ")
_LINES = 4_000
_NUMBER = re.compile(r"[+-]?\d+([.,]\d*)?([eE][+-]?\d+)?")
_DIGIT = re.compile(r"\d")
_TABLE = 0.9  # of the lines that have as many fields, where a separator is one
_MATRIX_COLUMNS = 10
Rows = list[list[str]]
Description = tuple[dict[str, Any], list[str | int], Rows, list[str], str]


def describe(text: str) -> Description:
    """Settings that read the text, its columns' names or positions, rows, doubts, and shape ("rows", "a user a line",
    "matrix")."""
    lines = [line.rstrip("\r") for line in text.split("\n")[:_LINES]]
    lines = [line for line in lines if line]
    quoting = _quoting(lines)
    records = {} if "quote" in quoting else {one: _records(text, one, quoting) for one in SEPARATORS}
    separator = max(records, key=lambda one: len(records[one]), default="")
    if records.get(separator):
        rows, more = records[separator], {"multiline": True}
    else:
        shares = {one: _share(_parsed(lines[:300], one, quoting)) for one in SEPARATORS}
        separator = max(SEPARATORS, key=lambda one: (shares[one] >= _TABLE, shares[one] * (shares[one] < _TABLE)))
        if shares[separator] < _TABLE and (found := _lines_of_users(lines)):
            return found
        if quoting.get("quote", '"') and _share(_parsed(lines, separator, {"quote": None})) > shares[separator]:
            quoting = {"quote": None}
        rows, more = _parsed(lines, separator, quoting), {}
    settings: dict[str, Any] = ({} if separator == "," else {"separator": separator}) | quoting | more
    if separator not in (",", ";") and not any('"' in line for line in lines):
        settings["quote"] = None
    width = statistics.mode(len(row) for row in rows) if rows else 0
    skipped = next((place for place, row in enumerate(rows[:10]) if len(row) == width), 0)
    doubts = []
    if skipped:
        settings["skip_rows"] = skipped
        doubts.append(f"{skipped} lines above the rows are skipped")
    whole = [row for row in rows[skipped:] if len(row) == width]
    if (odd := len(rows) - skipped - len(whole)) > 0:
        doubts.append(f"{odd:,} of {len(rows):,} lines have not {width} fields: they are rejected")
    if width < 2:
        return settings, [], [], doubts, "rows"
    whole = [[cell.strip() for cell in row] for row in whole]
    has_header = _has_header(whole)
    names: list[str | int] = list(whole[0]) if has_header else list(range(width))
    body = whole[1:] if has_header else whole
    if not has_header:
        settings["header"] = False
        if separator in " \t" and _is_a_user_a_line(body) and (found := _lines_of_users(lines)):
            found[3].append("lines of equal length may be something else than a user's items")
            return found
    if any(body[0][place] for place in range(width)) if body else False:
        decimal = [row for row in body if any(re.fullmatch(r"-?\d+,\d+", cell) for cell in row)]
        if separator != "," and 2 * len(decimal) > len(body):
            settings["decimal"] = ","
    return settings, names, body, doubts, "matrix" if _is_matrix(names, body) else "rows"


def _quoting(lines: Sequence[str]) -> dict[str, Any]:
    """The settings of quotes."""
    quoted = [line for line in lines if '"' in line]
    begins = [line for line in quoted if re.search(r'(^|[\t;,| :])"', line)]
    if not quoted:
        return {}
    if 2 * len(begins) < len(quoted):
        return {"quote": None}
    return {"escape": "\\"} if any('\\"' in line for line in begins) else {}


def _config(separator: str, quoting: dict[str, Any]) -> FileConfig:
    return FileConfig(path="-", separator=separator, **quoting)


def _parsed(lines: Sequence[str], separator: str, quoting: dict[str, Any]) -> Rows:
    """Fields of each line; none of a malformed one."""
    config, rows = _config(separator, quoting), []
    for line in lines:
        try:
            rows.append(parse_line(line, config))
        except ValueError:
            rows.append([])
    return rows


def _share(rows: Rows) -> float:
    """Of the rows that have as many fields as most, which are at least two."""
    widths = [len(row) for row in rows if row]
    width = statistics.mode(widths) if widths else 0
    return widths.count(width) / len(rows) if width > 1 else 0.0


def _records(text: str, separator: str, quoting: dict[str, Any]) -> Rows:
    """Records whose quoted cells hold line ends; none where lines explain the text as well."""
    if len(separator) > 1 or '"' not in text:
        return []
    reader = csv.reader(io.StringIO(text), delimiter=separator, escapechar=quoting.get("escape"))
    try:
        found = [row for row in reader if row]
    except csv.Error:
        return []
    has_ends = [any("\n" in cell for cell in record) for record in found]
    return found[:_LINES] if 50 * sum(has_ends) > len(found) and _share(found) > _TABLE else []


def _has_header(rows: Rows) -> bool:
    first, rest = rows[0], rows[1:]
    if is_typed(first):
        return True
    if len(set(first)) < len(first) or not all(first[1:]) or any(_NUMBER.fullmatch(cell) for cell in first):
        return False
    for place, cell in enumerate(first):
        below = [row[place] for row in rest if row[place]]
        numbers = sum(_NUMBER.fullmatch(one) is not None or bool(re.match(r"\d{2,4}[-/.]", one)) for one in below)
        if below and numbers >= _TABLE * len(below) and not _DIGIT.match(cell):
            return True
    known = sum(map(is_known, first))
    return known >= 2 or (known == 1 and len(first) == 2) or bool(known and not any(map(_DIGIT.search, first)))


def _lines_of_users(lines: Sequence[str]) -> Description | None:
    """A user, and behind it the user's items, a line."""
    for separator in (" ", "\t", ","):
        rows = [line.strip().split(separator) for line in lines]
        cells = [cell for row in rows for cell in row]
        if (
            min(map(len, rows), default=0) < 2
            or not all(cells)
            or not all(re.fullmatch(r"[\w-]+", one) for one in cells)
        ):
            continue
        if len({row[0] for row in rows}) < len(rows) or any(not _DIGIT.search(row[-1]) for row in rows):
            continue
        settings = {"separator": separator, "header": False, "quote": None, "fields": 2}
        joined = [[row[0], separator.join(row[1:])] for row in rows]
        return settings, [0, 1], joined, ["a line is taken for a user and the user's items in order"], "a user a line"
    return None


def _is_a_user_a_line(rows: Rows) -> bool:
    """Whether rows of equal length are users with their items: the first cell is another in each row, and the same
    whole numbers stand in all other columns."""
    if len(rows) < 2 or len(rows[0]) < 4 or not all(cell.isdigit() for row in rows for cell in row):
        return False
    if len({row[0] for row in rows}) < len(rows):
        return False
    columns = [[int(row[place]) for row in rows] for place in range(1, len(rows[0]))]
    highest = [max(column) for column in columns]
    return max(highest) < 4 * min(highest) + 4 and max(highest) > 20


def _is_matrix(names: Sequence[str | int], rows: Rows) -> bool:
    """Whether the columns behind the first are items: many, of few different numbers, and not named as roles are."""
    if len(names) <= _MATRIX_COLUMNS or len(rows) < 2 or any(is_known(str(name)) for name in names[1:]):
        return False
    if len({row[0] for row in rows}) < len(rows):
        return False
    cells = [cell for row in rows for cell in row[1:] if cell]
    numbers = [cell for cell in cells if _NUMBER.fullmatch(cell)]
    return len(numbers) >= _TABLE * len(cells) > 0 and len(set(numbers)) < max(len(cells) / 2, 30)
