"""The loader that composes YAML into frozen pydantic models. What they are made of (`etl.section`) is imported from
here.

A name such as ``etl/demo`` is looked up in the user's own folder first (`conf_roots`), then among the configurations
that come with graftrec: an own folder needs only what differs.
"""

import difflib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import pydantic
import yaml

from etl.redaction import one_line, remember
from etl.section import (
    MAX_SECONDS,
    ConfigError,
    FileName,
    GraftrecError,
    Place,
    RunAgain,
    Section,
    SectionT,
    Seed,
    config_hash,
    entries_of,
    is_union,
    name_of_a_file,
    sections_of,
    without_credentials,
)
from etl.setting_errors import explained, shown

__all__ = [
    "MAX_SECONDS",
    "ConfigError",
    "FileName",
    "GraftrecError",
    "Place",
    "RunAgain",
    "Section",
    "SectionT",
    "Seed",
    "conf_roots",
    "config_hash",
    "explained",
    "load",
    "name_of_a_file",
    "named",
    "overridden",
    "replaced",
    "sections_of",
    "setting_words",
    "texts",
    "without_credentials",
]

MAX_NAME_SHOWN = 200  # characters of a path in a message
CONF_VARIABLE = "GRAFTREC_CONF"  # names the own folder of YAML files; without it, that is ./conf
_PACKAGES = Path(__file__).resolve().parent.parent


def conf_roots() -> tuple[Path, ...]:
    """Folders of YAML files in the order in which names are looked up: $GRAFTREC_CONF, else ./conf if it exists; then
    the one that comes with graftrec."""
    named = os.environ.get(CONF_VARIABLE)
    own = [Path(named or "conf")] if named or Path("conf").is_dir() else []
    shipped = _PACKAGES / "graftrec" / "conf"  # in the wheel
    if not shipped.is_dir():
        shipped = _PACKAGES / "conf"  # in a checkout
    return (*own, *(root for root in [shipped] if not any(root.resolve() == one.resolve() for one in own)))


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
        raise ConfigError(f"{path}: {explained(kind, error)}") from None


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
        raise ConfigError(explained(type(config), error)) from None


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
    parts = [part for found in annotations for part in (get_args(found) if is_union(found) else (found,))]
    plain = [get_args(part)[0] if get_origin(part) is Annotated else part for part in parts]
    return bool(plain) and all(part in (str, type(None)) for part in plain)


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
        if not all(key.split(".")) or key.count(".") >= MAX_STEPS:
            raise ConfigError(f"expected --section.key value, found {word[:MAX_NAME_SHOWN]!r}; mend the name")
        try:
            pairs.append((key, _yaml(value), value))
        except yaml.YAMLError:
            pairs.append((key, value, value))
    return pairs


MAX_YAML_BYTES, MAX_DEPTH, MAX_NODES = 1 << 20, 50, 100_000  # of a file; what an alias stands for counts each time
MAX_STEPS = 20  # of a dotted name
MAX_BITS = 4_096  # of a whole number: larger ones can't even be printed


