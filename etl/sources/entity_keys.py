"""Titles and people's names to keys under which differently spelled files agree. Pure functions.

``title_keys("Matrix, The")`` and ``title_keys("The Matrix\xa0")`` give the same key; so do
``person_key("Andy_García")`` and ``person_key("Andy Garcia")``. A key says nothing about a work's year: callers
compare that too.
"""

import ast
import re
import unicodedata

_ARTICLES_TEXT = "the a an le la les l un une il lo gli i el los las der die das den de het o os as"
_ARTICLES = frozenset(_ARTICLES_TEXT.split())
_TRAILING = re.compile(r",\s*(?P<article>[^\W\d]+'?)\s*$")
_PARENTHESES = re.compile(r"\(([^()]*)\)")
_AKA = re.compile(r"^\s*(?:a\.?k\.?a\.?|aka)\s+", re.IGNORECASE)
_YEAR = re.compile(r"^\s*\d{4}\s*$")
_INITIALS = re.compile(r"(?<=\b\w) (?=\w\b)")
_LETTERS = str.maketrans({"ø": "o", "đ": "d", "ł": "l", "ß": "ss", "æ": "ae", "œ": "oe", "ð": "d", "þ": "th"})


def title_keys(title: str) -> list[str]:
    """Keys of a title and of its alternatives in parentheses, its own first; none where it has no letters.

    Accents, case, punctuation and articles at either end don't count, ``&`` is ``and``; a year in parentheses is no
    title.
    """
    outside = _PARENTHESES.sub(" ", title)
    inside = [_AKA.sub("", part) for part in _PARENTHESES.findall(title) if not _YEAR.match(part)]
    keys = [_title_key(part) for part in (outside, *inside)]
    return list(dict.fromkeys(key for key in keys if key))


def person_key(name: str) -> str:
    """A person's key: accents, case, punctuation and underscores don't count, nor does a qualifier in parentheses.

    Initials stand together: "P. J. Hogan" is "P.J. Hogan".
    """
    joined = " ".join(_words(_PARENTHESES.sub(" ", name.replace("_", " "))))
    return _INITIALS.sub("", joined)


def listed_names(cell: str, *, underscores: bool) -> list[str]:
    """The names in a cell: a Python-style list ("['A', 'B']") or a single one; empty strings are none."""
    cell = cell.strip()
    names: list[str] = [cell]
    if cell.startswith("["):
        try:
            parsed = ast.literal_eval(cell)
            names = [str(part) for part in parsed] if isinstance(parsed, list) else []
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            names = []
    spelled = [" ".join((name.replace("_", " ") if underscores else name).split()) for name in names]
    return [name for name in spelled if name]


def _title_key(title: str) -> str:
    trailing = _TRAILING.search(title)
    if trailing and trailing["article"].rstrip("'").casefold() in _ARTICLES:
        title = title[: trailing.start()]
    words = _words(title.replace("&", " and "))
    if len(words) > 1 and words[0] in _ARTICLES:
        words = words[1:]
    return " ".join(words)


def _words(text: str) -> list[str]:
    """Lower-case words without accents; an apostrophe or a full stop joins, any other mark parts."""
    plain = unicodedata.normalize("NFKD", text).casefold().translate(_LETTERS)
    kept = "".join(c for c in plain if not unicodedata.combining(c) and c not in ".'’`´")
    return re.sub(r"[^\w]+|_", " ", kept).split()
