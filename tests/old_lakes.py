"""A lake as format 1 had it, written with deltalake alone: integers for times, lists of structs for attributes."""

import datetime as dt
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
from deltalake import CommitProperties, DeltaTable, Transaction, write_deltalake

from etl.tables import TABLES

_EPOCH = dt.datetime(1970, 1, 1, tzinfo=dt.UTC)
_OLD_ATTRIBUTES = pa.list_(pa.struct([("name", pa.string()), ("value", pa.string())]))
_OF_DELTA = {
    "version",
    "timestamp",
    "operation",
    "operationParameters",
    "operationMetrics",
    "clientVersion",
    "engineInfo",
}
_SEALS = {"seal", "sealed", "snapshot"}


def in_format_1(lake: Path, old: Path) -> Path:
    """The newest rows of every table of `lake`, each as version 1 of a table of `old`; releases name that version."""
    for table in TABLES.values():
        if not (lake / table.name).is_dir():
            continue
        handle = DeltaTable(lake / table.name)
        found = handle.to_pyarrow_table(columns=table.schema.names)
        schema = pa.schema([pa.field(f.name, _old_type(f.type), f.nullable) for f in table.stored])
        rows = [{name: _old_value(value) for name, value in row.items()} for row in found.to_pylist()]
        if table.name == "releases":
            rows = [row | {"tables": [entry | {"version": 1} for entry in row["tables"]]} for row in rows]
        properties = {key: value for key, value in handle.metadata().configuration.items() if key != "graftrec.format"}
        if table.name in ("baskets", "releases"):
            properties.pop("graftrec.time", None)
        place = old / table.name
        DeltaTable.create(
            str(place),
            schema,
            partition_by=list(table.partition_by) or None,
            configuration=properties,
            raise_if_key_not_exists=False,
        )
        landed = [Transaction(app, version) for app, version in _transactions(lake / table.name).items()]
        recorded = CommitProperties(custom_metadata=_recorded(handle), app_transactions=landed)
        data = pa.Table.from_pylist(rows, schema=schema)
        write_deltalake(str(place), data, mode="append", commit_properties=recorded)
    return old


def _recorded(handle: DeltaTable) -> dict[str, str]:
    """What the table's newest job recorded, its inputs being version 1 of each."""
    found = next((commit for commit in handle.history() if "app" in commit), {})
    kept = {name: str(value) for name, value in found.items() if name not in _OF_DELTA | _SEALS}
    if "inputs" in kept:
        kept["inputs"] = json.dumps(dict.fromkeys(json.loads(kept["inputs"]), 1), sort_keys=True)
    if "versions" in kept:
        kept["versions"] = json.dumps(dict.fromkeys(json.loads(kept["versions"]), 1), sort_keys=True)
    kept.pop("digests", None)
    return kept


def _transactions(table: Path) -> dict[str, int]:
    """Application -> version, of all that the log names."""
    lines = [line for entry in sorted(table.glob("_delta_log/*.json")) for line in entry.read_text().splitlines()]
    found = [json.loads(line).get("txn") for line in lines]
    return {one["appId"]: one["version"] for one in found if one}


def _old_type(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_map(kind):
        return _OLD_ATTRIBUTES
    if pa.types.is_list(kind):
        return pa.list_(_old_type(kind.value_type))
    return pa.int64() if pa.types.is_timestamp(kind) else kind


def _old_value(value: Any) -> Any:
    if isinstance(value, dt.datetime):
        return (value - _EPOCH) // dt.timedelta(microseconds=1)
    if isinstance(value, list) and value and isinstance(value[0], tuple):
        return [{"name": name, "value": text} for name, text in value]
    return [_old_value(one) for one in value] if isinstance(value, list) else value
