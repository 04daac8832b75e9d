"""Command lines: a parser whose --help lists every setting with its type, default and comment.

A setting's description is the comment beside it (or above it) in the class that defines it, so that it is written once.
Trainers use this module too: it imports neither pyspark nor torch.
"""

import argparse
import ast
import errno
import functools
import inspect
import json
import os
import re
import sys
import textwrap
import traceback
import types
import typing
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, NoReturn, get_args, get_origin

from pydantic.fields import FieldInfo

from etl.json_log import VARIABLE, json_output
from etl.redaction import one_line, redact, redacted_output, unread_is_fine, write
from etl.settings import MAX_NAME_SHOWN, GraftrecError, Section, conf_roots, sections_of
from etl.stopping import STOPPED, interruptible, is_stopped

if TYPE_CHECKING:
    from _typeshed import SupportsWrite

NAME_WIDTH = 34
WORDS = "--words"  # prints what can follow a command, for a shell's completion
HELP_WIDTH = 100


class CommandParser(argparse.ArgumentParser):
    """An argparse parser for commands with `--section.key value` overrides (`parse_known_args`).

    `settings`: the configuration that `--help` lists. A mistake is one line on stderr and exit code 2.
    """

    def __init__(self, prog: str, *, description: str, settings: type[Section] | None = None) -> None:
        super().__init__(
            prog, description=description, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        self.settings = settings
        self.add_argument("--version", action="version", version=f"graftrec {version()}")
        self.add_argument("--log", choices=("text", "json"), help=f"how it prints; json: a record a line (${VARIABLE})")
        self.add_argument(WORDS, action=_Words, nargs=0, help=argparse.SUPPRESS)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        known, rest = super().parse_known_args(args, namespace)
        if known.log is not None:
            os.environ[VARIABLE] = known.log  # of processes that it starts, too
        return known, rest

    def format_help(self) -> str:
        return super().format_help() + (f"\n{settings_help(self.settings)}" if self.settings else "")

    def print_help(self, file: "SupportsWrite[str] | None" = None) -> None:
        with unread_is_fine(sys.stdout):
            write(self.format_help(), sys.stdout)
            sys.stdout.flush()

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: {redact(message)}; {self.prog} --help lists commands and settings", file=sys.stderr)
        sys.exit(2)


class _Words(argparse.Action):
    """Prints a line for each option and setting that can follow the command."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        assert isinstance(parser, CommandParser)
        names = [name for action in parser._actions for name in action.option_strings if name.startswith("--")]
        if parser.settings is not None:
            names += re.findall(r"^  (--[\w.]+)(?=\s|$)", settings_help(parser.settings), re.MULTILINE)
        print("\n".join(name for name in dict.fromkeys(names) if name != WORDS))
        parser.exit()


_FILE_ERRORS = (FileExistsError, IsADirectoryError, NotADirectoryError, PermissionError)
_PATH_ERRORS = (errno.ENAMETOOLONG, errno.ELOOP, errno.EROFS, errno.EILSEQ)  # of OSErrors without a class of their own
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# As libraries that raise errors of their own say it: safetensors, SQLite, the JVM.
_FULL_TEXT = re.compile(r"No space left on device|Disk quota exceeded|File too large|disk is full")


def run_command(name: str, work: Callable[[], int]) -> int:
    """The exit code of a command: that of `work`, or of the mistake that ended it, printed as one line on stderr.

    What it prints meanwhile is without secrets (`etl.redaction`); so is the traceback of an error of ours, code 1.
    """
    with redacted_output(), json_output(name):
        return _run_command(name, work)


def _run_command(name: str, work: Callable[[], int]) -> int:
    stopped = "stopped; run the same command to continue"
    try:
        with interruptible():
            return work()
    except GraftrecError as error:
        message, code = str(error), error.exit_code
    except _FILE_ERRORS as error:
        message, code = _path_text(error), GraftrecError.exit_code
    except KeyboardInterrupt:
        message, code = stopped, STOPPED
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("", "etl", "trainer", "graftrec"):
            traceback.print_exc()
            return 1
        message = f"expected the Python package {package}, found none; `graftrec doctor` says what to install"
        code = GraftrecError.exit_code
    except Exception as error:
        of_path = isinstance(error, OSError) and error.errno in _PATH_ERRORS
        if not of_path and not is_full(error) and not is_stopped():
            traceback.print_exc()
            return 1
        message = (
            f"expected room on the disk, found none ({one_line(error, 200)}); make room, or raise "
            "the limit on file sizes, and run the same command again: it goes on from what is there"
        )
        if isinstance(error, OSError) and of_path:
            message = _path_text(error)
        code = GraftrecError.exit_code
    if is_stopped():
        message, code = stopped, STOPPED
    print(f"{name}: {message}", file=sys.stderr)
    return code


def _path_text(error: OSError) -> str:
    name = str(error.filename)
    name = name if len(name) <= MAX_NAME_SHOWN else f"{name[:MAX_NAME_SHOWN]}…"
    return (
        f"expected a path that can be read or written, found {name}: {error.strerror}; mend its rights, or set "
        "another one"
    )


def is_full(error: BaseException) -> bool:
    """Whether a disk, a quota or a limit on file sizes let a write fail."""
    return getattr(error, "errno", None) in _FULL or _FULL_TEXT.search(str(error)) is not None


def version() -> str:
    """The version of the installed package, else of this checkout."""
    try:
        return metadata.version("graftrec")
    except metadata.PackageNotFoundError:
        text = (Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8")
        found = re.search(r'^version = "(.*)"$', text, re.MULTILINE)
        return found[1] if found else "unknown"


def configurations(*folders: str) -> str:
    """The names that --config accepts from folders of conf/, as one paragraph."""
    roots = conf_roots()
    found = {f"{folder}/{path.stem}" for root in roots for folder in folders for path in (root / folder).glob("*.yaml")}
    where = ", ".join(f"{root}/" for root in roots)
    return f"configurations under {where}: {', '.join(sorted(found)) or 'none'}"


# --- settings ---------------------------------------------------------------------------------------------------------


def settings_help(kind: type[Section]) -> str:
    """Every setting of a configuration: dotted name, type, default, comment; nested sections under their own titles."""
    head = (
        "settings, each as --name value. A section also accepts the name of a file (--gate default is "
        "conf/gate/default.yaml), and --base preset/caser_w64 takes what that file of conf/ says beneath all else."
    )
    return "\n".join([*textwrap.wrap(head, HELP_WIDTH), "", *_section_lines(kind, "", None, {})]) + "\n"


def _section_lines(
    kind: type[Section], prefix: str, default: Section | None, shown: dict[tuple[Any, ...], str]
) -> Iterator[str]:
    """The plain settings of a section, then its nested sections.

    `shown`: (sections, default) -> where they were listed; a second listing is a reference to the first.
    """
    comments = _comments(kind)
    nested = []
    for name, field in kind.model_fields.items():
        value = getattr(default, name) if default is not None else field.get_default(call_default_factory=True)
        required = default is None and field.is_required()
        path, sections = f"{prefix}{name}", _nested(field.annotation)
        if not sections.kinds or sections.suffix:
            yield from _setting_line(path, field, value, required, comments.get(name, ""))
        if sections.kinds:
            about = comments.get(name, "")
            nested.append((path + sections.suffix, sections.kinds, value, required and not sections.suffix, about))
    for path, kinds, value, required, comment in nested:
        given = value if isinstance(value, Section) else None
        key = (*kinds, repr(given))
        title = f"{path}, required" if required else path
        if key in shown:
            if shown[key] != path:
                yield from ("", f"{title}: the settings of {shown[key]}")
            continue
        shown[key] = path
        if len(kinds) > 1:
            names = "|".join(map(_kind, kinds))
            chosen = "required" if given is None else f"default {_kind(type(given))}"
            yield from ("", *_line(f"{path}.kind", f"{names}, {chosen}"))
        for section in kinds:
            which = f"{path} of kind {_kind(section)}" if len(kinds) > 1 else title
            about = comment or _summary(section)
            yield from ("", *textwrap.wrap(f"{which}: {about}" if about else which, HELP_WIDTH))
            own = given if type(given) is section else None
            listed = _section_lines(section, f"{path}.", own, shown)
            yield from (line for line in listed if len(kinds) == 1 or not line.startswith(f"  --{path}.kind "))


def _setting_line(name: str, field: FieldInfo, value: Any, required: bool, comment: str) -> list[str]:
    given = "required" if required else f"default {value_text(value)}"
    text = f"{type_text(field.annotation)}{_bounds(field)}, {given}"
    return _line(name, text + (f"  # {comment}" if comment else ""))


def _line(name: str, text: str) -> list[str]:
    first, *rest = textwrap.wrap(text, HELP_WIDTH - NAME_WIDTH)
    option = f"  --{name}"
    head = [f"{option:<{NAME_WIDTH}}{first}"] if len(option) < NAME_WIDTH else [option, " " * NAME_WIDTH + first]
    return [*head, *(" " * NAME_WIDTH + line for line in rest)]


class _Nested(NamedTuple):
    """Sections that a setting is made of. `suffix`: what follows its name where it is a list or a dict of them."""

    kinds: list[type[Section]]
    suffix: str = ""


def _nested(annotation: Any) -> _Nested:
    if found := sections_of(annotation):
        return _Nested(found)
    for part in (annotation, *get_args(annotation)):
        origin, inner = get_origin(part), get_args(part)
        if origin is tuple and (found := sections_of(inner[0])):
            return _Nested(found, "[]")
        if origin is dict and (found := sections_of(inner[1])):
            return _Nested(found, ".<name>")
    return _Nested([])


def _kind(section: type[Section]) -> str:
    field = section.model_fields.get("kind")
    return str(field.default) if field else section.__name__


def type_text(annotation: Any) -> str:
    """A type as users write its values: integer, number, text, true|false, a|b, [integer, ...], {name: text}."""
    names = {int: "integer", float: "number", str: "text", bool: "true|false", type(None): "null", Any: "any"}
    if annotation in names:
        return names[annotation]
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return type_text(inner[0])
    if origin is Literal:
        return "|".join(map(str, inner))
    if origin in (typing.Union, types.UnionType):
        return "|".join(dict.fromkeys(type_text(part) for part in inner))
    if origin is tuple:
        parts = [type_text(part) if part is not Ellipsis else "..." for part in inner]
        return f"[{', '.join(parts)}]"
    if origin is dict:
        return f"{{name: {type_text(inner[1])}}}"
    return "section" if sections_of(annotation) else getattr(annotation, "__name__", str(annotation))


def value_text(value: Any) -> str:
    """A default as users would write it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, Section):
        return "{...}"
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(value_text, value))}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {value_text(one)}" for key, one in value.items()) + "}"
    if isinstance(value, str) and not re.fullmatch(r"[\w./*\[\]-]+", value):
        return json.dumps(value)
    return str(value)


