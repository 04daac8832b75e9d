"""What things are called and described by, as one text each."""

import hashlib
from collections.abc import Collection, Iterable, Sequence

from etl.identifiers import is_no_text

Part = str | int | Sequence[str] | None


def as_placeholders(texts: Iterable[str]) -> frozenset[str]:
    """Texts that settings name as standing for none, as `text_of` compares them."""
    return frozenset(text.strip().casefold() for text in texts)


def text_of(parts: Iterable[Part], placeholders: Collection[str] = ()) -> str:
    """Parts that say something, a stop between them, of a list a comma between its own: "Heat. Action, Crime"; "" where
    none does. `placeholders`: more that stands for no text (as_placeholders)."""
    texts = [_part(part, placeholders) for part in parts]
    return ". ".join(text for text in texts if text)


def _part(part: Part, placeholders: Collection[str]) -> str:
    if part is None:
        return ""
    entries = [str(part)] if isinstance(part, str | int) else part
    stripped = [entry.strip() for entry in entries if entry is not None]
    return ", ".join(entry for entry in stripped if not is_no_text(entry, placeholders))


def source_hash(text: str) -> int:
    """8 bytes of a text's BLAKE2b, as a signed integer: the same on every engine."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big", signed=True)
