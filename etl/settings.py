"""The loader that composes YAML into frozen pydantic models, and the errors that users see."""

import difflib
import hashlib
import json
import os
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_origin

import pydantic
import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict

from etl.redaction import has_credentials, is_secret, remember

CONF_VARIABLE = "GRAFTREC_CONF"  # another folder to take YAML from


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


def conf_root() -> Path:
    """The folder of YAML files: $GRAFTREC_CONF, else ./conf, else the one of this checkout."""
    if named := os.environ.get(CONF_VARIABLE):
        return Path(named)
    if Path("conf").is_dir():
        return Path("conf")
    return Path(__file__).parent.parent / "conf"


def load(kind: type[SectionT], path: str | Path, overrides: Sequence[str] = ()) -> SectionT:
    """Compose one YAML file into a `kind`. `path` is a file, or a name such as ``etl/demo`` under the conf folder.

    `overrides` is a command line's rest: ``["--section.key", "value", …]`` (also ``--section.key=value`` and, as MLflow
    Projects append them, ``section.key=value``). ``--base`` and ``--section.base`` take another base than the file's.
    Raises ConfigError.
    """
    _in_use[kind] = str(path)
    given = list(_overrides(overrides))
    overridden.pop(kind, None)  # the kind that is loaded last stands last
    overridden[kind] = [(name, value) for name, value, _ in given]
    raw = _read(_resolve(path), next((value for name, value, _ in reversed(given) if name == "base"), None))
    given = [one for one in given if one[0] != "base"]
    for dotted, value, text in sorted(given, key=lambda one: not one[0].endswith(".base")):  # what is on top comes last
        _set(raw, dotted, text if _is_text(kind, dotted) and _says(value, text) else value)
    raw = _compose(raw, kind)
    remember(raw)
    try:
        return kind.model_validate(raw)
    except pydantic.ValidationError as error:
        raise ConfigError(f"{path}: {_explain(kind, error)}") from None


_in_use: dict[type[Section], str] = {}  # kind -> name or path of the configuration that was loaded last
overridden: dict[type[Section], list[tuple[str, Any]]] = {}  # kind -> settings that the command line gave


def named(kind: type[Section], default: str) -> str:
    """Name or path of the configuration of that kind that was loaded last, or `default`."""
    return _in_use.get(kind, default)


def setting_words(name: str, value: Any) -> list[str]:
    """The words of a command that give a setting this value (plain data), as `load` reads them back."""
    try:
        is_itself = isinstance(value, str) and _yaml(value) == value
    except yaml.YAMLError:
        is_itself = False
    text = value if is_itself else json.dumps(value, ensure_ascii=False)
    return [f"--{name}={text}"] if text.startswith("--") else [f"--{name}", text]


def replaced(config: SectionT, **changes: Any) -> SectionT:
    """The configuration with other settings, validated again as a whole; pydantic's own `model_copy` validates nothing.

    Raises ConfigError. Settings that only go together are changed in one call.
    """
    try:
        return type(config).model_validate({**dict(config), **changes})
    except pydantic.ValidationError as error:
        raise ConfigError(_explain(type(config), error)) from None


def texts(arguments: Sequence[str]) -> dict[str, str]:
    """Dotted key -> value as it was written, of overrides. Raises ConfigError."""
    return {key: text for key, _, text in _overrides(arguments)}


def _is_text(kind: type[Section], dotted: str) -> bool:
    """Whether a setting is a text or null: then `a #b`, `2024` and `{x}: y` are no comment, number and section."""
    kinds = [kind]
    *parents, last = dotted.split(".")
    for parent in parents:
        fields = [one.model_fields[parent] for one in kinds if parent in one.model_fields]
        kinds = [section for field in fields for section in sections_of(field.annotation)]
    annotations = [one.model_fields[last].annotation for one in kinds if last in one.model_fields]
    parts = [part for found in annotations for part in (get_args(found) if _is_union(found) else (found,))]
    plain = [get_args(part)[0] if get_origin(part) is Annotated else part for part in parts]
    return bool(plain) and all(part in (str, type(None)) for part in plain)


def _is_union(annotation: Any) -> bool:
    return get_origin(annotation) in (typing.Union, types.UnionType)


def _says(value: Any, text: str) -> bool:
    """Whether a text means itself: it is neither null nor in quotes."""
    quoted = isinstance(value, str) and text[:1] in ("'", '"') and value != text
    return text.strip().lower() not in ("", "null", "~") and not quoted


