"""Delta tables as other writers make them: with deletion vectors and mapped columns, which `deltalake` can't write."""

import base64
import json
import struct
import uuid
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

_Z85 = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.-:+=^!/*?&<>()[]{}@%$#"
_B85 = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz!#$%&()*+-;<=>?@^_`{|}~"
_TYPES = {pa.string(): "string", pa.int64(): "long", pa.float64(): "double", pa.timestamp("us", "UTC"): "timestamp"}


class ForeignTable:
    """A Delta table whose log a test writes by itself. `mapping`: none, name or id (delta.columnMapping.mode)."""

    def __init__(
        self,
        folder: Path,
        schema: pa.Schema,
        *,
        mapping: str = "none",
        partition_by: Sequence[str] = (),
        features: Sequence[str] = ("deletionVectors",),
        table_id: str | None = None,
    ) -> None:
        self.folder, self.schema, self.mapping, self.partition_by = folder, schema, mapping, partition_by
        self.version = -1
        self.live: dict[str, dict[str, Any]] = {}  # path -> its add action
        known = [*features, *(["columnMapping"] if mapping != "none" else [])]
        protocol = {"minReaderVersion": 3, "minWriterVersion": 7, "readerFeatures": known, "writerFeatures": known}
        metadata = {
            "id": table_id or str(uuid.uuid4()),
            "format": {"provider": "parquet", "options": {}},
            "schemaString": json.dumps({"type": "struct", "fields": self._fields(schema)}),
            "partitionColumns": list(partition_by),
            "configuration": {} if mapping == "none" else {"delta.columnMapping.mode": mapping},
        }
        (folder / "_delta_log").mkdir(parents=True)
        self.commit({"protocol": protocol}, {"metaData": metadata})

    def physical(self, name: str) -> str:
        return name if self.mapping == "none" else f"col-{name[::-1]}"

    def append(self, rows: pa.Table, partition: Mapping[str, str] | None = None, name: str | None = None) -> str:
        """A new version with one more file, whose path it gives."""
        path = name or f"part-{uuid.uuid4().hex}.parquet"
        rows = rows.select([field.name for field in self.schema if field.name not in self.partition_by])
        fields = [
            pa.field(
                # By id, no name is to be relied on.
                f"any-{place}" if self.mapping == "id" else self.physical(field.name),
                field.type,
                metadata={"PARQUET:field_id": str(self.schema.get_field_index(field.name) + 1)},
            )
            for place, field in enumerate(rows.schema)
        ]
        pq.write_table(
            rows.cast(
                pa.schema([f.with_name(o) for f, o in zip(fields, rows.schema.names, strict=True)])
            ).rename_columns([f.name for f in fields]),
            self.folder / path,
            row_group_size=3,
        )
        values = {self.physical(key): value for key, value in (partition or {}).items()}
        size = (self.folder / path).stat().st_size
        stats = json.dumps({"numRecords": rows.num_rows})
        add = {"path": path, "partitionValues": values, "size": size, "modificationTime": 0, "dataChange": True}
        self.live[path] = {**add, "stats": stats}
        self.commit({"add": self.live[path]})
        return path

    def delete(self, path: str, rows: Sequence[int], *, inline: bool = False) -> None:
        """A new version in which these rows of a file (by number) are deleted by a vector."""
        bitmap = _bitmap(rows)
        if inline:
            storage, place, more = "i", _z85(bitmap), {}
        else:
            name = uuid.uuid4()
            data = struct.pack(">I", len(bitmap)) + bitmap + struct.pack(">I", zlib.crc32(bitmap))
            (self.folder / f"deletion_vector_{name}.bin").write_bytes(b"\x01" + data)
            storage, place, more = "u", _z85(name.bytes), {"offset": 1}
        vector = {"storageType": storage, "pathOrInlineDv": place, "sizeInBytes": len(bitmap), "cardinality": len(rows)}
        before = self.live[path]
        self.live[path] = {**before, "deletionVector": {**vector, **more}}
        self.commit({"remove": {**self._gone(before)}}, {"add": self.live[path]})

    def remove(self, path: str, *, data_change: bool = True) -> dict[str, Any]:
        """The action that drops a file."""
        return {"remove": {**self._gone(self.live.pop(path)), "dataChange": data_change}}

    def commit(self, *actions: Mapping[str, Any]) -> None:
        self.version += 1
        lines = [json.dumps(action) for action in ({"commitInfo": {"operation": "TEST"}}, *actions)]
        (self.folder / "_delta_log" / f"{self.version:020d}.json").write_text("\n".join(lines))

    def _gone(self, add: Mapping[str, Any]) -> dict[str, Any]:
        kept = ("path", "partitionValues", "size", "deletionVector")
        kept_values = {key: add[key] for key in kept if key in add}
        return {**kept_values, "dataChange": True, "deletionTimestamp": 0, "extendedFileMetadata": True}

    def _fields(self, schema: pa.Schema) -> list[dict[str, Any]]:
        fields = []
        for number, field in enumerate(schema, 1):
            names = {"delta.columnMapping.id": number, "delta.columnMapping.physicalName": self.physical(field.name)}
            metadata = {} if self.mapping == "none" else names
            fields.append({"name": field.name, "type": _TYPES[field.type], "nullable": True, "metadata": metadata})
        return fields


def _bitmap(rows: Sequence[int]) -> bytes:
    """Delta's 64-bit roaring bitmap of numbers below 2^32: one array container for each 65,536 of them."""
    containers: dict[int, list[int]] = {}
    for row in sorted(rows):
        containers.setdefault(row >> 16, []).append(row & 0xFFFF)
    head = struct.pack("<II", 12346, len(containers))
    head += b"".join(struct.pack("<HH", key, len(lows) - 1) for key, lows in containers.items())
    at = len(head) + 4 * len(containers)
    body = b""
    for lows in containers.values():
        head += struct.pack("<I", at + len(body))
        body += struct.pack(f"<{len(lows)}H", *lows)
    return struct.pack("<IQI", 1681511377, 1, 0) + head + body


def _z85(data: bytes) -> str:
    padded = data + b"\0" * (-len(data) % 4)
    return base64.b85encode(padded).decode().translate(str.maketrans(_B85, _Z85))
