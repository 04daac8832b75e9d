"""Ids are the same text whatever a file's format, or the row is rejected by line; so are those of a request."""

import csv
import json
import math
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import write_deltalake
from hypothesis import example, given, settings
from hypothesis import strategies as st

from etl.identifiers import raw_ids
from tests.fixtures.local_rows import local_rows

NULLS = {"", "\\N", "NULL", "NA", "NaN", "None"}
WORDS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=8)
ODD_WORDS = st.sampled_from(
    ["007", "5.0", "28.00", "-0.0", "12e45", "1.5e+20", "nan", "-Inf", "1,5", " 7 ", '{"id": 5}']
)
NUMBERS = st.one_of(st.integers(-99, 99), st.integers(2**53 - 2, 2**53 + 2), st.integers(-(2**63), 2**63 - 1))
FLOATS = st.one_of(
    st.floats(allow_subnormal=False, width=64),
    st.integers(-(2**54), 2**54).map(float),
    st.integers(-(10**6), 10**6).map(lambda number: number / 8),
).filter(lambda value: value == 0 or abs(value) >= 1e-4)  # smaller ones are spelled otherwise by every writer
CELLS = st.one_of(st.none(), WORDS, ODD_WORDS, NUMBERS, FLOATS)


def _ids(folder: Path, form: str, **more: Any) -> list[str | None]:
    """The id of each row, None where it is rejected."""
    rows = local_rows(folder, path="log", format=form, columns={"user": "user", "item": "item"}, **more)
    return [None if row["reason"] else row["user"] for row in sorted(rows, key=lambda row: row["line"])]


def _check(cells: list[Any], ids: list[str | None], form: str) -> None:
    """Simple ids come out as they are; no id is another text than the rule's."""
    assert len(ids) == len(cells)
    for cell, found in zip(cells, ids, strict=True):
        try:
            rule = None if cell is None or str(cell).strip() in NULLS else raw_ids([cell])[0]
        except ValueError:  # a float that may have lost digits: what spells it as text may still know them
            assert found is None or (form == "csv" and found == raw_ids([str(cell)])[0]), (form, cell)
            continue
        assert found in (None, rule), (form, cell)
        is_simple = isinstance(cell, int) or (isinstance(cell, str) and cell.isalnum() and cell.isascii())
        if is_simple and rule is not None and rule.lower() not in ("nan", "inf", "infinity"):
            assert found == rule, (form, cell)


@settings(max_examples=60, deadline=None)
@given(cells=st.lists(CELLS, min_size=1, max_size=12))
@example(cells=[2.0**53, 2.0**53 - 1])
def test_ids_are_the_same_in_every_textual_format(tmp_path_factory: pytest.TempPathFactory, cells: list[Any]) -> None:
    folder = tmp_path_factory.mktemp("ids")
    with open(folder / "log", "w", newline="", encoding="utf-8") as stream:
        csv.writer(stream, lineterminator="\n").writerows([["user", "item"], *([cell, "x"] for cell in cells)])
    _check(cells, _ids(folder, "delimited", multiline=True), "csv")
    objects = [{"user": cell, "item": "x"} for cell in cells]
    for form, text in {
        "json": "\n".join(map(json.dumps, objects)),
        "json_array": json.dumps(objects, ensure_ascii=False),
        "python": "\n".join(repr(row) for row in objects if "nan" not in repr(row) and "inf" not in repr(row)),
    }.items():
        if not text:
            continue
        (folder / "log").write_bytes(text.encode())
        kept = [c for c, row in zip(cells, objects, strict=True) if form != "python" or repr(row) in text.split("\n")]
        _check(kept, _ids(folder, form), form)


@settings(max_examples=60, deadline=None)
@given(
    cells=st.one_of(
        st.lists(st.one_of(st.none(), each), min_size=1, max_size=12) for each in (WORDS | ODD_WORDS, NUMBERS, FLOATS)
    )
)
def test_ids_are_the_same_in_every_typed_format(tmp_path_factory: pytest.TempPathFactory, cells: list[Any]) -> None:
    folder = tmp_path_factory.mktemp("ids")
    kinds = {type(cell) for cell in cells} - {type(None)}
    columns = {kind: pa.array(cells, {str: pa.string(), int: pa.int64(), float: pa.float64()}[kind]) for kind in kinds}
    if kinds == {int}:
        columns["decimal"] = pa.array([None if c is None else Decimal(c) for c in cells], pa.decimal128(21, 2))
    for kind, column in columns.items():
        table = pa.table({"user": column, "item": ["x"] * len(cells)})
        pq.write_table(table, folder / "log", row_group_size=5)
        _check(cells, _ids(folder, "parquet"), f"parquet of {kind}")
        (folder / "log").unlink()
        write_deltalake(folder / "log", table)
        _check(cells, _ids(folder, "delta"), f"delta of {kind}")
        for path in sorted((folder / "log").rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        (folder / "log").rmdir()


@given(cell=st.one_of(NUMBERS, FLOATS))
def test_a_number_is_the_id_that_its_text_is(cell: float) -> None:
    try:
        (found,) = raw_ids([cell])
    except ValueError:
        assert not math.isfinite(cell) or abs(cell) >= 1e10
    else:
        assert raw_ids([str(cell)]) == [found]