def _overrides(arguments: Sequence[str]) -> list[tuple[str, Any, str]]:
    """Dotted key, YAML value and text of each ``--a.b value``, ``--a.b=value`` or ``a.b=value``. Raises ConfigError."""
    pairs: list[tuple[str, Any, str]] = []
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        key, equals, value = word.removeprefix("--").partition("=")
        if not equals:
            if not word.startswith("--") or not rest:
                raise ConfigError(f"expected --section.key value, found {word!r}; give every key a value")
            value = rest.pop(0)
            if value.startswith("--"):
                raise ConfigError(f"expected a value for {word}, found the setting {value}; give every key a value")
        if not all(key.split(".")):
            raise ConfigError(f"expected --section.key value, found {word!r}; mend the name")
        try:
            pairs.append((key, _yaml(value), value))
        except yaml.YAMLError:
            pairs.append((key, value, value))
    return pairs


def config_hash(config: Section) -> str:
    """First 16 hex digits of the SHA-256 of the configuration's canonical JSON."""
    text = json.dumps(config.model_dump(mode="json"), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class _Loader(yaml.SafeLoader):
    """YAML whose dates stay the text they are: `cleaning.min_time: 2020-01-31` needs no quotes."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def _yaml(text: str) -> Any:
    return yaml.load(text, Loader=_Loader)


def _resolve(path: str | Path) -> Path:
    # os.path.isfile, unlike Path.is_file, also says no to a name that is too long.
    for candidate in (Path(path), conf_root() / f"{path}.yaml", conf_root() / path):
        if os.path.isfile(candidate):
            return candidate
    if os.path.isdir(path):
        raise ConfigError(f"no configuration {path}: expected a YAML file, found a folder; name a file in it")
    folder = (conf_root() / path).parent
    known = sorted(file.stem for file in folder.glob("*.yaml")) if folder != conf_root() else []
    if not known:
        known = sorted(
            file.relative_to(conf_root()).with_suffix("").as_posix() for file in conf_root().glob("*/*.yaml")
        )
        name = Path(path).name
        near = [one for one in known if Path(one).name == name] or difflib.get_close_matches(str(path), known, 5)
        folders = ", ".join(dict.fromkeys(Path(one).parent.name for one in known))
        mean = f"did you mean {', '.join(near)}?" if near else f"the folders are {folders or 'none'}"
        raise ConfigError(f"no configuration {path}: expected a YAML file, or a name under {conf_root()}/; {mean}")
    raise ConfigError(f"no configuration {path}: expected a YAML file, or one of {folder}/: {', '.join(known)}")


def _named(section: str, name: str) -> Path:
    """The file that a string in the place of a section means: one of conf/<section>/, or a YAML file's path."""
    return Path(name) if name.endswith(".yaml") and os.path.isfile(name) else _resolve(Path(section) / name)


def _base_of(folder: Path, name: object) -> Path:
    """The file that `base` means: one in that folder, or a folder and a name under the conf folder."""
    if not isinstance(name, str):
        raise ConfigError(f"base: expected the name of a file, found {name!r}; mend it")
    beside = folder / f"{name}.yaml"
    return _resolve(name if "/" in name and not os.path.isfile(beside) else beside)


def _read(path: Path, other_base: object = None, inherited_by: tuple[Path, ...] = ()) -> dict[str, Any]:
    """One YAML file with its `base`, or another one, merged beneath it."""
    if path.resolve() in inherited_by:
        raise ConfigError(f"{path}: expected another file as base, found one that inherits this one; mend `base`")
    try:
        raw = _yaml(path.read_text(encoding="utf-8")) or {}
    except yaml.MarkedYAMLError as error:  # its text quotes lines, and a line may hold a secret
        where = f" in line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"{path}: not readable as YAML: {error.problem or error.context}{where}") from None
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"{path}: not readable as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: expected a mapping of settings, found {type(raw).__name__}")
    base = raw.pop("base", None)
    if base := other_base or base:
        raw = _merge(_read(_base_of(path.parent, base), None, (*inherited_by, path.resolve())), raw)
    return raw


def _opened(section: str, value: Any, other_base: object = None) -> Any:
    """A section whose name, or whose `base`, is replaced by what that file holds."""
    if isinstance(value, str):
        return _read(_named(section, value), other_base)
    if isinstance(value, dict) and (base := other_base or value.get("base")):
        above = {key: one for key, one in value.items() if key != "base"}
        return _merge(_read(_base_of(conf_root() / section, base)), above)
    return value


def _merge(below: Any, above: Any) -> Any:
    if not (isinstance(below, dict) and isinstance(above, dict)):
        return above
    return below | {key: _merge(below.get(key), value) for key, value in above.items()}


