"""What a configuration is made of: frozen sections, checked names and places, and the errors that users see."""

import hashlib
import json
import types
import typing
from typing import Annotated, Any, ClassVar, TypeVar, get_args, get_origin

from pydantic import AfterValidator, BaseModel, ConfigDict

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


class Section(BaseModel):
    """Base of every configuration section: frozen, unknown keys refused, and so are numbers that are not finite."""

    LATER: ClassVar[tuple[str, ...]] = ()  # settings newer than some hashes, which leave them out at their defaults

    model_config = ConfigDict(
        frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False, hide_input_in_errors=True
    )


def without_credentials(place: str) -> str:
    """A local path or URI as it is. Raises ValueError where it holds credentials."""
    if has_credentials(place):
        raise ValueError(
            "expected a place without user, password, key or signature, found a URI that holds one; take them out: "
            "credentials come from the environment (AWS_…, AZURE_…, GOOGLE_…)"
        )
    return place


Place = Annotated[str, AfterValidator(without_credentials)]  # a local path, or a URI, which is shown and kept in files


MAX_NAME_BYTES = 180  # of a file's name there are 255; suffixes need room


def name_of_a_file(name: str) -> str:
    """A name, also one with folders in it. Raises ValueError where it leaves its folder or is too long for a file."""
    if not name:  # of settings that are compared without their names
        return name
    parts = name.split("/")
    if "\0" in name or "\n" in name or not all(part.strip() and part not in (".", "..") for part in parts):
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