def _bounds(field: FieldInfo) -> str:
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    found = [
        f"{sign} {getattr(one, name)}" for one in field.metadata for name, sign in signs.items() if hasattr(one, name)
    ]
    return f" {', '.join(found)}" if found else ""


def _summary(section: type[Section]) -> str:
    """The first sentence of a section's docstring."""
    text = " ".join((section.__doc__ or "").split())
    return re.split(r"(?<!et al)\. ", text)[0].rstrip(".")


@functools.cache
def _comments(kind: type[Section]) -> dict[str, str]:
    """Setting -> the comment that ends its line, or that stands in the lines above it. Those of base classes too."""
    found: dict[str, str] = {}
    for one in reversed(kind.__mro__):
        if issubclass(one, Section) and one is not Section:
            found |= _own_comments(one)
    return found


def _own_comments(kind: type[Section]) -> dict[str, str]:
    try:
        lines = textwrap.dedent(inspect.getsource(kind)).splitlines()
    except (OSError, TypeError):
        return {}  # installed without sources
    (body,) = ast.parse("\n".join(lines)).body
    assert isinstance(body, ast.ClassDef)
    found = {}
    for node in body.body:
        if not (isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.end_lineno):
            continue
        _, _, beside = lines[node.end_lineno - 1][node.end_col_offset :].partition("#")
        first = node.lineno - 1
        while lines[first - 1].lstrip().startswith("#"):
            first -= 1
        above = [line.strip().lstrip("# ") for line in lines[first : node.lineno - 1]]
        if text := " ".join(filter(None, [*above, beside.strip()])):
            found[node.target.id] = re.sub(r"\bNone\b", "null", text)
    return found