def _set(raw: dict[str, Any], dotted: str, value: Any) -> None:
    *parents, last = dotted.split(".")
    for depth, parent in enumerate(parents):
        is_base = last == "base" and depth == len(parents) - 1
        # A section that is named, or has a base, and is now overridden in part.
        below = _opened(parent, raw.get(parent), value if is_base else None)
        if is_base and isinstance(below, dict):
            raw[parent] = below
            return
        if below is None:
            below = {}
        if not isinstance(below, dict):
            raise ConfigError(
                f"--{dotted}: expected a section {'.'.join(parents[: depth + 1])}, found {below!r}; mend the name"
            )
        raw[parent] = raw = dict(below)
    raw[last] = value


def _compose(raw: dict[str, Any], kind: type[Section]) -> dict[str, Any]:
    """Replace each string that stands where `kind` has a section by that section's YAML, down the tree."""
    composed = dict(raw)
    for name, field in kind.model_fields.items():
        if name not in composed:
            continue
        sections = sections_of(field.annotation)
        value = composed[name]
        if sections and isinstance(value, str):
            path = _named(name, value)
            _in_use[sections[0]] = value if path == Path(value) else f"{name}/{value}"
            value = _read(path)
        if sections and isinstance(value, dict):
            value = _opened(name, value)
            section = sections[0]
            if len(sections) > 1:
                wanted = value.get("kind")
                section = next((s for s in sections if s.model_fields["kind"].default == wanted), section)
            value = _compose(value, section)
        elif (entry := _entries(field.annotation)) and isinstance(value, dict):
            value = {key: _compose(one, entry) if isinstance(one, dict) else one for key, one in value.items()}
        composed[name] = value
    return composed


def sections_of(annotation: Any) -> list[type[Section]]:
    """The Section classes an annotation admits directly (not inside a list or dict)."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    if get_origin(annotation) in (typing.Union, types.UnionType, Annotated):
        return [section for part in get_args(annotation) for section in sections_of(part)]
    return []


def _entries(annotation: Any) -> type[Section] | None:
    """The Section class of a dict's values."""
    if get_origin(annotation) is dict:
        key, value = get_args(annotation)
        if key is str and isinstance(value, type) and issubclass(value, Section):
            return value
    return None


_EXPECTED = {
    "int": "a whole number",
    "float": "a number",
    "string": "a text",
    "bool": "true or false",
    "tuple": "a list",
    "dict": "a mapping",
    "model": "a section: settings, or the name of its file",
}


def _explain(kind: type[Section], error: pydantic.ValidationError) -> str:
    """Each mistake of a configuration: where it is, what was expected, what was found, what to do."""
    parts = []
    for problem in error.errors():
        section, steps = _locate(kind, problem["loc"])
        where, context = ".".join(steps) or "(top)", problem.get("ctx", {})
        found = "" if isinstance(problem.get("input"), Mapping) else f", found {problem.get('input')!r}"
        if is_secret(where):
            found = ""
        match problem["type"]:
            case "extra_forbidden":
                near = difflib.get_close_matches(steps[-1], section.model_fields if section else (), 1)
                mend = f"did you mean {'.'.join([*steps[:-1], near[0]])}?" if near else "remove it or mend its name"
                parts.append(f"unknown setting {where}; {mend}")
            case "missing":
                parts.append(f"{where}: expected a value, found none; set it in the file, or by --{where}")
            case "value_error":
                text = str(context["error"])
                parts.append(f"{where}: {text}{'' if 'found' in text else found}" if steps else text)
            case "literal_error":
                parts.append(f"{where}: expected {context['expected']}{found}")
            case "union_tag_invalid":
                parts.append(f"{where}.kind: expected one of {context['expected_tags']}, found {context['tag']!r}")
            case "union_tag_not_found":
                parts.append(f"{where}: expected a section with a kind{found or ', found none'}")
            case other if (name := other.partition("_")[0]) in _EXPECTED and not other.startswith("string_pattern"):
                parts.append(f"{where}: expected {_EXPECTED[name]}{found}")
            case _:
                parts.append(f"{where}: {problem['msg'].replace('Input should be', 'expected')}{found}")
    return "; ".join(dict.fromkeys(parts))


def _locate(kind: type[Section], location: Sequence[str | int]) -> tuple[type[Section] | None, list[str]]:
    """The innermost section that holds a mistake, and its path as users write it: pydantic adds names of types to it
    where an annotation is a union."""
    section: type[Section] | None = kind
    holder = section
    chosen: list[type[Section]] = []
    steps: list[str] = []
    for step in location:
        if "[" in str(step):  # pydantic's name of a type in a union, e.g. tuple[int, ...]
            continue
        if tagged := [one for one in chosen if "kind" in one.model_fields and one.model_fields["kind"].default == step]:
            section, chosen = tagged[0], []
            continue
        steps.append(str(step))
        holder = section
        field = section.model_fields.get(str(step)) if section else None
        kinds = sections_of(field.annotation) if field else []
        section, chosen = (kinds[0], []) if len(kinds) == 1 else (None, kinds)
    return holder, steps
