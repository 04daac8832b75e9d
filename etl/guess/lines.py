"""Lines of YAML, each with a comment."""

import json
import re
from collections.abc import Sequence
from typing import Any

import yaml

from etl.guess.survey import FileSet
from etl.settings import setting_words

Line = tuple[str, str]  # YAML, comment


def file_lines(one: FileSet) -> list[Line]:
    """Path, member and format of a set of files."""
    settings = {"path": one.path} | ({} if one.member is None else {"member": one.member}) | one.sample.settings
    return [(f"{name}: {yaml_text(value)}", "") for name, value in settings.items()]


def seen(one: FileSet) -> str:
    """How many files a set has, how large they are, and their columns."""
    columns = list(one.sample.columns)
    named = "" if all(isinstance(name, int) for name in columns) else f": {', '.join(map(str, columns[:8]))}"
    more = "…" if named and len(columns) > 8 else ""
    files = "1 file" if len(one.files) == 1 else f"{len(one.files):,} files"
    return printable(f"{files}, {-(-one.size // 1024):,} KiB, {len(columns)} columns{named}{more}")


def shown(cells: Sequence[Any]) -> str:
    """The first different cells of a column, and how many there are."""
    given = [str(cell) for cell in cells if cell is not None]
    first = ", ".join(dict.fromkeys(word[:24] for word in given[:20]))[:60]
    nothing = f"; {len(cells) - len(given):,} of {len(cells):,} empty" if len(given) < len(cells) else ""
    return printable(f"{first}…; {len(set(given)):,} different in {len(cells):,} rows{nothing}")


def printable(text: str) -> str:
    """The text for a comment: on one line, without control characters."""
    return "".join(character if character.isprintable() else "�" for character in text)


def yaml_text(value: Any) -> str:
    """A value as YAML on one line."""
    if not isinstance(value, str):
        return json.dumps(value)
    (_, word) = setting_words("x", value)
    plain = re.fullmatch(r"[\w./-]*\w[\w./-]*", value) is not None and not value.startswith(("-", "?"))
    return word if plain else _quoted(value)


def _quoted(text: str) -> str:
    """Text in double quotes, as YAML reads it back."""
    written = json.dumps(text, ensure_ascii=False)
    return "".join(one if one.isprintable() else f"\\U{ord(one):08x}" for one in written)


def settings_of(lines: Sequence[Line]) -> dict[str, Any]:
    """What the lines say, as YAML is read."""
    loaded: dict[str, Any] = yaml.safe_load("\n".join(text for text, _ in lines))
    return loaded
