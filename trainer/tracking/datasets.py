"""Tables as MLflow's datasets."""

import hashlib
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from etl.tables import TABLES

if TYPE_CHECKING:  # both are slow to import
    pass


def dataset_input(value: Mapping[str, Any], context: str) -> Any:
    from mlflow.entities import DatasetInput, InputTag

    return DatasetInput(dataset_of(value), [InputTag("mlflow.data.context", context)])


def dataset_of(value: Mapping[str, Any]) -> Any:
    """A dataset that is one version of one Delta table.

    Made by hand: MLflow's own DeltaDatasetSource drops version 0.
    """
    from mlflow.entities import Dataset

    path = f"{value['lake'].rstrip('/')}/{value['table']}"
    source = {"path": path, "delta_table_version": value["version"], "is_databricks_uc_table": False}
    digest = hashlib.sha256(f"{path}@{value['version']}".encode()).hexdigest()[:8]
    return Dataset(
        f"{value['table']}@{value['version']}",
        digest,
        "delta_table",
        json.dumps(source),
        schema=_schema(value["table"]),
    )


_TYPES = {
    "string": "string",
    "int32": "integer",
    "int64": "long",
    "float": "float",
    "double": "double",
    "bool": "boolean",
}


def _schema(name: str) -> str | None:
    """The columns of a table as MLflow's page shows them; None for a table that is not of the contract."""
    table = TABLES.get(name)
    if table is None:
        return None

    def described(kind: pa.DataType) -> dict[str, Any]:
        if pa.types.is_list(kind):
            return {"type": "array", "items": described(kind.value_type)}
        if pa.types.is_struct(kind):
            return {"type": "object", "properties": {f.name: described(f.type) | {"required": True} for f in kind}}
        if pa.types.is_map(kind):
            return {"type": "map", "values": described(kind.item_type)}
        return {"type": "datetime" if pa.types.is_timestamp(kind) else _TYPES.get(str(kind), "string")}

    columns = [described(f.type) | {"name": f.name, "required": not f.nullable} for f in table.stored]
    return json.dumps({"mlflow_colspec": columns})
