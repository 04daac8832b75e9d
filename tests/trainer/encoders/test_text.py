"""What is a text, and what is none."""

import hashlib

import pytest

from etl.identifiers import is_no_text
from trainer.encoders.text import source_hash, text_of


@pytest.mark.parametrize(
    ("parts", "text"),
    [
        (("Heat", 1995, ["Action", "Crime"]), "Heat. 1995. Action, Crime"),
        ((" Heat ", None, []), "Heat"),
        (("", None, ["[]", "unknown", "Crime"]), "Crime"),
        (("[]", None, ["['']"]), ""),
        (("Unknown", None, None), ""),
        (("N/A", None, ["nan", ""]), ""),
        (("unknown pleasures", None, None), "unknown pleasures"),
        (("No plot yet", None, None), "No plot yet"),
    ],
)
def test_text_of_parts(parts: tuple[str | int | list[str] | None, ...], text: str) -> None:
    assert text_of(parts) == text


def test_placeholders_are_given_in_lower_case() -> None:
    assert text_of(("No Plot Yet", None, ["Crime"]), {"no plot yet"}) == "Crime"
    assert is_no_text("No Plot Yet ", {"no plot yet"})
    assert not is_no_text("No Plot Yet")


def test_hash_is_the_first_bytes_of_blake2b() -> None:
    text = "Amélie (2001)"
    expected = hashlib.blake2b(text.encode("utf-8"), digest_size=8).hexdigest()
    assert source_hash(text) % (1 << 64) == int(expected, 16)
    assert -(1 << 63) <= source_hash(text) < 1 << 63
