"""Columns of the tables `items`, `users` and `entities` that settings may name; `attributes.<name>` is an attribute."""

import re
from collections.abc import Sequence

COLUMNS = {"item": ("title", "year", "categories"), "user": (), "entity": ("name", "kind")}
_ATTRIBUTE = re.compile(r"attributes\.(.+)")


def attribute_of(column: str) -> str | None:
    """The attribute that a column names, None where it names none."""
    found = _ATTRIBUTE.fullmatch(column)
    return found[1] if found else None


def known_columns(kind: str) -> str:
    """For messages: the columns of items, users or entities."""
    return ", ".join([*COLUMNS[kind], *([] if kind == "entity" else ["attributes.<name>"])])


def unknown_columns(kind: str, columns: Sequence[str]) -> list[str]:
    """Columns that the table of these things hasn't."""
    return [name for name in columns if name not in COLUMNS[kind] and (kind == "entity" or not attribute_of(name))]


def columns_read(columns: Sequence[str]) -> list[str]:
    """Columns of the table that hold these, each once."""
    return list(dict.fromkeys("attributes" if attribute_of(name) is not None else name for name in columns))
