"""Recipe: hit rates of served versions, by what users took after their lists; and impressions as a log.

    python -m trainer served --config served/default --served lake-served --lake lake [--impressions shown.parquet]

The source of an ETL run reads the impressions as one more file of events: `path: shown.parquet`, with the columns user,
item, time and event_type.
"""

import os
import uuid
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from etl import tables, text_table
from etl.lake.snapshots import existing_table
from etl.plain_path import absolute
from etl.settings import GraftrecError
from trainer.config import ServedConfig
from trainer.serving.outcomes import HitRate, hit_rates, impressions, shown


def run(config: ServedConfig) -> list[HitRate]:
    """The recipe `served`. Raises GraftrecError."""
    served = _read(config.served, tables.SERVED, ["user", "time", "version", "items"])
    events = _read(config.lake, tables.INTERACTIONS, ["user", "item", "time", "event_type"])
    lists = shown(served, events, hours=config.hours, taken=config.taken)
    found = hit_rates(lists, config.ks)
    columns = ["version", "lists", "users", *(f"hits at {k}" for k in config.ks)]
    rows = [
        [one.version, f"{one.lists:,}", f"{one.users:,}", *(f"{one.hits[k]:.4f}" for k in config.ks)] for one in found
    ]
    print(f"served: lists after which {config.hours:g} hours had passed by the last event of {config.lake}")
    for line in text_table.markdown(columns, rows):
        print(line)
    if config.impressions is not None:
        target = Path(config.impressions)
        target.parent.mkdir(parents=True, exist_ok=True)
        new = target.with_name(f"{target.name}.{uuid.uuid4().hex}.new")
        pq.write_table(impressions(lists, config.event_type), new)
        os.replace(new, target)
        print(f"impressions: {(~lists.taken).sum():,} items shown and not taken at {target}")
    return found


def _row(one: HitRate) -> list[str]:
    return [one.version, f"{one.lists:,}", f"{one.users:,}", *(f"{share:.4f}" for share in one.hits.values())]


def _read(lake: str, table: tables.Table, columns: list[str]) -> pa.Table:
    """Times as microseconds. Raises GraftrecError."""
    rows = existing_table(absolute(lake), table).to_pyarrow_table(columns=columns)
    if not pa.types.is_timestamp(rows.schema.field("time").type):
        raise GraftrecError(
            f"{lake}: expected a log with times, found mere order; hit rates need to know what came after a list"
        )
    place = rows.schema.get_field_index("time")
    return rows.set_column(place, "time", rows["time"].cast(pa.timestamp("us", "UTC")).cast(pa.int64()))
