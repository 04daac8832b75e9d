"""The guessed configuration as YAML with comments."""

import json
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from etl.guess.beside import sections
from etl.guess.lines import Line, file_lines, printable, seen, settings_of, shown, yaml_text
from etl.guess.rehearsal import Rehearsal, kept_by_core, rehearse
from etl.guess.roles import Roles, holds_lists, is_numeric, list_separator, null_markers, parts
from etl.guess.sample import Column, Sample
from etl.guess.survey import FileSet, Survey

_DEFAULT_NULLS = ["", "\\N", "NULL", "NA", "NaN", "None"]
_DOMAINS = 6  # categories, in a comment
ROLES = ("user", "item", "time", "event_type", "value", "basket")


def configuration(found: Survey, folder: str) -> str:
    """YAML that `python -m etl all --config FILE` runs; lines of doubt begin with `# ?`."""
    events = _events(found)
    others, used = sections(found)
    source: dict[str, Any] = {"kind": "log", "root": found.root, "events": settings_of(events)}
    source |= {section: settings_of(lines) for section, (lines, _) in others.items()}
    tried = rehearse(source)
    lines: list[Line] = [
        (f"# Guessed by `python -m etl guess {printable(folder)}` from the beginning of each file.", ""),
        ("# Lines with `# ?` are doubts: look at them. etl/README.md says what each setting means.", ""),
        ("lake: lake", ""),
        ("source:", ""),
        ("  kind: log", ""),
        (f"  root: {yaml_text(found.root)}", ""),
        ("  events:", seen(found.log)),
        *_indented(events),
        *_doubts(found.roles.doubts + found.log.sample.doubts + _tried(tried), "    "),
    ]
    for section, (own, about) in others.items():
        lines += [(f"  {section}:", seen(about)), *_indented(own), *_doubts(about.sample.doubts, "    ")]
    if "items" in others and not _all_known(found, others["items"][1], _id_of(others["items"][0])):
        lines.append(("  require_known_items: false", "? some items of the log may not be in the items' file"))
    lines += _core(found, tried)
    lines += _domains(others)
    left = [one.path for one in found.others if one.path not in used] + list(found.unread)
    lines += [(f"# ? not used: {printable(one)}{_why(found, one)}", "") for one in left[:12]]
    return "".join(f"{text}   # {comment}\n" if comment else f"{text}\n" for text, comment in lines)


# --- the log ----------------------------------------------------------------------------------------------------------


def _events(found: Survey) -> list[Line]:
    """The settings of `events`."""
    sample, roles = found.log.sample, found.roles
    lines = file_lines(found.log)
    lines.append(("columns:", ""))
    for role in ROLES:
        if role in roles.columns:
            column = roles.columns[role]
            text = roles.times.seen if role == "time" and roles.times else shown(sample.columns[column])
            lines.append((f"  {role}: {yaml_text(column)}", text))
    if sample.shape == "matrix":
        place = 1 + list(sample.columns).index(roles.columns["user"])
        lines.append((f"matrix_from: {place}", "each column from here on is an item"))
        if marker := _no_rating(sample):
            lines.append(_nulls([marker], f"{marker} is taken for no rating"))
    if roles.lists:
        lines += _explode(sample, roles)
    if roles.times is not None:
        lines += [(f"{name}: {yaml_text(value)}", "") for name, value in roles.times.settings.items()]
        lines += [(f"# ? {doubt}", "") for doubt in roles.times.doubts]
    elif "time" not in {*roles.columns, *roles.lists}:
        lines.append(("# ? no column of times was found: the order of lines is taken for theirs", ""))
    if sample.shape != "matrix" and (markers := null_markers(sample)):
        lines.append(_nulls(markers, f"{', '.join(markers)} are taken for nothing"))
    if "event_type" in roles.columns:
        types = Counter(map(str, filter(None, sample.columns[roles.columns["event_type"]])))
        most = [name for name, _ in types.most_common(8)]
        lines.append((f"# keep: {json.dumps(most, ensure_ascii=False)}", "? all types count, unless named"))
    return lines


def _nulls(markers: Sequence[str], doubt: str) -> Line:
    return f"null_values: {json.dumps([*_DEFAULT_NULLS, *markers])}", f"? {doubt}"


def _explode(sample: Sample, roles: Roles) -> list[Line]:
    """Lists of items, and what goes side by side with them."""
    columns = roles.lists
    if "time" not in columns and len(columns) == 1 and "item" in columns:
        return _item_lists(sample, roles)
    inner = ", ".join(f"{role}: {yaml_text(column)}" for role, column in columns.items())
    return [("explode:", "each value of these cells is a row"), (f"  - columns: {{{inner}}}", "")]


