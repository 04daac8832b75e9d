"""Which events count: by type, value and time. The others are left out, neither good nor rejected."""

from collections.abc import Callable

import pyarrow as pa
import pyarrow.compute as pc

from etl.file_config import EventsFileConfig
from etl.sources import values


def kept(config: EventsFileConfig) -> Callable[[pa.Table], pa.Table] | None:
    """What leaves the other events (FOUND_EVENTS) out; None where all count. Rows rejected for another reason stay."""
    since, until = (
        None if written is None else values.day(written, setting=f"source.events.{name}")
        for name, written in (("since", config.since), ("until", config.until))
    )
    bounds = [
        ("value", pc.greater_equal, config.min_value),
        ("value", pc.less_equal, config.max_value),
        ("time", pc.greater_equal, since),
        ("time", pc.less, until),
    ]
    bounds = [bound for bound in bounds if bound[2] is not None]
    if not bounds and not config.keep:
        return None

    def keep(rows: pa.Table) -> pa.Table:
        fits = pa.repeat(True, len(rows))
        for name, compare, bound in bounds:
            fits = pc.and_(fits, pc.fill_null(compare(rows.column(name), bound), False))
        fits = pc.or_(fits, pc.is_valid(rows.column("reason")))
        if config.keep:
            types = rows.column("event_type")
            named = pc.is_in(types, pa.array(config.keep, pa.string()))
            fits = pc.and_(fits, pc.or_(named, pc.and_(pc.is_null(types), pc.is_valid(rows.column("reason")))))
        return rows.filter(fits)

    return keep
