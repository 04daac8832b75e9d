"""Settings of a source's files: where rows lie, how they are spelled, what cells are, and which rows count."""

import datetime as dt
from typing import Literal, Self
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from pydantic import Field, field_validator, model_validator

from etl.settings import Place, Section


class ExplodeConfig(Section):
    """Columns whose cells hold several values: each value becomes a row, with the other cells of its line.

    A cell is a list, or text that is cut at `separator`. Columns of one entry are exploded side by side: their cells
    have equally many values. A cell without a value gives no row.
    """

    columns: dict[str, str | int] = Field(min_length=1)  # what a value is -> column, e.g. {item: clicked_items}
    separator: str = Field(",", min_length=1)  # of text; parts that are empty don't count
    # End of an item, which is cut off -> event type: {"-0": shown, "-1": clicked}. "" is any other end.
    suffixes: dict[str, str] = Field(default_factory=dict)
    event_type: str | None = None  # of all these rows
    time: str | None = None  # of all these rows, an ISO 8601 date or time: for values that have none

    @field_validator("time")
    @classmethod
    def _is_a_time(cls, written: str | None) -> str | None:
        return _checked_time(written)

    @model_validator(mode="after")
    def _has_one_event_type(self) -> Self:
        if self.suffixes and (self.event_type is not None or "item" not in self.columns):
            raise ValueError("suffixes: expected a column `item` and no event_type beside them; mend the entry")
        return self

    @property
    def given(self) -> list[str]:
        """What a row of this entry has besides its line's own cells."""
        types = ["event_type"] if self.suffixes or self.event_type is not None else []
        return [*self.columns, *types, *(["time"] if self.time is not None else [])]


class FilterConfig(Section):
    """Events that count; the others are left out, neither good nor rejected."""

    keep: tuple[str, ...] = ()  # event types; (): all of them
    min_value: float | None = None
    max_value: float | None = None
    since: str | None = None  # an ISO 8601 date or time in UTC; earlier events are left out
    until: str | None = None  # events at this time and later are left out

    @field_validator("since", "until")
    @classmethod
    def _is_a_time(cls, written: str | None) -> str | None:
        return _checked_time(written)


def _checked_time(written: str | None) -> str | None:
    if written is not None:
        try:
            dt.datetime.fromisoformat(written)
        except ValueError:
            raise ValueError(f"expected a date such as 2019-11-08, found {written!r}; mend it") from None
    return written


class ColumnsConfig(Section):
    """Which column (name, or 0-based position where there is no header) holds what. `None`: the log has none."""

    user: str | int | None = None
    item: str | int | None = None
    time: str | int | None = None
    event_type: str | int | None = None
    value: str | int | None = None
    basket: str | int | None = None


class FileConfig(Section):
    """Where rows lie and how they are spelled."""

    path: Place  # a file, a folder or a glob, relative to the source's `root`
    # `delta`: path is a Delta table's folder or URI; its deleted rows are left out. `version`: pins the table's.
    # `table`: path is what spark.table knows, or, with `reader`, what spark.read.format(reader) loads, if anything.
    # `json` and `python`: an object a line, spelled by JSON or as a Python literal; `json_array`: one array of objects.
    format: Literal["delimited", "json", "json_array", "python", "parquet", "delta", "table"] = "delimited"
    reader: str | None = None  # e.g. iceberg or jdbc
    options: dict[str, str] = Field(default_factory=dict)  # of the reader
    version: int | None = Field(None, ge=0)  # of a Delta table; None: the newest
    separator: str = ","  # any string, also of several characters
    header: bool = True
    quote: str | None = '"'  # None: no quoting, a quote is an ordinary character
    escape: str | None = Field(None, min_length=1, max_length=1)  # takes a quote or separator behind it as a character
    decimal: Literal[".", ","] = "."  # of numbers that are text
    encoding: str = "utf-8"
    skip_rows: int = Field(0, ge=0)  # lines before the header or the first row
    fields: int | None = Field(
        None, ge=1, le=100_000
    )  # of a line; the last one holds the rest of it, separators and all
    multiline: bool = False  # quoted cells may hold line ends: a file is then read by one task
    member: str | None = None  # file inside a zip archive, a name or a glob; None: the only one
    # A cell with one of these texts, spaces around it aside, holds nothing; NaN also stands for a number that is none.
    null_values: tuple[str, ...] = ("", "\\N", "NULL", "NA", "NaN", "None")

    @model_validator(mode="after")
    def _cuts_lines_one_way(self) -> Self:
        if self.fields is not None and (self.quote is not None or self.escape is not None):
            raise ValueError(
                "fields: expected no quoting, since the last field is the rest of its line; set quote: null"
            )
        if self.multiline and self.quote is None:
            raise ValueError("multiline: expected a quote, found none; set it, or leave multiline out")
        if (self.multiline or self.fields is not None) and self.format != "delimited":
            raise ValueError(f"multiline, fields: expected format delimited, found {self.format!r}; leave them out")
        return self


