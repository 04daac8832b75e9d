"""Mistakes in a configuration, in words: where each is, what was expected, what was found, what to do."""

import difflib
from collections.abc import Mapping, Sequence

import pydantic

from etl.redaction import is_secret
from etl.section import Section, sections_of

_EXPECTED = {
    "int": "a whole number",
    "float": "a number",
    "string": "a text",
    "bool": "true or false",
    "tuple": "a list",
    "dict": "a mapping",
    "model": "a section: settings, or the name of its file",
}


MAX_SHOWN = 200  # characters of a value
MAX_MISTAKES = 20


def shown(value: object) -> str:
    """A value as messages say it: short."""
    try:
        text = repr(value)
    except ValueError:  # a whole number of thousands of digits
        text = "a number that is too large"
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}…"


def explained(kind: type[Section], error: pydantic.ValidationError) -> str:
    """Each mistake of a configuration: where it is, what was expected, what was found, what to do."""
    parts = []
    for problem in error.errors():
        section, steps = _locate(kind, problem["loc"])
        where, context = ".".join(steps) or "(top)", problem.get("ctx", {})
        found = "" if isinstance(problem.get("input"), Mapping) else f", found {shown(problem.get('input'))}"
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
                parts.append(f"{where}.kind: expected one of {context['expected_tags']}, found {shown(context['tag'])}")
            case "union_tag_not_found":
                parts.append(f"{where}: expected a section with a kind{found or ', found none'}")
            case other if (name := other.partition("_")[0]) in _EXPECTED and not other.startswith("string_pattern"):
                parts.append(f"{where}: expected {_EXPECTED[name]}{found}")
            case _:
                parts.append(f"{where}: {problem['msg'].replace('Input should be', 'expected')}{found}")
    mistakes = list(dict.fromkeys(parts))
    more = f"; and {len(mistakes) - MAX_MISTAKES} others" if len(mistakes) > MAX_MISTAKES else ""
    return " ".join(f"{'; '.join(mistakes[:MAX_MISTAKES])}{more}".split())


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
        steps.append(str(step)[:MAX_SHOWN])
        holder = section
        field = section.model_fields.get(str(step)) if section else None
        kinds = sections_of(field.annotation) if field else []
        section, chosen = (kinds[0], []) if len(kinds) == 1 else (None, kinds)
    return holder, steps