class _Loader(yaml.SafeLoader):
    """YAML whose dates stay the text they are: `cleaning.min_time: 2020-01-31` needs no quotes. Neither nested without
    end, nor, by aliases of aliases, larger than it is."""

    def __init__(self, stream: Any) -> None:
        super().__init__(stream)
        self._depth = self._nodes = 0
        self._sizes: dict[int, int] = {}  # id of a node that is complete -> the nodes in it

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
        is_alias = self.check_event(yaml.AliasEvent)
        if not is_alias:
            self._depth += 1
            if self._depth > MAX_DEPTH:
                raise yaml.composer.ComposerError(None, None, f"expected at most {MAX_DEPTH} levels, found more", mark)
        before = self._nodes
        node = super().compose_node(parent, index)
        if is_alias:
            if id(node) not in self._sizes:
                raise yaml.composer.ComposerError(None, None, "expected a value, found one that holds itself", mark)
            self._nodes += self._sizes[id(node)]
        else:
            self._depth -= 1
            self._nodes += 1
            self._sizes[id(node)] = self._nodes - before
        if self._nodes > MAX_NODES:
            raise yaml.composer.ComposerError(None, None, f"expected at most {MAX_NODES:,} values, found more", mark)
        return node

    def bounded_int(self, node: yaml.ScalarNode) -> int:
        number: int = super().construct_yaml_int(node)
        if number.bit_length() > MAX_BITS:
            raise ValueError(f"a number of {number.bit_length():,} bits")
        return number


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.bounded_int)
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def _yaml(text: str) -> Any:
    """Raises yaml.YAMLError, for a number or date that is none too."""
    if len(text) > MAX_YAML_BYTES:
        raise yaml.YAMLError(f"expected at most {MAX_YAML_BYTES:,} characters, found {len(text):,}")
    try:
        return yaml.load(text, Loader=_Loader)
    except (ValueError, ArithmeticError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise yaml.YAMLError(f"expected values of YAML's types, found another ({one_line(error, 100)})") from None


def _resolve(path: str | Path, but: Path | None = None) -> Path:
    """The file that a path or a name under the conf folders means; `but` only if there is no other."""
    roots = conf_roots()
    if CONF_VARIABLE in os.environ and not roots[0].is_dir():
        raise ConfigError(f"{CONF_VARIABLE}: expected a folder of YAML files, found none at {roots[0]}; mend it")
    # os.path.isfile, unlike Path.is_file, also says no to a name that is too long.
    candidates = (Path(path), *(root / f"{path}{suffix}" for root in roots for suffix in (".yaml", "")))
    found = [candidate for candidate in candidates if os.path.isfile(candidate)]
    if found:
        return next((file for file in found if but is None or not os.path.samefile(file, but)), found[0])
    path = "".join(one if one.isprintable() else "?" for one in str(path)[:MAX_NAME_SHOWN])
    if os.path.isdir(path):
        raise ConfigError(f"no configuration {path}: expected a YAML file, found a folder; name a file in it")
    where = ", ".join(f"{root}/" for root in roots)
    folders = [folder for root in roots if (folder := (root / path).parent) != root]
    if known := sorted({file.stem for folder in folders for file in folder.glob("*.yaml")}):
        where = ", ".join(dict.fromkeys(f"{folder}/" for folder in folders))
        raise ConfigError(f"no configuration {path}: expected a YAML file, or one of {where}: {', '.join(known)}")
    known = sorted(
        {file.relative_to(root).with_suffix("").as_posix() for root in roots for file in root.glob("*/*.yaml")}
    )
    near = [one for one in known if Path(one).name == Path(path).name]
    near = near or difflib.get_close_matches(str(path), known, 5)
    sections = ", ".join(dict.fromkeys(Path(one).parent.name for one in known))
    mean = f"did you mean {', '.join(near)}?" if near else f"the folders are {sections or 'none'}"
    raise ConfigError(f"no configuration {path}: expected a YAML file, or a name under {where}; {mean}")


def _named(section: str, name: str) -> Path:
    """The file that a string in the place of a section means: one of conf/<section>/, or a YAML file's path."""
    return Path(name) if name.endswith(".yaml") and os.path.isfile(name) else _resolve(Path(section) / name)


def _base_of(folder: Path, name: object, but: Path | None = None) -> Path:
    """The file that `base` means: one in that folder, which may be a section's name, or a folder and a name under the
    conf folders; another than `but`, the file that inherits it, if there is one."""
    if not isinstance(name, str):
        raise ConfigError(f"base: expected the name of a file, found {shown(name)}; mend it")
    roots = conf_roots()
    section = Path(folder.name) if folder.parent in roots else folder
    places = [folder / f"{name}.yaml", *(root / section / f"{name}.yaml" for root in roots)]
    found = [place for place in places if os.path.isfile(place) and not (but and os.path.samefile(place, but))]
    return found[0] if found else _resolve(name if "/" in name else section / name, but)


def _read(path: Path, other_base: object = None, inherited_by: tuple[Path, ...] = ()) -> dict[str, Any]:
    """One YAML file with its `base`, or another one, merged beneath it."""
    if path.resolve() in inherited_by:
        raise ConfigError(f"{path}: expected another file as base, found one that inherits this one; mend `base`")
    try:
        if (size := path.stat().st_size) > MAX_YAML_BYTES:
            raise yaml.YAMLError(f"expected at most {MAX_YAML_BYTES:,} bytes, found {size:,}")
        raw = _yaml(path.read_text(encoding="utf-8")) or {}
    except yaml.MarkedYAMLError as error:  # its text quotes lines, and a line may hold a secret
        where = f" in line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"{path}: not readable as YAML: {error.problem or error.context}{where}") from None
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"{path}: not readable as YAML: {one_line(error)}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: expected a mapping of settings, found {type(raw).__name__}")
    base = raw.pop("base", None)
    if base := other_base or base:
        raw = _merge(_read(_base_of(path.parent, base, path), None, (*inherited_by, path.resolve())), raw)
    return raw


def _opened(section: str, value: Any, other_base: object = None) -> Any:
    """A section whose name, or whose `base`, is replaced by what that file holds."""
    if isinstance(value, str):
        return _read(_named(section, value), other_base)
    if isinstance(value, dict) and (base := other_base or value.get("base")):
        above = {key: one for key, one in value.items() if key != "base"}
        return _merge(_read(_base_of(Path(section), base)), above)
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
                f"--{dotted}: expected a section {'.'.join(parents[: depth + 1])}, found {shown(below)}; mend the name"
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
        elif (entry := entries_of(field.annotation)) and isinstance(value, dict):
            value = {key: _compose(one, entry) if isinstance(one, dict) else one for key, one in value.items()}
        composed[name] = value
    return composed