def _item_lists(sample: Sample, roles: Roles) -> list[Line]:
    """A list of items; of two columns of lists without names, which stand for histories and impressions, both."""
    column = roles.lists["item"]
    several = [one for one, cells in sample.columns.items() if holds_lists(cells)] if isinstance(column, int) else []
    lines: list[Line] = [("explode:", "each value of these cells is a row")]
    suffixed = {one: found for one in several or [column] if (found := _suffixes(sample, one))}
    for one in several if suffixed else [column]:
        separator = sample.settings.get("separator", " ") if sample.shape == "a user a line" else None
        separator = separator or list_separator(sample.columns[one])
        between = f", separator: {yaml_text(separator)}" if separator and separator != "," else ""
        types = ""
        if one in suffixed:
            types = f", suffixes: {{{', '.join(f'{json.dumps(end)}: {name}' for end, name in suffixed[one].items())}}}"
        elif suffixed:
            types = ", event_type: history"
        lines.append((f"  - {{columns: {{item: {yaml_text(one)}}}{between}{types}}}", shown(sample.columns[one])))
    if suffixed:
        lines.append(("# ? items end with -0 and -1, which are taken for shown and clicked", ""))
    if len(several) > len(suffixed) > 0:
        lines.append(("# ? items without such ends are a history with their line's time, unless `time` is set", ""))
    return lines


def _suffixes(sample: Sample, column: Column) -> dict[str, str]:
    separator = list_separator(sample.columns[column])
    words = [str(part) for cell in sample.columns[column] for part in parts(cell, separator)]
    is_suffixed = bool(words) and all(re.search(r"-[01]$", word) for word in words)
    return {"-0": "shown", "-1": "clicked"} if is_suffixed else {}


def _no_rating(sample: Sample) -> str | None:
    """A number of a matrix that lies apart from all others, and is frequent."""
    cells = Counter(cell for column in list(sample.columns)[1:] for cell in sample.columns[column] if cell)
    numbers = sorted({float(cell.replace(",", ".")) for cell in cells if is_numeric([cell])})
    if len(numbers) < 3 or numbers[-1] < 90 or numbers[-1] < 4 * abs(numbers[-2]):
        return None
    found: str = next(cell for cell in cells if is_numeric([cell]) and float(cell.replace(",", ".")) == numbers[-1])
    return found


def _id_of(lines: list[Line]) -> Column:
    found: Column = settings_of(lines)["id"]
    return found


def _all_known(found: Survey, items: FileSet, column: Column) -> bool:
    if not (items.sample.is_whole and "item" in found.roles.columns):
        return False
    known = {str(cell) for cell in items.sample.columns[column]}
    cells = found.log.sample.columns[found.roles.columns["item"]]
    return {str(cell) for cell in cells if cell is not None} <= known


def _core(found: Survey, tried: Rehearsal) -> list[Line]:
    """k-core of a log that is too small for the default, which would leave nothing."""
    if not found.log.sample.is_whole or not tried.pairs or kept_by_core(tried.pairs, 5):
        return []
    return [("kcore: {min_user: 1, min_item: 1}", "? so few events that the default of 5 and 5 would leave none")]


def _domains(others: dict[str, tuple[list[Line], FileSet]]) -> list[Line]:
    if "items" not in others:
        return []
    lines, one = others["items"]
    settings = settings_of(lines)
    if "categories" not in settings:
        return []
    separator = settings.get("categories_separator", "|")
    cells = one.sample.columns[settings["categories"]]
    found = Counter(str(part).strip() for cell in cells for part in parts(cell, separator))
    head: list[Line] = [("# domains:   # ? by categories, of which these are the most frequent:", "")]
    return head + [
        (f"#   - {{name: {_domain_name(name)}, any_of: [{yaml_text(name)}]}}", f"{count:,} items")
        for name, count in found.most_common(_DOMAINS)
        if name
    ]


def _domain_name(category: str) -> str:
    return re.sub(r"\W+", "-", category.lower()).strip("-") or "domain"


# --- lines ------------------------------------------------------------------------------------------------------------


def _indented(lines: Sequence[Line]) -> list[Line]:
    return [(f"    {text}", comment) for text, comment in lines]


def _doubts(doubts: Sequence[str], indent: str) -> list[Line]:
    return [(f"{indent}# ? {printable(doubt)}", "") for doubt in doubts]


def _tried(tried: Rehearsal) -> list[str]:
    if tried.refused is not None:
        return [tried.refused]
    of = f"of the first {tried.rows:,} rows are rejected"
    return [f"{count:,} {of}: {why}" for why, count in tried.reasons.most_common(4)]


def _why(found: Survey, path: str) -> str:
    return f" ({printable(found.unread[path])[:160]})" if path in found.unread else ""
