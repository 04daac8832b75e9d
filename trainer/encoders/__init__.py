"""Encoders: things outside a log, such as texts, to vectors. Frozen: they were trained elsewhere (survey 2.1).

An encoder is a function with a name. One for pictures or sounds takes paths instead of texts, and is the same else.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

from etl.settings import ConfigError
from trainer.arrays import FloatArray

__all__ = ["EncoderError", "TextEncoder", "text_encoder", "text_encoders"]


class EncoderError(ConfigError):
    """An encoder whose package or weights are not there, or not those that are expected."""


class TextEncoder(Protocol):
    """Texts -> vectors [N, F] of this `width` F.

    `name` is that of the table's column `encoder`, `weights` the SHA-256 of its file of weights: vectors by other
    weights mean something else.
    """

    name: str
    width: int
    weights: str

    def encode(self, texts: Sequence[str]) -> FloatArray:
        """[N, F] of texts that are not empty, in their order. Equal lists of texts give equal bits."""
        ...


def _wordllama() -> TextEncoder:
    from trainer.encoders.word_vectors import WordLlamaEncoder

    return WordLlamaEncoder()


def _minilm() -> TextEncoder:
    from trainer.encoders.minilm import MiniLM

    return MiniLM()


_TEXT: dict[str, Callable[[], TextEncoder]] = {"wordllama": _wordllama, "minilm": _minilm}


def text_encoders() -> list[str]:
    """The names of those there are."""
    return sorted(_TEXT)


def text_encoder(name: str) -> TextEncoder:
    """The encoder of that name, its weights read. Raises EncoderError."""
    if name not in _TEXT:
        raise EncoderError(f"expected a text encoder ({', '.join(text_encoders())}), found {name!r}; name one of these")
    return _TEXT[name]()
