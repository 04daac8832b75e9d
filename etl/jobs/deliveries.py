"""Which files of the log have been delivered, and where in the log's order their lines stand.

A file is known by its content, whatever its name. A file of a known name with other content, where no file has the
earlier content any more, was mended, or has grown: it takes the place of the earlier one.
"""

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from etl.jobs.job import Run
from etl.jobs.retraction import less
from etl.jobs.suppressed import without_forgotten
from etl.lake import spark_io
from etl.session import held
from etl.settings import GraftrecError
from etl.sources.columns import FILE_SHIFT
from etl.sources.delta_table import SourceTable
from etl.sources.found_events import filled
from etl.sources.spark_table import SparkTable
from etl.tables import INTERACTIONS

_DIGITS = 16  # of a content's digest in its transaction's name
_SIGN = 1 << 63
RECORDED = "delivered"  # in a commit's metadata: see Delivery.recorded


class LostDeliveries(GraftrecError):
    """The log is to be read anew, but files that were delivered are no longer there."""


@dataclass(frozen=True)
class Delivery:
    """Files to read: `places`, name -> place in the log; `num_places`: of the log, with them; `transactions`: what
    their commit records; `mended`: those that replace an earlier content; `again`: those that are as they were;
    `digests`: name -> content."""

    places: Mapping[str, int]
    num_places: int
    transactions: Mapping[str, int]
    mended: tuple[str, ...] = ()
    again: tuple[str, ...] = ()
    digests: Mapping[str, str] = field(default_factory=dict)

    def recorded(self, table: SourceTable | SparkTable | None) -> str:
        """As the commit names it: [digest, name, place] of each file; of a table its id is the digest."""
        named = [
            [self.digests.get(name, "") if table is None else table.id, name, at] for name, at in self.places.items()
        ]
        return json.dumps(named)


def whole(names: list[str], before: int = 0) -> dict[str, int]:
    """Name -> place of files that follow the `before` earlier ones."""
    return {name: before + place for place, name in enumerate(names)}


def new_files(
    run: Run, found: Mapping[str, str], generation: str, *, before: int, again: Collection[str] = ()
) -> Delivery:
    """What is new among the files `found` (content -> name) beside those of a generation; `before`: places so far;
    `again`: files to read once more, if they are as they were."""
    names = {content: (_content(generation, content), _name(generation, name)) for content, name in found.items()}
    known = spark_io.transactions(run.lake, INTERACTIONS, [one for pair in names.values() for one in pair])
    present = {content[:_DIGITS] for content in found}
    places: dict[str, int] = {}
    mended = []
    for content, name in found.items():
        by_content, by_name = names[content]
        earlier = f"{known[by_name] + _SIGN:0{_DIGITS}x}" if by_name in known else content[:_DIGITS]
        if earlier not in present:
            place = spark_io.transactions(run.lake, INTERACTIONS, [_content(generation, earlier)])
            places[name] = place[_content(generation, earlier)] - 1
            mended.append(name)
        elif by_content not in known:
            places[name] = before
            before += 1
        elif name in again and known[by_content]:
            places[name] = known[by_content] - 1
    same = tuple(name for name in again if name in places and name not in mended)
    transacted = transactions(generation, found, places)
    return Delivery(places, before, transacted, tuple(mended), same, digests_of(found))


def digests_of(found: Mapping[str, str]) -> dict[str, str]:
    """Name -> content of the files `found` (content -> name)."""
    return {name: content for content, name in found.items()}


def compared(run: Run, new: Delivery) -> tuple[int, int]:
    """How many rows of the mended files' earlier contents are gone from them, and how many gone or on other lines."""
    own = run.own()
    assert own is not None
    places = {name: new.places[name] for name in new.mended}
    found = without_forgotten(run.lake, run.engine.source.events(run.spark, only=places))
    events = held(filled(found).where("rejected is null"))
    before = held(of_places(own, list(places.values())))
    moved = less(before, events, also=["source_order"]).count()
    return less(before, events).count() if moved else 0, moved


def appended(new: Delivery, found: Mapping[str, str], generation: str) -> Delivery:
    """The same files, those that are mended too behind all earlier ones."""
    places = dict(new.places) | whole(list(new.mended), new.num_places)
    num_places = new.num_places + len(new.mended)
    return Delivery(places, num_places, transactions(generation, found, places), (), new.again, new.digests)


def transactions(generation: str, found: Mapping[str, str], places: Mapping[str, int]) -> dict[str, int]:
    """Application transactions of files: a content's place (from 1; 0 in older lakes), and a name's content."""
    delivered = {content: name for content, name in found.items() if name in places}
    contents = {_content(generation, content): places[name] + 1 for content, name in delivered.items()}
    names = {_name(generation, name): int(content[:_DIGITS], 16) - _SIGN for content, name in delivered.items()}
    return contents | names


def of_table(generation: str, table: SourceTable | SparkTable) -> dict[str, int]:
    """The application transaction that delivers a version of a table: its id, its version."""
    return {f"delivery/{generation}/{table.id}": table.version}


def lost(run: Run, found: Mapping[str, str], table: SourceTable | SparkTable | None) -> int:
    """How many files that were delivered are no longer there. A generated log can always be made again."""
    if "generation" not in run.last or run.last["kind"] == "generator":
        return 0
    if table is not None and run.last.get("table_id") == table.id:
        return 0
    names = [_content(run.last["generation"], content) for content in found]
    places = spark_io.transactions(run.lake, INTERACTIONS, names).values()
    there = len({place for place in places if place}) + sum(place == 0 for place in places)
    return int(run.last["deliveries"]) - there


def of_places(rows: DataFrame, places: list[int]) -> DataFrame:
    """Rows with a `source_order` of the files at these places."""
    return rows.where(F.shiftright("source_order", FILE_SHIFT).isin(places))


def _content(generation: str, content: str) -> str:
    return f"delivery/{generation}/{content[:_DIGITS]}"


def _name(generation: str, name: str) -> str:
    return f"file/{generation}/{name}"
