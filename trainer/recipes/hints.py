"""The command of a recipe with given settings, for hints in messages: it works as it is printed."""

import shlex
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel

from etl import program
from etl.redaction import is_secret
from etl.settings import ConfigError, Section, load, named, setting_words
from trainer.config import RecommendConfig


def recommend_command(config: RecommendConfig) -> str:
    """The command `recommend` with the configuration in use, else the default one, and what differs from it.

    Secrets of `spark.settings` are left out: no message holds them.
    """
    name, base = _base()
    words = [word for dotted, value in _differing(config, base, "") for word in setting_words(dotted, value)]
    return shlex.join([*program.words("trainer", "recommend"), "--config", name, *words])


def _base() -> tuple[str, RecommendConfig]:
    """A configuration that the command can name, with its settings."""
    name = named(RecommendConfig, "recommend/default")
    try:
        return name, load(RecommendConfig, name)
    except ConfigError:  # its file is gone
        return "recommend/default", load(RecommendConfig, "recommend/default")


def _differing(config: Section, base: Section, prefix: str) -> Iterator[tuple[str, Any]]:
    """Dotted name and value of each setting that differs."""
    for name, value in config:
        other = getattr(base, name)
        if value == other:
            continue
        if isinstance(value, Section) and type(value) is type(other):
            yield from _differing(value, other, f"{prefix}{name}.")
        elif isinstance(value, dict):
            yield f"{prefix}{name}", {key: one for key, one in value.items() if not is_secret(key)}
        else:
            yield f"{prefix}{name}", value.model_dump(mode="json") if isinstance(value, BaseModel) else value
