"""What a configuration is made of: frozen sections, checked names and places, and the errors that users see."""

import hashlib
import json
import types
import typing
import unicodedata
from typing import Annotated, Any, ClassVar, Self, TypeVar, get_args, get_origin

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ModelWrapValidatorHandler, model_validator

from etl.redaction import has_credentials


class GraftrecError(Exception):
    """A mistake the user can mend: printed as one line, without a traceback; the process ends with `exit_code`.

    The message says what was expected, what was found and what to do.
    """

    exit_code = 2


class RunAgain(GraftrecError):
    """Another process committed first, or holds the lock: nothing is wrong, the same command can succeed later."""

    exit_code = 5


class ConfigError(GraftrecError):
    """A configuration that can't be composed or validated."""


MAX_SECONDS = 1_000_000_000  # that anything may be waited for: more than clocks and locks take
# Of settings that say no other bound. A setting that decides how much memory or time is taken has one of its own.
MAX_NUMBER, MAX_TEXT, MAX_VALUES = 2**63 - 1, 100_000, 100_000
_ANY_TEXT = ("separator", "categories_separator", "quote", "escape", "null_values")  # characters of files


class Section(BaseModel):
    """Base of every configuration section: frozen, unknown keys refused, and so are numbers that are not finite or that
    no library takes, texts that no path can have, and lists without end."""

    LATER: ClassVar[tuple[str, ...]] = ()  # settings newer than some hashes, which leave them out at their defaults

    model_config = ConfigDict(
        frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False, hide_input_in_errors=True
    )

    @model_validator(mode="wrap")
    @classmethod
    def _values_are_usable(cls, given: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        if isinstance(given, dict):  # before validators of the class compute with them
            for name, field in cls.model_fields.items():
                if name in given and not sections_of(field.annotation) and not entries_of(field.annotation):
                    _check_usable(name, given[name], any_text=name in _ANY_TEXT)
        return handler(given)


def _check_usable(name: str, value: Any, *, any_text: bool = False) -> None:
    """Raises ValueError for a plain value, or one within a list or dict, that libraries choke on."""
    if isinstance(value, str):
        if len(value) > MAX_TEXT:
            raise ValueError(f"{name}: expected at most {MAX_TEXT:,} characters, found {len(value):,}; shorten it")
        if ("\0" in value and not any_text) or any("\ud800" <= character <= "\udfff" for character in value):
            raise ValueError(f"{name}: expected text that a file or path can hold, found {value[:40]!r}; mend it")
    elif isinstance(value, int):
        if not -MAX_NUMBER - 1 <= value <= MAX_NUMBER:
            raise ValueError(f"{name}: expected a number of 64 bits, found one of {value.bit_length():,}; mend it")
    elif isinstance(value, list | tuple | dict):
        if len(value) > MAX_VALUES:
            raise ValueError(f"{name}: expected at most {MAX_VALUES:,} values, found {len(value):,}; shorten it")
        for one in [*value, *value.values()] if isinstance(value, dict) else value:
            if not isinstance(one, dict):  # a section of its own, as a rule
                _check_usable(name, one, any_text=any_text)


def without_credentials(place: str) -> str:
    """A local path or URI as it is. Raises ValueError where it holds credentials."""
    if has_credentials(place):
        raise ValueError(
            "expected a place without user, password, key or signature, found a URI that holds one; take them out: "
            "credentials come from the environment (AWS_…, AZURE_…, GOOGLE_…)"
        )
    return place


Seed = Annotated[int, Field(ge=0, lt=2**32)]  # of random numbers: what every library takes
Place = Annotated[str, AfterValidator(without_credentials)]  # a local path, or a URI, which is shown and kept in files


MAX_NAME_BYTES = 180  # of a file's name there are 255; suffixes need room


def name_of_a_file(name: str) -> str:
    """A name, also one with folders in it. Raises ValueError where it leaves its folder or is too long for a file."""
    if not name:  # of settings that are compared without their names
        return name
    parts = name.split("/")
    if any(unicodedata.category(one) == "Cc" for one in name) or not all(
        part.strip() and part not in (".", "..") for part in parts
    ):
        raise ValueError(
            f"expected a name that stays in its folder, found {name[:80]!r}; leave out .., // and a first /"
        )
    if (size := max(len(part.encode(errors="replace")) for part in parts)) > MAX_NAME_BYTES:
        raise ValueError(f"expected at most {MAX_NAME_BYTES} bytes, found {size}: {name[:40]!r}…; shorten it")
    return name


FileName = Annotated[str, AfterValidator(name_of_a_file)]  # of a run, registered model or domain: files are named so


SectionT = TypeVar("SectionT", bound=Section)


def sections_of(annotation: Any) -> list[type[Section]]:
    """The Section classes an annotation admits directly (not inside a list or dict)."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    if get_origin(annotation) in (typing.Union, types.UnionType, Annotated):
        return [section for part in get_args(annotation) for section in sections_of(part)]
    return []


def entries_of(annotation: Any) -> type[Section] | None:
    """The Section class of a dict's values."""
    if get_origin(annotation) is dict:
        key, value = get_args(annotation)
        if key is str and isinstance(value, type) and issubclass(value, Section):
            return value
    return None


def is_union(annotation: Any) -> bool:
    return get_origin(annotation) in (typing.Union, types.UnionType)


def config_hash(config: Section) -> str:
    """First 16 hex digits of the SHA-256 of the configuration's canonical JSON, without `LATER` settings at their
    defaults: so that a new setting leaves the hashes of old configurations as they were."""
    text = json.dumps(_without_later_defaults(config, config.model_dump(mode="json")), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _without_later_defaults(value: Any, dumped: Any) -> Any:
    """`dumped` is `value` as JSON."""
    if isinstance(value, Section):
        fields = type(value).model_fields
        return {
            name: _without_later_defaults(one, dumped[name])
            for name, one in value
            if name in dumped and not (name in value.LATER and one == fields[name].default)
        }
    if isinstance(value, dict):
        return {key: _without_later_defaults(one, dumped[str(key)]) for key, one in value.items()}
    if isinstance(value, tuple | list):
        return [_without_later_defaults(*pair) for pair in zip(value, dumped, strict=True)]
    return dumped