class EventsFileConfig(FileConfig, FilterConfig):
    """An interaction log."""

    columns: ColumnsConfig
    time_unit: Literal["s", "ms", "us", "ns", "ordinal"] | None = "s"  # of a numeric time; `ordinal`: mere order
    time_format: str | None = None  # strptime format of a textual time; takes the place of time_unit
    timezone: str = "UTC"  # of times that state neither zone nor offset, e.g. Europe/Rome
    explode: tuple[ExplodeConfig, ...] = ()  # columns whose cells hold several values; each entry gives rows
    # A matrix: each column from this position on, unless `columns` names it, is an item, called as in the header (else
    # by its position), and each cell that holds something is an event and its value.
    matrix_from: int | None = Field(None, ge=0, le=1_000_000)
    weights: dict[str, float] = Field(default_factory=dict)  # event type -> value of its events

    @property
    def roles(self) -> list[str]:
        """What the cells of a row are, in order: those of the line, then of `explode` or the matrix."""
        own = [role for role, column in self.columns.model_dump().items() if column is not None]
        matrix = ["item", "value"] if self.matrix_from is not None else []
        return list(dict.fromkeys([*own, *(role for entry in self.explode for role in entry.given), *matrix]))

    def column(self, role: str) -> str:
        """The column that holds what a row of the log has, for messages."""
        return _named(getattr(self.columns, role), role, self.explode)

    @model_validator(mode="after")
    def _has_what_rows_need(self) -> Self:
        _check_explode(self.explode, ColumnsConfig)
        if self.matrix_from is not None:
            if self.explode or self.columns.item is not None or self.columns.value is not None:
                raise ValueError(
                    "matrix_from: expected no explode and no columns for item and value beside a matrix; leave them out"
                )
            if self.format not in ("delimited", "parquet"):
                raise ValueError(f"matrix_from: expected format delimited or parquet, found {self.format!r}")
        timed = {"time" in entry.given or self.columns.time is not None for entry in self.explode}
        if len(timed) == 2:
            raise ValueError("explode: expected a time in all entries or in none; give the others `time`")
        needs = {"keep": "event_type", "weights": "event_type", "min_value": "value", "max_value": "value"}
        for setting, role in (needs | {"since": "time", "until": "time"}).items():
            known = [*self.roles, *(["value"] if self.weights else [])]
            given = getattr(self, setting)
            if given is not None and given != () and given != {} and role not in known:
                raise ValueError(f"{setting}: expected a column for {role}, found none; set columns.{role}")
        if "time" in self.roles and (self.since or self.until) and self.time_unit == "ordinal" and not self.time_format:
            raise ValueError("since, until: expected times, found mere order (time_unit: ordinal); leave them out")
        return self

    @field_validator("time_format")
    @classmethod
    def _names_no_zones(cls, form: str | None) -> str | None:
        if form is not None and "%Z" in form.replace("%%", ""):
            raise ValueError(
                f"expected a format that is the same on every machine, found {form!r}: what zone %Z names depends on "
                "the machine; write offsets and use %z"
            )
        return form

    @field_validator("timezone")
    @classmethod
    def _is_a_zone(cls, name: str) -> str:
        try:
            ZoneInfo(name)
        except (ValueError, OSError, ZoneInfoNotFoundError):
            raise ValueError(f"expected a zone such as Europe/Rome or UTC, found {name!r}; mend the name") from None
        return name


def _named(column: str | int | None, role: str, explode: tuple[ExplodeConfig, ...]) -> str:
    found = [entry.columns[role] for entry in explode if role in entry.columns] or [role if column is None else column]
    return " or ".join(dict.fromkeys(map(str, found)))


def _check_explode(entries: tuple[ExplodeConfig, ...], columns: type[Section]) -> None:
    known = list(columns.model_fields)
    for entry in entries:
        if unknown := [role for role in entry.columns if role not in known]:
            raise ValueError(f"explode.columns: expected {', '.join(known)}, found {unknown[0]!r}; mend the name")


class FlagsConfig(Section):
    """One-hot category columns, as in MovieLens-100k: names in the order of the columns from `first` on."""

    first: int
    names: tuple[str, ...]


class ItemsFileConfig(FileConfig):
    """A file of items: id, title, year, categories and any other attributes."""

    id: str | int
    title: str | int | None = None
    year: str | int | Literal["title"] | None = None  # "title": the "(1995)" at the title's end, which is then cut off
    categories: str | int | None = None
    categories_separator: str = "|"
    category_flags: FlagsConfig | None = None
    attributes: dict[str, str | int] = Field(default_factory=dict)  # attribute name -> column
    # relation -> columns in order of rank, e.g. director, actor.
    people: dict[str, tuple[str | int, ...]] = Field(default_factory=dict)


class UsersFileConfig(FileConfig):
    """A file of users: id and attributes."""

    id: str | int
    attributes: dict[str, str | int] = Field(default_factory=dict)


class EdgesFileConfig(FileConfig):
    """A file of social edges."""

    user: str | int
    friend: str | int | None = None
    weight: str | int | None = None
    directed: bool = False  # False: each edge is written in both directions
    explode: tuple[ExplodeConfig, ...] = ()  # a column of several friends: {columns: {friend: friends}}

    @property
    def roles(self) -> list[str]:
        """What the cells of a row are, in order."""
        own = {"user": self.user, "friend": self.friend, "weight": self.weight}
        given = [role for role, column in own.items() if column is not None]
        return list(dict.fromkeys([*given, *(role for entry in self.explode for role in entry.given)]))

    def column(self, role: str) -> str:
        """The column that holds what an edge has, for messages."""
        return _named(getattr(self, role), role, self.explode)

    @model_validator(mode="after")
    def _has_what_rows_need(self) -> Self:
        if not set(self.roles) <= {"user", "friend", "weight"}:
            raise ValueError(f"explode: expected friend or weight, found {', '.join(self.roles)}; mend the entry")
        if "friend" not in self.roles:
            raise ValueError("friend: expected a column, found none; set it, or explode.columns.friend")
        return self
