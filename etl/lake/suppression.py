"""Users who were forgotten, so that no later run brings them back: a list of keyed hashes, never of ids.

`.suppressed` in the lake holds HMAC-SHA256 of each raw id. The key is $GRAFTREC_SUPPRESSION_KEY where it is set, else
the file `.suppression-key` beside the list: then whoever may read the lake can test whether an id is on it, so keep the
key elsewhere where that matters. Another key than the list's is refused: users would come back.
"""

import hashlib
import hmac
import json
import os
import re
import secrets
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from etl.lake.small_files import read_file, write_file
from etl.lake.snapshots import LakeError
from etl.settings import GraftrecError

SUPPRESSED, KEY_FILE = ".suppressed", ".suppression-key"
KEY_VARIABLE = "GRAFTREC_SUPPRESSION_KEY"
LEAST_KEY_CHARACTERS = 16
MOST_TOKENS = 16  # of a text that may make up an id together
_TOKEN = re.compile(r"[^\W_]+")


@dataclass(frozen=True)
class Suppression:
    """The users of a lake that are left out; `hashes` of their raw ids by `key`."""

    key: bytes
    hashes: frozenset[str]

    def __bool__(self) -> bool:
        return bool(self.hashes)

    def hash_of(self, user: str) -> str:
        return hash_of(self.key, user)

    def holds(self, user: str | None) -> bool:
        return user is not None and self.hash_of(user) in self.hashes

    def named_in(self, text: str | None) -> bool:
        """Whether a text, such as a line that could not be parsed, holds one of the users' ids, between separators."""
        return text is not None and any(self.holds(part) for part in _parts(text))


def hash_of(key: bytes, user: str) -> str:
    """HMAC-SHA256 of a raw user id, in hex."""
    return hmac.new(key, user.encode(), hashlib.sha256).hexdigest()


def _parts(text: str) -> Iterator[str]:
    """All that may be an id in a text: runs of tokens, with what separates them, and one character around."""
    tokens = [match.span() for match in _TOKEN.finditer(text)]
    seen: set[str] = set()
    for first, (start, _) in enumerate(tokens):
        for _, stop in tokens[first : first + MOST_TOKENS]:
            for begin, end in ((start, stop), (max(start - 1, 0), stop), (start, stop + 1)):
                part = text[begin:end]
                if part not in seen:
                    seen.add(part)
                    yield part


def suppression(lake: str) -> Suppression:
    """The list of a lake, empty where nobody was forgotten. Raises LakeError where its key is lost or another one."""
    content = read_file(lake, SUPPRESSED)
    if content is None:
        return Suppression(b"", frozenset())
    found = _parsed(content, lake)
    key = _key(lake)
    if key is None or hash_of(key, "") != found["key"]:
        raise LakeError(
            f"{lake}: expected the key that its {len(found['users'])} forgotten users were hashed by, found "
            f"{'none' if key is None else 'another'}; set ${KEY_VARIABLE} to it, or restore {KEY_FILE}: without it "
            "they would come back"
        )
    return Suppression(key, frozenset(found["users"]))


def suppress(lake: str, users: Iterable[str]) -> Suppression:
    """Add users (raw ids) to the list. Only the lake's writer may. Raises LakeError, GraftrecError."""
    before = suppression(lake)
    key = before.key or _key(lake)
    if key is None:
        key = secrets.token_hex(32).encode()
        write_file(lake, KEY_FILE, key, mode=0o600)
    now = Suppression(key, before.hashes | {hash_of(key, user) for user in users})
    if now.hashes != before.hashes:
        content = {"format": 1, "key": hash_of(key, ""), "users": sorted(now.hashes)}
        write_file(lake, SUPPRESSED, json.dumps(content, indent=1).encode())
    return now


def _parsed(content: bytes, lake: str) -> dict[str, Any]:
    try:
        found = json.loads(content)
        if (
            found["format"] == 1
            and isinstance(found["key"], str)
            and all(isinstance(one, str) for one in found["users"])
        ):
            return dict(found)
    except (ValueError, KeyError, TypeError):
        pass
    raise LakeError(
        f"{lake}/{SUPPRESSED}: expected the list of users who were forgotten (format 1), found something else; restore "
        "it from a copy: without it they would come back"
    )


def _key(lake: str) -> bytes | None:
    given = os.environ.get(KEY_VARIABLE)
    if given is None:
        return read_file(lake, KEY_FILE)
    if len(given) < LEAST_KEY_CHARACTERS:
        raise GraftrecError(
            f"${KEY_VARIABLE}: expected at least {LEAST_KEY_CHARACTERS} characters, found {len(given)}; take a random "
            "one, e.g. of `openssl rand -hex 32`"
        )
    return given.encode()
